"""The run folder, the only thing the steps of a job share: each step reads and writes it.

::

    acts/            the captured activations        (capture)
    crosscoder/      weights and config              (train)
    checkpoints/     what a training goes on from    (train)
    train.jsonl      the training log                (train)
    latents.parquet  one row a latent                (table)
    metrics.json     every other figure, the verdict (diff)
    studies/         what was asked afterwards      (a study's verb)
    report/          index.html                      (report)
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from tl_crosscoder.files import write_atomically


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    @cached_property
    def acts(self) -> Path:
        return self.root / "acts"

    @cached_property
    def crosscoder(self) -> Path:
        return self.root / "crosscoder"

    @cached_property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @cached_property
    def log(self) -> Path:
        return self.root / "train.jsonl"

    @cached_property
    def table(self) -> Path:
        return self.root / "latents.parquet"

    @cached_property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @cached_property
    def studies(self) -> Path:
        return self.root / "studies"

    @cached_property
    def report(self) -> Path:
        return self.root / "report"


def write_json(path: Path, value: Any) -> None:
    """Strict JSON (NaN and Inf become null), written whole or not at all."""
    text = json.dumps(strict(value), indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Parquet, written whole or not at all; ``table.attrs`` travel with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, table.to_parquet)


def strict(value: Any) -> Any:
    """The value with NaN and Inf as None, tensors' and numpy's numbers as Python's: valid JSON everywhere."""
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
