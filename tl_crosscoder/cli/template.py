"""Do a run's tuned-only latents live on the chat template's tokens?"""

from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Json, Quiet
from tl_crosscoder.cli.runs import Run, keep, open_report


@app.command("template")
@stoppable()
def template_command(
    run: Run,
    least: Annotated[int, typer.Option(help="Firings in chats below which a latent is not counted.")] = 20,
    n_top: Annotated[int, typer.Option(help="Highest-ranked latents, where none is tuned-only.")] = 30,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Where in the held-out chats the latents fire: on the template's tokens, slot by slot, or on what was said."""
    from tl_crosscoder.studies.template_tokens import template_tokens

    report = open_report(run)
    result = template_tokens(
        report.crosscoder,
        report.held_out,
        report.table,
        ranking=report.config.ranking,
        n_top=n_top,
        least=least,
        progress=not quiet,
    )
    keep(report, result, as_json)
