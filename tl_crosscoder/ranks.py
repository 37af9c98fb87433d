"""The processes that work together, as seen by one of them; how numbers travel between them is another's business."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Axis(Protocol):
    """Some ranks in their order; this one is number ``index`` of ``size``."""

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    def add_(self, values: Tensor) -> Tensor:
        """``values``, which now hold the sum over the ranks; every rank gets the same bytes."""
        ...

    def collected(self, values: Tensor) -> Iterator[Tensor]:
        """To the first rank what each rank has, in turn; to the others nothing."""
        ...


@dataclass(frozen=True)
class Alone:
    """An axis of one rank."""

    size: int = 1
    index: int = 0

    def add_(self, values: Tensor) -> Tensor:
        return values

    def collected(self, values: Tensor) -> Iterator[Tensor]:
        yield values


ALONE = Alone()


def total(ranks: Axis, n: int) -> int:
    """The sum of a number over the ranks."""
    return n if ranks.size == 1 else int(ranks.add_(torch.tensor([n])))


def on_first(ranks: Axis, work: Callable[[], object]) -> None:
    """Let the first rank do what is to be done once; the others wait, and where it fails they stop too."""
    all_do(ranks, work if ranks.index == 0 else lambda: None)


def all_do(ranks: Axis, work: Callable[[], object]) -> None:
    """Let every rank do its own part and wait for the others; where one fails all stop."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    if total(ranks, int(failure is not None)):
        raise failure or RuntimeError("another process stopped; it says why")
