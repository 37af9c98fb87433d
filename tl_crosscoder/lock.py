"""A folder that one process writes to at a time."""

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tl_crosscoder.errors import InUse

NAME = ".lock"
#: What file systems say that know no locks, as those of some clusters: there nobody is kept out.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
#: The folders of this process: the system would let it in a second time, from another thread too.
HELD: set[Path] = set()
ONE_THREAD = threading.Lock()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process is in the folder within the block; InUse, with the one that is, where there is one already.

    The system ends a lock with its process, however that ends: one that was killed keeps nobody out, nor do the children it
    leaves behind.
    """
    path = folder.resolve() / NAME
    with ONE_THREAD:
        handle = _locked(path)
        HELD.add(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with ONE_THREAD:  # closing any handle of the file ends the lock of all
            HELD.discard(path)
            path.unlink(missing_ok=True)
            os.close(handle)


def _locked(path: Path) -> int:
    """The open file, once its lock is ours and it is still the one of that name."""
    while True:
        if path in HELD:
            raise _in_use(path, f"process {os.getpid()}, this one")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 300).decode(errors="replace")
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise _in_use(path, owner or "another process") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # its owner took it away meanwhile


def _in_use(path: Path, owner: str) -> InUse:
    return InUse(
        f"{path.parent} is being written to by {owner}; wait for it, stop it, or choose another folder"
    )
