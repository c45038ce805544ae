"""From a study to its trials: every default filled in, each with an identity of its own."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError
from ruamel.yaml import YAML

from atn_norms.ablation.files import canonical
from atn_norms.ablation.records import TaskFacts
from atn_norms.ablation.resolving import axis_path
from atn_norms.ablation.study import Point, StudySpec
from atn_norms.layers import LayerSpec
from atn_norms.layers.spec import _physical_memory
from atn_norms.problems import brief, explained, shown
from atn_norms.registry import SpecError
from atn_norms.specs import value as yaml_value
from atn_norms.tasks import Task

VERSION = 2  # of a trial's meaning: raised when the same options come to mean other numbers


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to be done, and the grid points it answers."""

    id: str
    trial: dict[str, Any]
    points: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Plan:
    """A study as the list of its trials, seed by seed so that an early look sees all of the grid."""

    name: str
    source: str
    study: dict[str, Any]
    axes: dict[str, list[str]]
    tasks: dict[str, TaskFacts]
    baseline: dict[str, str]
    trials: tuple[PlannedTrial, ...]

    @property
    def key(self) -> str:
        """What makes a study this study: its trials, where they stand in the grid, and the baseline."""
        trials = [{"id": trial.id, "points": trial.points} for trial in self.trials]
        return digest({"axes": self.axes, "baseline": self.baseline, "trials": trials})

    def lacks(self, resolved: Mapping[str, Any]) -> int:
        """How many trials of a study that was laid down (`resolved`) this one lacks; 0: it may take its place."""
        mine = {trial.id for trial in self.trials}
        return sum(trial["id"] not in mine for trial in resolved["trials"])

    def resolved(self) -> dict[str, Any]:
        """What `study.resolved.json` holds."""
        return {
            "version": VERSION,
            "key": self.key,
            "name": self.name,
            "source": self.source,
            "study": self.study,
            "axes": self.axes,
            "tasks": {name: asdict(facts) for name, facts in self.tasks.items()},
            "baseline": self.baseline,
            "trials": [{"id": trial.id, "points": list(trial.points), "trial": trial.trial} for trial in self.trials],
        }


def digest(value: Any) -> str:
    """The first 64 bits of the SHA-256 of a value's canonical JSON, in hexadecimal.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def identity(trial: dict[str, Any]) -> str:
    """The id of a trial: everything its result depends on, and nothing else.

    What a task reads counts by content (`data`), not by where it lies, and how often to checkpoint does not count.
    """
    task = {name: value for name, value in trial["task"].items() if name not in trial["data"]}
    train = {name: value for name, value in trial["train"].items() if name != "checkpoint_every"}
    return digest({**trial, "task": task, "train": train})


def make_plan(study: StudySpec) -> Plan:
    """Resolve a study into trials; points that mean the same are one trial.

    Errors: `SpecError` naming a file that a task cannot read, or a size the task does not allow.
    """
    facts: dict[str, TaskFacts] = {}
    resolved: list[tuple[dict[str, str], dict[str, Any]]] = []
    built: dict[str, tuple[Task, dict[str, str]]] = {}
    for point in study.points():
        try:
            trial, metric = _trial(point, built)
        except SpecError as error:
            raise SpecError(f"task {point.labels['task']}: {problem}" for problem in error.problems) from error
        facts.setdefault(point.labels["task"], metric)
        resolved.append((point.labels, trial))
    trials: dict[str, PlannedTrial] = {}
    for seed in study.seed_list():
        for labels, trial in resolved:
            seeded = {**trial, "seed": seed}
            name = identity(seeded)
            points = trials[name].points if name in trials else ()
            trials[name] = PlannedTrial(name, seeded, (*points, labels))
    return Plan(
        name=study.name,
        source=to_yaml(study.model_dump(mode="json", exclude_unset=True)),
        study=study.model_dump(mode="json"),
        axes=study.axis_labels(),
        tasks=facts,
        baseline=study.baseline_labels(),
        trials=tuple(trials.values()),
    )


def _trial(point: Point, built: dict[str, tuple[Task, dict[str, str]]]) -> tuple[dict[str, Any], TaskFacts]:
    options = point.task.model_dump(mode="json")
    which = canonical([options, point.train.batch_size])
    if which not in built:
        task, data = point.task.build(0), point.task.data()
        task.batch(0, point.train.filled(task.batch_size)["batch_size"])  # a task refuses here what it cannot batch
        built[which] = task, data
    task, data = built[which]
    layer = _fitted(point.model, task)
    model = layer.model_dump(mode="json")
    trial = {
        "version": VERSION,
        "model": model,
        "task": options,
        "train": point.train.filled(task.batch_size),
        "seed": 0,
        "data": data,
    }
    return trial, TaskFacts(task.metric, dict(task.baselines), task.goal)


def _fitted(model: LayerSpec, task: Task) -> LayerSpec:
    """The layer with the task's inputs; `SpecError` where it, with encoder and read-out, is too large to train here."""
    try:
        layer = LayerSpec.model_validate({**dict(model), "input_size": task.input_size})
    except ValidationError as error:
        raise explained(error) from None
    memory, cell = _physical_memory(), layer.equations()
    if memory is None:
        return layer
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # sizes without memory
            ends = [*task.encoder().parameters(), *task.readout(layer.layer_inputs(1)).parameters()]
        shapes = [cell.shapes(layer.layer_inputs(i), layer.bias) for i in (0, 1)]  # all layers but the first are alike
        first, other = (layer.directions * sum(map(math.prod, each.values())) for each in shapes)
        numbers = first + (layer.num_layers - 1) * other + sum(parameter.numel() for parameter in ends)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise SpecError(f"model.hidden_size and the task's sizes: too large for torch ({shown(str(error))})") from None
    if 2 * 4 * numbers > memory:  # float32 weights, and a gradient for each
        raise SpecError(
            f"model.hidden_size {layer.hidden_size} and the task's sizes take {numbers:.3g} parameters "
            f"({8 * numbers / 2**30:.3g} GiB in float32 with their gradients); allowed: what fits this machine's "
            f"{memory / 2**30:.3g} GiB of memory"
        )
    return layer


