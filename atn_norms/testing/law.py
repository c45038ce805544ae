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

RENAMED = {  # earlier names of laws, accepted as expected failures
    "values_are_the_reference_s": "values_match_the_reference",
    "gradients_are_the_reference_s": "gradients_match_the_reference",
    "the_pooled_statement_is_used": "the_pooled_statistic_is_used",
    "a_statement_is_a_tuple_of_tensors": "a_statistic_is_a_tuple_of_tensors",
    "equal_statements_stay_as_they_are": "equal_statistics_pool_to_themselves",
    "a_union_says_what_its_parts_pool_to": "a_union_equals_its_pooled_parts",
    "rows_have_states_of_their_own": "rows_have_separate_states",
    "a_step_that_did_not_happen_leaves_no_trace": "masked_steps_have_no_effect",
    "an_ended_row_stands_still": "masked_rows_keep_their_state",
    "rows_meet_only_as_declared": "rows_are_independent_unless_declared",
    "evaluation_differs_only_as_declared": "evaluation_equals_training_unless_declared",
    "refusals_are_sentences": "unsupported_reasons_are_sentences",
    "every_part_counts": "every_part_has_an_effect",
    "a_placement_is_refused_or_matters": "placements_are_rejected_or_have_an_effect",
    "the_splits_are_two": "the_splits_differ",
    "what_is_carried_is_detached": "the_carried_state_is_detached",
    "a_state_looks_as_laid_out": "a_state_has_the_declared_layout",
    "inputs_are_left_alone": "inputs_are_not_modified",
}

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
