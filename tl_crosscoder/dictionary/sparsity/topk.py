"""The k largest scores of each token."""

from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity, check_k


@SPARSITIES.register("topk")
class TopK(Sparsity):
    """The k largest scores of each token, in training and in evaluation; of equal scores the lowest latents."""

    def __init__(self, k: int):
        super().__init__()
        self.k = self.k_now = k

    def check(self, d_sae: int) -> None:
        if not isinstance(self.k, int):
            raise ValueError(f"TopK keeps a whole number of latents on each token, got k={self.k}")
        check_k(self.k, d_sae)

    def choose(self, scores: Scores) -> Found:
        pre_acts = scores.pre_acts()
        v = pre_acts.relu().mul_(scores.norms)
        smallest = v.topk(self.k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return scores.at(largest(v, smallest, self.k), pre_acts)


def largest(
    v: Float[Tensor, "rows n"], smallest: Float[Tensor, "rows 1"], count: int
) -> Bool[Tensor, "rows n"]:
    """The ``count`` largest positive entries of each row, given the smallest of them; of equal ones the first."""
    mask = (v >= smallest) & (v > 0)
    if (mask.sum(-1) > count).any():
        ties = mask & (v == smallest)
        room = count - (v > smallest).sum(-1, keepdim=True)
        mask &= ~ties | (ties.cumsum(-1) <= room)
    return mask
