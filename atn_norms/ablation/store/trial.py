"""The files of one trial: atomic, durable, and changed only by the holder of its lock.

trial.json  metrics.jsonl  checkpoint.pt  model.safetensors  result.json  run.json  error.json  log.txt  .lock
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atn_norms.ablation.store import checkpoints
from atn_norms.ablation.store.curve import Curve
from atn_norms.ablation.store.files import Busy, Folder, StoreError
from atn_norms.ablation.store.identity import DIGITS, current_names
from atn_norms.ablation.store.locks import Heartbeat, Lock, heartbeat, hold, is_locked
from atn_norms.ablation.store.records import MODEL, Status, TrialRecord
from atn_norms.ablation.store.schema import ID, RETRAIN, StoredError, StoredRun, check, check_result, check_trial
from atn_norms.errors import SpecError, brief, short_repr
from atn_norms.files import most_bytes
from atn_norms.text import encodable

REJECTED = "checkpoint.rejected.pt"
FILES = "files"  # the folder with a function's own files
FUNCTION = "python"  # the kind of task whose trials may take more steps than the study declares
MOST_TRACEBACK = 2**20  # characters of a stored traceback


class TrialFolder:
    """The files of one trial; a process that changes them holds `lock()`.

    Errors: `StoreError` if the folder's name is not an id.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self.path, self.id = folder, folder.path, folder.path.name
        if not re.fullmatch(ID, self.id):
            raise StoreError(
                f"{folder.path.parent}: trial: got {short_repr(self.id)}; expected {DIGITS} hexadecimal digits"
            )
        self._curve = Curve(folder)
        self._lock: Lock | None = None
        self.lost = ""  # the reason why this process lost the trial before `lock` ended; empty if it did not
        self.loss: float | None = None  # the last training loss

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock this trial; `Busy` if another process trains it, or takes it over later."""
        busy = f"trial {self.id} in {self.path} is being trained by another process"
        with hold(self.folder, busy) as self._lock:
            self.lost = ""
            try:
                yield
            finally:
                self.lost = self._lock.describe_loss() if self._lock.lost else ""
                self._lock = None
                self._curve.close()

    def _refuse_lost(self) -> None:
        """Raise `Busy`, before any change, if another process has taken the trial over."""
        if self._lock is not None and self._lock.lost:
            raise Busy(f"trial {self.id}: {self._lock.describe_loss()}")

    def set_step(self, step: int) -> None:
        """Set the step and the loss that the next heartbeat reports."""
        if self._lock is not None:
            self._lock.step, self._lock.loss = step, self.loss

    def heartbeat(self) -> Heartbeat | None:
        """Return the last heartbeat of the process that trains the trial, or that was killed while it did."""
        return heartbeat(self.folder)

    def trial(self) -> dict[str, Any]:
        """Read the options of the trial; their hash must match its id."""
        place, cure = str(self.path / "trial.json"), "remove it and run the study again, which restores it"
        trial = self.folder.read_json("trial.json", cure=cure)
        check_trial(trial, self.id, place, cure)
        return current_names(trial)

    def has_trial(self) -> bool:
        """Return True if `trial.json` exists."""
        return self.folder.has("trial.json")

    def write_trial(self, trial: dict[str, Any]) -> None:
        """Write `trial.json`, and create a missing folder."""
        self.folder.make()
        self.folder.write_json("trial.json", trial)

    def has_result(self) -> bool:
        """Return True if the trial is done."""
        return self.folder.has("result.json")

    def result(self, whole: bool = True) -> dict[str, Any] | None:
        """Read the result; None until the trial is done. A damaged result is an error and is not replaced.

        Without `whole`, only the size of the learning curve is compared.
        """
        if not self.has_result():
            return None
        result = self.folder.read_json("result.json", cure=RETRAIN)
        check_result(result, self.id, str(self.path / "result.json"))
        self._curve.check(result["curve"], whole)
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the trial as done: make its other files durable first, and write `result.json` last."""
        mark = self._curve.mark()
        self._refuse_lost()
        self.folder.write_json("result.json", {**result, "curve": mark})
        self.clear()

    def serves(self, trial: dict[str, Any]) -> bool:
        """Return True if this trial has all files that training `trial`, which has the same id, would write."""
        if trial["task"]["kind"] == FUNCTION:
            return not self.folder.has(FILES)
        if (result := self.result(whole=False)) and result["outcome"] != "finished":
            return True  # a diverged trial saves no model
        wanted = keeps_model(trial["train"])
        return wanted == "none" or (wanted == keeps_model(self.trial()["train"]) and self.folder.has(MODEL))

    def take(self, source: TrialFolder, trial: dict[str, Any]) -> None:
        """Copy the files of the same finished trial in another study, unless this one is done.

        Errors: `Busy` while another process trains this trial; `StoreError` for a damaged source.
        """
        result = source.result(whole=False)
        assert result is not None and source.id == self.id
        curve = source._curve.content(result["curve"])
        wants_model = trial["task"]["kind"] == FUNCTION or keeps_model(trial["train"]) != "none"
        has_model = wants_model and source.folder.has(MODEL)
        model = source.folder.read(MODEL, most_bytes()) if has_model else None
        if model is not None:
            _check_model(model, source.path / MODEL)
        with self.lock():
            if self.has_result():
                return
            self._curve.replace(curve)
            if model is not None:
                self.keep_model(model)
            else:
                self.drop_model()
            self.write_run(source.run())
            self.log(f"copied from {source.path}")
            self._refuse_lost()
            self.folder.write_json("result.json", result)
            self.clear()

    def keep_model(self, content: bytes) -> None:
        """Write `model.safetensors`, which is valid once `result.json` exists."""
        self._refuse_lost()
        self.folder.write(MODEL, content)

    def start(self) -> None:
        """Remove the model of an earlier attempt, unless a checkpoint continues that attempt."""
        if not self.folder.has("checkpoint.pt"):
            self.drop_model()

    def drop_model(self) -> None:
        """Remove `model.safetensors` if it exists."""
        if self.folder.has(MODEL):
            self._refuse_lost()
            self.folder.remove(MODEL)

    def clear(self) -> None:
        """Remove the files that a finished trial no longer needs."""
        for name in ("checkpoint.pt", REJECTED, "error.json"):
            if self.folder.has(name):
                self.folder.remove(name)
        self.folder.remove_leftovers()

    def fail(self, error: str, trace: str) -> None:
        """Record the error of the last attempt."""
        self._refuse_lost()
        error, trace = encodable(error), encodable(brief(trace, MOST_TRACEBACK))
        self.folder.write_json("error.json", {"error": error, "traceback": trace})
        self.log(f"failed: {error}")

    def error(self) -> dict[str, Any]:
        """Read the error of the last attempt."""
        error = self.folder.read_json("error.json", cure="remove it")
        check(StoredError, error, str(self.path / "error.json"), "remove it")
        return error

    def run(self) -> dict[str, Any]:
        """Read attempts, seconds and host, which differ from run to run; empty before the first attempt.

        A damaged file counts as empty, since only times are lost; the next attempt writes that to the log.
        """
        try:
            run = self.folder.read_json("run.json") if self.folder.has("run.json") else {}
            check(StoredRun, run, str(self.path / "run.json"))
        except StoreError:
            return {}
        return run

    def write_run(self, run: dict[str, Any]) -> None:
        """Write `run.json`."""
        self._refuse_lost()
        self.folder.write_json("run.json", run)

    def measure(self, line: dict[str, Any]) -> None:
        """Append a line to the learning curve."""
        self._refuse_lost()
        self._curve.add(line)
        self.loss = line["train_loss"]

    def curve(self) -> list[dict[str, Any]]:
        """Read the learning curve so far."""
        return self._curve.read()

    def last_step(self) -> int:
        """Return the step of the last point of the learning curve, 0 before the first."""
        point = self._curve.last()
        return point["step"] if point else 0

    def log(self, text: str) -> None:
        """Append a line, with the time, to `log.txt`."""
        self.folder.append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def save(self, state: dict[str, Any]) -> None:
        """Save a checkpoint of `state`: tensors, numbers, text, and tuples, lists and mappings of these."""
        content = checkpoints.pack(self.id, state, self._curve.mark())
        self._refuse_lost()
        self.folder.write("checkpoint.pt", content)

    def restore(self) -> dict[str, Any] | None:
        """Read the last checkpoint and cut the learning curve back to it. Without one, return None and empty the curve.

        A checkpoint that is damaged, or belongs to another trial or curve, is set aside, and the trial starts over. An
        error of the machine, such as no memory or a file that the system cannot read, keeps the checkpoint.
        """
        state, mark, problem = None, None, ""
        if self.folder.has("checkpoint.pt"):
            try:
                content = self.folder.read("checkpoint.pt", most_bytes())
                state, mark = checkpoints.unpack(self.id, content)
            except StoreError as error:
                if error.is_of_system:
                    raise
                problem = str(error)
        self._refuse_lost()
        elsewhere = self._lock is not None and self._lock.orphaned
        if not self._curve.cut(mark, elsewhere) and not problem:
            problem = "metrics.jsonl is not the curve that it was saved with"
        if problem:
            self.reject_checkpoint(problem)
            return None
        return state

    def reject_checkpoint(self, problem: str) -> None:
        """Set an unusable checkpoint aside, write the reason to the log, and empty the learning curve."""
        self._refuse_lost()
        if self.folder.has("checkpoint.pt"):
            self.folder.rename("checkpoint.pt", REJECTED)
        self.drop_model()
        self.log(f"checkpoint.pt cannot be used and is now {REJECTED}: {problem}; starting over")
        self._curve.cut(None, self._lock is not None and self._lock.orphaned)
        self.loss = None

    def tidy(self) -> None:
        """Remove temporary files and the error of the last attempt; the caller must hold the lock."""
        self._refuse_lost()
        if self.folder.has("error.json"):
            self.folder.remove("error.json")
        self.folder.remove_leftovers()

    def status(self, result: dict[str, Any] | None) -> Status:
        """Return the status of the trial from its result and its lock."""
        if result is not None:
            return "done" if result["outcome"] == "finished" else "diverged"
        if is_locked(self.folder):
            return "running"
        return "failed" if self.folder.has("error.json") else "pending"

    def record(
        self, points: tuple[dict[str, str], ...], planned: dict[str, Any] | None = None, curves: bool = True
    ) -> TrialRecord:
        """Read all files of the trial; `planned` replaces a lost `trial.json`.

        Without `curves` the learning curve is not read, only its last line. A trial whose learning curve is too large
        to be read counts as failed; without `curves`, only a trial with a result does.
        """
        trial = planned if planned is not None and not self.has_trial() else self.trial()
        result, damage = self.result(whole=curves), None
        self._refuse_too_long(result, trial)
        try:
            if curves or result is not None:
                self._curve.refuse_size()
        except StoreError as error:
            result, damage = None, {"error": str(error), "traceback": ""}
        status, curve = self.status(result), self.curve() if curves and not damage else []
        status = "failed" if damage else status
        return TrialRecord(
            id=self.id,
            trial=trial,
            points=points,
            seed=trial["seed"],
            status=status,
            result=result,
            curve=curve,
            run=self.run() or None,
            error=damage or (self.error() if status == "failed" else None),
            step=result["step"] if result is not None else self._reached(status),
            folder=self.path,
        )

    def _refuse_too_long(self, result: dict[str, Any] | None, trial: dict[str, Any]) -> None:
        steps = trial["train"]["steps"]
        if result is not None and result["step"] > steps and trial["task"]["kind"] != FUNCTION:
            raise StoreError(
                f"{self.path / 'result.json'}: damaged: step: got {result['step']}; expected at most {steps}, the "
                f"trial's steps; {RETRAIN}"
            )

    def _reached(self, status: Status) -> int:
        last = self.heartbeat() if status == "running" else None
        return max(self.last_step(), (last.step or 0) if last is not None else 0)


def _check_model(content: bytes, file: Path) -> None:
    """Raise `StoreError` for the content of a model file that is damaged."""
    from atn_norms.layers.io import preprocessing_of

    try:
        preprocessing_of(content, file)
    except SpecError as error:
        raise StoreError(str(error)) from error


def keeps_model(train: dict[str, Any]) -> str:
    """Return which weights a trial saves: `best`, `last` or `none`; by default the scored ones (`keep`)."""
    return train.get("keep_model") or train["keep"]
