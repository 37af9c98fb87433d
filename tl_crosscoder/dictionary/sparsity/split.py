"""One sparsity for the first latents, another for the rest."""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.prefix import first_latents
from tl_crosscoder.dictionary.scores import Crowded, Found, Scores
from tl_crosscoder.dictionary.sparsity.base import SPARSITIES, Sparsity


@SPARSITIES.register("split")
class Split(Sparsity):
    """The first ``n_first`` latents (int: a number, float: a share of ``d_sae``) follow ``first``, the others ``rest``.

    Each part competes within itself only, with a k and a threshold of its own: the two sparsities of Delta-Crosscoder (Kassem et
    al. 2026, arXiv:2603.04426) for shared and model-specific latents.
    """

    def __init__(self, n_first: int | float, first: Sparsity, rest: Sparsity):
        super().__init__()
        if not (isinstance(first, Sparsity) and isinstance(rest, Sparsity)):
            wrong = first if not isinstance(first, Sparsity) else rest
            raise TypeError(f"Split wants a sparsity for either part, got {wrong!r}")
        if first is rest:
            raise ValueError("Split wants two sparsities: one for both parts would mix up their thresholds")
        self.n_first, self.first, self.rest = n_first, first, rest
        self._count()

    def check(self, d_sae: int) -> None:
        n = self._cut(d_sae)
        self.first.check(n)
        self.rest.check(d_sae - n)

    def advance(self, step: int, steps: int) -> None:
        self.first.advance(step, steps)
        self.rest.advance(step, steps)
        self._count()

    @property
    def selects(self) -> bool:
        return self.first.selects and self.rest.selects

    @property
    def thresholds(self) -> Float[Tensor, "d_sae"] | None:
        a, b = self.first.thresholds, self.rest.thresholds
        return None if a is None or b is None else torch.cat([a, b])

    def choose(self, scores: Scores) -> Found:
        n = self._cut(scores.d_sae)
        if (
            scores.limit is not None
            and self.k_now is not None
            and self.k_now * scores.n_tokens > scores.limit
        ):
            raise Crowded
        parts = {self.first: slice(0, n), self.rest: slice(n, scores.d_sae)}
        # one that is asked for no number may yet find a crowd: it goes first, before another has changed its threshold
        order = sorted(parts, key=lambda part: part.k_now is not None)
        found = {part: part.choose(scores.part(parts[part])) for part in order}
        a, b = found[self.first], found[self.rest]
        return Found(
            torch.cat([a.tokens, b.tokens]),
            torch.cat([a.latents, b.latents + n]),
            torch.cat([a.pre_acts, b.pre_acts]),
            torch.cat([a.scores, b.scores]),
        )

    def forward(
        self, pre_acts: Float[Tensor, "batch d_sae"], norms: Float[Tensor, "d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        n = self._cut(len(norms))
        return torch.cat([self.first(pre_acts[:, :n], norms[:n]), self.rest(pre_acts[:, n:], norms[n:])], 1)

    def _cut(self, d_sae: int) -> int:
        n = self.shard.n_held(first_latents(self.n_first, self.shard.latents.size * d_sae))
        if not 0 < n < d_sae:
            raise ValueError(
                f"Split wants a latent or more on either side: n_first={self.n_first} puts {n} of d_sae={d_sae} first"
            )
        return n

    def _count(self) -> None:
        """Active latents per token in all, where both parts ask for a number."""
        a, b = self.first.k_now, self.rest.k_now
        self.k_now = None if a is None or b is None else a + b
