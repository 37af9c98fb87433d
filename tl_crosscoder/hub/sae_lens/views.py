"""One model's half of a crosscoder as an SAE of that model: exact with the other model at hand, approximate without."""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.hub.sae_lens.convert import assembled
from tl_crosscoder.hub.sae_lens.extra import needs_sae_lens
from tl_crosscoder.hub.sae_lens.flat import Flat, flatten
from tl_crosscoder.hub.sae_lens.imputed import ENCODERS, Fidelity, fidelity, imputed
from tl_crosscoder.hub.sae_lens.words import cfg, full_name
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import refuse_unlike

if TYPE_CHECKING:
    from sae_lens import SAE

    from tl_crosscoder.hub.sae_lens.native.paired_sae import PairedSAE


def paired(crosscoder: Crosscoder, model: int, *, hook: str) -> "PairedSAE":
    """The crosscoder's half of ``model`` (0 base, 1 tuned) as an SAE of SAE-Lens at ``hook``; its codes are the crosscoder's own.

    It reads the other model too: ``with sae.bound(other_acts): model.run_with_saes(tokens, saes=[sae])``.  It cannot be saved.
    """
    needs_sae_lens()
    from tl_crosscoder.hub.sae_lens.native.paired_sae import PairedSAE

    flat = flatten(crosscoder)
    half = _half(crosscoder, flat, model)
    config = _config(crosscoder, half, model, {"hook": hook})
    config["metadata"]["d_in_other"] = crosscoder.widths[1 - model]
    return assembled(
        PairedSAE, config, {**half.tensors(), "W_enc_other": _encoder(crosscoder, flat, 1 - model).clone()}
    )


def as_sae(
    crosscoder: Crosscoder,
    model: int,
    batches: Iterable[Tensor] | Any,
    *,
    encoder: Literal["linear", "copy", "mean"],
    hook: str,
    extra: dict[str, Any] | None = None,
    max_tokens: int = 20_000,
) -> "SAE":
    """A plain SAE of SAE-Lens that reads ``model`` (0 base, 1 tuned) alone: an approximation of the crosscoder's half of it.

    The other model's activations are replaced by a guess, folded into the encoder: ``"linear"``, a least squares fit of them on
    this model's; ``"copy"``, this model's own, blind to every difference; ``"mean"``, their mean.  The decoder is exact.

    ``batches``: raw paired activations [batch, model, d_in], a store or an iterable.  The guess is fitted on the first halves of
    up to ``max_tokens`` of them and measured on the second halves: a UserWarning tells the fidelity, and
    ``cfg.metadata.crosscoder_view`` keeps it.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"no encoder named {encoder!r}; known: {', '.join(ENCODERS)}")
    needs_sae_lens()
    from sae_lens import JumpReLUSAE, TopKSAE

    if encoder == "copy":
        refuse_unlike(crosscoder, "encoder='copy'", "pass encoder='linear'")
    flat = flatten(crosscoder)
    half = _half(crosscoder, flat, model)
    fitted, held_out = _halves(batches, max_tokens)
    own, other = (fitted[:, m, : crosscoder.widths[m]] for m in (model, 1 - model))
    half = imputed(half, _encoder(crosscoder, flat, 1 - model), ENCODERS[encoder](own, other))
    measured = fidelity(flat, half, held_out, model)
    view = {"model": model, "encoder": encoder, **vars(measured)}
    config = _config(crosscoder, half, model, {**(extra or {}), "hook": hook}, view=view)
    warnings.warn(_warning(model, encoder, measured), UserWarning, stacklevel=2)
    return assembled(TopKSAE if half.k else JumpReLUSAE, config, half.tensors())


def _half(crosscoder: Crosscoder, flat: Flat, model: int) -> Flat:
    """What the model reads and writes."""
    if crosscoder.n_models != 2:
        raise ValueError(f"a view is of one of two models; this crosscoder has {crosscoder.n_models}")
    if model not in (BASE, TUNED):
        raise ValueError(f"model is 0 (base) or 1 (tuned), got {model!r}")
    d_in = crosscoder.d_in
    part = slice(model * d_in, model * d_in + crosscoder.widths[model])
    W_dec, b_dec = flat.W_dec[:, part].contiguous(), flat.b_dec[part].clone()
    return Flat(_encoder(crosscoder, flat, model).clone(), flat.b_enc, W_dec, b_dec, flat.threshold, flat.k)


def _encoder(crosscoder: Crosscoder, flat: Flat, model: int) -> Tensor:
    return flat.W_enc.unflatten(0, (2, -1))[model, : crosscoder.widths[model]]


def _config(
    crosscoder: Crosscoder, half: Flat, model: int, extra: dict[str, Any], view: dict[str, Any] | None = None
) -> dict[str, Any]:
    """As of the crosscoder, save that nobody may take it for one."""
    config = cfg(crosscoder, half, extra)
    block = config["metadata"].pop("crosscoder")
    config["metadata"]["model_name"] = full_name(block["models"][model])
    if view is not None:
        config["metadata"]["crosscoder_view"] = view
    return config


def _halves(batches: Any, max_tokens: int) -> tuple[Tensor, Tensor]:
    """The first and the second halves of some batches."""
    found: list[tuple[Tensor, Tensor]] = []
    n = 0
    for x in batches.batches(4096) if hasattr(batches, "batches") else batches:
        x = x[: max_tokens - n].detach()
        n += len(x)
        found.append((x[: len(x) // 2], x[len(x) // 2 :]))
        if n >= max_tokens:
            break
    if n < 2:
        raise ValueError(f"a view is fitted and measured on tokens of both models, got {n}")
    first, second = zip(*found, strict=True)
    return torch.cat(first), torch.cat(second)


def _warning(model: int, encoder: str, measured: Fidelity) -> str:
    return (
        f"an approximation: this SAE of the {('base', 'tuned')[model]} model guesses what the other model has ({encoder}).  On "
        f"{measured.tokens} held-out tokens its codes are {measured.relative_error:.1%} off, the same latents are active to "
        f"{measured.jaccard:.1%}, and it explains {measured.fve:.1%} of the variance where the crosscoder explains "
        f"{measured.fve_crosscoder:.1%}.  For exact codes: tl_crosscoder.paired"
    )
