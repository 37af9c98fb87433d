"""What a verb prints: figures on standard output, everything else on standard error."""

import json
from typing import TYPE_CHECKING, Any

from tl_crosscoder.cli.app import console

if TYPE_CHECKING:
    from tl_crosscoder.diffing.report import DiffReport


def say(quiet: bool):
    return (
        (lambda _: None)
        if quiet
        else (lambda text: console.print(f"• {text}", markup=False, highlight=False))
    )


def show_report(report: "DiffReport", as_json: bool) -> None:
    if as_json:
        print_figures(report.metrics, True)
        return
    headline, *rest = report.verdict
    print(f"\n{headline}\n")
    for sentence in rest:
        print(f"  {sentence}")
    print(f"\n  report: {report.folder.report / 'index.html'}")


def digits(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def print_figures(value: Any, as_json: bool) -> None:
    if as_json:
        from tl_crosscoder.diffing.folder import strict

        print(json.dumps(strict(value)))
    else:
        print(
            value if isinstance(value, str) else "\n".join(f"{name}: {part}" for name, part in value.items())
        )
