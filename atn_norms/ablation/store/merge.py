"""Merge the records of one study whose seeds were trained in several folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.identity import counted, settings_hash
from atn_norms.ablation.store.records import StudyRecord, TrialRecord, refuse_missing_metrics
from atn_norms.errors import Problem, SpecError, short_repr

if TYPE_CHECKING:
    from atn_norms.specs import Where

_FREE = ("name", "seeds", "reach")  # keys of a study that may differ; `reach` only where no level decides a task
_PROGRESS = ("pending", "running", "failed", "diverged", "done")


def merge(records: Mapping[str, StudyRecord]) -> StudyRecord:
    """Return one record with the trials of all records, which must be the same study but for its seeds.

    The keys of `records` name them in messages, such as their folders. Name, environment and level come from the first.
    Of a trial in several records, the one that got furthest is taken.

    Errors: `SpecError` where two studies differ in more than their seeds, or the trials of a point in other settings;
    `StoreError` where they have other results of the same trial, or functions returned other first metrics.
    """
    start = next(iter(records.values()))
    if len(records) == 1:
        return start
    compared = {name: (_compared(record), _by_point(record)) for name, record in records.items()}
    for (first, (study, trials)), (name, (other, others)) in combinations(compared.items(), 2):
        _require_same(first, study, name, other)
        ours = {point: _settings(trials[point], others[point]) for point in trials if point in others}
        theirs = {point: _settings(others[point], trials[point]) for point in ours}
        _require_same(first, {"trials": ours}, name, {"trials": theirs})
    found: dict[str, tuple[str, TrialRecord]] = {}
    for name, record in records.items():
        for trial in record.trials:
            found[trial.id] = _further(*found.get(trial.id, (name, trial)), name, trial)
    trials = tuple(sorted((trial for _, trial in found.values()), key=lambda trial: trial.seed))
    _refuse_two_ids(trials)
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    count = len(seeds)
    study = {**start.study, "seeds": count if seeds == list(range(count)) else seeds}
    merged = replace(start, study=study, trials=trials)
    refuse_missing_metrics(merged)
    return merged


def _require_same(first: str, ours: Mapping[str, Any], name: str, theirs: Mapping[str, Any]) -> None:
    if (found := first_difference(ours, theirs)) is not None:
        detail = "Folders can be merged if their studies differ in nothing but the seeds."
        raise SpecError(found.path, found.got, f"{found.expected}, as in {first}", position=name, detail=detail)


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Problem | None:
    """Return the first option in which two studies differ, with their value as got and ours as expected.

    >>> print(first_difference({"train": {"steps": 4}}, {"train": {"steps": 6}}))
    train.steps: got 6; expected 4
    """
    return next(iter(differences(theirs, ours)), None)


def _compared(record: StudyRecord) -> dict[str, Any]:
    """Return the parts of a study that must be equal."""
    kept = {key: value for key, value in record.study.items() if key not in _FREE}
    reach = record.study.get("reach")
    deciding = [task for task in record.tasks if record.endpoint(task).measure == "steps"]
    return {**kept, "reach": {task: reach.get(task) if isinstance(reach, Mapping) else reach for task in deciding}}


def _by_point(record: StudyRecord) -> dict[str, dict[str, Any]]:
    """Return point -> the trial of the point that holds most, since its seeds share all settings."""
    trials = sorted(record.trials, key=lambda each: ("model" in each.trial, "settings" in each.trial))
    named = ((point, each.trial) for each in trials for point in each.points)
    return {", ".join(f"{key}={value}" for key, value in point.items()): trial for point, trial in named}


def _settings(trial: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a trial that `other` holds too; a published trial holds hashes instead of its content."""
    hashes = {key: trial.get(key, {}) for key in ("data", "plugins")}
    if "model" in trial and "model" in other:
        return hashes | {key: value for key, value in counted(trial).items() if key != "seed"}
    return {**hashes, "settings": settings_hash(trial)} if settings_hash(other) else hashes


def _refuse_two_ids(trials: Sequence[TrialRecord]) -> None:
    """Raise `StoreError` where two trials are the same point at the same seed, such as of two versions."""
    known: dict[Any, str] = {}
    for trial in trials:
        other = known.setdefault((tuple(trial.points[0].items()), trial.seed), trial.id)
        if other != trial.id:
            raise StoreError(f"two trials, {other} and {trial.id}, for {trial.points[0]} at seed {trial.seed}")


def same(ours: Any, theirs: Any) -> bool:
    """Return True for equal values of equal types, as in the canonical JSON of an id.

    >>> same({"a": [1, None]}, {"a": [1, None]}), same([1], [True]), same(1, 1.0)
    (True, False, False)
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs and all(isinstance(ours, kind) == isinstance(theirs, kind) for kind in (bool, float))


def differing(ours: Any, theirs: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths at which two values differ, as deep as both are mappings."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return [] if same(ours, theirs) else [path]
    keys = dict.fromkeys((*ours, *theirs))
    return [deeper for key in keys for deeper in differing(ours.get(key), theirs.get(key), (*path, key))]


def value_at(value: Any, path: Sequence[str]) -> Any:
    """Return the value at a path of keys; None if it is missing."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def differences(ours: Any, theirs: Any) -> list[Problem]:
    """Return every option in which two studies differ, with our value as got and theirs as expected.

    >>> print(*differences({"train": {"steps": 4}, "seeds": 2}, {"train": {"steps": 6}}), sep="; ")
    train.steps: got 4; expected 6; seeds: got 2; expected nothing
    """
    paths = differing(ours, theirs)
    return [Problem(path, shown(value_at(ours, path)), shown(value_at(theirs, path))) for path in paths]


def changed(problems: Sequence[Problem], where: Where | None, reference: str, cure: str) -> SpecError:
    """Return the error for changed options: located by `where`, compared with `reference`, with a cure at the end."""
    located = [
        replace(each, position=where(each.path) if where else "", expected=f"{each.expected}, {reference}")
        for each in problems
    ]
    return SpecError.of([*located[:-1], replace(located[-1], detail=cure)])


def shown(value: Any) -> str:
    """Return a value of a study as text for a message."""
    return "nothing" if value is None else short_repr(value)


def _further(first: str, kept: TrialRecord, name: str, trial: TrialRecord) -> tuple[str, TrialRecord]:
    """Return the trial that got further, with the name of its record; refuse two different results."""
    refuse_two_results(first, kept, name, trial)
    ahead = _PROGRESS.index(trial.status) > _PROGRESS.index(kept.status)
    return (name, trial) if ahead else (first, kept)


def refuse_two_results(first: str, kept: TrialRecord, name: str, trial: TrialRecord) -> None:
    """Raise `StoreError` where two studies have other results of the same trial."""
    ours, theirs = _outcome(kept), _outcome(trial)
    if ours and theirs and ours != theirs:
        results = f"{first} has {short_repr(ours)}, {name} has {short_repr(theirs)}"
        cure = "remove the seeds of one of them from its study; processors differ in the last digits of a result"
        raise StoreError(f"two results of trial {trial.id}, seed {trial.seed}: {results}; {cure}")


def _outcome(trial: TrialRecord) -> tuple[str, Any] | None:
    if trial.status not in ("done", "diverged"):
        return None
    return trial.status, (trial.result or {}).get("metrics", {}).get("test")
