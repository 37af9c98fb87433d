"""Activations of one model axis: what tuned has and base has not."""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.errors import ShapeMismatch
from tl_crosscoder.types import BASE, TUNED
from tl_crosscoder.widths import refuse_unlike


def difference(batches: Any) -> Any:
    """The same batches as ``tuned − base``, [batch, 1, d_in], for a crosscoder with ``n_models=1``.

    ``batches``: a store, or an iterable of raw [batch, model, d_in] tensors; what can be read again stays so, an iterator stays an
    iterator, and batches that know their place (``state_dict``) keep knowing it.
    """
    refuse_unlike(batches, "a difference")
    if isinstance(batches, Iterator):
        return map(tuned_minus_base, batches)
    if hasattr(batches, "located"):
        return DifferenceStore(batches)
    return ResumableDifference(batches) if hasattr(batches, "state_dict") else Difference(batches)


def tuned_minus_base(x: Float[Tensor, "batch model d_in"]) -> Float[Tensor, "batch 1 d_in"]:
    """The difference of the two models' activations, the model axis kept."""
    if x.shape[1:-1] != (2,):
        raise ShapeMismatch(f"a difference wants batches of [batch, model=2, d_in], got {list(x.shape)}")
    return x[:, [TUNED]] - x[:, [BASE]]


class Difference:
    """Differences that can be read again."""

    source: Any

    def __init__(self, source: Iterable[Tensor]):
        self.source = source

    def __iter__(self) -> Iterator[Float[Tensor, "batch 1 d_in"]]:
        return map(tuned_minus_base, self.source)

    def __length_hint__(self) -> int:
        return operator.length_hint(self.source)

    @property
    def batch_size(self) -> int:
        """Of batches that tell it; AttributeError for others."""
        return self.source.batch_size

    @property
    def drop_last(self) -> bool:
        """As ``batch_size``."""
        return self.source.drop_last


class ResumableDifference(Difference):
    """Differences whose state is that of the batches they are taken from."""

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


class DifferenceStore:
    """The differences of a store's tokens, read as the store is."""

    n_models = 1

    def __init__(self, store: Any):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    @property
    def d_in(self) -> int:
        return self.store.d_in

    def __iter__(self) -> Iterator[Float[Tensor, "batch 1 d_in"]]:
        return self.batches()

    def batches(self, size: int = 4096) -> Iterator[Float[Tensor, "batch 1 d_in"]]:
        """All tokens in order."""
        return map(tuned_minus_base, self.store.batches(size))

    def located(self, size: int = 4096) -> Iterator[Any]:
        """All tokens in order, each with its place in the corpus."""
        return (replace(part, x=tuned_minus_base(part.x)) for part in self.store.located(size))

    def shuffled(self, batch_size: int, seed: int = 0, **settings: Any) -> Difference:
        """Random batches, for training."""
        return difference(self.store.shuffled(batch_size, seed, **settings))

    def split(self, fraction: float, seed: int = 0) -> tuple["DifferenceStore", "DifferenceStore"]:
        """Two parts, as the store splits."""
        first, second = self.store.split(fraction, seed)
        return DifferenceStore(first), DifferenceStore(second)
