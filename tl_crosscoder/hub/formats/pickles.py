"""What a ``.pt`` file says it holds, read without running any of it.

A pickle is a program.  Here it is neither run nor trusted: its instructions are walked, and only those that describe dicts, lists,
numbers, words and tensors are understood.  Anything else, a call to any other function above all, is refused by its name.
"""

import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import SIZES

#: Bytes of the program, and of the instructions of one; those of a crosscoder have some thousands.
LIMIT = 1 << 20
STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
MAPPING, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
KNOWN = {MAPPING, TENSOR, PARAMETER} | {f"torch {storage}" for storage in STORAGES}
_MARK = object()


@dataclass(frozen=True)
class Outlined:
    """A tensor as the program describes it; ``record`` holds its numbers in the archive."""

    dtype: str
    shape: tuple[int, ...]
    record: str
    offset: int
    contiguous: bool


@dataclass(frozen=True)
class _Name:
    name: str


def outline(path: Path) -> Any:
    """What ``torch.save`` put in the file: dicts, lists, plain values, and :class:`Outlined` for each tensor.

    Raises CorruptFile for a file that is none of that, or that calls for anything but the making of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            program, sizes = _program(path, archive)
            return _Walk(path, sizes).run(program)
    # zipfile says NotImplementedError of compressions and versions that it does not read
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise CorruptFile(
            f"{path}: not an archive of torch.save ({error}); files from before torch 1.6 are not read: save it "
            "again with a newer torch"
        ) from error
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UnicodeError,
    ) as error:
        raise CorruptFile(
            f"{path}: its program cannot be followed ({type(error).__name__}: {error!s:.100})"
        ) from error


def numbers(path: Path, tensor: Outlined, n: int) -> bytes:
    """The bytes of the first ``n`` numbers of a contiguous tensor."""
    size = SIZES[tensor.dtype]
    with zipfile.ZipFile(path) as archive, archive.open(tensor.record) as record:
        record.seek(tensor.offset * size)
        return record.read(n * size)


def _program(path: Path, archive: zipfile.ZipFile) -> tuple[bytes, dict[str, Any]]:
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise CorruptFile(f"{path}: the archive holds a name twice")
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise CorruptFile(f"{path}: {packed[0]!r:.80} is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CorruptFile(f"{path}: the archive claims more bytes than the file has")
    programs = [
        entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")
    ]
    if len(programs) != 1 or programs[0].file_size > LIMIT:
        raise CorruptFile(f"{path}: want one program of at most {LIMIT} bytes, found {len(programs)}")
    return archive.read(programs[0]), {
        entry.filename.split("/", 1)[-1]: entry.file_size for entry in entries
    } | {"": programs[0].filename.split("/", 1)[0]}


class _Walk:
    """The stack machine of a pickle without its powers."""

    def __init__(self, path: Path, sizes: dict[str, Any]):
        self.path, self.sizes = path, sizes
        self.root = sizes.pop("")
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("it does not stop")

    def step(self, name: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(_MARK)
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([pop() for _ in range(int(name[-1]))])))
            case "TUPLE":
                push(tuple(self.marked()))
            case "GLOBAL":
                push(self.known(argument))
            case "STACK_GLOBAL":
                what, module = pop(), pop()
                push(self.known(f"{module} {what}"))
            case "BINPERSID":
                push(self.storage(pop()))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(self.call(function, arguments))
            case "BUILD":
                pop()  # an OrderedDict's attributes, such as torch's _metadata
            case "SETITEM" | "SETITEMS":
                items = self.marked() if name == "SETITEMS" else [pop() for _ in range(2)][::-1]
                self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND" | "APPENDS":
                items = self.marked() if name == "APPENDS" else [pop()]
                self.stack[-1].extend(items)
            case _:
                raise CorruptFile(
                    f"{self.path}: its program uses {name}, which no tensors need; it was not run"
                )

    def marked(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def known(self, name: str) -> _Name:
        if name not in KNOWN:
            raise CorruptFile(
                f"{self.path}: its program asks for {name.replace(' ', '.')!r:.100}, which no tensors need; it was not run"
            )
        return _Name(name)

    def storage(self, about: tuple[Any, ...]) -> tuple[str, str]:
        kind, storage, record = about[0], about[1].name, about[2]
        if kind != "storage" or f"data/{record}" not in self.sizes:
            raise ValueError(f"no storage {record!r:.40}")
        return STORAGES[storage.removeprefix("torch ")], record

    def call(self, function: _Name, arguments: tuple[Any, ...]) -> Any:
        if function.name == MAPPING:
            return dict(*arguments)
        if function.name == PARAMETER:
            return arguments[0]
        if function.name != TENSOR:
            raise ValueError(f"{function.name} is no function")
        (dtype, record), offset, shape, strides = arguments[:4]
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)) or len(shape) != len(
            strides
        ):
            raise ValueError(f"a tensor of shape {shape!r:.60}")
        reach = (
            offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
            if 0 not in shape
            else 0
        )
        held = self.sizes[f"data/{record}"] // SIZES[dtype]
        count = 1
        for n in shape:
            count *= n
        if reach > held or count > held:
            raise ValueError(f"a tensor of shape {list(shape)} over a storage of {held} numbers")
        return Outlined(
            dtype, tuple(shape), f"{self.root}/data/{record}", offset, _contiguous(shape, strides)
        )


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    wanted = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != wanted:
            return False
        wanted *= n
    return True


def tensors_in(content: Any) -> Iterator[tuple[str, Outlined]]:
    """The named tensors of a dict."""
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Outlined):
                yield name, value
