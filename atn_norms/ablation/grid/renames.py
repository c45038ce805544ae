"""Accept options of a study under their earlier names, with a `DeprecationWarning`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atn_norms.ablation.grid.errors import Problem, invalid
from atn_norms.ablation.store.identity import RENAMED, RENAMED_IN_SCHEDULE
from atn_norms.deprecation import warn_renamed


def rename_train(train: Any) -> Any:
    """Return the options of training under their present names.

    Errors: `pydantic.ValidationError` where an option is given under both names.
    """
    if not isinstance(train, Mapping):
        return train
    train = _rename(train, RENAMED, "train.")
    return {**train, "schedule": rename_schedule(train["schedule"])} if "schedule" in train else train


def rename_schedule(schedule: Any) -> Any:
    """Return the options of a schedule under their present names."""
    return _rename(schedule, RENAMED_IN_SCHEDULE, "train.schedule.") if isinstance(schedule, Mapping) else schedule


def rename_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the path of an option under its present name.

    >>> rename_path(("train", "steps"))
    ('train', 'steps')
    """
    names = {("train",): RENAMED, ("train", "schedule"): RENAMED_IN_SCHEDULE}
    for depth, step in enumerate(path):
        if (new := names.get(path[:depth], {}).get(step)) is not None:
            warn_renamed(".".join(map(str, path[: depth + 1])), ".".join([*map(str, path[:depth]), new]))
            return (*path[:depth], new, *path[depth + 1 :])
    return path


def rename_axis(name: Any) -> Any:
    """Return the name of an axis with the present name of its option.

    >>> rename_axis("norm"), rename_axis("train.optimizer.lr")
    ('norm', 'train.optimizer.lr')
    """
    return ".".join(rename_path(tuple(name.split(".")))) if isinstance(name, str) else name


def rename_study(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study as a file holds it, with all options under their present names."""
    data = dict(data)
    if "train" in data:
        data["train"] = rename_train(data["train"])
    for section in ("axes", "tune", "baseline"):
        if isinstance(data.get(section), Mapping):
            names = {name: rename_axis(name) for name in data[section]}
            _refuse_both(names, f"{section}.")
            data[section] = {names[name]: value for name, value in data[section].items()}
    return data


def _rename(options: Mapping[str, Any], renamed: Mapping[str, str], place: str) -> dict[str, Any]:
    names = {name: renamed.get(name, name) for name in options}
    _refuse_both(names, place)
    for old, new in names.items():
        if old != new:
            warn_renamed(f"{place}{old}", f"{place}{new}")
    return {names[name]: value for name, value in options.items()}


def _refuse_both(names: Mapping[Any, Any], place: str) -> None:
    for old, new in names.items():
        if old != new and new in names:
            raise invalid("study", [Problem((old,), f"got {place}{old} and {place}{new}; expected one of them")])
