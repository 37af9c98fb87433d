"""Checks on files from elsewhere, before their content is believed."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from tl_crosscoder.errors import CorruptFile

#: Bytes of a JSON file or a safetensors header: a thousand times what ours need.
MAX_JSON = 1 << 20
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file.  Refused: over 1 MiB, duplicate keys, NaN or Infinity, too deep, not an object."""
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON + 1), path)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    if len(raw) > MAX_JSON:
        raise CorruptFile(f"{path}: more than {MAX_JSON} bytes of JSON")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constants,
            parse_float=_finite,
        )
    except RecursionError:
        raise CorruptFile(f"{path}: JSON nested too deeply") from None
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{path}: want a JSON object, got a {type(value).__name__}")
    return value


def check_header(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a safetensors file unless it holds exactly the expected names and shapes, back to back, to the last byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_JSON, size - 8):
            raise CorruptFile(
                f"{path}: a header of {length} bytes in a file of {size}; the largest allowed is {MAX_JSON}"
            )
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    if set(header) != set(expected):
        raise CorruptFile(
            f"{path}: tensors missing {sorted(set(expected) - set(header))}, unexpected {sorted(set(header) - set(expected))[:3]}"
        )
    if len({str(entry.get("dtype")) for entry in header.values() if isinstance(entry, dict)}) > 1:
        raise CorruptFile(f"{path}: the tensors differ in dtype")
    spans = sorted(_span(path, name, header[name], expected[name]) for name in expected)
    end = 0
    for start, stop in spans:
        if start != end:
            raise CorruptFile(f"{path}: tensors overlap or leave a gap at byte {end} of the data")
        end = stop
    if 8 + length + end != size:
        raise CorruptFile(f"{path}: the tensors end at byte {8 + length + end}, the file at {size}")


def _span(path: Path, name: str, entry: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"{path}: the entry of {name!r} is not a tensor's")
    if entry["shape"] != list(shape):
        raise CorruptFile(
            f"{path}: {name!r} wants the shape {list(shape)} of config.json, got {str(entry['shape'])[:60]}"
        )
    item = ITEM_SIZES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    offsets = entry["data_offsets"]
    if item is None or not (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)
    ):
        raise CorruptFile(f"{path}: {name!r} wants a float dtype and two offsets, got {str(entry)[:100]}")
    if offsets[0] < 0 or offsets[1] - offsets[0] != item * math.prod(shape):
        raise CorruptFile(
            f"{path}: {name!r} spans {offsets}, not the {item * math.prod(shape)} bytes of its shape"
        )
    return offsets[0], offsets[1]


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse NaN and Inf."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CorruptFile(f"{path}: {name!r} holds NaN or Inf")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a number this format allows")
    return value


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number this format allows")
