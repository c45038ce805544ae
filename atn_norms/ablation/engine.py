"""Runs the trials of a study's folder, here, in local processes or on a cluster; the store says what came of it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atn_norms.ablation.environment import differences, versions
from atn_norms.ablation.files import Busy, StoreError
from atn_norms.ablation.records import StudyRecord, TrialRecord
from atn_norms.ablation.store import StudyFolder
from atn_norms.ablation.trial import run_trial
from atn_norms.problems import SpecError, shown

POLL = 0.5  # seconds between looks at the store
WORKERLESS = 60.0  # seconds to wait for a cluster's first worker


@dataclass(frozen=True)
class Event:
    """Something happened to a trial.

    | field | meaning |
    |---|---|
    | `kind` | `started`, `step` (further on), `done`, `diverged`, `failed`, or `busy` (another process has it) |
    | `trial` | its id |
    | `point` | the first grid point it answers, and its seed: what to call it |
    | `step`, `steps` | training steps taken, and in all |
    | `finished`, `total` | trials of the study that are over (done, diverged or failed), and all of them |
    | `message` | why it failed or is busy, one line |
    """

    kind: Literal["started", "step", "done", "diverged", "failed", "busy"]
    trial: str
    point: dict[str, str]
    step: int
    steps: int
    finished: int
    total: int
    message: str = ""


OnEvent = Callable[[Event], None]


def run(
    folder: Path | str, *, workers: int = 2, scheduler: str | None = None, on_event: OnEvent | None = None
) -> StudyRecord:
    """Train every trial of a study that is not done, failed ones again, and return what the folder then says.

    | symbol | meaning |
    |---|---|
    | `workers` | local processes; 0 trains in this process, without Dask |
    | `scheduler` | address of a running Dask scheduler, in place of local processes; its workers share the folder |
    | `on_event` | called in this thread with each `Event` |

    A trial that raises, or kills its worker, becomes a failed trial and the others go on. `KeyboardInterrupt` stops
    the workers and passes on; run again to continue.

    Errors: `SpecError` for a bad argument, where Dask is missing or its scheduler out of reach; `StoreError` where the
    folder cannot be used (`Busy`: another run is at it).
    """
    if workers < 0:
        raise SpecError(f"workers: must be 0 (in this process) or more, got {workers}")
    check_scheduler(scheduler)
    store = StudyFolder(folder)
    store.resolved()
    with store.lock():
        store.mend()
        progress = _Progress(store, on_event or (lambda event: None))
        if progress.todo:
            if workers == 0 and scheduler is None:
                _run_here(store, progress)
            else:
                _run_with_dask(store, progress, workers, scheduler)
    return store.load()


def check_scheduler(address: str | None) -> None:
    """Refuse what cannot be a Dask scheduler's address.

    >>> check_scheduler("tcp://10.0.0.1:8786")
    """
    if address is None or re.fullmatch(r"inproc://\S+|(?:(?:tcp|tls|ws|wss|ucx)://)?[^\s:/]+:\d{1,5}/?", address):
        return
    if re.fullmatch(r"(?:(?:tcp|tls|ws|wss|ucx)://)?\[[0-9a-fA-F:.]+\]:\d{1,5}/?", address):  # IPv6
        return
    raise SpecError(f"scheduler: {shown(address)} is no address of a Dask scheduler; allowed: tcp://host:port")


class _Progress:
    """Turns what the store says into events."""

    def __init__(self, store: StudyFolder, on_event: OnEvent) -> None:
        self.store, self.on_event = store, on_event
        self.trials = {trial.id: trial for trial in store.load().trials}
        self.todo = [trial.id for trial in self.trials.values() if trial.status not in ("done", "diverged")]
        self.over = len(self.trials) - len(self.todo)
        self.steps: dict[str, int] = {}
        self.again: set[str] = set()

    def threads(self) -> int:
        return max(self.trials[trial].trial["train"]["threads"] for trial in self.todo)

    def started(self, trial: str) -> None:
        self.steps[trial] = 0
        self._tell("started", trial)

    def step(self, trial: str, step: int) -> None:
        if step > self.steps[trial]:
            self.steps[trial] = step
            self._tell("step", trial)

    def look(self, running: list[str]) -> None:
        """Read from the store how far the running trials are."""
        for trial in running:
            curve = self.store.trial(trial).curve()
            if curve:
                self.step(trial, curve[-1]["step"])

    def ended(self, trial: str, told: dict[str, str]) -> list[str]:
        """Read from the store how a trial ended; `trouble` is what is known where the store says nothing.

        Return what to try once more: a trial that was busy, for its holder may be the last of a killed run.
        """
        if "unusable" in told:
            raise StoreError(told["unusable"])
        if "busy" in told and trial not in self.again:
            self.again.add(trial)
            return [trial]
        if "busy" in told:
            self._tell("busy", trial, told["busy"])
            return []
        trouble = told.get("trouble", "")
        self.over += 1
        folder = self.store.trial(trial)
        result = folder.result()
        if result is not None:
            self.steps[trial] = result["step"]
            self._tell("diverged" if result["outcome"] == "diverged" else "done", trial)
            return []
        record = folder.record(self.trials[trial].points)
        if record.error is None or trouble:
            folder.fail(trouble or "ended without a result", "")
            record = folder.record(record.points)
        self._tell("failed", trial, (record.error or {}).get("error", trouble))
        return []

    def _tell(self, kind: Any, trial: str, message: str = "") -> None:
        record: TrialRecord = self.trials[trial]
        point = {**record.points[0], "seed": str(record.seed)}
        steps = record.trial["train"]["steps"]
        self.on_event(Event(kind, trial, point, self.steps[trial], steps, self.over, len(self.trials), message))


def work(job: str) -> str:
    """Train one trial, in whatever process this is; everything comes as JSON and goes to the store.

    `job` holds `folder`, `trial` and the `versions` of the process that asked. Returns JSON: `{}`, `busy` where another
    process has the trial, or `unusable` with the reason why the store cannot be written, which ends the run.
    """
    asked = json.loads(job)
    return json.dumps(_attempt(StudyFolder(asked["folder"]), asked["trial"], asked["versions"], None))


def _attempt(
    store: StudyFolder, trial: str, wanted: dict[str, str], on_step: Callable[[int], None] | None
) -> dict[str, str]:
    folder = store.trial(trial)
    try:
        if not folder.path.is_dir():
            raise StoreError(f"{folder.path} is not there: workers must share the study's folder")
        here = versions()
        if here != wanted:
            raise SpecError(f"this worker has {differences(wanted, here)}; install the same versions everywhere")
        run_trial(folder, on_step, here)
    except Busy as error:
        return {"busy": str(error)}
    except StoreError as error:
        return {"unusable": str(error)}
    except Exception as error:  # noqa: BLE001 - a trial may fail in any way, and the others go on
        try:
            folder.fail(_line(error), traceback.format_exc())
        except StoreError as trouble:
            return {"unusable": str(trouble)}
    return {}


def _run_here(store: StudyFolder, progress: _Progress) -> None:
    here, waiting = versions(), list(progress.todo)
    while waiting:
        trial = waiting.pop(0)
        progress.started(trial)
        told = _attempt(store, trial, here, lambda step, trial=trial: progress.step(trial, step))
        waiting += progress.ended(trial, told)


def _run_with_dask(store: StudyFolder, progress: _Progress, workers: int, scheduler: str | None) -> None:
    here = versions()
    waiting = list(progress.todo)
    with _client(min(workers, len(waiting)), scheduler, progress.threads()) as client:
        from distributed.comm import CommClosedError

        running: dict[Any, str] = {}
        try:
            while waiting or running:
                # One trial a worker: a trial that kills its worker is then the only suspect.
                for trial in waiting[: max(0, len(client.nthreads()) - len(running))]:
                    waiting.remove(trial)
                    job = json.dumps({"folder": str(store.path.absolute()), "trial": trial, "versions": here})
                    future = client.submit(work, job, key=f"{trial}-{time.time_ns()}", pure=False)
                    running[future] = trial
                    progress.started(trial)
                _wait(client, running)
                progress.look(list(running.values()))
                for future in [future for future in running if future.done()]:
                    waiting += progress.ended(running.pop(future), _told(future))
        except (CancelledError, CommClosedError) as error:  # nothing else cancels what is running here
            raise SpecError("the connection to the Dask scheduler is lost; what is finished is kept") from error
        finally:
            if client.status == "running":
                client.cancel(list(running))


def _wait(client: Any, running: Iterable[Any]) -> None:
    """Until a trial ends, but no longer than it takes until the next look."""
    from distributed import wait

    if running:
        with contextlib.suppress(TimeoutError):
            wait(list(running), timeout=POLL, return_when="FIRST_COMPLETED")
        return
    try:
        client.wait_for_workers(1, timeout=WORKERLESS)
    except TimeoutError:
        raise SpecError(f"the Dask scheduler has had no worker for {WORKERLESS:.0f} s; start some") from None


def _told(future: Any) -> dict[str, str]:
    """What the worker said about an attempt, or what Dask says in its place."""
    try:
        return json.loads(future.result())
    except CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever Dask raises, this trial failed and the others go on
        if type(error).__name__ == "KilledWorker":
            return {"trouble": "its worker process died twice while training it (out of memory, or a crash)"}
        return {"trouble": f"its worker could not train it: {_line(error)}"}


@contextlib.contextmanager
def _children_deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: a terminal sends it to all, and it is this one that stops the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _client(workers: int, scheduler: str | None, threads: int) -> Iterator[Any]:
    try:
        from dask import config
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise SpecError(
            f"{error.name} is not installed: run pip install 'atn-norms[ablation]', or use --workers 0"
        ) from error
    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": 1,
        "distributed.scheduler.worker-ttl": None,
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        "distributed.admin.log-format": "%(name)s - %(levelname)s - %(message)s",
    }
    with config.set(settings), contextlib.ExitStack() as stack:
        if scheduler is None:
            with _children_deaf_to_interrupts():
                cluster: Any = stack.enter_context(
                    LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        processes=True,
                        memory_limit=0,
                        dashboard_address=None,  # type: ignore[arg-type]
                        silence_logs=logging.CRITICAL,
                    )
                )
            yield stack.enter_context(Client(cluster))
        else:
            log = logging.getLogger("distributed.client")  # its tracebacks tell no more than our sentence does
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.CRITICAL)
            yield stack.enter_context(_connected(scheduler))


def _connected(scheduler: str) -> Any:
    from distributed import Client

    try:
        return Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise SpecError(f"scheduler: {scheduler} cannot be reached ({_line(error)})") from error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
