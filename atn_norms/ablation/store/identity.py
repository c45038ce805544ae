"""Identify a trial by a hash of its content."""

from __future__ import annotations

import hashlib
from typing import Any

from atn_norms.ablation.store.files import canonical

NEUTRAL = ("checkpoint_every", "keep_model")  # options of training that change no number
DIGITS = 16  # hexadecimal digits of an id: 64 bits


def digest(value: Any) -> str:
    """Compute the first 64 bits of the SHA-256 of a value's canonical JSON, in hexadecimal.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:DIGITS]


def identity(trial: dict[str, Any]) -> str:
    """Compute the id of a trial: a hash of everything its result depends on, and of nothing else.

    | part | counts as |
    |---|---|
    | `version`, `model`, `seed` | themselves |
    | `task` | its options, without those that name data |
    | `data` | a hash of the content of each data option, wherever the data is stored |
    | `train` | its options, without those that change no number: `checkpoint_every`, `keep_model` |
    | `plugins` | version and source hash of each plugin the trial uses; absent where it uses none |
    """
    task = {name: value for name, value in trial["task"].items() if name not in trial["data"]}
    train = {name: value for name, value in trial["train"].items() if name not in NEUTRAL}
    return digest({**trial, "task": task, "train": train})
