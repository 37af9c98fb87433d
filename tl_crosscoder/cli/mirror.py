"""Which concepts a crosscoder has cut into a latent for each model."""

from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Json, Quiet, Seed
from tl_crosscoder.cli.runs import Run, keep, open_report


@app.command("mirror")
@stoppable()
def mirror_command(
    run: Run,
    cosine: Annotated[
        float, typer.Option(help="Two latents are mirror images above this cosine.", min=0, max=1)
    ] = 0.9,
    draws: Annotated[int, typer.Option(help="Random sets of latents to compare with.", min=0)] = 20,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pairs of a tuned- and a base-leaning latent that write one direction, and on which tokens they fire."""
    from tl_crosscoder.studies.mirror_pairs import mirror_pairs

    report = open_report(run)
    result = mirror_pairs(
        report.crosscoder,
        report.held_out,
        report.table,
        cosine=cosine,
        n_draws=draws,
        seed=seed,
        parts=report.folder.studies / "parts",
        progress=not quiet,
    )
    keep(report, result, as_json)
