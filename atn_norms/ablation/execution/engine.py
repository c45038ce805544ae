"""Run the trials of a study's folder: in this process, in local processes or on a cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

from atn_norms.ablation.execution.cluster import POLL, run_with_dask
from atn_norms.ablation.execution.environment import versions
from atn_norms.ablation.execution.events import Event, OnEvent, Progress
from atn_norms.ablation.execution.worker import attempt
from atn_norms.ablation.grid.sources import refuse_changed_plugins
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.ablation.store.records import StudyRecord, refuse_missing_metrics
from atn_norms.errors import SpecError, short_repr, typed_repr

__all__ = ["Event", "OnEvent", "OnStart", "check_scheduler", "run"]

OnStart = Callable[[StudyRecord], None]


def run(
    folder: Path | str,
    *,
    workers: int = 2,
    scheduler: str | None = None,
    on_start: OnStart | None = None,
    on_event: OnEvent | None = None,
) -> StudyRecord:
    """Train every trial that is not done, retry failed trials, and return the record of the study.

    | symbol | meaning |
    |---|---|
    | `workers` | local processes; 0 trains in this process, without Dask |
    | `scheduler` | address of a running Dask scheduler, instead of local processes; its workers must share the folder |
    | `on_start` | called in this thread with the study's record, before any training |
    | `on_event` | called in this thread with each `Event` |

    A trial that raises, or kills its worker, is recorded as failed, and the others continue. A trial that another
    process still trains, such as a worker that outlived its run, is awaited. `KeyboardInterrupt` stops the workers and
    is raised again; run again to continue.

    Errors: `SpecError` for a bad argument, where Dask is not installed, or where its scheduler cannot be reached;
    `StoreError` where the folder cannot be used (`Busy`: another process runs this study).
    """
    check_workers(workers)
    check_scheduler(scheduler)
    store = StudyFolder(folder)
    store.refuse_no_study()  # before the lock, which writes a file
    with store.lock() as lock:
        resolved = store.resolved()
        refuse_changed_plugins(store.path, (each["trial"] for each in resolved["trials"]))
        store.restore(resolved)
        record = store.load(resolved)
        if on_start is not None:
            on_start(record)
        progress = Progress(store, record, lock, on_event or (lambda event: None))
        if progress.left:
            if workers == 0 and scheduler is None:
                _run_here(store, progress)
            else:
                run_with_dask(store, progress, workers, scheduler)
    record = progress.record()
    refuse_missing_metrics(record)
    return record


def check_workers(workers: Any) -> None:
    """Raise `SpecError` for an invalid number of processes.

    >>> check_workers(0)
    """
    if not isinstance(workers, Integral) or isinstance(workers, bool):
        raise SpecError("workers", typed_repr(workers), "a whole number")
    if workers < 0:
        raise SpecError("workers", str(workers), "at least 0 (0 trains in this process)")


def check_scheduler(address: str | None) -> None:
    """Raise `SpecError` for an invalid address of a Dask scheduler.

    >>> check_scheduler("tcp://10.0.0.1:8786")
    """
    if address is None or re.fullmatch(r"inproc://\S+|(?:(?:tcp|tls|ws|wss|ucx)://)?[^\s:/]+:\d{1,5}/?", address):
        return
    if re.fullmatch(r"(?:(?:tcp|tls|ws|wss|ucx)://)?\[[0-9a-fA-F:.]+\]:\d{1,5}/?", address):  # IPv6
        return
    raise SpecError("scheduler", short_repr(address), "an address such as tcp://host:port")


def _run_here(store: StudyFolder, progress: Progress) -> None:
    here, store = versions(), StudyFolder(store.path.absolute())  # a function may change the working directory
    while progress.left:
        trials = progress.due(1)
        progress.look([])
        for trial in trials:
            folder = store.trial(trial)
            outcome = attempt(folder, here, lambda step, f=folder: progress.step(f.id, step, f.loss))
            progress.ended(trial, outcome)
        if not trials:
            time.sleep(POLL)