def to_yaml(value: Any) -> str:
    """A value as YAML text."""
    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 110
    yaml.dump(value, out)
    return out.getvalue()


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Put `path=value` settings (values in YAML) into what a study file said.

    >>> override({"train": {"steps": 5}}, ["train.steps=9", "axes.norm=[none, layer]", "seeds=2"])
    {'train': {'steps': 9}, 'axes': {'norm': ['none', 'layer']}, 'seeds': 2}

    Errors: `SpecError` naming the setting.
    """
    data, given = deepcopy(data), []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        path = name.strip().split(".")
        if not equals or not all(path):
            raise SpecError(f"--set {brief(assignment)}: must be path=value, such as train.steps=100")
        value = yaml_value(text, f"--set {name}: not a YAML value")
        if path[0] in ("axes", "baseline") and len(path) > 1:  # an axis is called by its whole path
            path = [path[0], ".".join(path[1:])]
        _assign(data, path, value, name)
        given.append((name.strip(), path, value))
    _refuse_the_overruled(data, given)
    return data


def _refuse_the_overruled(data: dict[str, Any], given: list[tuple[str, list[str], Any]]) -> None:
    """Refuse a setting that an axis puts its own values over: it would change nothing, and nobody would know."""
    axes = data.get("axes")
    for axis in axes if isinstance(axes, dict) else ():
        path = list(axis_path(str(axis)))
        for name, place, value in given:
            place = ["task", *place[2:]] if place[0] == "tasks" else place
            common = min(len(place), len(path))
            if place[:common] == path[:common] and _holds(value, path[common:]):
                raise SpecError(f"--set {name}: the axis {axis} says what this is; use --set 'axes.{axis}=[...]'")


def _holds(value: Any, path: list[str]) -> bool:
    """Whether a value says something at a path within it; at no path at all, everything does."""
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def _assign(data: Any, path: list[str], value: Any, name: str) -> None:
    for depth, key in enumerate(path):
        inside = ".".join(path[:depth])
        step: Any = key
        if isinstance(data, list):
            if not key.isdigit() or int(key) >= len(data):
                raise SpecError(f"--set {name}: {inside} is a list of {len(data)}; got {shown(key)} for an index")
            step = int(key)
        elif not isinstance(data, dict):
            raise SpecError(f"--set {name}: {inside} is {shown(data)}, which has no {shown(key)}")
        if depth == len(path) - 1:
            data[step] = value
            return
        inner = data[step] if isinstance(data, list) else data.get(step)
        if inner is None or inner == "none":
            data[step] = {}
        elif isinstance(inner, str):
            data[step] = {"kind": inner}  # a kind with default options, now about to get one
        data = data[step]
