"""Resolve a study into its trials: every default is filled in, and each trial has an id."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from atn_norms import errors
from atn_norms.ablation.grid.changes import changed_options
from atn_norms.ablation.grid.errors import Problem, invalid
from atn_norms.ablation.grid.functions import (
    TRAINING,
    FunctionSpec,
    NamedFiles,
    Sources,
    advice,
    changed_files,
    is_function,
)
from atn_norms.ablation.grid.resolve import axis_name, layer_of
from atn_norms.ablation.grid.sources import describe_changes, plugin_sources
from atn_norms.ablation.grid.study import Point, StudySpec
from atn_norms.ablation.store.files import canonical
from atn_norms.ablation.store.identity import identity
from atn_norms.ablation.store.records import Endpoint, TaskFacts, task_options
from atn_norms.ablation.store.schema import study_key
from atn_norms.errors import brief, short_repr, to_spec_error
from atn_norms.layers import LayerSpec
from atn_norms.layers.memory import check_memory
from atn_norms.normalizers import Normalizer
from atn_norms.registry import SpecError
from atn_norms.specs import Where, to_yaml
from atn_norms.tasks import Task, TaskSpec

VERSION = 2  # of a trial's meaning: raised when the same options give other results


@dataclass(frozen=True)
class PlannedTrial:
    """A trial and the grid points that it belongs to."""

    id: str
    trial: dict[str, Any]
    points: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Plan:
    """A study as the list of its trials, ordered by seed, so that an early report covers the whole grid."""

    name: str
    source: str
    study: dict[str, Any]
    axes: dict[str, list[str]]
    tasks: dict[str, TaskFacts]
    baseline: dict[str, str]
    trials: tuple[PlannedTrial, ...]
    tune: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, Sources] = field(default_factory=dict)  # of functions, by task

    @property
    def key(self) -> str:
        """A hash of the study: its trials, their grid points, and the baseline."""
        return study_key(self.axes, self.baseline, [vars(trial) for trial in self.trials])

    def lacks(self, resolved: Mapping[str, Any]) -> int:
        """Count the trials of a stored study (`resolved`) that this study lacks; 0: this study extends it."""
        mine = {trial.id for trial in self.trials}
        return sum(trial["id"] not in mine for trial in resolved["trials"])

    def changed_plugins(self, resolved: Mapping[str, Any]) -> str:
        """Describe which plugins differ from those of a stored study (`resolved`) in otherwise equal trials."""
        mine = {_without_plugins(trial.trial): trial.trial.get("plugins", {}) for trial in self.trials}
        theirs = [
            (each["trial"].get("plugins", {}), mine.get(_without_plugins(each["trial"]))) for each in resolved["trials"]
        ]
        changes = {describe_changes(before, after) for before, after in theirs if after is not None}
        return "; ".join(sorted(filter(None, changes)))

    def changed_data(self, resolved: Mapping[str, Any]) -> str:
        """Describe which data and code differ from those of a stored study (`resolved`) in otherwise equal trials."""
        mine = {_without_data(trial.trial): trial.trial for trial in self.trials}
        changes: dict[str, None] = {}
        for each in resolved["trials"]:
            there, here = each["trial"], mine.get(_without_data(each["trial"]))
            if here is None:
                continue
            label = each["points"][0]["task"]
            before, after = resolved.get("sources", {}).get(label, {}), self.sources.get(label, {})
            for option, content in there["data"].items():
                if here["data"].get(option) != content:
                    files = there["task"].get(option)
                    if is_function(here["task"]):
                        files = changed_files(here["task"], option, before, after)
                    changes[f"task.{option} ({files}) has changed"] = None
        return "; ".join(changes)

    @property
    def advice(self) -> str:
        """A sentence for changed code of a function's file that starts studies; empty for another file."""
        files = {each.trial["task"]["file"]: None for each in self.trials if is_function(each.trial["task"])}
        return " ".join(filter(None, map(advice, files)))

    def changes(self, resolved: Mapping[str, Any]) -> list[errors.Problem]:
        """Return the options by which this study lacks trials of a stored study (`resolved`)."""
        return changed_options(self.study, resolved["study"])

    def resolved(self) -> dict[str, Any]:
        """Return the content of `study.resolved.json`."""
        return {
            "version": VERSION,
            "key": self.key,
            "name": self.name,
            "source": self.source,
            "study": self.study,
            "axes": self.axes,
            "tasks": {name: facts.as_json() for name, facts in self.tasks.items()},
            "baseline": self.baseline,
            "tune": self.tune,
            **({"sources": self.sources} if self.sources else {}),
            "trials": [{"id": trial.id, "points": list(trial.points), "trial": trial.trial} for trial in self.trials],
        }


