"""Texts of a report: numbers, names of points and of files; and the layout of its pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from atn_norms.ablation.analysis.comparison import Difference, Point
from atn_norms.ablation.analysis.decision import Decision
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS
from atn_norms.ablation.analysis.paired import ALPHA
from atn_norms.ablation.analysis.student import MOST_SEEDS
from atn_norms.ablation.store.records import Goal, StudyRecord
from atn_norms.errors import plural

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
AT_LEAST = "\N{GREATER-THAN OR EQUAL TO}\N{NO-BREAK SPACE}"
_ROUNDING = 1e-6  # size over that of the largest number up to which a number may be printed as 0
_BARE = ("norm", "cell")
_LEAST = 12  # characters of a word that are never cut while other words can be cut


def number(value: float | None, lost: str = "diverged") -> str:
    """Format a number: three significant digits below 1, four above; whole numbers without decimals.

    Numbers below 1e-4 or from 1e6 have a power of ten. An infinite number gives `lost`.

    >>> [number(x) for x in (0.01234, 2.5, 137.26, 1234.5678, 200.0, 2.5e-7, float("inf"))]
    ['0.0123', '2.500', '137.3', '1235', '200', '2.50e-07', 'diverged']
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return lost
    form = ".0f" if float(value).is_integer() and 1 <= abs(value) < 1e6 else _form(value)
    return f"{value:{form}}".replace("-", MINUS, 1) if value < 0 else f"{value:{form}}"


def _form(value: float, most: int = 4) -> str:
    size = abs(value)
    if size == 0:
        return ".0f"
    if size < 1e-4 or size >= 1e6:
        return ".2e"
    if size < 1:
        return f".{2 - math.floor(math.log10(size))}f"
    return f".{max(0, most - 1 - math.floor(math.log10(size)))}f"


def alike(*values: float, most: int = 4) -> list[str]:
    """Format numbers with the same decimals: `most` digits for the largest, and more if they would look equal.

    >>> alike(0.0123, 0.0009, 0.1)
    ['0.012', '0.001', '0.100']
    >>> alike(0.98704, 0.98661, 0.98742)
    ['0.9870', '0.9866', '0.9874']
    """
    finite = [value for value in values if math.isfinite(value)]
    largest = max(map(abs, finite), default=0.0)
    apart = max(finite, default=0.0) - min(finite, default=0.0)
    form = _form(largest, most)
    if form.endswith("f") and apart > 1e-12 * largest:
        form = f".{max(int(form[1:-1]), -math.floor(math.log10(apart)))}f"
    return [f"{value:{form}}".replace("-", MINUS, 1) if math.isfinite(value) else NOTHING for value in values]


def signed(*values: float) -> list[str]:
    """Format differences with a sign and equal decimals: three digits for the largest, more if one looks like 0.

    >>> signed(-0.05, -0.123, 0.004)
    ['−0.050', '−0.123', '+0.004']
    >>> signed(-0.5, -1.0, -0.0003)
    ['−0.5000', '−1.0000', '−0.0003']
    """
    least = _ROUNDING * max(map(abs, values))
    for most in range(3, 10):
        texts = alike(*values, most=most)
        if all(
            abs(value) <= least or any(digit in text for digit in "123456789")
            for value, text in zip(values, texts, strict=True)
        ):
            break
    return [
        "0" if value == 0 else text if text[:1] in (MINUS, NOTHING) else f"+{text}"
        for value, text in zip(values, texts, strict=True)
    ]


def span(low: str, high: str) -> str:
    """Format an interval in brackets, without a line break inside."""
    return f"[{low},\N{NO-BREAK SPACE}{high}]"


def share(difference: Difference) -> str:
    """Return the number of paired seeds at which the point is better; a tie counts as half."""
    wins = difference.improvement * difference.ranked
    return f"{wins:g} of {difference.ranked}" if difference.ranked else NOTHING


def chance(difference: Difference) -> str:
    """Return `share` with the interval of the probability of improvement, if there are at least five seeds."""
    if difference.chance is None or difference.ranked < ENOUGH_SEEDS:
        return share(difference)
    return f"{share(difference)} {span(f'{difference.chance.low:.2f}', f'{difference.chance.high:.2f}')}"


