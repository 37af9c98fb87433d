"""How much of the tuned model's behaviour do chosen latents of a run carry?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Adapter, Behaviours, Device, Dtype, Json, Quiet, Seed
from tl_crosscoder.cli.runs import Run, RunBase, RunTuned, keep, open_run

if TYPE_CHECKING:
    from tl_crosscoder.models.activations import PairedActivations
    from tl_crosscoder.studies.comparators import Comparator


@app.command("substitution")
@stoppable()
def substitution_command(
    run: Run,
    base: RunBase = None,
    tuned: RunTuned = None,
    adapter: Adapter = None,
    behaviours: Behaviours = None,
    on: Annotated[
        str | None, typer.Option(help="A behaviour, on the tuned model's answers to its held-out prompts.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of held-out text; the run's own number.", min=1)
    ] = None,
    n_specific: Annotated[
        int | None, typer.Option(help="Size of the specific set, such as another dictionary's; a tenth.")
    ] = None,
    main: Annotated[bool, typer.Option("--main", help="Only the conditions that diff has, a third.")] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Another run, crosscoder or SAE, asked the same at equal L0; may be repeated."),
    ] = None,
    reads: Annotated[
        Literal["each", "difference"] | None,
        typer.Option(help="Of an --against of one model: an SAE that reads each model, or the difference."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="First nine as the paper counts: without the first word.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a batch through the models.")] = 4096,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put latents' change into the base activations of the tuned model: KL, NLL, agreement.  Goes on where it was stopped."""
    if reads is not None and not against:
        raise ValueError("--reads says what an --against reads; there is none.")
    from tl_crosscoder.diffing.run import held_out_text
    from tl_crosscoder.models.drop import Drop
    from tl_crosscoder.studies.behaviour import tuned_answers
    from tl_crosscoder.studies.substitution import substitution

    opened = open_run(run, base, tuned, adapter, behaviours, device=device, dtype=dtype)
    report = opened.report
    crosscoder = report.crosscoder.to(device)
    known = {behaviour.name: behaviour for behaviour in opened.behaviours}
    if on is not None and on not in known:
        raise KeyError(f"no behaviour named {on!r}; known: {', '.join(known) or 'none, give --behaviours'}")
    text = (
        tuned_answers(opened.pair, known[on], 36)
        if on is not None
        else held_out_text(report.held_out, report.config.seed, tokens or report.config.study_tokens)
    )
    result = substitution(
        crosscoder,
        opened.pair,
        text,
        report.table,
        ranking=report.config.ranking,
        top=report.config.top,
        n_specific=n_specific,
        conditions="main" if main else "every",
        against=dict(
            _rival(path, report.held_out, report.config.ranking, reads, device) for path in against or []
        ),
        published=published,
        drop=Drop(**report.store.manifest["asked"]["drop"]),
        seed=seed,
        max_tokens=max_tokens,
        parts=opened.parts,
        progress=not quiet,
    )
    keep(report, result, as_json, "substitution" if on is None else f"substitution-{on}")


def _rival(
    path: Path,
    store: "PairedActivations",
    ranking: str,
    reads: Literal["each", "difference"] | None,
    device: str,
) -> tuple[str, "Comparator"]:
    """The dictionary in a folder under the folder's name, with its latents' table on the run's held-out activations."""
    from tl_crosscoder.diffing.folder import RunFolder
    from tl_crosscoder.hub.save import load
    from tl_crosscoder.studies.comparators import Comparator

    folder = RunFolder(path).crosscoder
    crosscoder = load(folder if folder.exists() else path).to(device)
    if crosscoder.n_models == 1:
        return path.resolve().name, Comparator.measured(crosscoder, store, reads=reads)
    return path.resolve().name, Comparator.measured(crosscoder, store, ranking=ranking)
