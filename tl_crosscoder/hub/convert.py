"""One crosscoder in the files of another tool."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.normalizer import Normalizer
from tl_crosscoder.dictionary.sparsity import BatchTopK, PerModel, ReLU, Sparsity
from tl_crosscoder.errors import UnreadableFormat
from tl_crosscoder.files import replaced_folder
from tl_crosscoder.hub.room import told_of_room
from tl_crosscoder.hub.sae_lens.artifact import write_sae_lens
from tl_crosscoder.hub.save import save

#: Their numbers for our code norms.
CODE_NORMS = {"sum": (1, "CROSSCODER"), "l2": (2, "SAE"), "none": (4, "NONE"), "decoupled": (5, "DECOUPLED")}
THEIRS = {"config.json", "model.safetensors"}


def convert(
    crosscoder: Crosscoder, to: str, folder: str | Path, *, extra: dict[str, Any] | None = None
) -> Path:
    """The folder, now holding the crosscoder as ``to`` has it: ``tl-crosscoder``, ``sae-lens`` or ``dictionary_learning``.

    Codes and reconstructions stay what they are; to dictionary_learning and back every weight keeps its bits.  SAE-Lens has no
    normaliser: there it is folded into the weights, and comes back folded; to dictionary_learning it is taken out again.

    Raises UnreadableFormat or ValueError, before anything is written, for what the other format has no place for.  ``extra`` as
    :func:`tl_crosscoder.save` takes it.
    """
    if to not in WRITERS:
        raise KeyError(f"no format named {to!r} to convert to; known: {', '.join(WRITERS)}")
    folder = Path(folder).resolve()
    with told_of_room(folder, sum(tensor.nbytes for tensor in crosscoder.state_dict().values())):
        return WRITERS[to](crosscoder, folder, extra)


def _write_ours(crosscoder: Crosscoder, folder: Path, extra: dict[str, Any] | None) -> Path:
    return save(crosscoder, folder, extra=extra)


def _write_sae_lens(crosscoder: Crosscoder, folder: Path, extra: dict[str, Any] | None) -> Path:
    return write_sae_lens(crosscoder, folder, extra=extra)


def write_dictionary_learning(
    crosscoder: Crosscoder, folder: Path, extra: dict[str, Any] | None = None
) -> Path:
    """The folder, now one that the family's ``from_pretrained`` reads: config.json and model.safetensors.

    Of a normaliser the family keeps a standard deviation for each number; here all of a model's are the same, and make its scale.
    """
    _refuse(crosscoder)
    crosscoder = _unfolded(crosscoder)
    if folder.exists() and (others := sorted({entry.name for entry in folder.iterdir()} - THEIRS)):
        raise FileExistsError(f"{folder} holds {others[0]!r}; convert to a folder of its own")
    number, name = CODE_NORMS[crosscoder.code_norm]
    choices = [part for part in _choices(crosscoder.sparsity) if isinstance(part, BatchTopK)]
    tensors = {
        "encoder.weight": crosscoder.W_enc.detach(),
        "encoder.bias": crosscoder.b_enc.detach(),
        "decoder.weight": crosscoder.W_dec.detach().permute(1, 0, 2),
        "decoder.bias": crosscoder.b_dec.detach(),
        "code_normalization_id": torch.tensor(number),
        "target_rms": torch.tensor(1.0),
        **_normaliser(crosscoder),
    }
    config = {
        "activation_dim": crosscoder.d_in,
        "dict_size": crosscoder.d_sae,
        "num_layers": crosscoder.n_models,
        "code_normalization": name,
        "target_rms": 1.0,
        "dict_class": "BatchTopKCrossCoder" if choices else "CrossCoder",
        "trainer": _trainer(extra or {}),
    }
    if choices:
        thresholds = torch.stack([part.threshold for part in choices])
        apart = crosscoder.code_norm == "decoupled"
        tensors |= {"k": torch.tensor(choices[0].k), "threshold": thresholds if apart else thresholds[0]}
        config["k"] = choices[0].k
    with replaced_folder(folder) as new:
        text = json.dumps(
            {key: value for key, value in config.items() if value is not None}, indent=1, allow_nan=False
        )
        (new / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(
            {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, new / "model.safetensors"
        )
    return folder


def _refuse(crosscoder: Crosscoder) -> None:
    """What the family has no place for."""
    choices = _choices(crosscoder.sparsity)
    apart, units = isinstance(crosscoder.sparsity, PerModel), crosscoder.units or crosscoder.normalizer
    other = [part for part in choices if not isinstance(part, BatchTopK if apart else BatchTopK | ReLU)]
    ks = [part.k for part in choices if isinstance(part, BatchTopK)]
    reasons = {
        f"the sparsity {type((*other, None)[0]).__name__}": bool(other),
        "a BatchTopK without a threshold": any(
            isinstance(p, BatchTopK) and not p.threshold > 0 for p in choices
        ),
        "a k that is no whole number": any(type(k) is not int for k in ks),
        "a k for each model": len(set(ks)) > 1,
        "a normaliser beside a decoupled choice": apart
        and bool(units.mean.any() or (units.scale != 1).any()),
        "an encoder that takes the mean of the models": crosscoder.encoder != "sum",
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UnreadableFormat(f"dictionary_learning has no place for {found[0]}")


def _choices(sparsity: Sparsity) -> tuple[Sparsity, ...]:
    """The one choice for all models, or that of each."""
    return sparsity.parts if isinstance(sparsity, PerModel) else (sparsity,)


@torch.no_grad()
def _unfolded(crosscoder: Crosscoder) -> Crosscoder:
    """The same function with the normaliser beside the weights again, so that their norms are those that thresholds are told in."""
    units = crosscoder.units
    if units is None:
        return crosscoder
    made = Crosscoder.from_config(crosscoder.config | {"folded": False}).to(crosscoder.W_dec)
    made.sparsity.load_state_dict(crosscoder.sparsity.state_dict())
    made.normalizer = Normalizer(units.mean, units.scale)
    rows, scale = crosscoder.W_enc_rows, units.scale[:, None]
    made.W_enc_rows.copy_(rows / scale)
    made.b_enc.copy_(crosscoder.b_enc + rows.flatten(1) @ units.mean.flatten())
    made.W_dec.copy_(crosscoder.W_dec * scale)
    made.b_dec.copy_(units.normalise(crosscoder.b_dec[None])[0])
    return made.eval()


def _normaliser(crosscoder: Crosscoder) -> dict[str, Float[Tensor, "model *rest"]]:
    """Their buffers; NaN is their word for no normaliser."""
    mean, scale = crosscoder.normalizer.mean, crosscoder.normalizer.scale
    if not mean.any() and (scale == 1).all():
        nan = torch.full_like(mean, float("nan"))
        return {
            "activation_mean": nan,
            "activation_std": nan.clone(),
            "activation_global_scale": torch.ones_like(scale),
        }
    std = (1 / scale.double() / mean.shape[1] ** 0.5).to(mean.dtype)[:, None].expand_as(mean)
    return {"activation_mean": mean, "activation_std": std, "activation_global_scale": scale}


def _trainer(extra: dict[str, Any]) -> dict[str, Any] | None:
    """The layer, where the hook is a layer's output."""
    pair = extra.get("pair", extra)
    words = str(pair.get("hook") or "").split(".") if isinstance(pair, dict) else []
    if len(words) == 3 and words[1].isdigit() and words[2] == "hook_resid_post":
        return {"layer": int(words[1])}
    return None


WRITERS: dict[str, Callable[[Crosscoder, Path, dict[str, Any] | None], Path]] = {
    "tl-crosscoder": _write_ours,
    "sae-lens": _write_sae_lens,
    "dictionary_learning": write_dictionary_learning,
}
