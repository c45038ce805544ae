"""Resolve one point of a grid: put the axes' values into the sections, and validate each section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from atn_norms.ablation.grid.errors import Problem, problems_of
from atn_norms.ablation.grid.functions import (
    KIND,
    TRAINING,
    UNKNOWN_STEPS,
    FunctionSpec,
    check_arguments,
    is_function,
    placed_in,
    shorthand,
)
from atn_norms.ablation.grid.renames import rename_path, rename_train
from atn_norms.ablation.grid.training import TrainSpec
from atn_norms.ablation.store.labels import plain
from atn_norms.errors import SpecError, did_you_mean, one_of, plural
from atn_norms.layers import LayerSpec
from atn_norms.layers.spec import make_layer_spec
from atn_norms.registry import KindField
from atn_norms.tasks import TaskSpec

SECTIONS = ("model", "task", "train")
THE_TASKS = {
    "input_size": "comes from the task",
    "batch_first": "a task feeds time first",
}  # the task sets these options
AnyTask = Annotated[TaskSpec, KindField("task", shorthand, FunctionSpec.model_json_schema(), (KIND,))]
TASK: TypeAdapter[TaskSpec] = TypeAdapter(AnyTask)


def axis_path(name: str) -> tuple[str, ...]:
    """Return the path of an axis from the top of the study.

    >>> axis_path("norm"), axis_path("train.optimizer.lr")
    (('model', 'norm'), ('train', 'optimizer', 'lr'))
    """
    path = tuple(name.split("."))
    return rename_path(path if path[0] in SECTIONS else ("model", *path))


def axis_name(name: str) -> str:
    """Return the name of an axis, without `model.`.

    >>> axis_name("model.norm"), axis_name("train.optimizer.lr")
    ('norm', 'train.optimizer.lr')
    """
    return name.removeprefix("model.")


def has_norm(norm: Any) -> bool:
    """Check whether a layer's `norm`, as written in a file, normalizes at any site."""
    if isinstance(norm, Mapping) and "sites" in norm:
        sites = norm["sites"]
        return any(map(has_norm, sites.values())) if isinstance(sites, Mapping) else True
    return norm is not None and norm != "none"


def set_values(value: Any, path: tuple[Any, ...]) -> list[Any]:
    """Return the value of the option at a path within a part of a study, in a list; a name sets `kind`.

    >>> set_values({"optimizer": "adam"}, ("optimizer", "kind")), set_values({"optimizer": "adam"}, ("optimizer", "lr"))
    (['adam'], [])
    """
    for step in path:
        if isinstance(value, str) and value != "none" and step == "kind":
            return [value]
        try:
            value = value[step] if isinstance(value, Mapping | list) else {}[step]
        except (KeyError, IndexError, TypeError):
            return []
    return [value]


def resolve(data: dict[str, Any], axes: dict[str, Any]) -> tuple[list[Problem], dict[str, Any]]:
    """Put the axes' values into the sections and validate each; paths of problems begin with the section."""
    problems: list[Problem] = []
    parts: dict[str, Any] = {}

    def check(section: str, validate: Callable[[Any], Any]) -> None:
        try:
            parts[section] = validate(data[section])
        except ValidationError as error:
            problems.extend(p._replace(path=(section, *p.path)) for p in problems_of(error, data[section]))
        except OverflowError as error:
            problems.append(Problem((section,), f"a number is too large: {error}"))

    for name in sorted(axes, key=lambda each: len(axis_path(each))):  # norm before norm.eps
        if not name.startswith("train."):
            _put(data, axis_path(name), axes[name])
    if is_function(data["task"]):
        return _resolve_function(data, axes)
    model = data["model"]
    varied = {path[1] for path in map(axis_path, axes) if path[0] == "model" and len(path) > 1}
    if varied & {"norm", "window"} and not has_norm(model.get("norm")):
        model.pop("window", None)  # without an axis of norms or windows it is an error, as in a layer
    for option, why in THE_TASKS.items():
        if model.get(option, False) is not False:
            problems.append(Problem(("model", option), f"{why}; leave it out"))
    check("model", _layer_alone)
    if "window" in model and "model" in parts and not parts["model"].has_statistics:
        model.pop("window")  # stateless normalizers: every window is one trial
        check("model", _layer_alone)
    if "placement" in varied and "model" in parts:
        placement = _effective_placement(parts["model"])
        if placement != parts["model"].placement.model_dump():
            model["placement"] = placement
            check("model", _layer_alone)
    problems[:] = map(_without_the_tasks, problems)
    check("task", TASK.validate_python)
    data["train"] = _recommended(parts.get("task"), data["train"])
    for name in sorted(axes, key=lambda each: len(axis_path(each))):
        if name.startswith("train."):
            _put(data, axis_path(name), axes[name])
    check("train", TrainSpec.model_validate)
    if "train" in parts:
        problems.extend(_without_effect(parts["train"]))
    if not problems and (reason := parts["task"].unsupported_reason(parts["model"])):
        problems.append(Problem(("model",), f"task {parts['task'].kind}: {reason}"))
    return problems, parts


def _layer_alone(options: Mapping[str, Any]) -> LayerSpec:
    """Validate the options of a layer whose input size the task will set."""
    return LayerSpec.model_validate({**options, "input_size": 1})


def _effective_placement(layer: LayerSpec) -> dict[str, Any]:
    """Return a layer's placement without the options that change nothing, so that equal layers are one trial."""
    cell = layer.equations()
    normed = [site for site in cell.sites if layer.norm_at(site) is not None]
    placement = layer.placement.model_dump() if normed else {}
    if all(cell.gates_at(site) == 1 for site in normed):
        placement.pop("gates", None)
    return placement


