"""Write the tables of docs/results/index.md from the reports in this folder, and draw its figure, overview.svg.

Run `python docs/results/summary.py`. All declared comparisons of all complete studies are one family here, so the
p-values are adjusted for all of them at once. A study that still runs is not among them, since looking at a comparison
before the end makes its p-value invalid. A table that the page does not have is printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from atn_norms.ablation import report
from atn_norms.ablation.analysis.comparison import Comparison, Difference, Row
from atn_norms.ablation.analysis.decision import Decision, decide
from atn_norms.ablation.report.canvas import EDGE, INK, MUTED, headline, inches, save, style, tidy, write
from atn_norms.ablation.report.forest import colour_of
from atn_norms.ablation.report.names import NOTHING, TIMES, chances, change, name, qualified, seeds_needed, shortened
from atn_norms.ablation.store.records import StudyRecord

HERE = Path(__file__).parent
PAGE = HERE / "index.md"
FIGURE = HERE / "overview.svg"
STUDIES = sorted(path.parent for path in HERE.glob("*/study.json"))
TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
LOWEST, HIGHEST = 0.08, 13.0  # ratios at the ends of the axis


@dataclass(frozen=True)
class Compared:
    """One declared comparison of a report."""

    study: str
    point: str
    row: Row
    difference: Difference
    margin: float | None
    both_trivial: bool


def main() -> str:
    """Return the tables of verdicts and of steps to a level, in Markdown."""
    ends, steps = collected()
    start = ["study", "point", "n"]
    middle = ["difference to window 1", "p", "p, sign flip", "adjusted p", "power", "seeds needed"]
    headers = ["study", "point", "verdict", "n", *middle]
    tables = [_markdown(headers, [_line(*pair) for pair in decided(ends)])]
    soon = [
        [each.study, each.point, str(each.difference.pairs), change(each.difference), chances(each.difference.p)]
        for each in steps
        if _ever(each.row, each.difference)
    ]
    tables.append(_markdown([*start, "steps, difference to window 1", "p, unadjusted"], soon))
    return "\n".join(tables)


def collected() -> tuple[list[Compared], list[Compared]]:
    """Return the comparisons of complete studies, by the endpoint and by the steps to a level."""
    ends: list[Compared] = []
    steps: list[Compared] = []
    for folder in STUDIES:
        found = report.findings(report.read(folder))
        if unfinished(found.record):
            continue
        for task in found.tasks:
            points = [name(found.record, row.point) for row in task.primary.rows]
            trivial = [task.both_trivial(place) for place in range(len(points))]
            ends += _compared(folder.name, points, trivial, task.primary, task.endpoint.margin)
            steps += _compared(folder.name, points, trivial, task.speed.comparison) if task.speed else []
    return ends, steps


def unfinished(record: StudyRecord) -> bool:
    """Return whether a trial of the study still has no outcome."""
    return any(trial.status in ("pending", "running") for trial in record.trials)


def decided(ends: list[Compared]) -> list[tuple[Compared, Decision]]:
    """Correct all comparisons as one family."""
    decisions = decide([each.difference for each in ends], [each.margin for each in ends])
    pairs = zip(ends, decisions, strict=True)
    return [(each, replace(decision, both_trivial=each.both_trivial)) for each, decision in pairs]


def _line(each: Compared, decision: Decision) -> list[str]:
    difference = each.difference
    study, point, pairs = _start(each)
    return [
        study,
        point,
        qualified(decision),
        pairs,
        change(difference),
        chances(decision.deciding_p[0]),
        chances(difference.paired.p_sign_flip) if difference.paired else NOTHING,
        chances(decision.deciding_p[1]),
        NOTHING if decision.power is None else f"{decision.power:.2f}",
        seeds_needed(decision) if decision.verdict == "undecided" else "",
    ]


def _start(each: Compared) -> list[str]:
    return [f"[{each.study}]({each.study}/report.html)", each.point, str(each.difference.pairs)]


def _compared(
    study: str, points: list[str], trivial: list[bool], comparison: Comparison, margin: float | None = None
) -> list[Compared]:
    rows = zip(points, comparison.rows, trivial, strict=True)
    return [Compared(study, point, row, row.against, margin, guess) for point, row, guess in rows if row.against]


def _ever(row: Row, difference: Difference) -> bool:
    """Return whether a seed of either side reached the level."""
    return any(point.lost < len(point.scores) for point in (row.point, difference.reference))


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ratios(difference: Difference) -> tuple[float, float, float] | None:
    """Return the score with the window over the score at window 1, and the ends of its 95% interval.

    An additive difference d becomes 1 + d / m, with m the mean at window 1 taken as exact. None without an interval.
    """
    ends = difference.effect_interval
    if ends is None:
        return None
    found = difference.effect, ends.low, ends.high
    if not difference.measure.log:
        found = tuple(1 + value / difference.reference.mean for value in found)
    middle, low, high = (min(max(value, LOWEST), HIGHEST) for value in found)
    return middle, low, high


def draw(target: Path = FIGURE) -> None:
    """Write the figure: every declared comparison of the page as a ratio to window 1."""
    rows = [(each, decision, found) for each, decision in decided(collected()[0]) if (found := ratios(each.difference))]
    labels = [shortened(f"{each.study}: {each.point}", 60) for each, *_ in rows]
    notes = [f"{qualified(decision)}, n {each.difference.pairs}" for each, decision, _ in rows]
    left, wide, tall = 0.2 + 0.073 * max(map(len, labels)), 3.6, 0.3 * len(rows)
    right = 0.3 + 0.066 * max(map(len, notes))
    title = "Every declared comparison: score with the window over the score at window 1"
    with style():
        figure = Figure(figsize=(left + wide + right, tall + 1.3))
        headline(figure, title)
        axes = inches(figure, left=left, bottom=0.65, width=wide, height=tall)
        axes.set_xscale("log")
        axes.set(xlim=(LOWEST, HIGHEST), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=labels)
        axes.set_xticks(TICKS, [f"{TIMES}{tick:g}" for tick in TICKS])
        axes.set_xticks([], minor=True)
        tidy(axes, "x")
        axes.tick_params(axis="y", length=0, pad=6)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines["left"].set_visible(False)
        axes.axvline(1, color=INK, linewidth=0.9)
        for place, (_, decision, (middle, low, high)) in enumerate(rows):
            colour = colour_of(decision)
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([middle], [place], marker="D", markersize=5, color=colour, markeredgewidth=0)
            height = 1 - (place + 0.5) / len(rows)
            axes.text(1.02, height, notes[place], transform=axes.transAxes, va="center", fontsize=8.5, color=colour)
        near = math.log(1 / LOWEST) / math.log(HIGHEST / LOWEST)
        for text, side, place in (("\N{LEFTWARDS ARROW} window ahead", "right", near - 0.012),
                                  ("window behind \N{RIGHTWARDS ARROW}", "left", near + 0.012)):  # fmt: skip
            axes.text(place, 1.01, text, transform=axes.transAxes, ha=side, va="bottom", fontsize=8, color=MUTED)
        words = "Bar: 95% interval of the single comparison, cut at the edges. Verdicts: adjusted for all rows."
        write(figure, EDGE, 0.16, words, fontsize=8, color=MUTED)
        described = "; ".join(f"{label}: {TIMES}{found[0]:.3g}, {note}" for label, note, (*_, found) in
                              zip(labels, notes, rows, strict=True))  # fmt: skip
        target.write_text(save(figure, "overview", title, described).svg, encoding="utf-8")


def update(page: Path = PAGE) -> None:
    """Replace the tables of the page by those with the same header; print the others."""
    text = page.read_text(encoding="utf-8")
    for table in main().split("\n\n"):
        table = table.strip()
        begin = text.find(f"\n{table.splitlines()[0]}\n") + 1
        if not begin:
            print(table, end="\n\n")
            continue
        text = text[:begin] + table + text[text.index("\n\n", begin) :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    draw()
    update()
