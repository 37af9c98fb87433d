"""manifest.json: the size and sha256 of every file that was published together.

The Hub's client notices a file cut short, not one with a changed byte; this does.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import read_json, sha256, write_json
from tl_crosscoder.hub.source import check_inside

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "tl_crosscoder manifest", 1
LIMIT = 16 << 20  # bytes: a report may hold thousands of files


@dataclass(frozen=True)
class Entry:
    """``size`` in bytes, ``sha256`` in hexadecimal."""

    size: int
    sha256: str


def write_manifest(folder: Path) -> Path:
    """The manifest of all that the folder holds, written into it."""
    files = {path: _entry(folder / path) for path in paths_in(folder) if path != MANIFEST}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json(folder / MANIFEST, content | {"files": {path: asdict(entry) for path, entry in files.items()}})
    return folder / MANIFEST


def paths_in(folder: Path) -> list[str]:
    """Every file below the folder, as a POSIX path from it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_manifest(path: Path) -> dict[str, Entry] | None:
    """What a manifest lists; None for a file of that name that is not one of ours.  A hostile one raises CorruptFile."""
    content = read_json(path, LIMIT)
    if content.get("format") != FORMAT:
        return None
    if content.get("format_version") != FORMAT_VERSION or not isinstance(content.get("files"), dict):
        raise CorruptFile(
            f"{path}: want format_version {FORMAT_VERSION} and files, got {content.get('format_version')!r:.50}; "
            "a newer tl-crosscoder may read it"
        )
    return {name: _read(path, name, entry) for name, entry in content["files"].items()}


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raise CorruptFile unless the named files of the manifest (all of them) are, byte for byte, what it lists."""
    listed = read_manifest(folder / MANIFEST)
    if listed is None:
        raise CorruptFile(f"{folder / MANIFEST} is not a manifest that this library wrote")
    for name in listed if names is None else names:
        verify_file(folder / name, listed[name])


def verify_file(path: Path, entry: Entry) -> None:
    """Raise CorruptFile unless the file has the entry's size and sha256."""
    if (size := path.stat().st_size) != entry.size:
        raise CorruptFile(f"{path}: {size} bytes, where {MANIFEST} lists {entry.size}")
    if (found := sha256(path)) != entry.sha256:
        raise CorruptFile(
            f"{path}: sha256 {found[:12]}…, where {MANIFEST} lists {entry.sha256[:12]}…; it was altered"
        )


def _entry(path: Path) -> Entry:
    return Entry(path.stat().st_size, sha256(path))


def _read(path: Path, name: str, entry: object) -> Entry:
    try:
        check_inside(name, "file")
    except ValueError as error:
        raise CorruptFile(f"{path}: {error}") from error
    if isinstance(entry, dict) and set(entry) == {"size", "sha256"}:
        size, digest = entry["size"], entry["sha256"]
        if (
            type(size) is int
            and size >= 0
            and isinstance(digest, str)
            and re.fullmatch("[0-9a-f]{64}", digest)
        ):
            return Entry(size, digest)
    raise CorruptFile(f"{path}: the entry of {name!r:.100} is {entry!r:.100}, want size and sha256")
