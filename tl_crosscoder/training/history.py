"""What happened during training."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass
class History:
    """One row for every ``log_every`` steps; means and FVE are over the steps since the row before.

    ``interrupted``: Ctrl-C ended training early.  ``notes``: what went wrong beside training (a tracker that failed).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """The rows as a table, indexed by step."""
        return pd.DataFrame(self.rows).set_index("step") if self.rows else pd.DataFrame()

    def save(self, path: str | Path) -> None:
        """Write one JSON object a line."""
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
