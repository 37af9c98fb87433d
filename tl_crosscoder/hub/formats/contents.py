"""A folder of weights and settings, looked at without torch."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_crosscoder.errors import CorruptFile, UnreadableFormat
from tl_crosscoder.files import LIMIT, SIZES, StoredTensor, read_header, read_json
from tl_crosscoder.hub.formats.pickles import Outlined, numbers, outline, tensors_in

#: Where programs that resume a training keep the weights, beside the optimiser's.
NESTED = ("model_state_dict", "state_dict", "model", "sae", "cc")
#: Tensors whose numbers are looked at for what they mean.
FEW = 1 << 20
COMPILED = "_orig_mod."
_CODES = {
    "F64": "d",
    "F32": "f",
    "F16": "e",
    "I64": "q",
    "I32": "i",
    "I16": "h",
    "I8": "b",
    "U8": "B",
    "BOOL": "?",
}


@dataclass(frozen=True)
class Contents:
    """One file of weights and the settings beside it.  ``tensors``: dtype and shape of each, by name."""

    weights: Path
    tensors: dict[str, StoredTensor | Outlined]
    #: Plain values that stand beside the tensors in a ``.pt`` file, such as a training's settings.
    beside: dict[str, Any]
    #: The names in the file begin so (a compiled module's) and are known here without it.
    prefix: str = ""
    nested: str = ""

    @property
    def folder(self) -> Path:
        return self.weights.parent

    @property
    def pickled(self) -> bool:
        return not self.weights.name.endswith(".safetensors")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that JSON and YAML files beside the weights say, and a ``.pt`` file's own ``cfg``; the more particular file wins."""
        found: dict[str, Any] = {}
        for path in _settings_files(self.folder, self.weights.stem):
            found |= read_json(path) if path.suffix == ".json" else read_yaml(path)
        own = self.beside.get("cfg", self.beside.get("config"))
        return found | (own if isinstance(own, dict) else {})

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def values(self, name: str) -> list[float] | None:
        """The numbers of a small tensor; None where there is no such tensor."""
        if (tensor := self.tensors.get(name)) is None:
            return None
        n = math.prod(tensor.shape)
        if n > FEW:
            raise CorruptFile(f"{self.weights}: {name!r} is {list(tensor.shape)}, want at most {FEW} numbers")
        if isinstance(tensor, Outlined):
            if not tensor.contiguous:
                raise CorruptFile(f"{self.weights}: {name!r} is a view of something else")
            raw = numbers(self.weights, tensor, n)
        else:
            with self.weights.open("rb") as file:
                file.seek(tensor.start)
                raw = file.read(n * SIZES[tensor.dtype])
        return _unpacked(raw, tensor.dtype, n)

    def value(self, name: str) -> float | None:
        """The number of a tensor that holds one."""
        values = self.values(name)
        if values is None:
            return None
        if len(values) != 1:
            raise CorruptFile(f"{self.weights}: {name!r} is {list(self.shape(name))}, want one number")
        return values[0]


def look(path: Path) -> list[Contents]:
    """What each file of weights in a folder holds, or the one file."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is no file or folder; a repository on the Hub is owner/repo[@revision][:subfolder]"
        )
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if _is_weights(p))
    return [found for file in files if (found := _look_at(file)) is not None]


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".pt", ".pth") and path.is_file()


def _look_at(file: Path) -> Contents | None:
    if file.suffix == ".safetensors":
        return _unprefixed(file, dict(read_header(file, None)), {})
    if file.suffix not in (".pt", ".pth"):
        raise UnreadableFormat(
            f"{file}: wanted weights, a .safetensors or .pt file, or the folder they are in"
        )
    content = outline(file)
    if not isinstance(content, dict):
        return None
    beside = {name: value for name, value in content.items() if not isinstance(value, Outlined)}
    if tensors := dict(tensors_in(content)):
        return _unprefixed(file, tensors, beside)
    inner = [name for name in NESTED if dict(tensors_in(content.get(name)))]
    if len(inner) != 1:
        return None
    return _unprefixed(file, dict(tensors_in(content[inner[0]])), beside, inner[0])


def _unprefixed(file: Path, tensors: dict[str, Any], beside: dict[str, Any], nested: str = "") -> Contents:
    prefix = COMPILED if tensors and all(name.startswith(COMPILED) for name in tensors) else ""
    return Contents(
        file, {name.removeprefix(prefix): t for name, t in tensors.items()}, beside, prefix, nested
    )


def _settings_files(folder: Path, stem: str) -> Iterator[Path]:
    """From the most general to the one that belongs to this very file of weights."""
    names = (
        "hparams.json",
        "trainer_config.json",
        "experiment_config.yaml",
        "model_cfg.yaml",
        "config.json",
        "cfg.json",
    )
    for name in (*names, f"{stem}_cfg.json", f"{stem}.config.json"):
        if (folder / name).is_file():
            yield folder / name


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MiB, plain values only and no references."""
    import yaml

    with path.open("rb") as file:
        raw = file.read(LIMIT + 1)
    if len(raw) > LIMIT:
        raise CorruptFile(f"{path}: more than {LIMIT} bytes of YAML")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(raw)):
            raise CorruptFile(f"{path}: YAML with references, which settings have no use for")
        content = yaml.safe_load(raw)
        json.dumps(content, allow_nan=False)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{path}: unreadable YAML, {type(error).__name__}: {error!s:.200}") from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path}: want a mapping, got a {type(content).__name__}")
    return content


def _unpacked(raw: bytes, dtype: str, n: int) -> list[float]:
    if dtype == "BF16":
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        dtype = "F32"
    return [float(number) for number in struct.unpack(f"<{n}{_CODES[dtype]}", raw)]
