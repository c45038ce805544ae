"""The conformance suite: every law that is asked of one plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atn_norms.backends.base import Backend
from atn_norms.registry import KindField, Options
from atn_norms.testing import laws
from atn_norms.testing.engine import CheckResult, LawRun, checked_expectations, need_hypothesis, questions
from atn_norms.testing.layered import NORMS, BackendSubject, CellSubject, LayerSubject
from atn_norms.testing.subjects import NormalizerSubject, Subject, WindowSubject
from atn_norms.testing.tasked import TaskSubject

__all__ = ["check_backend", "check_cell", "check_normalizer", "check_task", "check_window", "laws"]

Expected = Mapping[str, str] | None


def check_normalizer(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Ask a normalizer every law of a statistic, a normalizer and a layer, and say of each what became of it.

    | symbol | meaning |
    |---|---|
    | `spec` | a `NormSpec`, registered or not; a class of them, for its default options; a kind; or a mapping |
    | `expected_failures` | law -> reason: these must fail |

    Which laws apply follows from what the normalizer declares (`Normalizer`). Nothing is registered, torch's generator
    is left as it was, and the answer is the same every time. The other `check_` functions are alike.

    Errors: `SpecError` (a `ValueError`) for an expected law that does not exist or has no reason;
    `ModuleNotFoundError` where hypothesis is missing.

    >>> results = check_normalizer("rms")
    >>> {result.status for result in results}, [result.law for result in results if result.status == "skipped"]
    ({...}, ['shift_invariance_holds'])
    """
    return _check("normalizer", spec, expected_failures)


def check_window(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Ask a window every law of a window and a layer; see `check_normalizer`.

    >>> [result for result in check_window({"kind": "sliding", "steps": 2}) if result.status == "failed"]
    []
    """
    return _check("window", spec, expected_failures)


def check_cell(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Ask a cell every law of a cell and a layer; see `check_normalizer`."""
    return _check("cell", spec, expected_failures)


def check_task(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Ask a task every law of a task; see `check_normalizer`."""
    return _check("task", spec, expected_failures)


def check_backend(backend: Backend, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Ask a backend every law of a backend, against the reference; see `check_normalizer`."""
    return _check("backend", backend, expected_failures)


def _of_normalizer(spec: Any) -> Sequence[Subject]:
    subject = NormalizerSubject(spec)
    return [subject, LayerSubject(subject.label, norms=[spec], broken=subject.unbuilt)]


def _of_window(spec: Any) -> Sequence[Subject]:
    subject = WindowSubject(spec)
    return [subject, LayerSubject(subject.label, windows=[spec], broken=subject.unbuilt)]


def _of_cell(spec: Any) -> Sequence[Subject]:
    subject = CellSubject(spec)
    return [
        subject,
        LayerSubject(subject.label, cells=[spec], norms=[None, *NORMS], broken=subject.unbuilt),
    ]


SUBJECTS: dict[str, Callable[[Any], Sequence[Subject]]] = {
    "normalizer": _of_normalizer,
    "window": _of_window,
    "cell": _of_cell,
    "task": lambda spec: [TaskSubject(spec)],
    "backend": lambda backend: [BackendSubject(backend)],
}


def family_of(plugin: Any) -> str:
    """The family of a spec or of a class of specs; whatever can `run` and refuse is a backend."""
    family = getattr(plugin, "family", None)
    if family in SUBJECTS:
        return str(family)
    if callable(getattr(plugin, "unsupported_reason", None)) and callable(getattr(plugin, "run", None)):
        return "backend"
    raise TypeError(f"{plugin!r:.80}; allowed: a spec of a {', a '.join(SUBJECTS)}, or a backend")


def resolved(family: str, spec: Any) -> Options:
    """A spec, a class of specs with default options, a kind, or a mapping, as a spec of a family."""
    value = spec() if isinstance(spec, type) and issubclass(spec, Options) else spec
    found = KindField(family).resolve(value)
    assert found is not None  # no field here takes None
    return found


def asked(family: str, plugin: Any) -> list[LawRun]:
    """Every law with what it is asked of, for one plugin."""
    return questions(SUBJECTS[family](plugin if family == "backend" else resolved(family, plugin)))


def _check(family: str, plugin: Any, expected: Expected) -> list[CheckResult]:
    need_hypothesis()
    every = asked(family, plugin)
    reasons = checked_expectations(expected, [question.law.name for question in every])
    return [question.answer(reasons) for question in every]