def change(difference: Difference) -> str:
    """Format a paired difference or ratio with its interval, or with the number of seeds if they are few."""
    if not difference.pairs:
        return NOTHING
    write = ratios if difference.measure.log else signed
    ends = difference.effect_interval
    if ends is None or difference.pairs < ENOUGH_SEEDS:
        return f"{write(difference.effect)[0]} ({plural(difference.pairs, 'seed')})"
    middle, low, high = write(difference.effect, ends.low, ends.high)
    return f"{middle} {span(low.removeprefix(TIMES), high.removeprefix(TIMES))}"


def ratios(*values: float) -> list[str]:
    """Format ratios with a multiplication sign and three significant digits; with more if one looks like 1 and is not.

    >>> ratios(0.4872, 12.345, 1234.5)
    ['×0.487', '×12.3', '×1234']
    >>> ratios(0.99962, 0.99931, 0.99993)
    ['×0.9996', '×0.9993', '×0.9999']
    """
    digits = next(d for d in range(3, 10) if d == 9 or all(f"{value:.{d}g}" != "1" or value == 1 for value in values))
    return [f"{TIMES}{value:.0f}" if value >= 1000 else f"{TIMES}{value:.{digits}g}" for value in values]


def margin(decision: Decision) -> str:
    """Format the margin of a declared comparison: `0.01`, or `×1.25` for ratios."""
    if decision.margin is None:
        return NOTHING
    size = decision.difference.measure.unscaled(decision.margin)
    return f"{TIMES if decision.difference.measure.log else ''}{size:.10g}"


def verdict(decision: Decision) -> str:
    """The verdict as text: `helps`, `hurts`, `no difference larger than 0.01`, `undecided`."""
    words = decision.verdict
    return f"{words} larger than {margin(decision)}" if words == "no difference" else words


WORSE = "both worse than a guess"  # a comparison in which neither side beats a trivial predictor


def qualified(decision: Decision) -> str:
    """The verdict, with a warning where a trivial predictor is better than both sides."""
    return f"{verdict(decision)} ({WORSE})" if decision.both_trivial else verdict(decision)


def chances(p: float | None) -> str:
    """Format a p-value, with more digits if rounding would raise it to 5%.

    >>> chances(0.03217), chances(0.00004), chances(0.9997), chances(0.0496)
    ('0.032', '<0.001', '1.00', '0.0496')
    """
    if p is None:
        return NOTHING
    if p < 0.001:
        return "<0.001"
    digits = 3 if p < 0.1 else 2
    while p < ALPHA <= round(p, digits):
        digits += 1
    return f"{p:.{digits}f}"


def seeds_needed(decision: Decision) -> str:
    """Format the number of seeds that detect the margin, or the observed difference, with a power of 80%."""
    if decision.power is None:
        return NOTHING
    return f">{MOST_SEEDS}" if decision.needed is None else str(decision.needed)


def average(point: Point, unit: str = "") -> str:
    """Format a mean with its interval, or with its number of seeds; `at least` if seeds count with the limit."""
    if not point.values:
        return NOTHING
    least = AT_LEAST if point.measure.limit is not None and point.lost else ""
    if point.interval is None or len(point.values) < ENOUGH_SEEDS:
        return f"{least}{number(point.mean)}{unit} ({plural(len(point.values), 'seed')})"
    digits = 4 if point.measure.limit is None else 3
    middle, low, high = alike(point.mean, point.interval.low, point.interval.high, most=digits)
    return f"{least}{middle}{unit} {span(low, high)}"


def lower(goal: Goal) -> str:
    """Return `lower` or `higher`, whichever is better."""
    return "lower" if goal == "min" else "higher"


