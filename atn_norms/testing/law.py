"""A law: a named function that raises if a subject violates it, with the condition under which it applies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from atn_norms.options import Options, spec_label

GROUPS: dict[str, str] = {
    "every": "Laws of every kind",
    "statistic": "Laws of a statistic",
    "normalizer": "Laws of a normalizer",
    "window": "Laws of a window",
    "cell": "Laws of a cell",
    "layer": "Laws of a layer",
    "backend": "Laws of a backend",
    "task": "Laws of a task",
}

LAWS: dict[str, Law] = {}

F = TypeVar("F", bound=Callable[..., None])


class Case:
    """One example for a law: the value drawn for each axis of its subject, as an attribute.

    >>> case = Case({"seed": 0, "steps": 3})
    >>> case.steps, case
    (3, seed=0, steps=3)
    """

    def __init__(self, drawn: Mapping[str, Any]) -> None:
        self.drawn = dict(drawn)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["drawn"][name]
        except KeyError:
            raise AttributeError(
                f"{name}: not drawn; expected one of {', '.join(self.__dict__.get('drawn', {}))}"
            ) from None

    def but(self, **other: Any) -> Case:
        """Return the same case with other values on some axes."""
        return Case(self.drawn | other)

    def __repr__(self) -> str:
        return ", ".join(f"{name}={_named(value)}" for name, value in self.drawn.items())


def _named(value: Any) -> str:
    if isinstance(value, Options):
        return spec_label(value)
    return value.__name__ if isinstance(value, type) else repr(value)


@dataclass(frozen=True)
class Law:
    """A law and its metadata.

    `group` is the heading in the documentation, `applies_to` the families the law covers. `unless` returns the reason
    why the law does not apply to a subject, or None. `axes` replaces the values of the subject for its cases.
    """

    name: str
    group: str
    applies_to: tuple[str, ...]
    function: Callable[..., None]
    unless: Callable[[Any], str | None] | None = None
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def explores(self) -> bool:
        """True if the law is tried on many cases, False if it runs once."""
        return len(inspect.signature(self.function).parameters) == 2

    @property
    def demand(self) -> str:
        """The first paragraph of the docstring: the requirement."""
        return _paragraphs(self)[0]

    @property
    def why(self) -> str:
        """The remaining paragraphs of the docstring: the reason."""
        return "\n\n".join(_paragraphs(self)[1:])


def _paragraphs(law: Law) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(law.function.__doc__ or "").split("\n\n")]


def law(
    group: str, *applies_to: str, unless: Callable[[Any], str | None] | None = None, **axes: Sequence[Any]
) -> Callable[[F], F]:
    """Register a function `(subject)` or `(subject, case)` as a law of `group` for `applies_to` (by default the group).

    `axes` replace the values of the subject, from which cases are drawn: `steps=(3, 4, 5)`.
    """

    def register(function: F) -> F:
        name = function.__name__
        if name in LAWS or group not in GROUPS:
            raise ValueError(
                f"law {name!r} of {group!r}: got a used name or an unknown group; expected one of {', '.join(GROUPS)}"
            )
        usual = "normalizer" if group == "statistic" else group  # a statistic is what a normalizer measures
        LAWS[name] = Law(name, group, applies_to or (usual,), function, unless, axes)
        return function

    return register
