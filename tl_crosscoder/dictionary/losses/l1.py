"""The price of an activation, weighed by its decoders."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress


@LOSSES.register("l1")
@dataclass(frozen=True)
class L1:
    """``weight · mean_n Σ_j f_j · norm_j``, the weight rising linearly from 0 over ``warmup_fraction`` of training.

    ``norm="sum"``: Σ_m ‖d_j^m‖ (Lindsey et al. 2024).  A second model costs extra, which shrinks weak decoders to 0 and splits
    shared concepts into one latent per model (Minder et al. 2025, arXiv:2504.02922).  ``"joint"``: √Σ_m ‖d_j^m‖², an SAE's price
    on the concatenation.
    """

    weight: float
    norm: Literal["sum", "joint"] = "sum"
    warmup_fraction: float = 0.05

    name = "l1"

    def __post_init__(self):
        if self.norm not in ("sum", "joint"):
            raise ValueError(f"L1's norm is 'sum' or 'joint', got {self.norm!r}")

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x
        warmup = self.warmup_fraction * progress.steps
        weight = self.weight * min(1.0, progress.step / warmup if warmup else 1.0)
        norms = crosscoder.decoder_norms()
        price = norms.sum(-1) if self.norm == "sum" else norms.norm(dim=-1)
        return weight * out.codes.scaled(price).sum() / len(out.codes)
