"""A folder of checkpoints: each a training after some step, whole or absent, from which it goes on bit for bit.

::

    checkpoints/
        step-00000500/
            state.safetensors   every tensor that later steps depend on
            checkpoint.json     the other values, the rows of the log, what is trained and how, and the hashes of both

Where several processes divide the latents, each writes the rows of its own: ``state-00000-of-00002.safetensors``, in which the
first has all else too, and so on.  Any number of processes goes on from it.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.shard import WHOLE, Shard
from tl_crosscoder.errors import CorruptFile, NotSaved
from tl_crosscoder.files import read_json, replaced_folder, sha256, sync
from tl_crosscoder.lock import alone_in
from tl_crosscoder.ranks import all_do, on_first
from tl_crosscoder.training.state_files import STATE, divided, file_name, joined, read_tensors, split

#: 2: the state may be in several files.  Version 1 is read.
FORMAT_VERSION = 2
ABOUT = "checkpoint.json"
#: The folder, beside the checkpoints, of a step whose loss was not finite.
CRASHED = "crashed"
#: Bytes of checkpoint.json; the rows of a million steps, one in 50, need a hundredth.
JSON_LIMIT = 1 << 30


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A training after ``step`` of ``steps``.

    ``training``: what is trained, by which losses and settings.  ``state``: all that later steps depend on, a tree of tensors and
    JSON values.  ``loss``: what the best checkpoint has lowest; None before the second half, where schedules still move and
    BatchTopK has no threshold.  ``machine``: what rounding depends on besides.
    """

    step: int
    steps: int
    training: dict[str, Any]
    state: dict[str, Any]
    rows: list[dict[str, Any]]
    loss: float | None
    machine: dict[str, Any]

    def crosscoder(self) -> Crosscoder:
        """The crosscoder as it then was, on the CPU and in ``eval()``."""
        with torch.device("meta"):
            crosscoder = Crosscoder.from_config(self.training["crosscoder"])
        crosscoder.load_state_dict(self.state["crosscoder"], assign=True)
        return crosscoder.eval()


@contextmanager
def taken(directory: Path) -> Iterator[None]:
    """The folder is there and this process's alone within the block, without what a killed save left in it.

    Raises ValueError where nothing can be written, InUse where another process saves.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sync(directory.parent)
        tempfile.TemporaryDirectory(prefix=".test-", dir=directory).cleanup()
    except OSError as error:
        raise ValueError(
            f"no checkpoint can be written to {str(directory)!r} ({error}); choose another"
        ) from error
    with alone_in(directory):
        for left in (".step-*", ".test-*", f"{CRASHED}/.step-*"):
            for leftover in list(directory.glob(left)):
                shutil.rmtree(leftover)
        yield


def clear_finished(directory: Path) -> None:
    """Remove the checkpoints of a finished training; FileExistsError for those of one that stopped on its way."""
    folders = _folders(directory)
    if folders and not _finished(folders[-1]):
        raise FileExistsError(
            f"{directory} holds a training that stopped at {folders[-1].name}; go on with it (resume={str(directory)!r}, "
            "--resume on the command line), or delete it to start anew"
        )
    for folder in folders:
        _remove(folder)


def write(checkpoint: Checkpoint, directory: Path, shard: Shard = WHOLE) -> Path:
    """The checkpoint's folder, on the disk; NotSaved where it cannot be, and then nothing has changed.

    With a shard: every rank comes with the state that it holds, and writes its own latents; the folder takes its name when the
    files of all are on the disk.
    """
    folder = directory / f"step-{checkpoint.step:08d}"
    waiting = folder.with_name(f".{folder.name}-parts")
    index, n = shard.latents.index, shard.latents.size
    tensors: dict[str, Tensor] = {}
    tree = split(checkpoint.state, "", tensors)

    def prepare() -> None:
        shutil.rmtree(waiting, ignore_errors=True)
        waiting.mkdir(parents=True)

    def save() -> None:
        if shard.tokens.index == 0:  # the others of its column hold the same
            mine = {name: tensor for name, tensor in tensors.items() if index == 0 or divided(name, tensor)}
            file = waiting / file_name(index, n)
            save_file(mine, file)
            sync(file)
            about = {"sha256": sha256(file), "tensors": sorted(mine)}
            file.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")

    def commit() -> None:
        about = {**vars(checkpoint), "state": tree, "format_version": FORMAT_VERSION, "files": {}}
        with replaced_folder(folder) as new:
            for file in (waiting / file_name(part, n) for part in range(n)):
                about["files"][file.name] = read_json(file.with_suffix(".json"))
                file.rename(new / file.name)
            about["digest"] = _digest(about)
            lines = ",\n".join(f" {json.dumps(name)}: {_json(value)}" for name, value in about.items())
            (new / ABOUT).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")

    try:
        on_first(shard.every, prepare)
        all_do(shard.every, save)
        on_first(shard.every, commit)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(directory if directory.exists() else directory.parent).free
        raise NotSaved(
            f"{folder} could not be written ({error}): it needs {needed:,} bytes and more, {free:,} are free; the checkpoints "
            f"before it are whole, resume={str(directory)!r} goes on from the newest"
        ) from error
    finally:
        if shard.is_first:
            shutil.rmtree(waiting, ignore_errors=True)
    return folder


def read(folder: Path, shard: Shard = WHOLE) -> Checkpoint:
    """The checkpoint in a folder, or a shard of it; CorruptFile unless every bit of what is read is as it was written."""
    about = _about(folder)
    state = joined(about["state"], read_tensors(folder, about["files"], shard))
    return Checkpoint(**{name: about[name] for name in Checkpoint.__annotations__} | {"state": state})


def newest(directory: Path, shard: Shard = WHOLE) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and a sentence about each damaged one that was passed over.

    With a shard: the newest that is whole for every rank.  Raises FileNotFoundError where there is none, CorruptFile where none is
    whole.
    """
    damaged: list[str] = []
    for folder in reversed(_folders(directory)):
        found, reason = None, "another process cannot read it"
        try:
            found = read(folder, shard)
        except (CorruptFile, FileNotFoundError) as error:
            reason = str(error)
        if not shard.total(int(found is None)) and found is not None:
            return found, damaged
        damaged.append(f"{folder.name} is damaged and was passed over: {reason}")
    if damaged:
        raise CorruptFile(f"no checkpoint in {directory} is whole: {'; '.join(damaged)}")
    raise FileNotFoundError(
        f"no checkpoint in {str(directory)!r} to go on from; start with checkpoints={str(directory)!r}, without resume"
    )


