"""The command line, one file a verb or a few; torch is imported only when a verb runs.

A new verb: a file that decorates its function with ``@app.command``, and its line here.
"""

from tl_crosscoder.cli import (  # noqa: F401
    activation_difference,
    attribute,
    audit,
    benchmark,
    compare,
    convert,
    equivalence,
    explain,
    inspect,
    jobs,
    mirror,
    publish,
    scaling,
    steer,
    steps,
    substitution,
    template,
)
from tl_crosscoder.cli.app import main

__all__ = ["main"]
