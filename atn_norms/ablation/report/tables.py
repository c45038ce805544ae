"""The tables of a report, for a terminal, a program, Markdown and LaTeX."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atn_norms.ablation.analysis.comparison import Comparison, Difference, Row, score_name
from atn_norms.ablation.analysis.intervals import Interval
from atn_norms.ablation.report.findings import Findings, TaskFindings, findings
from atn_norms.ablation.report.names import (
    AT_LEAST,
    NOTHING,
    called_baseline,
    chance,
    chances,
    change,
    labels,
    leaf,
    lower,
    marked,
    never,
    number,
    qualified,
    seeds_needed,
    unfinished,
    verdict,
)
from atn_norms.ablation.store.records import StudyRecord

NUMERIC = ("mean", "geometric mean", "median", "n", "p", "adjusted p", "power", "seeds needed")
HEAD = 13  # characters in a line of a header in LaTeX
FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"  # shrinks tables wider than the page
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "^": r"\textasciicircum{}",
    "_": r"\_", "~": r"\textasciitilde{}", "%": r"\%", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`headers` and `rows` are texts to print; `records` has the same rows as JSON values, with None for no number."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    records: tuple[dict[str, Any], ...]


def table(record: StudyRecord | Findings, reach: Mapping[str, float] | None = None) -> Table:
    """Return all tasks in one table, as the command line prints it; `record` and `reach` as in `write`."""
    found = record if isinstance(record, Findings) else findings(record, reach)
    parts = [(each, final_table(found.record, each)) for each in found.tasks]
    rows = [(each.task, each.facts.metric, *row) for each, part in parts for row in part.rows]
    headers = ("task", "metric", *(parts[0][1].headers if parts else ()))
    records = tuple(entry for each, _ in parts for entry in _records(found.record, each))
    return Table(found.record.name, headers, tuple(rows), records)


def verdict_table(record: StudyRecord, task: TaskFindings) -> Table | None:
    """Return the declared comparisons of a task with their verdicts; None if there are none."""
    base = called_baseline(record)
    effect = "ratio" if task.primary.measure.log else "difference"
    headers = (
        *map(leaf, record.axes),
        "n",
        f"{effect} to {base}",
        "p",
        "adjusted p",
        "power",
        "seeds needed",
        "verdict",
    )
    rows = [
        (
            *labels(record, row.point).values(),
            str(decision.difference.pairs),
            change(decision.difference),
            chances(decision.deciding_p[0]),
            chances(decision.deciding_p[1]) if decision.difference.paired else NOTHING,
            NOTHING if decision.power is None else f"{decision.power:.2f}",
            seeds_needed(decision) if decision.verdict == "undecided" else "",
            qualified(decision),
        )
        for row, decision in task.decided()
    ]
    title = f"{task.task}: verdicts on {task.primary.measure.name}, {lower(task.primary.measure.goal)} is better"
    return Table(marked(record, title), headers, tuple(rows), ()) if rows else None


def final_table(record: StudyRecord, task: TaskFindings) -> Table:
    """Return every distinct point of a task by its test metric."""
    title = f"{task.task}: {score_name(task.facts.metric)}, {lower(task.facts.goal)} is better"
    return _table(record, title, task.final, task.windowed)


def speed_table(record: StudyRecord, task: TaskFindings) -> Table | None:
    """Return every distinct point of a task by its steps to the level; None without a level."""
    if task.speed is None:
        return None
    return _table(
        record, f"{task.task}: {speed_words(task)}, fewer is better", task.speed.comparison, task.speed.windowed
    )


def speed_words(task: TaskFindings) -> str:
    """Return the name of the level: `steps to a validation mean squared error of 0.0456`."""
    return f"steps to a validation {task.facts.metric} of {number(task.level.value)}"


def _table(record: StudyRecord, title: str, comparison: Comparison, contrast: Comparison | None) -> Table:
    log = comparison.measure.log
    tuned = [f"{leaf(axis)} (tuned)" for axis in record.tune]
    headers = [*map(leaf, record.axes), *tuned, "seeds", "geometric mean" if log else "mean", "median"]
    base, effect = called_baseline(record), "ratio" if log else "difference"
    if comparison.has_reference:
        headers += [f"{effect} to {base}", f"ahead of {base} at"]
    if contrast:
        headers += [f"{effect} to window 1", "ahead of window 1 at"]
    rows = []
    for place, row in enumerate(comparison.rows):
        chosen = [row.point.tuned.get(axis, NOTHING) for axis in record.tune]
        text = [*labels(record, row.point).values(), *chosen, seeds(row), *_averages(row)]
        if comparison.has_reference:
            text += [_against(row), chance(row.against) if row.against else ""]
        if contrast:
            against = contrast.rows[place].against
            text += [change(against) if against else "", chance(against) if against else ""]
        rows.append(tuple(text))
    return Table(title, tuple(headers), tuple(rows), ())


def _averages(row: Row) -> tuple[str, str]:
    point = row.point
    limit = point.measure.limit
    if limit is None:
        return number(point.mean), number(point.median)
    return (AT_LEAST if point.lost else "") + number(point.mean), number(point.median, "never")


def _against(row: Row) -> str:
    if row.is_reference:
        return "baseline"
    return change(row.against) if row.against else NOTHING


def seeds(row: Row) -> str:
    """Return the number of seeds with a value, and the status of the others."""
    point = row.point
    wrong, missed = unfinished(point), never(point)
    own = f"{len(point.values)} of {len(point.trials)} ({wrong})" if wrong else str(len(point.trials))
    return f"{own}; {missed}" if missed else own


def _records(record: StudyRecord, task: TaskFindings) -> list[dict[str, Any]]:
    found = []
    for place, row in enumerate(task.final.rows):
        point = row.point
        entry = {
            "task": task.task,
            "metric": task.facts.metric,
            "goal": task.facts.goal,
            "point": labels(record, point),
            "cells": [{axis: label for axis, label in cell.items() if axis != "task"} for cell in point.cells],
            "trials": dict(point.counts),
            **_statistics(task.final, task.windowed, place),
            "is_baseline": row.is_reference,
            "decision": _decision(task, place),
        }
        if record.tune:
            entry["tuned"] = dict(point.tuned)
        if task.speed:
            steps = task.speed.comparison.rows[place].point
            entry["steps_to_level"] = {
                "level": task.level.value,
                "limit": task.level.limit,
                "never": steps.lost,
                **_statistics(task.speed.comparison, task.speed.windowed, place),
            }
        found.append(entry)
    return found


def _statistics(comparison: Comparison, contrast: Comparison | None, place: int) -> dict[str, Any]:
    row = comparison.rows[place]
    found = {
        "mean": plain(row.point.mean),
        "mean_interval": ends(row.point.interval),
        "median": plain(row.point.median),
        "against_baseline": _numbers(row.against),
    }
    return found | ({"against_window_1": _numbers(contrast.rows[place].against)} if contrast else {})


def plain(value: float) -> float | None:
    """Return a finite number for a file, or None."""
    return value if math.isfinite(value) else None


def ends(interval: Interval | None) -> list[float] | None:
    """Return the ends of an interval for a file, or None."""
    return [interval.low, interval.high] if interval else None


def _numbers(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "effect": "ratio" if difference.measure.log else "difference",
        "estimate": plain(difference.effect),
        "interval": ends(difference.effect_interval),
        "p": difference.p,
        "pairs": difference.pairs,
        "probability_of_improvement": plain(difference.improvement),
        "probability_interval": ends(difference.chance),
        "verdict": difference.verdict,
    }


def _decision(task: TaskFindings, place: int) -> dict[str, Any] | None:
    """Return the verdict of a declared comparison as JSON values."""
    decision = task.decisions.get(place)
    if decision is None:
        return None
    return {
        "endpoint": task.primary.measure.name,
        **(_numbers(decision.difference) or {}),
        "adjusted_p": decision.p,
        "margin": None if decision.margin is None else task.endpoint.margin,
        "adjusted_p_equivalence": decision.p_equivalence,
        "family": decision.family,
        "power": decision.power,
        "seeds_needed": decision.needed,
        "verdict": verdict(decision),
        "both_worse_than_a_guess": decision.both_trivial,
    }


def printed(found: Findings) -> list[Table]:
    """Return the tables of every task, in the order of the page."""
    kinds = (verdict_table, final_table, speed_table)
    parts = [kind(found.record, task) for task in found.tasks for kind in kinds]
    return [part for part in parts if part]


def markdown(found: Findings) -> str:
    """Return the tables in Markdown."""
    parts = []
    for part in printed(found):
        rule = ["---:" if header in NUMERIC else "---" for header in part.headers]
        lines = [part.headers, rule, *part.rows]
        cells = [[cell if line is rule else _markdown(cell) for cell in line] for line in lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        parts.append(f"### {_markdown(part.title)}\n\n{body}\n")
    return "\n".join(parts)


def _markdown(text: str) -> str:
    text = re.sub(r"[\r\n\t ]+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}|#~$]|(?<=\])\()", r"\\\1", text)


def latex(found: Findings) -> str:
    """Return the tables in LaTeX, for the packages booktabs and graphicx."""
    parts = ["% \\usepackage{booktabs,graphicx}"]
    for part in printed(found):
        columns = "".join("r" if header in NUMERIC else "l" for header in part.headers)
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in part.rows]
        head = " & ".join(map(_stacked, part.headers, columns)) + r" \\"
        rows = ["\\toprule", head, "\\midrule", *lines, "\\bottomrule"]
        parts += [
            "\\begin{table}",
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
            f"\\caption{{{_latex(part.title)}}}",
            FITTED,
            f"\\begin{{tabular}}{{{columns}}}",
        ]
        parts += [*rows, "\\end{tabular}}", "\\end{table}", ""]
    return "\n".join(parts)


def _stacked(header: str, column: str) -> str:
    """Return a header in several short lines, about as wide as the numbers below."""
    lines = textwrap.wrap(header, HEAD, break_long_words=False, break_on_hyphens=False)
    if len(lines) < 2:
        return _latex(header)
    stack = r"\\".join(map(_latex, lines))
    return rf"\shortstack[{column}]{{{stack}}}"


def _latex(text: str) -> str:
    # LaTeX would read a bracket after the end of a row as an optional argument.
    return "".join(_LATEX.get(sign, sign) for sign in re.sub(r"[\r\n\t ]+", " ", text)).replace("[", "{[}")