def listed(words: Sequence[str], joint: str = "and") -> str:
    """Join words to an enumeration.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return f" {joint} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def leaf(axis: str) -> str:
    """Return the last part of an axis path: `model.norm` -> `norm`."""
    return axis.rsplit(".", 1)[-1]


def labels(record: StudyRecord, point: Point) -> dict[str, str]:
    """Return axis -> label of a point; `any` on an axis that has no effect on the point."""
    return {axis: "any" if own is None else " | ".join(own) or NOTHING for axis, own in _own(record, point).items()}


def name(record: StudyRecord, point: Point) -> str:
    """Return the name of a point: `layer, window 25`."""
    return ", ".join(_words(record, point))


def _words(record: StudyRecord, point: Point) -> list[str]:
    own = {axis: " | ".join(found) for axis, found in _own(record, point).items() if found}
    words = [label if leaf(axis) in _BARE else f"{leaf(axis)} {label}" for axis, label in own.items()]
    return words or ["every point" if record.axes else "the only point"]


def short_names(record: StudyRecord, points: Sequence[Point], width: int) -> list[str]:
    """Return the names of points, cut to a width if they stay distinct; the longest words are cut first."""
    words = [_words(record, point) for point in points]
    wanted = len({", ".join(each) for each in words})
    while True:
        found = [_fitted(each, width) for each in words]
        if len(set(found)) >= wanted:
            return found
        width += 4


def _fitted(words: Sequence[str], width: int) -> str:
    words = list(words)
    while (over := len(", ".join(words)) - width) > 0:
        place = max(range(len(words)), key=lambda i: len(words[i]))
        cut = shortened(words[place], max(_LEAST, len(words[place]) - over))
        if cut == words[place]:
            return shortened(", ".join(words), width)
        words[place] = cut
    return ", ".join(words)


def _own(record: StudyRecord, point: Point) -> dict[str, list[str] | None]:
    """Return axis -> labels of a point on it, or None if the point has every label of the axis."""
    found: dict[str, list[str] | None] = {}
    for axis, known in record.axes.items():
        own = list(dict.fromkeys(cell[axis] for cell in point.cells if axis in cell))
        found[axis] = None if len(own) > 1 and len(own) == len(known) else own
    return found


def called_baseline(record: StudyRecord) -> str:
    """Return the name of the baseline: `none`, or `window 1`."""
    words = [label if leaf(axis) in _BARE else f"{leaf(axis)} {label}" for axis, label in record.baseline.items()]
    return ", ".join(words) or "the baseline"


def factor(record: StudyRecord) -> str:
    """Return the option that the study compares, such as `Window`: the axes of its baseline."""
    words = listed([leaf(axis) for axis in record.baseline]) or "points"
    return words[0].upper() + words[1:]


def interim(record: StudyRecord) -> str:
    """Return the mark of a verdict before all trials have ended, `interim, after 20 of 50 trials`; empty afterwards."""
    ended = sum(trial.status not in ("running", "pending") for trial in record.trials)
    return "" if ended == len(record.trials) else f"interim, after {ended} of {plural(len(record.trials), 'trial')}"


def marked(record: StudyRecord, title: str) -> str:
    """Return a title of verdicts, with the mark of `interim`."""
    return ", ".join(filter(None, (title, interim(record))))


def never(point: Point) -> str:
    """Return the number of seeds at which the level was never reached; empty if there is no such seed or level."""
    if point.measure.limit is None or not point.lost:
        return ""
    return f"never at {point.lost} of {len(point.scores)}"


def unfinished(point: Point) -> str:
    """Return the status of the seeds without a value: `1 diverged, 2 pending`; empty if all finished."""
    counts = point.counts
    return ", ".join(f"{counts[what]} {what}" for what in ("diverged", "failed", "running", "pending") if counts[what])


@dataclass(frozen=True)
class Layout:
    """The axes of a picture, down and across; each combination of the other axes is a facet."""

    down: str | None
    across: str | None
    facets: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, record: StudyRecord) -> Layout:
        """Return the layout of a study: normalizer down and window across, or its first two axes."""
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
        """Return the grid cell at a position of a facet."""
        found = dict(facet)
        if self.down is not None:
            found[self.down] = down
        if self.across is not None:
            found[self.across] = across
        return found

    def place(self, record: StudyRecord, point: Point) -> int | None:
        """Return the index of a point's label on the axis across; None if this axis has no effect on the point."""
        own = {cell[self.across] for cell in point.cells} if self.across else {""}
        if len(own) > 1:
            return None
        return record.axes[self.across].index(own.pop()) if self.across else 0


def title(facet: dict[str, str]) -> str:
    """Return the title of a facet; empty for the only facet."""
    return ", ".join(f"{leaf(axis)} {label}" for axis, label in facet.items())


def shortened(label: str, width: int) -> str:
    """Cut a label to a width in its middle, because names with equal beginnings often have different ends.

    >>> shortened("layer(per_step=true), window 25", 20)
    'layer(per_st…ndow 25'
    """
    if len(label) <= width:
        return label
    tail = (width - 1) * 2 // 5
    return f"{label[: width - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{label[len(label) - tail :]}"


def slugs(words: Sequence[str]) -> list[str]:
    """Return file names for labels: plain ASCII, short and distinct.

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
