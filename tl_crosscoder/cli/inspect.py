"""What a crosscoder's files are and mean."""

from typing import Annotated

import typer

from tl_crosscoder.cli.app import app, stoppable
from tl_crosscoder.cli.options import Json
from tl_crosscoder.cli.output import print_figures


@app.command("inspect")
@stoppable()
def inspect_command(
    source: Annotated[str, typer.Argument(help="A folder, a file, or owner/repo[@revision][:subfolder].")],
    as_json: Json = False,
) -> None:
    """Format, sizes and conventions of anyone's crosscoder, without reading its weights."""
    from tl_crosscoder.hub.inspect import inspect

    found = inspect(source)
    print_figures(found.as_dict() if as_json else str(found), as_json)
