"""A study's folder: the only truth about what is done, laid out so that a kill at any moment costs nothing finished.

DIR/study.yaml  study.resolved.json  environment.json  .lock
DIR/trials/ID/  trial.json  metrics.jsonl  checkpoint.pt  model.safetensors  result.json
                run.json  error.json  log.txt  .lock
DIR/report/     derived, always rebuildable
"""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atn_norms.ablation.store.curve import Curve
from atn_norms.ablation.store.files import (
    Busy,
    StoreError,
    append,
    canonical,
    make_folder,
    named,
    read_json,
    remove,
    write,
    write_json,
)
from atn_norms.ablation.store.locks import Heartbeat, Lock, heartbeat, hold, is_locked, whose
from atn_norms.ablation.store.records import Status, StudyRecord, TaskFacts, TrialRecord
from atn_norms.errors import SpecError, beside

if TYPE_CHECKING:
    from atn_norms.ablation.grid.plan import Plan

MODEL = "model.safetensors"
RESOLVED = "study.resolved.json"
OURS = {"study.yaml", RESOLVED, "environment.json", "trials", "report", ".lock"}


class TrialFolder:
    """The files of one trial; whoever changes them holds `lock()`."""

    def __init__(self, path: Path) -> None:
        self.path, self.id = path, path.name
        self._lines = Curve(path / "metrics.jsonl")
        self._hold: Lock | None = None
        self.lost = False  # whether another process had taken the trial over when `lock` ended
        self.loss: float | None = None  # the last that was measured

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this trial; `Busy` when another process trains it, and later when another has taken it over."""
        busy = f"trial {self.id} in {self.path} is being trained by another process"
        with hold(self.path / ".lock", busy) as self._hold:
            self.lost = False
            try:
                yield
            finally:
                self.lost = self._hold.lost
                self._hold = None
                self._lines.close()

    def _mine(self) -> None:
        """Refuse to change anything that another process has taken over."""
        if self._hold is not None and self._hold.lost:
            raise Busy(f"trial {self.id} in {self.path} was taken over by another process, or its .lock removed")

    def tell(self, step: int) -> None:
        """Let others see how far the training is, with the next beat."""
        if self._hold is not None:
            self._hold.step, self._hold.loss = step, self.loss

    def heartbeat(self) -> Heartbeat | None:
        """What the process that trains this said last, or what the one that was killed did."""
        return heartbeat(self.path / ".lock")

    def trial(self) -> dict[str, Any]:
        """The trial itself: everything its result depends on."""
        return read_json(self.path / "trial.json")

    def result(self) -> dict[str, Any] | None:
        """The result, None until the trial is done; a damaged one is an error, never silently made again."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        result = read_json(path)
        if result.get("trial") != self.id or result.get("outcome") not in ("finished", "diverged"):
            raise StoreError(f"{path}: not the result of trial {self.id}; remove it to train the trial again")
        if not _is_whole(result):
            raise StoreError(f"{path}: damaged, it lacks `step` or `metrics`; remove it to train the trial again")
        self._lines.check(result.get("curve"))
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Declare the trial done: what belongs to it becomes durable first, `result.json` last."""
        mark = self._lines.mark()
        self._mine()
        write_json(self.path / "result.json", {**result, "curve": mark})
        self.clear()

    def keep_model(self, content: bytes) -> None:
        """Write `model.safetensors`, which belongs to the trial once `result.json` is there."""
        self._mine()
        write(self.path / MODEL, content)

    def clear(self) -> None:
        """Remove what a finished trial needs no more."""
        for name in ("checkpoint.pt", "error.json"):
            if (self.path / name).exists():
                remove(self.path / name)
        _tidy(self.path)

    def fail(self, error: str, trace: str) -> None:
        """Note why the last attempt failed."""
        self._mine()
        write_json(self.path / "error.json", {"error": error, "traceback": trace})
        self.log(f"failed: {error}")

    def run(self) -> dict[str, Any]:
        """Attempts, seconds, host: what differs from run to run; empty before the first attempt.

        Only times are lost with a damaged one, so it counts as empty, and the next attempt notes that in the log.
        """
        path = self.path / "run.json"
        if not path.exists():
            return {}
        with suppress(StoreError):
            run = read_json(path)
            if isinstance(run.get("attempts", 0), int) and isinstance(run.get("seconds", 0.0), int | float):
                return run
        return {}

    def note(self, run: dict[str, Any]) -> None:
        """Write `run.json`."""
        self._mine()
        write_json(self.path / "run.json", run)

    def measure(self, line: dict[str, Any]) -> None:
        """Add a line to the learning curve."""
        self._mine()
        self._lines.add(line)
        self.loss = line["train_loss"]

    def curve(self) -> list[dict[str, Any]]:
        """The learning curve so far."""
        return self._lines.read()

    def log(self, text: str) -> None:
        """Add a line, with the time, to `log.txt`."""
        append(self.path / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def save(self, state: dict[str, Any]) -> None:
        """Checkpoint `state`: tensors, numbers, text, and tuples, lists and mappings of them."""
        import torch

        buffer = io.BytesIO()
        torch.save({"state": state, "metrics": self._lines.mark()}, buffer)
        self._mine()
        write(self.path / "checkpoint.pt", _signed(buffer.getvalue()))

    def restore(self) -> dict[str, Any] | None:
        """The last checkpoint, and the learning curve cut back to it; None (and an empty curve) to start over.

        A checkpoint only saves time, so one that cannot be used is put in the log and costs a fresh start.
        """
        state, mark = self._checkpoint()
        self._mine()
        if not self._lines.cut(mark, elsewhere=self._hold is not None and self._hold.orphaned):
            self.log("metrics.jsonl is not what the checkpoint was made with; starting over")
            return None
        return state

    def _checkpoint(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        import torch

        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None, None
        try:
            content = io.BytesIO(_checked(path.read_bytes()))
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
            return checkpoint["state"], checkpoint["metrics"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
        ) as error:
            self.log(f"checkpoint.pt cannot be read ({type(error).__name__}: {error}); starting over")
            return None, None

    def tidy(self) -> None:
        """Remove what the last attempt left behind, half a write or an error; only the holder of the lock may."""
        self._mine()
        if (self.path / "error.json").exists():
            remove(self.path / "error.json")
        _tidy(self.path)

    def status(self, result: dict[str, Any] | None) -> Status:
        """What these files say about the trial, given what `result` said."""
        if result is not None:
            return "done" if result["outcome"] == "finished" else "diverged"
        if is_locked(self.path / ".lock"):
            return "running"
        return "failed" if (self.path / "error.json").exists() else "pending"

    def record(self, points: tuple[dict[str, str], ...], planned: dict[str, Any] | None = None) -> TrialRecord:
        """Everything these files say; `planned` stands in for a `trial.json` that is lost."""
        lost = planned is not None and not (self.path / "trial.json").exists()
        trial, result = planned if planned is not None and lost else self.trial(), self.result()
        if not isinstance(trial.get("seed"), int) or not isinstance(trial.get("train"), dict):
            raise StoreError(f"{self.path / 'trial.json'}: damaged, not a trial; remove it and run the study again")
        status, error, curve = self.status(result), self.path / "error.json", self.curve()
        return TrialRecord(
            id=self.id,
            trial=trial,
            points=points,
            seed=trial["seed"],
            status=status,
            result=result,
            curve=curve,
            run=self.run() or None,
            error=read_json(error) if status == "failed" else None,
            step=result["step"] if result is not None else self._reached(status, curve),
            folder=self.path,
        )

    def _reached(self, status: Status, curve: list[dict[str, Any]]) -> int:
        said = self.heartbeat() if status == "running" else None
        return max(curve[-1]["step"] if curve else 0, said.step or 0 if said is not None else 0)


def _signed(archive: bytes) -> bytes:
    """A zip archive, as torch writes one, with its SHA-256 for a comment: reading it, torch looks at no sums."""
    digest = hashlib.sha256(archive[:-2]).hexdigest().encode()
    return archive[:-2] + len(digest).to_bytes(2, "little") + digest


def _checked(content: bytes) -> bytes:
    if _signed(content[:-66] + b"\0\0") != content:
        raise ValueError("its SHA-256 is another than it says")
    return content


def _tidy(folder: Path) -> None:
    for left in folder.glob(".*.tmp"):
        remove(left)


def _is_whole(result: dict[str, Any]) -> bool:
    """Whether a result says at which step it ended, and after a whole training what the test split scored."""
    metrics = result.get("metrics")
    if not isinstance(result.get("step"), int) or not isinstance(metrics, dict):
        return False
    if result["outcome"] == "diverged":
        return True
    test = metrics.get("test")
    return isinstance(test, dict) and bool(test) and all(isinstance(each, int | float) for each in test.values())


class StudyFolder:
    """The files of one study."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def lock(self) -> AbstractContextManager[Lock]:
        """Hold the study; `Busy` when another run is at it."""
        return hold(self.path / ".lock", self._busy, patience=0.0, take_over=False)

    @property
    def _busy(self) -> str:
        return f"{self.path}: another run is at work on this study; wait for it or stop it"

    def refuse_another_run(self) -> None:
        """Raise `Busy` where a run holds this study, without a change to the folder."""
        if is_locked(self.path / ".lock"):
            raise Busy(self._busy + whose(self.path / ".lock", take_over=False))

    def wanted(self) -> bool:
        """Whether a run holds this study, or did until it was killed; not when it let go in good order."""
        try:
            return (self.path / ".lock").stat().st_size > 0
        except FileNotFoundError:
            return False

    def trial(self, identity: str) -> TrialFolder:
        """The folder of one trial."""
        return TrialFolder(self.path / "trials" / identity)

    def resolved(self) -> dict[str, Any]:
        """The study with every default filled in, written last when it was created."""
        path = self.path / RESOLVED
        if not self.path.exists():
            raise StoreError(f"{self.path}: no such folder{beside(self.path)}")
        if not path.exists():
            raise StoreError(f"{self.path} is not a study's folder: it has no {RESOLVED}")
        return read_json(path)

    def source(self) -> str:
        """The study as its file said it when it was laid down, in YAML."""
        source = self.resolved().get("source")
        if not isinstance(source, str):
            cure = f"atn-norms ablate STUDY --out {self.path} puts it in order"
            raise StoreError(f"{self.path / RESOLVED}: damaged, it does not say what was laid down; {cure}")
        return source

    def create(self, plan: Plan, environment: dict[str, Any]) -> bool:
        """Lay a study down, or find it there already (then False); a folder of anything else is refused.

        A study that was laid down here may have grown: one that has all its trials, and more, takes its place.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SpecError(f"{self.path} is a file, and the study needs a folder")
        if self.path.exists() and not (self.path / RESOLVED).exists():
            self._refuse_strangers()  # here already, so that a refusal leaves no lock behind
        with self._or_nothing() as made:
            make_folder(self.path, made)
            with self.lock(), self._or_nothing() as within:
                return self._create(plan, environment, within)

    @contextmanager
    def _or_nothing(self) -> Iterator[list[Path]]:
        """Remove again what was made (and is listed), in reverse, when it fails or is interrupted.

        Files only while the lock is held, and folders only while they are empty: another run may be at work here.
        """
        made: list[Path] = []
        try:
            yield made
        except (Exception, KeyboardInterrupt):
            for path in reversed(made):
                with suppress(OSError):  # why it failed is what the user must hear of, not what stays behind
                    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            raise

    def _create(self, plan: Plan, environment: dict[str, Any], made: list[Path]) -> bool:
        def new(path: Path) -> Path:
            if not path.exists():
                made.append(path)
            return path

        fresh = not (self.path / RESOLVED).exists()
        if fresh:
            made.append(self.path / ".lock")
            self._refuse_strangers()
        else:
            self._refuse_another(plan)
        for planned in plan.trials:
            folder = self.trial(planned.id)
            if not (folder.path / "trial.json").exists():
                make_folder(folder.path, made)
                write_json(new(folder.path / "trial.json"), planned.trial)
            elif folder.result() is None and canonical(folder.trial()) != canonical(planned.trial):
                write_json(folder.path / "trial.json", planned.trial)  # where its text lies, when to checkpoint
        if fresh:
            write_json(new(self.path / "environment.json"), environment)
        if grown := fresh or canonical(self.resolved()) != canonical(plan.resolved()):
            write(new(self.path / "study.yaml"), plan.source.encode())
            write_json(new(self.path / RESOLVED), plan.resolved())
        return grown

    def _refuse_another(self, plan: Plan) -> None:
        """Refuse a study that is neither the one that is here nor one that it has grown to."""
        there = self.resolved()
        try:
            lacking = plan.lacks(there) if there.get("key") != plan.key else 0
        except (KeyError, TypeError) as error:
            raise StoreError(f"{self.path / RESOLVED}: damaged, {type(error).__name__} {error}") from error
        if lacking:
            mine, theirs = {trial.id for trial in plan.trials}, {trial["id"] for trial in there["trials"]}
            if mine < theirs:
                raise SpecError(
                    f"{self.path} has grown beyond this study: it holds all its {len(mine)} trials and {lacking} more; "
                    f"atn-norms resume {self.path} goes on with them all, or choose another folder"
                )
            if changes := plan.changed_plugins(there):
                raise SpecError(
                    f"{self.path} holds this study with other plugins: {changes}; install what it was made with, or "
                    "choose another folder"
                )
            raise SpecError(
                f"{self.path} holds another study ({there.get('name')!r}, key {there.get('key')}), of which this one "
                f"({plan.name!r}, key {plan.key}) lacks {lacking} trials; choose another folder"
            )

    def mend(self) -> None:
        """Put in order what a kill left: trials lost or empty, and what finished ones need no more.

        Whoever calls it holds the study.
        """
        _tidy(self.path)
        for entry in self.resolved().get("trials", ()):
            folder = self.trial(entry["id"])
            if "trial" in entry and not (folder.path / "trial.json").exists():
                make_folder(folder.path)
                write_json(folder.path / "trial.json", entry["trial"])
            elif (folder.path / "result.json").exists():
                folder.clear()

    def _refuse_strangers(self) -> None:
        # A start that was killed wrote trials before study.yaml: without them that file is somebody's own.
        ours = OURS if (self.path / "trials").is_dir() else OURS - {"study.yaml"}
        with named("read", self.path):
            strangers = sorted(p.name for p in self.path.iterdir() if p.name not in ours and p.suffix != ".tmp")
        if strangers:
            holds = f"it holds {strangers[0]!r}"
            raise SpecError(f"{self.path} is not empty and not a study's folder ({holds}); choose another")

    def load(self) -> StudyRecord:
        """Read everything; `StoreError` names a file that is damaged."""
        resolved = self.resolved()
        environment = self.path / "environment.json"
        try:
            tasks = {label: TaskFacts(**facts) for label, facts in resolved["tasks"].items()}
            trials = tuple(
                self.trial(entry["id"]).record(tuple(entry["points"]), entry.get("trial"))
                for entry in resolved["trials"]
            )
            return StudyRecord(
                name=resolved["name"],
                study=resolved["study"],
                environment=read_json(environment),
                axes=resolved["axes"],
                tasks=tasks,
                baseline=resolved["baseline"],
                trials=trials,
                tune=resolved.get("tune", {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.path / RESOLVED}: damaged, {type(error).__name__} {error}") from error


def load(folder: Path | str) -> StudyRecord:
    """Read a study's folder as one value; `StoreError` names a folder that is none, or a file that is damaged."""
    return StudyFolder(folder).load()
