"""Tensors of a file, read straight to where they are wanted, each number looked at once."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import StoredTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: An integer of each width, to move numbers that numpy has no name for.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Bytes read at once by a thread, latents turned at once, threads.
PIECE, COLUMNS, THREADS = 1 << 24, 256, 4


@runtime_checkable
class Weights(Protocol):
    """Named tensors of a file."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read_into(self, name: str, into: Tensor, *, finite: bool = True) -> None:
        """``into`` has the stored shape, with whatever strides and dtype; ``finite``: CorruptFile for NaN or Inf."""
        ...


def read(weights: Weights, name: str, dtype: torch.dtype | None = None, *, finite: bool = True) -> Tensor:
    """The tensor in memory of its own, in the stored dtype or another."""
    made = torch.empty(weights.shape(name), dtype=dtype or weights.dtype(name))
    weights.read_into(name, made, finite=finite)
    return made


class SafetensorsWeights:
    """The tensors of a safetensors file whose header was checked (:func:`tl_crosscoder.files.read_header`).

    A tensor is read in pieces by a few threads, each piece looked at, cast and turned while the processor's cache holds it: nothing
    is in memory twice.
    """

    def __init__(self, path: Path, stored: dict[str, StoredTensor]):
        self.path, self.stored = path, stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.stored[name].dtype]

    def read_into(self, name: str, into: Tensor, *, finite: bool = True) -> None:
        assert into.shape == self.shape(name), (name, into.shape)
        pieces, room = list(self._pieces(name, into)), local()

        def move(piece: tuple[int, Tensor]) -> None:
            start, target = piece
            straight = target.is_contiguous() and target.dtype == self.dtype(name)
            source = target if straight else _room(room, target.shape, self.dtype(name))
            self._fill(file, start, source)
            if finite:
                _refuse_infinite(self.path, name, source, target.dtype)
            if not straight:
                put(target, source)

        with self.path.open("rb", buffering=0) as opened:
            file = opened.fileno()
            _all(move, pieces)

    def _pieces(self, name: str, into: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Parts of ``into`` that lie one after the other in the file, with where each starts."""
        start, size = self.stored[name].start, self.dtype(name).itemsize
        parts = [into.view(-1)] if into.is_contiguous() else [into]
        while parts[0].dim() > 2:
            parts = [inner for part in parts for inner in part]
        for part in parts:
            row = math.prod(part.shape[1:]) * size
            for piece in part.split(max(1, PIECE // max(1, row))):
                yield start, piece
                start += piece.numel() * size

    def _fill(self, file: int, start: int, into: Tensor) -> None:
        view, done = into.view(torch.uint8).numpy().data.cast("B"), 0
        while done < len(view):
            got = os.preadv(file, [view[done:]], start + done)
            if not got:
                raise CorruptFile(f"{self.path}: cut short while it was read")
            done += got


class GivenWeights:
    """Tensors that are in memory, or mapped there, already."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]):
        self.path, self.tensors = path, tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read_into(self, name: str, into: Tensor, *, finite: bool = True) -> None:
        source = self.tensors[name]
        if finite:
            _refuse_infinite(self.path, name, source, into.dtype)
        into.copy_(source)


def put(target: Tensor, source: Tensor) -> None:
    """Copy, casting where the dtypes differ; a transposed target is filled block by block, which the cache likes better."""
    source = source.to(target.dtype)
    if target.dim() != 2 or target.stride(1) == 1:
        target.copy_(source)
        return
    bits = BITS[target.element_size()]
    columns, rows = target.T.view(bits).numpy(), source.view(bits).numpy()
    for start in range(0, len(columns), COLUMNS):
        columns[start : start + COLUMNS] = rows[:, start : start + COLUMNS].T


def _refuse_infinite(path: Path, name: str, source: Tensor, dtype: torch.dtype) -> None:
    """Raise CorruptFile for NaN or Inf, ValueError for numbers that become it in the dtype."""
    if source.is_floating_point() and not all_finite(source):
        raise CorruptFile(f"{path}: {name!r} holds NaN or Inf")
    if dtype == torch.float16 != source.dtype and not all_finite(
        source.to(dtype)
    ):  # the one with few exponents
        raise ValueError(
            f"{path}: {name!r} holds numbers too large for float16; read it with dtype=torch.bfloat16, or as it is"
        )


def all_finite(tensor: Tensor) -> bool:
    """A sum is NaN or Inf where a number is; where it merely overflows, every number is asked."""
    flat = tensor.reshape(-1)
    return all(bool(part.sum().isfinite()) or bool(part.isfinite().all()) for part in flat.split(1 << 20))


def _room(room: local, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory of this thread's own, used again for each piece."""
    if not hasattr(room, "bytes") or len(room.bytes) < math.prod(shape) * dtype.itemsize:
        room.bytes = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    return room.bytes[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _all(job: Callable[[tuple[int, Tensor]], None], pieces: list[tuple[int, Tensor]]) -> None:
    if len(pieces) < 2:
        for piece in pieces:
            job(piece)
        return
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        for done in [threads.submit(job, piece) for piece in pieces]:
            done.result()