def _without_effect(train: TrainSpec) -> list[Problem]:
    """Return a problem for each option that cannot act within the steps of a training."""
    steps, warmup, validations = train.steps, train.schedule["warmup"], train.validations
    found = []
    if train.patience is not None and train.patience > validations:
        most = f"expected at most {validations}, the number of validations"
        found.append(Problem(("train", "patience"), f"got {train.patience}; {most}"))
    if train.schedule["kind"] == "plateau" and train.schedule["patience"] > validations - 2:
        got = f"got patience {train.schedule['patience']} with {plural(validations, 'validation')}"
        expected = f"at most {validations - 2}, so that it acts before the last validation"
        expected = expected if validations > 2 else "another schedule, since a plateau needs 3 validations"
        found.append(Problem(("train", "schedule", "patience"), f"{got}; expected {expected}"))
    if warmup > steps:
        found.append(Problem(("train", "schedule", "warmup"), f"got {warmup}; expected at most {steps}, the steps"))
    return found


def _resolve_function(data: dict[str, Any], axes: dict[str, Any]) -> tuple[list[Problem], dict[str, Any]]:
    """Resolve a point whose task is a function: `model` holds the arguments of the call."""
    varied = {path[1] for path in map(axis_path, axes) if path[0] == "model"}
    problems = [
        Problem(("model", name), "got an option; expected none: a python task has arguments, under task.arguments")
        for name in data["model"]
        if name not in varied
    ]
    try:
        task = FunctionSpec.model_validate({"kind": KIND} if data["task"] == KIND else dict(data["task"]))
    except ValidationError as error:
        return problems + [p._replace(path=("task", *p.path)) for p in problems_of(error, data["task"])], {}
    problems += [
        Problem(("task", "arguments", name), "got an argument that is an axis already; expected each argument once")
        for name in task.arguments
        if name in varied
    ]
    arguments = {**task.arguments, **{name: data["model"][name] for name in data["model"] if name in varied}}
    if "norm" in arguments and not has_norm(arguments["norm"]) and "window" in arguments:
        arguments["window"] = 1  # without a norm a window changes nothing
    constant = [("model", name) for name in task.arguments]
    problems += [
        each._replace(path=("task", "arguments", *each.path[1:])) if each.path[:2] in constant else each
        for each in (*check_arguments(task, arguments), *_norm_problems(arguments))
    ]
    for name in sorted(axes):
        if name.startswith("train."):
            _put(data, axis_path(name), axes[name])
    problems += [
        Problem(("train", name), f"got an option that a python task does not use; expected {', '.join(TRAINING)}")
        for name in data["train"]
        if name not in TRAINING
    ]
    try:
        train = TrainSpec.model_validate({"steps": UNKNOWN_STEPS, **data["train"]})
    except ValidationError as error:
        return problems + [p._replace(path=("train", *p.path)) for p in problems_of(error, data["train"])], {}
    return problems, {"model": arguments, "task": task.model_copy(update={"arguments": {}}), "train": train}


def _norm_problems(arguments: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of arguments named `norm` and `window`, validated as options of a layer."""
    try:
        layer_of(arguments)
    except SpecError as error:
        return placed_in("model", error)
    return []


def layer_of(arguments: Mapping[str, Any]) -> LayerSpec:
    """Make a layer with the `norm` and the `window` of some arguments; its sizes are arbitrary.

    Without a norm the window is left out: it may be another argument of this name.
    """
    names = ("norm", "window") if has_norm(arguments.get("norm")) else ("norm",)
    named = {name: arguments[name] for name in names if name in arguments}
    return make_layer_spec(cell="lstm", input_size=1, hidden_size=1680, **named)


def _without_the_tasks(problem: Problem) -> Problem:
    """Reword the problem of an unknown key of the model, without the options that the task sets."""
    if problem.type != "unknown_key" or len(problem.path) != 2 or problem.path[0] != "model":
        return problem
    known = [name for name in LayerSpec.model_fields if name not in THE_TASKS]
    near = did_you_mean(problem.path[1], known)
    return problem._replace(message=f"got an unknown key; expected {one_of(known)}{near}")


def _recommended(task: TaskSpec | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return a study's `train` over the task's recommendations; an optimizer without a kind changes the task's."""
    recommended = rename_train(plain(task.recommended)) if task is not None else {}
    given = rename_train(given)
    optimizer = given.get("optimizer")
    if isinstance(optimizer, Mapping) and "kind" not in optimizer and isinstance(recommended.get("optimizer"), dict):
        given = {**given, "optimizer": {**recommended["optimizer"], **optimizer}}
    return {**recommended, **given}


def _put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    place: Any = data
    for key in parents:
        inner = place.get(key) if isinstance(place, dict) else None
        if isinstance(inner, str) and inner != "none":  # a kind as a mapping, to hold an option
            inner = place[key] = {"kind": inner}
        elif key == "norm" and not has_norm(inner):
            return  # an option of an absent norm changes nothing
        elif not isinstance(inner, dict):
            inner = place[key] = {}
        place = inner
    place[last] = deepcopy(plain(value))


def place(problem: Problem, axes: Mapping[tuple[Any, ...], tuple[Any, ...]], task: tuple[Any, ...]) -> Problem:
    """Move a problem from the resolved sections to its place in the file: an axis or a section."""
    path = problem.path
    for length in range(len(path), 0, -1):
        at_axis = axes.get(path[:length])
        if at_axis is not None:
            return problem._replace(path=(*at_axis, *path[length:]))
    within = [place for axis, place in axes.items() if len(path) > 1 and axis[: len(path)] == path]
    if len(within) == 1:  # such as torch's error for an optimizer of which only the rate varies
        return problem._replace(path=within[0])
    return problem._replace(path=(*task, *path[1:]) if path[:1] == ("task",) else path)
