"""Studies: a grid of trials, trained, stored and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atn_norms.ablation.builtin import BUILTIN
from atn_norms.ablation.engine import Event, OnEvent, run
from atn_norms.ablation.environment import environment
from atn_norms.ablation.files import Busy, StoreError
from atn_norms.ablation.plan import Plan, make_plan, override
from atn_norms.ablation.records import StudyRecord, TaskFacts, TrialRecord
from atn_norms.ablation.store import StudyFolder, load
from atn_norms.ablation.study import StudySpec, TrainSpec
from atn_norms.problems import explained

__all__ = [
    "BUILTIN",
    "Busy",
    "Event",
    "OnEvent",
    "Plan",
    "StoreError",
    "StudyRecord",
    "StudySpec",
    "TaskFacts",
    "TrainSpec",
    "TrialRecord",
    "create",
    "load",
    "make_plan",
    "override",
    "resume",
    "run",
    "status",
]


def create(study: StudySpec | Mapping[str, Any], out: Path | str | None = None) -> Path:
    """Lay a study down in a folder, ready to `run`, and return the folder; one that holds this study is left as it is.

    `out` is by default `studies/NAME-KEY`, where the key is a hash of the study, so that the same study comes back to the
    same folder.

    Errors: `SpecError` where the folder holds another study or anything else, or a task cannot read its data;
    `StoreError` where it cannot be written.
    """  # noqa: E501
    from pydantic import ValidationError

    try:
        spec = study if isinstance(study, StudySpec) else StudySpec.model_validate(study)
    except ValidationError as error:
        raise explained(error, data=study) from error
    plan = make_plan(spec)
    folder = Path(out) if out is not None else Path("studies") / f"{plan.name.replace(' ', '-')}-{plan.key[:8]}"
    StudyFolder(folder).create(plan, environment())
    return folder


def resume(
    folder: Path | str, *, workers: int = 2, scheduler: str | None = None, on_event: OnEvent | None = None
) -> StudyRecord:
    """Go on with a study where it stopped: `run` by the name the command line uses."""
    return run(folder, workers=workers, scheduler=scheduler, on_event=on_event)


def status(folder: Path | str) -> dict[str, int]:
    """How many trials of a study are `done`, `diverged`, `failed`, `running` and `pending`."""
    record = load(folder)
    return {status: record.count(status) for status in ("done", "diverged", "failed", "running", "pending")}
