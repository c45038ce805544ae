"""How a report names things: numbers, points of the grid, files; and which axes span its pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from atn_norms.ablation.comparison import ENOUGH_SEEDS, Difference, Interval, Point
from atn_norms.ablation.records import StudyRecord

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
_BARE = ("norm", "cell")


def number(value: float | None) -> str:
    """Three significant digits below one, three decimals above, a power of ten outside everyday sizes.

    >>> [number(x) for x in (0.01234, 2.5, 1234.5678, 2.5e-7, float("inf"))]
    ['0.0123', '2.500', '1234.6', '2.50e-07', 'diverged']
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "diverged"
    return f"{value:{_form(value)}}".replace("-", MINUS, 1) if value < 0 else f"{value:{_form(value)}}"


def _form(value: float) -> str:
    size = abs(value)
    if size == 0:
        return ".0f"
    if size < 1e-4 or size >= 1e6:
        return ".2e"
    if size < 1:
        return f".{2 - math.floor(math.log10(size))}f"
    return ".3f" if size < 1000 else ".1f"


def signed(*values: float) -> list[str]:
    """Differences that belong together: their signs always written, decimals alike, as many as the largest needs.

    >>> signed(-0.05, -0.123, 0.004)
    ['−0.050', '−0.123', '+0.004']
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return [
        f"{value:+{_form(largest)}}".replace("-", MINUS, 1) if math.isfinite(value) else NOTHING for value in values
    ]


def span(interval: Interval | None) -> str:
    """An interval in brackets, empty where there is none."""
    return "[{}, {}]".format(*signed(interval.low, interval.high)) if interval else ""


def share(difference: Difference) -> str:
    """At how many of the paired seeds the point was better, a tie counting half."""
    wins = difference.improvement * difference.ranked
    return f"{wins:g} of {difference.ranked}" if difference.ranked else NOTHING


def change(difference: Difference) -> str:
    """A paired difference with its interval, or with its number of seeds where an interval would mean little."""
    if not difference.pairs:
        return NOTHING
    if difference.interval is None or difference.pairs < ENOUGH_SEEDS:
        return f"{signed(difference.mean)[0]} ({plural(difference.pairs, 'seed')})"
    return "{} [{}, {}]".format(*signed(difference.mean, difference.interval.low, difference.interval.high))


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "seed"), plural(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(words: Sequence[str], joint: str = "and") -> str:
    """Words as a sentence enumerates them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return f" {joint} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def leaf(axis: str) -> str:
    """The last part of an axis path: `model.norm` -> `norm`."""
    return axis.rsplit(".", 1)[-1]


def labels(record: StudyRecord, point: Point) -> dict[str, str]:
    """Axis -> label of a point; `any` on an axis whose every value resolves to it."""
    return {axis: "any" if own is None else " | ".join(own) or NOTHING for axis, own in _own(record, point).items()}


def name(record: StudyRecord, point: Point) -> str:
    """A point in words: `layer, window 25`."""
    own = {axis: " | ".join(found) for axis, found in _own(record, point).items() if found}
    words = [label if leaf(axis) in _BARE else f"{leaf(axis)} {label}" for axis, label in own.items()]
    return ", ".join(words) or "all points"


def _own(record: StudyRecord, point: Point) -> dict[str, list[str] | None]:
    """Axis -> the labels a point has there, None when they are all the axis has."""
    found: dict[str, list[str] | None] = {}
    for axis, known in record.axes.items():
        own = list(dict.fromkeys(cell[axis] for cell in point.cells if axis in cell))
        found[axis] = None if len(own) > 1 and len(own) == len(known) else own
    return found


def unfinished(point: Point) -> str:
    """What became of the seeds without a value: `1 diverged, 2 pending`; empty when all finished."""
    counts = point.counts
    return ", ".join(f"{counts[what]} {what}" for what in ("diverged", "failed", "running", "pending") if counts[what])


@dataclass(frozen=True)
class Layout:
    """Which axes run down and across a picture; the others make facets, one picture each."""

    down: str | None
    across: str | None
    facets: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, record: StudyRecord) -> Layout:
        """Normalizer down and window across where the study has them, else its first two axes."""
        axes = list(record.axes)
        down = next((axis for axis in axes if leaf(axis) == "norm"), None)
        across = next((axis for axis in axes if leaf(axis) == "window"), None)
        if down is None or across is None:
            first = [axis for axis in (down, across) if axis] + [axis for axis in axes if axis not in (down, across)]
            down, across = (*first[:2], None, None)[:2]
        facets: list[dict[str, str]] = [{}]
        for axis in axes:
            if axis not in (down, across):
                facets = [{**facet, axis: label} for facet in facets for label in record.axes[axis]]
        return cls(down, across, tuple(facets))

    def cell(self, facet: dict[str, str], down: str, across: str) -> dict[str, str]:
        """The grid cell at a place of a facet's picture."""
        found = dict(facet)
        if self.down is not None:
            found[self.down] = down
        if self.across is not None:
            found[self.across] = across
        return found

    def place(self, record: StudyRecord, point: Point) -> int | None:
        """Which label across a point has; None where that axis means nothing to it."""
        own = {cell[self.across] for cell in point.cells} if self.across else {""}
        if len(own) > 1:
            return None
        return record.axes[self.across].index(own.pop()) if self.across else 0


def title(facet: dict[str, str]) -> str:
    """A facet in words, empty for the only one."""
    return ", ".join(f"{leaf(axis)} {label}" for axis, label in facet.items())


def shortened(label: str, width: int) -> str:
    """A label cut to a width, the cut marked."""
    return label if len(label) <= width else f"{label[: width - 1]}\N{HORIZONTAL ELLIPSIS}"


def slugs(words: Sequence[str]) -> list[str]:
    """File names for arbitrary labels: plain ASCII, short, distinct.

    >>> slugs(["adding", "../Adding", "ä"])
    ['adding', 'adding-2', 'task']
    """
    found: list[str] = []
    for word in words:
        base = re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:40] or "task"
        count, slug = 1, base
        while slug in found:
            count += 1
            slug = f"{base}-{count}"
        found.append(slug)
    return found
