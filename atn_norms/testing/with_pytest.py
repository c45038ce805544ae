"""The conformance suite as parameters of a pytest test; the one place that imports pytest, when it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atn_norms.testing.checks import asked, family_of
from atn_norms.testing.engine import LawRun, checked_expectations, need_hypothesis


def parametrize_checks(plugins: Sequence[Any], *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """Decorate a test with one parameter, `check`, for each law of each plugin: call it and it judges.

    | symbol | meaning |
    |---|---|
    | `plugins` | specs of any family (instances, or classes for their default options), or backends |
    | `expected_failures` | law -> reason, for all of them; a law that is expected to fail and passes fails the test |

    A law that does not apply skips its test, with the reason; an expected failure is an xfail. Test ids read
    `layer(eps=0.001)-rows_stand_alone`.

    Errors: `SpecError` (a `ValueError`) for an expected law that is asked of none of them, or that has no reason.

    >>> import atn_norms as an
    >>> from atn_norms.normalizers import LayerNormSpec
    >>> @parametrize_checks([LayerNormSpec(eps=1e-3)])
    ... def test_laws(check):
    ...     check()
    """
    import pytest

    need_hypothesis()
    questions = [question for plugin in plugins for question in asked(family_of(plugin), plugin)]
    names = dict.fromkeys(question.law.name for question in questions)
    reasons = checked_expectations(expected_failures, list(names))
    parameters = [
        pytest.param(Check(question, reasons), id=f"{question.subject.label}-{question.law.name}")
        for question in questions
    ]
    return pytest.mark.parametrize("check", parameters)


class Check:
    """One law asked of one plugin, when it is called."""

    def __init__(self, question: LawRun, reasons: Mapping[str, str]) -> None:
        self.question, self.reasons = question, reasons

    def __call__(self) -> None:
        """Pass, skip with the reason, xfail with the reason, or raise `AssertionError` with the failing example."""
        import pytest

        result = self.question.answer(self.reasons)
        if result.status == "skipped":
            pytest.skip(result.message)
        if result.status == "expected":
            pytest.xfail(result.message)
        if result.status == "failed":
            raise AssertionError(f"{result.law}: {result.message}\nsmallest example: {result.example}")

    def __repr__(self) -> str:
        return f"{self.question.law.name} of {self.question.subject.label}"
