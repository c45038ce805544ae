"""Studies: a grid of trials, trained, stored and compared."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from atn_norms.ablation.execution.engine import Event, OnEvent, run
from atn_norms.ablation.execution.environment import environment
from atn_norms.ablation.execution.function import Trial
from atn_norms.ablation.function_study import ablate
from atn_norms.ablation.grid import presets
from atn_norms.ablation.grid.functions import refuse_changed_functions
from atn_norms.ablation.grid.overrides import override
from atn_norms.ablation.grid.plan import Plan, make_plan
from atn_norms.ablation.grid.sources import refuse_changed_plugins
from atn_norms.ablation.grid.study import StudySpec, TrainSpec
from atn_norms.ablation.store.files import Busy, StoreError
from atn_norms.ablation.store.folder import StudyFolder, load
from atn_norms.ablation.store.records import StudyRecord, TaskFacts, TrialRecord
from atn_norms.errors import SpecError, to_spec_error
from atn_norms.specs import Where

__all__ = [
    "Busy",
    "Event",
    "OnEvent",
    "Plan",
    "StoreError",
    "StudyRecord",
    "StudySpec",
    "TaskFacts",
    "TrainSpec",
    "Trial",
    "TrialRecord",
    "ablate",
    "create",
    "load",
    "make_plan",
    "override",
    "presets",
    "refuse_edited",
    "resume",
    "run",
    "status",
]


def create(study: StudySpec | Mapping[str, Any], out: Path | str | None = None, *, where: Where | None = None) -> Path:
    """Lay a study down in a folder, ready to `run`, and return the folder; one that holds this study is left as it is.

    A folder whose study has grown, by more seeds or axes or another baseline, takes what is new and keeps what is done.
    `out` is by default `studies/NAME-KEY`, where the key is a hash of the study; or the folder there of the same name
    whose study this one is, or has grown from. `where`, from `specs.read`, places what a task refuses in its file.

    Errors: `SpecError` where the folder holds another study or anything else, or a task cannot read its data;
    `StoreError` where it cannot be written.
    """
    from pydantic import ValidationError

    try:
        spec = study if isinstance(study, StudySpec) else StudySpec.model_validate(study)
    except ValidationError as error:
        raise to_spec_error(error, data=study) from error
    plan = make_plan(spec, where)
    folder = Path(out) if out is not None else _home(plan)
    StudyFolder(folder).create(plan, environment())
    return folder


def _home(plan: Plan) -> Path:
    """Where a study belongs that was given no folder: where it, or what it has grown from, is already."""
    name = plan.name.replace(" ", "-")
    same, smaller = [], []
    for folder in sorted(Path("studies").glob(f"{name}-{'[0-9a-f]' * 8}")):
        with suppress(StoreError, KeyError, TypeError):  # a damaged folder, or one half made, is no place to grow in
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
    """Go on with a study where it stopped, as it was laid down.

    Errors: as `run`; `SpecError` where the folder's study.yaml says something else by now.
    """
    refuse_edited(folder)
    return run(folder, workers=workers, scheduler=scheduler, on_event=on_event)


def refuse_edited(folder: Path | str) -> None:
    """Raise `SpecError` where a study's plugins or its study.yaml have changed: `resume` would ignore the change."""
    from atn_norms.specs import parse

    store = StudyFolder(folder)
    resolved = store.resolved()
    refuse_changed_plugins(store.path, (each["trial"] for each in resolved["trials"]))
    refuse_changed_functions(store.path, (each["trial"] for each in resolved["trials"]))
    file, text = store.path / "study.yaml", store.source()
    if text is not None and parse(text, str(file))[0] != parse(resolved["source"], file.name)[0]:
        take = shlex.join(["atn-norms", "ablate", str(file), "--out", str(store.path)])
        raise SpecError(f"{file}: changed since it was laid down; {take} takes the change, where the study only grows")


def status(folder: Path | str) -> dict[str, int]:
    """How many trials of a study are `done`, `diverged`, `failed`, `running` and `pending`."""
    return load(folder, curves=False).counts()
