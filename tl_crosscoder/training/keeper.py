"""A training's checkpoints: taken as it goes on, gone on from, and one of the step that failed."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_crosscoder import __version__
from tl_crosscoder.dictionary.losses import LOSSES, Loss
from tl_crosscoder.errors import NotSaved
from tl_crosscoder.ranks import on_first
from tl_crosscoder.training.checkpoint import CRASHED, Checkpoint, clear_finished, newest, prune, taken, write
from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.state import TrainingState, random_state

#: Settings that decide neither a weight nor a row.
REPORTING = ("checkpoint_every", "keep_last", "log_path", "progress", "wandb_project")


class Keeper:
    """Saves a training as it goes on, into the folder ``checkpoints`` or else ``resume``; without either, nothing."""

    def __init__(
        self,
        state: TrainingState,
        losses: Sequence[Loss],
        config: TrainConfig,
        checkpoints: str | Path | None,
        resume: str | Path | None,
    ):
        self.state, self.losses, self.config = state, losses, config
        self.shard = state.crosscoder.shard
        self.resume = None if resume is None else Path(resume)
        self.directory = self.resume if checkpoints is None else Path(checkpoints)
        self.saved = 0  # the step of the newest checkpoint
        self._held = ExitStack()

    def __enter__(self) -> "Keeper":
        try:
            self.start()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def start(self) -> None:
        """Check, before any work, that there can be checkpoints, and take their folder; go on from the newest in ``resume``."""
        if self.directory is None:
            return
        if self.state.feed.one_shot:
            raise TypeError(
                f"a {type(self.state.feed.batches).__name__} can be read only once, so a training on it cannot be resumed; pass "
                "batches that start over (a list, store.shuffled(batch_size, seed)), or no folder for checkpoints"
            )
        training = self._training()
        if self.resume is None:
            on_first(self.shard.every, partial(self._prepare, self.directory))
            return
        checkpoint, damaged = newest(self.resume, self.shard)
        # a setting that came later stood, unsaid, at what is its default now
        there = {**checkpoint.training, "config": _deciding(TrainConfig()) | checkpoint.training["config"]}
        refuse_other(self.resume, there, training)
        on_first(self.shard.every, partial(self._prepare, self.directory))
        self.state.load(checkpoint)
        self.saved = checkpoint.step
        notes, now = self.state.history.notes, self._machine()
        notes += damaged
        if now != checkpoint.machine:
            notes.append(f"begun with {_said(checkpoint.machine)}; now {_said(now)}: rounding may differ")
        notes.append(f"going on after step {checkpoint.step} of {checkpoint.steps}")

    def read(self) -> Iterator[Tensor]:
        """The batches.  Where reading one fails, such as by a data worker that died, the steps before it are saved first.

        Not by several processes: those whose batch came are in the midst of the step.
        """
        feed = self.state.feed
        try:
            yield from feed
        except Exception as error:
            if self.directory is not None and self.shard.every.size == 1 and feed.step > self.saved:
                self.save()
                error.add_note(
                    f"saved after step {feed.step}; resume={str(self.directory)!r} goes on from there"
                )
            raise

    def save(self) -> None:
        """Keep the training as it now is."""
        if self.directory is None:
            return
        here = self._checkpoint()
        write(here, self.directory, self.shard)
        on_first(self.shard.every, partial(prune, self.directory, self.config.keep_last, here.step))
        self.saved = here.step

    def _prepare(self, directory: Path) -> None:
        self._held.enter_context(taken(directory))
        if self.resume is None or directory.resolve() != self.resume.resolve():
            clear_finished(directory)
            shutil.rmtree(directory / CRASHED, ignore_errors=True)

    def _checkpoint(self) -> Checkpoint:
        state, steps = self.state, self.config.steps
        history, late = state.history, 2 * state.feed.step >= steps
        loss = history.rows[-1]["loss"] if late and history.rows else None
        about = {"training": self._training(), "state": state.tree(), "machine": self._machine()}
        return Checkpoint(step=state.feed.step, steps=steps, rows=history.rows, loss=loss, **about)

    @contextmanager
    def watching(self, batch: Tensor) -> Iterator[None]:
        """A step whose loss or gradient is not finite is kept beside the checkpoints, and the error says where."""
        device, sparsity = self.state.crosscoder.W_dec.device, self.state.crosscoder.sparsity
        random, buffers = random_state(device), [(b, b.clone()) for b in sparsity.buffers()]
        try:
            yield
        except FloatingPointError as error:
            for buffer, before in buffers:  # the running threshold, which has seen the batch
                buffer.copy_(before)
            raise FloatingPointError(f"{error}  {self._crashed(batch, random)}") from error

    def _crashed(self, batch: Tensor, random: dict[str, Tensor]) -> str:
        """Where a checkpoint of the training before this step is now, whose next and only batch is this one."""
        if self.directory is None:
            return "With checkpoints=a folder the step would have been kept, to be taken again."
        folder, step = self.directory / CRASHED, self.state.feed.step - 1
        here = self._checkpoint()
        only = {"step": step, "random_state": random["cpu"], "epoch": 0, "batch": 0, "last_sha256": None}
        state = here.state | {"batch": batch, "random": random, "data": only, "cursor": here.state["data"]}
        try:
            write(replace(here, step=step, state=state, loss=None), folder, self.shard)
            on_first(self.shard.every, partial(prune, folder, 1, step))
        except (NotSaved, RuntimeError) as error:
            return f"The step could not be kept: {error}"
        return f"The step is kept: tl_crosscoder.training.crash.reproduce({str(folder)!r}) takes it again."

    def farewell(self) -> str:
        """What a signal did, and how to go on."""
        stopped_by = self.state.history.stopped_by
        where = f"stopped by {stopped_by.name if stopped_by else None} after step {self.state.feed.step} of {self.config.steps}"
        if self.directory is None:
            return f"{where}; it cannot be gone on with, for want of checkpoints=a folder"
        return f"{where}; resume={str(self.directory)!r} goes on from there"

    def _training(self) -> dict[str, Any]:
        """What is trained, by what, as JSON gives it back."""
        described = {
            "crosscoder": self.state.crosscoder.config,
            "dtype": str(self.state.crosscoder.W_dec.dtype),
            "losses": [LOSSES.describe(loss) for loss in self.losses],
            "config": _deciding(self.config),
        }
        return json.loads(json.dumps(described))

    def _machine(self) -> dict[str, Any]:
        return {
            "library": __version__,
            "torch": str(torch.__version__),
            "device": self.state.crosscoder.W_dec.device.type,
            "processes": self.shard.every.size,
            "threads": torch.get_num_threads(),
        }


def _deciding(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in REPORTING}


def refuse_other(directory: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError, with both values of each, where two trainings differ in a setting."""
    old, new = _leaves(there), _leaves(asked)
    differing = [
        f"{name} is {old.get(name, 'nothing')!r} there, {new.get(name, 'nothing')!r} asked for"
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]
    if differing:
        raise ValueError(f"{directory} holds checkpoints of another training: {'; '.join(differing)}")


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list) or not tree:
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        k: v
        for name, part in items
        for k, v in _leaves(part, f"{path}.{name}" if path else str(name)).items()
    }


def _said(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())
