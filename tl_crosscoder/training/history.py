"""What happened during training."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import pandas as pd


@dataclass
class History:
    """One row for every ``log_every`` steps; means and FVE are over the steps since the row before.

    ``stopped_by``: the signal that ended training early, Ctrl-C's SIGINT or SIGTERM.  ``notes``: what to know beside the figures
    (a tracker that failed, a damaged checkpoint that was passed over, how often the data were read).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    stopped_by: Signals | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        """A signal ended training early."""
        return self.stopped_by is not None

    def frame(self) -> pd.DataFrame:
        """The rows as a table, indexed by step."""
        return pd.DataFrame(self.rows).set_index("step") if self.rows else pd.DataFrame()

    def save(self, path: str | Path) -> None:
        """Write one JSON object a line."""
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
