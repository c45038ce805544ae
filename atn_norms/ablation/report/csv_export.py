"""The numbers of a study as CSV: every trial, every point, every measured step."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from atn_norms.ablation.analysis.comparison import Difference, outcome
from atn_norms.ablation.analysis.decision import Decision
from atn_norms.ablation.analysis.intervals import Interval
from atn_norms.ablation.grid.functions import declared_steps
from atn_norms.ablation.report.findings import Findings, TaskFindings
from atn_norms.ablation.report.names import called_baseline, labels, verdict
from atn_norms.ablation.store.records import StudyRecord, TrialRecord

NO_REASON = "the loss grew without bound"  # shown for a diverged trial without a reason
LEAST_ID = 8  # characters of a trial's id in the files


def short_ids(ids: Sequence[str]) -> dict[str, str]:
    """Return the first characters of each id: eight, or as many as distinguish all ids.

    >>> short_ids(["0123456789abcdef", "0123456799abcdef"])
    {'0123456789abcdef': '012345678', '0123456799abcdef': '012345679'}
    """
    size = LEAST_ID
    while len({each[:size] for each in ids}) < len(set(ids)):
        size += 1
    return {each: each[:size] for each in ids}


def results_csv(found: Findings) -> str:
    """Return a line for every trial, whatever its status; the label is `any` if an axis has no effect on it.

    `reached_at` is empty if the trial has not ended, or did not reach the level within `level_limit` steps. `trial` has
    the first characters of the id, which distinguish the trials of the study. Axes have the columns of `_axis_columns`.
    """
    record = found.record
    short = short_ids([trial.id for trial in record.trials])
    extra = sorted({key for trial in record.trials for key in _metrics(record, trial)})
    others = ["seed", "status", "metric", "test", "validation", *extra, "step", "steps", "scored_step", "level"]
    others += ["level_limit", "reached_at", "seconds", "attempts", "host", "reason", "trial"]
    headers = ["task", *_axis_columns(record, others), *others]
    tasks = {task.task: task for task in found.tasks}
    points = [row.point for task in found.tasks for row in task.final.rows]
    known = {trial.id: labels(record, point) for point in points for trial in point.candidates}
    reached = {name: step for task in found.tasks for name, step in _reached(task).items()}
    lines = []
    for trial in record.trials:
        task, axes, run = tasks.get(task_of(trial)), known.get(trial.id, {}), trial.run or {}
        metric = task.facts.metric if task else ""
        line = [task_of(trial), *(axes.get(axis, "") for axis in record.axes)]
        line += [trial.points[0].get(axis, "") if trial.points else "" for axis in record.tune]
        line += [trial.seed, outcome(record, trial), metric]
        line += [_metric(trial, split, metric) for split in ("test", "validation")]
        line += [_metrics(record, trial).get(key, "") for key in extra]
        steps = declared_steps(trial.trial)
        line += [(trial.result or {}).get("step", ""), "" if steps is None else steps, scored_step(record, trial)]
        line += [task.level.value, task.level.limit] if task and task.speed else ["", ""]
        line += [reached.get(trial.id, ""), run.get("seconds", ""), run.get("attempts", ""), run.get("host", "")]
        lines.append([*line, reason(record, trial), short[trial.id]])
    return _csv(headers, lines)


def _axis_columns(record: StudyRecord, others: Sequence[str]) -> list[str]:
    """Return the columns of the axes and of the tuned options: `NAME`, and `NAME (tuned)`.

    A name of another column, or one that begins like that of a metric (`test ` or `validation `), becomes `axis NAME`.
    """
    columns: list[str] = []
    for column in [*record.axes, *(f"{axis} (tuned)" for axis in record.tune)]:
        while column in (*others, *columns) or column.startswith(("test ", "validation ")):
            column = f"axis {column}"
        columns.append(column)
    return columns


def _reached(task: TaskFindings) -> dict[str, int]:
    """Return trial -> step at which it reached the level, for the trials that did."""
    if task.speed is None:
        return {}
    measure = task.speed.comparison.measure
    found = {t.id: measure.score(t) for row in task.speed.comparison.rows for t in row.point.candidates}
    return {name: int(step) for name, step in found.items() if step is not None and step < float("inf")}


def points_csv(found: Findings) -> str:
    """Return a line for every point, measure and reference of every task, in full precision.

    Axes have the columns of `_axis_columns`.
    """
    record = found.record
    first = ["task", "measure", "goal"]
    others = ["seeds", "counted", "without_number", "mean", "mean_low", "mean_high", "median", *_COMPARED]
    headers = [*first, *_axis_columns(record, [*first, *others]), *others]
    lines = []
    for task in found.tasks:
        measures = [(task.final.measure.name, task.final, task.windowed)]
        if task.primary is not task.final and task.endpoint.measure == "tail":
            measures.insert(0, (task.primary.measure.name, task.primary, None))
        if task.speed:
            steps = f"steps to a validation {task.facts.metric} of {task.level.value!r}"
            measures.append((steps, task.speed.comparison, task.speed.windowed))
        for called, comparison, contrast in measures:
            for place, row in enumerate(comparison.rows):
                point, goal = row.point, comparison.measure.goal
                line = [task.task, called, goal, *labels(record, point).values()]
                line += [*(point.tuned.get(axis, "") for axis in record.tune), len(point.trials), len(point.values)]
                line += [point.lost, point.mean, *_ends(point.interval), point.median]
                compared = [(called_baseline(record), row.against)]
                if contrast:
                    compared.append(("window 1", contrast.rows[place].against))
                decision = task.decisions.get(place) if comparison is task.primary else None
                rows = [
                    _compared(name, against, decision if decision and against is decision.difference else None)
                    for name, against in compared
                    if against
                ]
                lines += [[*line, *against] for against in rows or [[""] * len(_COMPARED)]]
    return _csv(headers, lines)


_COMPARED = (
    *("against", "effect", "estimate", "low", "high", "pairs", "method", "p", "p_sign_flip", "improvement"),
    *("improvement_low", "improvement_high", "role", "adjusted_p", "margin", "adjusted_p_equivalence", "power"),
    *("seeds_needed", "verdict", "both_worse_than_a_guess"),
)


def _compared(name: str, difference: Difference, decision: Decision | None) -> list[Any]:
    """Return the fields of `_COMPARED`; `role` is `primary` for a declared comparison, otherwise `exploratory`."""
    paired = difference.paired
    line = [name, "ratio" if difference.measure.log else "difference", difference.effect]
    line += [*_ends(difference.effect_interval), difference.pairs]
    line += [paired.method, paired.p, paired.p_sign_flip] if paired else ["", "", ""]
    line += [difference.improvement, *_ends(difference.chance)]
    if decision is None:
        return [*line, "exploratory", "", "", "", "", "", difference.verdict, ""]
    size = None if decision.margin is None else difference.measure.unscaled(decision.margin)
    line += ["primary", decision.p, size, decision.p_equivalence, decision.power, decision.needed]
    return [*line, verdict(decision), decision.both_trivial]


def _ends(interval: Interval | None) -> tuple[float, float] | tuple[None, None]:
    return (interval.low, interval.high) if interval else (None, None)


def curves_csv(found: Findings) -> str:
    """Return every learning curve, with a line for each measured step; `trial` is that of results.csv.

    Training losses of a trial with validations have 9 significant digits, as float32 has. A report reads them for no
    other trial, so it is the same when it is written again from the file.
    """
    headers = ["trial", "step", "train_loss", "validation"]
    short = short_ids([trial.id for trial in found.record.trials])
    return _csv(headers, (line for trial in found.record.trials for line in _curve(trial, short[trial.id])))


def _curve(trial: TrialRecord, name: str) -> Iterator[list[Any]]:
    validated = any(line.get("validation") is not None for line in trial.curve)
    for line in trial.curve:
        loss = line.get("train_loss")
        if validated and loss is not None:
            loss = float(f"{loss:.9g}")
        yield [name, line["step"], loss, line.get("validation")]


def task_of(trial: TrialRecord) -> str:
    """Return the task label of a trial."""
    return trial.points[0].get("task", "") if trial.points else ""


def reason(record: StudyRecord, trial: TrialRecord) -> str:
    """Return the reason why a trial has no result or ended early, in one line; empty otherwise."""
    if trial.status == "failed":
        return str((trial.error or {}).get("error") or "no reason was recorded")
    if outcome(record, trial) == "diverged":
        return str((trial.result or {}).get("reason") or NO_REASON)
    return str((trial.result or {}).get("reason") or "")


def scored_step(record: StudyRecord, trial: TrialRecord) -> int | None:
    """Return the step whose weights were scored: the last, or with `keep: best` the first best validation."""
    result = trial.result or {}
    if trial.trial["train"].get("keep") != "best" or not result.get("metrics"):
        return result.get("step") if result.get("metrics") else None
    sign = 1 if record.tasks[task_of(trial)].goal == "min" else -1
    looks = [(sign * line["validation"], line["step"]) for line in trial.curve if line.get("validation") is not None]
    return min(looks)[1] if looks else None


def _metric(trial: TrialRecord, split: str, metric: str) -> Any:
    value = _splits(trial).get(split, {}).get(metric)
    return "" if value is None else value


def _metrics(record: StudyRecord, trial: TrialRecord) -> dict[str, Any]:
    """Return the numbers of a result other than the metric of the task."""
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


def _csv(headers: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Format lines; a text that a spreadsheet would execute as a formula gets an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_field, headers))
    writer.writerows(map(_field, line) for line in lines)
    return out.getvalue()


def _field(value: Any) -> str:
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        return repr(value)
    if value[:1] in ("=", "+", "-", "@", "\t", "\r") and not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value):
        return f"'{value}"
    return value
