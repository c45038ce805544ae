"""The strip plot: every seed of every point as a mark, nothing hidden behind a mean."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from atn_norms.ablation.comparison import Comparison
from atn_norms.ablation.records import StudyRecord
from atn_norms.ablation.report.canvas import (
    ALERT,
    MUTED,
    RULE,
    Picture,
    headline,
    inches,
    logarithmic,
    look,
    save,
    scale,
    style,
    tidy,
    write,
)
from atn_norms.ablation.report.names import Layout, name, number, plural, shortened, unfinished

_ROW = 0.3  # inches
_WIDTH = 5.6


def strip(record: StudyRecord, comparison: Comparison, file: str) -> Picture:
    """Draw one line per point: a dot per finished seed, a bar at their mean, words for the seeds without a value.

    The task's trivial predictors are dotted lines, or a note where a line would squeeze the dots together.
    """
    facts = record.tasks[comparison.task]
    layout = Layout.of(record)
    rows = comparison.rows
    words = [shortened(name(record, row.point), 44) for row in rows]
    missing = [unfinished(row.point) for row in rows]
    values = [value for row in rows for value in row.point.values]
    lines, beyond = _guides(facts.baselines, values)
    margin = 0.35 + 0.078 * max(map(len, words), default=0)
    tall, head = _ROW * max(len(rows), 1), 0.55 + 0.16 * len(lines)
    width, height = margin + _WIDTH + 0.25 + 0.07 * max(map(len, missing), default=0), head + tall + 0.85
    heading = f"{comparison.task}: {facts.metric} of every seed"
    with style():
        figure = Figure(figsize=(width, height))
        headline(figure, heading)
        axes = inches(figure, left=margin, bottom=0.85, width=_WIDTH, height=tall)
        scale(axes, "x", [*values, *lines.values()])
        axes.set(ylim=(max(len(rows), 1) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=words)
        tidy(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=6)
        for place, row in enumerate(rows):
            axes.axhline(place, color=RULE, linewidth=0.6, zorder=0)
            _dots(axes, place, row.point.values, look(layout.place(record, row.point))["color"])
            edge = blended_transform_factory(axes.transAxes, axes.transData)
            colour = ALERT if row.point.counts["diverged"] or row.point.counts["failed"] else MUTED
            axes.text(1.015, place, missing[place], transform=edge, va="center", fontsize=8, color=colour)
        for place, (label, value) in enumerate(lines.items()):
            _guide(axes, value, f"{shortened(label, 44)}: {number(value)}", place)
        axes.set_xlabel(f"test {facts.metric} (lower is better)")
        note = "Dot: a seed. Bar: mean of the finished seeds."
        if beyond:
            told = ", ".join(f"{shortened(label, 44)}: {number(value)}" for label, value in beyond.items())
            note += f" Beyond the right edge: {told}."
        write(figure, 0.15, 0.16, note, fontsize=8, color=MUTED)
        return save(figure, file, heading, _describe(record, comparison))


def _guide(axes: Axes, value: float, words: str, place: int) -> None:
    axes.axvline(value, color=MUTED, linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)
    over = blended_transform_factory(axes.transData, axes.transAxes)
    low, high = axes.transData.inverted().transform(axes.transAxes.transform([(0, 0), (1, 0)]))[:, 0]
    side = "left" if value < low + (high - low) / 3 else "right"
    spot = (-3 if side == "left" else 3, 4 + 11 * place)
    axes.annotate(words, (value, 1), spot, xycoords=over, textcoords="offset points", ha=side, fontsize=8, color=MUTED)


def _dots(axes: Axes, place: int, values: list[float], colour: str) -> None:
    # Spread by rank within the row, so equal values stay visible; the order of seeds decides, not chance.
    offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(len(values))
    axes.plot(values, place + offsets, "o", markersize=4.6, alpha=0.75, markeredgewidth=0, color=colour)
    if values:
        mean = float(np.mean(values))
        axes.plot([mean, mean], [place - 0.34, place + 0.34], color=colour, linewidth=2.2, solid_capstyle="butt")


def _guides(baselines: dict[str, float], values: list[float]) -> tuple[dict[str, float], dict[str, float]]:
    """The trivial predictors that get a line, and those that would leave the dots too little of the axis."""
    finite = {label: value for label, value in baselines.items() if math.isfinite(value)}
    alike = not values or max(values) == min(values)
    near = {label for label, value in finite.items() if alike or _room(values, value) > 0.3}
    lines = {label: value for label, value in finite.items() if label in near}
    return lines, {label: value for label, value in finite.items() if label not in near}


def _room(values: list[float], value: float) -> float:
    """The share of the axis that the values keep when it must reach `value` too."""
    measure = math.log if logarithmic([*values, value]) else float
    low, high = measure(min(values)), measure(max(values))
    return (high - low) / (max(high, measure(value)) - min(low, measure(value)))


def _describe(record: StudyRecord, comparison: Comparison) -> str:
    told = []
    for row in comparison.rows:
        values = ", ".join(map(number, row.point.values)) or "none finished"
        missing = unfinished(row.point)
        told.append(f"{name(record, row.point)}: {values}" + (f" ({missing})" if missing else ""))
    return f"{plural(len(told), 'point')}. " + "; ".join(told)
