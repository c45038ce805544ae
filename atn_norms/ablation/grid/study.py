"""A study file as a value: a base configuration, axes, tasks and seeds; every point of the grid is validated."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from atn_norms.ablation.grid.axis_problems import IS_AXIS, axis_problems
from atn_norms.ablation.grid.errors import Problem, invalid, problems_of
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.grid.renames import rename_study
from atn_norms.ablation.grid.resolve import (
    SECTIONS,
    THE_TASKS,
    AnyTask,
    axis_name,
    axis_path,
    place,
    resolve,
)
from atn_norms.ablation.grid.task_problems import task_problems
from atn_norms.ablation.grid.training import TrainSpec
from atn_norms.ablation.store.labels import label, plain
from atn_norms.errors import brief, did_you_mean, nearest, short_repr
from atn_norms.layers import LayerSpec
from atn_norms.options import Options

MOST_POINTS = 100_000
MOST_SEED = 2**63 - 1  # the largest seed that torch accepts
MEASURES = ("final", "tail", "steps")
NAME = r"[^\W_][\w .-]{0,79}"


class _Sections(Options):
    """The sections of a resolved point."""

    model: LayerSpec
    task: AnyTask
    train: TrainSpec


@dataclass(frozen=True)
class _Shown:
    """Show a section in the JSON schema as its options; none is required, since an axis may set it."""

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

    @model_validator(mode="after")
    def _refuse_ignored_validations(self) -> Self:
        if self.measure != "tail" and self.validations != 5:  # files of stored studies have the default
            expected = f"expected no value, since {self.measure} averages no validations"
            raise invalid("endpoint", [Problem(("validations",), f"got {self.validations}; {expected}")])
        return self


class Point(NamedTuple):
    """A point of the grid for one task: its sections, its labels, and a function that locates its problems."""

    labels: dict[str, str]
    model: Any
    task: Any
    train: TrainSpec
    placed: Callable[[Problem], Problem]


def _at_a_value(problem: Problem) -> bool:
    """Check whether a problem concerns one value of an axis."""
    return len(problem.path) == 3 and problem.path[0] in ("axes", "tune")


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"got {short_repr(name)}; expected 1 to 80 letters, digits, blanks and . _ - with a letter or digit first"
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
        problems = [each._replace(path=(*path, *each.path)) for each in problems_of(error, endpoint)]
        raise invalid("endpoint", problems) from None


def _margins(margin: Any) -> Any:
    """Raise an error for a margin that is not a positive number."""
    margins = margin if isinstance(margin, Mapping) else {None: margin}
    wrong = {n: v for n, v in margins.items() if not isinstance(v, int | float) or isinstance(v, bool) or v <= 0}
    if margin is not None and wrong:
        problems = [
            Problem(() if n is None else (n,), f"got {short_repr(v)}; expected a number above 0")
            for n, v in wrong.items()
        ]
        raise invalid("margin", problems)
    return margin


def _levels(reach: Any) -> Any:
    """Raise an error at each level that is no number; pydantic would list every member of the union."""
    levels = reach if isinstance(reach, Mapping) else {None: reach}
    wrong = {n: each for n, each in levels.items() if not isinstance(each, int | float) or isinstance(each, bool)}
    if reach is not None and wrong:
        got = "got {}; expected a number, or a mapping of task to number".format
        raise invalid("reach", [Problem(() if n is None else (n,), got(short_repr(each))) for n, each in wrong.items()])
    return reach


def _task_names(tasks: Any) -> Any:
    """Raise an error for each name of a task that is no name."""
    problems = []
    for name in tasks if isinstance(tasks, Mapping) else ():
        try:
            _name(name)
        except ValueError as error:
            problems.append(Problem((name,), str(error)))
    if problems:
        raise invalid("tasks", problems)
    return tasks


_Task = Annotated[str | dict[str, Any], BeforeValidator(plain), _Shown("task")]
_Tasks = Annotated[
    Annotated[tuple[_Task, ...], Tag("list")] | Annotated[dict[str, _Task], Tag("names")],
    Discriminator(lambda tasks: "names" if isinstance(tasks, Mapping) else "list"),
    AfterValidator(_task_names),
]


def _seeds(seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if isinstance(seeds, int):
        if seeds < 1:
            raise ValueError(f"got {short_repr(seeds)}; expected at least one seed")
        if seeds > MOST_POINTS:
            raise ValueError(f"got {short_repr(seeds)}; expected at most {MOST_POINTS}")
    elif not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"got {short_repr(list(seeds))}; expected different numbers of at least 0")
    elif max(seeds) > MOST_SEED:
        raise ValueError(f"got {short_repr(list(seeds))}; expected at most {MOST_SEED}")
    return seeds


def _native(value: Any) -> Any:
    """Return a part of a study with numpy's numbers and arrays, other mappings and other sequences as Python's."""
    if isinstance(value, Mapping):
        return {name: _native(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_native(each) for each in value]
    numpy: Any = sys.modules.get("numpy")
    array: Any = value
    return array.tolist() if numpy is not None and isinstance(value, numpy.ndarray | numpy.number) else value


def _refuse_what_is_not_json(data: Any) -> Any:
    problems = list(_not_json(data, ()))
    if problems:
        raise invalid("study", problems)
    return data


def _not_json(value: Any, path: tuple[str | int, ...]) -> Iterator[Problem]:
    """Yield every part of a study that cannot be written as JSON: dates, sets, .nan, keys that are no text."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            if isinstance(name, str):
                yield from _not_json(each, (*path, name))
            else:
                yield Problem(path, f"got the key {short_repr(name)}; expected text")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _not_json(each, (*path, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, f"got {value}; expected a finite number")
    elif isinstance(value, str) and not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        yield Problem(path, f"got {short_repr(value)}, which has an unpaired surrogate; expected text")
    elif not isinstance(value, str | bool | int | float | Options | None):
        expected = "expected text, numbers, true, false, null, lists and mappings"
        yield Problem(path, f"got {type(value).__name__} {short_repr(value)}; {expected}")


def _axes(axes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    problems = []
    for name, values in axes.items():
        labels = [label(value) for value in values]
        if not values:
            problems.append(Problem((name,), "got no values; expected at least one"))
        for each in dict.fromkeys(labels):
            places = [i for i, other in enumerate(labels) if other == each]
            if len(places) > 1:
                times = "twice" if len(places) == 2 else f"{len(places)} times"
                problems.append(Problem((name, places[1]), f"got {brief(each)} {times}; expected different values"))
        if name in (*SECTIONS, "tasks", "seeds", "seed"):
            expected = "expected an option such as norm or train.steps, or an argument of a function with another name"
            problems.append(Problem((name,), f"got {name}; {expected}; {name} is reserved"))
    paths = [axis_path(name) for name in axes]
    problems += [Problem((n,), IS_AXIS) for i, n in enumerate(axes) if paths[i] in paths[:i]]
    if problems:
        raise invalid("axes", problems)
    return axes


class StudySpec(Options):
    """A study: `model` (a layer without `input_size`), `task` or `tasks`, `train`, `axes`, `seeds`, `baseline`.

    An axis names an option by its path and lists its values: `norm` (short for `model.norm`), `train.optimizer.lr`,
    `task.length`. A window without a norm changes nothing and is dropped. `seeds` is a list or a count. `baseline` names
    a value of some axes; the points with other values are compared with it. `reach` is a level of the validation metric:
    the report shows the time to reach it. It is a number, or a mapping of task to number, and changes no trial.

    `tune` has the form of `axes`. Every point is trained at each of these values, and the report shows the value with
    the best validation. `endpoint` is the measure that decides: `final`, `tail` or `steps`, or a mapping with options,
    or a mapping of task to endpoint. `margin` is the largest difference that does not matter: a number, or a mapping of
    task to number. It is a ratio above 1 where the task's spread is multiplicative. Neither changes a trial.

    `tasks` is a list, or a mapping of name to task. Without a name a task is called by its kind.

    Errors: `pydantic.ValidationError` for every invalid point of the grid, located in the file.

    >>> study = StudySpec(model={"cell": "lstm", "hidden_size": 8}, task="adding", axes={"norm": ["none", "layer"]}, seeds=2)
    >>> [point.labels for point in study.points()]
    [{'task': 'adding', 'norm': 'none'}, {'task': 'adding', 'norm': 'layer'}]
    """  # noqa: E501

    name: Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{NAME}$"})] = "study"
    model: Annotated[dict[str, Any], BeforeValidator(plain), _Shown("model")] = {}
    task: Annotated[str | dict[str, Any] | None, BeforeValidator(plain), _Shown("task")] = None
    tasks: _Tasks | None = None
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
        return rename_study(_refuse_what_is_not_json(_native(data))) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        if (self.task is None) == (not self.tasks):
            got = "got neither `task` nor `tasks`" if self.task is None else "got both `task` and `tasks`"
            raise invalid("study", [Problem(("task",), f"{got}; expected one of them")])
        tasks = self._task_options()
        again = [self._task_list()[i] for i, each in enumerate(tasks) if each in tasks[:i]]
        if again:
            twice = "got {} twice; expected different tasks".format
            raise invalid("study", [Problem(path, twice(brief(label(task)))) for path, task in again])
        count = len(self._task_list())
        for values in (*self.axes.values(), *self.tune.values()):
            count *= len(values)
        if count > MOST_POINTS:
            raise invalid("study", [Problem(("axes",), f"got {count} points; expected at most {MOST_POINTS}")])
        seeds = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        if count * seeds > MOST_POINTS:
            got = f"got {count * seeds} trials ({count} points with {seeds} seeds); expected at most {MOST_POINTS}"
            raise invalid("study", [Problem(("seeds",), got)])
        problems = [each for point in self.resolved_points if isinstance(point, list) for each in point]
        problems += [
            *axis_problems(self, self._task_list()),
            *self._baseline_problems(),
            *task_problems(self, self._task_labels()),
        ]
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
        """Remove repeated problems; merge a problem of every value of an axis, such as its path, into one."""
        different = list(dict.fromkeys(problems))
        same = Counter((each.path[1], each.message) for each in different if _at_a_value(each))

        def merged(each: Problem) -> Problem:
            every = len(getattr(self, str(each.path[0]))[str(each.path[1])]) if _at_a_value(each) else 0
            return each._replace(path=each.path[:2]) if 1 < every == same[each.path[1], each.message] else each

        return list(dict.fromkeys(map(merged, different)))

    def seed_list(self) -> list[int]:
        """Return the seeds as a list."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)

    def points(self) -> list[Point]:
        """Return every point of the grid, ordered by task; the last axis varies fastest."""
        return [point for point in self.resolved_points if isinstance(point, Point)]

    @cached_property
    def resolved_points(self) -> list[Point | list[Problem]]:
        """Every point of the grid, or its problems; each point is validated once."""
        return list(self._points())

    def axis_labels(self) -> dict[str, list[str]]:
        """Return the labels of the values of each axis, in order."""
        return {axis_name(name): [label(value) for value in values] for name, values in self.axes.items()}

    def tune_labels(self) -> dict[str, list[str]]:
        """Return the labels of the values of each tuned option, in order."""
        return {axis_name(name): [label(value) for value in values] for name, values in self.tune.items()}

    def baseline_labels(self) -> dict[str, str]:
        """Return the baseline as labels; by default window 1, else no norm, else the first value of the first axis.

        A default is a value of an axis with other values, with which it is compared.
        """
        if self.baseline:
            return {axis_name(name): label(value) for name, value in self.baseline.items()}
        labels = {name: values for name, values in self.axis_labels().items() if len(values) > 1}
        for axis, value in (("window", "1"), ("norm", "none")):
            if value in labels.get(axis, ()):
                return {axis: value}
        return {name: values[0] for name, values in list(labels.items())[:1]}

    def _baseline_problems(self) -> list[Problem]:
        labels = self.axis_labels()
        problems = []
        for name, value in self.baseline.items():
            axis = axis_name(name)
            if axis not in labels:
                expected = f"expected one of {', '.join(labels)}" if labels else "expected none, since it has no axes"
                got = f"got no axis of this study; {expected}{did_you_mean(axis, labels)}"
                problems.append(Problem(("baseline", name), got))
            elif label(value) not in labels[axis]:
                known, near = ", ".join(labels[axis]), did_you_mean(label(value), labels[axis])
                got = f"got {brief(label(value))}; expected a value of this axis: {known}{near}"
                problems.append(Problem(("baseline", name), got))
        return problems

    def _task_list(self) -> list[tuple[tuple[str | int, ...], Any]]:
        if self.task is not None:
            return [(("task",), self.task)]
        named = self.tasks.items() if isinstance(self.tasks, Mapping) else enumerate(self.tasks or ())
        return [(("tasks", key), task) for key, task in named]

    def _task_options(self) -> list[Mapping[str, Any]]:
        return [task if isinstance(task, Mapping) else {"kind": task} for _, task in self._task_list()]

    def _task_labels(self) -> list[str]:
        """Return the name of each task: by default its kind or function, and the options in which a kind differs."""
        if isinstance(self.tasks, Mapping):
            return list(self.tasks)
        tasks = self._task_options()
        kinds = list(map(_kind, tasks))

        def named(kind: str, task: Mapping[str, Any]) -> str:
            alike = [each for each, other in zip(tasks, kinds, strict=True) if other == kind]
            own = {k: v for k, v in task.items() if k == "kind" or any(k not in each or each[k] != v for each in alike)}
            return label(own) if len(alike) > 1 else kind

        return list(map(named, kinds, tasks))

    def _points(self) -> Iterator[Point | list[Problem]]:
        names = self._task_labels()
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


def _kind(task: Mapping[str, Any]) -> str:
    return str(task.get("function", "train") if is_function(task) else task.get("kind"))
