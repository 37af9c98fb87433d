"""One streaming pass: each batch is encoded once, every analysis looks at it, each gives a value per latent at the end.

A new analysis is a file with a subclass of :class:`Analysis` and a line in ``table.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.latent_order import LatentOrder
from tl_crosscoder.dictionary.codes import Codes
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.errors import EmptyData
from tl_crosscoder.widths import refuse_unlike

Columns = dict[str, Tensor]
Metrics = dict[str, int | float]


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of tokens as the crosscoder sees it.  ``target`` and ``estimate`` are in normalised units.

    ``sequence`` and ``position`` lead back to the text; -1 where the batches were bare tensors.
    """

    codes: Codes
    target: Float[Tensor, "batch model d_in"]
    estimate: Float[Tensor, "batch model d_in"]
    sequence: Int[Tensor, " batch"]
    position: Int[Tensor, " batch"]

    @cached_property
    def tokens(self) -> Int[Tensor, " nnz"]:
        """The token of each active pair."""
        return self.codes.tokens()

    @cached_property
    def error(self) -> Float[Tensor, "batch model d_in"]:
        return self.target - self.estimate

    @cached_property
    def by_latent(self) -> LatentOrder:
        """The active pairs, latent by latent."""
        return LatentOrder.of(self.codes, self.tokens)


class Analysis(ABC):
    """Accumulates over batches in float64; memory does not grow with the number of tokens."""

    #: What it says is about base against tuned, so that a crosscoder of one model has none of it.
    compares_models = False
    #: Whether it holds a direction of one model against the other's, so that models of unlike width have none of it.
    one_space = False

    def __init__(self, crosscoder: Crosscoder):
        if self.compares_models and crosscoder.n_models < 2:
            raise ValueError(
                f"{type(self).__name__} compares base with tuned, and this crosscoder has one model (a dictionary of their "
                "difference?); Firing, MaxActs and Reconstruction look at one model"
            )
        if self.one_space:
            refuse_unlike(crosscoder, type(self).__name__)
        self.crosscoder = crosscoder

    @abstractmethod
    def update(self, batch: EncodedBatch) -> None:
        """Look at one batch."""

    @abstractmethod
    def columns(self) -> Columns:
        """One value per latent for each column; NaN where a value is undefined."""

    def metrics(self) -> Metrics:
        """Figures about the whole dictionary; most analyses have none."""
        return {}


def encoded(crosscoder: Crosscoder, batches: Iterable, batch_size: int = 2048) -> Iterator[EncodedBatch]:
    """Each batch through the crosscoder, in evaluation mode.

    ``batches``: a store (anything with ``located``), or an iterable of raw ``[batch model d_in]`` tensors.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            "the batches are one tensor, which would be read row by row; pass [x], or x.split(2048)."
        )
    units = crosscoder.units or crosscoder.normalizer
    for x, sequence, position in located(batches, batch_size):
        if not len(x):
            continue
        x = x.to(crosscoder.W_dec.device, crosscoder.W_dec.dtype)
        with evaluating(crosscoder):
            codes = crosscoder.encode_sparse(x)
            target, estimate = units.normalise(x), units.normalise(crosscoder.decode(codes))
        yield EncodedBatch(codes, target, estimate, sequence, position)


@contextmanager
def evaluating(crosscoder: Crosscoder) -> Iterator[None]:
    """Without gradients and in evaluation mode; the mode is put back afterwards."""
    was_training = crosscoder.training
    crosscoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        crosscoder.train(was_training)


@torch.no_grad()
def run(crosscoder: Crosscoder, batches: Iterable, analyses: list[Analysis]) -> None:
    """Show every batch to every analysis."""
    seen = 0
    for batch in encoded(crosscoder, batches):
        seen += len(batch.codes)
        for analysis in analyses:
            analysis.update(batch)
    if not seen:
        raise EmptyData("the analysis got no tokens; was the iterator already used up, or the store empty?")


def located(batches: Iterable, batch_size: int = 2048) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each batch with the sequence and the position of its tokens, -1 for bare tensors."""
    store: Any = batches
    if hasattr(store, "located"):
        for part in store.located(batch_size):
            yield part.x, part.sequence, part.position
        return
    for x in batches:
        nowhere = torch.full((len(x),), -1)
        yield x, nowhere, nowhere
