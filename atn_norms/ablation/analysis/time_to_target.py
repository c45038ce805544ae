"""The steps until the validation metric of a trial first reaches a level, which all points of a task share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from atn_norms.ablation.analysis.comparison import Measure, compare_task, in_logarithm, is_number, score
from atn_norms.ablation.store.records import StudyRecord, TrialRecord
from atn_norms.errors import SpecError, unknown

WAY = 0.75  # position of the default level, from the best trivial predictor (0) to the best point (1)


@dataclass(frozen=True)
class Level:
    """The level of the validation metric that the trials of one task have to reach.

    | field   | meaning                                                                                     |
    |---------|---------------------------------------------------------------------------------------------|
    | `value` | the level, in the unit of the metric; None if the task has no level                         |
    | `limit` | the fewest steps of any trial of the task: taken, or planned if it stopped early or trains  |
    | `given` | True if the study or the caller sets the level                                              |
    | `why`   | the origin of the level, or the reason why there is none, as the end of a sentence          |
    """

    value: float | None
    limit: int
    given: bool
    why: str


def level(record: StudyRecord, task: str, given: Mapping[str, float] | float | None = None) -> Level:
    """Return the level of a task: `given`, or the `reach` of the study, or the default level.

        level = trivial + 3/4 (best - trivial)                                                  (derived)

    | symbol    | meaning                                                                              |
    |-----------|--------------------------------------------------------------------------------------|
    | `trivial` | score of the best trivial predictor of the task, in the unit of the metric           |
    | `best`    | best final mean of the validation metric of any point                                |
    | `given`   | a level for every task, or task -> level; None selects `reach` of the study          |

    The default level is the same for all points, but it is chosen after the results are known.
    """
    named = record.study.get("reach") if given is None else given
    own = named.get(task) if isinstance(named, Mapping) else named
    limit = _limit(record, task)
    if isinstance(own, int | float) and not isinstance(own, bool):
        return Level(float(own), limit, True, "named beforehand" if given is None else "named for this report")
    facts = record.tasks[task]
    if facts.baselines_at:
        return Level(None, limit, False, "the trivial predictors of its points differ")
    trivials = [value for value in facts.baselines.values() if math.isfinite(value)]
    if not trivials:
        return Level(None, limit, False, "the task names no trivial predictor to start from")
    ends = Measure(facts.metric, facts.goal, lambda trial: score(trial, facts, "validation"))
    ends = in_logarithm(ends, record, task)
    best = compare_task(record, task, ends).best
    if best is None:
        return Level(None, limit, False, "no trial has finished")
    choose = min if facts.goal == "min" else max
    trivial = choose(trivials)
    if choose(trivial, best.point.mean) == trivial:
        return Level(None, limit, False, "no point is ahead of the best trivial predictor on average")
    return Level(trivial + WAY * (best.point.mean - trivial), limit, False, "three quarters of the way")


def check(record: StudyRecord, given: Mapping[str, float]) -> None:
    """Raise `SpecError` for the level of an unknown task, of a task without validations, or that is not finite."""
    for task, value in given.items():
        if task not in record.tasks:
            raise SpecError.of([unknown("task", task, list(record.tasks), path=("--reach",))])
        if not math.isfinite(value):
            raise SpecError((f"--reach {task}",), str(value), "a finite number")
        curves = [t.curve for t in record.trials if t.points[0].get("task") == task and t.status == "done"]
        if curves and not any(is_number(line.get("validation")) for curve in curves for line in curve):
            raise SpecError((f"--reach {task}",), f"{value}", "no level, since no trial of the task has a validation")


def steps_to(record: StudyRecord, task: str, to: Level) -> Measure:
    """Measure the steps until the level is reached; fewer steps are better.

        steps   = first step of those below at which the metric has reached the level, or never
        counted = min(steps, limit)

    Only the steps count at which all trials were validated that took as many, if there are such steps. Otherwise a
    trial with more validations would reach the level sooner.

    A trial that ended without reaching the level, diverged or not, counts as `limit` in a mean. This is a restricted
    mean, as for survival times, and it is defined even if no trial reaches the level. A trial that failed, or is still
    training, has no number. Excluding the trials that never reach the level would favour points that often fail.
    """
    if to.value is None:
        raise ValueError(f"task {task} has no level to reach: {to.why}")
    value, sign = to.value, 1 if record.tasks[task].goal == "min" else -1
    shared = _shared(record, task, to.limit)

    def first(trial: TrialRecord) -> float | None:
        if trial.status not in ("done", "diverged"):
            return None
        found = (
            line["step"] for line in trial.curve if is_number(line.get("validation")) and line["step"] in shared
            and sign * line["validation"] <= sign * value
        )  # fmt: skip
        return float(next(found, math.inf))

    apart = _resolution(record, task, shared)
    return Measure("steps to the level", "min", first, limit=float(to.limit), resolution=apart)


def _shared(record: StudyRecord, task: str, limit: int) -> set[int]:
    """Return the steps up to the limit at which all trials of the task were validated that took as many.

    If there are none, as in functions that validate at irregular steps, return all validated steps up to the limit.
    """
    curves = [trial.curve for trial in record.trials if trial.points[0].get("task") == task]
    validated = [{line["step"] for line in curve if line.get("validation") is not None} for curve in curves]
    ends = [max(steps, default=0) for steps in validated]
    known = {step for steps in validated for step in steps if step <= limit}
    shared = {s for s in known if all(s in own or s > end for own, end in zip(validated, ends, strict=True))}
    return shared or known


def _resolution(record: StudyRecord, task: str, shared: set[int]) -> float:
    """Return the largest number of steps without a counted validation in any finished trial of the task."""
    apart = 0
    for trial in record.trials:
        if trial.status == "done" and trial.points[0].get("task") == task:
            looks = [
                line["step"] for line in trial.curve if is_number(line.get("validation")) and line["step"] in shared
            ]
            apart = max([apart, *(after - before for before, after in pairwise([0, *looks]))])
    return float(apart)


def _limit(record: StudyRecord, task: str) -> int:
    """Return the fewest steps of any trial of the task, or the most if all of them are unknown."""
    trials = [trial for trial in record.trials if trial.points[0].get("task") == task]
    known = [steps for trial in trials if (steps := _steps(trial))]
    return min(known, default=max((trial.step for trial in trials), default=0))


def _steps(trial: TrialRecord) -> int:
    """Return the steps that a trial took to its planned end, or would take: it may have stopped early, or still train.

    It is 0 if they are unknown: a function need not declare them, and those it declares may differ from those it takes.
    """
    planned = trial.trial["train"]["steps"]
    if trial.status == "done" and not (trial.result or {}).get("reason"):
        return trial.step or planned
    return max(trial.step, planned) if planned > 1 else 0
