"""The k · batch largest scores of the batch while training; a fixed threshold afterwards."""

import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.dictionary.scores import Crowded, Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity, check_k

#: Tokens looked at to guess where the smallest kept score lies.
SAMPLE = 32


@SPARSITIES.register("batch_topk")
class BatchTopK(Sparsity):
    """Training keeps the k · batch largest scores of the batch; evaluation keeps scores above a threshold.

    ``k``: mean active latents per token, k · batch a whole number.  ``k_max``: k starts there and falls linearly to ``k`` over
    ``k_anneal_steps`` (None: no annealing).  The threshold is the running mean (``threshold_decay``) of the smallest kept score,
    taken after ``threshold_start`` of the training steps.  Of equal scores the lowest (token, latent) wins; a batch with fewer
    positive scores keeps them all.

    Source: Bussmann et al. 2024, arXiv:2412.06410; for crosscoders Minder et al. 2025, arXiv:2504.02922.
    """

    threshold: Tensor

    def __init__(
        self,
        k: int | float,
        k_max: int | float | None = None,
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
        # Where the next smallest kept score is looked for, the last one, and how many more scores than are kept to look at: only
        # speed depends on them.
        self.guess: float | None = None
        self.smallest: float | None = None
        self.spare = 1.2
        self.register_buffer("threshold", torch.tensor(-1.0))

    def check(self, d_sae: int) -> None:
        check_k(self.k, d_sae)
        if self.k_max is not None:
            check_k(self.k_max, d_sae)

    def restricted(self, latents: Int[Tensor, "latent"]) -> "BatchTopK":
        made = BatchTopK(min(self.k, len(latents)))
        made.threshold = self.threshold.clone()
        return made

    def advance(self, step: int, steps: int) -> None:
        self.k_now = self.k
        if self.k_max is not None and step < self.k_anneal_steps:
            self.k_now = max(1, round(self.k_max + (self.k - self.k_max) * step / self.k_anneal_steps))
        self.tracking = step >= int(self.threshold_start * steps)

    def choose(self, scores: Scores) -> Found:
        if not self.training:
            if self.threshold < 0:
                raise RuntimeError(
                    "BatchTopK has no threshold yet: train first (it is estimated after "
                    f"{self.threshold_start:.0%} of the steps) or set sparsity.threshold"
                )
            return scores.above(self.threshold.item())
        count = self._count(self.shard.tokens.size * scores.n_tokens)
        if scores.limit is not None and count > scores.limit:
            raise Crowded
        kept, smallest = self._largest(scores, count)
        if self.tracking and smallest is not None:
            self._track(smallest)
        return kept

    def _count(self, n_tokens: int) -> int:
        count = (self.k_now or self.k) * n_tokens
        if not float(count).is_integer():
            raise ValueError(
                f"k={self.k_now or self.k} latents a token are {count} in a batch of {n_tokens} tokens, not a whole number; "
                "choose another k or batch size, and leave out a smaller last batch (drop_last=True)"
            )
        return int(count)

    def _largest(self, scores: Scores, count: int) -> tuple[Found, Tensor | None]:
        """The pairs with the ``count`` largest scores, or all with a positive one where there are fewer; and the smallest score."""
        found, n = self._at_least(scores, count)
        if n == 0:
            return found, None
        wanted = min(n, count), min(n, int(self.spare * count))
        smallest, bar = self.shard.kth_largest(found.scores, *wanted)
        if n <= count:
            self.guess = (
                None if scores.limit is None else 0.0
            )  # few are positive: next time look at all that are
            return found, smallest
        self._expect(smallest.item(), bar.item())
        kept, ties = found.scores > smallest, (found.scores == smallest).nonzero()[:, 0]
        excess = self.shard.total(int(kept.sum()) + len(ties)) - count
        if excess:  # the highest tokens go, then the highest latents
            place = self.shard.places(found[ties], scores)
            ties = ties[place < self.shard.kth_largest(place, excess)[0]]
        kept[ties] = True
        return found[kept], smallest

    def _expect(self, smallest: float, bar: float) -> None:
        """Next time look where ``spare`` times as many scores lay this time, or lower where they have been falling."""
        falling = min(1.0, smallest / self.smallest) if self.smallest else 1.0
        self.guess, self.smallest = bar * falling, smallest

    def _at_least(self, scores: Scores, count: int) -> tuple[Found, int]:
        """All pairs above some bar, and their number: ``count`` or more, or all with a positive score where there are fewer."""
        bar, wanted = self.guess, 1.3
        limit = None if scores.limit is None else 4 * (max(count, scores.limit) if bar else count)
        while True:
            if bar is None:
                bar, wanted = self._sampled_bar(scores, wanted * count), 2 * wanted
            try:
                found, n = self.shard.above(scores, bar, limit)
            except Crowded:  # the scores have risen far above the guess
                bar, limit = None, scores.n_tokens * scores.d_sae
                continue
            if n >= count or bar == 0:
                self.spare = max(1.1, 0.99 * self.spare)
                return found, n
            bar, self.spare = None, min(2.0, 1.1 * self.spare)

    def _sampled_bar(self, scores: Scores, wanted: float) -> float:
        """The score that ``wanted`` pairs of the batch exceed, by a sample of its tokens; 0 where fewer are positive."""
        sample = scores.sample(SAMPLE)
        v, count = sample.weighed().flatten(), round(wanted * sample.n_tokens / scores.n_tokens)
        if count >= self.shard.total(len(v)):
            return 0.0
        return self.shard.kth_largest(v, count + 1)[0].item()

    def _track(self, smallest: Tensor) -> None:
        old = self.threshold if self.threshold >= 0 else smallest
        self.threshold.copy_(self.threshold_decay * old + (1 - self.threshold_decay) * smallest)
