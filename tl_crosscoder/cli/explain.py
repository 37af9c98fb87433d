"""Explain: descriptions of latents, and how well they tell where the latents fire."""

from typing import TYPE_CHECKING, Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.inputs import numbers
from tl_crosscoder.cli.judges import JudgeName, open_judge
from tl_crosscoder.cli.options import Adapter, Device, Dtype, Json, Seed
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_report, open_run

if TYPE_CHECKING:
    import pandas as pd

    from tl_crosscoder.diffing.report import DiffReport
    from tl_crosscoder.models.pair import ModelPair

SEQUENCES = 16  # of held-out text, on which --causal is measured


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
        bool,
        typer.Option("--logits", help="What the latents' directions promote, straight to the logits."),
    ] = False,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal", help="What they promote in a run on held-out text, each at its largest activation."
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Describe latents in words, and score the words on held-out text, beside matched random latents.

    --logits and --causal need the models of the run.
    """
    chosen = numbers(latents)
    report = open_report(run)
    from tl_crosscoder.studies.controls import matched_random
    from tl_crosscoder.studies.explain import explain

    mine = report.top(top) if chosen is None else chosen
    [others] = matched_random(report.table, mine, n_draws=1, seed=seed)
    effects = None
    if logits or causal:
        pair = open_run(run, base, tuned, adapter, device=device, dtype=dtype).pair
        effects = _effects(report, pair, mine, logits, causal)
    asked = open_judge(judge)
    groups = {"chosen" if chosen else f"top {len(mine)}": mine, "matched random": others}
    result = explain(
        report.crosscoder, report.held_out, groups, explainer=asked, judge=asked, effects=effects, seed=seed,
        parts=report.folder.studies / "parts",
    )  # fmt: skip
    keep(report, result, as_json)


def _effects(
    report: "DiffReport", pair: "ModelPair", latents: list[int], logits: bool, causal: bool
) -> "pd.DataFrame":
    import pandas as pd

    from tl_crosscoder.analysis.logit_effects import causal_logit_effects, logit_effects
    from tl_crosscoder.cli.inputs import plain_text

    found = [logit_effects(report.crosscoder, pair, latents)] if logits else []
    text = plain_text(report.held_out, SEQUENCES) if causal else None
    if text is not None:
        batch = text.batch(range(len(text)))
        largest = {j: float(report.table.loc[j, "max_act"]) for j in latents}  # pyright: ignore[reportArgumentType]
        found.append(causal_logit_effects(report.crosscoder, pair, batch, largest))
    elif causal:
        raise ValueError("--causal wants held-out text of a document or more; this run has answers only.")
    return pd.concat(found, ignore_index=True)
