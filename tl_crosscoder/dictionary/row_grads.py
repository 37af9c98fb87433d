"""The gradient of a matrix with a row for each latent, kept as what it is a sum of.

Active pairs give most of it.  Written out it would be as large as the weights, and mostly be read back once: instead each part is
kept, and the sum is made a block of rows at a time, where it is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_crosscoder.dictionary.sparse_ops import Pairs, bag

#: Bytes of gradients made at once on a CPU: they are used while they are in its cache.
BLOCK_BYTES = 1 << 22
#: Bytes of a panel of activations: it stays in a core's own cache while many latents gather from it.
PANEL_BYTES = 1 << 20
#: Pairs for each latent from which on panels pay.
MANY = 5


@dataclass(frozen=True, eq=False)
class PairPart:
    """``Σ weights · x[tokens]`` for each latent, pairs in latent order."""

    x: Float[Tensor, "batch n"]
    tokens: Int[Tensor, "nnz"]
    weights: Float[Tensor, "nnz"]
    offsets: Int[Tensor, "_"]

    def block(self, start: int, stop: int) -> Float[Tensor, "latent n"]:
        """The sums of latents ``start`` to ``stop``."""
        sums = list(self._sums(self._panels, start, stop))
        return sums[0] if len(sums) == 1 else torch.cat(sums, 1)

    def square(self) -> Float[Tensor, ""]:
        """The sum of squares of all sums."""
        total = self.x.new_zeros((), dtype=torch.promote_types(self.x.dtype, torch.float32))
        for panel in self._panels:
            for rows in blocks(len(self.offsets) - 1, panel[:1]):
                for sums in self._sums([panel], rows.start, rows.stop):
                    total += sums.flatten().dot(sums.flatten())
        return total

    def _sums(self, panels: list[Tensor], start: int, stop: int) -> Iterator[Tensor]:
        low, high = self.offsets[[start, stop]].tolist()
        tokens, weights = self.tokens[low:high], self.weights[low:high]
        offsets = self.offsets[start : stop + 1] - low
        return (bag(tokens, panel, offsets, weights) for panel in panels)

    @cached_property
    def _panels(self) -> list[Tensor]:
        """The columns of ``x``, on a CPU in panels of neighbours that lie together, where many latents read them."""
        width = PANEL_BYTES // max(1, len(self.x) * self.x.element_size()) // 16 * 16
        if len(self.tokens) < MANY * len(self.offsets) or self.x.device.type != "cpu" or not width:
            return [self.x]
        return [panel.contiguous() for panel in self.x.split(width, 1)]


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

    def square(self) -> Float[Tensor, ""] | None:
        """The sum of squares of the gradient, where that is a sum over pairs alone."""
        return self.pairs[0].square() if len(self.pairs) == 1 and not self.rows else None

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
            summed = part.block(start, stop)
            total = summed if total is None else total.add_(summed)
        total = like.new_zeros(stop - start, like[0].numel()) if total is None else total
        for part in self.rows:
            low, high = torch.searchsorted(part.latents, part.latents.new_tensor([start, stop])).tolist()
            total.index_add_(0, part.latents[low:high] - start, part.rows[low:high])
        return total


def blocks(n: int, row: Tensor) -> Iterator[slice]:
    """``n`` rows like this one in blocks that fit a processor's cache; all at once on a GPU.

    A block is a multiple of 16 rows: torch's Adam rounds the last numbers of a block otherwise where they fill no register, and
    tied rows must stay equal.
    """
    size = max(16, BLOCK_BYTES // row.nbytes // 16 * 16) if row.device.type == "cpu" else n
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


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
