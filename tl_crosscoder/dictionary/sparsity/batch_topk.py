"""The k · batch largest scores of the batch while training; a fixed threshold afterwards."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.dictionary.sparse_ops import flat_nonzero
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity, check_k, scores


@SPARSITIES.register("batch_topk")
class BatchTopK(Sparsity):
    """Training keeps the k · batch largest scores of the batch; evaluation keeps scores above a threshold.

    ``k``: mean active latents per token.  ``k_max``: k starts there and falls linearly to ``k`` over ``k_anneal_steps`` (None: no
    annealing).  The threshold is the running mean (``threshold_decay``) of the smallest kept score, taken after ``threshold_start``
    of the training steps.  Of equal scores the lowest (token, latent) wins; a batch with fewer positive scores keeps them all.

    Source: Bussmann et al. 2024, arXiv:2412.06410; for crosscoders Minder et al. 2025, arXiv:2504.02922.
    """

    threshold: Tensor

    def __init__(
        self,
        k: int,
        k_max: int | None = None,
        k_anneal_steps: int = 0,
        threshold_start: float = 0.5,
        threshold_decay: float = 0.99,
    ):
        super().__init__()
        if k_max is not None and (k_max < k or k_anneal_steps < 1):
            raise ValueError(
                f"k falls from k_max to k over k_anneal_steps, got k={k}, k_max={k_max}, k_anneal_steps={k_anneal_steps}"
            )
        if not (0 <= threshold_start < 1 and 0 <= threshold_decay < 1):
            raise ValueError(
                f"threshold_start and threshold_decay are fractions in [0, 1), got {threshold_start} and {threshold_decay}"
            )
        self.k, self.k_max, self.k_anneal_steps = k, k_max, k_anneal_steps
        self.threshold_start, self.threshold_decay = threshold_start, threshold_decay
        self.k_now = k
        self.tracking = True
        self.guess = (
            0.0  # a lower bound for the next smallest kept score; speeds the search, never changes its result
        )
        self.register_buffer("threshold", torch.tensor(-1.0))

    def check(self, d_sae: int) -> None:
        check_k(self.k, d_sae)
        if self.k_max is not None:
            check_k(self.k_max, d_sae)

    def advance(self, step: int, steps: int) -> None:
        self.k_now = self.k
        if self.k_max is not None and step < self.k_anneal_steps:
            self.k_now = round(self.k_max + (self.k - self.k_max) * step / self.k_anneal_steps)
        self.tracking = step >= int(self.threshold_start * steps)

    def forward(
        self, pre_acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        v = scores(pre_acts, norms)
        if not self.training:
            if self.threshold < 0:
                raise RuntimeError(
                    "BatchTopK has no threshold yet: train first (it is estimated after "
                    f"{self.threshold_start:.0%} of the steps) or set sparsity.threshold"
                )
            return pre_acts.where(v > self.threshold, 0)
        flat = v.view(-1)
        kept = self._largest(flat, (self.k_now or self.k) * len(v))
        if self.tracking and len(kept):
            self._track(flat[kept].min())
        chosen = torch.zeros(flat.shape, dtype=torch.bool, device=v.device)
        chosen[kept] = True
        return pre_acts.where(chosen.view_as(v), 0)

    def _largest(self, v: Float[Tensor, "n"], count: int) -> Int[Tensor, "kept"]:
        """The positions of the ``count`` largest positive scores, or of all of them where there are fewer.

        Exact: only scores above a guess are looked at, and the guess stands if there are at least ``count`` of them.
        """
        candidates = flat_nonzero(v > self.guess)
        if self.guess and len(candidates) < count:
            candidates = flat_nonzero(v > 0)
        if len(candidates) <= count:
            return candidates
        values = v[candidates]
        smallest = values.topk(count, sorted=False).values.min()
        self.guess = 0.9 * smallest.item()
        above, ties = values > smallest, values == smallest
        return candidates[above | (ties & (ties.cumsum(0) <= count - above.sum()))]

    def _track(self, smallest: Float[Tensor, ""]) -> None:
        old = self.threshold if self.threshold >= 0 else smallest
        self.threshold.copy_(self.threshold_decay * old + (1 - self.threshold_decay) * smallest)
