"""A run folder that a later verb works on, with the models it was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_crosscoder.cli.inputs import load_pair, read_behaviours
from tl_crosscoder.cli.output import print_figures

if TYPE_CHECKING:
    from tl_crosscoder.data.planted import Behaviour
    from tl_crosscoder.diffing.report import DiffReport
    from tl_crosscoder.models.pair import ModelPair
    from tl_crosscoder.studies import StudyResult

MOST_ROWS = 40

Run = Annotated[Path, typer.Argument(help="A run folder, as diff or demo leave it.")]
RunBase = Annotated[
    str | None, typer.Argument(help="The base model of the run; a demo's run knows its models.")
]
RunTuned = Annotated[str | None, typer.Argument(help="The fine-tuned model; leave it out with --adapter.")]


@dataclass(frozen=True)
class OpenRun:
    """A run, its models, and what they are known to do."""

    report: "DiffReport"
    pair: "ModelPair"
    behaviours: list["Behaviour"]

    @property
    def parts(self) -> Path:
        """Where long studies keep their finished parts."""
        return self.report.folder.studies / "parts"


def open_report(run: Path) -> "DiffReport":
    """The run alone, for what needs no model."""
    from tl_crosscoder.diffing.report import DiffReport

    return DiffReport(run)


def open_run(
    run: Path,
    base: str | None = None,
    tuned: str | None = None,
    adapter: str | None = None,
    behaviours: Path | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> OpenRun:
    """The run and its models: those named, or the planted pair of a demo.  Raises PairMismatch for other models than the run's."""
    if adapter is not None and base is None:
        raise ValueError(f"--adapter {adapter} wants BASE beside it, the model that it was trained on.")
    report, known = open_report(run), read_behaviours(behaviours)
    made_by = report.metrics.get("demo")
    if base is not None:
        pair = load_pair(base, tuned, adapter, report.store.manifest["pair"]["hook"], device, dtype)
    elif made_by:
        from tl_crosscoder.demo import demo_pair, demo_recipe

        pair = demo_pair(made_by, device=device, dtype="bfloat16" if dtype == "bfloat16" else "float32")
        known = known or list(demo_recipe(made_by).planted.behaviours)
    else:
        raise ValueError(f"name the models that {run} was made from: BASE TUNED, or BASE --adapter FOLDER.")
    report.store.check_against(pair)
    return OpenRun(report, pair, known)


def keep(report: "DiffReport", result: "StudyResult", as_json: bool, name: str | None = None) -> None:
    """Store a result with its run and print it: the verdict, the table, where it lies."""
    path = report.add(result, name)
    if as_json:
        print_figures(result.to_dict(), True)
        return
    said = result.verdict if isinstance(result.verdict, list) else [result.verdict]
    shown: Any = result.brief().head(MOST_ROWS)
    print("\n" + "\n".join(said))
    if len(shown):
        print("\n" + shown.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.3g}"))
    if len(shown) < len(result.table):
        print(f"... of {len(result.table):,} rows, which are in the file")
    print(f"\n  {path}\n  in the report: tl-crosscoder report {report.folder.root}")
