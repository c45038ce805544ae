"""How long a run may take, from a few timed training steps."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from atn_norms.ablation.execution.trial import Trainer, isolated
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.store.files import canonical
from atn_norms.ablation.store.records import StudyRecord

STEPS = 3  # timed in each
PATIENCE = 10.0  # seconds after which no further trial is timed


def estimate(record: StudyRecord, workers: int) -> float | None:
    """Seconds that the trials of a study which are not over may take; None where none could be timed."""
    return duration_of([trial.trial for trial in record.trials if trial.status not in ("done", "diverged")], workers)


def duration_of(trials: Sequence[dict[str, Any]], workers: int) -> float | None:
    """Seconds that trials may take; None where none could be timed.

    One trial of each task, size and kind of norm takes a few training steps and a validation; the others are taken to
    be like these. `workers` is how many run at a time, as far as there are trials and cores.
    """
    if any(is_function(trial["task"]) for trial in trials):
        return None  # a function's trials cannot be tried out for a few steps
    timed: dict[str, tuple[float, float]] = {}
    began = time.monotonic()
    with isolated():
        for trial in trials:
            if _like(trial) not in timed and (not timed or time.monotonic() - began < PATIENCE):
                try:
                    timed[_like(trial)] = _timed(trial)
                except Exception:  # noqa: BLE001  the run will tell of it, as this trial's failure
                    continue
    if not timed:
        return None
    dearest = max(timed.values())
    seconds = 0.0
    for trial in trials:
        step, validation = timed.get(_like(trial), dearest)
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
    trainer.advance()  # the first step also pays for what is set up once
    started = time.monotonic()
    for _ in range(STEPS):
        trainer.advance()
    middle = time.monotonic()
    trainer.evaluate("validation")
    return (middle - started) / STEPS, time.monotonic() - middle
