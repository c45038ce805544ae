"""Options of a study that do not fit its tasks: endpoints, levels, margins and tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from atn_norms.ablation.grid.errors import Problem
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.grid.resolve import axis_path
from atn_norms.ablation.store.records import Endpoint
from atn_norms.errors import did_you_mean, plural

if TYPE_CHECKING:
    from atn_norms.ablation.grid.study import StudySpec

BUDGET = ("steps", "batch_size", "eval_every", "patience")  # of a trial: its steps, sequences and validations


def task_problems(study: StudySpec, labels: Sequence[str]) -> Iterator[Problem]:
    """Yield every problem of the options that a study declares for its tasks, which have these labels."""
    yield from _unknown_tasks(study, labels)
    for name in labels:
        if _level(study, name) is None and _measure(study, name) == "steps":
            yield Problem(("endpoint",), f"got steps for {name}; expected a level for it in reach")
    yield from _too_many_validations(study)
    yield from _within_the_resolution(study)
    yield from _not_tunable(study)
    functions = {point.labels["task"]: point.task for point in study.points() if is_function(point.task)}
    for name, task in functions.items():
        measure = _measure(study, name)
        if measure != "final" and task.reports == "loss":  # there are no validations
            got = f"got {measure} for {name}, whose function reports losses"
            yield Problem(_path(study, "endpoint", name), f"{got}; expected final, or reports: metric")
        if _level(study, name) is not None and task.reports == "loss":
            got = f"got a level for {name}, whose function reports losses"
            yield Problem(_path(study, "reach", name), f"{got}; expected no level, or reports: metric")
    if study.tune and functions:  # they return test metrics alone
        yield Problem(("tune",), "got tuned options for a function; expected a task with validation scores")


def _unknown_tasks(study: StudySpec, labels: Sequence[str]) -> Iterator[Problem]:
    for option in ("reach", "endpoint", "margin"):
        named = getattr(study, option)
        for name in named if isinstance(named, dict) and "measure" not in named else ():
            if name not in labels:
                got = f"got no task of this study; expected one of {', '.join(labels)}{did_you_mean(name, labels)}"
                yield Problem((option, name), got)


def _not_tunable(study: StudySpec) -> Iterator[Problem]:
    """Yield a problem for each tuned option whose values differ in their budget, or in the data of validations."""
    for name in study.tune:
        section, option, *_ = (*axis_path(name), "")
        if section == "task" or (section == "train" and option in BUDGET):
            got = "got an option of the task" if section == "task" else "got an option of the budget"
            expected = "expected an option of the model or the optimizer, at which validations compare"
            yield Problem(("tune", name), f"{got}; {expected}")


def _too_many_validations(study: StudySpec) -> Iterator[Problem]:
    """Yield a problem for each point with fewer validations than the endpoint of its task averages."""
    for point in study.points():
        name, patience = point.labels["task"], point.train.patience
        limits = [] if is_function(point.task) else [(point.train.validations, "the number of validations")]
        if patience is not None:  # the first validation is the best so far
            limits.append((patience + 1, "after which train.patience may end a trial"))
        endpoint, (most, why) = _endpoint(study, name), min(limits, default=(math.inf, ""))
        if endpoint.measure == "tail" and endpoint.validations > most:
            got = f"got the last {plural(endpoint.validations, 'validation')} for {name}"
            yield Problem(_path(study, "endpoint", name), f"{got}; expected at most {most}, {why}")


def _within_the_resolution(study: StudySpec) -> Iterator[Problem]:
    """Yield a problem for each margin in steps that is no larger than the distance of two validations."""
    for point in study.points():
        name = point.labels["task"]
        margin = Endpoint.of({"margin": study.margin}, name).margin
        if _measure(study, name) != "steps" or margin is None or is_function(point.task):
            continue
        if margin <= (apart := point.train.apart):
            got = f"got {margin:.10g} for {name}, whose steps are known up to train.eval_every, {apart}"
            yield Problem(_path(study, "margin", name), f"{got}; expected a larger margin, or a smaller eval_every")


def _path(study: StudySpec, option: str, task: str) -> tuple[str, ...]:
    """Return the path of an option that may be a mapping of task to value."""
    named = getattr(study, option)
    return (option, task) if isinstance(named, dict) and task in named else (option,)


def _level(study: StudySpec, task: str) -> float | None:
    return study.reach.get(task) if isinstance(study.reach, dict) else study.reach


def _endpoint(study: StudySpec, task: str) -> Endpoint:
    return Endpoint.of({"endpoint": study.endpoint}, task)


def _measure(study: StudySpec, task: str) -> str:
    return _endpoint(study, task).measure
