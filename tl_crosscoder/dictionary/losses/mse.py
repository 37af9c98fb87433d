"""Squared reconstruction error."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress


@LOSSES.register("mse")
@dataclass(frozen=True)
class MSE:
    """``mean_n Σ_m ‖e^m‖²``: squared error, summed over models and d_in (Lindsey et al. 2024)."""

    name = "mse"

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x, crosscoder, progress
        return _SumOfSquares.apply(out.estimate - out.target) / len(out.target)


class _SumOfSquares(torch.autograd.Function):
    """``e.square().sum()`` in one pass forwards and one backwards."""

    @staticmethod
    def forward(ctx: Any, error: Tensor) -> Tensor:
        ctx.save_for_backward(error)
        return error.flatten().dot(error.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (error,) = ctx.saved_tensors
        return error * (2 * grads[0])
