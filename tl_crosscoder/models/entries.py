"""What of a capture is finished: until all of it is, each shard has a file beside it that says what it holds."""

from pathlib import Path
from typing import Any

from tl_crosscoder.errors import CorruptFile
from tl_crosscoder.files import read_json, write_json
from tl_crosscoder.models.manifest import SHARD_KEYS, shard_file


def write_entry(folder: Path, number: int, entry: dict[str, Any]) -> None:
    write_json(_path(folder, number), entry)


def entries(folder: Path, manifest: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The entry of each shard that is there, by its number."""
    found = dict(enumerate(manifest["shards"]))
    for number in range(manifest["n_shards"]):
        path = _path(folder, number)
        if path.exists():
            found[number] = _checked(path, number)
    return {number: entry for number, entry in found.items() if (folder / entry["file"]).exists()}


def finished(folder: Path, manifest: dict[str, Any]) -> bool:
    """Every shard is there, and the manifest lists them."""
    n = manifest["n_shards"]
    whole = len(manifest["shards"]) == n and len(entries(folder, manifest)) == n
    return whole and not any(_path(folder, number).exists() for number in range(n))


def remove_entries(folder: Path, manifest: dict[str, Any]) -> None:
    """The manifest has them now."""
    for number in range(manifest["n_shards"]):
        _path(folder, number).unlink(missing_ok=True)


def _path(folder: Path, number: int) -> Path:
    return (folder / shard_file(number)).with_suffix(".json")


def _checked(path: Path, number: int) -> dict[str, Any]:
    entry = read_json(path)
    kinds = {key: type(value) for key, value in entry.items()}
    if kinds != SHARD_KEYS or entry["file"] != shard_file(number) or entry["rows"] < 0:
        raise CorruptFile(f"{path} is no entry of shard {number}.  Delete it, and that shard is made anew.")
    return entry
