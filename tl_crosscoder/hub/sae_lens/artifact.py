"""The folder that SAE-Lens loads: ``cfg.json``, ``sae_weights.safetensors`` and, where it is known how often each latent fires,
``sparsity.safetensors``.  SAE-Lens itself is not needed here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import read_json, replaced_folder, sync
from tl_crosscoder.hub.guard import check_header, check_tensors
from tl_crosscoder.hub.sae_lens.flat import Flat, flatten
from tl_crosscoder.hub.sae_lens.thresholds import refuse_inexpressible
from tl_crosscoder.hub.sae_lens.unflat import Origin, unflatten
from tl_crosscoder.hub.sae_lens.words import DTYPES, cfg, origin

if TYPE_CHECKING:
    import pandas as pd

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
OURS = {CONFIG, WEIGHTS, SPARSITY}
#: SAE-Lens' own, below its logarithm: a latent that never fires has -10.
NEVER = 1e-10
#: The name of the folder beside ``model.safetensors``, and so the ``sae_id`` in a repository.
FOLDER = "sae_lens"


def write_sae_lens(
    crosscoder: Crosscoder,
    folder: str | Path,
    *,
    extra: dict[str, Any] | None = None,
    table: "pd.DataFrame | None" = None,
) -> Path:
    """The folder, now one that ``sae_lens.SAE.load_from_disk`` reads as an SAE of the concatenated raw activations.

    ``extra`` is what :func:`tl_crosscoder.save` keeps with a crosscoder: the pair or its hook, models, ``context_size`` and
    ``prepend_bos``.  ``table``: of the latents; the log10 of its frequencies is what SAE-Lens calls sparsity.

    Raises ValueError, with the reason and before anything is written, for a crosscoder that SAE-Lens cannot express;
    FileExistsError for a folder that holds other files.
    """
    folder = Path(folder).resolve()
    refuse_inexpressible(crosscoder)
    refuse_other_files(folder)
    found = log_frequencies(crosscoder, table)
    with replaced_folder(folder) as new:
        fill(new, crosscoder, extra or {}, found)
    return folder


def read_sae_lens(folder: str | Path) -> Crosscoder:
    """The crosscoder in a folder that :func:`write_sae_lens` wrote, or SAE-Lens' ``save_model`` afterwards; in ``eval()``.

    It computes what was saved, folded; norms, losses and classes are in the units that the original was trained in.  Raises
    CorruptFile for a file that is truncated, altered or hostile, and ValueError for an SAE that is no crosscoder.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    try:
        block = config["metadata"]["crosscoder"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{folder}: an SAE of one model, or one whose metadata were lost: {CONFIG} has no metadata.crosscoder that says how "
            "many models its activations are of"
        ) from None
    try:
        k, shapes, dtype = _plain(config), _shapes(config), DTYPES[config["dtype"]]
        found = origin(block, dtype)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise CorruptFile(f"{folder / CONFIG}: {error}") from error
    return _read(folder, shapes, found, k, dtype)


def log_frequencies(crosscoder: Crosscoder, table: "pd.DataFrame | None") -> Float[Tensor, "d_sae"] | None:
    """log10 of the share of tokens on which each latent is active; None without a table that tells it."""
    if table is None or "frequency" not in table:
        return None
    frequency = table["frequency"].sort_index()
    if list(frequency.index) != list(range(crosscoder.d_sae)):
        raise ValueError(
            f"the table has {len(table)} rows, wanted one for each of the latents 0..{crosscoder.d_sae - 1}; pass the whole table"
        )
    return (torch.tensor(frequency.to_numpy(dtype="float64")) + NEVER).log10().float()


def fill(
    folder: Path, crosscoder: Crosscoder, extra: dict[str, Any], sparsity: Float[Tensor, "d_sae"] | None
) -> None:
    """Write the files into an empty folder, and onto the disk."""
    flat = flatten(crosscoder)
    text = json.dumps(cfg(crosscoder, flat, extra), indent=1, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file({name: tensor.detach().cpu() for name, tensor in flat.tensors().items()}, folder / WEIGHTS)
    if sparsity is not None:
        save_file({"sparsity": sparsity}, folder / SPARSITY)
    for path in folder.iterdir():
        sync(path)


def _read(folder: Path, shapes: dict[str, tuple[int, ...]], found: Origin, k: int | None, dtype: torch.dtype):
    path = folder / WEIGHTS
    check_header(path, shapes)
    tensors = load_file(path)
    check_tensors(path, tensors)
    return unflatten(
        Flat(**{name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, k=k), found
    )


def refuse_other_files(folder: Path) -> None:
    """Raise FileExistsError for a folder that holds more than an SAE: it will be replaced."""
    if folder.exists() and (others := sorted({entry.name for entry in folder.iterdir()} - OURS)):
        raise FileExistsError(
            f"{folder} holds {others[0]!r}, which is no part of an SAE; write to a folder of its own"
        )


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d_in, d_sae = config["d_in"], config["d_sae"]
    if not all(type(size) is int and 1 <= size <= 1 << 26 for size in (d_in, d_sae)):
        raise ValueError(f"d_in is {d_in!r:.40} and d_sae {d_sae!r:.40}, want whole numbers")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return shapes if config["architecture"] == "topk" else {**shapes, "threshold": (d_sae,)}


def _plain(config: dict[str, Any]) -> int | None:
    """The k of a topk; ValueError for settings under which the weights mean something else than in what we write."""
    plain = {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
    if config["architecture"] == "topk":
        plain["rescale_acts_by_decoder_norm"] = False
    elif config["architecture"] != "jumprelu":
        raise ValueError(f"the architecture is {config['architecture']!r:.40}, wanted 'jumprelu' or 'topk'")
    for name, wanted in plain.items():
        if config[name] != wanted:
            raise ValueError(f"{name} is {config[name]!r:.40}, wanted {wanted!r}")
    if config["dtype"] not in DTYPES:
        raise ValueError(f"the dtype is {config['dtype']!r:.40}; known: {', '.join(DTYPES)}")
    return config["k"] if config["architecture"] == "topk" else None
