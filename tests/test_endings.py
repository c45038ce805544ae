"""Being asked to end: once is enough, and what follows is done in order."""

import signal

import pytest

from atn_norms.commands import signals
from atn_norms.commands.signals import Ended, exit_code, handle, stopping

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def as_from_a_terminal():
    """No signal is ignored, as under nohup, whoever started the tests."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in SIGNALS if each != signal.SIGINT}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_further_signals_do_not_disturb_what_is_put_in_order(number):
    before, done = [signal.getsignal(each) for each in SIGNALS], []
    with pytest.raises(KeyboardInterrupt) as caught, handle(), handle():  # as one command inside another
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


def test_one_that_comes_when_it_hangs_is_heard_again(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with handle():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            now[0] += signals.PATIENCE


def test_a_handler_of_somebody_else_stays():
    mine = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: mine.append(number))
    try:
        with handle():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert mine == [signal.SIGTERM]
