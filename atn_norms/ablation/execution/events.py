"""What happens to the trials of a run: what is left to do, and what the store says became of the rest, as events."""

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

RETRY = 2.0  # seconds until a trial that another process has is asked for again


@dataclass(frozen=True)
class Event:
    """Something happened to a trial.

    | field | meaning |
    |---|---|
    | `kind` | `started`, `step` (further on), `done`, `diverged`, `failed`, or `busy` (another process has it; it is waited for) |
    | `trial` | its id |
    | `point` | the first grid point it answers, and its seed: what to call it |
    | `step`, `steps` | training steps taken, and in all |
    | `finished`, `total` | trials of the study that are over (done, diverged or failed), and all of them |
    | `message` | why it failed or is busy, one line |
    | `loss` | the last point of its training curve, None before the first |
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
    """Which trials are still to be done, and how far the others are, read from the store and told as events."""

    def __init__(self, store: StudyFolder, record: StudyRecord, hold: Lock, on_event: OnEvent) -> None:
        self.store, self.hold, self.on_event = store, hold, on_event
        self._record = record
        self._entries = {
            trial.id: {"id": trial.id, "points": trial.points, "trial": trial.trial} for trial in record.trials
        }
        self.trials = {trial.id: trial for trial in record.trials}
        self.waiting = [trial.id for trial in self.trials.values() if trial.status not in ("done", "diverged")]
        self.over = len(self.trials) - len(self.waiting)
        self.blocked: dict[str, float] = {}  # trials that other processes have, and when to ask again
        self.steps: dict[str, int] = {}
        self._losses: dict[str, float | None] = {}
        self._heard: dict[str, tuple[Heartbeat | None, float]] = {}
        self._survived: dict[str, int] = {}
        self._busy: set[str] = set()

    def record(self) -> StudyRecord:
        """Return the study as it is now: the trials of this run read again, the others as they were."""
        return replace(self._record, trials=tuple(self.trials.values()))

    @property
    def left(self) -> bool:
        """Whether any trial is still to be started."""
        return bool(self.waiting or self.blocked)

    def threads(self) -> int:
        """The most threads that a trial asks for."""
        return max(self.trials[trial].trial["train"]["threads"] for trial in self.waiting)

    def due(self, most: int) -> list[str]:
        """Take up to so many trials off the list, to be started now."""
        now = time.monotonic()
        ready = [*self.waiting, *(trial for trial, again in self.blocked.items() if again <= now)][: max(0, most)]
        self.waiting = [trial for trial in self.waiting if trial not in ready]
        for trial in ready:
            self._heard[trial] = (None, now)
            if self.blocked.pop(trial, None) is None:
                self.steps.setdefault(trial, 0)
                self._losses.setdefault(trial, None)
                self._tell("started", trial)
        return ready

    def step(self, trial: str, step: int, loss: float | None) -> None:
        """A trial is at this step."""
        if step > self.steps[trial]:
            self.steps[trial], self._losses[trial] = step, loss
            self._tell("step", trial)

    def look(self, running: list[str]) -> None:
        """Read from the store how far the trials are that other processes train."""
        if self.hold.lost:
            raise Busy(self.hold.describe_loss())
        for trial in (*running, *self.blocked):
            said = self.store.trial(trial).heartbeat()
            if said is not None and said != self._heard[trial][0]:
                self._heard[trial] = (said, time.monotonic())
                self.step(trial, said.step or 0, said.loss)

    def silent(self, trial: str) -> bool:
        """Whether nothing has been heard of a running trial for too long."""
        return time.monotonic() - self._heard[trial][1] >= locks.SILENCE

    def heard(self, trial: str) -> None:
        """Something else says that a trial is in living hands."""
        self._heard[trial] = (self._heard[trial][0], time.monotonic())

    def ended(self, trial: str, told: dict[str, str]) -> None:
        """An attempt is over: read from the store what came of it; `told` counts only where the store says nothing.

        | key of `told` | meaning |
        |---|---|
        | `unusable` | the store cannot be used, which ends the run |
        | `busy` | another process has the trial: ask again later |
        | `died` | its worker died, again: a failure unless the training came further than when that was said before |
        | `trouble` | anything else that went wrong outside the trial itself |
        """
        if "unusable" in told:
            raise StoreError(told["unusable"])
        folder, trouble = self.store.trial(trial), told.get("died") or told.get("trouble", "")
        result = folder.result()
        if result is not None:
            self.steps[trial] = result["step"]
            self._end("diverged" if result["outcome"] == "diverged" else "done", trial)
        elif "busy" in told:
            self._wait_for(trial, told["busy"])
        elif "died" in told and self._came_further(trial):
            self.waiting.append(trial)
        else:
            self._failed(trial, trouble)

    def again(self, trial: str) -> None:
        """An attempt is given up, and the trial wants another one before all others."""
        self.waiting.insert(0, trial)

    def _came_further(self, trial: str) -> bool:
        """Workers may be taken away for no fault of a trial's: then it got somewhere in between."""
        before, self._survived[trial] = self._survived.get(trial, 0), self.steps[trial]
        return self.steps[trial] > before

    def _wait_for(self, trial: str, why: str) -> None:
        first = trial not in self._busy
        self.blocked[trial] = time.monotonic() + RETRY
        if first:
            self._busy.add(trial)
            self._tell("busy", trial, why)

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
        self._tell(kind, trial, message)

    def _tell(self, kind: Any, trial: str, message: str = "") -> None:
        record: TrialRecord = self.trials[trial]
        point = {**record.points[0], "seed": str(record.seed)}
        steps, taken, loss = record.trial["train"]["steps"], self.steps[trial], self._losses[trial]
        self.on_event(Event(kind, trial, point, taken, steps, self.over, len(self.trials), message, loss))
