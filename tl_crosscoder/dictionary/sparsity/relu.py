"""Every positive activation stays; pair it with an L1 loss."""

from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity


@SPARSITIES.register("relu")
class ReLU(Sparsity):
    """Every positive activation stays (Lindsey et al. 2024)."""

    def restricted(self, latents: Int[Tensor, "latent"]) -> "ReLU":  # noqa: ARG002
        return ReLU()

    def choose(self, scores: Scores) -> Found:
        return scores.above()
