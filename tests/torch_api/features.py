"""Mark a test as a row of docs/compatibility.md, and check that the backend of the row is the one that runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])

GROUPS = (
    "Function transforms",
    "Mixed precision",
    "The interface of torch.nn",
    "Converting models",
    "Compilers and exporters",
    "Training on several devices",
    "Limits of torch.nn",
)


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    | field | meaning |
    |---|---|
    | `group`, `name` | section of the page, and what people call |
    | `runs` | `native`, `reference` or `torch`: the only backend the test may use; `refused`; or another short phrase |
    | `note` | a sentence on the limits, or the reason of a refusal |
    """

    group: str
    name: str
    runs: str
    note: str = ""


def feature(group: str, name: str, runs: str, note: str = "") -> Callable[[Test], Test]:
    """Return a decorator that marks a test as the proof of one row."""
    assert group in GROUPS, group
    row = Feature(group, name, runs, note)

    def mark(test: Test) -> Test:
        test.__dict__.setdefault("features", []).append(row)
        return pytest.mark.feature(row)(test)

    return mark
