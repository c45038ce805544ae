"""Name the options by which a study lacks trials of a stored study."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atn_norms.ablation.grid.resolve import axis_path
from atn_norms.ablation.store.identity import NEUTRAL
from atn_norms.ablation.store.merge import differing, same, shown, value_at
from atn_norms.errors import Problem, brief, short_repr

ANALYSIS = ("name", "baseline", "reach", "endpoint", "margin")  # keys of a study that change no trial
HARMLESS = {(name,) for name in ANALYSIS} | {("train", name) for name in NEUTRAL}


def changed_options(study: Mapping[str, Any], stored: Mapping[str, Any]) -> list[Problem]:
    """Return each option by which a study is no extension of a stored study; `got` is of the study.

    More seeds, tasks and values of an axis are an extension, and so is an axis that has the value of the stored option.

    >>> print(*changed_options({"train": {"steps": 6}, "seeds": 2}, {"train": {"steps": 4}, "seeds": 1}))
    train.steps: got 6; expected 4
    >>> print(*changed_options({"axes": {"norm": ["none", "rms"]}}, {"axes": {"norm": ["none", "layer"]}}))
    axes.norm: got ['none', 'rms']; expected 'layer' among them
    """
    here, there = _with_lists(study, stored), _with_lists(stored, study)
    axes = {axis_path(name): values for key in ("axes", "tune") for name, values in (here.get(key) or {}).items()}
    new_axes = [path for path in differing(here, there) if _is_axis(path) and value_at(there, path) is None]
    return list(_changes(here, there, axes, new_axes)) or [
        Problem(path, shown(value_at(here, path)), "no such axis") for path in new_axes
    ]


def _changes(
    here: Mapping[str, Any],
    there: Mapping[str, Any],
    axes: Mapping[tuple[str, ...], list[Any]],
    new_axes: list[tuple[str, ...]],
) -> Iterator[Problem]:
    for path in differing(here, there):
        mine, theirs = value_at(here, path), value_at(there, path)
        if path in HARMLESS or path in new_axes or _has(axes.get(path, ()), theirs):
            continue
        if isinstance(mine, list) and isinstance(theirs, list) and (_is_axis(path) or path in (("seeds",), ("tasks",))):
            if lacking := [short_repr(each) for each in theirs if not _has(mine, each)]:
                kind = {"seeds": "seed ", "tasks": "task "}.get(path[0], "")
                yield Problem(path, shown(mine), f"{kind}{brief(', '.join(lacking))} among them")
        else:
            yield Problem(path, shown(mine), shown(theirs))


def _has(values: Iterable[Any], value: Any) -> bool:
    return any(same(each, value) for each in values)


def _is_axis(path: tuple[str, ...]) -> bool:
    return len(path) == 2 and path[0] in ("axes", "tune")


def _with_lists(study: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study with a list of seeds, and with a list of tasks where one of two studies has one."""
    seeds = study.get("seeds")
    lists: dict[str, Any] = {"seeds": list(range(seeds)) if isinstance(seeds, int) else seeds}
    if study.get("tasks") or other.get("tasks"):
        tasks = study.get("tasks") or [study.get("task")]
        lists |= {"task": None, "tasks": list(tasks.values()) if isinstance(tasks, Mapping) else tasks}
    return {**study, **lists}
