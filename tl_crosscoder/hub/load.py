"""A crosscoder from wherever and whoever: a repository on the Hub or a path, in any format that is known here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.hub.fit import Fit, check_fit
from tl_crosscoder.hub.formats.base import Conventions, Given
from tl_crosscoder.hub.formats.detect import described, detect
from tl_crosscoder.hub.source import Source, parse_source


@dataclass(frozen=True)
class Origin:
    """Where a crosscoder was loaded from, what its files mean, and what was measured; ``fit`` is None where nothing was."""

    source: str
    conventions: Conventions
    fit: Fit | None


_ORIGINS: WeakKeyDictionary[Crosscoder, Origin] = WeakKeyDictionary()


def load(
    source: str | Path | Source,
    *,
    check: Any = None,
    dtype: torch.dtype | None = None,
    scale: Any = None,
    mean: Any = None,
    threshold: float | None = None,
    token: str | bool | None = None,
    cache: str | Path | None = None,
) -> Crosscoder:
    """The crosscoder at ``owner/repo[@revision][:subfolder]`` or in a local folder or file, on the CPU and in ``eval()``.

    What was saved here comes back bit-equal.  The formats of other tools are told by their tensors and settings and brought to our
    conventions: base first, no subtraction of b_dec, thresholds where theirs were.  :func:`origin` and ``tl-crosscoder inspect``
    say what each file meant.  Pickled weights are walked without being run, then read by torch with ``weights_only=True``; no code
    of a repository ever runs.

    Some formats lose what is needed to run them; then UnreadableFormat names the arguments to pass.  ``scale``: what each model's
    activations are multiplied by (one number, one a model, or [model d_in]) after ``mean`` is taken off.  ``threshold``: of a
    BatchTopK, in the units that the format ranks by.

    ``check``: a :class:`ModelPair` or captured activations.  L0 and FVE are measured on a few thousand tokens; PairMismatch where
    they are not what the files claim.  ``dtype``: such as ``torch.bfloat16``, cast while reading; None keeps the stored one.
    """
    place = parse_source(source)
    form, contents = detect(_local(place, token, cache))
    said = described(form, contents)
    given = Given(scale=scale, mean=mean, threshold=threshold, dtype=dtype)
    _agree(str(contents.folder), said, given)
    crosscoder = form.read(contents, given)
    fit = None if check is None else check_fit(crosscoder, check, said)
    _ORIGINS[crosscoder] = Origin(str(place), said, fit)
    return crosscoder


def origin(crosscoder: Crosscoder) -> Origin:
    """What :func:`load` found out about this crosscoder; KeyError for one that was not loaded."""
    if crosscoder not in _ORIGINS:
        raise KeyError("this crosscoder was not loaded from files; only load() knows where one is from")
    return _ORIGINS[crosscoder]


def _local(place: Source | Path, token: str | bool | None, cache: str | Path | None) -> Path:
    if isinstance(place, Path):
        return place
    from tl_crosscoder.hub.download import download, list_files

    names = wanted(place, list(list_files(place, token=token, cache=cache).files))
    return download(place, names, token=token, cache=cache)


def wanted(place: Source, files: list[str]) -> tuple[str, ...]:
    """Patterns of the files to download: settings and weights; pickled weights only where there are no others."""
    here = [path for path in files if "/" not in path]
    for suffix in (".safetensors", ".pt", ".pth"):
        if any(path.endswith(suffix) for path in here):
            return ("*.json", "*.yaml", f"*{suffix}")
    folders = sorted(
        {path.rsplit("/", 1)[0] for path in files if path.endswith((".safetensors", ".pt", ".pth"))}
    )
    where = (
        f"there are weights in {', '.join(folders[:8]):.300}; name one: {place}:{folders[0]}"
        if folders
        else "nor anywhere below it"
    )
    raise UnreadableFormat(f"{place}: no .safetensors or .pt file there, {where}")


def _agree(folder: str, said: Conventions, given: Given) -> None:
    """Everything that the files leave open was given, and nothing that they state."""
    if missing := [name for name in said.wants if getattr(given, name) is None]:
        raise UnreadableFormat(
            f"{folder} ({said.format}): " + "; and ".join(said.wants[name] for name in missing)
        )
    for name in ("scale", "threshold"):
        if getattr(given, name) is not None and name not in said.wants:
            stated = said.normalisation if name == "scale" else said.threshold
            raise ValueError(f"{name}= was given, but {folder} ({said.format}) states its own: {stated}")
    if given.mean is not None and given.scale is None:
        raise ValueError("mean= goes with scale=: (x - mean) · scale")
    if given.threshold is not None and not given.threshold > 0:
        raise ValueError(
            f"threshold wants a number above 0, got {given.threshold}: without one every positive activation would stay"
        )
