"""Estimate the duration of a run from a few timed training steps."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from atn_norms.ablation.execution.trial import Trainer, isolated
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.store.files import canonical
from atn_norms.ablation.store.records import StudyRecord

STEPS = 3  # training steps that are timed per trial
PATIENCE = 10.0  # seconds after which no other trial is timed


def estimate(record: StudyRecord, workers: int) -> float | None:
    """Estimate the seconds that the remaining trials of a study take; None where no trial could be timed."""
    return duration_of([trial.trial for trial in record.trials if trial.status not in ("done", "diverged")], workers)


def duration_of(trials: Sequence[dict[str, Any]], workers: int) -> float | None:
    """Estimate the seconds that trials take; None where no trial could be timed.

    A few training steps and a validation are timed for one trial of each task, size and kind of norm. The other trials
    are assumed to take as long. At most `workers` trials run in parallel, and at most one per core.
    """
    if any(is_function(trial["task"]) for trial in trials):
        return None  # a function's trial cannot be stopped after a few steps
    timed: dict[str, tuple[float, float]] = {}
    began = time.monotonic()
    with isolated():
        for trial in trials:
            if _like(trial) not in timed and (not timed or time.monotonic() - began < PATIENCE):
                try:
                    timed[_like(trial)] = _timed(trial)
                except Exception:  # noqa: BLE001  the run records it as this trial's failure
                    continue
    if not timed:
        return None
    slowest = max(timed.values())
    seconds = 0.0
    for trial in trials:
        step, validation = timed.get(_like(trial), slowest)
        train = trial["train"]
        seconds += train["steps"] * step + (train["steps"] // train["eval_every"] + 2) * validation
    return seconds / max(1, min(workers, len(trials), os.cpu_count() or 1))


def _like(trial: dict[str, Any]) -> str:
    model = trial["model"]
    alike = {name: model[name] for name in ("cell", "hidden_size", "num_layers", "bidirectional")}
    return canonical(
        [
            trial["task"],
            *map(trial["train"].get, ("batch_size", "population_batches")),
            alike,
            model["norm"] and model["norm"].get("kind", model["norm"]),
        ]
    )


def _timed(trial: dict[str, Any]) -> tuple[float, float]:
    trainer = Trainer({**trial, "train": {**trial["train"], "steps": 1000, "eval_every": 1000}})
    trainer.advance()  # the first step includes one-time setup
    started = time.monotonic()
    for _ in range(STEPS):
        trainer.advance()
    middle = time.monotonic()
    trainer.evaluate("validation")
    return (middle - started) / STEPS, time.monotonic() - middle
