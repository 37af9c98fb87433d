"""What the decoder alone says about a latent: how much of it each model has."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.base import Analysis, Columns, EncodedBatch
from tl_crosscoder.analysis.mirrors import mirrored
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import alike, refuse_unlike

#: class -> interval of delta_norm (Minder et al. 2025); anything between is "other"
CLASSES = {"base_only": (0.0, 0.1), "shared": (0.4, 0.6), "tuned_only": (0.9, 1.0)}
NO_DIRECTION = 1e-8


def delta_norm(norms: Float[Tensor, "d_sae model"]) -> Float[Tensor, " d_sae"]:
    """1: the latent writes to the tuned model only.  0.5: to both alike.  0: to the base model only.

    ``½ ((n_tuned − n_base) / max(n_tuned, n_base) + 1)`` on decoder norms in normalised units; NaN where both norms are 0.
    The authors' code stores the opposite sign; this is the orientation of their text.

    Source: Minder et al. 2025, arXiv:2504.02922, Δnorm.
    """
    base, tuned = norms[:, BASE], norms[:, TUNED]
    largest = torch.maximum(base, tuned)
    ratio = torch.where(largest > 0, (tuned - base) / largest, torch.nan)
    return (ratio + 1) / 2


def relative_norm(norms: Float[Tensor, "d_sae model"]) -> Float[Tensor, " d_sae"]:
    """``n_tuned / (n_base + n_tuned)``: the same order as ``delta_norm``, which exceeds .9 exactly where this exceeds 5/6.

    Source: Lindsey et al. 2024, Sparse Crosscoders, model diffing.
    """
    base, tuned = norms[:, BASE], norms[:, TUNED]
    return torch.where(base + tuned > 0, tuned / (base + tuned), torch.nan)


def decoder_cosine(crosscoder: Crosscoder) -> Float[Tensor, " d_sae"]:
    """Cosine of a latent's two decoder directions; NaN where one of them is about 0, or the models' widths differ."""
    base, tuned = crosscoder.W_dec.detach().double()[:, [BASE, TUNED]].unbind(1)
    norms = base.norm(dim=-1), tuned.norm(dim=-1)
    defined = (torch.minimum(*norms) > NO_DIRECTION) & alike(crosscoder)
    return torch.where(defined, (base * tuned).sum(-1) / (norms[0] * norms[1]), torch.nan)


def classify(delta: Iterable[float], fired: Iterable[float]) -> list[str]:
    """The class of each latent by ``delta_norm``; ``dead`` (never fired on these tokens) overrides it."""
    return [_class(d, n) for d, n in zip(delta, fired, strict=True)]


def _class(delta: float, fired: float) -> str:
    if not fired:
        return "dead"
    if delta < CLASSES["base_only"][1]:
        return "base_only"
    if delta > CLASSES["tuned_only"][0]:
        return "tuned_only"
    low, high = CLASSES["shared"]
    return "shared" if low <= delta < high else "other"


def mirror_pairs(crosscoder: Crosscoder, fired: Iterable[float], cosine: float = 0.9) -> int:
    """How many pairs of a tuned-only and a base-only latent write nearly the same direction: one concept cut in two.

    The sign of Latent Decoupling (Minder et al. 2025, arXiv:2504.02922).  Latents that never fired do not count.
    """
    refuse_unlike(crosscoder, "a mirror pair")
    classes = classify(delta_norm(crosscoder.decoder_norms().detach()).tolist(), fired)
    tuned, base = (torch.tensor([c == name for c in classes]) for name in ("tuned_only", "base_only"))
    rows = crosscoder.decoder_rows().detach().cpu()
    return mirrored(rows, tuned.nonzero()[:, 0], base.nonzero()[:, 0], cosine=cosine, most=0).n


class DecoderNorms(Analysis):
    """``norm_base, norm_tuned, delta_norm, cosine``: no tokens needed."""

    compares_models = True

    def update(self, batch: EncodedBatch) -> None:
        """The decoder is the same for every batch."""

    def columns(self) -> Columns:
        norms = self.crosscoder.decoder_norms().detach().double()
        return {
            "norm_base": norms[:, BASE],
            "norm_tuned": norms[:, TUNED],
            "delta_norm": delta_norm(norms),
            "cosine": decoder_cosine(self.crosscoder),
        }