def best(directory: str | Path) -> Checkpoint:
    """The checkpoint of the second half of training with the lowest loss in its last row of the log; else the newest.

    The loss is what training minimises: a penalty that still rises then counts against later checkpoints.
    """
    folder = _best(_folders(Path(directory)))
    return read(folder) if folder else newest(Path(directory))[0]


def prune(directory: Path, keep_last: int, last: int) -> None:
    """Remove all but the ``keep_last`` newest checkpoints up to step ``last``, just written, and the best of them.

    One of a later step was damaged, or training would have gone on from it.
    """
    folders = [folder for folder in _folders(directory) if _step(folder) <= last]
    kept = {*folders[-keep_last:], _best(folders)}
    for folder in _folders(directory):
        if folder not in kept:
            _remove(folder)


def unfinished(directory: Path) -> bool:
    """A training that has steps left has checkpoints there."""
    folders = _folders(directory)
    return bool(folders) and not _finished(folders[-1])


def _best(folders: Sequence[Path]) -> Path | None:
    losses = {}
    for folder in folders:
        try:
            losses[folder] = _about(folder)["loss"]
        except (CorruptFile, FileNotFoundError):
            continue
    losses = {folder: loss for folder, loss in losses.items() if loss is not None}
    return min(losses, key=lambda folder: losses[folder]) if losses else None


def _folders(directory: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _finished(folder: Path) -> bool:
    try:
        about = _about(folder)
    except (CorruptFile, FileNotFoundError):
        return False
    return about["step"] == about["steps"]


def _remove(folder: Path) -> None:
    """It is gone at once, then its bytes."""
    hidden = folder.with_name(f".{folder.name}-removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _about(folder: Path) -> dict[str, Any]:
    """The checked ``checkpoint.json``; ValueError for one that a newer library wrote."""
    path = folder / ABOUT
    about = read_json(path, JSON_LIMIT)
    if about.get("digest") != _digest(about):
        raise CorruptFile(f"{path} was altered: it is not what was written")
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {about['format_version']} is newer than {FORMAT_VERSION}, the newest this library reads; "
            "upgrade tl-crosscoder"
        )
    if about["format_version"] == 1:
        about["files"] = {STATE: {"sha256": about["sha256"], "tensors": about["tensors"]}}
    return about


def _digest(about: dict[str, Any]) -> str:
    """The hash of all values but itself, however they are laid out."""
    values = {name: value for name, value in about.items() if name != "digest"}
    return hashlib.sha256(_json(values, sort_keys=True).encode()).hexdigest()


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, allow_nan=False, **options)
