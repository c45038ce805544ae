"""Tests of the suite: results, expected failures, determinism, and no side effects."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import atn_norms as an
from atn_norms.registry import FAMILIES, SpecError, registry
from atn_norms.testing import (
    LAWS,
    CheckResult,
    check_backend,
    check_cell,
    check_normalizer,
    check_task,
    check_window,
    parametrize_checks,
)
from atn_norms.testing.checks import law_runs
from atn_norms.testing.law import Case
from atn_norms.testing.laws.normalizer import rows_are_independent_unless_declared
from atn_norms.testing.subjects import NormalizerSubject
from tests.testing.gallery.entry import norm_spec, task_spec, window_spec
from tests.testing.gallery.normalizers import Layer, MixesRows
from tests.testing.gallery.statistics import NestsStatistics
from tests.testing.gallery.tasks import Sums
from tests.testing.gallery.windows import ForgetsAStepLate

ROOT = Path(__file__).parents[2]
WHY = "it is meant to mix rows"


def by_law(results: list[CheckResult]) -> dict[str, CheckResult]:
    named = {result.law: result for result in results}
    assert len(named) == len(results)
    return named


def result_of(spec: an.NormSpec, law: str) -> CheckResult:
    """Return the result of one law of a normalizer."""
    (run,) = [each for each in law_runs("normalizer", spec) if each.law.name == law]
    return run.result({})


@pytest.fixture(scope="module")
def mixed() -> dict[str, CheckResult]:
    """Return the results of a normalizer that mixes rows, as an expected failure."""
    return by_law(
        check_normalizer(norm_spec(MixesRows), expected_failures={"rows_are_independent_unless_declared": WHY})
    )


def test_results_report_the_status_of_each_law(mixed):
    assert {type(result.status) for result in mixed.values()} == {str}
    assert {result.status for result in mixed.values()} == {"passed", "failed", "skipped", "expected"}
    for result in mixed.values():
        assert (result.message == "") == (result.status == "passed")
        assert (result.example == "") == (result.status in ("passed", "skipped"))
        assert LAWS[result.law].group == result.group


def test_an_expected_failure_keeps_its_reason_and_its_message(mixed):
    result = mixed["rows_are_independent_unless_declared"]
    assert result.status == "expected"
    assert result.message.startswith(f"{WHY} (")
    assert "another row" in result.message


def test_the_failing_example_is_the_smallest(mixed):
    assert mixed["rows_are_independent_unless_declared"].example == (
        "seed=0, steps=1, batch=2, features=1, window=Sliding(steps=1)"
    )


def test_the_failing_example_fails_by_hand(mixed):
    subject = NormalizerSubject(norm_spec(MixesRows))
    case = Case({"seed": 0, "steps": 1, "batch": 2, "features": 1, "window": an.Sliding(1)})
    with pytest.raises(AssertionError, match="another row"):
        rows_are_independent_unless_declared(subject, case)
    rows_are_independent_unless_declared(NormalizerSubject(norm_spec(Layer)), case)


def test_a_local_spec_skips_pickling_and_the_registry_with_a_reason(mixed):
    assert "locally" in mixed["it_survives_pickling"].message
    assert "not registered" in mixed["the_registry_builds_the_same"].message


def test_only_declared_properties_are_tested(mixed):
    assert mixed["scale_invariance_holds"].message == "scale_invariant is not declared"

    class Declares(MixesRows):
        scale_invariant = True
        permutation_equivariant = True

    for law in ("scale_invariance_holds", "feature_order_does_not_matter"):
        assert result_of(norm_spec(Declares), law).status in ("passed", "failed")


def test_an_expected_failure_that_passes_fails():
    results = check_task(task_spec(Sums), expected_failures={"the_splits_differ": WHY})
    (result,) = [each for each in results if each.status == "failed"]
    assert result.law == "the_splits_differ"
    assert "passes" in result.message
    assert WHY in result.message


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (
            {"rows_are_independent_unless_declard": WHY},
            "unknown law 'rows_are_independent_unless_declard'.*did you mean 'rows_are_independent_unless_",
        ),
        ({"batches_are_pure": WHY}, "unknown law '?batches_are_pure'"),
        ({"shapes_are_kept": ""}, "shapes_are_kept: got ''; expected a sentence"),
        ({"shapes_are_kept": None}, "shapes_are_kept: got None; expected a sentence"),
    ],
)
def test_expected_failures_are_checked(expected, message):
    with pytest.raises(SpecError, match=message):
        check_normalizer("layer", expected_failures=expected)
    with pytest.raises(SpecError, match=message):
        parametrize_checks([norm_spec(Layer)], expected_failures=expected)


def test_results_repeat_without_side_effects():
    def results() -> list[CheckResult]:
        return [each.result({}) for each in law_runs("window", spec) if each.law.group in ("every", "window")]

    spec = window_spec(ForgetsAStepLate)
    registered = {family: list(registry.kinds(family)) for family in FAMILIES}
    torch.manual_seed(3)
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    first = results()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == dtype
    torch.manual_seed(4)
    assert results() == first
    assert {family: list(registry.kinds(family)) for family in FAMILIES} == registered


def test_a_plugin_that_cannot_be_built_fails_one_law_and_skips_the_rest():
    class Unbuilt(Layer):
        def __init__(self, features: int) -> None:
            raise ZeroDivisionError("no")

    results = by_law(check_normalizer(norm_spec(Unbuilt)))
    assert results.pop("it_builds").message == "build(1) raises ZeroDivisionError: no"
    assert {result.status for result in results.values()} == {"skipped"}


def test_a_normalizer_with_nested_statistics_fails_one_law_and_skips_the_rest():
    results = by_law(check_normalizer(norm_spec(NestsStatistics)))
    assert results.pop("it_builds").status == "passed"
    failed = results.pop("a_statistic_is_a_tuple_of_tensors")
    assert failed.message.startswith("measure: got Custom, in which one is Moments, other is Moments; expected ")
    assert "Average(torch.cat([one, other], -1))" in failed.message
    assert {(result.status, result.message) for result in results.values()} == {
        ("skipped", "it cannot run; see a_statistic_is_a_tuple_of_tensors")
    }


def test_a_pool_of_another_type_fails_one_law_and_skips_the_rest():
    class Spread(an.Average):
        def pool(self, weights, dim):
            return tuple(super().pool(weights, dim))

    class PoolsToTuples(Layer):
        def measure(self, x):
            return Spread(an.Average.of(x.abs()).mean)  # type: ignore[return-value]

        def normalize(self, x, pooled):
            return self.weight * x / (1 + pooled.mean)

    results = by_law(check_normalizer(norm_spec(PoolsToTuples)))
    (failed,) = [result for result in results.values() if result.status == "failed"]
    assert (failed.law, failed.message) == (
        "a_statistic_is_a_tuple_of_tensors",
        "Spread.pool: got tuple; expected Spread",
    )


def test_an_error_in_measure_is_reported_once_with_its_position():
    class Raises(Layer):
        def measure(self, x):
            raise IndexError("out of luck")

    results = by_law(check_normalizer(norm_spec(Raises)))
    (failed,) = [result for result in results.values() if result.status == "failed"]
    assert failed.law == "a_statistic_is_a_tuple_of_tensors"
    assert "IndexError: out of luck (" in failed.message and "test_checks.py:" in failed.message


def test_every_family_has_a_check():
    assert by_law(check_window("cumulative"))["steps_count_as_declared"].status == "passed"
    assert by_law(check_task(task_spec(Sums)))["batches_are_pure"].status == "passed"
    assert by_law(check_cell("rnn"))["every_part_has_an_effect"].status == "passed"
    from atn_norms.backends.reference import Reference

    assert {result.status for result in check_backend(Reference())} == {"passed"}


def test_an_error_of_a_plugin_is_a_failure_with_its_position():
    class Raises(Layer):
        def normalize(self, x, pooled):
            raise IndexError("out of luck")

    result = result_of(norm_spec(Raises), "shapes_are_kept")
    assert result.status == "failed"
    assert "IndexError: out of luck (" in result.message
    assert "test_checks.py:" in result.message


TESTS = """
from atn_norms.testing import parametrize_checks
from tests.testing.gallery.entry import norm_spec
from tests.testing.gallery.normalizers import Layer, ReturnsFloat32

