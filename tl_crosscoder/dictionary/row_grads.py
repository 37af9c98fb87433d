"""The gradient of a matrix with a row for each latent, kept as what it is a sum of.

Active pairs give most of it.  Written out it would be as large as the weights, and mostly be read back once: instead each part is
kept, and the sum is made a block of rows at a time, where it is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_crosscoder.dictionary.sparse_ops import Pairs, bag


@dataclass(frozen=True, eq=False)
class PairPart:
    """``Σ weights · x[tokens]`` for each latent, pairs in latent order."""

    x: Float[Tensor, "batch n"]
    tokens: Int[Tensor, "nnz"]
    weights: Float[Tensor, "nnz"]
    offsets: Int[Tensor, "_"]


@dataclass(frozen=True, eq=False)
class RowPart:
    """Gradients of some latents' rows; ``latents`` ascend."""

    latents: Int[Tensor, "latent"]
    rows: Float[Tensor, "latent n"]


class RowGrads:
    """Collects the parts of one backward pass."""

    def __init__(self):
        self.pairs: list[PairPart] = []
        self.rows: list[RowPart] = []

    def add_pairs(self, weights: Float[Tensor, "nnz"], x: Float[Tensor, "batch n"], pairs: Pairs) -> None:
        """``weights`` in token order, as ``pairs`` has them."""
        order, offsets = pairs.by_latent
        self.pairs.append(PairPart(x, pairs.tokens[order], weights[order], offsets))

    def add_rows(self, latents: Int[Tensor, "latent"], rows: Float[Tensor, "latent n"]) -> None:
        latents, order = latents.sort()
        self.rows.append(RowPart(latents, rows[order]))

    def scale_(self, factor: float) -> None:
        """Multiply the gradient, by multiplying what it is a sum of."""
        for part in self.pairs:
            part.weights.mul_(factor)
        for part in self.rows:
            part.rows.mul_(factor)

    def block(self, start: int, stop: int, like: Float[Tensor, "d_sae *rest"]) -> Float[Tensor, "latent n"]:
        """The gradient of latents ``start`` to ``stop``, a new tensor; ``like``: their weights."""
        total: Tensor | None = None
        for part in self.pairs:
            low, high = part.offsets[[start, stop]].tolist()
            summed = bag(
                part.tokens[low:high], part.x, part.offsets[start : stop + 1] - low, part.weights[low:high]
            )
            total = summed if total is None else total.add_(summed)
        total = like.new_zeros(stop - start, like[0].numel()) if total is None else total
        for part in self.rows:
            low, high = torch.searchsorted(part.latents, part.latents.new_tensor([start, stop])).tolist()
            total.index_add_(0, part.latents[low:high] - start, part.rows[low:high])
        return total


@contextmanager
def kept_apart(parameters: list[nn.Parameter]) -> Iterator[list[RowGrads]]:
    """Within the block, pairwise and row gradients of these parameters go to RowGrads, and not to ``.grad``."""
    grads = [RowGrads() for _ in parameters]
    for parameter, grad in zip(parameters, grads, strict=True):
        vars(parameter)["row_grads"] = grad
    try:
        yield grads
    finally:
        for parameter in parameters:
            vars(parameter).pop("row_grads", None)
