"""A study file as a value: a base configuration, axes, tasks and seeds, every point of the grid checked on reading."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from atn_norms.ablation.grid.errors import Problem, invalid, problems_of
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.grid.renames import rename_study
from atn_norms.ablation.grid.resolve import SECTIONS, THE_TASKS, AnyTask, axis_name, axis_path, place, plain, resolve
from atn_norms.ablation.grid.training import TrainSpec
from atn_norms.ablation.store.files import canonical
from atn_norms.ablation.store.records import Endpoint
from atn_norms.errors import brief, did_you_mean, nearest, short_repr
from atn_norms.layers import LayerSpec
from atn_norms.registry import Options

MOST_POINTS = 100_000
MEASURES = ("final", "tail", "steps")
NAME = r"[^\W_][\w .-]{0,79}"


class _Sections(Options):
    """What the sections hold once they are resolved."""

    model: LayerSpec
    task: AnyTask
    train: TrainSpec


@dataclass(frozen=True)
class _Shown:
    """Show a section in the JSON schema as the options it holds; what is required there, an axis may give instead."""

    section: Literal["model", "task", "train"]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        sections = handler.resolve_ref_schema(handler(_Sections.__pydantic_core_schema__))
        section = dict(handler.resolve_ref_schema(sections["properties"][self.section]))
        if self.section == "task":
            return section
        section["properties"] = {name: each for name, each in section["properties"].items() if name not in THE_TASKS}
        section.pop("required", None)
        return section


class EndpointSpec(Options):
    """The number that decides a task: the `final` test metric, the `tail` of validations, or `steps` to `reach`."""

    measure: Literal["final", "tail", "steps"] = "final"
    validations: int = Field(default=5, ge=1)


class Point(NamedTuple):
    """A point of the grid for one task: what each section says there, how it is called, and where the file says it."""

    labels: dict[str, str]
    model: Any
    task: Any
    train: TrainSpec
    placed: Callable[[Problem], Problem]


def _at_a_value(problem: Problem) -> bool:
    """Whether a problem is that of one value of an axis."""
    return len(problem.path) == 3 and problem.path[0] in ("axes", "tune")


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"must be 1 to 80 letters, digits, blanks and . _ - with a letter or digit first, got {short_repr(name)}"
        )
    return name


def _endpoint(endpoint: Any) -> Any:
    """Validate one endpoint, or one for each task; return names and mappings of options."""
    if endpoint is None or isinstance(endpoint, str) or (isinstance(endpoint, Mapping) and "measure" in endpoint):
        return None if endpoint is None else _one_endpoint(endpoint, ())
    if not isinstance(endpoint, Mapping):
        raise invalid("endpoint", [Problem((), f"got {short_repr(endpoint)}; expected {', '.join(MEASURES)}")])
    return {task: _one_endpoint(each, (task,)) for task, each in endpoint.items()}


def _one_endpoint(endpoint: Any, path: tuple[str, ...]) -> str | dict[str, Any]:
    if isinstance(endpoint, str):
        if endpoint in MEASURES:
            return endpoint
        near = did_you_mean(endpoint, MEASURES)
        expected = f"{', '.join(MEASURES)}, or a mapping with measure{near}"
        raise invalid("endpoint", [Problem(path, f"got {short_repr(endpoint)}; expected {expected}")])
    try:
        return EndpointSpec.model_validate(endpoint).model_dump(mode="json")
    except ValidationError as error:
        found = [each._replace(path=(*path, *each.path)) for each in problems_of(error, endpoint)]
        raise invalid("endpoint", found) from None


def _margins(margin: Any) -> Any:
    """Refuse a margin that is not a positive number."""
    margins = margin if isinstance(margin, Mapping) else {None: margin}
    wrong = {n: v for n, v in margins.items() if not isinstance(v, int | float) or isinstance(v, bool) or v <= 0}
    if margin is not None and wrong:
        found = [
            (() if n is None else (n,), f"got {short_repr(v)}; expected a number above 0") for n, v in wrong.items()
        ]
        raise invalid("margin", [Problem(*each) for each in found])
    return margin


def _levels(reach: Any) -> Any:
    """Refuse a level that is no number at its own place; of the union, pydantic could only tell the whole."""
    levels = reach if isinstance(reach, Mapping) else {None: reach}
    wrong = {n: each for n, each in levels.items() if not isinstance(each, int | float) or isinstance(each, bool)}
    if reach is not None and wrong:
        allowed = "must be a number, got {}; allowed: one number, or for each task TASK: number".format
        raise invalid(
            "reach", [Problem(() if n is None else (n,), allowed(short_repr(each))) for n, each in wrong.items()]
        )
    return reach


def _seeds(seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if isinstance(seeds, int):
        if seeds < 1:
            raise ValueError(f"at least one seed is needed, got {short_repr(seeds)}")
        if seeds > MOST_POINTS:
            raise ValueError(f"at most {MOST_POINTS} are possible, got {short_repr(seeds)}")
    elif not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"must be different numbers, none below 0, got {short_repr(list(seeds))}")
    return seeds


def _refuse_what_is_not_json(data: Any) -> Any:
    problems = list(_not_json(data, ()))
    if problems:
        raise invalid("study", problems)
    return data


def _not_json(value: Any, path: tuple[str | int, ...]) -> Iterator[Problem]:
    """Whatever in a study cannot be written as JSON, and so not be kept: dates, sets, .nan, keys that are no text."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            if isinstance(name, str):
                yield from _not_json(each, (*path, name))
            else:
                yield Problem(path, f"a key must be text, got {short_repr(name)}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _not_json(each, (*path, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, f"got {value}; expected a finite number")
    elif isinstance(value, str) and not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        yield Problem(path, f"must be text, and this has half a character in it: {short_repr(value)}")
    elif not isinstance(value, str | bool | int | float | Options | None):
        allowed = "allowed: text, numbers, true, false, null, lists and mappings"
        yield Problem(path, f"{type(value).__name__} {short_repr(value)} is not possible here; {allowed}")


def _axes(axes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    problems = []
    for name, values in axes.items():
        labels = [label(value) for value in values]
        if not values:
            problems.append(Problem((name,), "an axis needs at least one value"))
        for each in dict.fromkeys(labels):
            places = [i for i, other in enumerate(labels) if other == each]
            if len(places) > 1:
                times = "twice" if len(places) == 2 else f"{len(places)} times"
                problems.append(Problem((name, places[1]), f"{brief(each)} is there {times}"))
        if name in (*SECTIONS, "tasks", "seeds", "seed"):
            problems.append(
                Problem((name,), f"an axis is an option, such as norm or train.steps; {name} has its own section")
            )
    paths = [axis_path(name) for name in axes]
    problems += [Problem((n,), "this option is an axis already") for i, n in enumerate(axes) if paths[i] in paths[:i]]
    if problems:
        raise invalid("axes", problems)
    return axes


class StudySpec(Options):
    """A study: `model` (a layer without `input_size`), `task` or `tasks`, `train`, `axes`, `seeds`, `baseline`.

    An axis names an option by its path (`norm`, which is short for `model.norm`; `train.optimizer.lr`; `task.length`) and
    lists its values. A window where there is no norm means nothing and is dropped. `seeds` is a list or a count.
    `baseline` names a value for some axes; the others' points are compared with it. `reach` is a level of the validation
    metric whose first reaching the report times: a number, or one for each task; it changes no trial.

    `tune` has the form of `axes`. Every point is trained at each of these values, and the report shows it at the value
    with the best validation. `endpoint` is the measure that decides: `final`, `tail` or `steps`, with options as a
    mapping, or one for each task. `margin` is the largest difference that does not matter: a number, or one for each
    task; a ratio above 1 where the task's spread is multiplicative. Neither changes a trial.

    Errors: `pydantic.ValidationError` for any point of the grid that cannot be, at its place in the file.

    >>> study = StudySpec(model={"cell": "lstm", "hidden_size": 8}, task="adding", axes={"norm": ["none", "layer"]}, seeds=2)
    >>> [point.labels for point in study.points()]
    [{'task': 'adding', 'norm': 'none'}, {'task': 'adding', 'norm': 'layer'}]
    """  # noqa: E501

    name: Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{NAME}$"})] = "study"
    model: Annotated[dict[str, Any], BeforeValidator(plain), _Shown("model")] = {}
    task: Annotated[str | dict[str, Any] | None, BeforeValidator(plain), _Shown("task")] = None
    tasks: tuple[Annotated[str | dict[str, Any], BeforeValidator(plain), _Shown("task")], ...] | None = None
    train: Annotated[dict[str, Any], BeforeValidator(plain), _Shown("train")] = {}
    axes: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(plain), AfterValidator(_axes)] = {}
    seeds: Annotated[int | tuple[int, ...], AfterValidator(_seeds)] = 5
    baseline: Annotated[dict[str, Any], BeforeValidator(plain)] = {}
    reach: Annotated[float | dict[str, float] | None, BeforeValidator(_levels)] = None
    tune: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(plain), AfterValidator(_axes)] = {}
    endpoint: Annotated[str | dict[str, Any] | None, BeforeValidator(_endpoint)] = None
    margin: Annotated[float | dict[str, float] | None, BeforeValidator(_margins)] = None

    @model_validator(mode="before")
    @classmethod
    def _is_json(cls, data: Any) -> Any:
        return rename_study(_refuse_what_is_not_json(data)) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        if (self.task is None) == (not self.tasks):
            raise invalid("study", [Problem(("task",), "a study needs `task`, or a list of `tasks`, and not both")])
        tasks = [task if isinstance(task, Mapping) else {"kind": task} for _, task in self._task_list()]
        again = [i for i, each in enumerate(tasks) if each in tasks[:i]]
        if again:
            told = [Problem(("tasks", i), f"{brief(label(self._task_list()[i][1]))} is there already") for i in again]
            raise invalid("study", told)
        count = len(self._task_list())
        for values in (*self.axes.values(), *self.tune.values()):
            count *= len(values)
        if count > MOST_POINTS:
            raise invalid("study", [Problem(("axes",), f"{count} points; at most {MOST_POINTS} are possible")])
        seeds = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        if count * seeds > MOST_POINTS:
            told = f"{count} points with {seeds} seeds are {count * seeds} trials; at most {MOST_POINTS} are possible"
            raise invalid("study", [Problem(("seeds",), told)])
        problems = [each for point in self.resolved_points if isinstance(point, list) for each in point]
        problems += [*self._twice(), *self._baseline_problems(), *self._task_problems(), *self._level_problems()]
        if problems:
            raise invalid("study", self._once_an_axis(problems))
        return self

    @classmethod
    def nearest_key(cls, key: object) -> str | None:
        """Return the closest key of the study or of one of its sections."""
        sections = [("train", TrainSpec.model_fields), ("model", LayerSpec.model_fields)]
        places = {name: f"{section}.{name}" for section, fields in sections for name in fields if name not in THE_TASKS}
        places |= {name: name for name in cls.model_fields}
        match = nearest(key, places)
        return None if match is None else places[match]

    def _once_an_axis(self, problems: list[Problem]) -> list[Problem]:
        """Each problem once, and what is wrong with every value of an axis, such as its path, at the axis itself."""
        found = list(dict.fromkeys(problems))
        same = Counter((each.path[1], each.message) for each in found if _at_a_value(each))

        def merged(each: Problem) -> Problem:
            every = len(getattr(self, str(each.path[0]))[str(each.path[1])]) if _at_a_value(each) else 0
            return each._replace(path=each.path[:2]) if 1 < every == same[each.path[1], each.message] else each

        return list(dict.fromkeys(map(merged, found)))

    def seed_list(self) -> list[int]:
        """The seeds themselves."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    def points(self) -> list[Point]:
        """Every point of the grid, task by task, the last axis fastest."""
        return [point for point in self.resolved_points if isinstance(point, Point)]

    @cached_property
    def resolved_points(self) -> list[Point | list[Problem]]:
        """Every point of the grid, or the problems that it has; each point is validated once."""
        return list(self._points())

    def axis_labels(self) -> dict[str, list[str]]:
        """What the values of each axis are called, in order."""
        return {axis_name(name): [label(value) for value in values] for name, values in self.axes.items()}

    def tune_labels(self) -> dict[str, list[str]]:
        """The labels of the values of each tuned option, in order."""
        return {axis_name(name): [label(value) for value in values] for name, values in self.tune.items()}

    def baseline_labels(self) -> dict[str, str]:
        """The baseline as labels: the file's, else window 1, else no norm, else the first value of the first axis."""
        labels = self.axis_labels()
        if self.baseline:
            return {axis_name(name): label(value) for name, value in self.baseline.items()}
        if "1" in labels.get("window", ()) and len(labels["window"]) > 1:
            return {"window": "1"}
        if "none" in labels.get("norm", ()):
            return {"norm": "none"}
        return {name: values[0] for name, values in list(labels.items())[:1]}

    def _twice(self) -> Iterator[Problem]:
        """Options that are an axis and tuned."""
        axes = {axis_path(name) for name in self.axes}
        for name in self.tune:
            if axis_path(name) in axes:
                yield Problem(("tune", name), "this option is an axis already")

    def _task_problems(self) -> Iterator[Problem]:
        """Entries of per-task options for a task that the study does not have."""
        labels = _task_labels([task for _, task in self._task_list()])
        for option in ("reach", "endpoint", "margin"):
            named = getattr(self, option)
            for name in named if isinstance(named, dict) and "measure" not in named else ():
                if name not in labels:
                    told = f"no task of this study; tasks: {', '.join(labels)}{did_you_mean(name, labels)}"
                    yield Problem((option, name), told)

    def _level_problems(self) -> Iterator[Problem]:
        """Tasks whose endpoint is `steps` and for which `reach` names no level."""
        for name in _task_labels([task for _, task in self._task_list()]):
            level = self.reach.get(name) if isinstance(self.reach, dict) else self.reach
            if level is None and Endpoint.of({"endpoint": self.endpoint}, name).measure == "steps":
                yield Problem(("endpoint",), f"got steps for {name}; expected a level for it in reach")

    def _baseline_problems(self) -> list[Problem]:
        labels = self.axis_labels()
        problems = []
        for name, value in self.baseline.items():
            axis = axis_name(name)
            if axis not in labels:
                told = f"no axis of this study; axes: {', '.join(labels) or 'none'}{did_you_mean(axis, labels)}"
                problems.append(Problem(("baseline", name), told))
            elif label(value) not in labels[axis]:
                known, near = ", ".join(labels[axis]), did_you_mean(label(value), labels[axis])
                told = f"{brief(label(value))} is not on this axis; it has {known}{near}"
                problems.append(Problem(("baseline", name), told))
        return problems

    def _task_list(self) -> list[tuple[tuple[str | int, ...], Any]]:
        if self.task is not None:
            return [(("task",), self.task)]
        return [(("tasks", i), task) for i, task in enumerate(self.tasks or ())]

    def _points(self) -> Iterator[Point | list[Problem]]:
        names = _task_labels([task for _, task in self._task_list()])
        options = [(section, name) for section in ("axes", "tune") for name in getattr(self, section)]
        choices = [list(enumerate(getattr(self, section)[name])) for section, name in options]
        for task_label, (task_path, task) in zip(names, self._task_list(), strict=True):
            for chosen in itertools.product(*choices):
                given = {name: each for (_, name), each in zip(options, chosen, strict=True)}
                data = {"model": self.model, "task": task, "train": self.train}
                labels = {"task": task_label} | {axis_name(name): label(value) for name, (_, value) in given.items()}
                problems, parts = resolve(deepcopy(data), {name: value for name, (_, value) in given.items()})
                axes = {axis_path(name): (section, name, given[name][0]) for section, name in options}
                placed = partial(place, axes=axes, task=task_path)
                if problems:
                    yield list(map(placed, problems))
                else:
                    yield Point(labels, parts["model"], parts["task"], parts["train"], placed)


def label(value: Any) -> str:
    """What a value of an axis is called.

    >>> label(None), label(25), label(1e9), label({"kind": "layer", "eps": 0.001})
    ('none', '25', '1e+09', 'layer(eps=0.001)')
    """
    if value is None or isinstance(value, str):
        return value or "none"
    if isinstance(value, Mapping) and isinstance(value.get("kind"), str):
        options = ", ".join(f"{name}={label(each)}" for name, each in value.items() if name != "kind")
        return f"{value['kind']}({options})" if options else value["kind"]
    if isinstance(value, float) and abs(value) >= 1e6 and float(f"{value:g}") == value:
        return f"{value:g}"
    return canonical(plain(value))


def _kind(task: Any) -> str:
    if is_function(task):
        return str(task.get("function", "train"))
    return str(task.get("kind")) if isinstance(task, Mapping) else str(task)


def _task_labels(tasks: list[Any]) -> list[str]:
    """The kind of each task, or the function's name; its options too where a kind appears twice."""
    kinds = [_kind(task) for task in tasks]
    return [label(task) if kinds.count(kind) > 1 else kind for kind, task in zip(kinds, tasks, strict=True)]
