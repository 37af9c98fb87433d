"""Adam's step on the rows of a weight as Triton kernels: each latent's gradient is summed, projected and used in registers.

Imported where it was asked for and nowhere else; held to the torch operations of :mod:`tl_crosscoder.training.optimizer`.  The
gradient of the large weights is never written: it is summed twice, for its norm and for the step.  Nothing is added up in an
order that could vary, so the same numbers give the same bytes.
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports] - no dependency
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor, nn

from tl_crosscoder.dictionary.partition import projection
from tl_crosscoder.dictionary.row_grads import PairPart, RowGrads, RowPart
from tl_crosscoder.dictionary.sparse_ops import starts
from tl_crosscoder.dictionary.triton_bag import gathered, launch

#: Numbers of a latent's row that one program works on, all models together.
TILE = 1024


@triton.jit
@no_type_check
def gradient_tile(parts, project, latent, models, d_in, MODELS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient of some columns of a latent, their places in its row, and which of them there are."""
    model = tl.arange(0, MODELS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = model[:, None] * d_in + column[None, :]
    mask = (model < models)[:, None] & (column < d_in)[None, :]
    gradient = tl.zeros(places.shape, parts[0][1].dtype.element_ty)
    for p in tl.static_range(len(parts)):
        index, rows, offsets, weights = parts[p]
        start, stop = tl.load(offsets + latent), tl.load(offsets + latent + 1)
        gradient += gathered(index, rows, models * d_in, start, stop, weights, places, mask)
    if project is not None:
        at = model[:, None] * models + model[None, :]
        there = (model < models)[:, None] & (model < models)[None, :]
        matrix = tl.load(project + latent * models * models + at, there, 0.0)
        gradient = tl.sum(matrix[:, :, None] * gradient[None, :, :], 1)
    return gradient, places, mask


@triton.jit
@no_type_check
def square_kernel(out, parts, project, models, d_in, MODELS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of squares of a tile of the gradient."""
    latent = tl.program_id(0).to(tl.int64)
    gradient, _, _ = gradient_tile(parts, project, latent, models, d_in, MODELS, COLUMNS)
    tl.store(out + latent * tl.num_programs(1) + tl.program_id(1), tl.sum(gradient * gradient))


@triton.jit
@no_type_check
def adam_kernel(
    weights, first, second, rates, parts, project, models, d_in, MODELS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Adam's step on a tile of the weights and of their moments."""
    latent = tl.program_id(0).to(tl.int64)
    gradient, places, mask = gradient_tile(parts, project, latent, models, d_in, MODELS, COLUMNS)
    size, root, eps = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    keep, renew = tl.load(rates + 3), tl.load(rates + 4)
    keep_square, renew_square = tl.load(rates + 5), tl.load(rates + 6)
    at = latent * models * d_in + places
    m = keep * tl.load(first + at, mask, 0.0) + renew * gradient
    v = keep_square * tl.load(second + at, mask, 0.0) + renew_square * gradient * gradient
    w = tl.load(weights + at, mask, 0.0) - size * m / (tl.sqrt(v) / root + eps)
    tl.store(first + at, m, mask)
    tl.store(second + at, v, mask)
    tl.store(weights + at, w, mask)


@dataclass(frozen=True, eq=False)
class Gathered:
    """The gradient of a weight [d_sae, model, d_in], summed where it is used.

    ``parts``: all that it is a sum of.  ``project``: for each latent the matrix over models that moves it onto its partition.
    """

    parts: tuple[PairPart, ...]
    project: Float[Tensor, "d_sae model model"] | None
    like: Tensor

    @classmethod
    def of(cls, grads: RowGrads, parameter: nn.Parameter) -> "Gathered":
        """What was collected apart, and what else there is in ``parameter.grad``."""
        d_sae, models, _ = parameter.shape
        rows = list(grads.rows)
        if parameter.grad is not None:
            every = torch.arange(d_sae, device=parameter.device)
            rows.append(RowPart(every, parameter.grad.flatten(1)))
        parts = (*grads.pairs, *(_as_pairs(part, d_sae) for part in rows))
        if not parts:
            none = torch.arange(0, device=parameter.device)
            parts = (_as_pairs(RowPart(none, parameter.detach().flatten(1)[none]), d_sae),)
        if (move := projection(parameter)) is None:
            return cls(parts, None, parameter)
        unit = torch.eye(models, dtype=parameter.dtype, device=parameter.device)
        return cls(parts, move(unit.repeat(d_sae, 1, 1)), parameter)

    def square(self) -> Float[Tensor, ""]:
        """Its sum of squares."""
        tiles, sizes = self._tiles()
        squares = self.like.new_empty(tiles)
        launch(square_kernel, tiles, squares, *self._sum(), *sizes)
        return squares.sum()

    def adam_(
        self,
        weights: Tensor,
        first: Tensor,
        second: Tensor,
        *,
        steps: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Adam's step number ``steps``, counted from 1: weights and moments change in place."""
        (b1, b2), (tiles, sizes) = betas, self._tiles()
        rates = lr / (1 - b1**steps), (1 - b2**steps) ** 0.5, eps, b1, 1 - b1, b2, 1 - b2
        state = weights, first, second, weights.new_tensor(rates)
        launch(adam_kernel, tiles, *state, *self._sum(), *sizes)

    def _sum(self) -> tuple[Any, ...]:
        """As the kernels take it."""
        parts = tuple((part.tokens, part.x.contiguous(), part.offsets, part.weights) for part in self.parts)
        return parts, self.project, *self.like.shape[1:]

    def _tiles(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many there are, and the models and columns of one: powers of two."""
        d_sae, models, d_in = self.like.shape
        height = triton.next_power_of_2(models)
        width = min(triton.next_power_of_2(d_in), max(1, TILE // height))
        return (d_sae, triton.cdiv(d_in, width)), (height, width)


def _as_pairs(part: RowPart, d_sae: int) -> PairPart:
    """Each row is a token that one latent has, with weight 1."""
    places = torch.arange(len(part.latents), device=part.latents.device)
    return PairPart(part.rows, places, part.rows.new_ones(len(places)), starts(part.latents, d_sae))
