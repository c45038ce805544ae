"""Being asked to end: by Ctrl-C, by `kill`, by a batch system, or by a terminal that goes away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the same as Ctrl-C to whoever has something to put in order first."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(end: KeyboardInterrupt) -> int:
    """The exit code of a program that a signal ends: 128 and the signal's number.

    >>> exit_code(KeyboardInterrupt()), exit_code(Ended(signal.SIGTERM))
    (130, 143)
    """
    return 128 + (end.number if isinstance(end, Ended) else signal.SIGINT)


@contextmanager
def heard() -> Iterator[None]:
    """Raise `Ended` inside where SIGTERM or SIGHUP would end the process on the spot."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may say so
        yield
        return
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in numbers:
        signal.signal(each, _raise)
    try:
        yield
    finally:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Ended(number)
