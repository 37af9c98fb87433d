"""A finished crosscoder as a folder: ``config.json``, ``model.safetensors`` and, for SAE-Lens, ``sae_lens/``.

Nothing here reads or writes pickle.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_crosscoder import __version__
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.errors import CorruptFile, ShapeMismatch
from tl_crosscoder.files import read_json, replaced_folder
from tl_crosscoder.hub.folder import CONFIG
from tl_crosscoder.hub.guard import check_header
from tl_crosscoder.hub.room import told_of_room
from tl_crosscoder.hub.sae_lens.artifact import FOLDER, fill, log_frequencies, refuse_other_files
from tl_crosscoder.hub.sae_lens.thresholds import inexpressible, refuse_inexpressible
from tl_crosscoder.hub.tensors import SafetensorsWeights, all_finite, read

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 3
AXES = {
    "W_enc": "d_sae model d_in",  # as it is stored in memory, so that it is read straight to its place
    "b_enc": "d_sae",
    "W_dec": "d_sae model d_in",
    "b_dec": "model d_in",
    "mean": "model d_in",
    "scale": "model",
    "units.mean": "model d_in",
    "units.scale": "model",
}
#: Versions 1 and 2 had the encoder the other way round.
TURNED_AXES = AXES | {"W_enc": "model d_in d_sae"}
WEIGHTS = "model.safetensors"
OURS = {CONFIG, WEIGHTS, FOLDER, "README.md"}
MAX_D_SAE = 1 << 26
INIT_IN_VERSION_1 = {"norm": "init_norm", "same": "same_init", "seed": "seed"}


def save(
    crosscoder: Crosscoder,
    directory: str | Path,
    *,
    extra: dict[str, Any] | None = None,
    sae_lens: bool | None = None,
    table: "pd.DataFrame | None" = None,
) -> Path:
    """The directory, now holding the crosscoder; written beside it first, so that it is never half there.

    ``extra``: JSON to keep with it, such as the hook and the models.  An existing directory is replaced once the new one is
    complete, and only if it holds nothing but a crosscoder (FileExistsError).  ValueError for weights of several dtypes and for NaN
    and Inf, which nobody could load.

    ``sae_lens``: also write ``sae_lens/``, a folder that ``sae_lens.SAE.load_from_disk`` reads.  Its weights have the normaliser
    folded in, so that it is a second copy and doubles the size on disk.  None: wherever SAE-Lens can express the crosscoder;
    True: raise ValueError, with the reason, where it cannot; False: the half of the size.  With the latent ``table`` it also says
    how often each latent fires.
    """
    directory = Path(directory).resolve()
    _refuse_unreadable(crosscoder)
    if sae_lens:
        refuse_inexpressible(crosscoder)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; save to a folder of its own")
    refuse_other_files(directory / FOLDER)
    if directory.exists() and (others := sorted({entry.name for entry in directory.iterdir()} - OURS)):
        raise FileExistsError(
            f"{directory} holds {others[0]!r}, which is no part of a crosscoder; save to a folder of its own"
        )
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "axes": AXES,
        "models": _models(crosscoder.n_models),
        "crosscoder": crosscoder.config,
        "extra": extra or {},
    }
    text = json.dumps(config, indent=2, allow_nan=False)
    sparsity = log_frequencies(crosscoder, table)
    size = sum(tensor.nbytes for tensor in crosscoder.state_dict().values())
    with told_of_room(directory, size if sae_lens is False else 2 * size), replaced_folder(directory) as new:
        (new / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(_tensors(crosscoder), new / WEIGHTS)
        if sae_lens is not False and inexpressible(crosscoder) is None:
            (new / FOLDER).mkdir()
            fill(new / FOLDER, crosscoder, extra or {}, sparsity)
    return directory


def load(directory: str | Path, dtype: torch.dtype | None = None) -> Crosscoder:
    """The crosscoder that ``save`` wrote, bit-equal, or in another ``dtype``; on the CPU and in ``eval()``.

    The weights are read straight to their places, so that nothing is in memory twice.  Raises CorruptFile, with the reason, for a
    file that is truncated, altered or hostile, before anything of its size is allocated.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}; wanted a folder that tlc.save wrote")
    written = read_config(directory)
    config, turned = written["crosscoder"], written["axes"] == TURNED_AXES
    try:
        _check_sizes(config)
        with torch.device("meta"):
            crosscoder = Crosscoder.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{directory / CONFIG}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in _named(crosscoder).items()}
    if turned:
        expected["W_enc"] = (crosscoder.n_models, crosscoder.d_in, crosscoder.d_sae)
    weights = SafetensorsWeights(directory / WEIGHTS, check_header(directory / WEIGHTS, expected))
    state = {_inside(name): read(weights, name, dtype) for name in expected if name != "W_enc"}
    if not all((state[name] > 0).all() for name in ("normalizer.scale", "units.scale") if name in state):
        raise CorruptFile(f"{directory / WEIGHTS}: a scale is not above 0")
    state["W_enc_rows"] = torch.empty_like(state["W_dec"])
    weights.read_into("W_enc", state["W_enc_rows"].permute(1, 2, 0) if turned else state["W_enc_rows"])
    crosscoder.load_state_dict(state, assign=True)
    try:
        crosscoder.check_padding()
    except ShapeMismatch as error:
        raise CorruptFile(f"{directory / WEIGHTS}: {error}") from error
    return crosscoder.eval()


