"""Create, resume and inspect studies in folders."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atn_norms.ablation.execution.engine import OnEvent, run
from atn_norms.ablation.execution.environment import environment
from atn_norms.ablation.grid.changes import HARMLESS
from atn_norms.ablation.grid.functions import refuse_changed_functions
from atn_norms.ablation.grid.plan import Plan, make_plan
from atn_norms.ablation.grid.sources import refuse_changed_plugins
from atn_norms.ablation.grid.study import StudySpec
from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.folder import StudyFolder, load
from atn_norms.ablation.store.merge import changed, differences, refuse_two_results, same, value_at
from atn_norms.ablation.store.records import StudyRecord, TrialRecord
from atn_norms.ablation.store.trial import TrialFolder
from atn_norms.errors import SpecError, short_repr, to_spec_error
from atn_norms.specs import Where, parse, validate


def create(
    study: StudySpec | Mapping[str, Any],
    out: Path | str | None = None,
    *,
    where: Where | None = None,
    reuse: Sequence[Path | str] = (),
    command: Sequence[str] = (),
) -> Path:
    """Write a study to a folder, ready to `run`, and return the folder; a folder that holds this study is not changed.

    A study that has grown by seeds, values, axes or another baseline is extended; finished trials are kept. `out` is by
    default `studies/NAME-KEY`, where the key is a hash of the study. A folder in `studies` that holds this study, or a
    smaller one that it extends, is used instead. `where`, from `specs.read`, adds file positions to errors.

    `reuse` are folders of other studies. A trial that one of them has finished is copied, and not trained again. Equal
    ids are equal trials: model, task, data, training, seed and plugins. A trial is trained if the other study saved
    another model than `keep_model` selects, or if it is of a function that wrote files.

    `command` is the command line that starts this study, without its folder. An error for a folder with another study
    completes it to a command with another folder.

    Errors: `SpecError` where the folder holds another study, a study.yaml with changes that `study` lacks, or other
    files, or where a task cannot read its data; `StoreError` where the folder cannot be written, and for a damaged
    folder in `reuse`.
    """
    plan = make_plan(validated(study), where)
    finished = finished_elsewhere(plan, reuse)
    folder = Path(out) if out is not None else _home(plan)
    store = StudyFolder(folder)
    if store.exists():
        refuse_edited_file(store, store.resolved(), plan)
    store.create(plan, environment(), where, command)
    for planned in plan.trials:
        if planned.id in finished:
            store.trial(planned.id).take(finished[planned.id], planned.trial)
    return folder


def validated(study: StudySpec | Mapping[str, Any]) -> StudySpec:
    """Return a study with every point of its grid validated.

    Errors: `SpecError` for each problem.
    """
    try:
        return study if isinstance(study, StudySpec) else StudySpec.model_validate(study)
    except ValidationError as error:
        raise to_spec_error(error, data=study) from error


def finished_elsewhere(plan: Plan, folders: Sequence[Path | str]) -> dict[str, TrialFolder]:
    """Return the finished trials of a plan that other studies have, by id.

    Errors: `StoreError` for a folder that is not a study's, a damaged trial, and two results of one trial.
    """
    if isinstance(folders, (str, Path)):
        raise SpecError("reuse", short_repr(folders), "a list of folders")
    wanted = {planned.id: planned for planned in plan.trials}
    found: dict[str, tuple[Path, TrialRecord]] = {}
    for each in folders:
        store = StudyFolder(each)
        for entry in store.resolved()["trials"]:
            trial = store.trial(entry["id"])
            if entry["id"] not in wanted or not trial.has_result() or not trial.serves(wanted[entry["id"]].trial):
                continue
            record = store.load_trial(entry | {"points": list(wanted[entry["id"]].points)}, plan.tasks)
            if record.status == "failed":  # its curve is too large
                continue
            known = found.setdefault(entry["id"], (store.path, record))
            refuse_two_results(str(known[0]), known[1], str(store.path), record)
    return {identity: StudyFolder(path).trial(identity) for identity, (path, _) in found.items()}


def _home(plan: Plan) -> Path:
    """Return the default folder of a study: the one that holds it or the study it extends, else a new one."""
    name = plan.name.replace(" ", "-")
    same, smaller = [], []
    for folder in sorted(Path("studies").glob(f"{name}-{'[0-9a-f]' * 8}")):
        with suppress(StoreError, KeyError, TypeError):  # a damaged or incomplete folder is not extended
            there = StudyFolder(folder).resolved()
            if there["key"] == plan.key:
                same.append(folder)
            elif not plan.lacks(there):
                smaller.append((len(there["trials"]), folder))
    largest = [folder for _, folder in sorted(smaller)[-1:]]
    return [*same, *largest, Path("studies") / f"{name}-{plan.key[:8]}"][0]


def resume(
    folder: Path | str, *, workers: int = 2, scheduler: str | None = None, on_event: OnEvent | None = None
) -> StudyRecord:
    """Resume a study, unchanged.

    Errors: as `run`; `SpecError` where the folder's study.yaml has changed.
    """
    refuse_edited(folder)
    return run(folder, workers=workers, scheduler=scheduler, on_event=on_event)


def refuse_edited(folder: Path | str) -> None:
    """Raise `SpecError` where a study's plugins or its study.yaml have changed: `resume` would ignore the change."""
    store = StudyFolder(folder)
    resolved = store.resolved()
    refuse_changed_plugins(store.path, (each["trial"] for each in resolved["trials"]))
    refuse_changed_functions(store.path, resolved)
    refuse_edited_file(store, resolved)


def refuse_edited_file(store: StudyFolder, resolved: Mapping[str, Any], plan: Plan | None = None) -> None:
    """Raise `SpecError` where the study.yaml of a study was edited after its creation, unless `plan` includes it."""
    file, text = store.path / "study.yaml", store.source()
    if text is None:
        return
    data, where = parse(text, str(file))
    before = parse(resolved["source"], file.name)[0]
    if same(data, before):
        return
    edited = make_plan(validate(StudySpec, data, where), where)
    problems = differences(data, before)
    is_notation = data == before and edited.key == resolved["key"]  # such as 1.0 for 1 where the option is a float
    if not problems or is_notation or (plan is not None and _includes(plan, edited)):
        return
    command = ["atn-norms", "ablate", str(file)]
    store.refuse_another(edited, where, command)
    cure = f"To extend the study: {shlex.join([*command, '--out', str(store.path)])}"
    raise changed(problems, where, "as when the study was created", cure)


def _includes(plan: Plan, edited: Plan) -> bool:
    """Check whether a study has all trials of another one, and the same options that change no trial."""
    mine, theirs = (parse(each.source, "study.yaml")[0] for each in (plan, edited))
    same = all(value_at(mine, path) == value_at(theirs, path) for path in HARMLESS)
    return same and not plan.lacks(edited.resolved())


def status(folder: Path | str) -> dict[str, int]:
    """Count the trials of a study that are `done`, `diverged`, `failed`, `running` and `pending`."""
    return load(folder, curves=False).counts()
