"""The heat map: every cell of the grid with its mean, coloured by the difference to the baseline of the study."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from atn_norms.ablation.analysis.comparison import Comparison, Row
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS
from atn_norms.ablation.report.canvas import (
    EDGE,
    INK,
    MUTED,
    PAPER,
    RULE,
    Picture,
    headline,
    inches,
    logarithmic,
    save,
    style,
    write,
)
from atn_norms.ablation.report.names import (
    AT_LEAST,
    NOTHING,
    Layout,
    called_baseline,
    change,
    leaf,
    lower,
    name,
    never,
    number,
    shortened,
    title,
    unfinished,
)
from atn_norms.ablation.store.records import StudyRecord
from atn_norms.errors import plural

# Blue and orange are distinct with every common colour vision; dark ends stay dark in grey print.
_DIVERGING = LinearSegmentedColormap.from_list("against", ["#1f5fa8", "#8fb8de", "#f3f3f1", "#f2b679", "#b4530a"])
_SEQUENTIAL = LinearSegmentedColormap.from_list("alone", ["#1f5fa8", "#8fb8de", "#f3f3f1"])
_WIDTH, _NARROW, _HEIGHT = 1.75, 1.5, 0.62  # of a cell, alone and beside other facets, inches
_PAGE = 10.8
_BIG, _SMALL = 12, 7.6  # points


@dataclass(frozen=True)
class Shade:
    """The colours of a heat map: row -> colour, and the key, position in 0..1 -> colour, with its two ends."""

    colour: Callable[[Row], str | None]
    key: Callable[[float], str]
    ends: tuple[str, str]
    says: str


def shade(record: StudyRecord, comparison: Comparison) -> Shade:
    """Return the colours: by the difference to the baseline, or by the mean without a baseline; blue is better.

    Full colour is the largest difference of the task, and at least two standard deviations between seeds, so that noise
    stays pale. If the means differ by a factor of ten, ratios replace differences.
    """
    means = [row.point.mean for row in comparison.rows if row.point.values]
    goal = comparison.measure.goal
    sign = 1 if goal == "min" else -1
    ratio = comparison.measure.log or logarithmic(means, goal)
    measure: Callable[[float], float] = math.log if ratio else float
    if not comparison.has_reference:
        low, high = (measure(min(means)), measure(max(means))) if means else (0.0, 0.0)

        def alone(row: Row) -> str | None:
            if not row.point.values:
                return None
            share = (measure(row.point.mean) - low) / (high - low) if high > low else 0.5
            return to_hex(_SEQUENTIAL(share if sign > 0 else 1 - share))

        says = "Colour: its logarithm." if ratio else "Colour: its value."
        return Shade(alone, lambda t: to_hex(_SEQUENTIAL(t)), _ends("lowest", "highest", sign), says)

    def against(row: Row) -> float | None:
        if row.is_reference:
            return 0.0
        if row.against is None or not row.against.pairs:
            return None
        if comparison.measure.log or not ratio:
            return row.against.mean
        return measure(row.point.mean) - measure(row.against.reference.mean)

    spreads = [
        np.var([measure(v) for v in row.point.values], ddof=1) for row in comparison.rows if _spreads(row, ratio)
    ]
    found = [abs(delta) for row in comparison.rows if (delta := against(row)) is not None]
    full = max([*found, 2 * math.sqrt(float(np.mean(spreads))) if spreads else 0.0]) or 1.0

    def colour(row: Row) -> str | None:
        delta = against(row)
        return None if delta is None else to_hex(_DIVERGING(0.5 + sign * delta / full / 2))

    bound = f"{math.exp(full):.3g} times " if ratio else f"{number(full)} "
    base = shortened(called_baseline(record), 24)
    says = f"Colour: the difference to {base}. Grey is no difference, blue is better, orange is worse."
    effect = "ratio" if comparison.measure.log else "difference"
    interval = any(row.against and row.against.pairs >= ENOUGH_SEEDS for row in comparison.rows)
    says += f"\nBelow the mean: paired {effect} to {base}{', with its 95% interval' if interval else ''}."
    return Shade(colour, lambda t: to_hex(_DIVERGING(t)), _ends(f"{bound}lower", f"{bound}higher", sign), says)


def _ends(lower: str, higher: str, sign: int) -> tuple[str, str]:
    """Return the labels of the ends of the key, the better end first."""
    return (lower, higher) if sign > 0 else (higher, lower)


def _spreads(row: Row, ratio: bool) -> bool:
    return len(row.point.values) > 1 and not (ratio and min(row.point.values) <= 0)


class _Block(NamedTuple):
    row: Row | None
    top: int
    left: int
    tall: int
    wide: int


def blocks(
    comparison: Comparison, layout: Layout, facet: dict[str, str], downs: list[str], acrosses: list[str]
) -> list[_Block]:
    """Return the rectangles of a facet: neighbouring cells of one point are one rectangle."""
    places: dict[int, list[tuple[int, int]]] = {}
    rows: dict[int, Row] = {}
    found = []
    for i, down in enumerate(downs):
        for j, across in enumerate(acrosses):
            row = comparison.at(layout.cell(facet, down, across))
            if row is None:
                found.append(_Block(None, i, j, 1, 1))
                continue
            rows[id(row)] = row
            places.setdefault(id(row), []).append((i, j))
    for key, cells in places.items():
        (top, left), (bottom, right) = map(min, zip(*cells, strict=True)), map(max, zip(*cells, strict=True))
        tall, wide = bottom - top + 1, right - left + 1
        if tall * wide == len(cells):
            found.append(_Block(rows[key], top, left, tall, wide))
        else:
            found.extend(_Block(rows[key], i, j, 1, 1) for i, j in cells)
    return found


def heatmap(record: StudyRecord, comparison: Comparison, file: str, what: str) -> Picture:
    """Draw one facet per combination of the axes that are neither down nor across; `what` names the numbers."""
    layout = Layout.of(record)
    downs = record.axes[layout.down] if layout.down else [""]
    acrosses = record.axes[layout.across] if layout.across else [""]
    shading = shade(record, comparison)
    margin = 0.26 + 0.085 * max(len(line) for label in downs for line in _wrap(label, 22).split("\n"))
    head = 0.5 + 0.16 * (max(_wrap(label, 17).count("\n") for label in acrosses) + bool(layout.facets[0]) * 2)
    cell = _NARROW if len(layout.facets) > 1 else _WIDTH
    wide, tall = margin + cell * len(acrosses), head + _HEIGHT * len(downs) + 0.12
    columns = max(1, min(len(layout.facets), int(_PAGE // wide)))
    lines = math.ceil(len(layout.facets) / columns)
    width, height = max(columns * wide + 0.15, 6.2), 0.38 + lines * tall + 0.9 + 0.19 * shading.says.count("\n")
    heading = f"{comparison.task}: {what} by {_axes_as_text(layout)}"
    with style():
        figure = Figure(figsize=(width, height))
        headline(figure, heading)
        for place, facet in enumerate(layout.facets):
            line, column = divmod(place, columns)
            axes = inches(
                figure,
                left=column * wide + margin,
                bottom=height - 0.38 - (line + 1) * tall + 0.12,
                width=cell * len(acrosses),
                height=_HEIGHT * len(downs),
            )
            _frame(axes, layout, facet, downs, acrosses)
            for block in blocks(comparison, layout, facet, downs, acrosses):
                _draw(axes, block, shading, cell)
        _key(figure, shading, _about(comparison))
        return save(figure, file, heading, _describe(record, comparison))


def _about(comparison: Comparison) -> str:
    limit = comparison.measure.limit
    if limit is not None:
        return f"Mean over the seeds of the steps, of {number(limit)} at most; fewer is better."
    mean = "Geometric mean" if comparison.measure.log else "Mean"
    return f"{mean} over the finished seeds; {lower(comparison.measure.goal)} is better."


def _axes_as_text(layout: Layout) -> str:
    return " and ".join(leaf(axis) for axis in (layout.down, layout.across) if axis) or "point"


def _frame(axes: Axes, layout: Layout, facet: dict[str, str], downs: list[str], acrosses: list[str]) -> None:
    axes.set(xlim=(0, len(acrosses)), ylim=(len(downs), 0))
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks([j + 0.5 for j in range(len(acrosses))], [_wrap(label, 17) for label in acrosses])
    axes.set_yticks([i + 0.5 for i in range(len(downs))], [_wrap(label, 22) for label in downs])
    axes.tick_params(length=0, pad=5)
    if layout.across:
        axes.set_xlabel(shortened(leaf(layout.across), 20 * len(acrosses)), color=MUTED, labelpad=4)
    if facet:
        axes.set_title(shortened(title(facet), 16 * len(acrosses)), fontweight="bold", pad=8)


def _wrap(label: str, width: int) -> str:
    """A label in at most two lines; options start a line where they do not fit beside their kind.

    >>> _wrap("detached(window=45)", 17)
    'detached(\\nwindow=45)'
    """
    apart = label.replace("(", "( ", 1) if len(label) > width else label
    lines = textwrap.wrap(apart, width, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")
    return "\n".join(lines).replace("( ", "(") or label[:width]


def _draw(axes: Axes, block: _Block, shading: Shade, cell: float) -> None:
    centre = (block.left + block.wide / 2, block.top + block.tall / 2)
    colour = shading.colour(block.row) if block.row else None
    rectangle = Rectangle((block.left, block.top), block.wide, block.tall, linewidth=2, edgecolor=PAPER)
    rectangle.set_facecolor(colour or "none")
    axes.add_patch(rectangle)
    if block.row is None or not block.row.point.values:
        rectangle.set(hatch="////", linewidth=0.8)
        rectangle.set_edgecolor(RULE)
    if block.row is None:
        return
    ink = _readable(colour) if colour else INK
    big, small = _words(block.row)
    drop = 11.5
    lines = [(big, _BIG, "normal"), *((text, _SMALL, "normal") for text in small)]
    lift = drop * (len(lines) - 1) / 2 + (len(lines) == 2)
    for place, (text, size, weight) in enumerate(lines):
        fit = min(size, 72 * 0.94 * cell * block.wide / (0.6 * max(len(text), 1)))
        axes.annotate(
            text,
            centre,
            (0, lift - drop * place - (2 if place else 0)),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=fit,
            color=ink,
            weight=weight,
        )


def _words(row: Row) -> tuple[str, list[str]]:
    """Return the value of a cell, and below it the number of its seeds."""
    point, total = row.point, len(row.point.trials)
    wrong = ", ".join(filter(None, (never(point), unfinished(point))))
    if not point.values:
        return NOTHING, [wrong]
    least = AT_LEAST if never(point) else ""
    compared = change(row.against) if row.against else "baseline" if row.is_reference else ""
    if wrong:
        stands = wrong if point.measure.limit is not None else f"{len(point.values)} of {total} seeds; {wrong}"
        return least + number(point.mean), [*filter(None, (compared,)), stands]
    return number(point.mean), [
        f"baseline, {plural(total, 'seed')}" if row.is_reference else compared or plural(total, "seed")
    ]


def _readable(colour: str) -> str:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return "#1b1f23" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.3 else "#ffffff"


def _key(figure: Figure, shading: Shade, about: str) -> None:
    swatches, side = 9, 0.2
    left = EDGE + 0.068 * len(shading.ends[0]) + 0.1
    axes = inches(figure, left=left, bottom=0.18, width=swatches * side, height=0.13)
    axes.set(xlim=(0, swatches), ylim=(0, 1))
    axes.set_axis_off()
    for place in range(swatches):
        axes.add_patch(Rectangle((place, 0), 1, 1, facecolor=shading.key(place / (swatches - 1)), linewidth=0))
    for x, text, side_ in ((-0.4, shading.ends[0], "right"), (swatches + 0.4, shading.ends[1], "left")):
        axes.text(x, 0.5, text, ha=side_, va="center", fontsize=8, color=MUTED)
    for line, words in enumerate(reversed([about, *shading.says.split("\n")])):
        write(figure, EDGE, 0.46 + 0.19 * line, words, fontsize=8, color=MUTED)


def _describe(record: StudyRecord, comparison: Comparison) -> str:
    parts = [f"{name(record, row.point)}: {_described(row)}" for row in comparison.rows]
    return "; ".join(parts)


def _described(row: Row) -> str:
    big, small = _words(row)
    return ", ".join([big, *small])
