"""One attempt at a trial in a worker process: read the job as JSON, and write the outcome into the store."""

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

LOOK = 1.0  # seconds between checks whether the run was stopped


def work(job: str) -> str:
    """Train one trial of a run: `job` is JSON with `folder`, `trial` and the `versions` of the run.

    Return the outcome of `attempt` as JSON. The training stops where the run was stopped. It continues where the run
    was killed, since the next run needs the result.
    """
    request = json.loads(job)
    store = StudyFolder(request["folder"])
    looked = time.monotonic()

    def stop_when_unwanted(step: int) -> None:
        nonlocal looked
        if time.monotonic() - looked >= LOOK:
            looked = time.monotonic()
            if not store.wanted():
                raise Busy(f"the run of trial {request['trial']} was stopped")

    return json.dumps(attempt(store.trial(request["trial"]), request["versions"], stop_when_unwanted))


def attempt(folder: TrialFolder, wanted: dict[str, str], on_step: Callable[[int], None]) -> dict[str, str]:
    """Train a trial to its end, or record its failure in its folder.

    Return `{}`, `busy` with a reason where another process trains the trial, or `unusable` with a reason where the store
    cannot be used, which ends the run.
    """  # noqa: E501

    in_callback = False

    def step(number: int) -> None:
        nonlocal in_callback
        folder.set_step(number)
        in_callback = True
        on_step(number)
        in_callback = False

    try:
        if not folder.path.is_dir():
            raise StoreError(f"{folder.path}: got no folder; expected the study's folder, which workers must share")
        here = versions()
        if missing := differences(wanted, here):
            raise SpecError("worker", missing, "the versions of the computer that submits the trials")
        run_trial(folder, step, here)
    except Busy as error:
        return {"busy": str(error)}
    except StoreError as error:
        return _unless_lost(folder, {"unusable": str(error)})
    except Exception as error:  # noqa: BLE001 - a trial may raise any exception; the others continue
        return _unless_lost(folder, {}) or _failed(folder, line(error), traceback.format_exc())
    except SystemExit as error:
        if in_callback:  # the caller's callback stops the program
            raise
        code = "" if error.code is None else repr(error.code)
        message = f"SystemExit: the trial called sys.exit({code}); expected a return or an exception"
        return _unless_lost(folder, {}) or _failed(folder, message, traceback.format_exc())
    return {}


def _unless_lost(folder: TrialFolder, outcome: dict[str, str]) -> dict[str, str]:
    """Return `outcome`, or `busy` where another process has taken the trial over."""
    return {"busy": f"trial {folder.id}: {folder.lost}"} if folder.lost else outcome


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
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
