"""The forest plot: the paired difference of every declared comparison, with its interval and verdict."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import blended_transform_factory

from atn_norms.ablation.analysis.comparison import Measure, Verdict
from atn_norms.ablation.analysis.decision import Decision
from atn_norms.ablation.report.canvas import (
    ALERT,
    EDGE,
    INK,
    MUTED,
    RULE,
    SERIES,
    Picture,
    headline,
    inches,
    save,
    style,
    tidy,
    write,
)
from atn_norms.ablation.report.findings import TaskFindings
from atn_norms.ablation.report.names import (
    MINUS,
    TIMES,
    called_baseline,
    chances,
    change,
    margin,
    marked,
    name,
    qualified,
    short_names,
    shortened,
)
from atn_norms.ablation.store.records import StudyRecord
from atn_norms.errors import plural

_ROW, _WIDTH = 0.42, 4.6  # inches
_FAR = 6  # ratio of the farthest to the nearest interval end above which the axis is logarithmic
COLOURS: dict[Verdict, str] = {"helps": SERIES[0], "hurts": ALERT, "no difference": MUTED, "undecided": MUTED}


def colour_of(decision: Decision) -> str:
    """The colour of a verdict; grey where both sides are worse than a guess."""
    return MUTED if decision.both_trivial else COLOURS[decision.verdict]


def forest(record: StudyRecord, task: TaskFindings, file: str) -> Picture | None:
    """Draw a row for each declared comparison: a dot for each seed, the mean, and its 95% interval.

    A margin is a grey band. Return None if no comparison has a pair.
    """
    rows = [(row, decision) for row, decision in task.decided() if decision.difference.pairs]
    if not rows:
        return None
    measure = task.primary.measure
    labels = short_names(record, [row.point for row, _ in rows], 48)
    notes = [
        f"{qualified(each)}: n {each.difference.pairs}, adjusted p {chances(each.deciding_p[1])}" for _, each in rows
    ]
    left = 0.26 + 0.078 * max(map(len, labels))
    right = 0.3 + 0.068 * max(map(len, notes))
    tall = _ROW * len(rows)
    width, height = max(left + _WIDTH + right, 6.2), 0.62 + tall + 0.95
    heading = marked(record, f"{task.task}: paired difference to {called_baseline(record)}")
    with style():
        figure = Figure(figsize=(width, height))
        headline(figure, heading)
        axes = inches(figure, left=left, bottom=0.95, width=_WIDTH, height=tall)
        _scale(axes, [decision for _, decision in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=labels)
        tidy(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=6)
        _margin(axes, [decision for _, decision in rows])
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for place, (_, decision) in enumerate(rows):
            _draw(axes, place, decision, notes[place])
        remark = " (logarithmic beyond the inner ticks)" if axes.get_xscale() == "symlog" else ""
        axes.set_xlabel(_unit(measure, remark))
        _sides(axes, measure)
        write(figure, EDGE, 0.16, _note(rows[0][1]), fontsize=8, color=MUTED)
        return save(figure, file, heading, _describe(record, task))


def _scale(axes: Axes, decisions: list[Decision]) -> None:
    """Set limits that contain every interval and 0; a logarithmic measure gets ratios as ticks."""
    differences = [decision.difference for decision in decisions]
    ends = [0.0, *(each.mean for each in differences)]
    ends += [end for each in differences if each.interval for end in (each.interval.low, each.interval.high)]
    ends += [value for each in differences for value in each.values.values()]
    ends += [sign * each.margin for each in decisions if each.margin is not None for sign in (1, -1)]
    low, high = min(ends), max(ends)
    edge = (high - low) * 0.05 or 1.0
    axes.set_xlim(low - edge, high + edge)
    if differences[0].measure.log:
        ticks = _ratios(low - edge, high + edge)
        axes.set_xticks([math.log(tick) for tick in ticks], [f"{TIMES}{tick:g}" for tick in ticks])
        return
    sizes = [max(abs(each.interval.low), abs(each.interval.high)) for each in differences if each.interval]
    if sizes and max(sizes) > _FAR * min(sizes) > 0:  # one scale would hide the smaller intervals
        near = float(f"{min(sizes):.1g}")
        axes.set_xscale("symlog", linthresh=near, linscale=1.0)
        ticks = [sign * tick for tick in _apart(near, max(sizes)) for sign in (1, -1)]
        ticks = [0.0, *(tick for tick in ticks if low - edge <= tick <= high + edge)]
        axes.set_xticks(ticks, [_signed(tick) for tick in ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(_signed))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _apart(first: float, last: float) -> list[float]:
    """Round numbers up to `last`, each at least three times the one before, so that their labels do not touch.

    >>> _apart(0.05, 0.75), _apart(0.03, 0.9)
    ([0.05, 0.2], [0.03, 0.1, 0.5])
    """
    found = [first]
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    for tick in (float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)):
        if 3 * found[-1] <= tick <= last:
            found.append(tick)
    return found[:1] + found[1 :: math.ceil(len(found) / 5)]


def _signed(value: float, place: int | None = None) -> str:
    return f"{value:+g}".replace("-", MINUS) if abs(value) > 1e-12 else "0"


def _ratios(low: float, high: float) -> list[float]:
    """Return about six round ratios between two logarithms."""
    for steps in ((1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 7.5), (1.0, 1.5, 2.0, 3.0, 5.0), (1.0, 2.0, 5.0), (1.0,)):
        powers = range(max(-300, math.floor(low / math.log(10)) - 1), min(300, math.ceil(high / math.log(10))) + 1)
        found = {float(f"{step * 10.0**power:.3g}") for power in powers for step in steps}
        found |= {float(f"{1 / each:.2g}") for each in found if len(steps) == 8 and 0.1 < each < 10}
        ticks = sorted(each for each in found if low <= math.log(each) <= high)
        if len(ticks) <= 7:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 7)]


def _margin(axes: Axes, decisions: list[Decision]) -> None:
    size = decisions[0].margin
    if size is not None:
        axes.axvspan(-size, size, color=RULE, alpha=0.5, linewidth=0, zorder=0)


def _draw(axes: Axes, place: int, decision: Decision, note: str) -> None:
    difference, colour = decision.difference, colour_of(decision)
    values = list(difference.values.values())
    spread = place - 0.26 + np.linspace(-0.08, 0.08, len(values)) if len(values) > 1 else [place - 0.26]
    axes.plot(values, spread, linewidth=0, marker="o", markersize=3.2, color=colour, alpha=0.45, markeredgewidth=0)
    if difference.interval:
        ends = [difference.interval.low, difference.interval.high]
        axes.plot(ends, [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot([difference.mean], [place], marker="D", markersize=6, color=colour, markeredgewidth=0)
    edge = blended_transform_factory(axes.transAxes, axes.transData)
    decided = decision.verdict != "undecided" and not decision.both_trivial
    weight = "bold" if decided else "normal"
    axes.text(1.02, place, note, transform=edge, va="center", fontsize=8.5, color=colour, weight=weight)


def _unit(measure: Measure, remark: str) -> str:
    """Return the label of the axis; a long name of a measure is on a second line."""
    what = "ratio of geometric means" if measure.log else "difference"
    if len(measure.name) <= 48:
        return f"{what}, {measure.name}{remark}"
    return f"{what}{remark},\n{shortened(measure.name, 72)}"


def _sides(axes: Axes, measure: Measure) -> None:
    """Label the sides of 0 with `helps` and `hurts`."""
    low, high = ("helps", "hurts") if measure.goal == "min" else ("hurts", "helps")
    zero = axes.transAxes.inverted().transform(axes.transData.transform((0, 0)))[0]
    left, right = f"\N{LEFTWARDS ARROW} {low}", f"{high} \N{RIGHTWARDS ARROW}"
    for text, side, spot in ((left, "right", -0.012), (right, "left", 0.012)):
        room = zero if side == "right" else 1 - zero
        if room > 0.12:
            axes.text(zero + spot, 1.02, text, transform=axes.transAxes, ha=side, va="bottom", fontsize=8, color=MUTED)


def _note(decision: Decision) -> str:
    words = "Dot: one seed. Diamond and bar: mean and 95% interval of the single comparison."
    if decision.margin is not None:
        words += f" Band: the margin, {margin(decision)}."
    return words


def _describe(record: StudyRecord, task: TaskFindings) -> str:
    rows = [
        f"{name(record, row.point)}: {change(decision.difference)}, {plural(decision.difference.pairs, 'pair')}, "
        f"adjusted p {chances(decision.deciding_p[1])}, {qualified(decision)}"
        for row, decision in task.decided()
    ]
    return "; ".join(rows)
