"""The answer in words, made from the statistics: no direction is claimed without its interval beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

from atn_norms.ablation.analysis.comparison import Comparison, Difference, Row, outcome
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS
from atn_norms.ablation.grid.resolve import axis_path
from atn_norms.ablation.report.findings import Findings, Speed, TaskFindings
from atn_norms.ablation.report.names import (
    average,
    called_baseline,
    change,
    leaf,
    listed,
    lower,
    name,
    never,
    number,
    plural,
    share,
)
from atn_norms.ablation.store.records import StudyRecord

_ORDER = ("done", "diverged", "failed", "running", "pending")
_MOST_NAMED = 3
Words = tuple[Literal["better", "faster"], Literal["worse", "slower"]]
_QUALITY: Words = ("better", "worse")
_SPEED: Words = ("faster", "slower")


def question(record: StudyRecord) -> list[tuple[str, str]]:
    """What was asked: what was varied, on what, how often, and against what."""
    axes = [f"{leaf(axis)}: {', '.join(values)}" for axis, values in record.axes.items()]
    tasks = [f"{task} ({facts.metric}, {lower(facts.goal)} is better)" for task, facts in record.tasks.items()]
    seeds = len({trial.seed for trial in record.trials})
    found = [("Varied", "; ".join(axes) or "nothing: a single configuration"), ("Tasks", "; ".join(tasks))]
    for section in ("model", "train"):
        options = _fixed(record, section)
        if options:
            found.append(({"model": "Model", "train": "Training"}[section], _options(options)))
    found.append(("Seeds", f"{seeds}, {plural(len(record.trials), 'trial')} in all"))
    if record.baseline:
        found.append(("Baseline", f"{called_baseline(record)}, at the same seeds and otherwise the same"))
    return found


def _fixed(record: StudyRecord, section: str) -> dict[str, Any]:
    """What the study says of a section, without what an axis puts its own values over."""
    options = deepcopy(record.study.get(section))
    if not isinstance(options, dict):
        return {}
    for axis in record.axes:
        *parents, last = axis_path(axis)
        inner: Any = {section: options}
        for key in parents:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return {key: each for key, each in options.items() if each != {}}


def _options(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_options(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_options, value))
    return str(value) if isinstance(value, str) else json.dumps(value)


def coverage(record: StudyRecord) -> str:
    """How many trials ended how."""
    ends = [outcome(record, trial) for trial in record.trials]
    counts = {status: ends.count(status) for status in _ORDER}
    if counts["done"] == len(record.trials):
        return f"All {plural(len(record.trials), 'trial')} finished." if record.trials else "The study has no trials."
    rest = [f"{count} {status}" for status, count in counts.items() if count and status != "done"]
    return f"Of {plural(len(record.trials), 'trial')}, {counts['done']} finished; {listed(rest)}."


def caution(found: Findings) -> str:
    """A plain word where the seeds are too few for any conclusion."""
    pairs = [row.against.pairs for task in found.tasks for row in task.final.rows if row.against]
    most = max(pairs, default=0)
    if not pairs or most >= ENOUGH_SEEDS:
        return ""
    return (
        f"With {plural(most, 'seed')} to compare, nothing here is a conclusion: a difference may well be chance, "
        f"and this report claims none on fewer than {ENOUGH_SEEDS}. The numbers say what happened at these seeds."
    )


def answer(found: Findings, task: TaskFindings) -> list[str]:
    """The answer for a task, in three sentences: the best point, what the window did, and how soon they learn."""
    record = found.record
    if task.final.best is None:
        return [f"No trial of {task.task} has finished."]
    said = [_best(record, task, task.final.best)]
    if task.windowed:
        said += _against("window 1 of the same normalizer", record, task.windowed, _QUALITY)
    if task.speed:
        said.append(_soonest(record, task, task.speed))
    else:
        said.append(f"There is no level whose first reaching could be timed: {task.level.why}.")
    return said


def _best(record: StudyRecord, task: TaskFindings, best: Row) -> str:
    """The best point, how it compares with the baseline, and how many others do."""
    comparison, base = task.final, called_baseline(record)
    if len(comparison.rows) == 1:
        alone = "with nothing in the study to compare it with"
        return f"The {task.facts.metric} is {average(best.point)} on average, {alone}."
    superlative = {"min": "lowest", "max": "highest"}[task.facts.goal]
    what = f"The {superlative} {task.facts.metric}, averaged over seeds,"
    lead = f"{what} is {average(best.point)} ({_leader(record, comparison, best)}){_no_better_than_trivial(task, best)}"
    if not comparison.has_reference:
        return f"{lead}; there is no baseline in the study to compare it with."
    if not best.is_reference and not (best.against and best.against.pairs):
        lead += "; the baseline has no finished seed to compare it with"
    elif best.against:
        lead += f": {_told(best.against, base, _QUALITY)}"
    compared = [row for row in comparison.rows if row.against]
    others = [row for row in compared if row is not best]
    if not others or all(row.against and row.against.pairs < ENOUGH_SEEDS for row in compared):
        return f"{lead}."
    return f"{lead}; against {base}, {_verdicts(record, compared, _QUALITY)}."


def _leader(record: StudyRecord, comparison: Comparison, best: Row) -> str:
    """The best point by its name, and those whose mean is the same, with as few seeds that never got there."""
    mark = best.point.mean, best.point.lost
    tied = [row for row in comparison.rows if row is not best and (row.point.mean, row.point.lost) == mark]
    words = name(record, best.point) + (", the baseline" if best.is_reference and comparison.has_reference else "")
    if not tied:
        return words
    many = len(tied) > _MOST_NAMED
    others = plural(len(tied), "other point") if many else " and ".join(name(record, row.point) for row in tied)
    return f"{words}, tied with {others}"


def _no_better_than_trivial(task: TaskFindings, best: Row) -> str:
    """Where the best point on average scores no better than a predictor that learns nothing: that one."""
    sign = 1 if task.facts.goal == "min" else -1
    ahead = [(label, value) for label, value in task.facts.baselines.items() if sign * value <= sign * best.point.mean]
    if not ahead:
        return ""
    label, value = min(ahead, key=lambda each: sign * each[1])
    return f", no better than the trivial predictor “{label}”, {number(value)}"


def _told(against: Difference, base: str, words: Words) -> str:
    """A difference with all that is known about it."""
    hedge = ", which does not tell the two apart" if against.verdict == "undecided" else ""
    return f"{change(against)} against {base}, {words[0]} at {share(against)} seeds{hedge}"


def _against(base: str, record: StudyRecord, comparison: Comparison, words: Words) -> list[str]:
    compared = [row for row in comparison.rows if row.against]
    if not any(row.against and row.against.pairs for row in compared):
        return []
    if all(row.against and row.against.pairs < ENOUGH_SEEDS for row in compared):
        sign = 1 if comparison.measure.goal == "min" else -1
        ahead = sum(bool(row.against and sign * row.against.mean < 0) for row in compared)
        which = "ahead on average" if words[0] == "better" else "sooner on average"
        verb = "is" if ahead == 1 or len(compared) == 1 else "are"
        return [
            f"Against {base}, {ahead} of {plural(len(compared), 'point')} "
            f"{verb} {which}, which so few seeds cannot tell from chance."
        ]
    return [f"Against {base}, {_verdicts(record, compared, words)}."]


def _verdicts(record: StudyRecord, rows: Sequence[Row], words: Words) -> str:
    """How many points are better, worse and neither; the few that are told apart with their intervals."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.against:
            groups.setdefault(row.against.verdict if row.against.pairs else "no pair", []).append(row)
    said = {"better": words[0], "worse": words[1], "undecided": "undecided"}
    told = []
    for verdict, word in said.items():
        found = groups.get(verdict, [])
        if found:
            are = "is" if len(found) == 1 else "are"
            told.append(f"{len(found)}{_of(rows, told)} {are} {word}{_named(record, found, verdict)}")
    lacks = {"too few seeds": f"fewer than {ENOUGH_SEEDS} seeds to compare", "no pair": "no seed to compare"}
    for verdict, what in lacks.items():
        if few := len(groups.get(verdict, [])):
            told.append(f"{few}{_of(rows, told)} {'has' if few == 1 else 'have'} {what}")
    return listed(told)


