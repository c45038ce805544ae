"""Steps until the validation metric of a trial first reaches a level, which is the same for every point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from atn_norms.ablation.analysis.comparison import Measure, compare_task, in_logarithm, is_number, score
from atn_norms.ablation.store.records import StudyRecord, TrialRecord
from atn_norms.errors import SpecError, did_you_mean

WAY = 0.75  # of the way from the best trivial predictor to the best point lies the default level


@dataclass(frozen=True)
class Level:
    """The level that the trials of one task have to reach.

    | field   | meaning                                                                                     |
    |---------|---------------------------------------------------------------------------------------------|
    | `value` | of the validation metric; None where there is none to reach                                 |
    | `limit` | steps that are looked at: what the shortest-trained trial of the task was given             |
    | `given` | whether the study, or the caller, named it                                                   |
    | `why`   | where the value comes from, or why there is none, as the end of a sentence                  |
    """

    value: float | None
    limit: int
    given: bool
    why: str


def level(record: StudyRecord, task: str, given: Mapping[str, float] | float | None = None) -> Level:
    """The level of a task: the one given, the study's own, or the one that its trivial predictors and best point set.

        level = trivial + 3/4 (best - trivial)                                                  (derived)

    | symbol    | meaning                                                                              |
    |-----------|--------------------------------------------------------------------------------------|
    | `trivial` | what the best of the task's trivial predictors scores, in the metric's unit          |
    | `best`    | the best mean of the validation metric at the end of any point                       |
    | `given`   | a level for every task, or task -> level; the study's `reach` when None              |

    A level that was not named beforehand is picked after the fact, though the same for every point.
    """
    named = record.study.get("reach") if given is None else given
    own = named.get(task) if isinstance(named, Mapping) else named
    limit = _limit(record, task)
    if isinstance(own, int | float) and not isinstance(own, bool):
        return Level(float(own), limit, True, "named beforehand" if given is None else "named for this report")
    facts = record.tasks[task]
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
    """Refuse levels for tasks that the study does not have; `SpecError` names what it has."""
    for task, value in given.items():
        if task not in record.tasks:
            known = ", ".join(record.tasks)
            raise SpecError(f"--reach {task}: no task of this study; it has {known}{did_you_mean(task, record.tasks)}")
        if not math.isfinite(value):
            raise SpecError(f"--reach {task}: must be a finite number, got {value}")


def steps_to(record: StudyRecord, task: str, to: Level) -> Measure:
    """Steps to reach the level, fewer being better.

        steps   = first step at which the validation metric was measured and had reached the level, or never
        counted = min(steps, limit)

    A trial that ended without reaching it, diverged or not, counts as `limit` in a mean: that is the mean of the steps,
    out of the first `limit`, before the level was reached (a restricted mean, as of survival times), and is defined
    where trials never reach it. A trial that still trains, or failed, has no outcome: counting the early ones flatters.
    """
    if to.value is None:
        raise ValueError(f"task {task} has no level to reach: {to.why}")
    value, sign = to.value, 1 if record.tasks[task].goal == "min" else -1

    def first(trial: TrialRecord) -> float | None:
        if trial.status not in ("done", "diverged"):
            return None
        found = (
            line["step"] for line in trial.curve if is_number(line.get("validation")) and line["step"] <= to.limit
            and sign * line["validation"] <= sign * value
        )  # fmt: skip
        return float(next(found, math.inf))

    return Measure("steps to the level", "min", first, limit=float(to.limit))


def _limit(record: StudyRecord, task: str) -> int:
    """The steps that every trial of the task was given."""
    given = [trial.trial["train"]["steps"] for trial in record.trials if trial.points[0].get("task") == task]
    return min(given, default=0)
