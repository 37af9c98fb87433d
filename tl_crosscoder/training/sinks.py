"""Where the rows of a training run go: a file, the terminal, a tracker."""

import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tl_crosscoder.training.config import TrainConfig
from tl_crosscoder.training.history import History


@runtime_checkable
class Sink(Protocol):
    def row(self, row: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


@contextmanager
def sinks(config: TrainConfig, history: History) -> Iterator[list[Sink]]:
    """Open what the config asks for, with the history so far; all are closed at the end, whatever happened."""
    with ExitStack() as stack:
        opened: list[Sink] = []
        for sink in _wanted(config, history):
            stack.callback(sink.close)
            opened.append(sink)
        for text, sink in product(history.notes, opened):
            sink.note(text)
        yield opened


def _wanted(config: TrainConfig, history: History) -> Iterator[Sink]:
    if config.log_path is not None:
        yield JsonLines(Path(config.log_path), history)
    if config.wandb_project is not None:
        yield Wandb(config, history)
    if config.progress:
        console = Console(stderr=True)
        yield Bar(console, config.steps, history) if console.is_terminal else Lines(console, config.steps)


def describe(row: dict[str, Any]) -> str:
    fve = " ".join(
        f"{name} {value:.3f}" for name, value in row.items() if name.startswith("fve_") and value is not None
    )
    return f"loss {row['loss']:.4g}  {fve}  l0 {row['l0']:.1f}  {row['tokens_per_second']:,.0f} tokens/s"


class JsonLines:
    """The file holds the rows of the history, whatever it held before: a resumed training drops the rows beyond its checkpoint."""

    def __init__(self, path: Path, history: History):
        path.parent.mkdir(parents=True, exist_ok=True)
        history.save(path)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def row(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class Lines:
    def __init__(self, console: Console, steps: int):
        self.console, self.steps = console, steps

    def row(self, row: dict[str, Any]) -> None:
        self.console.print(
            f"step {row['step']}/{self.steps}  {describe(row)}", highlight=False, soft_wrap=True
        )

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        pass


class Bar:
    def __init__(self, console: Console, steps: int, history: History):
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task(
            "training", total=steps, completed=history.rows[-1]["step"] if history.rows else 0
        )
        self.progress.start()

    def row(self, row: dict[str, Any]) -> None:
        self.progress.update(self.task, completed=row["step"], description=describe(row))

    def note(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.progress.stop()


class Wandb:
    """Weights & Biases.  Its own errors end the tracking, never the training; they are kept in ``history.notes``."""

    def __init__(self, config: TrainConfig, history: History):
        self.wandb, self.history, self.alive = _wandb(config), history, True
        self._try(lambda: self.wandb.init(project=config.wandb_project, config=vars(config)))

    def row(self, row: dict[str, Any]) -> None:
        self._try(lambda: self.wandb.log(row, step=row["step"]))

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._try(self.wandb.finish)

    def _try(self, call: Any) -> None:
        if not self.alive:
            return
        try:
            call()
        except self.wandb.Error as error:
            self.alive = False
            self.history.notes.append(f"wandb stopped: {error}")


def _wandb(config: TrainConfig) -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"wandb_project={config.wandb_project!r} needs Weights & Biases ({error}): pip install wandb"
        ) from error
