"""The strip plot: every seed of every point as a mark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from atn_norms.ablation.analysis.comparison import Comparison, Point
from atn_norms.ablation.report.canvas import (
    ALERT,
    EDGE,
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
from atn_norms.ablation.report.names import (
    Layout,
    lower,
    name,
    never,
    number,
    short_names,
    shortened,
    unfinished,
)
from atn_norms.ablation.store.records import Goal, StudyRecord
from atn_norms.errors import plural

_ROW = 0.3  # inches
_WIDTH = 5.6
_HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.1}


def strip(record: StudyRecord, comparison: Comparison, file: str, what: str, guides: Mapping[str, float]) -> Picture:
    """Draw one row per point: a dot for each seed, a bar at their mean, and a text for the seeds without a value.

    `guides` are values to compare with: dotted lines, or a note if a line would squeeze the dots together.
    """
    layout, limit = Layout.of(record), comparison.measure.limit
    rows = comparison.rows
    words = short_names(record, [row.point for row in rows], 44)
    missing = [", ".join(filter(None, (never(row.point), unfinished(row.point)))) for row in rows]
    values = [value for row in rows for value in row.point.values]
    goal = comparison.measure.goal
    lines, beyond = _guides(guides, values, goal)
    margin = 0.26 + 0.078 * max(map(len, words), default=0)
    tall, head = _ROW * max(len(rows), 1), 0.5 + 0.16 * max(1, len(lines))
    width, height = margin + _WIDTH + 0.25 + 0.07 * max(map(len, missing), default=0), head + tall + 0.85
    heading = f"{comparison.task}: {what}, every seed"
    with style():
        figure = Figure(figsize=(width, height))
        headline(figure, heading)
        axes = inches(figure, left=margin, bottom=0.85, width=_WIDTH, height=tall)
        scale(axes, "x", [*values, *lines.values()], goal)
        axes.set(ylim=(max(len(rows), 1) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=words)
        tidy(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=6)
        for place, row in enumerate(rows):
            axes.axhline(place, color=RULE, linewidth=0.6, zorder=0)
            _dots(axes, place, row.point, look(layout.place(record, row.point))["color"])
            edge = blended_transform_factory(axes.transAxes, axes.transData)
            colour = ALERT if row.point.counts["diverged"] or row.point.counts["failed"] else MUTED
            axes.text(1.015, place, missing[place], transform=edge, va="center", fontsize=8, color=colour)
        for place, (label, value) in enumerate(lines.items()):
            _guide(axes, value, f"{shortened(label, 44)}: {number(value)}", place)
        axes.set_xlabel(f"{shortened(what, 60)} ({'fewer' if limit else lower(goal)} is better)")
        note = f"Dot: a seed. Bar: {'geometric mean' if comparison.measure.log else 'mean'} of the finished seeds."
        if limit is not None and any(row.point.lost for row in rows):
            note = f"Dot: a seed. Open triangle: never within {number(limit)} steps, counted as these. Bar: mean."
        if beyond:
            parts = ", ".join(f"{shortened(label, 44)}: {number(value)}" for label, value in beyond.items())
            note += f" Off the axis: {parts}."
        write(figure, EDGE, 0.16, note, fontsize=8, color=MUTED)
        return save(figure, file, heading, _describe(record, comparison))


def _guide(axes: Axes, value: float, words: str, place: int) -> None:
    axes.axvline(value, color=MUTED, linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)
    over = blended_transform_factory(axes.transData, axes.transAxes)
    low, high = axes.transData.inverted().transform(axes.transAxes.transform([(0, 0), (1, 0)]))[:, 0]
    side = "left" if value < low + (high - low) / 3 else "right"
    spot = (-3 if side == "left" else 3, 4 + 11 * place)
    axes.annotate(words, (value, 1), spot, xycoords=over, textcoords="offset points", ha=side, fontsize=8, color=MUTED)


def _dots(axes: Axes, place: int, point: Point, colour: str) -> None:
    # Spread the seeds of a row in their order, so that equal values stay visible.
    counted = point.counted
    spread = np.linspace(-0.2, 0.2, len(counted)) if len(counted) > 1 else np.zeros(len(counted))
    for found in (True, False):
        marks = [
            (value, place + up)
            for (seed, value), up in zip(counted.items(), spread, strict=True)
            if math.isfinite(point.scores[seed]) == found
        ]
        if marks:
            face = {"marker": "o", "alpha": 0.75, "markeredgewidth": 0} if found else {"marker": ">", **_HOLLOW}
            axes.plot(*zip(*marks, strict=True), linewidth=0, markersize=4.6, color=colour, clip_on=False, **face)
    if counted:
        bar = [place - 0.34, place + 0.34]
        axes.plot([point.mean, point.mean], bar, color=colour, linewidth=2.2, solid_capstyle="butt")


def _guides(
    baselines: Mapping[str, float], values: list[float], goal: Goal
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the guides that get a line, and the guides whose line would squeeze the dots together."""
    finite = {label: value for label, value in baselines.items() if math.isfinite(value)}
    alike = not values or max(values) == min(values)
    near = {label for label, value in finite.items() if alike or _room(values, value, goal) > 0.3}
    lines = {label: value for label, value in finite.items() if label in near}
    return lines, {label: value for label, value in finite.items() if label not in near}


def _room(values: list[float], value: float, goal: Goal) -> float:
    """Return the share of the axis that the values keep if the axis includes `value`."""
    measure = math.log if logarithmic([*values, value], goal) else float
    low, high = measure(min(values)), measure(max(values))
    return (high - low) / (max(high, measure(value)) - min(low, measure(value)))


def _describe(record: StudyRecord, comparison: Comparison) -> str:
    parts = []
    for row in comparison.rows:
        values = ", ".join(map(number, row.point.values)) or "none finished"
        missing = ", ".join(filter(None, (never(row.point), unfinished(row.point))))
        parts.append(f"{name(record, row.point)}: {values}" + (f" ({missing})" if missing else ""))
    return f"{plural(len(parts), 'point')}. " + "; ".join(parts)
