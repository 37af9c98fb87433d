"""The price of an activation, weighed by its decoders."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress
from tl_crosscoder.dictionary.losses.price import Price, check_price, discounts, prices


@LOSSES.register("l1")
@dataclass(frozen=True)
class L1:
    """``weight · mean_n Σ_j f_j · norm_j``, the weight rising linearly from 0 over ``warmup_fraction`` of training.

    ``norm="sum"``: Σ_m ‖d_j^m‖ (Lindsey et al. 2024).  A second model costs extra, which shrinks weak decoders to 0 and splits
    shared concepts into one latent per model (Minder et al. 2025, arXiv:2504.02922).  ``"joint"``: √Σ_m ‖d_j^m‖², an SAE's price
    on the concatenation.  ``"mixed"``: joint + ``mix`` · sum.

    The first ``shared`` latents (int: a number, float: a share of them) pay ``shared_factor`` of the price, so that what both
    models have in common need not compete for the others (designated shared latents, Circuits Updates, January and February 2025).
    """

    weight: float
    norm: Price = "sum"
    warmup_fraction: float = 0.05
    shared: int | float = 0
    shared_factor: float = 0.1
    mix: float = 0.1

    name = "l1"

    def __post_init__(self):
        check_price("L1", self.norm)

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x
        weight = self.weight * progress.ramp(self.warmup_fraction)
        price = prices(crosscoder, self.norm, self.mix)
        price = price * discounts(crosscoder, self.shared, self.shared_factor)
        return weight * crosscoder.shard.sum(out.codes.scaled(price).sum()) / len(out.codes)
