"""Run every law of the conformance suite on one plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atn_norms.backends.base import Backend
from atn_norms.options import Options
from atn_norms.registry import KindField
from atn_norms.testing import laws
from atn_norms.testing.engine import CheckResult, LawRun, checked_expectations, need_hypothesis, runs_on
from atn_norms.testing.layered import NORMS, BackendSubject, CellSubject, LayerSubject
from atn_norms.testing.subjects import NormalizerSubject, Subject, WindowSubject
from atn_norms.testing.tasked import TaskSubject

__all__ = ["check_backend", "check_cell", "check_normalizer", "check_task", "check_window", "laws"]

Expected = Mapping[str, str] | None


def check_normalizer(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Run every law of a statistic, a normalizer and a layer on a normalizer, and return the result of each.

    | symbol | meaning |
    |---|---|
    | `spec` | a `NormSpec`, registered or not; a class of them, for its default options; a kind; or a mapping |
    | `expected_failures` | law -> reason: laws that must fail |

    The declarations of the normalizer (`Normalizer`) determine which laws apply. Nothing is registered, torch's
    generator is left unchanged, and the results are the same at every call. So are those of the other `check_`
    functions.

    Errors: `SpecError` (a `ValueError`) for an expected law that does not exist or has no reason;
    `ModuleNotFoundError` if hypothesis is not installed.

    >>> results = check_normalizer("rms")
    >>> {result.status for result in results}, [result.law for result in results if result.status == "skipped"]
    ({...}, ['shift_invariance_holds'])
    """
    return _check("normalizer", spec, expected_failures)


def check_window(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Run every law of a window and a layer on a window; see `check_normalizer`.

    >>> [result for result in check_window({"kind": "sliding", "steps": 2}) if result.status == "failed"]
    []
    """
    return _check("window", spec, expected_failures)


def check_cell(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Run every law of a cell and a layer on a cell; see `check_normalizer`."""
    return _check("cell", spec, expected_failures)


def check_task(spec: Any, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Run every law of a task on a task; see `check_normalizer`."""
    return _check("task", spec, expected_failures)


def check_backend(backend: Backend, *, expected_failures: Expected = None) -> list[CheckResult]:
    """Compare a backend with the reference by every law of a backend; see `check_normalizer`."""
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
    """Return the family of a spec or of a class of specs; an object with `prepare` is a backend."""
    family = getattr(plugin, "family", None)
    if family in SUBJECTS:
        return str(family)
    if callable(getattr(plugin, "prepare", None)):
        return "backend"
    raise TypeError(f"plugin: got {plugin!r:.70}; expected a spec of a {', a '.join(SUBJECTS)}, or a backend")


def resolved(family: str, spec: Any) -> Options:
    """Return a spec of a family from a spec, a class of specs with default options, a kind, or a mapping."""
    value = spec() if isinstance(spec, type) and issubclass(spec, Options) else spec
    options = KindField(family).resolve(value)
    assert options is not None  # no field here accepts None
    return options


def law_runs(family: str, plugin: Any) -> list[LawRun]:
    """Return the runs of every law that applies to one plugin."""
    return runs_on(SUBJECTS[family](plugin if family == "backend" else resolved(family, plugin)))


def _check(family: str, plugin: Any, expected: Expected) -> list[CheckResult]:
    need_hypothesis()
    runs = law_runs(family, plugin)
    reasons = checked_expectations(expected, [run.law.name for run in runs], stacklevel=4)
    return [run.result(reasons) for run in runs]
