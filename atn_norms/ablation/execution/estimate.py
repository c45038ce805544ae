"""Predict the duration of trials before they run: from finished trials of their arm, or from a few timed steps."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from atn_norms.ablation.execution.remaining import arm, makespan
from atn_norms.ablation.execution.trial import Trainer, isolated
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.store.files import canonical
from atn_norms.ablation.store.records import StudyRecord

STEPS = 3  # training steps that are timed per trial
PATIENCE = 10.0  # seconds after which no further trial is timed


def estimate(record: StudyRecord, workers: int) -> float | None:
    """Estimate the seconds that the remaining trials of a study take; None where no trial could be timed."""
    return in_parallel(costs(record), workers)


def costs(record: StudyRecord) -> dict[str, float] | None:
    """Predict the seconds of each remaining trial, by id; None where no trial could be timed.

    An arm with finished trials takes their mean time.
    """
    measured: dict[str, list[float]] = {}
    for trial in record.trials:
        if trial.status in ("done", "diverged") and trial.run and trial.run.get("seconds"):
            measured.setdefault(arm(trial.trial), []).append(trial.run["seconds"])
    left = [trial for trial in record.trials if trial.status not in ("done", "diverged")]
    means = {name: sum(seconds) / len(seconds) for name, seconds in measured.items()}
    predicted = predict([trial.trial for trial in left], means)
    return None if predicted is None else {trial.id: seconds for trial, seconds in zip(left, predicted, strict=True)}


def duration_of(trials: Sequence[dict[str, Any]], workers: int) -> float | None:
    """Estimate the seconds that trials take; None where no trial could be timed."""
    predicted = predict(trials)
    return None if predicted is None else in_parallel(dict(enumerate(predicted)), workers)


def in_parallel(costs: Mapping[Any, float] | None, workers: int) -> float | None:
    """Return the duration of trials on `workers`, of which at most one per core runs."""
    return None if costs is None else makespan(costs.values(), min(workers, os.cpu_count() or 1))


def predict(trials: Sequence[dict[str, Any]], measured: Mapping[str, float] | None = None) -> list[float] | None:
    """Predict the seconds of each trial; None where none could be timed. `measured` holds the seconds of arms.

    A few training steps and a validation are timed for one trial of each other arm, for at most `PATIENCE` seconds. An
    arm that is not timed takes as long as a timed one with the same kind of norm, or else as the slowest. A function
    cannot be stopped after a few steps, so that only finished trials count for it.
    """
    known = measured or {}
    exact: dict[str, tuple[float, float]] = {}  # seconds of a step and of a validation
    alike: dict[str, tuple[float, float]] = {}
    began = time.monotonic()
    with isolated():
        for trial in trials:
            if arm(trial) in known or is_function(trial["task"]) or _same(trial) in exact:
                continue
            if exact and time.monotonic() - began >= PATIENCE:
                break
            try:
                exact[_same(trial)] = _timed(trial)
            except Exception:  # noqa: BLE001  the run records it as this trial's failure
                continue
            alike.setdefault(_like(trial), exact[_same(trial)])
    if not (trials and (known or exact)):
        return None
    seconds: list[float | None] = []
    for trial in trials:
        timed = exact.get(_same(trial)) or alike.get(_like(trial)) or max(exact.values(), default=None)
        timed = None if is_function(trial["task"]) else timed
        seconds.append(known.get(arm(trial), None if timed is None else _whole(trial, timed)))
    mean = statistics.fmean([each for each in seconds if each is not None] or known.values())
    return [mean if each is None else each for each in seconds]


def _whole(trial: dict[str, Any], timed: tuple[float, float]) -> float:
    """Return the seconds of a trial from those of a step and of a validation."""
    train, (step, validation) = trial["train"], timed
    return train["steps"] * step + (train["steps"] // train["eval_every"] + 2) * validation


def _same(trial: dict[str, Any]) -> str:
    """Return the options that the time of a step depends on, as a key."""
    return canonical([trial["task"], *map(trial["train"].get, ("batch_size", "population_batches")), trial["model"]])


def _like(trial: dict[str, Any]) -> str:
    """Return the options with the largest effect on that time: all except the window and the options of the norm."""
    model = trial["model"]
    if is_function(trial["task"]):
        return _same(trial)
    alike = {name: model[name] for name in ("cell", "hidden_size", "num_layers", "bidirectional")}
    norm = model["norm"] and model["norm"].get("kind", model["norm"])
    return _same({**trial, "model": [alike, norm]})


def _timed(trial: dict[str, Any]) -> tuple[float, float]:
    trainer = Trainer({**trial, "train": {**trial["train"], "steps": 1000, "eval_every": 1000}})
    trainer.advance()  # the first step includes one-time setup
    started = time.monotonic()
    for _ in range(STEPS):
        trainer.advance()
    middle = time.monotonic()
    trainer.evaluate("validation")
    return (middle - started) / STEPS, time.monotonic() - middle
