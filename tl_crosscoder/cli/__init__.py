"""The command line, one file a verb or a few; torch is imported only when a verb runs.

A new verb: a file that decorates its function with ``@app.command``, and its line here.
"""

from tl_crosscoder.cli import activation_difference, convert, inspect, jobs, publish, scaling, steer, steps  # noqa: F401
from tl_crosscoder.cli.app import main

__all__ = ["main"]
