"""A crosscoder from wherever and whoever: a repository on the Hub or a path, in any format that is known here."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.hub.fit import Fit, check_fit
from tl_crosscoder.hub.formats.base import Conventions, Given
from tl_crosscoder.hub.formats.contents import Contents
from tl_crosscoder.hub.formats.detect import described, detect
from tl_crosscoder.hub.formats.native import Native
from tl_crosscoder.hub.source import Source, parse_source
from tl_crosscoder.hub.wanted import wanted


@dataclass(frozen=True)
class Origin:
    """Where a crosscoder was loaded from, what its files mean, and what was measured; ``fit`` is None where nothing was.

    ``extra``: for :func:`tl_crosscoder.save` to keep with it: its own, of a crosscoder that was saved here, else the conventions.
    ``statistics``: numbers of the files that a crosscoder has no place for, such as a standard deviation for each dimension.
    """

    source: str
    conventions: Conventions
    fit: Fit | None
    extra: dict[str, Any]
    statistics: dict[str, list[float]]


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
    they are not what the files claim, and for a pair that is seen to be another one, or the other way round.  ``dtype``: such as
    ``torch.bfloat16``, cast while reading; None keeps the stored one.
    """
    place = parse_source(source)
    form, contents = detect(_local(place, token, cache))
    said = described(form, contents)
    given = Given(scale=scale, mean=mean, threshold=threshold, dtype=dtype)
    _agree(str(contents.folder), said, given)
    crosscoder = form.read(contents, given)
    extra = _extra(str(place), said, contents)
    fit = None if check is None else check_fit(crosscoder, check, said, trained=extra.get("pair"))
    _ORIGINS[crosscoder] = Origin(str(place), said, fit, extra, form.statistics(contents))
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


def _extra(source: str, said: Conventions, contents: Contents) -> dict[str, Any]:
    if said.format == Native.name:
        return contents.settings["extra"]
    hook = re.search(r"blocks\.\d+\.hook_resid_post", said.hook)
    from_there = {"source": source, **said.as_dict(), "notes": list(said.notes)}
    return {"imported": from_there, **({"hook": hook[0]} if hook else {})}


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