@parametrize_checks(PLUGINS)
def test_laws(check):
    check()
"""


def test_parametrize_checks_makes_a_test_of_each_law(tmp_path):
    text = TESTS.replace("PLUGINS", "[norm_spec(Layer), norm_spec(ReturnsFloat32)]")
    (tmp_path / "test_plugin.py").write_text(text, encoding="utf-8")
    done = run_pytest(tmp_path, "-v", "-k", "dtype or scale")
    assert "test_laws[gallery-the_dtype_is_kept0] PASSED" in done
    assert "test_laws[gallery-the_dtype_is_kept1] FAILED" in done
    assert "the_dtype_is_kept: normalize: got torch.float32; expected torch.float64" in done
    assert "smallest example: seed=0, steps=1" in done
    assert "scale_invariant is not declared" in done
    assert "1 failed, 1 passed, 2 skipped" in done


def test_parametrize_checks_takes_expected_failures(tmp_path):
    reasons = {"the_dtype_is_kept": "float32 is enough here"}
    text = TESTS.replace("PLUGINS", f"[norm_spec(ReturnsFloat32)], expected_failures={reasons}")
    (tmp_path / "test_plugin.py").write_text(text, encoding="utf-8")
    done = run_pytest(tmp_path, "-k", "dtype")
    assert "1 xfailed" in done
    assert "float32 is enough here (normalize: got" in done


def run_pytest(folder: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsxf", "-p", "no:cacheprovider", *options, "test_plugin.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_it_needs_no_pytest_and_reports_missing_hypothesis(tmp_path):
    code = """
import sys
sys.modules["pytest"] = None  # importing it raises now
from atn_norms.testing import check_window
assert {result.status for result in check_window("cumulative")} == {"passed", "skipped"}
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "hypothesis" else find_spec(name, *more)
try:
    check_window("cumulative")
except ModuleNotFoundError as error:
    print(error)
from atn_norms.cli import main
print(main(["check", "cumulative"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    line = "got no package hypothesis; expected an installed package. Run pip install 'atn-norms[testing]'"
    assert done.stdout.splitlines() == [line, "2"], done.stderr
    assert done.stderr == f"atn-norms: {line}\n"


@pytest.mark.parametrize("family", ["normalizer", "window", "cell"])
def test_a_plugin_runs_the_laws_of_its_family_and_of_a_layer_once_each(family):
    plugin = {"normalizer": "layer", "window": "cumulative", "cell": "gru"}[family]
    names = [run.law.name for run in law_runs(family, plugin)]
    assert len(names) == len(set(names))
    assert set(names) == {law.name for law in LAWS.values() if {family, "layer"} & set(law.applies_to)}
