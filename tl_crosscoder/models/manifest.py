"""The manifest of a store: what was captured, from which models, and the refusal to mix it with anything else."""

import json
import re
from pathlib import Path
from typing import Any

from tl_crosscoder.errors import CorruptFile, PairMismatch
from tl_crosscoder.files import read_json
from tl_crosscoder.models.harvest import DTYPES, Pair
from tl_crosscoder.models.tokenizer import tokenizer_sha256

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
JSON_LIMIT = 1 << 24  # an entry of 300 bytes a shard: 50,000 shards
SHARD_FILE = re.compile(r"shard-\d{5}\.safetensors")

#: Entries of a pair's description that may differ while the activations stay the same up to rounding.
IMMATERIAL = ("name", "adapter_name", "revision", "backend", "attention", "torch", "transformers")

#: Those that may also differ while a capture goes on: they are recorded, for people.
RECORDED = ("adapter_name", "torch", "transformers")

#: Key of a finished manifest -> its type.
KEYS = {
    "asked": dict,
    "bos": dict,
    "candidates": int,
    "corpus_sha256": str,
    "d_in": int,
    "drop": dict,
    "dropped": dict,
    "dtype": str,
    "format": str,
    "format_version": int,
    "hook": str,
    "library_version": str,
    "medians": list,
    "n_models": int,
    "n_shards": int,
    "pair": dict,
    "rows": int,
    "shards": list,
}
SHARD_KEYS = {"dropped": dict, "file": str, "rows": int, "sequences": int, "sha256": str, "tokens": int}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, each key checked; CorruptFile where it is none of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}; wanted a folder written by capture(pair, corpus, path)."
        )
    manifest = read_json(path, JSON_LIMIT)
    if manifest.get("format") != "tl_crosscoder activations":
        raise CorruptFile(
            f"{path} is not the manifest of activations; its format is {manifest.get('format')!r}."
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CorruptFile(
            f"{path} has format version {manifest.get('format_version')!r}; this library reads {FORMAT_VERSION}."
        )
    _check(path, manifest, KEYS)
    for number, entry in enumerate(manifest["shards"]):
        _check(path, entry, SHARD_KEYS)
        if (
            not SHARD_FILE.fullmatch(entry["file"])
            or entry["file"] != shard_file(number)
            or entry["rows"] < 0
        ):
            raise CorruptFile(f"{path}: shard {number} is {entry['file']!r} with {entry['rows']} rows.")
    if manifest["dtype"] not in DTYPES or min(manifest["d_in"], manifest["n_models"]) < 1:
        found = {key: manifest[key] for key in ("dtype", "n_models", "d_in")}
        raise CorruptFile(f"{path} has {found}; wanted one of {', '.join(DTYPES)} and sizes above 0.")
    return manifest


def trained_on(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a crosscoder keeps of the activations it was trained on, JSON-able: the ``extra`` of :func:`tl_crosscoder.save`."""
    asked = {key: manifest["asked"].get(key) for key in ("tokenizer_sha256", "chat_template_sha256")}
    known = {key: manifest[key] for key in ("bos", "drop", "dropped", "dtype", "corpus_sha256")}
    return {"pair": manifest["pair"], "capture": {"tokens": manifest["rows"], **known, **asked}}


def shard_file(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def plain(description: Any) -> Any:
    """As it will be read back from JSON."""
    return json.loads(json.dumps(description))


def refuse_other_pair(manifest: dict[str, Any], pair: Pair) -> None:
    """Raise PairMismatch unless ``pair`` would give the manifest's activations, up to rounding."""
    ours = {"pair": plain(pair.description()), "tokenizer_sha256": tokenizer_sha256(pair.tokenizer)}
    stored = {"pair": manifest["pair"], "tokenizer_sha256": manifest["asked"]["tokenizer_sha256"]}
    if pair.tokenizer is None:
        del ours["tokenizer_sha256"], stored["tokenizer_sha256"]
    if found := difference(_without(stored, IMMATERIAL), _without(ours, IMMATERIAL)):
        key, theirs, given = found
        raise PairMismatch(
            f"these activations were captured with {key} = {theirs!r}; this pair has {given!r}."
        )


def refuse_other_description(manifest: dict[str, Any], description: dict[str, Any]) -> None:
    """Raise PairMismatch unless a pair's description has the manifest's hook and models."""
    stored, given = _identity(manifest["pair"]), _identity(description)
    for key, captured in stored.items():
        if given[key] != captured:
            raise PairMismatch(
                f"these activations were captured with {key} = {captured!r}; the crosscoder was trained on those of "
                f"{given[key]!r}.  Open the activations it was trained on, or train one on these."
            )


def refuse_other_capture(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise PairMismatch unless an interrupted capture can go on: everything asked for must be the same."""
    if found := difference(_without(stored, RECORDED), _without(asked, RECORDED)):
        key, theirs, given = found
        raise PairMismatch(
            f"{folder} was captured with {key} = {theirs!r}, this call has {given!r}; pass the same, or another folder."
        )


def difference(left: Any, right: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first leaf in which two descriptions differ, as (key, left, right)."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            found = difference(left.get(name), right.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if left == right else (key, left, right)


def _without(description: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(description, dict):
        return description
    return {key: _without(value, keys) for key, value in description.items() if key not in keys}


def _identity(description: dict[str, Any]) -> dict[str, Any]:
    models = {side: description.get(side) for side in ("base", "tuned")}
    found = {
        side: model.get("fingerprint") if isinstance(model, dict) else None for side, model in models.items()
    }
    return {
        "hook": description.get("hook"),
        **{f"{side}.fingerprint": value for side, value in found.items()},
    }


def _check(path: Path, entry: Any, keys: dict[str, type]) -> None:
    if not isinstance(entry, dict) or set(entry) != set(keys):
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise CorruptFile(f"{path} has {found!r:.300}; wanted exactly {sorted(keys)}.")
    for key, kind in keys.items():
        if type(entry[key]) is not kind:
            raise CorruptFile(f"{path}: {key} is {entry[key]!r:.80}; wanted a value of type {kind.__name__}.")
