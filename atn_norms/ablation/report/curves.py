"""Learning curves: a thin line for each seed, a thick line for the mean of the finished seeds, and their band.

The mean is geometric where scores are compared as ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from atn_norms.ablation.analysis.comparison import Comparison, Point
from atn_norms.ablation.analysis.intervals import EXPLODED
from atn_norms.ablation.report.canvas import (
    DASHES,
    EDGE,
    INK,
    MUTED,
    Picture,
    headline,
    inches,
    look,
    save,
    scale,
    style,
    tidy,
)
from atn_norms.ablation.report.names import Layout, leaf, name, number, shortened, title
from atn_norms.ablation.store.records import StudyRecord, TaskFacts, TrialRecord

_WIDTH, _HEIGHT, _GAP = 2.7, 2.0, 0.36  # of a panel, inches
_KEYS = 4  # to a line
_MOST_SEEDS = 1_000  # trials of a task whose curves are drawn: more make a page that browsers open slowly
_END: dict[str, Any] = {"marker": "x", "markersize": 6, "markeredgewidth": 1.6, "clip_on": False}
_TRIVIAL: dict[str, Any] = {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (1, 2))}
_LEVEL: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (6, 2, 1, 2))}


def curves(record: StudyRecord, comparison: Comparison, file: str, level: float | None) -> Picture:
    """Draw a panel per label of the axis that runs down, a colour per label of the one across.

    The best trivial predictor and the `level` to reach are horizontal lines. The baseline is drawn behind every panel.
    If the validation metric was never measured, the training loss replaces it. Of many finished trials only the means
    and bands are drawn, see `draws_seeds`.
    """
    facts = record.tasks[comparison.task]
    layout = Layout.of(record)
    trials = [trial for row in comparison.rows for trial in row.point.trials]
    measure = "validation" if any(_line(trial, "validation")[0] for trial in trials) else "train_loss"
    what = f"validation {facts.metric}" if measure == "validation" else facts.reported
    guides = _guides(facts, level) if measure == "validation" else []
    panels = _panels(record, comparison, layout)
    keys = _keys(record, trials, layout, guides, any(panel.behind for panel in panels))
    columns = _columns(len(panels), len(layout.facets))
    width = max(0.66 + columns * (_WIDTH + _GAP), 6.2)
    beside = _beside(keys, width)
    head = 0.76 + 0.2 * math.ceil(len(keys) / beside)
    height = head + math.ceil(len(panels) / columns) * (_HEIGHT + 0.42) + 0.22
    heading = f"{comparison.task}: {what} while training"
    seen = [value for trial in trials for value in _line(trial, measure)[1]]
    seen += [guide.value for guide in guides]
    last_step = max((line["step"] for trial in trials for line in trial.curve), default=1)
    single = draws_seeds(comparison)
    with style():
        figure = Figure(figsize=(width, height))
        headline(figure, heading)
        for place, panel in enumerate(panels):
            line, column = divmod(place, columns)
            axes = inches(
                figure,
                left=0.66 + column * (_WIDTH + _GAP),
                bottom=height - head - line * (_HEIGHT + 0.42) - _HEIGHT,
                width=_WIDTH,
                height=_HEIGHT,
            )
            _draw(axes, record, layout, panel, measure, comparison.measure.log, single)
            for guide in guides:
                axes.axhline(guide.value, zorder=1, **guide.line)
            scale(axes, "y", seen, facts.goal)
            axes.set_xlim(0, last_step)
            last = place + columns >= len(panels)
            axes.set_xlabel("step" if last else "")
            axes.tick_params(labelleft=column == 0, labelbottom=last)
        figure.legend(
            handles=keys,
            loc="upper left",
            bbox_to_anchor=((EDGE - 0.1) / width, 1 - 0.34 / height),
            ncols=beside,
            frameon=False,
            fontsize=8.5,
            columnspacing=1.6,
        )
        return save(figure, file, heading, _describe(record, comparison, measure))


def draws_seeds(comparison: Comparison) -> bool:
    """Return True if the curve of every seed is drawn: for at most 1,000 trials."""
    return sum(len(row.point.trials) for row in comparison.rows) <= _MOST_SEEDS


class _Guide(NamedTuple):
    label: str
    value: float
    line: dict[str, Any]


def _guides(facts: TaskFacts, level: float | None) -> list[_Guide]:
    """Return the horizontal lines: the best trivial predictor and the level."""
    choose = min if facts.goal == "min" else max
    trivial = choose(facts.baselines.items(), key=lambda item: item[1], default=None)
    guides = [_Guide(*trivial, _TRIVIAL)] if trivial else []
    return [*guides, _Guide("level to reach", level, _LEVEL)] if level is not None else guides


def _columns(panels: int, facets: int) -> int:
    each = panels // facets
    if facets > 1 and each <= 4 and panels == each * facets:
        return each
    return {1: 1, 2: 2, 4: 2}.get(panels, 3)


def _line(trial: TrialRecord, measure: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a trial's curve, without values out of bounds."""
    points = [(line["step"], line.get(measure)) for line in trial.curve]
    found = [(step, value) for step, value in points if isinstance(value, int | float) and abs(value) < EXPLODED]
    return [step for step, _ in found], [float(value) for _, value in found]


