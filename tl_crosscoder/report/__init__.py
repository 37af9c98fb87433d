"""The offline report: plain data in, one folder of HTML out.  Knows neither models nor crosscoders."""

from tl_crosscoder.report.example import Example
from tl_crosscoder.report.html import write_report

__all__ = ["Example", "write_report"]
