"""Track the trials of a run: which are waiting, and what the store records for the others; report changes as events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from atn_norms.ablation.store import locks
from atn_norms.ablation.store.files import Busy, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.ablation.store.locks import Heartbeat, Lock
from atn_norms.ablation.store.records import StudyRecord, TrialRecord

RETRY = 2.0  # seconds until a trial that another process trains is tried again


@dataclass(frozen=True)
class Event:
    """A change of a trial's state.

    | field | meaning |
    |---|---|
    | `kind` | `started`, `step` (progress), `done`, `diverged`, `failed`, or `busy` (another process trains it; the run waits) |
    | `trial` | its id |
    | `point` | the trial's first grid point and its seed, to display |
    | `step`, `steps` | training steps taken, and in total |
    | `finished`, `total` | number of trials that have ended (done, diverged or failed), and of all trials |
    | `message` | the reason of a failure or of waiting, in one line |
    | `loss` | the last training loss of the curve; None before the first |
    """  # noqa: E501

    kind: Literal["started", "step", "done", "diverged", "failed", "busy"]
    trial: str
    point: dict[str, str]
    step: int
    steps: int
    finished: int
    total: int
    message: str = ""
    loss: float | None = None


OnEvent = Callable[[Event], None]


class Progress:
    """Keep the queue of waiting trials and read the progress of the others from the store; report it as events."""

    def __init__(self, store: StudyFolder, record: StudyRecord, hold: Lock, on_event: OnEvent) -> None:
        self.store, self.hold, self.on_event = store, hold, on_event
        self._record = record
        self._entries = {
            trial.id: {"id": trial.id, "points": trial.points, "trial": trial.trial} for trial in record.trials
        }
        self.trials = {trial.id: trial for trial in record.trials}
        self.waiting = [trial.id for trial in self.trials.values() if trial.status not in ("done", "diverged")]
        self.over = len(self.trials) - len(self.waiting)
        self.blocked: dict[str, float] = {}  # trials that other processes train -> time of the next attempt
        self.steps: dict[str, int] = {}
        self._losses: dict[str, float | None] = {}
        self._beats: dict[str, tuple[Heartbeat | None, float]] = {}
        self._survived: dict[str, int] = {}
        self._busy: set[str] = set()

    def record(self) -> StudyRecord:
        """Return the study as it is now: the trials of this run are read again, the others are not."""
        return replace(self._record, trials=tuple(self.trials.values()))

    @property
    def left(self) -> bool:
        """True while any trial waits to be started."""
        return bool(self.waiting or self.blocked)

    def threads(self) -> int:
        """Return the largest `threads` option of the waiting trials."""
        return max(self.trials[trial].trial["train"]["threads"] for trial in self.waiting)

    def due(self, most: int) -> list[str]:
        """Remove up to `most` trials from the queue and return them, to be started now."""
        now = time.monotonic()
        most = max(0, most)
        ready, self.waiting = self.waiting[:most], self.waiting[most:]
        ready += [trial for trial, again in self.blocked.items() if again <= now][: most - len(ready)]
        for trial in ready:
            self._beats[trial] = (None, now)
            if self.blocked.pop(trial, None) is None:
                self.steps.setdefault(trial, 0)
                self._losses.setdefault(trial, None)
                self._report("started", trial)
        return ready

    def step(self, trial: str, step: int, loss: float | None) -> None:
        """Record the step and the loss of a trial."""
        if step > self.steps[trial]:
            self.steps[trial], self._losses[trial] = step, loss
            self._report("step", trial)

    def look(self, running: list[str]) -> None:
        """Read the progress of the trials of other processes from the store."""
        if self.hold.lost:
            raise Busy(self.hold.describe_loss())
        for trial in (*running, *self.blocked):
            beat = self.store.trial(trial).heartbeat()
            if beat is not None and beat != self._beats[trial][0]:
                self._beats[trial] = (beat, time.monotonic())
                self.step(trial, beat.step or 0, beat.loss)

    def silent(self, trial: str) -> bool:
        """Check whether a running trial has had no new heartbeat for `SILENCE` seconds."""
        return time.monotonic() - self._beats[trial][1] >= locks.SILENCE

    def reset_silence(self, trial: str) -> None:
        """Count the silence of a trial from now: its worker is known to be alive."""
        self._beats[trial] = (self._beats[trial][0], time.monotonic())

    def ended(self, trial: str, outcome: dict[str, str]) -> None:
        """Record the end of an attempt: the stored result, or `outcome` where the store holds no result.

        | key of `outcome` | meaning |
        |---|---|
        | `unusable` | the store cannot be used; the run ends |
        | `busy` | another process trains the trial; it is tried again later |
        | `died` | the worker died again; a failure unless the training has progressed since the last death |
        | `trouble` | another error outside the trial |
        """
        if "unusable" in outcome:
            raise StoreError(outcome["unusable"])
        folder, trouble = self.store.trial(trial), outcome.get("died") or outcome.get("trouble", "")
        result = folder.result()
        if result is not None:
            self.steps[trial] = result["step"]
            self._end("diverged" if result["outcome"] == "diverged" else "done", trial)
        elif "busy" in outcome:
            self._wait_for(trial, outcome["busy"])
        elif "died" in outcome and self._has_progressed(trial):
            self.waiting.append(trial)
        else:
            self._failed(trial, trouble)

    def requeue(self, trial: str) -> None:
        """Put a trial whose attempt was abandoned at the front of the queue."""
        self.waiting.insert(0, trial)

    def _has_progressed(self, trial: str) -> bool:
        """Check whether a trial has taken steps since its worker's last death, which is then not the trial's fault."""
        before, self._survived[trial] = self._survived.get(trial, 0), self.steps[trial]
        return self.steps[trial] > before

    def _wait_for(self, trial: str, why: str) -> None:
        first = trial not in self._busy
        self.blocked[trial] = time.monotonic() + RETRY
        if first:
            self._busy.add(trial)
            self._report("busy", trial, why)

    def _failed(self, trial: str, trouble: str) -> None:
        folder = self.store.trial(trial)
        if trouble or folder.status(None) != "failed":
            try:
                with folder.lock():
                    folder.fail(trouble or "ended without a result", "")
            except Busy as error:
                self._wait_for(trial, str(error))
                return
        self._end("failed", trial, folder.error()["error"])

    def _end(self, kind: Any, trial: str, message: str = "") -> None:
        self.over += 1
        self.trials[trial] = self.store.load_trial(self._entries[trial], self._record.tasks)
        self._report(kind, trial, message)

    def _report(self, kind: Any, trial: str, message: str = "") -> None:
        record: TrialRecord = self.trials[trial]
        point = {**record.points[0], "seed": str(record.seed)}
        steps, taken, loss = record.trial["train"]["steps"], self.steps[trial], self._losses[trial]
        self.on_event(Event(kind, trial, point, taken, steps, self.over, len(self.trials), message, loss))
