"""What every loss offers, and what training tells it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder, CrosscoderOutput
from tl_crosscoder.registry import Registry

LOSSES = Registry("loss")


@dataclass(frozen=True, eq=False)
class Progress:
    """Where training stands before this step: ``step`` of ``steps``, ``tokens`` seen, and tokens since each latent last fired."""

    step: int
    steps: int
    tokens: int
    tokens_since_fired: Int[Tensor, "d_sae"]

    def ramp(self, fraction: float) -> float:
        """Rises linearly from 0 to 1 over this first part of training, then stays."""
        length = fraction * self.steps
        return min(1.0, self.step / length) if length else 1.0


@runtime_checkable
class Loss(Protocol):
    """A scalar to minimise, in normalised units; ``name`` is its column in the log."""

    @property
    def name(self) -> str: ...

    def __call__(
        self, x: Tensor, out: CrosscoderOutput, crosscoder: Crosscoder, progress: Progress
    ) -> Float[Tensor, ""]: ...
