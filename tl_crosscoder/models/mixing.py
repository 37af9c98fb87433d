"""MixedBatches: blocks of rows in, random batches out, each row once an epoch, to be gone on with after any batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.models.manifest import difference

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class Place:
    """A place in an epoch: where the present filling of the buffer began, and how many batches were drawn from it since."""

    epoch: int
    batches: int = 0
    block: int = 0  # blocks used up before this filling
    row: int = 0  # rows of the next block used up before it
    skipped: int = 0  # rows left out of the blocks used up
    rng: dict[str, Any] | None = None  # None: as the order of the blocks left it
    waiting: Float[Tensor, "batch model d_in"] | None = None  # rows that were too few for a batch


class MixedBatches(ABC):
    """Each iteration is one epoch: every row once, in float32 batches that ``seed`` and ``epoch`` alone decide.

    Blocks of rows are read in random order into a buffer, and batches are drawn from it; then it is filled again.  Rows too
    few for a batch wait for the next filling; at the very end they form a smaller batch, unless ``drop_last``.

    ``epoch`` counts the iterations begun; assign it to go back to the start of one.  ``skipped`` counts the rows of this
    epoch that were not finite and left out.
    """

    def __init__(self, batch_size: int, seed: int, buffer_rows: int, drop_last: bool):
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.skipped = 0
        self._room = max(buffer_rows, batch_size)
        self._epoch, self._place, self._resumed = 0, None, False

    @property
    @abstractmethod
    def _n_blocks(self) -> int: ...

    @property
    @abstractmethod
    def _rows_at_most(self) -> int:
        """No fewer rows than all blocks hold; known before any is read."""

    @abstractmethod
    def _read(self, block: int) -> Tensor:
        """The rows of one block; counts in ``skipped`` those it leaves out."""

    @abstractmethod
    def _data(self) -> dict[str, Any]:
        """All that decides which rows each block holds, JSON-able."""

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch, self._place, self._resumed = epoch, None, False

    def __iter__(self) -> Iterator[Float[Tensor, "batch model d_in"]]:
        if self._resumed and self._place is not None:
            self._resumed, going_on = False, False
            for x in self._batches(self._place):
                going_on = True
                yield x
            if going_on:
                return
            # The state was that of an epoch's end: what comes next is the next epoch.
        self._epoch += 1
        yield from self._batches(Place(self._epoch - 1))

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that was yielded: JSON values and at most one tensor, smaller than a batch."""
        place = self._place
        if place is None:
            return {"recipe": self._recipe, "epoch": self._epoch, "place": None}
        waiting = None if place.waiting is None else place.waiting.cpu()
        return {
            "recipe": self._recipe,
            "epoch": place.epoch + 1,
            "place": {**vars(place), "waiting": waiting},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken: the next iteration is the rest of that epoch, or the next one where nothing is left.

        No more is read again than one filling of the buffer.  Raises ValueError for the state of other batches.
        """
        if set(state) != {"recipe", "epoch", "place"}:
            raise ValueError(
                f"a state with {sorted(state)}; wanted the recipe, epoch and place of {type(self).__name__}."
            )
        if found := difference(state["recipe"], self._recipe):
            key, theirs, ours = found
            raise ValueError(
                f"this state is of batches with {key} = {theirs!r}; these have {ours!r}.  Make them as those were, "
                "or start anew without the state."
            )
        place = state["place"]
        self._epoch, self._place = state["epoch"], None if place is None else Place(**place)
        self._resumed = place is not None
        self.skipped = 0 if place is None else place["skipped"]

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        own = {"batch_size": self.batch_size, "seed": self.seed, "buffer_rows": self._room}
        return own | {"drop_last": self.drop_last} | self._data()

    def _batches(self, place: Place) -> Iterator[Tensor]:
        """The rest of the epoch from a place on."""
        rng = np.random.default_rng([self.seed, place.epoch])
        order = spread(self._n_blocks, -(-self._rows_at_most // self._room), rng)
        if place.rng is not None:
            rng.bit_generator.state = place.rng
        self.skipped = place.skipped
        blocks = _Blocks(self, order, place.block, place.row)
        # What waits comes back from a file on the CPU; the buffer is where the blocks are.
        like = place.waiting if (opened := blocks.opened()) is None else opened
        if like is None:
            return
        size = min(self._room, self._rows_at_most)
        buffer = torch.empty(size, *like.shape[1:], dtype=like.dtype, device=like.device)
        full = True
        while full:
            place = replace(place, rng=rng.bit_generator.state)
            held = 0
            for rows in blocks.after(place.waiting, self._room):
                buffer[held : held + len(rows)] = rows
                held += len(rows)
            full, drawn = held == self._room, torch.from_numpy(rng.permutation(held)).to(buffer.device)
            used = held - held % self.batch_size if full or self.drop_last else held
            for at in range(place.batches * self.batch_size, used, self.batch_size):
                place = replace(place, batches=place.batches + 1)
                self._place = place
                yield buffer[drawn[at : min(at + self.batch_size, used)]].float()
            waiting = buffer[drawn[used:]] if used < held else None
            place = Place(place.epoch, 0, blocks.number, blocks.row, blocks.skipped, None, waiting)


def fingerprints(description: dict[str, Any]) -> dict[str, Any]:
    """Of a pair's description what decides its activations: each model's fingerprint, and the hook."""
    models = {key: told for key, told in description.items() if isinstance(told, dict)}
    return {"hook": description["hook"]} | {key: told.get("fingerprint") for key, told in models.items()}


def spread(n: int, stretches: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of 0..n-1 of which any run is spread evenly; it is to be read in so many ``stretches``.

    Neighbouring blocks hold texts of one length, often of one source, and a filling takes few blocks: 16 of 4,096 rows.  Drawn
    freely, a source of half of the rows would have 50 ± 12 % of a filling, which is 64 batches of 1,024; this way ± 4 %.  Steps
    of the golden ratio spread best at every length; which of ``stretches`` neighbours is met at which step is random.
    """
    order = rng.permutation(n)
    if stretches > 1:
        order = order[(order // stretches).argsort(kind="stable")]
        met = (rng.random() + GOLDEN * np.arange(n)) % 1
        order = order[met.argsort().argsort()]
    return order


class _Blocks:
    """Blocks read in an order and used up row by row: the next is row ``row`` of its ``number``th."""

    def __init__(self, batches: MixedBatches, order: np.ndarray, number: int, row: int):
        self.batches, self.order, self.number, self.row = batches, order, number, row
        self.skipped = batches.skipped  # of the blocks that are used up
        self._opened: Tensor | None = None

    def opened(self) -> Tensor | None:
        """The block of the next row; None where no row is left."""
        while self._opened is None and self.number < len(self.order):
            self._opened = self.batches._read(int(self.order[self.number]))
            self._leave_if_used_up()
        return self._opened

    def after(self, waiting: Tensor | None, most: int) -> Iterator[Tensor]:
        """What waits and then the next rows, so many together or all that are left."""
        if waiting is not None:
            most -= len(waiting)
            yield waiting
        while most and (block := self.opened()) is not None:
            taken = block[self.row : self.row + most]
            self.row, most = self.row + len(taken), most - len(taken)
            self._leave_if_used_up()
            yield taken

    def _leave_if_used_up(self) -> None:
        if self._opened is not None and self.row >= len(self._opened):
            self.number, self.row, self._opened = self.number + 1, 0, None
            self.skipped = self.batches.skipped
