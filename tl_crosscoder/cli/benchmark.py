"""The benchmarks: known answers, without any model."""

from pathlib import Path
from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Json, Quiet
from tl_crosscoder.cli.output import print_figures

benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(benchmark, name="benchmark", help="Crosscoders on data whose answer is known.")


@benchmark.callback()
def benchmarks() -> None:
    """Crosscoders on data whose answer is known."""


@benchmark.command("synthetic")
@stoppable()
def synthetic(
    seeds: Annotated[int, typer.Option(help="Of the data and the start of the weights.")] = 5,
    fast: Annotated[bool, typer.Option("--fast", help="Small pairs, for a look in seconds.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of the figures; finished trainings in it are not repeated.")
    ] = Path("runs/benchmark-synthetic"),
    threads: Annotated[
        int, typer.Option(help="Of the processor; figures depend on it in the last digits.")
    ] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Shrinkage, decoupling, Latent Scaling and two controls, on activations with planted concepts (some ten minutes)."""
    import torch

    from tl_crosscoder.diffing.folder import write_json
    from tl_crosscoder.studies.synthetic_benchmark import synthetic_benchmark

    torch.set_num_threads(threads)
    result = synthetic_benchmark(seeds=seeds, fast=fast, parts=out / "parts", progress=not quiet)
    write_json(out / "result.json", result.to_dict())
    figure = result.plot().save(out / "figure.png")
    if as_json:
        print_figures(result.to_dict(), True)
        return
    print(f"\n{result.verdict}\n")
    print(result.table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    print(f"\n  {out / 'result.json'}\n  {figure}")
