"""Being asked to end: by Ctrl-C, by `kill`, by a batch system, or by a terminal that goes away."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 15.0  # seconds to put things in order, in which no further signal is heard


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


class _Asked:
    """When the end was asked for; None: it was not."""

    at: float | None = None


def stopping() -> bool:
    """Whether the end was asked for, and what is inside `heard` is being put in order."""
    return _Asked.at is not None


@contextmanager
def handle() -> Iterator[None]:
    """Raise `KeyboardInterrupt`, or `Ended` where SIGTERM or SIGHUP would end the process on the spot, inside.

    Those that come while things are put in order are not heard: an impatient second Ctrl-C would only leave a mess.
    One that comes after `PATIENCE` seconds is, in case it hangs, or the first was lost where exceptions are swallowed.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():  # only the main thread may say so
        usual.clear()
    mine = {number: handler for number, handler in usual.items() if signal.getsignal(number) == handler}
    for number in mine:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)
        if mine:
            _Asked.at = None


def ignore() -> None:
    """Hear no signal any more: all is in order, and only the interpreter's own end is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Asked.at is not None and now - _Asked.at < PATIENCE:
        return
    _Asked.at = now
    raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)
