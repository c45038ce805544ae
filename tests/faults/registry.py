"""The list of faults: each test of this folder says what it does to a study, and what comes of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Fault:
    what: str
    outcome: str


def fault(what: str, outcome: str) -> Callable:
    """Say what a test does to a study, and what comes of it."""

    def enter(test: Callable) -> Callable:
        test.fault = Fault(what, outcome)  # type: ignore[attr-defined]
        return test

    return enter


def table(modules: Iterable[ModuleType]) -> str:
    """The faults of some modules as the table of docs/failure-recovery.md."""
    lines = ["| event | outcome | test |", "|---|---|---|"]
    for module in modules:
        for name, each in vars(module).items():
            entry = getattr(each, "fault", None)
            if isinstance(entry, Fault) and each.__module__ == module.__name__:
                lines.append(f"| {entry.what} | {entry.outcome} | `{name}` |")
    return "\n".join(lines)
