"""Require the same first metric of all trials of a function: the report compares them by this metric."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Any

from atn_norms.ablation.grid.functions import FunctionSpec
from atn_norms.ablation.store.files import Folder, StoreError
from atn_norms.ablation.store.folder import METRICS, RESOLVED, StudyFolder
from atn_norms.ablation.store.locks import SILENCE, hold, is_locked
from atn_norms.ablation.store.schema import FirstMetric, check
from atn_norms.ablation.store.trial import TrialFolder
from atn_norms.errors import SpecError

FILE = "first.json"  # task -> its first metric, and a trial that has returned it
PATIENCE = SILENCE + 60.0  # seconds to wait for the lock, which a vanished machine may hold until its silence


def require_same_metric(folder: TrialFolder, task: FunctionSpec, metric: str) -> None:
    """Record the first metric that a trial returned, unless another trial of its task has recorded one.

    A finished or running trial decides, not one that was interrupted. A metric named in the study needs no check.

    Errors: `SpecError` where the other trial returned another first metric; `Busy` where another process holds the
    record for long.
    """
    if task.metric is not None:
        return
    store = StudyFolder(folder.path.parents[1])
    place = store.folder.folder(METRICS)
    place.make()
    with hold(place, f"{place.path} is used by another process", patience=PATIENCE):
        place.remove_leftovers()
        tasks = _tasks(store)
        label, recorded = tasks.get(folder.id, ""), _read(place)
        known = recorded.get(label)
        if known is None or not _stands(store, known, folder.id):
            others = (each for each in tasks if tasks[each] == label and each != folder.id)
            found = next((each for each in others if _returned(store, each)), folder.id)
            known = {"metric": metric if found == folder.id else _returned(store, found), "trial": found}
            place.write_json(FILE, recorded | {label: known})
    if known["metric"] != metric:
        expected = f"{known['metric']!r}, as in trial {known['trial']}"
        raise SpecError(task.function, f"{metric!r} as its first metric", expected)


def _read(place: Folder) -> dict[str, Any]:
    """Read the record; empty where it is missing or damaged, since the finished trials have its content."""
    try:
        recorded = place.read_json(FILE) if place.has(FILE) else {}
        for label, known in recorded.items():
            check(FirstMetric, known, f"{place.path / FILE}: {label}")
    except StoreError as error:
        if error.is_of_system:
            raise
        return {}
    return recorded


def _stands(store: StudyFolder, known: dict[str, Any], mine: str) -> bool:
    """Return True if another trial, which is finished or about to finish, has returned the recorded metric."""
    if known["trial"] == mine:
        return False
    is_running = is_locked(store.trial(known["trial"]).folder)  # before the result: a trial ends between the two
    returned = _returned(store, known["trial"])
    return returned == known["metric"] if returned else is_running


def _returned(store: StudyFolder, trial: str) -> str:
    """Return the first metric of a finished trial; empty for any other trial, and for a damaged one."""
    with suppress(StoreError):
        result = store.trial(trial).result(whole=False)
        return next(iter(result["metrics"].get("test", ())), "") if result else ""
    return ""


def _tasks(store: StudyFolder) -> dict[str, str]:
    """Return trial -> task of a study, which a process reads once."""
    status = store.folder.stat(RESOLVED)
    return _tasks_of(store.path.absolute(), (status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=2)
def _tasks_of(path: Any, version: tuple[int, ...]) -> dict[str, str]:
    return {each["id"]: each["points"][0]["task"] for each in StudyFolder(path).resolved()["trials"]}
