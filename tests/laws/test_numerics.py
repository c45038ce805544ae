"""Numerical accuracy: float32 against float64 in every regime, half precisions, and the spread of a NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.compare import compare
from tests.laws.strategies import BASES, REGIMES, Case, cases, seeds


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("k", [1, 16, 100])
@settings(max_examples=6)
@given(seed=seeds)
def test_float32_accuracy(regime, base, k, seed):
    """The tolerance is 2e-6 of max(1, |y|). The arithmetic is float64, with one rounding to float32 (6e-8)."""
    case = Case(seed, k + 15, 3, 5, base, ("sliding", k), torch.float32, regime)
    norm, xs = case.norm(), case.xs()
    site = case.site(norm)
    expected = oracle.run(site, xs.double())
    compare(norm.scan(xs)[0].double(), expected, tolerance=2e-6)


@given(cases(dtypes=[torch.float16, torch.bfloat16], regimes=["normal", "flat", "drifting"]))
def test_half_precisions_round_once_and_keep_their_dtype(case: Case):
    norm, xs = case.norm(), case.xs()
    expected = oracle.run(case.site(norm), xs.double())
    ys, _ = norm.scan(xs)
    assert ys.dtype == case.dtype
    compare(ys.double(), expected, tolerance=torch.finfo(case.dtype).eps)  # one rounding, half a unit in the last place


@given(cases(dtypes=[torch.float32], steps=(2, 8), batch=(2, 4), regimes=REGIMES))
def test_float32_steps_and_scans_alike(case: Case):
    norm, xs = case.norm(), case.xs()
    ys, _ = norm.scan(xs)
    state = None
    for t, x in enumerate(xs):
        y, state = norm.step(x, state)
        assert y.dtype == torch.float32
        compare(y, ys[t], tolerance=2e-6)


@pytest.mark.parametrize("base", ["layer", "rms"])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@given(seed=seeds, place=st.tuples(st.integers(0, 11), st.integers(0, 2), st.integers(0, 3)))
def test_a_nan_affects_its_row_for_exactly_k_steps(base, k, seed, place):
    case = Case(seed, 12, 3, 4, base, ("sliding", k), torch.float64, "normal")
    norm, clean = case.norm(), case.xs()
    step, row, _ = place
    xs = clean.clone()
    xs[place] = float("nan")
    xs.requires_grad_()
    ys, _ = norm.scan(xs)
    poisoned = torch.zeros(12, 3, dtype=torch.bool)
    poisoned[step : step + k, row] = True
    assert (ys.isnan() == poisoned[..., None]).all()
    compare(ys[~poisoned], norm.scan(clean)[0][~poisoned], tolerance=0)
    (gradient,) = torch.autograd.grad(ys[~poisoned].square().sum(), xs)
    # The windows that hold the NaN reach back this far: their gradients contain 0 * NaN.
    reached = torch.zeros(12, 3, dtype=torch.bool)
    reached[max(0, step - k + 1) : step + k, row] = True
    assert torch.isfinite(gradient[~reached]).all()


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@given(seed=seeds, place=st.tuples(st.integers(0, 11), st.integers(0, 2), st.integers(0, 3)))
def test_a_nan_under_batch_statistics_affects_its_feature_for_exactly_k_steps(k, seed, place):
    case = Case(seed, 12, 3, 4, "batch", ("sliding", k), torch.float64, "normal")
    norm, clean = case.norm(), case.xs()
    xs = clean.clone()
    xs[place] = float("nan")
    ys, _ = norm.scan(xs)
    poisoned = torch.zeros(12, 3, 4, dtype=torch.bool)
    poisoned[place[0] : place[0] + k, :, place[2]] = True
    assert (ys.isnan() == poisoned).all()
    compare(ys[~poisoned], norm.scan(clean)[0][~poisoned], tolerance=0)


@pytest.mark.parametrize("kind", [("cumulative",), ("exponential", 2.0)])
def test_a_nan_remains_in_a_cumulative_window(kind):
    case = Case(0, 6, 3, 4, "layer", kind, torch.float64, "normal")
    xs = case.xs()
    xs[2, 1, 0] = float("nan")
    ys, _ = case.norm().scan(xs)
    assert ys[2:, 1].isnan().all()
    assert not ys[:, [0, 2]].isnan().any()
    assert not ys[:2].isnan().any()


@given(cases(regimes=["constant"], dtypes=[torch.float32, torch.float64], features=(1, 7)))
def test_a_constant_row_is_centred_to_the_shift(case: Case):
    if case.base == "rms":
        return
    norm, xs = case.norm(), case.xs()
    _, shift = case.site(norm).gain, case.site(norm).shift
    # the mean of equal values is off by at most 8 roundings of 1234 in float64, over sqrt(1e-5)
    compare(norm.scan(xs)[0].double(), shift.expand(xs.shape), tolerance=1e-9 if case.dtype == torch.float64 else 1e-6)
