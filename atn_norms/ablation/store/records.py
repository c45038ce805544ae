"""What a study's folder says, as plain values: the one thing the report, the status line and the tests read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pending", "running", "done", "diverged", "failed"]
Goal = Literal["min", "max"]


@dataclass(frozen=True)
class TaskFacts:
    """What a number of this task means.

    | field       | meaning                                                                  |
    |-------------|--------------------------------------------------------------------------|
    | `metric`    | name, and unit where it has one                                          |
    | `baselines` | what trivial predictors score: name -> value of the metric               |
    | `goal`      | `min` where smaller is better, such as a loss; `max` where larger is     |
    | `notes`     | sentences about the data that were read                                  |
    """

    metric: str
    baselines: dict[str, float] = field(default_factory=dict)
    goal: Goal = "min"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TrialRecord:
    """One trial as its folder tells it.

    | field    | meaning                                                                                             |
    |----------|-----------------------------------------------------------------------------------------------------|
    | `id`     | hash of the trial's canonical JSON                                                                  |
    | `trial`  | that JSON: `version`, `model`, `task`, `train`, `seed`, `data`                                      |
    | `points` | the grid points it answers: axis name -> label, and `task` -> label; several when points collapse   |
    | `seed`   | the seed, in the trial as well                                                                      |
    | `status` | `pending`, `running`, `done`, `diverged` (ended early by a loss that is not finite) or `failed`     |
    | `result` | `result.json`: `trial`, `outcome`, `step`, `metrics` {split: {metric: value}}, empty if it diverged |
    | `curve`  | `metrics.jsonl`: `step`, `train_loss`, `validation` (None where it was not measured)                |
    | `run`    | `run.json`: seconds, host, attempts; differs from machine to machine                                |
    | `error`  | `error.json`: `error` (one line), `traceback`; None unless the last attempt failed                  |
    | `step`   | training steps taken, so far as is known: by the result, the one who trains it, or the curve        |
    """

    id: str
    trial: dict[str, Any]
    points: tuple[dict[str, str], ...]
    seed: int
    status: Status
    result: dict[str, Any] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    step: int = 0


@dataclass(frozen=True)
class StudyRecord:
    """A whole study as its folder tells it; axes, tasks and trials in the order of the study file."""

    name: str
    study: dict[str, Any]
    environment: dict[str, Any]
    axes: dict[str, list[str]]
    tasks: dict[str, TaskFacts]
    baseline: dict[str, str]
    trials: tuple[TrialRecord, ...]

    def count(self, status: Status) -> int:
        """How many trials have this status."""
        return sum(trial.status == status for trial in self.trials)

    def counts(self) -> dict[str, int]:
        """How many trials are `done`, `diverged`, `failed`, `running` and `pending`."""
        return {status: self.count(status) for status in ("done", "diverged", "failed", "running", "pending")}
