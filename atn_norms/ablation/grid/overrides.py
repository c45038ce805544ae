"""`--set path=value`: options of a study file changed for one call, and the errors that this leads to placed there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from pydantic import ValidationError

from atn_norms.ablation.grid.renames import rename_axis, rename_path, rename_study
from atn_norms.ablation.grid.resolve import axis_path
from atn_norms.errors import SpecError, brief, dotted, short_repr, to_spec_error
from atn_norms.specs import Where
from atn_norms.specs import value as yaml_value

Path = tuple[Any, ...]  # of keys and indices


class Setting(NamedTuple):
    """One `path=value`: its path as it was written, as steps into a study's mapping, and the value."""

    name: str
    path: Path
    value: Any


def setting(assignment: str) -> Setting:
    """Read one `path=value`, the value in YAML; an item of a list is `tasks[0]`, or `tasks.0`.

    >>> setting("tasks[1].length=20").path, setting("axes.train.optimizer.lr=[0.1]").path
    (('tasks', 1, 'length'), ('axes', 'train.optimizer.lr'))

    Errors: `SpecError` naming the setting.
    """
    name, equals, text = assignment.partition("=")
    name = name.strip()
    path = _path(name)
    if not (equals and all(step != "" for step in path)):
        raise SpecError(f"--set {brief(assignment)}: must be path=value, such as train.steps=100")
    return Setting(name, path, yaml_value(text, f"--set {name}: not a YAML value"))


def _path(name: str) -> Path:
    first, dot, rest = name.partition(".")
    if first in ("axes", "baseline", "tune") and dot:  # an axis has a whole path for its name, which ends at a bracket
        axis, bracket, inside = rest.partition("[")
        return (first, rename_axis(axis), *(_steps(f"0[{inside}")[1:] if bracket else ()))
    return rename_path(_steps(name))


def _steps(name: str) -> Path:
    """The steps of a path; digits, few enough to count anything, are an index."""
    steps = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    return tuple(int(step) if re.fullmatch(r"\d{1,9}", step) else step for step in steps)


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Put `path=value` settings (values in YAML) into what a study file said.

    >>> override({"train": {"steps": 5}}, ["train.steps=9", "axes.norm=[none, layer]", "seeds=2"])
    {'train': {'steps': 9}, 'axes': {'norm': ['none', 'layer']}, 'seeds': 2}

    Errors: `SpecError` naming the setting.
    """
    data, given = _renamed(data), [setting(assignment) for assignment in assignments]
    for each in given:
        _assign(data, each)
    _refuse_the_overruled(data, given)
    return data


def _renamed(data: dict[str, Any]) -> dict[str, Any]:
    try:
        return rename_study(deepcopy(data))
    except ValidationError as error:
        raise to_spec_error(error) from None


def placed(data: Any, assignments: Sequence[str], where: Where) -> Where:
    """Place a problem of what `override` made of `data`: at the setting it comes from, else where `where` says.

    >>> place = placed({"train": {}}, ["train.steps=x", "trian.steps=9"], lambda path: "study.yaml:1:1")
    >>> place(("train", "steps")), place(("trian",)), place(("train",))
    ('--set train.steps', '--set trian.steps', 'study.yaml:1:1, --set train.steps')
    """
    given = [setting(assignment) for assignment in reversed(assignments)]

    def place(path: Path) -> str:
        below = []
        for each in given:
            common = min(len(each.path), len(path))
            if list(map(str, each.path[:common])) == list(map(str, path[:common])):
                if common == len(each.path) or not _holds(data, path):
                    return ", ".join([f"--set {each.name}", *below])
                below.append(f"--set {each.name}")
        return ", ".join([where(path), *below])  # what the file says there, as the settings changed it

    return place


def _refuse_the_overruled(data: dict[str, Any], given: Sequence[Setting]) -> None:
    """Refuse a setting that the values of an axis or of a tuned option replace: it would change nothing."""
    sections = {name: data.get(name) for name in ("axes", "tune")}
    for section, axis in ((s, each) for s, axes in sections.items() if isinstance(axes, dict) for each in axes):
        path = axis_path(str(axis))
        for each in given:
            place, values = _of_a_task(each) if each.path[0] == "tasks" else (each.path, [each.value])
            common = min(len(place), len(path))
            if place[:common] == path[:common] and any(_holds(value, path[common:]) for value in values):
                what = f"the axis {axis}" if section == "axes" else f"tune.{axis}"
                raise SpecError(f"--set {each.name}: {what} says what this is; use --set '{section}.{axis}=[...]'")


def _of_a_task(given: Setting) -> tuple[Path, list[Any]]:
    """What a setting of `tasks` says of a single one, and the values of which that is true."""
    every = len(given.path) == 1 and isinstance(given.value, list)
    return ("task", *given.path[2:]), given.value if every else [given.value]


def _holds(value: Any, path: Path) -> bool:
    """Whether a value says something at a path within it: a name its kind, and at no path at all everything does."""
    for step in path:
        if isinstance(value, str) and value != "none" and step == "kind":
            return True
        try:
            value = value[step] if isinstance(value, Mapping | list) else {}[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _assign(data: Any, given: Setting) -> None:
    for depth, each in enumerate(given.path):
        inside = dotted(given.path[:depth])
        step: Any = each
        if isinstance(data, list):
            if not isinstance(step, int) or step >= len(data):
                told = f"{inside} is a list of {len(data)}; got {short_repr(step)} for an index"
                raise SpecError(f"--set {given.name}: {told}")
        elif isinstance(data, dict):
            step = str(step)
        else:
            raise SpecError(f"--set {given.name}: {inside} is {short_repr(data)}, which has no {short_repr(step)}")
        if depth == len(given.path) - 1:
            data[step] = given.value
            return
        inner = data[step] if isinstance(data, list) else data.get(step)
        if inner is None and isinstance(given.path[depth + 1], int):
            told = f"the file has no list {dotted(given.path[: depth + 1])}; give the whole of it"
            if step == "tasks" and "task" in data:
                told = f"the file has one task, no list; did you mean {dotted(('task', *given.path[2:]))!r}?"
            raise SpecError(f"--set {given.name}: {told}")
        if inner is None or inner == "none":
            data[step] = {}
        elif isinstance(inner, str):
            data[step] = {"kind": inner}  # a kind with default options, now about to get one
        data = data[step]