class _Panel(NamedTuple):
    title: str
    points: list[Point]
    behind: list[Point]


def _panels(record: StudyRecord, comparison: Comparison, layout: Layout) -> list[_Panel]:
    """Return the points of each panel, and the baselines that are drawn behind them instead of in a panel."""
    panels = []
    downs = record.axes[layout.down] if layout.down else [""]
    acrosses = record.axes[layout.across] if layout.across else [""]
    for facet in layout.facets:
        for down in downs:
            found = [comparison.at(layout.cell(facet, down, across)) for across in acrosses]
            rows = list({id(row): row for row in found if row}.values())
            if not rows:
                continue
            points = [row.point for row in rows]
            references = {id(row.against.reference): row.against.reference for row in rows if row.against}
            behind = [point for key, point in references.items() if key not in map(id, points)]
            panels.append(_Panel(", ".join(filter(None, (down, title(facet)))), points, behind))
    drawn_behind = {id(point) for panel in panels for point in panel.behind}
    own = [panel for panel in panels if not drawn_behind.issuperset(map(id, panel.points))]
    return own or [_Panel(comparison.task, [], [])]


def _beside(keys: list[Line2D], width: float) -> int:
    """Return the number of keys in a row of the legend, whose columns are as wide as their longest label."""
    words = [len(str(key.get_label())) for key in keys]

    def needed(columns: int) -> float:
        deep = max(1, math.ceil(len(words) / columns))
        return sum(0.62 + 0.08 * max(words[i : i + deep]) for i in range(0, len(words), deep))

    return next((columns for columns in (_KEYS, 3, 2) if needed(columns) < width), 1)


def _draw(
    axes: Axes, record: StudyRecord, layout: Layout, panel: _Panel, measure: str, log: bool, single: bool
) -> None:
    tidy(axes, "both")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(shortened(panel.title, 38), fontweight="bold", fontsize=10 if len(panel.title) <= 30 else 8.5)
    for point in panel.behind:
        _seeds(axes, point, measure, log, single, color=INK, linestyle=DASHES[1])
    for point in panel.points:
        _seeds(axes, point, measure, log, single, **look(layout.place(record, point)))


def _seeds(axes: Axes, point: Point, measure: str, log: bool, single: bool, **look: Any) -> None:
    finished = []
    for trial in point.trials:
        steps, values = _line(trial, measure)
        ended = trial.status in ("diverged", "failed")
        if not steps:
            if ended:  # before anything was measured: at the top
                axes.plot([trial.step], [0.97], transform=axes.get_xaxis_transform(), color=look["color"], **_END)
            continue
        alone = "." if len(steps) == 1 else None
        if single or trial.status != "done":
            axes.plot(steps, values, linewidth=0.7, alpha=0.5 if len(point.trials) < 5 else 0.32, marker=alone, **look)
        if ended:
            axes.plot(steps[-1:], values[-1:], color=look["color"], **_END)
        elif trial.status == "done":
            finished.append(dict(zip(steps, values, strict=True)))
    shared = sorted(set(finished[0]).intersection(*finished)) if finished else []
    if shared:
        table = np.array([[values[step] for step in shared] for values in finished])
        if len(finished) > 1:
            axes.fill_between(
                shared, table.min(axis=0), table.max(axis=0), color=look["color"], alpha=0.13, linewidth=0, zorder=1
            )
        geometric = log and bool((table > 0).all())
        centre = np.exp(np.log(table).mean(axis=0)) if geometric else table.mean(axis=0)
        axes.plot(shared, centre, linewidth=2, **look)


def _keys(
    record: StudyRecord,
    trials: list[TrialRecord],
    layout: Layout,
    guides: list[_Guide],
    behind: bool,
) -> list[Line2D]:
    keys = []
    for place, label in enumerate(record.axes[layout.across] if layout.across else []):
        words = shortened(f"{leaf(layout.across or '')} {label}", 28)
        keys.append(Line2D([], [], linewidth=2, label=words, **look(place)))
    if behind:
        keys.append(Line2D([], [], linewidth=2, color=INK, linestyle=DASHES[1], label="baseline"))
    keys += [Line2D([], [], label=shortened(f"{each.label}: {number(each.value)}", 34), **each.line) for each in guides]
    if any(trial.status in ("diverged", "failed") for trial in trials):
        keys.append(Line2D([], [], linewidth=0, marker="x", color=INK, label="diverged or failed"))
    return keys


def _describe(record: StudyRecord, comparison: Comparison, measure: str) -> str:
    def last(trials: Sequence[TrialRecord]) -> str:
        ends = [values[-1] for trial in trials if (values := _line(trial, measure)[1])]
        return ", ".join(map(number, ends)) or "no measurement"

    return "Last measured value of every seed. " + "; ".join(
        f"{name(record, row.point)}: {last(row.point.trials)}" for row in comparison.rows
    )