def _of(rows: Sequence[Row], told: Sequence[str]) -> str:
    return "" if told else f" of {plural(len(rows), 'point')}"


def _named(record: StudyRecord, rows: Sequence[Row], verdict: str) -> str:
    if verdict not in ("better", "worse"):
        return ""
    if len(rows) > _MOST_NAMED:
        return " (each with its interval in the table)"
    named = [f"{name(record, row.point)}: {change(row.against)}" for row in rows if row.against]
    return f" ({'; '.join(named)})"


def _soonest(record: StudyRecord, task: TaskFindings, speed: Speed) -> str:
    """Who learns soonest, and whether a window makes it sooner."""
    level, words = task.level, _SPEED
    what = f"A validation {task.facts.metric} of {number(level.value)} is reached"
    best = speed.comparison.best
    if best is None or best.point.lost == len(best.point.scores):
        return f"{what} by no point within {level.limit} steps."
    missed = f", {never(best.point)} seeds" if best.point.lost else ""
    who = f" soonest by {_leader(record, speed.comparison, best)}," if len(speed.comparison.rows) > 1 else ""
    lead = f"{what}{who} after {average(best.point, ' steps')} on average{missed}"
    if best.against and best.against.pairs:
        lead += f": {_told(best.against, called_baseline(record), words)}"
    contrast = _against("window 1 of the same normalizer", record, speed.windowed, words) if speed.windowed else []
    return "; ".join([lead, *(part[0].lower() + part[1:-1] for part in contrast)]) + "."
