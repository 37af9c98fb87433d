"""Steering: does writing latents into a model bring the behaviour?"""

from typing import Annotated, Any

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.inputs import numbers, plain_text, read_lines
from tl_crosscoder.cli.judges import JudgeName, open_judge
from tl_crosscoder.cli.options import (
    Adapter,
    Behaviours,
    Device,
    Dtype,
    Json,
    NewTokens,
    Prompts,
    Quiet,
    Seed,
)
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_run


@app.command("steer")
@stoppable()
def steer_command(
    run: Run,
    base: RunBase = None,
    tuned: RunTuned = None,
    *,
    adapter: Adapter = None,
    behaviours: Behaviours = None,
    latents: Annotated[
        str | None, typer.Option(help="Such as 877,453; the run's three highest without it.")
    ] = None,
    strengths: Annotated[
        str | None, typer.Option(help="Such as --strengths=-2,-1,1,2; 1 is a latent's largest activation.")
    ] = None,
    difference: Annotated[
        bool,
        typer.Option(
            "--difference", help="Steer with what the tuned model's decoder has and base's has not."
        ),
    ] = False,
    prompts: Prompts = None,
    judge: JudgeName = None,
    controls: Annotated[
        int, typer.Option(help="Random latents and random directions drawn for each target.")
    ] = 3,
    text: Annotated[
        int, typer.Option(help="Held-out sequences of ordinary text to measure perplexity on; 0: none.")
    ] = 16,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_new_tokens: NewTokens = 16,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add latents to both models while they answer: behaviour rate and perplexity over strength, beside controls."""
    chosen, asked = numbers(latents), read_lines(prompts)
    powers = numbers(strengths, float)
    opened = open_run(run, base, tuned, adapter, behaviours, device=device, dtype=dtype)
    from tl_crosscoder.models.drop import Drop
    from tl_crosscoder.studies.steering import steering

    report = opened.report
    options: dict[str, Any] = {"strengths": powers, "open_prompts": asked}
    result = steering(
        report.crosscoder.to(device), opened.pair, opened.behaviours, report.table,
        latents=chosen, ranking=report.config.ranking, part="difference" if difference else "whole",
        ordinary=plain_text(report.held_out, text), judge=open_judge(judge), n_controls=controls,
        drop=Drop(**report.store.manifest["drop"]), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        parts=opened.parts, progress=not quiet, **{k: v for k, v in options.items() if v is not None},
    )  # fmt: skip
    keep(report, result, as_json)
