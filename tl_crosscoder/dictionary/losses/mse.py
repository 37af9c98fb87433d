"""Squared reconstruction error."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress
from tl_crosscoder.dictionary.losses.squares import sum_of_squares


@LOSSES.register("mse")
@dataclass(frozen=True)
class MSE:
    """``mean_n Σ_m ‖e^m‖²``: squared error, summed over models and d_in (Lindsey et al. 2024)."""

    name = "mse"

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x, crosscoder, progress
        return sum_of_squares(out.error) / len(out.target)
