"""A price for being active that hardly grows with how strongly."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress
from tl_crosscoder.dictionary.losses.price import Price, check_price, discounts, prices


@LOSSES.register("tanh")
@dataclass(frozen=True)
class TanhPenalty:
    """``weight · mean_n Σ_j tanh(c · f_j · norm_j)``: near the number of active latents, so it does not shrink strong ones.

    The weight rises linearly from 0 over ``warmup_fraction`` of training: all of it.  ``norm`` and ``mix``: as in :class:`L1`.  The
    first ``shared`` latents (int: a number, float: a share of them) pay ``shared_factor`` of the price.

    Source: Conerly et al., Circuits Updates, January 2025; the discount after the designated shared latents of February 2025.
    """

    weight: float
    c: float = 4.0
    norm: Price = "sum"
    warmup_fraction: float = 1.0
    shared: int | float = 0
    shared_factor: float = 0.1
    mix: float = 0.1

    name = "tanh"

    def __post_init__(self):
        check_price("TanhPenalty", self.norm)

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x
        weight = self.weight * progress.ramp(self.warmup_fraction)
        paid = out.codes.scaled(self.c * prices(crosscoder, self.norm, self.mix)).tanh()
        discount = out.codes.of_latents(discounts(crosscoder, self.shared, self.shared_factor))
        return weight * crosscoder.shard.sum((paid * discount).sum()) / len(out.codes)
