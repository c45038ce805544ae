"""Options of a study that do not fit its tasks: endpoints, levels, margins and tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from atn_norms.ablation.grid.errors import Problem
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.store.records import Endpoint
from atn_norms.errors import did_you_mean

if TYPE_CHECKING:
    from atn_norms.ablation.grid.study import StudySpec


def task_problems(study: StudySpec, labels: Sequence[str]) -> Iterator[Problem]:
    """Yield every problem of the options that a study declares for its tasks, which have these labels."""
    yield from _unknown_tasks(study, labels)
    for name in labels:
        level = study.reach.get(name) if isinstance(study.reach, dict) else study.reach
        if level is None and _measure(study, name) == "steps":
            yield Problem(("endpoint",), f"got steps for {name}; expected a level for it in reach")
    functions = {point.labels["task"]: point.task for point in study.points() if is_function(point.task)}
    for name, task in functions.items():
        measure = _measure(study, name)
        if measure != "final" and task.reports == "loss":  # there are no validations
            by_task = isinstance(study.endpoint, dict) and name in study.endpoint
            got = f"got {measure} for {name}, whose function reports losses"
            path = ("endpoint", name) if by_task else ("endpoint",)
            yield Problem(path, f"{got}; expected final, or reports: metric")
    if study.tune and functions:  # they return test metrics alone
        yield Problem(("tune",), "got tuned options for a function; expected a task with validation scores")


def _unknown_tasks(study: StudySpec, labels: Sequence[str]) -> Iterator[Problem]:
    for option in ("reach", "endpoint", "margin"):
        named = getattr(study, option)
        for name in named if isinstance(named, dict) and "measure" not in named else ():
            if name not in labels:
                got = f"got no task of this study; expected one of {', '.join(labels)}{did_you_mean(name, labels)}"
                yield Problem((option, name), got)


def _measure(study: StudySpec, task: str) -> str:
    return Endpoint.of({"endpoint": study.endpoint}, task).measure
