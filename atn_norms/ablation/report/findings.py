"""Everything the report says about a study, computed once: each task compared by its metric and by its speed."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from atn_norms.ablation.analysis.comparison import Comparison, compare_task, final
from atn_norms.ablation.analysis.time_to_target import Level, check, level, steps_to
from atn_norms.ablation.report.names import leaf
from atn_norms.ablation.store.records import StudyRecord, TaskFacts

_LINE_BREAKS = "\n\t"


@dataclass(frozen=True)
class Speed:
    """How soon the points of a task reach a level, against the baseline and against window 1."""

    comparison: Comparison
    windowed: Comparison | None


@dataclass(frozen=True)
class TaskFindings:
    """One task.

    | field      | meaning                                                                                          |
    |------------|--------------------------------------------------------------------------------------------------|
    | `final`    | every point by its test metric, against the baseline                                             |
    | `windowed` | the same against window 1 of the same normalizer; None where the study says nothing about it     |
    | `level`    | the level to reach; `speed` is None where there is none                                          |
    """

    task: str
    facts: TaskFacts
    final: Comparison
    windowed: Comparison | None
    level: Level
    speed: Speed | None


@dataclass(frozen=True)
class Findings:
    """A study's record, with what follows from it."""

    record: StudyRecord
    tasks: tuple[TaskFindings, ...]


def findings(record: StudyRecord, reach: Mapping[str, float] | None = None) -> Findings:
    """Work a study out; `reach` (task -> level) goes before the levels that the study names.

    Errors: `SpecError` for a level of a task that the study does not have.
    """
    record = printable(record)
    if reach:
        check(record, reach)
    return Findings(record, tuple(_task(record, task, facts, reach) for task, facts in record.tasks.items()))


def _task(record: StudyRecord, task: str, facts: TaskFacts, reach: Mapping[str, float] | None) -> TaskFindings:
    own = {task: reach[task]} if reach and task in reach else None
    to, one = level(record, task, own), _window_one(record)
    measure = final(facts)
    windowed = compare_task(record, task, measure, one) if one else None
    speed = None
    if to.value is not None:
        steps = steps_to(record, task, to)
        against_one = compare_task(record, task, steps, one) if one else None
        speed = Speed(compare_task(record, task, steps), against_one)
    return TaskFindings(task, facts, compare_task(record, task, measure), windowed, to, speed)


def _window_one(record: StudyRecord) -> dict[str, str] | None:
    """Window 1 of the same normalizer as a baseline, where the study has it and does not compare so anyway."""
    axis = next((axis for axis in record.axes if leaf(axis) == "window"), None)
    if axis is None or "1" not in record.axes[axis] or len(record.axes[axis]) == 1 or set(record.baseline) == {axis}:
        return None
    return {axis: "1"}


def printable(record: StudyRecord) -> StudyRecord:
    """The record with every control character in a text written out, such as `\\x07`.

    XML has no way to say them, terminals obey them, and marks of writing direction make a name read as another.
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
        _clean(task): TaskFacts(_clean(facts.metric), _clean(facts.baselines), facts.goal, notes=_clean(facts.notes))
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
