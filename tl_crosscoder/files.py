"""Files and folders that are either whole or absent, and a look at JSON and safetensors before anything trusts them."""

import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tl_crosscoder.errors import CorruptFile

#: Bytes of a safetensors header, and of a JSON file unless said otherwise: a thousand times what ours need.
LIMIT = 1 << 20
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """``start``: its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a temporary file; it is on disk, whole, before it takes its name.  If anything fails, it is gone.

    Of several at once, such as two jobs with one cache, the last to finish stays.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def replaced_folder(directory: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``directory`` when the block ends without an error.

    Whatever goes wrong, Ctrl-C included, ``directory`` is then the old one or the new one, whole.  Only a kill between two renames
    finds neither by that name; the old one is then beside it, ``.NAME-….old``.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    new = beside / directory.name
    try:
        new.mkdir()
        yield new
        for path in (*new.iterdir(), new):
            sync(path)
        _swap(directory, new, beside.with_name(beside.name + ".old"))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _swap(directory: Path, new: Path, old: Path) -> None:
    try:
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
        sync(directory.parent)
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    finally:
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """The file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes, otherwise CorruptFile.

    Refused: a key twice, NaN, Infinity and numbers that become it, nesting too deep, anything but an object.
    """
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise CorruptFile(f"{path}: more than {limit} bytes of JSON")
    return _object(path, raw)


def read_header(path: Path, names: Collection[str] | None) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, once it is known to hold exactly ``names`` (None: any) and their bytes.

    Raises CorruptFile for a header over 1 MiB, a repeated key, a missing or further tensor, an unknown
    dtype, and data that overlap, leave gaps or do not end with the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LIMIT, size - 8):
            raise CorruptFile(
                f"{path}: a header of {length} bytes in a file of {size}; the largest allowed is {LIMIT}"
            )
        header = _object(path, file.read(length))
    header.pop("__metadata__", None)
    if names is not None and set(header) != set(names):
        missing, further = sorted(set(names) - set(header)), sorted(set(header) - set(names))
        raise CorruptFile(f"{path}: tensors missing {missing}, unexpected {further[:3]!r:.200}")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor(path, name, entry, 8 + length)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CorruptFile(f"{path}: tensors overlap or leave a gap at byte {end} of the data")
        end = stop
    if 8 + length + end != size:
        raise CorruptFile(
            f"{path}: the tensors end at byte {8 + length + end}, the file at {size}: cut short or added to"
        )
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int) -> tuple[StoredTensor, tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = len(entry) == 3 and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        sound = sound and stop - start == SIZES[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError):
        sound, dtype, shape, start, stop = False, "", (), 0, 0
    if not sound:
        raise CorruptFile(
            f"{path}: the header entry of {name!r} is {entry!r:.200}, which describes no tensor"
        )
    return StoredTensor(dtype, shape, data + start), (start, stop)


def _object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError:
        raise CorruptFile(f"{path}: JSON nested too deeply") from None
    except ValueError as error:
        raise CorruptFile(f"{path}: unreadable JSON, {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{path}: want a JSON object, got a {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not a number this format allows")
