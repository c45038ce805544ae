"""Studies: a grid of trials, trained, stored and compared."""

from __future__ import annotations

from atn_norms.ablation.execution.engine import Event, OnEvent, run
from atn_norms.ablation.execution.function import Trial
from atn_norms.ablation.function_study import ablate
from atn_norms.ablation.grid import presets
from atn_norms.ablation.grid.overrides import override
from atn_norms.ablation.grid.plan import Plan, make_plan
from atn_norms.ablation.grid.study import StudySpec, TrainSpec
from atn_norms.ablation.store.files import Busy, StoreError
from atn_norms.ablation.store.folder import load
from atn_norms.ablation.store.merge import merge
from atn_norms.ablation.store.records import StudyRecord, TaskFacts, TrialRecord
from atn_norms.ablation.studies import create, refuse_edited, resume, status

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
    "merge",
    "override",
    "presets",
    "refuse_edited",
    "resume",
    "run",
    "status",
]
