"""A study's folder, the only record of finished work; a kill at any moment loses no finished trial.

DIR/study.yaml  study.resolved.json  environment.json  .lock
DIR/trials/ID/  the files of one trial, see `trial`
DIR/metrics/    the first metric that a function returned, for trials that end at the same time
DIR/report/     derived, can always be rebuilt
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atn_norms.ablation.store.files import Folder, StoreError, canonical, named
from atn_norms.ablation.store.identity import current_names
from atn_norms.ablation.store.locks import NAME as LOCK
from atn_norms.ablation.store.locks import Lock, hold
from atn_norms.ablation.store.merge import changed
from atn_norms.ablation.store.records import StudyRecord, TaskFacts, TrialRecord, refuse_missing_metrics
from atn_norms.ablation.store.schema import RETRAIN, StoredEnvironment, check, check_study
from atn_norms.ablation.store.trial import FUNCTION, TrialFolder, keeps_model
from atn_norms.errors import SpecError, beside

if TYPE_CHECKING:
    from atn_norms.ablation.grid.plan import Plan
    from atn_norms.specs import Where

ELSEWHERE = "Choose another folder."
RESOLVED = "study.resolved.json"
METRICS = "metrics"  # the folder with the first metrics of functions, see `execution.first_metric`
MOST_BYTES = 2**28  # bytes of the resolved study: 256 MiB
OURS = {"study.yaml", RESOLVED, "environment.json", "trials", "report", METRICS, LOCK}


class StudyFolder:
    """The files of one study."""

    def __init__(self, path: Path | str) -> None:
        self.folder = Folder(path)
        self.path = self.folder.path

    @property
    def report(self) -> Folder:
        """The folder of the report."""
        return self.folder.folder("report")

    def lock(self) -> AbstractContextManager[Lock]:
        """Lock the study; `Busy` while another run holds it."""
        return hold(self.folder, self._busy, patience=0.0, take_over=False)

    @property
    def _named(self) -> Path:
        """The path, absolute if it is only `.` or `..`."""
        return self.path if self.path.name.strip(".") else self.path.resolve()

    def exists(self) -> bool:
        """Return True if the folder holds a study."""
        return os.path.isdir(self.path) and self.folder.has(RESOLVED)  # False too for a name that is too long

    @property
    def _busy(self) -> str:
        return f"{self.path}: another run is at work on this study; wait for it or stop it"

    def wanted(self) -> bool:
        """Return True if a run holds this study, or was killed while it held it; False after a regular release."""
        try:
            return self.folder.stat(LOCK).st_size > 0
        except FileNotFoundError:
            return False

    def trial(self, identity: str) -> TrialFolder:
        """Return the folder of one trial."""
        return TrialFolder(self.folder.folder("trials").folder(identity))

    def refuse_no_study(self) -> None:
        """Raise `StoreError` if the path is not a study's folder."""
        with named("read", self.path):
            if not self.path.exists():
                raise StoreError(f"{self.path}: got no such folder; expected a study's folder{beside(self.path)}")
            if self.path.is_dir() and not self.folder.has(RESOLVED) and self.folder.has("results.csv"):
                raise StoreError(f"{self.path}: got the folder of a report; expected a study's folder")
            if not self.path.is_dir() or not self.folder.has(RESOLVED):
                raise StoreError(f"{self.path}: got no {RESOLVED}; expected a study's folder")

    def resolved(self) -> dict[str, Any]:
        """Read the study with all defaults; this file is written last when a study is created."""
        self.refuse_no_study()
        command = shlex.join(["atn-norms", "ablate", "STUDY", "--out", str(self.path)])
        cure = f"remove it, and {command} restores it"
        resolved = self.folder.read_json(RESOLVED, MOST_BYTES, cure)
        check_study(resolved, str(self.path / RESOLVED), cure)
        for entry in resolved["trials"]:
            entry["trial"] = current_names(entry["trial"])
        return resolved

    def source(self) -> str | None:
        """Read the current study.yaml; None if it is missing."""
        if not self.folder.has("study.yaml"):
            return None
        try:
            return self.folder.read("study.yaml").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            got, file = f"bytes that are not UTF-8 ({error.reason})", str(self.path / "study.yaml")
            raise SpecError(position=file, got=got, expected="UTF-8 text") from error

    def create(
        self,
        plan: Plan,
        environment: dict[str, Any],
        where: Where | None = None,
        command: Sequence[str] = (),
    ) -> bool:
        """Create a study; return False if the folder holds it already. Any other content of the folder is an error.

        A study that has all trials of the stored study, and more, replaces it. `where` and `command` as in
        `refuse_another`.
        """
        with named("read", self.path):
            if self.path.is_symlink() and not self.path.exists():
                link = f"a symbolic link to {self.path.readlink()}, which does not exist"
                raise self._unusable(link, "a folder")
            if self.path.exists() and not self.path.is_dir():
                raise self._unusable("a file", "a folder")
        if self.path.exists() and not self.folder.has(RESOLVED):
            self._require_empty_or_study()  # before the lock, so that an error leaves no lock behind
        with self._all_or_nothing() as made:
            self.folder.make(made)
            with self.lock(), self._all_or_nothing() as within:
                return self._create(plan, environment, within, where, command)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[list[Path]]:
        """After an error or an interruption, remove the created files and folders in reverse order.

        Files are removed only while the lock is held, and folders only if they are empty: another run may use them.
        """
        made: list[Path] = []
        try:
            yield made
        except (Exception, KeyboardInterrupt):
            for path in reversed(made):
                with suppress(OSError):  # the user needs the reason of the first error
                    path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
            raise

    def _create(
        self,
        plan: Plan,
        environment: dict[str, Any],
        made: list[Path],
        where: Where | None,
        command: Sequence[str],
    ) -> bool:
        def new(folder: Folder, name: str) -> Folder:
            if not folder.has(name):
                made.append(folder.path / name)
            return folder

        there = None
        if is_fresh := not self.folder.has(RESOLVED):
            made.append(self.path / LOCK)
            self._require_empty_or_study()
        else:
            there = self.refuse_another(plan, where, command)
        for planned in plan.trials:
            trial = self.trial(planned.id)
            if not trial.has_trial():  # `restore` writes one that is lost, so all entries become durable at once, below
                trial.folder.make(made, sync=False)
                new(trial.folder, "trial.json").write_json("trial.json", planned.trial, sync=False)
            elif not trial.has_result() and canonical(trial.trial()) != canonical(planned.trial):
                trial.write_trial(planned.trial)  # the path of its data or the interval of its checkpoints has changed
        self.folder.folder("trials").sync()
        if is_fresh:
            new(self.folder, "environment.json").write_json("environment.json", environment)
        resolved = plan.resolved()
        has_grown = canonical(there) != canonical(resolved)
        if has_grown:
            new(self.folder, "study.yaml").write("study.yaml", plan.source.encode())
            new(self.folder, RESOLVED).write_json(RESOLVED, resolved)
        return has_grown

    def refuse_another(self, plan: Plan, where: Where | None = None, command: Sequence[str] = ()) -> dict[str, Any]:
        """Return the stored study (`resolved`); `SpecError` for one that is neither the same nor an extension of it.

        `where` locates options in the study's file. `command` starts the study, without its folder.
        """
        there = self.resolved()
        if there["key"] == plan.key or not plan.lacks(there):
            self._refuse_other_models(plan, command)
            return there
        mine, theirs = {trial.id for trial in plan.trials}, {trial["id"] for trial in there["trials"]}
        cure = self._in_another_folder(command, reuses=not mine.isdisjoint(theirs))
        trained = "those that the trials in this folder were trained with"
        if changes := plan.changed_plugins(there):
            cure = f"Install the versions of the study. Or: {cure}"
            raise self._unusable(f"a study with other plugins ({changes})", trained, cure)
        if changes := plan.changed_data(there):
            cure = " ".join(filter(None, [plan.advice, cure]))
            raise self._unusable(f"a study with other data or code ({changes})", trained, cure)
        if mine < theirs and self.source() == there["source"]:
            cure = f"To resume the study in it: {shlex.join(['atn-norms', 'resume', str(self.path)])}. {cure}"
        if not (changes := plan.changes(there)):  # such as other recommendations of a task
            raise self._unusable(f"study {plan.name!r} (key {plan.key})", f"the study in it (key {there['key']})", cure)
        raise changed(changes, where, f"as in {self._named}", cure)

    def _refuse_other_models(self, plan: Plan, command: Sequence[str]) -> None:
        """Raise `SpecError` if finished trials lack the model that the study now selects."""
        for planned in plan.trials:
            trial = self.trial(planned.id)
            if planned.trial["task"]["kind"] != FUNCTION and trial.has_trial() and trial.has_result():
                wanted, saved = keeps_model(planned.trial["train"]), keeps_model(trial.trial()["train"])
                if wanted not in ("none", saved):
                    got = f"train.keep_model {wanted}, and finished trials that saved {saved}"
                    cure = self._in_another_folder(command, reuses=False)
                    raise self._unusable(got, f"keep_model {saved}", cure)

    def _in_another_folder(self, command: Sequence[str], reuses: bool) -> str:
        """Return the cure for another study: a new folder, which reuses trials of this folder if it can."""
        path = self._named
        names = (f"{path.name}-{number}" for number in itertools.count(2))
        other = next(each for each in map(path.with_name, names) if not each.exists())
        if not command:
            return f"Choose another folder, such as {other}."
        words = [*command, "--out", str(other), *(["--reuse", str(self.path)] if reuses else [])]
        return f"To train this study in another folder: {shlex.join(words)}"

    def _unusable(self, got: str, expected: str, cure: str = "") -> SpecError:
        return SpecError(position=str(self.path), got=got, expected=expected, detail=cure)

    def restore(self, resolved: dict[str, Any]) -> None:
        """Complete an interrupted run: restore lost trials, and remove files that finished trials no longer need.

        The caller must hold the lock.
        """
        self.folder.remove_leftovers()
        if self.folder.has("report"):
            self.report.remove_leftovers()
        for entry in resolved["trials"]:
            trial = self.trial(entry["id"])
            if not trial.has_trial():
                trial.write_trial(entry["trial"])
            elif trial.has_result():
                trial.clear()

    def _require_empty_or_study(self) -> None:
        # Trials are written before study.yaml. Without trials, study.yaml is a user's file.
        ours = OURS if self.folder.has("trials") else OURS - {"study.yaml"}
        others = [name for name in self.folder.names() if name not in ours and not name.endswith(".tmp")]
        if others:
            raise self._unusable(f"a folder with {others[0]!r}", "an empty folder, or the folder of a study", ELSEWHERE)

    def load(self, resolved: dict[str, Any] | None = None, curves: bool = True) -> StudyRecord:
        """Read the whole study; `StoreError` for a damaged file.

        `resolved` is the result of `resolved()`, if the caller has it. Without `curves` no learning curve is read.
        """
        resolved = self.resolved() if resolved is None else resolved
        environment = self.folder.read_json("environment.json")
        check(StoredEnvironment, environment, str(self.path / "environment.json"))
        tasks = {label: TaskFacts(**facts) for label, facts in resolved["tasks"].items()}
        trials = tuple(self.load_trial(entry, tasks, curves) for entry in resolved["trials"])
        record = StudyRecord(
            name=resolved["name"],
            study=resolved["study"],
            environment=environment,
            axes=resolved["axes"],
            tasks=tasks,
            baseline=resolved["baseline"],
            trials=trials,
            tune=resolved.get("tune", {}),
        )
        refuse_missing_metrics(record)
        return record

    def load_trial(self, entry: dict[str, Any], tasks: dict[str, TaskFacts], curves: bool = True) -> TrialRecord:
        """Read one trial of the study; its result must have the metric of each task."""
        folder = self.trial(entry["id"])
        record = folder.record(tuple(entry["points"]), entry["trial"], curves)
        if record.status == "done" and record.result is not None:
            _refuse_other_metrics(folder, record.result, [tasks[point["task"]].metric for point in entry["points"]])
        return record


def _refuse_other_metrics(folder: TrialFolder, result: dict[str, Any], metrics: Sequence[str]) -> None:
    for metric in metrics:
        if metric and metric not in result["metrics"]["test"]:
            place = f"{folder.path / 'result.json'}: damaged: metrics.test.{metric}"
            raise StoreError(f"{place}: got nothing; expected a value; {RETRAIN}")


def load(folder: Path | str, curves: bool = True) -> StudyRecord:
    """Read a study's folder as one value.

    Without `curves` only the last line of each learning curve is read, which is fast for curves of any length.

    Errors: `StoreError` for a folder that is not a study's, and for a damaged file.
    """
    return StudyFolder(folder).load(curves=curves)
