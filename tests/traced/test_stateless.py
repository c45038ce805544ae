"""Stateless normalizers: without statistic and state, with one trial for all windows."""

from typing import Any

import pytest
import torch

import atn_norms as an
from atn_norms.bench import Case, Size
from atn_norms.bench.laws import broken_law
from atn_norms.registry import registry
from atn_norms.statistics import NoStatistic
from atn_norms.testing.checks import check_normalizer
from tests.compare import compare
from tests.test_study import plan
from tests.traced.gallery import L1, DynamicTanh, GallerySpec


def test_no_statistic_and_no_state():
    norm, xs = an.AssortedTime(DynamicTanh(4), window=5), torch.randn(3, 2, 4)
    ys, state = norm.scan(xs)
    index, memory = state
    assert (index.tolist(), memory) == ([3, 3], ())
    assert norm.normalizer.measure(xs) == NoStatistic()
    compare(ys, torch.tanh(0.5 * xs), tolerance=1e-6)


def test_the_window_has_no_effect():
    xs = torch.randn(6, 2, 4)
    outputs = [an.AssortedTime(DynamicTanh(4), window).scan(xs)[0] for window in (1, 5, an.Cumulative())]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_steps_and_a_scan_agree():
    norm, xs, state = an.AssortedTime(DynamicTanh(4), window=2), torch.randn(3, 2, 4), None
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    steps = []
    for x, alive in zip(xs, mask, strict=True):
        y, state = norm.step(x, state, alive)
        steps.append(y)
    ys, after = norm.scan(xs, lengths=[3, 1])
    compare(torch.stack(steps), ys, tolerance=1e-6)
    assert state is not None
    assert torch.equal(state[0], after[0])


@pytest.mark.parametrize("base", [DynamicTanh, L1])
def test_a_declaration_that_does_not_hold_is_an_error(base):
    class Wrong(base):
        stateless = base is L1

        def measure(self, x: Any) -> Any:
            return NoStatistic() if base is DynamicTanh else super().measure(x)

    wanted = "leaves, or `stateless = True`" if base is DynamicTanh else "no leaves, as it is stateless"
    with pytest.raises(TypeError, match=f"Wrong.measure: got .*; expected {wanted}"):
        an.AssortedTime(Wrong(4)).scan(torch.randn(3, 2, 4))


def test_a_normalizer_without_measure_that_is_not_stateless_cannot_be_built():
    class Forgotten(an.Normalizer):
        def normalize(self, x: Any, pooled: Any) -> Any:
            return x

    with pytest.raises(TypeError, match="Forgotten: got no `measure`; expected a `measure`, or `stateless = True`"):
        Forgotten()


def test_it_passes_every_applicable_law():
    results = check_normalizer(GallerySpec(name="DynamicTanh"))
    assert {result.status for result in results} == {"passed", "skipped"}
    stateless = [result.law for result in results if "stateless" in result.message]
    assert "merging_needs_no_order" in stateless
    assert len(stateless) == 6


@pytest.fixture
def registered():
    """Register the normalizers of the gallery for one test."""
    registry.load()
    known = {
        family: {kind: list(entries) for kind, entries in kinds.items()} for family, kinds in registry._claims.items()
    }
    registry.normalizer(GallerySpec)
    yield
    registry._claims = known


def test_a_study_trains_it_once_for_all_windows(registered):
    norms = [{"kind": "gallery", "name": name} for name in ("DynamicTanh", "L1")]
    study = plan(axes={"norm": norms, "window": [1, 25, "cumulative"]})
    assert [len(trial.points) for trial in study.trials] == [3, 1, 1, 1]


def test_bench_compares_it_with_the_reference(registered):
    case = Case("lstm", '{"kind": "gallery", "name": "DynamicTanh"}', Size(2, 5, 3, 6), 1, "training", "float32")
    assert broken_law(case, "native", 3) is None
