"""Try laws on drawn cases and keep the smallest failing one, with the same results on every machine."""

from __future__ import annotations

import importlib.util
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from atn_norms.errors import Problem, SpecError, not_installed, short_repr, unknown
from atn_norms.testing.law import LAWS, RENAMED, Case, Law

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = 15  # cases drawn for each law, before a failing one is shrunk


@dataclass(frozen=True)
class CheckResult:
    """The result of one law.

    | attribute | meaning |
    |---|---|
    | `law`, `group` | name of the law, and its group in the documentation |
    | `status` | `"passed"`; `"failed"`; `"skipped"`: does not apply; `"expected"`: failed as expected |
    | `message` | reason why the law failed or does not apply; empty if it passed |
    | `example` | the smallest failing case, as its axes; empty if none failed |
    """

    law: str
    status: str
    message: str = ""
    example: str = ""
    group: str = ""


@dataclass(frozen=True)
class LawRun:
    """One law to run on one subject."""

    law: Law
    subject: Any

    def result(self, expected: Mapping[str, str]) -> CheckResult:
        """Run the law; an expected failure has the status `expected`, and an expected failure that passes fails."""
        result = run_law(self.law, self.subject)
        reason = expected.get(self.law.name)
        if reason is None or result.status == "skipped":
            return result
        if result.status == "failed":
            return replace(result, status="expected", message=f"{reason} ({result.message})")
        message = f"expected to fail ({reason}), but it passes: remove it from the expected failures"
        return replace(result, status="failed", message=message, example=self.subject.label)


def run_law(law: Law, subject: Any) -> CheckResult:
    """Run one law on one subject."""
    result = CheckResult(law.name, "passed", group=law.group)
    reason = _inapplicable(law, subject)
    if reason:
        return replace(result, status="skipped", message=reason)
    with _undisturbed():
        failure = _explored(law, subject) if law.explores else _tried(law, subject)
    if failure is None:
        return result
    error, example = failure
    return replace(result, status="failed", message=_sentence(error), example=example)


def _inapplicable(law: Law, subject: Any) -> str | None:
    if subject.broken and law.name not in ("it_builds", subject.reported_by):
        return subject.unbuilt
    return law.unless(subject) if law.unless is not None else None


def runs_on(subjects: Sequence[Any]) -> list[LawRun]:
    """Return the runs of every law that applies to these subjects, in the order of the documentation."""
    return [LawRun(law, subject) for law in LAWS.values() for subject in subjects if subject.family in law.applies_to]


def checked_expectations(expected: Mapping[str, str] | None, known: Sequence[str], stacklevel: int) -> dict[str, str]:
    """Return `expected` as a dictionary; `SpecError` for a law that does not apply or has no reason.

    An earlier name of a law gives a `DeprecationWarning` at the frame `stacklevel`.
    """
    reasons = {}
    for name, reason in (expected or {}).items():
        if name in RENAMED:
            message = f"law {name} is deprecated; use {RENAMED[name]}"
            warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
        reasons[RENAMED.get(name, name)] = reason
    problems = [unknown("law", name, known, path=("expected_failures",)) for name in reasons if name not in known]
    problems += [
        Problem(("expected_failures", name), short_repr(reason), "a sentence with the reason of the failure")
        for name, reason in reasons.items()
        if not (isinstance(reason, str) and reason.strip())
    ]
    if problems:
        raise SpecError.of(problems)
    return reasons


def need_hypothesis() -> None:
    """Raise an error with the command to install hypothesis, if it is missing."""
    if importlib.util.find_spec("hypothesis") is None:
        raise ModuleNotFoundError(str(not_installed("hypothesis", "testing")), name="hypothesis")


def _tried(law: Law, subject: Any) -> tuple[Exception, str] | None:
    try:
        torch.manual_seed(0)
        law.function(subject)
    except Exception as error:  # noqa: BLE001  any error of a subject is a failure
        return error, subject.label
    return None


def _explored(law: Law, subject: Any) -> tuple[Exception, str] | None:
    need_hypothesis()
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import strategies as st

    axes = {name: law.axes.get(name, values) for name, values in subject.axes.items()}
    failures: list[tuple[Exception, str]] = []

    def attempt(drawn: dict[str, Any]) -> None:
        case = Case(drawn)
        torch.manual_seed(case.seed)
        try:
            law.function(subject, case)
        except Exception as error:
            failures.append((error, repr(case)))
            raise

    explore = settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        report_multiple_bugs=False,
    )(given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in axes.items()}))(attempt))
    try:
        explore()
    except Exception:
        if not failures:
            raise
        return failures[-1]  # hypothesis runs the smallest case last
    return None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore torch's generator and default type, whatever a subject does to them."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
