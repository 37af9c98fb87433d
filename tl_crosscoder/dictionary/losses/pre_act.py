"""A pull on pre-activations that stay below their threshold."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress
from tl_crosscoder.dictionary.losses.price import Price, check_price, prices


@LOSSES.register("pre_act")
@dataclass(frozen=True)
class PreAct:
    """``weight · mean_n Σ_j relu(θ_j - p_j) · norm_j`` with p the pre-activation: what never fires is pulled towards firing.

    For learned thresholds θ (:class:`JumpReLU`): far below them the reconstruction gives a latent no gradient.  Every
    pre-activation takes part, so it costs a dense product of its own.  ``norm`` and ``mix``: as in :class:`L1`.

    Source: Conerly et al., Circuits Updates, January 2025.
    """

    weight: float = 3e-6
    norm: Price = "sum"
    mix: float = 0.1

    name = "pre_act"

    def __post_init__(self):
        check_price("PreAct", self.norm)

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del progress
        thresholds = crosscoder.sparsity.thresholds
        if thresholds is None:
            raise ValueError(
                "PreAct pulls pre-activations towards learned thresholds, "
                f"and {type(crosscoder.sparsity).__name__} has none; use JumpReLU or leave PreAct out"
            )
        below = (thresholds - crosscoder.pre_acts(x)).relu()
        price = crosscoder.shard.sum((below @ prices(crosscoder, self.norm, self.mix)).sum())
        return self.weight * price / len(out.codes)
