"""Axes and tuned options of a study that replace, repeat or ignore other options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from atn_norms.ablation.grid.errors import Problem
from atn_norms.ablation.grid.functions import is_function
from atn_norms.ablation.grid.resolve import axis_path, has_norm, set_values
from atn_norms.ablation.store.labels import label
from atn_norms.errors import brief

if TYPE_CHECKING:
    from atn_norms.ablation.grid.study import StudySpec

Tasks = Sequence[tuple[tuple[str | int, ...], Any]]  # the path of each task in the study, and the task
IS_AXIS = "got an option that is an axis already; expected each option once"


def axis_problems(study: StudySpec, tasks: Tasks) -> Iterator[Problem]:
    """Yield every problem of the axes and tuned options with each other and with the base configuration."""
    yield from _twice(study)
    yield from _overruled(study, tasks)
    yield from _overruled_values(study)
    yield from _absent_norm(study, tasks)


def _twice(study: StudySpec) -> Iterator[Problem]:
    """Yield a problem for each option that is both an axis and tuned."""
    axes = {axis_path(name) for name in study.axes}
    for name in study.tune:
        if axis_path(name) in axes:
            yield Problem(("tune", name), IS_AXIS)


def _overruled(study: StudySpec, tasks: Tasks) -> Iterator[Problem]:
    """Yield a problem for each option of the base configuration that an axis, or a tuned option, never takes."""
    bases = [(("model",), study.model), (("train",), study.train), *tasks]
    for section, name, values in _varied(study):
        first, *below = axis_path(name)
        for base_path, base in bases:
            for value in set_values(base, tuple(below)) if base_path[0] in (first, f"{first}s") else ():
                if label(value) not in map(label, values):
                    got = f"got {brief(label(value))}, which {_source(section, name)} replaces"
                    yield Problem((*base_path, *below), f"{got}; expected no value, or one of the axis")


def _overruled_values(study: StudySpec) -> Iterator[Problem]:
    """Yield a problem for each option that a value of an axis sets and another axis, or tuned option, replaces."""
    for (upper, name, values), (section, other, _) in itertools.permutations(_varied(study), 2):
        path, inner = axis_path(name), axis_path(other)
        below = inner[len(path) :]
        if not below or inner[: len(path)] != path:
            continue
        for i, value in enumerate(values):
            for own in set_values(value, below):
                got = f"got {brief(label(own))}, which {_source(section, other)} replaces"
                yield Problem((upper, name, i, *below), f"{got}; expected no value there")


def _varied(study: StudySpec) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Return the section, name and values of each axis and of each tuned option."""
    sections = (("axes", study.axes), ("tune", study.tune))
    return [(section, name, values) for section, options in sections for name, values in options.items()]


def _absent_norm(study: StudySpec, tasks: Tasks) -> Iterator[Problem]:
    """Yield a problem for each varied option of a norm, and varied window, if no point of the study has a norm."""
    varied = {axis_path(name): (section, name) for section in ("axes", "tune") for name in getattr(study, section)}
    whole = ("model", "norm")
    norms = [
        study.model.get("norm"),
        *(getattr(study, varied[whole][0])[varied[whole][1]] if whole in varied else ()),
    ]
    if any(map(has_norm, norms)):
        return
    functions = any(is_function(task) for _, task in tasks)  # their `window` may mean anything
    expected = "expected model.norm, or an axis norm"
    for path, (section, name) in varied.items():
        if path[:2] == whole and path != whole:
            yield Problem((section, name), f"got an option of a norm, which no point has; {expected}")
        if path == ("model", "window") and not functions and any(value != 1 for value in getattr(study, section)[name]):
            yield Problem((section, name), f"got windows without a norm, where they change nothing; {expected}")


def _source(section: str, name: str) -> str:
    return f"the axis {name}" if section == "axes" else f"tune.{name}"
