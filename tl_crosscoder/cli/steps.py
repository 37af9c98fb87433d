"""The steps of the job, one by one: capture, train, table."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, console, stoppable
from tl_crosscoder.cli.inputs import diff_config, load_pair, read_corpus, read_lines
from tl_crosscoder.cli.options import (
    Adapter,
    Base,
    BatchSize,
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
    Prompts,
    Quiet,
    RecipeName,
    Seed,
    Steps,
    Text,
    Tuned,
)
from tl_crosscoder.cli.output import digits, print_figures

#: columns that `table` prints
SHOWN = [
    "class", "delta_norm", "nu_error", "nu_recon", "cosine", "frequency", "difference_share", "difference_peak", "rank_score",
]  # fmt: skip


@app.command("capture")
@stoppable()
def capture_command(
    base: Base,
    tuned: Tuned = None,
    *,
    hook: Hook,
    text: Text,
    adapter: Adapter = None,
    prompts: Prompts = None,
    out: Annotated[Path, typer.Option(help="Folder of the store.")] = Path("runs/diff/acts"),
    context: Context = 128,
    limit: Limit = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Both models' residual streams on the same tokens, into a folder; resumes where it stopped.

    By many processes, each with both models: torchrun --nproc-per-node N -m tl_crosscoder capture ...
    """
    questions = read_lines(prompts)
    from tl_crosscoder.models.capture import capture
    from tl_crosscoder.training.sharding import joined

    with joined(device=device) as shard:
        pair = load_pair(base, tuned, adapter, hook, device, dtype)
        corpus = read_corpus(pair, text, context, limit)
        store = capture(
            pair, corpus, out, dtype=dtype, prompts=questions, progress=not quiet, ranks=shard.every
        )
    if shard.is_first:
        figures = {"tokens": len(store), "d_in": store.d_in, "dropped": store.manifest["dropped"]}
        print_figures(figures, as_json)


@app.command("train")
def train_command(
    acts: Annotated[Path, typer.Argument(help="A captured store.")],
    out: Annotated[Path, typer.Option(help="Folder of the crosscoder.")] = Path("runs/diff/crosscoder"),
    d_sae: DSae = 4096,
    k: K = None,
    steps: Steps = 2000,
    batch_size: BatchSize = 1024,
    lr: Lr = None,
    recipe: RecipeName = None,
    init_same: InitSame = None,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from this run's newest checkpoint.")
    ] = False,
    data_ranks: Annotated[
        int,
        typer.Option(
            help="Under torchrun: parts of a batch; the processes that read one divide the latents."
        ),
    ] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a crosscoder on a store: BatchTopK, or by a recipe.  Ctrl-C saves, and --resume goes on as if nothing had happened.

    On many processes: torchrun --nproc-per-node N -m tl_crosscoder train ...
    """
    config = diff_config(
        recipe=recipe, d_sae=d_sae, k=k, steps=steps, batch_size=batch_size, lr=lr, init_same=init_same, seed=seed
    )  # fmt: skip
    from tl_crosscoder.diffing.run import learn
    from tl_crosscoder.hub.save import save
    from tl_crosscoder.models.activations import PairedActivations
    from tl_crosscoder.models.manifest import trained_on
    from tl_crosscoder.training.sharding import joined, united

    seen, _ = PairedActivations.open(acts).split(1 - config.held_out, config.seed)
    log, checkpoints = _beside(out)
    saving = {
        "log_path": log,
        "checkpoints": checkpoints,
        "checkpoint_every": checkpoint_every,
        "resume": checkpoints if resume else None,
    }
    with joined(data_ranks, device) as shard:
        divided, history = learn(seen, config, device=device, progress=not quiet, shard=shard, **saving)
        crosscoder = None if history.stopped_by else united(divided)
    if not shard.is_first:
        return
    if crosscoder is None:
        text = f"saved after step {history.rows[-1]['step']} of {steps}; go on with:\n  {_again(shard.every.size)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(128 + (history.stopped_by or 0))
    save(crosscoder, out, extra=trained_on(seen.manifest) | {"config": asdict(config)})
    print_figures(history.rows[-1], as_json)


@app.command("table")
def table_command(
    crosscoder: Annotated[Path, typer.Argument(help="A saved crosscoder.")],
    acts: Annotated[Path, typer.Argument(help="A captured store.")],
    out: Annotated[Path, typer.Option(help="The table, Parquet.")] = Path("runs/diff/latents.parquet"),
    top: Annotated[int, typer.Option(help="Rows to print.")] = 20,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """One row a latent, on the part of the store that the crosscoder's training held out."""
    from tl_crosscoder.analysis.table import latent_table
    from tl_crosscoder.diffing.config import DiffConfig
    from tl_crosscoder.diffing.folder import write_table
    from tl_crosscoder.hub.save import load, read_config
    from tl_crosscoder.models.activations import PairedActivations

    store, extra = PairedActivations.open(acts), read_config(crosscoder).get("extra") or {}
    if "pair" in extra:
        store.check_made_by(extra["pair"])
    config = DiffConfig.of(extra)
    _, held_out = store.split(1 - config.held_out, config.seed)
    table = latent_table(load(crosscoder).to(device), held_out)
    write_table(out, table)
    # models of unlike width have no difference to rank by
    by = config.ranking if config.ranking in table else "delta_norm"
    best = table.sort_values(by, ascending=False)[[name for name in SHOWN if name in table]].head(top)
    print_figures(table.attrs["metrics"] if as_json else best.map(digits).to_string(), as_json)


def _beside(out: Path) -> tuple[Path, Path]:
    """The log and the folder of checkpoints: the run's, or, of crosscoders side by side in one folder, each one's own."""
    from tl_crosscoder.diffing.folder import RunFolder

    run = RunFolder(out.parent)
    if out.name == run.crosscoder.name:
        return run.log, run.checkpoints
    return out.with_name(f"{out.name}.jsonl"), out.with_name(f"{out.name}-checkpoints")


def _again(processes: int) -> str:
    """The command that goes on with this training, on as many processes."""
    start = (
        ["tl-crosscoder"]
        if processes == 1
        else ["torchrun", "--nproc-per-node", str(processes), "-m", "tl_crosscoder"]
    )
    given = sys.argv[1:]
    return shlex.join([*start, *given, *([] if "--resume" in given else ["--resume"])])
