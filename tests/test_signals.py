"""Signal handling: the first signal starts a clean shutdown, which further signals do not disturb."""

import signal

import pytest

from atn_norms.commands import signals
from atn_norms.commands.signals import Ended, exit_code, handle, stopping

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def as_from_a_terminal():
    """Restore default signal handlers, which nohup or a background shell may have changed."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in SIGNALS if each != signal.SIGINT}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_further_signals_do_not_disturb_the_shutdown(number):
    before, done = [signal.getsignal(each) for each in SIGNALS], []
    with pytest.raises(KeyboardInterrupt) as caught, handle(), handle():  # nested, like one command inside another
        assert not stopping()
        try:
            signal.raise_signal(number)
        finally:
            assert stopping()
            for each in SIGNALS:
                signal.raise_signal(each)
            done.append("in order")
    assert done == ["in order"] and exit_code(caught.value) == 128 + number
    assert isinstance(caught.value, Ended) == (number != signal.SIGINT)
    assert not stopping() and [signal.getsignal(each) for each in SIGNALS] == before


def test_a_later_signal_interrupts_a_shutdown_that_hangs(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with handle():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            now[0] += signals.PATIENCE


def test_a_foreign_handler_is_kept():
    mine = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: mine.append(number))
    try:
        with handle():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert mine == [signal.SIGTERM]
