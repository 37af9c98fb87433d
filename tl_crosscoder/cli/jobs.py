"""The whole job: on a pair whose difference is known, on your own models; and its report again."""

from pathlib import Path
from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.inputs import diff_config, load_pair, read_behaviours, read_corpus, read_lines
from tl_crosscoder.cli.options import (
    Adapter,
    Base,
    BatchSize,
    Behaviours,
    Context,
    Device,
    DSae,
    Dtype,
    Hook,
    InitSame,
    Json,
    K,
    Limit,
    Lr,
    NewTokens,
    Prompts,
    Quiet,
    RecipeName,
    Seed,
    Steps,
    Text,
    Tuned,
)
from tl_crosscoder.cli.output import say, show_report


@app.command("demo")
@stoppable()
def demo_command(
    pair: Annotated[str, typer.Option(help="tiny, smollm2-false-fact or smollm2-taboo.")] = "tiny",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/demo, or runs/demo-PAIR.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job on a pair whose difference is known, offline."""
    from tl_crosscoder.demo import demo

    show_report(
        demo(pair, out, seed=seed, device=device, dtype=dtype, progress=not quiet, say=say(quiet)), as_json
    )


@app.command("diff")
@stoppable()
def diff_command(
    base: Base,
    tuned: Tuned = None,
    *,
    hook: Hook,
    text: Text,
    adapter: Adapter = None,
    prompts: Prompts = None,
    behaviours: Behaviours = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/diff"),
    d_sae: DSae = 4096,
    k: K = None,
    steps: Steps = 2000,
    batch_size: BatchSize = 1024,
    lr: Lr = None,
    recipe: RecipeName = None,
    init_same: InitSame = None,
    context: Context = 128,
    limit: Limit = None,
    max_new_tokens: NewTokens = 16,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job on your models: capture, train, table, studies, report."""
    config = diff_config(
        recipe=recipe, d_sae=d_sae, k=k, steps=steps, batch_size=batch_size, lr=lr, init_same=init_same, seed=seed
    )  # fmt: skip
    known, questions = read_behaviours(behaviours), read_lines(prompts)
    from tl_crosscoder.diffing.run import diff

    pair = load_pair(base, tuned, adapter, hook, device, dtype)
    title = f"{Path(base).name} → {Path(tuned or adapter or '').name}"
    report = diff(
        pair, read_corpus(pair, text, context, limit), out, config, title=title,
        prompts=questions, behaviours=known, dtype=dtype, max_new_tokens=max_new_tokens, progress=not quiet, say=say(quiet),
    )  # fmt: skip
    show_report(report, as_json)


@app.command("report")
def report_command(
    run: Annotated[
        Path, typer.Argument(help="A run folder: crosscoder/, latents.parquet and, for examples, acts/.")
    ],
    as_json: Json = False,
) -> None:
    """Write the report of a run again, from what its folder holds."""
    from tl_crosscoder.diffing.report import DiffReport

    report = DiffReport(run)
    report.write()
    show_report(report, as_json)
