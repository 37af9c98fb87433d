"""Ctrl-C, or SIGTERM, ends training after the step in progress."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tl_crosscoder.dictionary.shard import Shard

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """``signal``: the first one that came, None before."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def among(self, shard: Shard) -> signal.Signals | None:
        """The signal that came here, or SIGTERM where one came to another rank: all stop after the same step."""
        came = shard.total(int(self.signal is not None))
        return self.signal or (signal.SIGTERM if came else None)


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Notes the first Ctrl-C or SIGTERM; a second one of either acts at once.  Outside the main thread nothing is caught."""
    asked = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def ask(number: int, _: object) -> None:
        asked.signal = signal.Signals(number)
        restore()

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
