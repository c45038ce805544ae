"""The findings of a report, computed once: each task by its primary endpoint, its final metric and its speed."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from atn_norms.ablation.analysis.comparison import Comparison, Point, Row, compare_task, final, is_number, tail
from atn_norms.ablation.analysis.decision import Decision, decide
from atn_norms.ablation.analysis.intervals import ENOUGH_SEEDS, median
from atn_norms.ablation.analysis.time_to_target import Level, check, level, steps_to
from atn_norms.ablation.report.names import leaf
from atn_norms.ablation.store.records import Endpoint, StudyRecord, TaskFacts

_LINE_BREAKS = "\n\t"
_FEWEST_AVERAGED = 5  # validations of a mean
_MUCH_STEADIER = 0.5  # largest share of the variance at which the report names the mean


@dataclass(frozen=True)
class Speed:
    """The points of a task by their steps to the level, compared with the baseline and with window 1."""

    comparison: Comparison
    windowed: Comparison | None


@dataclass(frozen=True)
class Steadier:
    """A mean of the last validations that varies less between seeds than the final metric.

    | field         | meaning                                                                                      |
    |---------------|----------------------------------------------------------------------------------------------|
    | `validations` | number of averaged validations                                                               |
    | `share`       | variance of the paired differences relative to that of the final metric, the median over the |
    |               | declared comparisons; the number of seeds for the same power changes by this factor           |
    """

    validations: int
    share: float


@dataclass(frozen=True)
class TaskFindings:
    """The findings of one task.

    | field       | meaning                                                                                         |
    |-------------|-------------------------------------------------------------------------------------------------|
    | `endpoint`  | the primary endpoint, as the study declares it                                                  |
    | `primary`   | every point by the endpoint, compared with the baseline                                         |
    | `decisions` | index of a row of `primary` -> its verdict                                                      |
    | `final`     | every point by its test metric, compared with the baseline                                      |
    | `windowed`  | `final`, compared with window 1 of the same normalizer; None if the study has no such comparison |
    | `level`     | the level to reach                                                                              |
    | `speed`     | every point by its steps to the level; None without a level                                     |
    | `steadier`  | an endpoint for the next study, if the endpoint is the final metric and it varies much more     |
    """

    task: str
    facts: TaskFacts
    endpoint: Endpoint
    primary: Comparison
    final: Comparison
    windowed: Comparison | None
    level: Level
    speed: Speed | None
    steadier: Steadier | None = None
    decisions: Mapping[int, Decision] = field(default_factory=dict)

    def decided(self) -> list[tuple[Row, Decision]]:
        """Return every declared comparison with its verdict, in the order of the grid."""
        return [(self.primary.rows[place], decision) for place, decision in self.decisions.items()]

    def both_trivial(self, place: int) -> bool:
        """Return whether a trivial predictor has a better test metric than both sides of a row's comparison.

        Then neither side has learned the task, and the verdict compares two failures.
        """
        sign = 1 if self.facts.goal == "min" else -1
        against = self.final.rows[place].against
        if against is None:
            return False
        sides = self.final.rows[place].point, against.reference
        trivial = [[sign * value for value in self.baselines_of(point).values()] for point in sides]
        return all(
            bool(point.values and values) and sign * point.mean > min(values)
            for point, values in zip(sides, trivial, strict=True)
        )

    def baselines_of(self, point: Point) -> dict[str, float]:
        """Return the scores of the trivial predictors for the task options of a point."""
        return self.facts.baselines_of(point.cells[0])


@dataclass(frozen=True)
class Findings:
    """The record of a study, and the findings of each task."""

    record: StudyRecord
    tasks: tuple[TaskFindings, ...]


def findings(record: StudyRecord, reach: Mapping[str, float] | None = None) -> Findings:
    """Compare the points and decide the verdicts; `reach` (task -> level) replaces the levels of the study.

    Errors: `SpecError` for a level of an unknown task.
    """
    record = printable(record)
    if reach:
        check(record, reach)
    tasks = [_task(record, task, facts, reach) for task, facts in record.tasks.items()]
    declared = [
        (task, place, row.against)
        for task in tasks
        for place, row in enumerate(task.primary.rows)
        if row.against is not None
    ]
    decisions = decide([against for _, _, against in declared], [task.endpoint.margin for task, _, _ in declared])
    found = list(zip(declared, decisions, strict=True))
    return Findings(
        record,
        tuple(
            replace(
                task,
                decisions={
                    place: replace(decision, both_trivial=task.both_trivial(place))
                    for (own, place, _), decision in found
                    if own is task
                },
            )
            for task in tasks
        ),
    )


def _task(record: StudyRecord, task: str, facts: TaskFacts, reach: Mapping[str, float] | None) -> TaskFindings:
    own = {task: reach[task]} if reach and task in reach else None
    to, one = level(record, task, own), _window_one(record)
    measure, endpoint = final(record, task), record.endpoint(task)
    windowed = compare_task(record, task, measure, one) if one else None
    ends = compare_task(record, task, measure)
    speed, primary = None, ends
    if to.value is not None:
        steps = steps_to(record, task, to)
        against_one = compare_task(record, task, steps, one) if one else None
        speed = Speed(compare_task(record, task, steps), against_one)
    if endpoint.measure == "tail":
        primary = compare_task(record, task, tail(record, task, endpoint.validations))
    elif endpoint.measure == "steps" and speed is not None:
        primary = speed.comparison
    steadier = _steadier(record, task, ends) if endpoint.measure == "final" else None
    return TaskFindings(task, facts, endpoint, primary, ends, windowed, to, speed, steadier)


def _steadier(record: StudyRecord, task: str, ends: Comparison) -> Steadier | None:
    """Compare the variance of the final metric with that of a mean over the last quarter of the validations."""
    trials = [trial for row in ends.rows for trial in row.point.trials if trial.status == "done"]
    if record.tune or any(trial.trial.get("train", {}).get("keep") == "best" for trial in trials):
        return None  # the last validations are not those of the scored weights
    looks = [sum(is_number(line.get("validation")) for line in trial.curve) for trial in trials]
    validations = min(looks, default=0) // 4
    if validations < _FEWEST_AVERAGED:
        return None
    means = compare_task(record, task, tail(record, task, validations))
    pairs = [
        (row.against.paired, end.against.paired)
        for row, end in zip(means.rows, ends.rows, strict=True)
        if row.against and end.against
    ]
    shares = [
        (mean.deviation / end.deviation) ** 2
        for mean, end in pairs
        if mean and end and end.deviation > 0 and len(end.values) >= ENOUGH_SEEDS
    ]
    share = median(shares) if shares and means.measure.log == ends.measure.log else 1.0
    return Steadier(validations, share) if share <= _MUCH_STEADIER else None


def _window_one(record: StudyRecord) -> dict[str, str] | None:
    """Return window 1 as a baseline; None if no axis has it, or if the baseline of the study is a window."""
    axis = next((axis for axis in record.axes if leaf(axis) == "window"), None)
    if axis is None or "1" not in record.axes[axis] or len(record.axes[axis]) == 1 or set(record.baseline) == {axis}:
        return None
    return {axis: "1"}


def printable(record: StudyRecord) -> StudyRecord:
    """Return the record with every control character in its texts replaced by an escape, such as `\\x07`.

    XML cannot contain control characters, terminals execute them, and marks of writing direction hide parts of a name.
    """
    trials = tuple(
        replace(
            trial,
            id=_clean(trial.id),
            trial=_clean(trial.trial),
            points=_clean(trial.points),
            result=_clean(trial.result),
            run=_clean(trial.run),
            error=_clean(trial.error),
        )
        for trial in record.trials
    )
    tasks = {
        _clean(task): replace(
            facts,
            metric=_clean(facts.metric),
            baselines=_clean(facts.baselines),
            notes=_clean(facts.notes),
            baselines_at=_clean(facts.baselines_at),
        )
        for task, facts in record.tasks.items()
    }
    return StudyRecord(
        name=_clean(record.name),
        study=_clean(record.study),
        environment=_clean(record.environment),
        axes=_clean(record.axes),
        tasks=tasks,
        baseline=_clean(record.baseline),
        trials=trials,
        tune=_clean(record.tune),
    )


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        if value.isprintable():
            return value
        return "".join(_written_out(sign) if _controls(sign) else sign for sign in value)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(each) for key, each in value.items()}
    return type(value)(map(_clean, value)) if isinstance(value, list | tuple) else value


def _controls(sign: str) -> bool:
    return unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Cn", "Co") and sign not in _LINE_BREAKS


def _written_out(sign: str) -> str:
    return sign.encode("unicode_escape").decode()