def read_config(directory: str | Path) -> dict[str, Any]:
    """The checked ``config.json``; ``["extra"]`` is what ``save`` was given."""
    path = Path(directory) / CONFIG
    config = read_json(path)
    known = {"format_version", "library_version", "axes", "models", "crosscoder", "extra"}
    found = config.get("format_version")
    if type(found) is not int or found < 1:
        raise CorruptFile(
            f"{path}: format_version {found!r} is not a version of this format; `tl-crosscoder inspect` tells whose the files are"
        )
    if found > FORMAT_VERSION:
        raise CorruptFile(
            f"{path}: format_version {found} is newer than {FORMAT_VERSION}, the newest this library reads; upgrade tl-crosscoder"
        )
    if set(config) != known:
        raise CorruptFile(f"{path}: unknown or missing fields {sorted(set(config) ^ known)}")
    if (
        config["axes"] != (AXES if found >= 3 else TURNED_AXES)
        or not isinstance(config["crosscoder"], dict)
        or not isinstance(config["extra"], dict)
    ):
        raise CorruptFile(f"{path}: 'axes', 'crosscoder' or 'extra' is not what this format writes")
    return _from_version_1(path, config) if found == 1 else config


def _from_version_1(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """It had no encoder to choose and no partition, and the init's settings were the crosscoder's own."""
    crosscoder = dict(config["crosscoder"])
    for name in INIT_IN_VERSION_1.values():
        if name not in crosscoder:
            raise CorruptFile(f"{path}: the crosscoder's setting {name!r} is missing")
    init = {name: crosscoder.pop(old) for name, old in INIT_IN_VERSION_1.items()}
    added = {"encoder": "sum", "partition": asdict(Partition()), "init": asdict(Init()) | init}
    return {**config, "crosscoder": crosscoder | added}


def _models(n: int) -> list[str]:
    """One model axis alone holds what base and tuned were made into, mostly their difference."""
    return ["difference"] if n == 1 else ["base", "tuned", *(str(m) for m in range(2, n))]


def _named(crosscoder: Crosscoder) -> dict[str, Tensor]:
    """The tensors under their names in the file."""
    state = {
        _outside(name): tensor for name, tensor in crosscoder.state_dict().items() if name != "W_enc_rows"
    }
    return {"W_enc": crosscoder.W_enc_rows.detach(), **state}


def _tensors(crosscoder: Crosscoder) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in _named(crosscoder).items()}


def _refuse_unreadable(crosscoder: Crosscoder) -> None:
    """Raise ValueError for what ``load`` would not read back: better now than when the original is gone."""
    state = crosscoder.state_dict()
    dtype = crosscoder.W_dec.dtype
    for name, tensor in state.items():
        if tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and W_dec {dtype}, and a file has one dtype; crosscoder.to({dtype}) first"
            )
        if not all_finite(tensor):
            raise ValueError(f"{name} holds NaN or Inf, so that nobody could use what would be saved")


def _outside(name: str) -> str:
    return name.removeprefix("normalizer.")


def _inside(name: str) -> str:
    return f"normalizer.{name}" if name in ("mean", "scale") else name


def _check_sizes(config: dict[str, Any]) -> None:
    for name, largest in (("d_in", 1 << 20), ("d_sae", MAX_D_SAE), ("n_models", 1 << 10)):
        if type(size := config.get(name)) is not int or not 1 <= size <= largest:
            raise ValueError(f"{name} is {size!r}, want a whole number in 1..{largest}")
    for name in ("sparsity", "partition", "init"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{name} is {config.get(name)!r}, want a description")
