"""The offline report: plain data in, one folder of HTML out.  Knows neither models nor crosscoders."""

from tl_crosscoder.report.drawing import Drawing, NotDrawn
from tl_crosscoder.report.example import Example
from tl_crosscoder.report.html import write_report
from tl_crosscoder.report.panel import Panel, standard_panels

__all__ = ["Drawing", "Example", "NotDrawn", "Panel", "standard_panels", "write_report"]
