"""The largest score of each group of latents."""

from einops import rearrange

from tl_crosscoder.dictionary.scores import Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity, check_k


@SPARSITIES.register("group_max")
class GroupMax(Sparsity):
    """The dictionary is cut into ``k`` groups of neighbouring latents; each token keeps the largest positive score of each group.

    The same in training and in evaluation, without a threshold; of equal scores the lowest latent.  Latents of one group are never
    active together: at most k are active on a token, fewer where a whole group is negative.

    Source: the crosscode library of Clive-Griffin et al. 2025.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = self.k_now = k

    def check(self, d_sae: int) -> None:
        check_k(self.k, d_sae)
        if d_sae % self.k:
            raise ValueError(
                f"GroupMax cuts the dictionary into k groups of one size: d_sae={d_sae} is no multiple of k={self.k}"
            )

    def choose(self, scores: Scores) -> Found:
        d_sae = self.shard.latents.size * scores.d_sae
        self.check(d_sae)
        self.shard.n_held(d_sae // self.k, "a group of")
        pre_acts = scores.pre_acts()
        v = rearrange(pre_acts.relu() * scores.norms, "batch (k n) -> (batch k) n", k=self.k)
        mask = self.shard.largest_of_rows(v, 1)
        return scores.at(rearrange(mask, "(batch k) n -> batch (k n)", k=self.k), pre_acts)
