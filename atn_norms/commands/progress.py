"""Show the progress of a run: a live table on a terminal; otherwise a line per finished trial and one per minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from atn_norms.commands.console import on_terminal
from atn_norms.commands.output import emit, results
from atn_norms.commands.signals import stopping
from atn_norms.text import escape_controls

if TYPE_CHECKING:
    from rich.console import Console

    from atn_norms.ablation import Event, OnEvent
    from atn_norms.ablation.execution.remaining import RemainingTime

EVERY = 60.0  # seconds between two log lines about the running trials
SHOWN = 8  # running trials named in a log line
FEW = 5.0  # seconds before the remaining time is estimated
AROUND = 7  # lines for the summary, the table's head and foot, and the cursor
BROAD = 100  # least columns of a terminal for bars


def called(point: dict[str, str]) -> str:
    """Name a trial by its point: `adding norm=layer window=25 seed=0`."""
    labels = {name: value for name, value in point.items() if name != "task"}
    words = [point.get("task", ""), *(f"{name}={value}" for name, value in labels.items())]
    return escape_controls(" ".join(words).strip())


def duration(seconds: float) -> str:
    """Write a duration: `40 s`, `7 min`, `2 h 05 min`.

    >>> duration(3.2), duration(400), duration(7500)
    ('3 s', '7 min', '2 h 05 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """State of a run from its events: running trials, outcomes, remaining time."""

    def __init__(self, remaining: RemainingTime, finished: int = 0, total: int = 0) -> None:
        self.remaining = remaining
        self.running: dict[str, Event] = {}
        self.elsewhere: set[str] = set()
        self.counts: dict[str, int] = {}
        self.began = time.monotonic()
        self.started: dict[str, float] = {}
        self.finished, self.total = finished, total

    def see(self, event: Event) -> None:
        """Update the state with an event."""
        now = time.monotonic()
        self.remaining.see(event, now)
        self.started.setdefault(event.trial, now)
        self.finished, self.total = event.finished, event.total
        if event.kind in ("started", "step", "busy"):
            self.running[event.trial] = event
            (self.elsewhere.add if event.kind == "busy" else self.elsewhere.discard)(event.trial)
            return
        self.running.pop(event.trial, None)
        self.elsewhere.discard(event.trial)
        self.counts[event.kind] = self.counts.get(event.kind, 0) + 1

    def left(self, is_recent: bool = False) -> str:
        """Return the estimated remaining time as text, or a recent estimate; empty while unknown, and at the end."""
        now, estimate = time.monotonic(), self.remaining.recent if is_recent else self.remaining.seconds
        seconds = None if now - self.began < FEW or self.finished == self.total else estimate(now)
        return "" if seconds is None else f"about {duration(max(1.0, seconds))} left"

    def summary(self) -> str:
        """Return one line with the ended trials, outcomes, running trials and remaining time."""
        ends = [f"{count} {kind}" for kind, count in self.counts.items() if kind != "done"]
        over = f"{self.finished} of {self.total} trials ended"
        work = f"{len(self.running)} running"
        return ", ".join(
            filter(None, [over, *ends, work, f"{duration(time.monotonic() - self.began)} so far", self.left()])
        )


@contextmanager
def live_progress(remaining: RemainingTime, finished: int = 0, total: int = 0) -> Iterator[OnEvent]:
    """Show the progress of a run of `total` trials; the callback receives its events."""
    progress = Progress(remaining, finished, total)
    if not on_terminal():
        yield _Lines(progress)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=results())
    # Drawn by a timer, so that the time advances between events, and many events cost one drawing.
    with Live(console=console, get_renderable=lambda: _drawn(progress, console), refresh_per_second=4, transient=True):

        def see(event: Event) -> None:
            progress.see(event)
            if event.kind in ("failed", "diverged", "busy"):
                style = "yellow" if event.kind == "busy" else "red"
                console.print(_ended(event, progress), style=style, markup=False, highlight=False)

        yield see


class _Lines:
    """Print a run as log lines."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.printed = progress, time.monotonic()

    def __call__(self, event: Event) -> None:
        self.progress.see(event)
        if event.kind not in ("started", "step"):
            left = self.progress.left(is_recent=True)
            self._print(_ended(event, self.progress) + (f"  ({left})" if left else ""))
        elif time.monotonic() - self.printed >= EVERY:
            self._print(f"{self.progress.summary()}: {_running(self.progress)}")

    def _print(self, line: str) -> None:
        self.printed = time.monotonic()
        emit(line)


def _running(progress: Progress) -> str:
    events = list(progress.running.values())
    running = [
        f"{called(each.point)} at step {step_of(each.step, each.steps)}{_loss(each, ', loss ')}"
        for each in events[:SHOWN]
    ]
    more = [f"and {len(events) - SHOWN} more"] if len(events) > SHOWN else []
    return "; ".join([*running, *more])


def _loss(event: Event, before: str = "") -> str:
    return "" if event.loss is None else f"{before}{event.loss:.4g}"


def _ended(event: Event, progress: Progress) -> str:
    seconds = duration(time.monotonic() - progress.started[event.trial])
    width = len(str(event.total))
    why = f": {escape_controls(event.message)}" if event.message else ""
    return f"[{event.finished:>{width}}/{event.total}] {event.kind:8} {called(event.point)}  {seconds}{why}"


def _drawn(progress: Progress, console: Console) -> Any:
    """Draw the summary, and as many running trials as fit the terminal."""
    events = list(progress.running.values())  # a copy, since another thread changes it
    room = min(len(events), max(1, console.height))
    while True:
        picture = _picture(progress, events, room, console.width)
        lines = len(console.render_lines(picture, pad=False))
        if lines < console.height or room <= 1:
            return picture
        room = max(1, min(room - 1, room * (console.height - AROUND) // max(1, lines - AROUND + 1)))


def _picture(progress: Progress, events: list[Event], room: int, width: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary = Text("stopping; finished work is kept" if stopping() else progress.summary(), style="bold")
    if not room:
        return summary
    bars = width >= BROAD
    table = Table(box=SIMPLE_HEAD)
    for name in ("training", "steps", *([""] if bars else []), "loss"):
        table.add_column(name, no_wrap=name != "training", overflow="fold")
    for event in events[:room]:
        name = called(event.point) + (" (elsewhere)" if event.trial in progress.elsewhere else "")
        bar = [_bar(event.step, event.steps)] if bars else []
        table.add_row(*map(Text, [name, step_of(event.step, event.steps), *bar, _loss(event)]))
    hidden = len(events) - room
    return Group(summary, table, *([Text(f"  and {hidden} more")] if hidden else []))


def step_of(step: int, steps: int) -> str:
    """Format a step with the steps of its trial; alone where a function exceeds them, or its study sets none.

    >>> step_of(3, 10), step_of(0, 10), step_of(400, 1)
    ('3 of 10', '0 of 10', '400')
    """
    return f"{step} of {steps}" if step <= steps and steps > 1 else str(step)


def _bar(step: int, steps: int, width: int = 20) -> str:
    full = min(width, round(width * step / steps)) if steps else width
    return "━" * full + "╌" * (width - full)
