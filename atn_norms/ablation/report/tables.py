"""The numbers as tables: for a terminal, a program, Markdown, LaTeX and a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atn_norms.ablation.comparison import Comparison, Difference, Row, compare, outcome
from atn_norms.ablation.records import StudyRecord, TrialRecord
from atn_norms.ablation.report.names import NOTHING, change, labels, leaf, number, share, unfinished

_NUMERIC = ("mean", "median")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "^": r"\textasciicircum{}",
    "_": r"\_", "~": r"\textasciitilde{}", "%": r"\%", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--", "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`headers` and `rows` as text to print; `records` the same rows as JSON values, None where there is no number."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    records: tuple[dict[str, Any], ...]


def contrasts(record: StudyRecord) -> tuple[Comparison, ...] | None:
    """Every point against window 1 of the same normalizer, where the study has it and does not compare so anyway."""
    axis = next((axis for axis in record.axes if leaf(axis) == "window"), None)
    if axis is None or "1" not in record.axes[axis] or len(record.axes[axis]) == 1 or set(record.baseline) == {axis}:
        return None
    return compare(record, {axis: "1"})


def baseline_words(record: StudyRecord) -> str:
    """The baseline as a reader calls it: `none`, or `window 1`."""
    words = [label if leaf(axis) == "norm" else f"{leaf(axis)} {label}" for axis, label in record.baseline.items()]
    return ", ".join(words) or "the baseline"


def tables(record: StudyRecord) -> tuple[Table, ...]:
    """One table per task, a row per distinct point of the grid."""
    windowed = contrasts(record)
    pairs = zip(compare(record), windowed or [None] * len(record.tasks), strict=True)
    return tuple(_table(record, comparison, contrast) for comparison, contrast in pairs)


def table(record: StudyRecord) -> Table:
    """All tasks in one table, as the command line shows it."""
    parts = tables(record)
    tasks = zip(record.tasks, parts, strict=True)
    rows = [(task, record.tasks[task].metric, *row) for task, part in tasks for row in part.rows]
    headers = ("task", "metric", *(parts[0].headers if parts else ()))
    return Table(record.name, headers, tuple(rows), tuple(entry for part in parts for entry in part.records))


def _table(record: StudyRecord, comparison: Comparison, contrast: Comparison | None) -> Table:
    rows, records = [], []
    for place, row in enumerate(comparison.rows):
        against = contrast.rows[place].against if contrast else None
        point = row.point
        text = [*labels(record, point).values(), seeds(row), number(point.mean), number(point.median)]
        if comparison.has_reference:
            text += [_against(row), share(row.against) if row.against else ""]
        if contrast:
            text += [change(against) if against else "", share(against) if against else ""]
        rows.append(tuple(text))
        records.append(
            {
                "task": comparison.task,
                "metric": record.tasks[comparison.task].metric,
                "point": labels(record, point),
                "cells": [{axis: label for axis, label in cell.items() if axis != "task"} for cell in point.cells],
                "trials": dict(point.counts),
                "mean": _plain(point.mean),
                "mean_interval": [point.interval.low, point.interval.high] if point.interval else None,
                "median": _plain(point.median),
                "is_baseline": row.is_reference,
                "against_baseline": _numbers(row.against),
                **({"against_window_1": _numbers(against)} if contrast else {}),
            }
        )
    headers = [*map(leaf, record.axes), "seeds", "mean", "median"]
    if comparison.has_reference:
        headers += [f"against {baseline_words(record)}", "better at"]
    if contrast:
        headers += ["against window 1", "better at"]
    title = f"{comparison.task}: test {record.tasks[comparison.task].metric}, lower is better"
    return Table(title, tuple(headers), tuple(rows), tuple(records))


def _against(row: Row) -> str:
    if row.is_reference:
        return "baseline"
    return change(row.against) if row.against else NOTHING


def seeds(row: Row) -> str:
    """How many of a point's seeds have a value, and what became of the others."""
    point, wrong = row.point, unfinished(row.point)
    return f"{len(point.values)} of {len(point.trials)} ({wrong})" if wrong else str(len(point.trials))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "difference": _plain(difference.mean),
        "interval": [difference.interval.low, difference.interval.high] if difference.interval else None,
        "pairs": difference.pairs,
        "probability_of_improvement": _plain(difference.improvement),
        "verdict": difference.verdict,
    }


