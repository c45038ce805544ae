"""`--set path=value`: override options of a study file for one call, and locate errors at these settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from pydantic import ValidationError

from atn_norms.ablation.grid.renames import rename_axis, rename_path, rename_study
from atn_norms.ablation.grid.resolve import axis_path, set_values
from atn_norms.errors import SpecError, brief, dotted, nearest, short_repr, to_spec_error
from atn_norms.specs import Where
from atn_norms.specs import value as yaml_value

Path = tuple[Any, ...]  # of keys and indices


class Setting(NamedTuple):
    """One `path=value`: the path as text, the path as keys and indices of the study, and the value."""

    name: str
    path: Path
    value: Any


def setting(assignment: str) -> Setting:
    """Parse one `path=value`, the value in YAML; an item of a list is `tasks[0]` or `tasks.0`.

    >>> setting("tasks[1].length=20").path, setting("axes.train.optimizer.lr=[0.1]").path
    (('tasks', 1, 'length'), ('axes', 'train.optimizer.lr'))

    Errors: `SpecError` naming the setting.
    """
    name, equals, text = assignment.partition("=")
    name = name.strip()
    path = _path(name)
    if not (equals and all(step != "" for step in path)):
        raise _error(assignment, "no path=value", "path=value, such as train.steps=100")
    return Setting(name, path, yaml_value(text, f"--set {name}: not a YAML value"))


def _error(name: str, got: str, expected: str, near: str | None = None, detail: str = "") -> SpecError:
    return SpecError((f"--set {brief(name)}",), got, expected, near, detail=detail)


def _path(name: str) -> Path:
    first, dot, rest = name.partition(".")
    if first in ("axes", "baseline", "tune") and dot:  # an axis is named by a whole path, up to a bracket
        axis, bracket, inside = rest.partition("[")
        return (first, rename_axis(axis), *(_steps(f"0[{inside}")[1:] if bracket else ()))
    return rename_path(_steps(name))


def _steps(name: str) -> Path:
    """Split a path into keys and indices; a number of at most 9 digits is an index."""
    steps = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    return tuple(int(step) if re.fullmatch(r"\d{1,9}", step) else step for step in steps)


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a study's options with `path=value` settings (values in YAML) applied.

    >>> override({"train": {"steps": 5}}, ["train.steps=9", "axes.norm=[none, layer]", "seeds=2"])
    {'train': {'steps': 9}, 'axes': {'norm': ['none', 'layer']}, 'seeds': 2}

    Errors: `SpecError` naming the setting.
    """
    data, settings = _renamed(data), [setting(assignment) for assignment in assignments]
    tasks = list(data["tasks"]) if isinstance(data.get("tasks"), Mapping) else []
    for each in settings:
        _assign(data, each)
    for each in settings if tasks else ():
        _refuse_unknown_task(data, each, tasks)
    _refuse_overruled(data, settings)
    return data


def _renamed(data: dict[str, Any]) -> dict[str, Any]:
    try:
        return rename_study(deepcopy(data))
    except ValidationError as error:
        raise to_spec_error(error) from None


def placed(data: Any, assignments: Sequence[str], where: Where) -> Where:
    """Return a function that locates problems after `override`: at the setting that causes them, else by `where`.

    >>> place = placed({"train": {}}, ["train.steps=x", "trian.steps=9"], lambda path: "study.yaml:1:1")
    >>> place(("train", "steps")), place(("trian",)), place(("train",))
    ('--set train.steps', '--set trian.steps', 'study.yaml:1:1, --set train.steps')
    """
    settings = [setting(assignment) for assignment in reversed(assignments)]

    def place(path: Path) -> str:
        below = []
        for each in settings:
            common = min(len(each.path), len(path))
            if list(map(str, each.path[:common])) == list(map(str, path[:common])):
                if common == len(each.path) or not set_values(data, path):
                    return ", ".join([f"--set {each.name}", *below])
                below.append(f"--set {each.name}")
        return ", ".join([where(path), *below])  # the file's option, and the settings that changed a part of it

    return place


def _refuse_unknown_task(data: Mapping[str, Any], given: Setting, tasks: Sequence[str]) -> None:
    """Raise `SpecError` for an option of a task that neither the file nor a setting defines."""
    if given.path[0] != "tasks" or len(given.path) < 3:
        return
    name = str(given.path[1])
    if name not in tasks and not set_values(data, ("tasks", name, "kind")):
        raise _error(given.name, "no task of this study", f"one of {', '.join(tasks)}", nearest(name, tasks))


def _refuse_overruled(data: dict[str, Any], settings: Sequence[Setting]) -> None:
    """Raise `SpecError` for a setting that the values of an axis or of a tuned option replace."""
    sections = {name: data.get(name) for name in ("axes", "tune")}
    for section, axis in ((s, each) for s, axes in sections.items() if isinstance(axes, dict) for each in axes):
        path = axis_path(str(axis))
        for each in settings:
            place, values = _of_a_task(each) if each.path[0] == "tasks" else (each.path, [each.value])
            common = min(len(place), len(path))
            if place[:common] == path[:common] and any(set_values(value, path[common:]) for value in values):
                source = f"the axis {axis}" if section == "axes" else f"tune.{axis}"
                cure = f"Use --set '{section}.{axis}=[...]'"
                raise _error(each.name, f"an option that {source} sets", "another option", detail=cure)


def _of_a_task(given: Setting) -> tuple[Path, list[Any]]:
    """Return the path of a setting of `tasks` within one task, and the values that it sets there."""
    named = list(given.value.values()) if isinstance(given.value, Mapping) else given.value
    every = len(given.path) == 1 and isinstance(named, list)
    return ("task", *given.path[2:]), named if every else [given.value]


def _assign(data: Any, given: Setting) -> None:
    for depth, each in enumerate(given.path):
        inside = dotted(given.path[:depth])
        step: Any = each
        if isinstance(data, list):
            if not isinstance(step, int) or step >= len(data):
                got = f"index {short_repr(step)} of {inside}"
                raise _error(given.name, got, f"an index below {len(data)}")
        elif isinstance(data, dict):
            step = str(step)
        else:
            got = f"{short_repr(step)} of {inside}, which is {short_repr(data)}"
            raise _error(given.name, got, "a mapping or a list there")
        if depth == len(given.path) - 1:
            data[step] = given.value
            return
        inner = data[step] if isinstance(data, list) else data.get(step)
        if inner is None and isinstance(given.path[depth + 1], int):
            if step == "tasks" and "task" in data:
                near = dotted(("task", *given.path[2:]))
                raise _error(given.name, "an index", "none, since the file has one task", near)
            expected = f"the whole list, since the file has no {dotted(given.path[: depth + 1])}"
            raise _error(given.name, "an index", expected)
        if inner is None or inner == "none":
            data[step] = {}
        elif isinstance(inner, str):
            data[step] = {"kind": inner}  # a kind as a mapping, to hold an option
        data = data[step]
