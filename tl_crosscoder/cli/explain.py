"""Explain: descriptions of latents, and how well they tell where the latents fire."""

from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.judges import JudgeName, numbers, open_judge
from tl_crosscoder.cli.options import Adapter, Device, Dtype, Json, Seed
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_report, open_run


@app.command("explain")
@stoppable()
def explain_command(
    run: Run,
    base: RunBase = None,
    tuned: RunTuned = None,
    *,
    adapter: Adapter = None,
    latents: Annotated[
        str | None, typer.Option(help="Such as 877,453; the run's highest without it.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many of the run's highest, without --latents.")] = 20,
    judge: JudgeName = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Logit effects as well; needs the models.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Describe latents in words, and score the words on held-out text, beside matched random latents."""
    chosen = numbers(latents)
    report = open_report(run)
    from tl_crosscoder.studies.controls import matched_random
    from tl_crosscoder.studies.explain import explain

    mine = chosen or report.top(top)
    [others] = matched_random(report.table, mine, n_draws=1, seed=seed)
    effects = None
    if logits:
        from tl_crosscoder.analysis.logit_effects import logit_effects

        pair = open_run(run, base, tuned, adapter, device=device, dtype=dtype).pair
        effects = logit_effects(report.crosscoder, pair, mine)
    asked = open_judge(judge)
    groups = {"chosen" if chosen else f"top {len(mine)}": mine, "matched random": others}
    result = explain(
        report.crosscoder, report.held_out, groups, explainer=asked, judge=asked, effects=effects, seed=seed,
        parts=report.folder.studies / "parts",
    )  # fmt: skip
    keep(report, result, as_json)
