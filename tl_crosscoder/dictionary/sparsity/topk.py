"""The k largest scores of each token."""

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
        return scores.at(self.shard.largest_of_rows(v, self.k), pre_acts)
