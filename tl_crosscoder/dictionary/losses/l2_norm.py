"""Unsquared reconstruction error."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.dictionary.losses.base import LOSSES, Progress

#: Keeps the gradient of the norm finite where the error is exactly 0 (an identical pair reaches it).
EPS = 1e-12


@LOSSES.register("l2_norm")
@dataclass(frozen=True)
class L2Norm:
    """``mean over tokens and models of ‖e^m‖``, unsquared, as the code of Minder et al. 2025, arXiv:2504.02922, trains.

    Not comparable with :class:`MSE`: an L1 weight tuned for one does not serve the other.
    """

    name = "l2_norm"

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]:
        del x, crosscoder, progress
        return (out.error.square().sum(-1) + EPS).sqrt().mean()
