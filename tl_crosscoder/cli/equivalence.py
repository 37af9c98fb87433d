"""Whether a latent does the same in both models."""

from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.inputs import numbers
from tl_crosscoder.cli.options import Adapter, Device, Dtype, Json, Quiet, Seed
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_run


@app.command("equivalence")
@stoppable()
def equivalence_command(
    run: Run,
    base: RunBase = None,
    tuned: RunTuned = None,
    *,
    adapter: Adapter = None,
    latents: Annotated[
        str | None, typer.Option(help="Which latents: 3,14,159.  Else a random choice.")
    ] = None,
    shared: Annotated[int, typer.Option(help="How many random shared latents.")] = 80,
    other: Annotated[int, typer.Option(help="How many random latents of each other class.")] = 30,
    probes: Annotated[int, typer.Option(help="Tokens a latent is taken out at.")] = 32,
    published: Annotated[
        bool, typer.Option("--published", help="Probe the last tokens of texts, as the published card did.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take single latents out of both models at the same tokens: are the effects alike?

    Writes causal_validation.csv and cosine_vs_causal.png into the run's studies/equivalence/.
    """
    chosen = numbers(latents)
    from tl_crosscoder.studies.causal_equivalence import causal_equivalence

    opened = open_run(run, base, tuned, adapter, device=device, dtype=dtype)
    report, name = opened.report, "equivalence-published" if published else "equivalence"
    result = causal_equivalence(
        report.crosscoder.to(device), opened.pair, report.held_out, report.table, latents=chosen,
        n_shared=shared, n_other=other, n_probes=probes, variant="published" if published else "active",
        seed=seed, parts=opened.parts, progress=not quiet,
    )  # fmt: skip
    keep(report, result, as_json, name)
    if len(result.table.query("ce == ce")):
        result.write(report.folder.studies / name)
