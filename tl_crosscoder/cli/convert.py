"""A crosscoder in the files of another tool."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tl_crosscoder.cli.app import app, stoppable


@app.command("convert")
@stoppable()
def convert_command(
    source: Annotated[str, typer.Argument(help="A folder, a file, or owner/repo[@revision][:subfolder].")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        Literal["tl-crosscoder", "sae-lens", "dictionary_learning"],
        typer.Option(help="Whose files to write."),
    ] = "tl-crosscoder",
    scale: Annotated[
        list[float] | None,
        typer.Option(
            help="What the activations are multiplied by, where the files lost it: one, or one a model."
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Of a BatchTopK, where the files lost it.")] = None,
) -> None:
    """Anyone's crosscoder as this library, SAE-Lens or dictionary_learning reads it."""
    from tl_crosscoder.hub.convert import convert
    from tl_crosscoder.hub.load import load, origin

    given = scale[0] if scale and len(scale) == 1 else scale or None
    crosscoder = load(source, scale=given, threshold=threshold)
    found = origin(crosscoder)
    written = convert(crosscoder, to, out, extra=found.extra)
    print(f"{found.conventions.format} -> {to}: {written}")
