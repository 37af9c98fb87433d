"""Batches without end, checked."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.errors import EmptyData, NonFiniteActs


def endless(batches: Iterable[Tensor], steps: int) -> Iterator[Tensor]:
    """``steps`` finite batches; the iterable is read again from the start whenever it ends.

    Raises EmptyData where it cannot be: it is empty, or an iterator that can be read only once.
    """
    step = 0
    while step < steps:
        before = step
        for x in batches:
            check_finite(x, step)
            yield x
            step += 1
            if step == steps:
                return
        if step == before or iter(batches) is batches:
            raise EmptyData(
                f"the batches ended after {step} of {steps} steps and cannot be read again; "
                f"pass an iterable that starts over (a list, store.shuffled(batch_size, seed)) or steps={step}"
            )


def refuse_store(batches: Iterable[Tensor]) -> None:
    """Raise TypeError for captured activations themselves: their sequences lie sorted by length."""
    if hasattr(batches, "shuffled"):
        raise TypeError(
            f"a {type(batches).__name__} gives its tokens in their order, sorted by the length of the text; "
            "pass store.shuffled(batch_size, seed)"
        )


def check_finite(x: Float[Tensor, "batch model d_in"], step: int) -> None:
    """Raise NonFiniteActs where a value is NaN or Inf."""
    if x.sum().isfinite() or x.isfinite().all():
        return
    row, model = (~x.isfinite().all(-1)).nonzero()[0].tolist()
    raise NonFiniteActs(
        f"NaN or Inf in the batch of step {step}: row {row}, model {model}; drop that token from both models"
    )


@torch.no_grad()
def geometric_median(
    y: Float[Tensor, "batch model d_in"], iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, "model d_in"]:
    """For each model the point with the smallest summed distance to its rows (Weiszfeld's iteration)."""
    guess = y.mean(0)
    for _ in range(iterations):
        weights = 1 / ((y - guess).norm(dim=-1, keepdim=True) + 1e-8)
        new = (weights * y).sum(0) / weights.sum(0)
        moved, guess = (new - guess).norm(), new
        if moved <= tolerance * guess.norm():
            break
    return guess
