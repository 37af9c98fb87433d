"""The mean of tuned − base at each of a document's first positions."""

from dataclasses import fields

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.models.drop import Drop
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokens import TokenBatch
from tl_crosscoder.studies.where import kept_tokens
from tl_crosscoder.types import BASE, TUNED


class FirstTokens:
    """Sums over tokens in float64: of each position, and of each half of the documents, the difference and its norms."""

    def __init__(self, n_first: int, d_in: int):
        self.count = torch.zeros(n_first, 2, dtype=torch.float64)
        self.difference = torch.zeros(n_first, 2, d_in, dtype=torch.float64)
        #: of the difference, of the tuned activations
        self.norms = torch.zeros(n_first, 2, dtype=torch.float64)

    def add(self, pair: ModelPair, batch: TokenBatch, indices: Tensor, drop: Drop) -> None:
        """Count the kept first tokens of the documents that ``indices`` number."""
        batch = _cut(batch, len(self.count))
        acts = pair.capture(batch)
        keep = kept_tokens(batch, acts, drop).cpu()
        acts, position = acts.cpu().double(), batch.position_ids.cpu()
        half = (torch.as_tensor(indices) % 2)[:, None].expand_as(position)
        where = position[keep], half[keep]
        change, tuned = (acts[:, :, TUNED] - acts[:, :, BASE])[keep], acts[:, :, TUNED][keep]
        self.count.index_put_(where, torch.ones(len(change), dtype=torch.float64), accumulate=True)
        self.difference.index_put_(where, change, accumulate=True)
        sizes = torch.stack([change.norm(dim=-1), tuned.norm(dim=-1)], 1)
        self.norms.index_put_((position[keep],), sizes, accumulate=True)

    def means(self) -> Float[Tensor, "place d_in"]:
        """The mean difference at each position, and over all counted tokens; NaN where none was counted."""
        total, count = self._with_all(self.difference.sum(1)), self._with_all(self.count.sum(1))
        return total / count[:, None]

    def table(self, means: Float[Tensor, "place d_in"]) -> pd.DataFrame:
        """A row a position and one for all: how long the mean difference is, beside the tokens' own, and how well halves agree."""
        count, norms = self._with_all(self.count.sum(1)), self._with_all(self.norms)
        norm, single, usual = means.norm(dim=-1), norms[:, 0] / count, norms[:, 1] / count
        halves = self._with_all(self.difference)
        sizes = halves.norm(dim=-1).prod(-1)
        cosine = torch.where(sizes > 0, (halves[:, 0] * halves[:, 1]).sum(-1) / sizes, torch.nan)
        share = torch.where(single > 0, norm / single, torch.nan)
        return pd.DataFrame(
            {
                "position": [*map(str, range(len(self.count))), "all"],
                "n": count.long().tolist(),
                "norm": norm.tolist(),
                "share": share.tolist(),
                "relative_norm": (norm / usual).tolist(),
                "split_cosine": cosine.tolist(),
            }
        )

    @staticmethod
    def _with_all(values: Tensor) -> Tensor:
        return torch.cat([values, values.sum(0, keepdim=True)])


def _cut(batch: TokenBatch, n: int) -> TokenBatch:
    """The first ``n`` tokens of each row of a right-padded batch: what comes later changes nothing before it."""
    return TokenBatch(*(getattr(batch, field.name)[:, :n] for field in fields(batch)))
