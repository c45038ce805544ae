"""Registry of injected faults: each test declares the event and the outcome."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Fault:
    event: str
    outcome: str


def fault(event: str, outcome: str) -> Callable:
    """Declare the event that a test injects, and the expected outcome."""

    def enter(test: Callable) -> Callable:
        test.fault = Fault(event, outcome)  # type: ignore[attr-defined]
        return test

    return enter


def table(modules: Iterable[ModuleType]) -> str:
    """Return the faults of the modules as the table of docs/failure-recovery.md."""
    lines = ["| event | outcome | test |", "|---|---|---|"]
    for module in modules:
        for name, each in vars(module).items():
            entry = getattr(each, "fault", None)
            if isinstance(entry, Fault) and each.__module__ == module.__name__:
                lines.append(f"| {entry.event} | {entry.outcome} | `{name}` |")
    return "\n".join(lines)
