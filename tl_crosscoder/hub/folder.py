"""Where in a folder a saved crosscoder lies."""

from pathlib import Path

CONFIG = "config.json"
#: What a run folder calls its crosscoder.
PART = "crosscoder"


def in_run(path: Path) -> Path:
    """The crosscoder's own folder, of a run folder; any other path as it is."""
    return path / PART if (path / PART / CONFIG).is_file() else path


def saved_in(path: Path) -> Path:
    """The folder that :func:`tl_crosscoder.save` wrote: the path, or ``crosscoder/`` in it.

    FileNotFoundError, with what is there, where neither is one.
    """
    folder = in_run(path)
    if (folder / CONFIG).is_file():
        return folder
    raise FileNotFoundError(
        f"{path} {_came(path)}; wanted a run folder, with {PART}/ in it, or a folder that tlc.save wrote.  "
        "`tl-crosscoder convert` makes one of another tool's files"
    )


def _came(path: Path) -> str:
    if not path.exists():
        return "is not there"
    if not path.is_dir():
        return "is a file"
    names = sorted(entry.name for entry in path.iterdir())
    return f"holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "is empty"
