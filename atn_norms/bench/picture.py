"""The picture of a run: one panel a case, one mark a runner, left of 1 where it is faster than torch.nn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from atn_norms.bench.records import Bench, CaseResult
from atn_norms.bench.spec import TORCH, Case

_INK, _MUTED, _PAPER = "#1b1f24", "#5b636d", "#fefefe"
# Of Okabe and Ito's palette, distinguishable with any common colour vision.
_COLOURS = {TORCH: "#5b636d", "native": "#0072b2", "reference": "#e69f00", "textbook": "#d55e00"}
_OTHER = "#009e73"
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.facecolor": _PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "atn-norms",
}
_OMITTED = ("Date", "Creator")  # the same run always gives the same file
_COLUMNS, _WIDTH, _BAR, _ROOM = 3, 4.4, 0.24, 0.85  # of the page; of a panel, a bar and its surroundings, in inches


def draw(bench: Bench, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, and return their paths."""
    plain: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    del plain["backend"]  # the backend belongs to the rest of the process
    plain.update(_STYLE)
    written = []
    with matplotlib.rc_context(plain):
        figure = _figure(bench)
        for canvas, kind, unsaid in ((FigureCanvasAgg, "png", ("Software",)), (FigureCanvasSVG, "svg", _OMITTED)):
            canvas(figure)
            path = stem.with_name(f"{stem.name}.{kind}")
            figure.savefig(path, format=kind, dpi=160, metadata=dict.fromkeys(unsaid))
            written.append(path)
    return written


def _figure(bench: Bench) -> Figure:
    cases = bench.cases
    columns = min(_COLUMNS, len(cases))
    lines = [cases[at : at + columns] for at in range(0, len(cases), columns)]
    heights = [max(len(case.rows) for case in line) * _BAR + _ROOM for line in lines]
    width, height = max(7.0, _WIDTH * columns), sum(heights) + 0.65
    figure = Figure(figsize=(width, height))
    ratios = [row.ratio for case in cases for row in case.rows if row.ratio]
    limits = (min(0.5, *ratios, 1.0) / 1.15, max(2.0, *ratios, 1.0) * 2.2)
    machine = bench.machine
    figure.text(0.15 / width, 1 - 0.25 / height, "Time beside torch.nn without a norm (1 = as long)", weight="bold")
    caption = f"{machine['processor']}, torch {machine['torch']}, kernels: {machine['native_kernels']}; best of runs"
    figure.text(0.15 / width, 1 - 0.48 / height, caption, color=_MUTED, fontsize=8)
    top = height - 0.6
    for line, tall in zip(lines, heights, strict=True):
        for place, case in enumerate(line):
            left = place * width / columns + 1.25
            inner = (left, top - tall + 0.35, width / columns - 1.4, tall - _ROOM + 0.1)
            axes = figure.add_axes((inner[0] / width, inner[1] / height, inner[2] / width, inner[3] / height))
            _panel(axes, case, limits)
            axes.set_title(_head(case.case), loc="left", fontsize=8.5, x=-1.1 / inner[2])
        top -= tall
    return figure


def _head(case: Case) -> str:
    threads = "1 thread" if case.threads == 1 else f"{case.threads} threads"
    placed = f" {case.placement}" if case.placement else ""
    others = ", autocast" * case.autocast + ", malloc keeps" * (case.malloc == "keep")
    return f"{case.cell} {case.norm}{placed} {case.size}\n{case.mode}, {threads}{others}"


def _panel(axes: Axes, result: CaseResult, limits: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(len(result.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(result.rows)), [row.label for row in result.rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    wide = math.log10(limits[1] / limits[0]) > 1.5
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=_MUTED, linewidth=0.8, zorder=0)
    for place, row in enumerate(result.rows):
        if row.ratio is None:
            text = row.status if row.best is None else f"{1e3 * row.best:.3g} ms"  # torch.nn failed
            axes.text(limits[0] * 1.05, place, text, va="center", color=_MUTED, fontsize=7.5, style="italic")
            continue
        colour = _COLOURS.get(row.runner, _OTHER)
        axes.plot([1, row.ratio], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(row.ratio, place, "o", color=colour, markersize=6)
        text = f"{row.ratio:.2f}" if row.ratio < 10 else f"{row.ratio:.0f}"
        axes.annotate(text, (max(row.ratio, 1), place), (7, 0), textcoords="offset points", va="center", fontsize=8)
