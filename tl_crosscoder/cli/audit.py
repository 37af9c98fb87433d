"""Whether latents that pass a gate are what they are taken for."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Adapter, Behaviours, Device, Dtype, Json, NewTokens, Quiet
from tl_crosscoder.cli.output import say
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_report, open_run

Part = Literal["whole", "difference"]
Noise = Literal["scale", "covariance"]


@app.command("audit")
@stoppable()
def audit_command(
    run: Run,
    base: RunBase = None,
    tuned: RunTuned = None,
    *,
    adapter: Adapter = None,
    behaviours: Behaviours = None,
    task: Annotated[
        Path | None, typer.Option(help='A task: JSON lines of {"prompt", "answer"}; in place of behaviours.')
    ] = None,
    off_task: Annotated[
        Path | None, typer.Option(help="Prompts that the task has nothing to do with, one a line.")
    ] = None,
    gate: Annotated[str, typer.Option(help="specificity, delta_norm, absence or peak.")] = "specificity",
    threshold: Annotated[float, typer.Option(help="Of the gate; the gate's own if left out.")] = math.nan,
    least: Annotated[int, typer.Option(help="Tokens that a latent must fire on.")] = 100,
    seeds: Annotated[int, typer.Option(help="Crosscoders an arm.")] = 3,
    part: Annotated[Part, typer.Option(help="What is taken out: whole, or difference.")] = "whole",
    noise: Annotated[Noise, typer.Option(help="Of the noise arm: scale, or covariance.")] = "scale",
    lexical: Annotated[
        bool, typer.Option("--lexical", help="Let latents about single words count as found again too.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps, if not the run's.")] = None,
    max_new_tokens: NewTokens = 16,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the run's crosscoder on control pairs and other seeds, take the gated latents out, and give one verdict.

    GATE_BROKEN, DISTRIBUTION_DRIFT, STABLE_NOT_CAUSAL, UNDERPOWERED or PASS.  Crosscoders are kept in studies/parts/audit.  The
    models are needed for a task; without one the verdict is about the gate alone, and never PASS.
    """
    from dataclasses import replace

    from tl_crosscoder.cli.inputs import read_lines
    from tl_crosscoder.diffing.kept import kept_learning
    from tl_crosscoder.studies.gate_audit import BehaviourTask, ExactMatch, Gate, Unchanged, gate_audit

    chosen = Gate(gate, threshold, least)
    asked = ExactMatch.from_file(task) if task else None
    report, other = open_report(run), read_lines(off_task)
    made_by, pair, known = report.metrics.get("demo"), None, []
    if off_task and not (made_by or asked or behaviours):
        raise ValueError("--off-task wants what it is held against: --task, or --behaviours.")
    if base or adapter or made_by or asked or behaviours:
        opened = open_run(run, base, tuned, adapter, behaviours, device=device, dtype=dtype)
        pair, known = opened.pair, opened.behaviours
    if asked is None and known:
        asked = BehaviourTask(tuple(known))
    if other is None and made_by:
        from tl_crosscoder.demo import demo_recipe

        other = list(demo_recipe(made_by).planted.ordinary_heldout)
    parts = report.folder.studies / "parts"
    config = report.config if steps is None else replace(report.config, steps=steps)
    result = gate_audit(
        report.store, kept_learning(parts / "audit", config, device=device, progress=not quiet),
        gate=chosen, seeds=range(seeds), pair=pair, task=asked,
        off_task=Unchanged("other prompts", tuple(other)) if other else None,
        part=part, noise=noise,
        with_lexical=lexical, held_out=config.held_out, max_new_tokens=max_new_tokens, parts=parts,
        progress=not quiet, say=say(quiet),
    )  # fmt: skip
    keep(report, result, as_json, "audit" if gate == "specificity" else f"audit-{gate}")
