"""Would another run have found the same latents?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Json, Quiet, Seed
from tl_crosscoder.cli.output import print_figures

if TYPE_CHECKING:
    from tl_crosscoder.diffing.report import DiffReport
    from tl_crosscoder.models.activations import PairedActivations

Side = Annotated[
    str,
    typer.Argument(
        help="A run folder, or anyone's crosscoder: a folder, or owner/repo[@revision][:subfolder]."
    ),
]


@app.command("compare")
@stoppable()
def compare_command(
    a: Side,
    b: Side,
    acts: Annotated[
        Path | None,
        typer.Option(help="A store to compare activations on; without it the held-out part of A's."),
    ] = None,
    at_least: Annotated[float, typer.Option(help="Similarity of a match.", min=0, max=1)] = 0.7,
    draws: Annotated[int, typer.Option(help="Draws of each null.", min=1)] = 10,
    tokens: Annotated[int, typer.Option(help="At most this many tokens of activations.")] = 100_000,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and the figure.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Match the latents of two crosscoders of one pair: other seeds, other data."""
    from tl_crosscoder.diffing.folder import write_json
    from tl_crosscoder.hub.load import load
    from tl_crosscoder.hub.same_models import refuse_another_pair
    from tl_crosscoder.hub.save import read_config
    from tl_crosscoder.studies.stability import stability

    runs = [_run(Path(path)) for path in (a, b)]
    known = [{} if run is None else read_config(run.folder.crosscoder).get("extra") or {} for run in runs]
    refuse_another_pair(*(extra.get("pair") for extra in known))
    crosscoders = [
        load(path) if run is None else run.crosscoder for path, run in zip((a, b), runs, strict=True)
    ]
    fired: Any = [None if run is None else run.table["n_fired"] for run in runs]
    alive = None if any(each is None for each in fired) else (fired[0], fired[1])
    result = stability(
        crosscoders[0], crosscoders[1], _batches(acts, runs[0]), alive=alive,
        at_least=at_least, n_draws=draws, most_tokens=tokens, seed=seed,
        parts=None if out is None else out / "parts", progress=not quiet,
    )  # fmt: skip
    if out is not None:
        write_json(out / "result.json", result.to_dict())
        result.plot().save(out / "figure.png")
    if as_json:
        print_figures(result.to_dict(), True)
        return
    print(f"\n{result.verdict}\n")
    seen: Any = result.table[(result.table["n_a"] > 0) | (result.table["n_b"] > 0)].dropna(
        axis="columns", how="all"
    )
    print(seen.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.3g}"))
    print(f"\n  {out}" if out is not None else "\n  --out FOLDER keeps the pairs and draws the figure")


def _run(path: Path) -> "DiffReport | None":
    """The run in a folder, or None where it holds a crosscoder alone."""
    from tl_crosscoder.diffing.folder import RunFolder
    from tl_crosscoder.diffing.report import DiffReport

    return DiffReport(path) if RunFolder(path).crosscoder.exists() else None


def _batches(acts: Path | None, run: "DiffReport | None") -> "PairedActivations | None":
    from tl_crosscoder.models.activations import PairedActivations

    if acts is not None:
        return PairedActivations.open(acts)
    return run.held_out if run is not None and run.folder.acts.exists() else None
