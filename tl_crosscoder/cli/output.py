"""What a verb prints: figures on standard output, everything else on standard error."""

import json
from typing import TYPE_CHECKING, Any

from tl_crosscoder.cli.app import console

if TYPE_CHECKING:
    from tl_crosscoder.diffing.report import DiffReport


def say(quiet: bool):
    """What prints a step of a long job on standard error, or nothing."""
    return (
        (lambda _: None)
        if quiet
        else (lambda text: console.print(f"• {text}", markup=False, highlight=False))
    )


def show_report(report: "DiffReport", as_json: bool) -> None:
    """Print the verdict and where the report lies, or all figures as JSON."""
    if as_json:
        print_figures(report.metrics, True)
        return
    headline, *rest = report.verdict
    print(f"\n{headline}\n")
    for sentence in rest:
        print(f"  {sentence}")
    print(f"\n  report: {report.folder.report / 'index.html'}")


def digits(value: object) -> object:
    """A number with three figures; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else value


def print_figures(value: Any, as_json: bool) -> None:
    """Print a text, or a line for each figure, or all as strict JSON."""
    if as_json:
        from tl_crosscoder.diffing.folder import strict

        print(json.dumps(strict(value)))
    else:
        print(
            value if isinstance(value, str) else "\n".join(f"{name}: {part}" for name, part in value.items())
        )
