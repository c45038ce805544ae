"""Run trials on the workers of a Dask cluster: local processes, or those of a scheduler."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from atn_norms.ablation.execution.environment import versions
from atn_norms.ablation.execution.events import Progress
from atn_norms.ablation.execution.worker import line, work
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.errors import SpecError

log = logging.getLogger(__name__)

KEPT = "Finished trials are kept."
POLL = 0.5  # seconds between reads of the store
CONNECT = 10  # seconds for a scheduler to accept a connection
WORKERLESS = 60.0  # seconds to wait for a cluster's first worker
DESERTED = 600.0  # seconds to wait for a worker after the last one has left
PATIENCE = 120.0  # seconds for the scheduler to answer; on a busy machine it may be slow
ENCRYPTED = ("tls://", "wss://", "inproc://")  # inproc: within this process
STARTS = 3  # attempts to start the local processes
PING = 10.0  # seconds for a silent worker to answer


def run_with_dask(store: StudyFolder, progress: Progress, workers: int, scheduler: str | None) -> None:
    """Train the remaining trials on `workers` local processes, or on the workers of a scheduler."""
    local = min(workers, len(progress.waiting))
    with _client(local, scheduler, progress.threads(), store.path) as client:
        from distributed.comm import CommClosedError

        dispatcher = Dispatcher(client, store, progress)
        try:
            while progress.left or dispatcher.running:
                dispatcher.submit()
                dispatcher.wait()
                progress.look(list(dispatcher.running.values()))
                dispatcher.collect()
                dispatcher.drop_silent()
        except (CancelledError, CommClosedError) as error:  # nothing else cancels these futures
            raise SpecError("scheduler", "a lost connection", "a running Dask scheduler", detail=KEPT) from error
        finally:
            progress.hold.end()  # stops the workers of every machine within a second
            with contextlib.suppress(TimeoutError):  # it would hide the reason for the end
                if client.status == "running":
                    client.cancel(list(dispatcher.running))


class Dispatcher:
    """Submit trials to the workers of a cluster and collect their outcomes."""

    def __init__(self, client: Any, store: StudyFolder, progress: Progress) -> None:
        self.client, self.store, self.progress = client, store, progress
        self.versions = versions()
        self.running: dict[Any, str] = {}
        self.patience, self.manned = WORKERLESS, time.monotonic()

    def submit(self) -> None:
        """Submit one trial per idle worker, so that a worker's death points to a single trial."""
        workers = len(self._call(self.client.scheduler.ncores))
        if workers:
            self.patience, self.manned = DESERTED, time.monotonic()
        elif time.monotonic() - self.manned > self.patience:
            got = f"no worker of the Dask scheduler for {self.patience:.0f} s"
            raise SpecError("scheduler", got, "at least one worker", detail=KEPT)
        for trial in self.progress.due(workers - len(self.running)):
            job = json.dumps({"folder": str(self.store.path.absolute()), "trial": trial, "versions": self.versions})
            self.running[self.client.submit(work, job, key=f"{trial}-{time.time_ns()}", pure=False)] = trial

    def wait(self) -> None:
        """Wait until a trial ends, at most `POLL` seconds."""
        from distributed import wait

        if not self.running:
            time.sleep(POLL)
            return
        with contextlib.suppress(TimeoutError):
            wait(list(self.running), timeout=POLL, return_when="FIRST_COMPLETED")

    def collect(self) -> None:
        """Record the outcomes of the attempts that have ended."""
        for future in [future for future in self.running if future.done()]:
            self.progress.ended(self.running.pop(future), _outcome(future))

    def drop_silent(self) -> None:
        """Retire every worker that has hung or vanished, and train its trial again on another worker."""
        for future, trial in list(self.running.items()):
            if not self.progress.silent(trial):
                continue
            address = self._worker(future.key)
            if address is None or self._answers(address):  # the trial is queued, or its worker is alive
                self.progress.reset_silence(trial)
                continue
            del self.running[future]
            self.client.cancel([future])
            self._call(self.client.scheduler.retire_workers, workers=[address], close_workers=True, remove=True)
            self.progress.requeue(trial)

    def _worker(self, key: str) -> str | None:
        processing = self._call(self.client.scheduler.processing, workers=None)
        return next((address for address, keys in processing.items() if key in keys), None)

    def _answers(self, address: str) -> bool:
        try:
            broadcast = self.client.scheduler.broadcast
            self.client.sync(broadcast, msg={"op": "identity"}, workers=[address], callback_timeout=PING)
        except (TimeoutError, OSError):
            return False
        return True

    def _call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        try:
            return self.client.sync(function, **arguments, callback_timeout=PATIENCE)
        except TimeoutError as error:
            got = f"no answer of the Dask scheduler for {PATIENCE:.0f} s"
            raise SpecError("scheduler", got, "an answer", detail=KEPT) from error


