"""A disk without room for a crosscoder, said in words."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tl_crosscoder.errors import NotSaved

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def told_of_room(directory: Path, needed: int) -> Iterator[None]:
    """NotSaved, with the bytes that are needed and free, where the block finds no room for the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        here = next(path for path in (directory, *directory.parents) if path.exists())
        free = shutil.disk_usage(here).free
        raise NotSaved(
            f"{directory} could not be written ({error}): it needs {needed:,} bytes or so, {free:,} are free there.  What was "
            "there before is whole; make room, or name another place"
        ) from error


def _is_full(error: Exception) -> bool:
    """safetensors tells the system's number in its words alone."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"(os error {number})" in str(error) for number in FULL)
