"""Estimate the remaining time of a run from its events: a speed per arm, and the trials that run in parallel."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atn_norms.ablation.execution.events import Event
from atn_norms.ablation.grid.functions import UNKNOWN_STEPS, declared_steps, is_function
from atn_norms.ablation.store.files import canonical
from atn_norms.ablation.store.records import TrialRecord

FADE = 0.8  # weight of a trial in the pace, relative to the one that started after it
BETWEEN = 1.0  # seconds between two estimates
OWN = 0.05  # least observed share of a trial from which its own speed is used instead of its arm's


def makespan(seconds: Iterable[float], workers: int) -> float:
    """Return the time until trials of these durations end, where each starts on the first free worker.

    >>> makespan([3.0, 1.0, 1.0, 4.0], workers=2)
    6.0
    """
    free = [0.0] * max(1, workers)
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def arm(trial: Mapping[str, Any]) -> str:
    """Return the options of a trial without its seed, as a key: trials of equal keys take about equally long."""
    return canonical([trial[name] for name in ("task", "model", "train")])


@dataclass
class _Observed:
    """Times of one trial in this run; `first` and `last` are (time, step) of its events with steps."""

    started: float
    from_start: bool  # the time before `first` counts: the worker was warm, and the trial started at step 0
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None
    ended: tuple[float, int] | None = None

    def work(self, steps: float) -> tuple[float, float]:
        """Return the observed seconds, and the share of the trial that was done in them."""
        last = self.ended or self.last
        if last is None:
            return 0.0, 0.0
        total = max(1.0, last[1] if self.ended else steps)
        begin = self.first if self.first is not None and not self.from_start else (self.started, 0)
        if begin[1] >= last[1] > 0 and self.ended:  # all steps came with the first event
            begin = (self.started, 0)
        done = 1.0 if self.ended and last[1] == 0 else (last[1] - begin[1]) / total
        return last[0] - begin[0], min(1.0, done)


class RemainingTime:
    """The remaining time of a run, from the events seen so far.

    An arm's duration is its observed seconds over its observed share of trials. An arm without observations takes its
    predicted cost times the ratio of observed and predicted time of the other arms. Trials start in order on `workers`.

    | symbol | meaning |
    |---|---|
    | `trials` | the trials of the run, in the order in which they start; finished ones are ignored |
    | `workers` | trials in parallel; None: the largest number seen |
    | `costs` | predicted seconds, trial id -> seconds; None: proportional to the training steps |
    """

    def __init__(
        self, trials: Sequence[TrialRecord], workers: int | None = None, costs: Mapping[str, float] | None = None
    ) -> None:
        left = [trial for trial in trials if trial.status not in ("done", "diverged")]
        self._workers, self._most = workers, 0
        self._arms = {trial.id: arm(trial.trial) for trial in left}
        self._begun = {trial.id: trial.step for trial in left}
        self._steps = {trial.id: declared_steps(trial.trial) for trial in left}
        self._costs = costs if costs is not None else {each.id: _steps_or_one(each.trial) for each in left}
        self._waiting = dict.fromkeys(self._arms)  # in the order in which they start
        self._running: dict[str, bool] = {}  # trial -> whether another process trains it
        self._seen: dict[str, _Observed] = {}
        self._shares: dict[str, list[float]] = {}  # arm -> taken over declared steps of its ended trials
        self._last: float | None = None  # the result of `recent`
        self._due = -math.inf  # the time from which it is computed again

    def see(self, event: Event, now: float) -> None:
        """Update the state with an event at a time in seconds."""
        trial = event.trial
        if trial not in self._arms:
            return
        if trial not in self._seen or event.kind == "started":
            warm = any(each.ended for each in self._seen.values())
            is_fresh = trial not in self._seen and self._begun[trial] == 0
            self._seen[trial] = _Observed(now, warm and is_fresh)
        seen = self._seen[trial]
        self._waiting.pop(trial, None)
        if event.kind == "failed":
            self._seen.pop(trial)
        elif event.kind in ("done", "diverged"):
            seen.ended = (now, event.step)
            self._shares.setdefault(self._arms[trial], []).append(event.step / event.steps)
        elif event.step > 0:
            seen.first = seen.first or (now, event.step)
            seen.last = (now, event.step)
        if event.kind in ("started", "step", "busy"):
            self._running[trial] = event.kind == "busy"
        else:
            self._running.pop(trial, None)
        self._most = max(self._most, sum(not elsewhere for elsewhere in self._running.values()))

    def recent(self, now: float) -> float | None:
        """Return `seconds`, computed at most once a second, since its cost grows with the number of trials."""
        if now >= self._due:
            self._last, self._due = self.seconds(now), now + BETWEEN
        return self._last

    def seconds(self, now: float) -> float | None:
        """Return the seconds until the run ends; None while unknown, and where the trials outlast their estimate."""
        work = {trial: seen.work(self._expected_steps(trial) or float("inf")) for trial, seen in self._seen.items()}
        known = {trial: pair for trial, pair in work.items() if pair[1] > 0 and pair[0] > 0}
        if not known:
            return None
        typical = self._durations(known)
        spent = sum(time for time, _ in known.values())
        scale = spent / sum(share * self._costs[trial] for trial, (_, share) in known.items())
        whole = {trial: typical.get(name, self._costs[trial] * scale) for trial, name in self._arms.items()}
        pace = self._pace(known, whole)
        whole = {trial: seconds * pace for trial, seconds in whole.items()}
        left = {trial: self._left(trial, work[trial], whole[trial], now) for trial in self._running}
        elsewhere = [seconds for trial, seconds in left.items() if self._running[trial]]
        here = [seconds for trial, seconds in left.items() if not self._running[trial]]
        lanes = max(self._workers or self._most, len(here))
        return max([makespan([*here, *(whole[trial] for trial in self._waiting)], lanes), *elsewhere]) or None

    def _durations(self, known: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the mean seconds of each observed arm."""
        sums: dict[str, tuple[float, float]] = {}
        for trial, (time, share) in known.items():
            before = sums.get(self._arms[trial], (0.0, 0.0))
            sums[self._arms[trial]] = before[0] + time, before[1] + share
        return {name: time / share for name, (time, share) in sums.items()}

    def _pace(self, known: Mapping[str, tuple[float, float]], whole: Mapping[str, float]) -> float:
        """Return the recent ratio of observed to typical time: the load of the machine changes."""
        spent = typical = 0.0
        for age, trial in enumerate(reversed([*known])):
            time, share = known[trial]
            spent += time * FADE**age
            typical += share * whole[trial] * FADE**age
        return spent / typical

    def _left(self, trial: str, work: tuple[float, float], whole: float, now: float) -> float:
        """Return the seconds that a running trial still takes; `whole` are those of a trial of its arm."""
        seen, (time, share) = self._seen[trial], work
        steps = self._expected_steps(trial)
        if seen.last is None or steps is None:
            return max(0.0, whole - (now - seen.started))
        whole = time / share if share >= OWN else whole
        return max(0.0, whole * (1 - seen.last[1] / steps) - (now - seen.last[0]))

    def _expected_steps(self, trial: str) -> float | None:
        """Return the steps at which a trial is expected to end; None where nothing is known."""
        shares = self._shares.get(self._arms[trial]) or [each for some in self._shares.values() for each in some]
        declared = self._steps[trial]
        if not shares:
            return declared
        return max(1.0, (declared or UNKNOWN_STEPS) * sum(shares) / len(shares))


def _steps_or_one(trial: Mapping[str, Any]) -> float:
    return 1.0 if is_function(trial["task"]) else trial["train"]["steps"]
