"""Scores found by a product in half precision, then verified: the same pairs as in full precision, by proof.

Written x̂ and ŵ for x and w rounded to bfloat16 (relative error at most u = 2⁻⁸ an element), the product's error is bounded for
each pair by Cauchy and Schwarz:

    |⟨x, w⟩ − ⟨x̂, ŵ⟩| = |⟨x − x̂, w⟩ + ⟨x̂, w − ŵ⟩| ≤ (‖x − x̂‖ + u ‖x̂‖) ‖w‖,

to which γ ‖x‖ ‖w‖ is added for the float32 sums.  The bound is a product of a number of the token and a number of the latent: it
rides along as one more column of the product itself, as do the bias and the floor.  A pair is looked at again, in full precision,
wherever ⟨x̂, ŵ⟩ + bias − floor + bound > 0; a pair above its floor cannot be missed, so no answer needs to be checked afterwards.
(Where bias − floor is so large that its own rounding would matter, it exceeds ‖x‖ ‖w‖ and decides the sign alone.)  It holds for
norms between 1e-18 and 1e18, whose squares float32 can hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.dictionary.scores import Block, ExactScores
from tl_crosscoder.dictionary.sparse_ops import dots_by_latent, flat_positive, starts

UNIT = 2.0**-8
#: Rounding up to bfloat16, and slack for the sums of the small columns themselves.
SLACK = 1 + 2.0**-5
#: Columns added to the product: bias less floor in two parts, the bound; the rest is padding to the width of a matrix tile.
COLUMNS = 32
FAR_BELOW = -1e30


def screens(x: Tensor) -> bool:
    """Whether a bfloat16 product is faster than a float32 one where these activations are."""
    if x.dtype != torch.float32:
        return False
    if x.device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return x.device.type == "cuda" and torch.cuda.is_bf16_supported()


@contextmanager
def float32_sums() -> Iterator[None]:
    """The sums of a bfloat16 product are float32 throughout, on a GPU too: the bound rests on it."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_bf16_reduced_precision_reduction = (
        matmul.allow_bf16_reduced_precision_reduction,
        False,
    )
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


class ScreenedScores(ExactScores):
    """The same answers as :class:`ExactScores`; float32 only."""

    def blocks(self, floor: Float[Tensor, "d_sae"]) -> Iterator[Block]:
        x, n, height = self._widened_x(), self.x.shape[1], self._height(floor)
        slices = list(self.slices(2))
        widened = x.new_empty(slices[0].stop, n + COLUMNS)
        widened[:, n + 3 :] = 0
        products = x.new_empty(slices[0].stop, self.n_tokens)
        for block in slices:
            size, rows = block.stop - block.start, self.rows[block]
            low = widened[:size]
            low[:, :n] = rows
            low[:, n] = height[block]
            low[:, n + 1] = height[block] - low[:, n]
            low[:, n + 2] = rows.norm(dim=1) * SLACK
            with float32_sums():
                torch.mm(low, x.T, out=products[:size])
            flat = flat_positive(products[:size])
            latents = flat // self.n_tokens
            tokens = flat - latents * self.n_tokens
            yield Block(tokens, latents + block.start, self._verified(block, tokens, latents))

    def _height(self, floor: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
        """Bias less floor, a little more than it is: its two rounded parts together are right to 2⁻¹⁶."""
        height = (self.bias - floor).nan_to_num(FAR_BELOW, posinf=-FAR_BELOW, neginf=FAR_BELOW)
        return height + height.abs() * 2.0**-14

    def _widened_x(self) -> Float[Tensor, "batch _"]:
        n = self.x.shape[1]
        gamma = 2.0**-23 * (n + COLUMNS)
        low = self.x.new_zeros(self.n_tokens, n + COLUMNS, dtype=torch.bfloat16)
        low[:, :n] = self.x
        low[:, n : n + 2] = 1
        lost = low[:, :n].float().sub_(self.x).norm(dim=1)
        low[:, n + 2] = (lost + (UNIT + gamma) * (1 + UNIT) * self.x.norm(dim=1)) * SLACK
        return low

    def _verified(
        self, block: slice, tokens: Int[Tensor, "nnz"], latents: Int[Tensor, "nnz"]
    ) -> Float[Tensor, "nnz"]:
        rows = self.rows[block]
        dots = dots_by_latent(self.x, rows, tokens, starts(latents, len(rows)))
        return dots.add_(self.bias[block][latents])