def markdown(record: StudyRecord) -> str:
    """The tables in Markdown."""
    parts = []
    for part in tables(record):
        rule = ["---:" if header in _NUMERIC else "---" for header in part.headers]
        lines = [part.headers, rule, *part.rows]
        cells = [[cell if line is rule else _markdown(cell) for cell in line] for line in lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        parts.append(f"### {_markdown(part.title)}\n\n{body}\n")
    return "\n".join(parts)


def _markdown(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}|#~$]|(?<=\])\()", r"\\\1", text)


def latex(record: StudyRecord) -> str:
    """The tables in LaTeX, for the booktabs package."""
    parts = ["% \\usepackage{booktabs}"]
    for part in tables(record):
        columns = "".join("r" if header in _NUMERIC else "l" for header in part.headers)
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in part.rows]
        head = " & ".join(map(_latex, part.headers)) + r" \\"
        rows = ["\\toprule", head, "\\midrule", *lines, "\\bottomrule"]
        parts += [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_latex(part.title)}}}",
            f"\\begin{{tabular}}{{{columns}}}",
        ]
        parts += [*rows, "\\end{tabular}", "\\end{table}", ""]
    return "\n".join(parts)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def results_csv(record: StudyRecord) -> str:
    """Every trial as a line, whatever became of it; `any` where an axis means nothing to it.

    Text that a spreadsheet would run as a formula is quoted with an apostrophe.
    """
    extra = sorted({key for trial in record.trials for key in _metrics(record, trial)})
    results = ["seed", "status", "metric", "test", "validation", *extra, "step", "seconds", "error", "trial"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_field, ["task", *record.axes, *results]))
    points = [row.point for comparison in compare(record) for row in comparison.rows]
    known = {trial.id: labels(record, point) for point in points for trial in point.trials}
    for trial in record.trials:
        task = task_of(trial)
        metric = record.tasks[task].metric if task in record.tasks else ""
        axes = known.get(trial.id, {})
        line = [task, *(axes.get(axis, "") for axis in record.axes), trial.seed, outcome(record, trial), metric]
        line += [_metric(trial, split, metric) for split in ("test", "validation")]
        line += [_metrics(record, trial).get(key, "") for key in extra]
        line += [
            (trial.result or {}).get("step", ""),
            (trial.run or {}).get("seconds", ""),
            reason(record, trial),
            trial.id,
        ]
        writer.writerow(map(_field, line))
    return out.getvalue()


def task_of(trial: TrialRecord) -> str:
    """The task label of a trial."""
    return trial.points[0].get("task", "") if trial.points else ""


def reason(record: StudyRecord, trial: TrialRecord) -> str:
    """Why a trial has no result, in one line; empty when it has one or is not there yet."""
    if trial.status == "failed":
        return str((trial.error or {}).get("error") or "no reason was recorded")
    if outcome(record, trial) == "diverged":
        step = (trial.result or {}).get("step")
        return "the loss grew out of all bounds" + (f" at step {step}" if step is not None else "")
    return ""


def _metric(trial: TrialRecord, split: str, metric: str) -> Any:
    value = _splits(trial).get(split, {}).get(metric)
    return "" if value is None else value


def _metrics(record: StudyRecord, trial: TrialRecord) -> dict[str, Any]:
    """What a result holds beside the task's own metric."""
    task = task_of(trial)
    own = record.tasks[task].metric if task in record.tasks else ""
    return {
        f"{split} {metric}": value
        for split, found in _splits(trial).items()
        for metric, value in found.items()
        if metric != own or split not in ("test", "validation")
    }


def _splits(trial: TrialRecord) -> Mapping[str, Mapping[str, Any]]:
    return (trial.result or {}).get("metrics") or {}


def _field(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value)
    if value[:1] in ("=", "+", "-", "@", "\t", "\r") and not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value):
        return f"'{value}"
    return value
