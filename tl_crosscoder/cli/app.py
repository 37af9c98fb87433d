"""The command itself: its name, what it does with errors, how it stops."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

#: The verbs in the order in which one meets them; those named nowhere are questions.
QUESTIONS = "Is it real? Asked of a run"
SECTIONS = {
    "The whole job": ["demo", "diff"],
    "Step by step": ["capture", "train", "table", "report"],
    QUESTIONS: [],
    "Crosscoders of others, and yours for others": ["inspect", "convert", "publish"],
}


class Sections(TyperGroup):
    """The command's help, with its verbs in sections."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        width, elsewhere = (
            max(map(len, self.commands)),
            {name for names in SECTIONS.values() for name in names},
        )
        questions = [name for name in self.commands if name not in elsewhere]
        for title, names in (SECTIONS | {QUESTIONS: questions}).items():
            with formatter.section(title):
                helps = (self.commands[name].get_short_help_str(limit=200) for name in names)
                formatter.write_dl(
                    [(name.ljust(width), text) for name, text in zip(names, helps, strict=True)]
                )


app = typer.Typer(
    cls=Sections,
    help="What did fine-tuning change inside a language model?",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)

# exit codes: wrong usage; models or data that do not fit together; the Hub; no room on the disk
USAGE, MISMATCH, HUB, DISK = 2, 3, 4, 5


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C ends the command with a sentence and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        text = "stopped; what was finished so far is kept: the same command goes on from there."
        console.print(text, soft_wrap=True)
        raise typer.Exit(130) from None


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """What did fine-tuning change inside a language model?"""


def main() -> None:
    """Entry point: errors say what, where and what to do; a traceback only with ``--debug``."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv[1:])
    try:
        app(args=arguments, prog_name="tl-crosscoder")
    except Exception as error:
        if debug:
            raise
        text = "\n".join([f"{type(error).__name__}: {_message(error)}", *getattr(error, "__notes__", [])])
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(exit_code(error))


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and error.filename:
        return _of_path(error)
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _of_path(error: OSError) -> str:
    """What the system refused, where nobody looked before."""
    words = {
        PermissionError: "you may not read or write it; change its permissions, or name another place",
        FileNotFoundError: "it is not there; check the path",
        NotADirectoryError: "a file stands where a folder is wanted; name another place",
        FileExistsError: "it is there already and is no folder; name another place",
        IsADirectoryError: "it is a folder, and a file is wanted; name the file",
    }
    found = next((text for kind, text in words.items() if isinstance(error, kind)), error.strerror)
    return f"{error.filename}: {found}"


def exit_code(error: Exception) -> int:
    """What the shell is told of an error: whose it is to mend; 1 for what nobody foresaw."""
    from tl_crosscoder.errors import CrosscoderError, HubError, InUse, NotSaved

    if isinstance(error, NotSaved):
        return DISK
    if isinstance(error, HubError):
        return HUB
    if isinstance(error, CrosscoderError) and not isinstance(error, InUse):
        return MISMATCH
    usage = (InUse, ValueError, KeyError, ImportError, PermissionError, FileNotFoundError, FileExistsError)
    return USAGE if isinstance(error, (*usage, NotADirectoryError, IsADirectoryError)) else 1
