"""Identify a trial by a hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from atn_norms.ablation.store.files import canonical

# Options of training that had another name at first. An id is a hash of the first names, so a rename changes no id.
RENAMED = {"clip": "clip_grad_norm", "explosion": "divergence_factor"}
RENAMED_IN_SCHEDULE = {"by": "gamma"}
NEUTRAL = ("checkpoint_every", "keep_model")  # options of training without an effect on results
DIGITS = 16  # hexadecimal digits of an id: 64 bits


def digest(value: Any) -> str:
    """Compute the first 64 bits of the SHA-256 of a value's canonical JSON, in hexadecimal.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:DIGITS]


def identity(trial: dict[str, Any]) -> str:
    """Compute the id of a trial: a hash of exactly the parts that its result depends on.

    | part | counts as |
    |---|---|
    | `version`, `model`, `seed` | themselves |
    | `task` | its options, without those that name data |
    | `data` | a hash of the content of each data option, wherever the data is stored |
    | `train` | its options, without those that have no effect on results: `checkpoint_every`, `keep_model` |
    | `plugins` | version and source hash of each plugin that the trial uses; absent if it uses none |

    A renamed option counts under its first name, so that a rename changes no id.
    """
    content = counted(trial)
    old_names = {new: old for old, new in RENAMED.items()}
    old_in_schedule = {new: old for old, new in RENAMED_IN_SCHEDULE.items()}
    return digest({**content, "train": _rename(content["train"], old_names, old_in_schedule)})


def counted(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a trial that its result depends on, see `identity`."""
    task = {name: value for name, value in trial["task"].items() if name not in trial["data"]}
    train = {name: value for name, value in trial["train"].items() if name not in NEUTRAL}
    return {**trial, "task": task, "train": train}


def settings_hash(trial: Mapping[str, Any]) -> str | None:
    """Compute the hash of a trial without its seed, which all trials of a point share.

    A trial of a published report holds this hash instead of its content; None if an earlier version published it.
    """
    if "model" not in trial:
        return trial.get("settings")
    return identity({name: value for name, value in trial.items() if name != "seed"})


def current_names(trial: dict[str, Any]) -> dict[str, Any]:
    """Return a stored trial with the options of its training under their present names.

    >>> current_names({"train": {"clip": 1.0, "schedule": {"kind": "step", "by": 0.5}}})
    {'train': {'clip_grad_norm': 1.0, 'schedule': {'kind': 'step', 'gamma': 0.5}}}
    """
    return {**trial, "train": _rename(trial["train"], RENAMED, RENAMED_IN_SCHEDULE)}


def _rename(train: Mapping[str, Any], names: Mapping[str, str], in_schedule: Mapping[str, str]) -> dict[str, Any]:
    train = {names.get(name, name): value for name, value in train.items()}
    if isinstance(train.get("schedule"), Mapping):
        train["schedule"] = {in_schedule.get(name, name): value for name, value in train["schedule"].items()}
    return train
