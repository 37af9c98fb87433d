"""Pictures and panels of plain tables: one style and one palette.  Knows neither models nor crosscoders nor pages."""

from tl_crosscoder.figures.drawing import Drawing, NotDrawn
from tl_crosscoder.figures.panel import Panel, standard_panels

__all__ = ["Drawing", "NotDrawn", "Panel", "standard_panels"]
