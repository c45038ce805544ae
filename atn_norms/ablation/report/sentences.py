"""Sentences of the report: the verdict and the answer, built from the statistics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from atn_norms.ablation.analysis.comparison import Comparison, Row, Verdict, outcome
from atn_norms.ablation.analysis.decision import Decision
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS
from atn_norms.ablation.analysis.time_to_target import level
from atn_norms.ablation.grid.resolve import axis_path
from atn_norms.ablation.report.findings import Findings, Speed, TaskFindings
from atn_norms.ablation.report.names import (
    TIMES,
    WORSE,
    average,
    called_baseline,
    chances,
    change,
    factor,
    interim,
    leaf,
    listed,
    lower,
    margin,
    name,
    never,
    number,
    unfinished,
)
from atn_norms.ablation.store.labels import label
from atn_norms.ablation.store.records import Status, StudyRecord
from atn_norms.errors import plural

_ORDER = ("done", "diverged", "failed", "running", "pending")
_MOST_NAMED = 3
_VERDICTS: tuple[Verdict, ...] = ("helps", "hurts", "no difference", "undecided")
# Sentences about points without a verdict, by the cause: the last one without which there would be a verdict.
_BLOCKED = {
    "failed": "A failed trial leaves the comparison undecided at {}: the missing score could be the worst.",
    "diverged": "A diverged trial leaves the comparison undecided at {}: the better side must end at every seed.",
    "unreached": "A trial that never reached the level leaves the comparison undecided at {}: its steps are unknown.",
}


def question(record: StudyRecord) -> list[tuple[str, str]]:
    """Return the setup of the study as terms with their descriptions."""
    axes = [f"{leaf(axis)}: {', '.join(values)}" for axis, values in record.axes.items()]
    given = record.study.get("tasks")
    names = {task: f"{task}: {label(options)}" for task, options in given.items()} if isinstance(given, dict) else {}
    tasks = [
        f"{names.get(task, task)} ({facts.metric}, {lower(facts.goal)} is better)"
        for task, facts in record.tasks.items()
    ]
    seeds = len({trial.seed for trial in record.trials})
    found = [("Varied", "; ".join(axes) or "nothing: a single configuration"), ("Tasks", "; ".join(tasks))]
    for section in ("model", "train"):
        options = _fixed(record, section)
        if options:
            found.append(({"model": "Model", "train": "Training"}[section], _options(options)))
    found.append(("Seeds", f"{seeds}, {plural(len(record.trials), 'trial')} in all"))
    if record.tune:
        words = [f"{leaf(axis)}: {', '.join(values)}" for axis, values in record.tune.items()]
        found.append(("Tuned", f"{'; '.join(words)}; each point at its best value on validation, scored on test"))
    if record.baseline:
        found.append(("Baseline", f"{called_baseline(record)}, at the same seeds and otherwise the same"))
    return found


def _fixed(record: StudyRecord, section: str) -> dict[str, Any]:
    """Return the options of a section of the study, without the options that an axis or `tune` replaces."""
    options = deepcopy(record.study.get(section))
    if not isinstance(options, dict):
        return {}
    for axis in (*record.axes, *record.tune):
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
    """Return a sentence with the number of trials by status."""
    ends = [outcome(record, trial) for trial in record.trials]
    counts = {status: ends.count(status) for status in _ORDER}
    if counts["done"] == len(record.trials):
        return f"All {plural(len(record.trials), 'trial')} finished." if record.trials else "The study has no trials."
    others = [f"{count} {status}" for status, count in counts.items() if count and status != "done"]
    return f"Of {plural(len(record.trials), 'trial')}, {counts['done']} finished; {listed(others)}."


def caution(found: Findings) -> str:
    """Return warnings about the seeds, trials that exclude a verdict, and tuned values that failed."""
    pairs = [decision.difference.pairs for task in found.tasks for _, decision in task.decided()]
    most = max(pairs, default=0)
    warnings = [*_ignored_seeds(found), *_blocked(found), *_failed_values(found)]
    if most and most < ENOUGH_SEEDS:
        warnings = [
            f"With {plural(most, 'seed')} to compare, every comparison is undecided: a verdict needs at least "
            f"{ENOUGH_SEEDS} seeds. A difference may be chance.",
            *warnings,
        ]
    return " ".join(warnings)


def _ignored_seeds(found: Findings) -> list[str]:
    """Return a sentence about the comparisons of points whose scores do not depend on the seed."""
    points = [
        _named(found, task, row)
        for task in found.tasks
        for row, decision in task.decided()
        if decision.difference.ignores_seed
    ]
    if not points:
        return []
    return [
        f"The seed has no effect: the scores of {_some(points, 'point')} are the same at every seed, and so are those "
        "of the baseline. So no verdict is possible."
    ]


def _blocked(found: Findings) -> list[str]:
    """Return sentences about the comparisons that are undecided only because a trial has no score, by the cause."""
    causes = list(_BLOCKED)
    points: dict[str, list[str]] = {cause: [] for cause in causes}
    for task in found.tasks:
        for row, decision in task.decided():
            if decision.blocked:
                last = next(i for i in range(len(causes)) if not decision.without(*causes[: i + 1]).blocked)
                points[causes[last]].append(_named(found, task, row))
    return [_BLOCKED[cause].format(_some(names, "point")) for cause, names in points.items() if names]


def _named(found: Findings, task: TaskFindings, row: Row) -> str:
    """Return the name of a point, with its task if the study has several."""
    return name(found.record, row.point) + (f" of {task.task}" if len(found.tasks) > 1 else "")


def _failed_values(found: Findings) -> list[str]:
    """Return sentences about the tuned values at which every trial of a point failed."""
    record, failed = found.record, dict[str, list[str]]()
    for task in found.tasks:
        for row in task.final.rows if record.tune else ():
            statuses: dict[str, set[Status]] = {}
            for trial in row.point.candidates:
                value = listed([f"{leaf(axis)} {trial.points[0][axis]}" for axis in record.tune])
                statuses.setdefault(value, set()).add(trial.status)
            point = _named(found, task, row)
            for value in (value for value, ends in statuses.items() if ends == {"failed"}):
                failed.setdefault(value, []).append(point)
    if not failed:
        return []
    sentences = [f"Every trial with {value} failed at {_some(points, 'point')}." for value, points in failed.items()]
    return [*sentences, "A value without an outcome is not chosen."]


def _some(names: Sequence[str], noun: str) -> str:
    """Join names to an enumeration; give only their number if they are many."""
    return listed(names) if len(names) <= _MOST_NAMED else plural(len(names), noun)


def verdict_line(found: Findings, task: TaskFindings) -> str:
    """Return the verdict of a task as a line, such as `Window: helps at 0, hurts at 2, undecided at 4 of 6`."""
    decisions = [decision for _, decision in task.decided()]
    if task.primary.best is None:
        return f"No trial of {task.task} has finished"
    if not decisions:
        return "No verdict: the study compares nothing with a baseline"
    sizes = {margin(decision) for decision in decisions if decision.margin is not None}
    counted = _counted((each.verdict for each in decisions), " or ".join(sorted(sizes)))
    trivial = sum(each.both_trivial for each in decisions)
    warning = f"; {WORSE} at {trivial}" if trivial else ""
    other = "" if task.primary is task.final else f" (by the {task.primary.measure.name})"
    mark = f"{interim(found.record).capitalize()}. " if interim(found.record) else ""
    return f"{mark}{factor(found.record)}: {counted}{warning}{other}"


def _counted(verdicts: Iterable[Verdict], size: str = "") -> str:
    """Verdicts by their number; `no difference` only where a margin of a `size` was tested."""
    counts = Counter(verdicts)
    words = {each: each if each != "no difference" else f"no difference larger than {size}" for each in _VERDICTS}
    parts = [f"{words[each]} at {counts[each]}" for each in _VERDICTS if each != "no difference" or size]
    return f"{', '.join(parts)} of {counts.total()}"


def endpoint(found: Findings, task: TaskFindings) -> str:
    """Return sentences about the primary endpoint of a task, the correction, and an endpoint that varies less."""
    measure, family = task.primary.measure, sum(len(each.decisions) for each in found.tasks)
    origin = "as the study declares" if task.endpoint.declared else "the default, since the study declares none"
    words = f"Primary endpoint: {measure.name}, {origin}."
    if task.endpoint.measure == "steps":
        declared = level(found.record, task.task).value
        if task.level.value != declared:
            words += (
                f" The level, {number(task.level.value)}, was named for this report instead of the declared level, "
                f"{number(declared)}."
            )
    if measure.log:
        words += " Its logarithms are compared, so means are geometric and differences are ratios."
    if measure.ratio_margin and not measure.log and task.endpoint.margin is not None:
        words += (
            f" The margin, {TIMES}{task.endpoint.margin:.10g}, is a ratio and is not tested, because a score is not "
            "positive."
        )
    if task.endpoint.margin is not None and task.endpoint.margin <= measure.resolution:
        words += (
            f" The margin, {task.endpoint.margin:.10g} steps, is not tested, because validations are up to "
            f"{measure.resolution:.10g} steps apart."
        )
    if family > 1:
        words += f" The p-values are adjusted for {family} declared comparisons (Holm)."
    words += "".join(
        f" {_named(found, task, row)} has one result for several points of the grid, and is compared with "
        f"{name(found.record, row.against.reference)}."
        for row, _ in task.decided()
        if row.against and row.several
    )
    if task.steadier and any(decision.verdict == "undecided" for _, decision in task.decided()):
        words += (
            f" The mean of the last {task.steadier.validations} validations varies less between seeds. As the endpoint "
            f"of another study, with other seeds, it would need about {task.steadier.share:.0%} of the seeds for the "
            "same power, if the difference is as large."
        )
    return words


def answer(found: Findings, task: TaskFindings) -> list[str]:
    """Return the sentences below the verdict: decided comparisons, the best point, and exploratory results."""
    record = found.record
    if task.final.best is None:
        return []
    sentences = [*_decided(record, task), _best(record, task, task.final.best)]
    if task.windowed and (words := _exploratory(task.windowed)):
        sentences.append(f"Exploratory, against window 1 of the same normalizer: {words}.")
    if task.speed:
        sentences.append(_soonest(record, task, task.speed))
    return sentences


def _decided(record: StudyRecord, task: TaskFindings) -> list[str]:
    """Name the comparisons with a verdict, each with its difference and adjusted p-value."""
    found = []
    for wanted in ("helps", "hurts"):
        named = [_claim(record, row, decision) for row, decision in task.decided() if decision.verdict == wanted]
        if named:
            shown = named[:_MOST_NAMED]
            more = [f"{len(named) - len(shown)} more in the table"] if len(named) > len(shown) else []
            found.append(f"{factor(record)} {wanted} at {listed([*shown, *more])}.")
    return found


def _claim(record: StudyRecord, row: Row, decision: Decision) -> str:
    warning = f"; {WORSE}" if decision.both_trivial else ""
    return f"{name(record, row.point)} ({change(decision.difference)}, adjusted p {chances(decision.p)}{warning})"


def _best(record: StudyRecord, task: TaskFindings, best: Row) -> str:
    """Return a sentence about the best point: its mean, its seeds without a value, and a better trivial predictor."""
    comparison = task.primary if task.endpoint.measure == "tail" else task.final
    best = comparison.best or best
    what = "geometric mean of the" if comparison.measure.log else "mean"
    missing = f"; {unfinished(best.point)}" if unfinished(best.point) else ""
    if len(comparison.rows) == 1:
        return f"The {what} {comparison.measure.name} is {average(best.point)}{missing}."
    superlative = {"min": "lowest", "max": "highest"}[task.facts.goal]
    trivial = _no_better_than_trivial(task, best)
    return (
        f"The {superlative} {what} {comparison.measure.name} is {average(best.point)} "
        f"({_leader(record, comparison, best)}{missing}){trivial}."
    )


def _leader(record: StudyRecord, comparison: Comparison, best: Row) -> str:
    """Return the name of the best point, and of the points that tie with it."""
    mark = best.point.mean, best.point.lost
    tied = [row for row in comparison.rows if row is not best and (row.point.mean, row.point.lost) == mark]
    words = name(record, best.point) + (", the baseline" if best.is_reference and comparison.has_reference else "")
    if not tied:
        return words
    many = len(tied) > _MOST_NAMED
    others = plural(len(tied), "other point") if many else " and ".join(name(record, row.point) for row in tied)
    return f"{words}, tied with {others}"


def _no_better_than_trivial(task: TaskFindings, best: Row) -> str:
    """Return the trivial predictor that is at least as good as the best point; empty if there is none."""
    sign, baselines = 1 if task.facts.goal == "min" else -1, task.baselines_of(best.point)
    ahead = [(label, value) for label, value in baselines.items() if sign * value <= sign * best.point.mean]
    if not ahead:
        return ""
    label, value = min(ahead, key=lambda each: sign * each[1])
    return f", no better than the trivial predictor “{label}”, {number(value)}"


def _exploratory(comparison: Comparison) -> str:
    """Return the counts of uncorrected verdicts; empty if no comparison has a pair."""
    compared = [row.against for row in comparison.rows if row.against]
    return _counted(each.verdict for each in compared) if any(each.pairs for each in compared) else ""


def _soonest(record: StudyRecord, task: TaskFindings, speed: Speed) -> str:
    """Return a sentence about the point that reaches the level first, and the exploratory verdicts on the steps."""
    to = task.level
    what = f"A validation {task.facts.metric} of {number(to.value)} is reached"
    best = speed.comparison.best
    if best is None or best.point.lost == len(best.point.scores):
        return f"{what} by no point within {to.limit} steps."
    missed = f", {never(best.point)} seeds" if best.point.lost else ""
    who = f" soonest by {_leader(record, speed.comparison, best)}," if len(speed.comparison.rows) > 1 else ""
    lead = f"{what}{who} after {average(best.point, ' steps')} on average{missed}"
    if task.endpoint.measure == "steps" or not (words := _exploratory(speed.comparison)):
        return f"{lead}."
    return f"{lead}. Exploratory, for these steps against {called_baseline(record)}: {words}."
