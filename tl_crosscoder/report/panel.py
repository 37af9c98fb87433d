"""One part of a report: a sentence or two, a figure, a table."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from tl_crosscoder.report.plots import NotDrawn


@dataclass(frozen=True)
class Panel:
    """One section of the report's index page, in plain data.

    ``key`` names its anchor and its files (lower-case letters, digits and hyphens).  ``text`` is one or two sentences that say what
    is seen.  ``figure`` is SVG text.  ``notes`` are caveats, printed small below.
    """

    key: str
    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    figure: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", self.key):
            raise ValueError(
                f"a panel's key names its files: lower-case letters, digits and hyphens, got {self.key!r}"
            )

    def drawn(self, draw: Callable[[], str]) -> "Panel":
        """This panel with the figure that ``draw()`` returns or, where its data are absent, with a note that says what is."""
        try:
            return replace(self, figure=draw())
        except NotDrawn as reason:
            return replace(self, notes=(*self.notes, f"Not drawn: {reason}."))
