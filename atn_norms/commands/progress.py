"""A run as it goes: a live table on a terminal, one line for each finished trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from atn_norms.commands.console import drawn, on_terminal

if TYPE_CHECKING:
    from atn_norms.ablation import Event, OnEvent


def called(point: dict[str, str]) -> str:
    """Name a trial by its point: `adding norm=layer window=25 seed=0`."""
    rest = {name: value for name, value in point.items() if name != "task"}
    return " ".join([point.get("task", ""), *(f"{name}={value}" for name, value in rest.items())]).strip()


def duration(seconds: float) -> str:
    """Write a time to go by: `40 s`, `7 min`, `2 h 05 min`.

    >>> duration(3.2), duration(400), duration(7500)
    ('3 s', '7 min', '2 h 05 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """What the events so far say: who is at work, what ended how, how much is left.

    The time left is the time spent so far, scaled from the training steps taken in this run to those that remain.
    """

    def __init__(self, steps_to_do: int) -> None:
        self.steps_to_do, self.taken = steps_to_do, 0
        self.running: dict[str, Event] = {}
        self.counts: dict[str, int] = {}
        self.began = time.monotonic()
        self.started: dict[str, float] = {}
        self.first: dict[str, int] = {}
        self.finished = self.total = 0

    def see(self, event: Event) -> None:
        """Take in an event."""
        now = time.monotonic()
        before = self.running.pop(event.trial, None)
        self.started.setdefault(event.trial, now)
        self.taken += max(0, event.step - before.step) if before is not None else 0
        self.finished, self.total = event.finished, event.total
        if event.kind in ("started", "step"):
            self.running[event.trial] = event
            return
        self.taken += event.steps - event.step  # an early end leaves nothing to do
        self.counts[event.kind] = self.counts.get(event.kind, 0) + 1

    def left(self) -> str:
        """The time that is left, in words; empty while too little has been seen."""
        if self.taken < 1 or time.monotonic() - self.began < 5:
            return ""
        spent = time.monotonic() - self.began
        return f"about {duration(spent * max(0, self.steps_to_do - self.taken) / self.taken)} left"

    def summary(self) -> str:
        """One line: how many are over, how they ended, the time that is left."""
        ends = [f"{count} {kind}" for kind, count in self.counts.items() if kind != "done"]
        over = f"{self.finished} of {self.total} trials ended"
        return ", ".join(filter(None, [over, *ends, f"{duration(time.monotonic() - self.began)} so far", self.left()]))


@contextmanager
def shown(steps_to_do: int) -> Iterator[OnEvent]:
    """Show a run while it goes on; the callback takes its events."""
    progress = Progress(steps_to_do)
    if not on_terminal():
        yield lambda event: _tell(progress, event)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    # Drawn on its own clock, so that the time goes on between events and a burst of them costs one drawing.
    with Live(console=console, get_renderable=lambda: _drawn(progress), refresh_per_second=4, transient=True):

        def see(event: Event) -> None:
            progress.see(event)
            if event.kind in ("failed", "diverged"):
                console.print(_ended(event, progress), style="red", markup=False, highlight=False)

        yield see


def _tell(progress: Progress, event: Event) -> None:
    progress.see(event)
    if event.kind not in ("started", "step"):
        left = progress.left()
        print(_ended(event, progress) + (f"  ({left})" if left else ""), flush=True)


def _ended(event: Event, progress: Progress) -> str:
    seconds = duration(time.monotonic() - progress.started[event.trial])
    width = len(str(event.total))
    why = f": {event.message}" if event.message else ""
    return f"[{event.finished:>{width}}/{event.total}] {event.kind:8} {called(event.point)}  {seconds}{why}"


def _drawn(progress: Progress) -> Any:
    rows = [
        (called(event.point), f"{event.step} of {event.steps}", _bar(event.step, event.steps))
        for event in progress.running.values()
    ]
    return drawn(progress.summary(), ("training", "steps", ""), rows)


def _bar(step: int, steps: int, width: int = 20) -> str:
    full = round(width * step / steps) if steps else width
    return "━" * full + "╌" * (width - full)
