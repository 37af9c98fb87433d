"""Every positive activation stays; pair it with an L1 loss."""

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity


@SPARSITIES.register("relu")
class ReLU(Sparsity):
    """Every positive activation stays (Lindsey et al. 2024)."""

    def choose(self, scores: Scores) -> Found:
        return scores.above()
