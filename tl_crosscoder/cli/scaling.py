"""Are a run's tuned-only latents really absent from the base model?"""

from typing import Annotated, Literal

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Json, Quiet
from tl_crosscoder.cli.runs import Run, keep, open_report


@app.command("scaling")
@stoppable()
def scaling_command(
    run: Run,
    probe: Annotated[
        Literal["tuned", "base", "either"],
        typer.Option(help="Whose latents are asked about: along that model's decoder, or the longer one."),
    ] = "tuned",
    least: Annotated[int, typer.Option(help="Firings below which a latent's ratios are not used.")] = 100,
    seen: Annotated[
        bool,
        typer.Option("--seen", help="Use the text of the training, as the paper does, not the held-out."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the shared latents and the control directions.")] = 42,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Latent Scaling of a run: which latents are truly one model's, beside shared latents and control directions."""
    from tl_crosscoder.studies.scaling import latent_scaling_study

    report = open_report(run)
    config = report.config
    read = report.store.split(1 - config.held_out, config.seed)[0] if seen else report.held_out
    result = latent_scaling_study(
        report.crosscoder, read, probe=probe, least=least, seed=seed, progress=not quiet
    )
    name = "scaling" if probe == "tuned" else f"scaling-{probe}"
    keep(report, result, as_json, f"{name}-seen" if seen else name)
