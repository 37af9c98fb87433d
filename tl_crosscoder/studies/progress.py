"""How far a study has come, on standard error."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def tracked(items: Iterable[Item], words: str, total: int | None, show: bool) -> Iterator[Item]:
    """The items, with a bar that counts them; it is gone when they are."""
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, words, total, console=Console(stderr=True), transient=True)


class TrackedBatches:
    """A store or an iterable of batches, as the analyses take them, with the bar of :func:`tracked`."""

    def __init__(self, batches: Any, words: str, show: bool):
        self.batches, self.words, self.show = batches, words, show
        if hasattr(batches, "located"):
            self.located = self._located

    def __iter__(self) -> Iterator[Any]:
        total = len(self.batches) if hasattr(self.batches, "__len__") else None
        return tracked(self.batches, self.words, total, self.show)

    def _located(self, size: int) -> Iterator[Any]:
        return tracked(self.batches.located(size), self.words, -(-len(self.batches) // size), self.show)
