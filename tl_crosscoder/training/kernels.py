"""What a training step is computed by: torch's operations, or Triton kernels held to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from tl_crosscoder.dictionary.row_grads import RowGrads
from tl_crosscoder.dictionary.sparse_ops import torch_bag


@runtime_checkable
class Unwritten(Protocol):
    """The gradient of a weight's rows as what it is a sum of, for kernels that sum it where they use it."""

    def square(self) -> Tensor:
        """Its sum of squares."""
        ...

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
        ...


@dataclass(frozen=True)
class Kernels:
    """``bag`` sums weighted rows; ``gathered`` makes what was collected a gradient for Adam's kernel (None: torch's Adam)."""

    bag: Callable[..., Tensor] = torch_bag
    gathered: Callable[[RowGrads, nn.Parameter], Unwritten] | None = None


def kernels_for(asked: Literal["torch", "triton"], *weights: Tensor) -> Kernels:
    """The kernels that a setting asks for; ImportError or ValueError where Triton's cannot work on these weights."""
    if asked == "torch":
        return Kernels()
    try:
        from tl_crosscoder.dictionary import triton_bag
        from tl_crosscoder.training.triton_adam import Gathered
    except ImportError as error:
        raise ImportError(
            f"kernels='triton' needs Triton ({error}): torch for CUDA brings it on Linux, else pip install triton; or take "
            "kernels='torch'"
        ) from error
    for each in weights:
        triton_bag.check(each)
    return Kernels(triton_bag.bag, Gathered.of)
