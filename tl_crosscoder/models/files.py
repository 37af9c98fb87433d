"""Files that are either complete or absent, and a look at a safetensors file before anything trusts it."""

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tl_crosscoder.errors import CorruptFile

HEADER_LIMIT = 2**20
JSON_LIMIT = 2**24
SIZES = {"U8": 1, "I32": 4, "I64": 8, "F32": 4, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    dtype: str
    shape: tuple[int, ...]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a temporary file; it is on disk, whole, before it takes its name."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB, without NaN or repeated keys; otherwise CorruptFile."""
    if path.stat().st_size > JSON_LIMIT:
        raise CorruptFile(f"{path} has {path.stat().st_size:,} bytes; at most {JSON_LIMIT:,} are read.")
    return _object(path, path.read_bytes())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_header(path: Path, names: Collection[str]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, once it is known to hold exactly ``names`` and their bytes.

    Raises CorruptFile for a header over 1 MiB, a repeated key, a missing or further tensor, an unknown
    dtype, and data that overlap, leave gaps or do not end with the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise CorruptFile(
                f"{path} has {size:,} bytes and announces a header of {length:,}; wanted one inside the "
                f"file and of at most {HEADER_LIMIT:,}."
            )
        header = _object(path, file.read(length))
    header.pop("__metadata__", None)
    if set(header) != set(names):
        raise CorruptFile(f"{path} holds the tensors {sorted(header)!r:.200}; wanted {sorted(names)}.")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor(path, name, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CorruptFile(f"{path}: the tensors overlap or leave a gap at byte {end:,} of the data.")
        end = stop
    if 8 + length + end != size:
        raise CorruptFile(
            f"{path} has {size:,} bytes; its header describes {8 + length + end:,}: cut short or added to."
        )
    return tensors


def _tensor(path: Path, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = len(entry) == 3 and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        sound = sound and stop - start == SIZES[dtype] * prod(shape)
    except (KeyError, TypeError, ValueError):
        sound, dtype, shape, start, stop = False, "", (), 0, 0
    if not sound:
        raise CorruptFile(
            f"{path}: the header entry of {name!r} is {entry!r:.200}, which describes no tensor."
        )
    return StoredTensor(dtype, shape), (start, stop)


def _object(path: Path, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def finite(word: str) -> float:
        raise ValueError(f"{word} is no number")

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: unreadable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path}: the JSON is a {type(content).__name__}; wanted an object.")
    return content
