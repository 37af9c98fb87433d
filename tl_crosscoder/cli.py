"""The command line.  Each verb is a few lines; torch is imported only when a verb runs."""

import functools
import json
import operator
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from tl_crosscoder.data.planted import Behaviour
    from tl_crosscoder.diffing.config import DiffConfig
    from tl_crosscoder.diffing.report import DiffReport
    from tl_crosscoder.models.corpus import Corpus
    from tl_crosscoder.models.pair import ModelPair

app = typer.Typer(
    help="What did fine-tuning change inside a language model?",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)

#: columns that `table` prints
SHOWN = [
    "class", "delta_norm", "nu_error", "nu_recon", "cosine", "frequency", "difference_share", "difference_peak", "rank_score",
]  # fmt: skip

# exit codes: wrong usage; models or data that do not fit together; no room on the disk
USAGE, MISMATCH, DISK = 2, 3, 5

Base = Annotated[str, typer.Argument(help="Base model: a Hub name or a local folder.")]
Tuned = Annotated[str | None, typer.Argument(help="Fine-tuned model; leave it out with --adapter.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter for the base model.")]
Hook = Annotated[str, typer.Option(help="Where to read both models, such as blocks.13.hook_resid_post.")]
Text = Annotated[
    list[str], typer.Option(help=".txt or .jsonl file, folder, or DATASET[:SPLIT[:COLUMN]]; may be repeated.")
]
Prompts = Annotated[
    Path | None, typer.Option(help="Questions, one a line: both models answer, both read both answers.")
]
Behaviours = Annotated[
    Path | None, typer.Option(help='JSON: [{"name", "keywords", "heldout"}], prompts that should show it.')
]
Seed = Annotated[int, typer.Option(help="Fixes the order of the data and the start of the weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Of the models and the stored activations.")
]
DSae = Annotated[int, typer.Option("--d-sae", help="Latents in the dictionary.")]
K = Annotated[int | None, typer.Option("--k", help="Active latents a token; 32, or the recipe's.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
BatchSize = Annotated[int, typer.Option(help="Tokens a step.")]
Lr = Annotated[float | None, typer.Option(help="Adam's step size; 1e-3, or the recipe's.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A published training: minder_l1, minder_batchtopk, kissane_l1, papergrade, delta, dsf or dfc.",
    ),
]
Context = Annotated[int, typer.Option(help="Tokens a window of text.")]
Limit = Annotated[int | None, typer.Option(help="At most this many tokens of text.")]
NewTokens = Annotated[
    int, typer.Option(help="Length of the answers to --prompts' and --behaviours' questions.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C ends the command with a sentence and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        text = "stopped; what was captured or trained so far is kept: the same command goes on from there."
        console.print(text, soft_wrap=True)
        raise typer.Exit(130) from None


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """What did fine-tuning change inside a language model?"""


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

    _show(
        demo(pair, out, seed=seed, device=device, dtype=dtype, progress=not quiet, say=_say(quiet)), as_json
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
    config = _config(recipe=recipe, d_sae=d_sae, k=k, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    known, questions = _behaviours(behaviours), _lines(prompts)
    from tl_crosscoder.diffing.run import diff

    pair = _pair(base, tuned, adapter, hook, device, dtype)
    report = diff(
        pair, _corpus(pair, text, context, limit), out, config, title=f"{Path(base).name} → {Path(tuned or adapter or '').name}",
        prompts=questions, behaviours=known, dtype=dtype, max_new_tokens=max_new_tokens, progress=not quiet, say=_say(quiet),
    )  # fmt: skip
    _show(report, as_json)


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
    """Both models' residual streams on the same tokens, into a folder; resumes where it stopped."""
    questions = _lines(prompts)
    from tl_crosscoder.models.capture import capture

    pair = _pair(base, tuned, adapter, hook, device, dtype)
    corpus = _corpus(pair, text, context, limit)
    store = capture(pair, corpus, out, dtype=dtype, prompts=questions, progress=not quiet)
    _print({"tokens": len(store), "d_in": store.d_in, "dropped": store.manifest["dropped"]}, as_json)


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
    config = _config(recipe=recipe, d_sae=d_sae, k=k, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    from tl_crosscoder.diffing.folder import RunFolder
    from tl_crosscoder.diffing.run import learn
    from tl_crosscoder.hub.save import save
    from tl_crosscoder.models.activations import PairedActivations
    from tl_crosscoder.training.sharding import joined, united

    seen, _ = PairedActivations.open(acts).split(1 - config.held_out, config.seed)
    run, own = RunFolder(out.parent), out.name == RunFolder(out.parent).crosscoder.name
    # crosscoders side by side in one folder each have their own
    checkpoints = run.checkpoints if own else out.with_name(f"{out.name}-checkpoints")
    saving = {
        "log_path": run.log if own else out.with_name(f"{out.name}.jsonl"),
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
        again = [*_start(shard.every.size), *sys.argv[1:], *([] if resume else ["--resume"])]
        console.print(
            f"saved after step {history.rows[-1]['step']} of {steps}; go on with:\n  {shlex.join(again)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + (history.stopped_by or 0))
    save(crosscoder, out, extra={"pair": seen.manifest["pair"], "config": asdict(config)})
    _print(history.rows[-1], as_json)


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
    best = table.sort_values(config.ranking, ascending=False)[SHOWN].head(top)
    _print(table.attrs["metrics"] if as_json else best.map(_digits).to_string(), as_json)


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
    _show(report, as_json)


def _start(processes: int) -> list[str]:
    """What starts this program on as many processes."""
    if processes == 1:
        return ["tl-crosscoder"]
    return ["torchrun", "--nproc-per-node", str(processes), "-m", "tl_crosscoder"]


def main() -> None:
    """Entry point: errors say what, where and what to do; a traceback only with ``--debug``."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv[1:])
    try:
        app(args=arguments, prog_name="tl-crosscoder")
    except Exception as error:
        if debug:
            raise
        text = f"{type(error).__name__}: {_message(error)}"
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(_exit_code(error))


def _message(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _exit_code(error: Exception) -> int:
    from tl_crosscoder.errors import CrosscoderError, NotSaved

    if isinstance(error, NotSaved):
        return DISK
    if isinstance(error, CrosscoderError):
        return MISMATCH
    return (
        USAGE
        if isinstance(error, ValueError | KeyError | FileNotFoundError | FileExistsError | ImportError)
        else 1
    )


def _config(**settings: Any) -> "DiffConfig":
    from tl_crosscoder.diffing.config import DiffConfig

    return DiffConfig(**settings)


def _pair(
    base: str, tuned: str | None, adapter: str | None, hook: str, device: str, dtype: str
) -> "ModelPair":
    if (tuned is None) == (adapter is None):
        raise ValueError(
            f"give a fine-tuned model or --adapter, one of the two; got {tuned!r} and {adapter!r}."
        )
    from tl_crosscoder.models.pair import ModelPair

    return ModelPair.load(base, tuned, adapter=adapter, hook=hook, device=device, dtype=dtype)


def _corpus(pair: "ModelPair", text: list[str], context: int, limit: int | None) -> "Corpus":
    from tl_crosscoder.models.corpus import load_text_source

    each = -(-limit // len(text)) if limit else None  # the same share of every source
    parts = [load_text_source(source, pair.tokenizer, context=context, max_tokens=each) for source in text]
    return functools.reduce(operator.add, parts)


def _lines(path: Path | None) -> list[str] | None:
    return (
        [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path
        else None
    )


def _behaviours(path: Path | None) -> list["Behaviour"]:
    from tl_crosscoder.data.planted import Behaviour

    if path is None:
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    wanted = "a list of objects with name, keywords and heldout"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} wants {wanted}.")
    try:
        return [
            Behaviour(r.pop("name"), tuple(r.pop("keywords")), tuple(r.pop("heldout")), **r) for r in rows
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} wants {wanted}: {error}") from error


def _say(quiet: bool):
    return (
        (lambda _: None)
        if quiet
        else (lambda text: console.print(f"• {text}", markup=False, highlight=False))
    )


def _show(report: "DiffReport", as_json: bool) -> None:
    if as_json:
        _print(report.metrics, True)
        return
    headline, *rest = report.verdict
    print(f"\n{headline}\n")
    for sentence in rest:
        print(f"  {sentence}")
    print(f"\n  report: {report.folder.report / 'index.html'}")


def _digits(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        from tl_crosscoder.diffing.folder import strict

        print(json.dumps(strict(value)))
    else:
        print(
            value if isinstance(value, str) else "\n".join(f"{name}: {part}" for name, part in value.items())
        )