def _outcome(future: Any) -> dict[str, str]:
    """Return the outcome that the worker reports, or the error that Dask raises for it."""
    try:
        return json.loads(future.result())
    except CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - Dask raises any type; only this trial fails
        if type(error).__name__ == "KilledWorker":
            return {"died": "its worker process died twice while training it (out of memory, or a crash)"}
        return {"trouble": f"its worker could not train it: {line(error)}"}


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Delay Ctrl-C and other ending signals until the end; processes started inside block Ctrl-C.

    A terminal sends Ctrl-C to every process of a job. Only this process handles it, and stops the others in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    delayed: list[int] = []
    before = {
        each: signal.signal(each, lambda number, frame: delayed.append(number))
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(signal.getsignal(each))
    }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # threads and processes inherit this mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for each, handler in before.items():
            signal.signal(each, handler)
    for each in delayed[:1]:
        signal.raise_signal(each)


@contextlib.contextmanager
def _client(workers: int, scheduler: str | None, threads: int, folder: Path) -> Iterator[Any]:
    try:
        from dask import config
        from distributed import Client

        if scheduler is None:
            import cryptography  # noqa: F401  Dask needs it for the certificates of local processes
    except ModuleNotFoundError as error:
        cure = "Run pip install 'atn-norms[ablation]', or use --workers 0"
        raise SpecError(got=f"no package {error.name}", expected="an installed package", detail=cure) from error
    settings: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": 1,
        "distributed.scheduler.worker-ttl": None,
        "distributed.deploy.lost-worker-timeout": "1 day",  # the default of 15 s is too short for a restart
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        "distributed.admin.log-format": "%(name)s - %(levelname)s - %(message)s",
    }
    with config.set(settings), contextlib.ExitStack() as stack:
        if scheduler is None:
            resource_tracker.ensure_running()  # it unblocks signals when it starts, so it starts before they wait
            with _signals_wait():
                cluster = stack.enter_context(_started(workers, folder))
            yield stack.enter_context(Client(cluster))
        else:
            if not scheduler.startswith(ENCRYPTED):
                log.warning(
                    "scheduler: %s is not encrypted; anyone who can reach its port can run code as you. "
                    "Start it with TLS and use tls://host:port",
                    scheduler,
                )
            client_log = logging.getLogger("distributed.client")  # its tracebacks repeat our error
            stack.callback(client_log.setLevel, client_log.level)
            client_log.setLevel(logging.CRITICAL)
            yield stack.enter_context(_connected(scheduler))


def _started(workers: int, folder: Path) -> Any:
    """Start the local processes; retry where a process ends while it starts."""
    from atn_norms.ablation.execution.local_cluster import local_cluster

    for attempt in range(STARTS):
        try:
            return local_cluster(workers)
        except RuntimeError as error:  # Dask's "Nanny failed to start"
            if attempt == STARTS - 1:
                reason = line(error.__cause__ or error)
                resume = shlex.join(["atn-norms", "resume", str(folder), "--workers", "0"])
                got = f"a local process that ended while starting, {STARTS} times ({reason})"
                cure = f"{KEPT} To resume without processes: {resume}"
                raise SpecError("workers", got, "a process that starts", detail=cure) from error
    raise AssertionError("unreachable")


def _connected(scheduler: str) -> Any:
    from distributed import Client

    try:
        return Client(scheduler, timeout=CONNECT)
    except (OSError, ValueError) as error:
        got = f"{scheduler}, which cannot be reached ({line(error)})"
        raise SpecError("scheduler", got, "the address of a Dask scheduler") from error
