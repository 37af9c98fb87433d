"""Which latent of one dictionary is which of another: one-to-one, by the cosine of their rows or any other similarity."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tl_crosscoder.errors import ShapeMismatch

Method = Literal["hungarian", "mutual"]
#: ``block(rows of a, rows of b)``: the similarities of a part of one set with a part of the other.
Block = Callable[[slice, slice], Float[Tensor, "a b"]]

#: Up to so many similarities the best assignment is looked for (8,192 x 8,192: half a GB of float64, some ten seconds).
HUNGARIAN_AT_MOST = 2**26
SIDE = 4096  # similarities are made SIDE x SIDE at a time
MATCHED = 0.7


@dataclass(frozen=True)
class Matching:
    """One-to-one ``pairs`` (place in a, place in b), ordered by a, and the ``similarity`` of each.

    ``best_a``, ``best_b``: the largest similarity of each row with any of the other side, one-to-one or not.
    ``method``: "hungarian", the pairs with the largest sum of similarities; "mutual", those that are each other's nearest.
    """

    pairs: Int[Tensor, "pair 2"]
    similarity: Float[Tensor, " pair"]
    best_a: Float[Tensor, " a"]
    best_b: Float[Tensor, " b"]
    method: Method

    @property
    def size(self) -> int:
        """How many pairs there could be: the rows of the smaller side."""
        return min(len(self.best_a), len(self.best_b))

    def matched(self, at_least: float = MATCHED) -> int:
        """The pairs at least so similar."""
        return int((self.similarity >= at_least).sum())

    def share(self, at_least: float = MATCHED) -> float:
        """``matched / size``: the share of the smaller side that the other has too; NaN where a side is empty."""
        return self.matched(at_least) / self.size if self.size else float("nan")

    def upper_bound(self, at_least: float = MATCHED) -> float:
        """The share of the smaller side that has *some* such row on the other, which several may claim; NaN where one is empty."""
        smaller = self.best_a if len(self.best_a) <= len(self.best_b) else self.best_b
        return float((smaller >= at_least).double().mean()) if self.size else float("nan")

    def mean(self) -> float:
        """Mean similarity of the pairs; NaN without pairs."""
        return float(self.similarity.double().mean()) if len(self.similarity) else float("nan")


@torch.no_grad()
def match_latents(
    rows_a: Float[Tensor, "a ..."], rows_b: Float[Tensor, "b ..."], *, method: Method | None = None
) -> Matching:
    """The matching by cosine of rows, such as ``crosscoder.decoder_rows()`` (both models' directions as one vector).

    A row of zeros is like nothing: cosine 0.  ``method``: the best assignment where it fits, else mutual nearest neighbours, which
    take memory for two blocks only, and of equal rows match one.
    """
    if rows_a.shape[1:] != rows_b.shape[1:]:
        raise ShapeMismatch(
            f"the rows to match are {list(rows_a.shape[1:])} and {list(rows_b.shape[1:])}; "
            "only dictionaries of one place in one pair of models can be compared by direction"
        )
    a, b = unit(rows_a.flatten(1)), unit(rows_b.flatten(1))
    return match(lambda i, j: a[i] @ b[j].T, len(a), len(b), method=method)


def unit(rows: Float[Tensor, "latent *dims"]) -> Float[Tensor, "latent *dims"]:
    """Each row, all of its axes together, at length 1; a row of zeros stays."""
    norms = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    shape = (-1, *[1] * (rows.ndim - 1))
    return rows / torch.where(norms > 0, norms, 1).view(shape)


def match(block: Block, n_a: int, n_b: int, *, method: Method | None = None) -> Matching:
    """The matching of ``n_a`` with ``n_b`` things by the similarities that ``block`` gives for any part of both."""
    if method is None:
        method = "hungarian" if n_a * n_b <= HUNGARIAN_AT_MOST else "mutual"
    if not n_a or not n_b:
        nothing = torch.full((n_a + n_b,), torch.nan)
        return Matching(
            torch.zeros(0, 2, dtype=torch.long), torch.zeros(0), nothing[:n_a], nothing[n_a:], method
        )
    if method == "mutual":
        return _mutual(block, n_a, n_b)
    whole = torch.cat([block(part, slice(0, n_b)).cpu() for part in parts(n_a)])
    pairs = torch.stack([torch.from_numpy(side) for side in linear_sum_assignment(whole, maximize=True)], 1)
    return Matching(pairs, whole[pairs[:, 0], pairs[:, 1]], whole.amax(1), whole.amax(0), "hungarian")


def parts(n: int) -> list[slice]:
    """``range(n)`` in slices of SIDE."""
    return [slice(start, min(start + SIDE, n)) for start in range(0, n, SIDE)]


def _mutual(block: Block, n_a: int, n_b: int) -> Matching:
    """Pairs that are each other's nearest; of equals the first counts."""
    best_b, nearest_b = torch.full((n_b,), -torch.inf), torch.zeros(n_b, dtype=torch.long)
    best_a, nearest_a = torch.full((n_a,), -torch.inf), torch.zeros(n_a, dtype=torch.long)
    for i in parts(n_a):
        for j in parts(n_b):
            here = block(i, j)
            _keep_larger(best_a[i], nearest_a[i], *here.max(1), j.start)
            _keep_larger(best_b[j], nearest_b[j], *here.max(0), i.start)
    own = torch.arange(n_a)
    mutual = nearest_b[nearest_a] == own
    pairs = torch.stack([own, nearest_a], 1)[mutual]
    return Matching(pairs, best_a[mutual], best_a, best_b, "mutual")


def _keep_larger(best: Tensor, place: Tensor, values: Tensor, places: Tensor, start: int) -> None:
    """Put what is larger into ``best`` and ``place``, which are views."""
    values, places = values.to(best), places.to(place)
    larger = values > best
    best[larger], place[larger] = values[larger], places[larger] + start