def _without_plugins(trial: dict[str, Any]) -> str:
    return identity({name: value for name, value in trial.items() if name != "plugins"})


def _without_data(trial: dict[str, Any]) -> str:
    return identity({**trial, "data": {}})


def make_plan(study: StudySpec, where: Where | None = None) -> Plan:
    """Resolve a study into trials; points with equal options are one trial.

    Errors: `SpecError` naming a file that a task cannot read, or a size that the task does not allow; `where` (from
    `specs.read`) adds the position in the study's file.
    """
    facts: dict[str, dict[str, TaskFacts]] = {}  # task -> values of the axes of its options -> facts
    sources: dict[str, Sources] = {}
    resolved: list[tuple[dict[str, str], dict[str, Any]]] = []
    built: dict[str, tuple[Task, dict[str, str]]] = {}
    hashed: dict[NamedFiles, tuple[dict[str, str], Sources]] = {}  # of functions, by the options that name files
    for point in study.points():
        try:
            trial, own = _trial(point, built, hashed)
        except SpecError as error:
            problems = [point.placed(_task_problem(each, point.task)) for each in error.problems]
            raise to_spec_error(invalid("study", problems), where) from error
        if isinstance(point.task, FunctionSpec):
            sources.setdefault(point.labels["task"], hashed[point.task.named_files][1])
        facts.setdefault(point.labels["task"], {})[task_options(point.labels)] = own
        resolved.append((point.labels, trial))
    tasks = {name: _shared(name, each, where) for name, each in facts.items()}
    _check_margins(study, tasks, where)
    trials: dict[str, PlannedTrial] = {}
    for seed in study.seed_list():
        for labels, trial in resolved:
            seeded = {**trial, "seed": seed}
            name = identity(seeded)
            points = trials[name].points if name in trials else ()
            trials[name] = PlannedTrial(name, seeded, (*points, labels))
    _check_candidates(study, list(trials.values())[: len(trials) // len(study.seed_list())], where)
    return Plan(
        name=study.name,
        source=to_yaml(study.model_dump(mode="json", exclude_unset=True)),
        study=study.model_dump(mode="json"),
        axes=study.axis_labels(),
        tasks=tasks,
        baseline=study.baseline_labels(),
        tune=study.tune_labels(),
        sources=sources,
        trials=tuple(trials.values()),
    )


def _shared(task: str, facts: Mapping[str, TaskFacts], where: Where | None) -> TaskFacts:
    """Return the facts of a task, of which those of single points differ in baselines and notes alone.

    Errors: `SpecError` for points with different metrics, goals or spreads.
    """
    (first, shared), *others = facts.items()
    for options, each in others:
        ours, theirs = ((one.metric, one.goal, one.spread) for one in (shared, each))
        if ours != theirs:
            got = f"got {', '.join(theirs)} for {task} at {options}, and {', '.join(ours)} at {first}"
            expected = "expected one metric, goal and spread for a task. Use tasks instead of an axis."
            raise to_spec_error(invalid("study", [Problem(("axes",), f"{got}; {expected}")]), where)
    notes = {
        (note if all(note in each.notes for each in facts.values()) else f"{options}: {note}"): None
        for options, one in facts.items()
        for note in one.notes
    }
    at = {options: each.baselines for options, each in facts.items()}
    if all(each == shared.baselines for each in at.values()):
        return replace(shared, notes=tuple(notes))
    return replace(shared, notes=tuple(notes), baselines={}, baselines_at=at)


def _check_margins(study: StudySpec, tasks: Mapping[str, TaskFacts], where: Where | None) -> None:
    """Raise `SpecError` for a margin of at most 1 where it is a ratio."""
    for name, facts in tasks.items():
        endpoint = Endpoint.of(study.model_dump(), name)
        is_ratio = facts.spread == "multiplicative" and endpoint.measure != "steps"
        if is_ratio and endpoint.margin is not None and endpoint.margin <= 1:
            expected = f"expected a ratio above 1, such as 1.25: scores of {name} are compared as logarithms"
            path = ("margin", name) if isinstance(study.margin, dict) else ("margin",)
            problem = Problem(path, f"got {short_repr(endpoint.margin)}; {expected}")
            raise to_spec_error(invalid("study", [problem]), where)


def _check_candidates(study: StudySpec, trials: Sequence[PlannedTrial], where: Where | None) -> None:
    """Raise `SpecError` for a tuned option whose values merge different points of the grid, as points have candidates.

    `trials` are those of one seed.
    """
    tuned = {axis_name(name): name for name in study.tune}
    merged: dict[tuple[str, str], dict[frozenset[str], str]] = {}  # option, other labels -> merged points -> its label
    for trial in trials if tuned else ():
        cells = frozenset(canonical({k: v for k, v in point.items() if k not in tuned}) for point in trial.points)
        for point, axis in itertools.product(trial.points, tuned):
            others = canonical({name: label for name, label in point.items() if name != axis})
            merged.setdefault((axis, others), {}).setdefault(cells, point[axis])
    for (axis, _), labels in merged.items():
        if len(labels) > 1:
            one, other, *_ = labels.values()
            got = f"got {brief(one)} and {brief(other)}, which merge different points of the grid into one trial"
            cure = "For example, all windows without a norm are one trial."
            problem = Problem(("tune", tuned[axis]), f"{got}; expected an axis. {cure}")
            raise to_spec_error(invalid("study", [problem]), where)


def _task_problem(problem: errors.Problem, task: TaskSpec) -> Problem:
    """Locate a task's problem at an option of the model, of the training or of the task, else at the task."""
    path, head = problem.path, problem.path[:1]
    text = errors.message(replace(problem, path=()))
    if head in (("model",), ("train",)):
        return Problem(path, text)
    return Problem(("task", *path), text) if path and path[0] in type(task).model_fields else Problem(("task",), text)


def _function_trial(
    point: Point, task: FunctionSpec, hashed: dict[NamedFiles, tuple[dict[str, str], Sources]]
) -> tuple[dict[str, Any], TaskFacts]:
    """Make the trial of a function: `model` holds its arguments; its metric is known once it has returned."""
    if task.named_files not in hashed:
        hashed[task.named_files] = task.hashes()
    train = point.train.model_dump(mode="json", include={*TRAINING})
    trial = {
        "version": VERSION,
        "model": point.model,
        "task": task.model_dump(mode="json"),
        "train": train,
        "seed": 0,
        "data": hashed[task.named_files][0],
    }
    if plugins := plugin_sources(layer_of(trial["model"])):
        trial["plugins"] = plugins
    return trial, TaskFacts(task.metric or "", {}, task.goal, reported="reported loss")


def _trial(
    point: Point,
    built: dict[str, tuple[Task, dict[str, str]]],
    hashed: dict[NamedFiles, tuple[dict[str, str], Sources]],
) -> tuple[dict[str, Any], TaskFacts]:
    if isinstance(point.task, FunctionSpec):
        return _function_trial(point, point.task, hashed)
    options = point.task.model_dump(mode="json")
    which = canonical([options, point.train.batch_size])
    if which not in built:
        task, data = point.task.build(0), point.task.data()
        task.batch(0, point.train.filled(task.batch_size)["batch_size"])  # raises for an impossible batch size
        built[which] = task, data
    task, data = built[which]
    layer = _fitted(point.model, task)
    train = point.train.filled(task.batch_size)
    if "population_batches" in train and not _has_populations(layer, task):
        del train["population_batches"]  # without populations it changes nothing
    trial = {
        "version": VERSION,
        "model": layer.model_dump(mode="json"),
        "task": options,
        "train": train,
        "seed": 0,
        "data": data,
    }
    if plugins := plugin_sources(layer, point.task):
        trial["plugins"] = plugins
    facts = TaskFacts(task.metric, dict(task.baselines), task.goal, notes=tuple(task.notes), spread=task.spread)
    return trial, facts


def _has_populations(layer: LayerSpec, task: Task) -> bool:
    """Check whether any norm of a model uses populations that training recorded."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        parts = [layer.build(), task.encoder(), task.readout(layer.layer_inputs(1))]
    return any(isinstance(m, Normalizer) and m.train_eval_differ for part in parts for m in part.modules())


def _fitted(model: LayerSpec, task: Task) -> LayerSpec:
    """Return the layer with the task's input size; `SpecError` where the whole model does not fit into memory."""
    layer = model.model_copy(update={"input_size": task.input_size})  # changes only the size, which is checked here
    cell = layer.equations()
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # shapes without memory
            ends = [*task.encoder().parameters(), *task.readout(layer.layer_inputs(1)).parameters()]
        shapes = [
            cell.shapes(layer.layer_inputs(i), layer.bias) for i in (0, 1)
        ]  # all layers but the first have equal shapes
        first, other = (layer.directions * sum(map(math.prod, each.values())) for each in shapes)
        numbers = first + (layer.num_layers - 1) * other + sum(parameter.numel() for parameter in ends)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise SpecError(
            "model.hidden_size",
            f"{layer.hidden_size} with the task's sizes",
            f"sizes for torch ({short_repr(str(error))})",
        ) from None
    sizes = f"{layer.hidden_size} with the task's sizes"
    check_memory("model.hidden_size", sizes, numbers, copies=2, note=" with their gradients")
    return layer
