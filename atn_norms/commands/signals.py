"""Handle signals that end the program: Ctrl-C, `kill`, a batch system, a closed terminal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 15.0  # seconds to clean up, in which further signals are ignored


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised like Ctrl-C so that cleanup code runs."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(end: KeyboardInterrupt) -> int:
    """Return the exit code of a program that a signal ended: 128 plus the signal's number.

    >>> exit_code(KeyboardInterrupt()), exit_code(Ended(signal.SIGTERM))
    (130, 143)
    """
    return 128 + (end.number if isinstance(end, Ended) else signal.SIGINT)


class _FirstSignal:
    """Time of the first signal; None before it."""

    at: float | None = None


def stopping() -> bool:
    """Return whether a signal arrived and the code inside `handle` is cleaning up."""
    return _FirstSignal.at is not None


@contextmanager
def handle() -> Iterator[None]:
    """Raise `KeyboardInterrupt` for SIGINT, and `Ended` for SIGTERM and SIGHUP with default handlers, inside the block.

    Further signals are ignored during cleanup, so that a second Ctrl-C does not break it. After `PATIENCE` seconds a
    signal raises again, in case the cleanup hangs or code caught the first exception.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        usual.clear()
    replaced = {number: handler for number, handler in usual.items() if signal.getsignal(number) == handler}
    for number in replaced:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if replaced:
            _FirstSignal.at = None


def ignore() -> None:
    """Ignore all signals during the shutdown of the interpreter."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _FirstSignal.at is not None and now - _FirstSignal.at < PATIENCE:
        return
    _FirstSignal.at = now
    raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)
