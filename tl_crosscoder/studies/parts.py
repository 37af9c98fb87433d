"""The finished parts of a long study, so that it goes on after a kill where it was."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tl_crosscoder.files import write_atomically


class Parts:
    """``parts(name, compute)`` is what ``compute()`` returned, now or in an earlier run with the same ``about``.

    Each part is a JSON file in a folder under ``directory`` that is named after ``about``: everything that the parts depend on
    (settings, a fingerprint of the models, of the weights).  Without a directory nothing is kept.  Values come back as JSON
    gives them back, computed now or not, so that a resumed study equals an uninterrupted one.
    """

    def __init__(self, directory: str | Path | None, **about: Any):
        text = json.dumps(about, sort_keys=True)
        self.folder = (
            None if directory is None else Path(directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
        )
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "about.json", text)

    def __call__(
        self, name: str, compute: Callable[[], Any], keep: Callable[[Any], bool] = lambda _: True
    ) -> Any:
        """``name`` tells the part from the others; letters, digits and hyphens.  What ``keep`` denies is made anew next time."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is not None and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(compute())
        value = json.loads(text)
        if path is not None and keep(value):
            _write(path, text)
        return value


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
