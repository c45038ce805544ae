"""One attempt at a trial, in whatever process this is: asked for in JSON, its outcome put into the store."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable

from atn_norms.ablation.execution.environment import differences, versions
from atn_norms.ablation.execution.trial import run_trial
from atn_norms.ablation.store.files import Busy, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.ablation.store.trial import TrialFolder
from atn_norms.errors import SpecError

LOOK = 1.0  # seconds between looks whether the study is still wanted


def work(job: str) -> str:
    """Train one trial for the run that asks: `job` holds `folder`, `trial` and the `versions` there, as JSON.

    Return what `attempt` says, as JSON. Where the run was stopped the training stops too, so that nobody's cluster is left
    working for nothing; where the run has vanished it goes on, for the next run will want the result.
    """  # noqa: E501
    asked = json.loads(job)
    store = StudyFolder(asked["folder"])
    looked = time.monotonic()

    def stop_when_unwanted(step: int) -> None:
        nonlocal looked
        if time.monotonic() - looked >= LOOK:
            looked = time.monotonic()
            if not store.wanted():
                raise Busy(f"the run that asked for trial {asked['trial']} was stopped")

    return json.dumps(attempt(store.trial(asked["trial"]), asked["versions"], stop_when_unwanted))


def attempt(folder: TrialFolder, wanted: dict[str, str], on_step: Callable[[int], None]) -> dict[str, str]:
    """Train a trial to its end, or note in its folder why that failed.

    Return `{}`, `busy` where another process has the trial, or `unusable` with the reason why the store cannot be used,
    which ends the run.
    """

    def step(number: int) -> None:
        folder.set_step(number)
        on_step(number)

    try:
        if not folder.path.is_dir():
            raise StoreError(f"{folder.path} is not there: workers must share the study's folder")
        here = versions()
        if missing := differences(wanted, here):
            raise SpecError(f"this worker has {missing}; install the same versions everywhere")
        run_trial(folder, step, here)
    except Busy as error:
        return {"busy": str(error)}
    except StoreError as error:
        return _unless_lost(folder, {"unusable": str(error)})
    except Exception as error:  # noqa: BLE001 - a trial may fail in any way, and the others go on
        return _unless_lost(folder, {}) or _failed(folder, line(error), traceback.format_exc())
    return {}


def _unless_lost(folder: TrialFolder, told: dict[str, str]) -> dict[str, str]:
    """What to tell; an attempt at a trial that is another's by now tells nothing of it."""
    return {"busy": f"trial {folder.id}: {folder.lost}"} if folder.lost else told


def _failed(folder: TrialFolder, error: str, trace: str) -> dict[str, str]:
    try:
        with folder.lock():
            folder.fail(error, trace)
    except Busy as other:
        return {"busy": str(other)}
    except StoreError as trouble:
        return {"unusable": str(trouble)}
    return {}


def line(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
