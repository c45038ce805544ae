"""The conformance suite as parameters of a pytest test; pytest is imported only when it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atn_norms.testing.checks import family_of, law_runs
from atn_norms.testing.engine import LawRun, checked_expectations, need_hypothesis


def parametrize_checks(plugins: Sequence[Any], *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """Decorate a test with one parameter, `check`, for each law of each plugin; calling `check` runs the law.

    | symbol | meaning |
    |---|---|
    | `plugins` | specs of any family (instances, or classes for their default options), or backends |
    | `expected_failures` | law -> reason, for all plugins; an expected failure that passes fails the test |

    A law that does not apply skips its test, with the reason; an expected failure is an xfail. Test ids read
    `layer(eps=0.001)-flat_rows_stay_finite`.

    Errors: `SpecError` (a `ValueError`) for an expected law that applies to none of the plugins, or that has no reason.

    >>> import atn_norms as an
    >>> from atn_norms.normalizers import LayerNormSpec
    >>> @parametrize_checks([LayerNormSpec(eps=1e-3)])
    ... def test_laws(check):
    ...     check()
    """
    import pytest

    need_hypothesis()
    runs = [run for plugin in plugins for run in law_runs(family_of(plugin), plugin)]
    names = dict.fromkeys(run.law.name for run in runs)
    reasons = checked_expectations(expected_failures, list(names), stacklevel=3)
    parameters = [pytest.param(Check(run, reasons), id=f"{run.subject.label}-{run.law.name}") for run in runs]
    return pytest.mark.parametrize("check", parameters)


class Check:
    """One law of one plugin; it runs when it is called."""

    def __init__(self, run: LawRun, reasons: Mapping[str, str]) -> None:
        self.run, self.reasons = run, reasons

    def __call__(self) -> None:
        """Pass, skip with the reason, xfail with the reason, or raise `AssertionError` with the failing example."""
        import pytest

        __tracebackhide__ = True  # a failure of a law shows its message, not this code
        result = self.run.result(self.reasons)
        if result.status == "skipped":
            pytest.skip(result.message)
        if result.status == "expected":
            pytest.xfail(result.message)
        if result.status == "failed":
            raise AssertionError(f"{result.law}: {result.message}\nsmallest example: {result.example}")

    def __repr__(self) -> str:
        return f"{self.run.law.name} of {self.run.subject.label}"
