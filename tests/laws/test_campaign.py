"""Extended tests of longer sequences, wider layers and longer windows: `-m deep --hypothesis-profile deep`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.compare import compare
from tests.laws.strategies import GATES, Case, LayerCase, cases, layer_cases, lengths, seeds, sequence
from tests.laws.test_cells import agrees

pytestmark = [pytest.mark.deep, pytest.mark.timeout(3000)]
long = st.one_of(
    st.tuples(st.just("sliding"), st.integers(1, 80)),
    st.just(("cumulative",)),
    st.tuples(st.just("exponential"), st.floats(0.1, 50.0)),
)


@given(cases(kinds=long, steps=(1, 80), batch=(1, 8), features=(1, 40)))
def test_scans(case: Case):
    norm, xs = case.norm(), case.xs()
    site = case.site(norm)
    expected = oracle.run(site, xs)
    compare(norm.scan(xs)[0], expected, tolerance=case.rounding(site) * case.steps)


@given(cases(kinds=long, steps=(1, 80), batch=(1, 8), features=(2, 40), dtypes=[torch.float32]))
def test_float32(case: Case):
    norm, xs = case.norm(), case.xs()
    compare(norm.scan(xs)[0].double(), oracle.run(case.site(norm), xs.double()), tolerance=2e-6)


@given(cases(kinds=long, steps=(2, 40), batch=(2, 6), features=(1, 8), regimes=["normal", "spike"]), seeds)
def test_any_mask_of_steps(case: Case, seed: int):
    norm, xs = case.norm(), case.xs()
    mask = torch.rand(case.steps, case.batch, generator=torch.Generator().manual_seed(seed)) < 0.5
    if case.base == "batch":
        mask[mask.sum(1) == 1] = True
    site = case.site(norm)
    expected, state = oracle.run(site, xs, mask), None
    for t in range(case.steps):
        y, state = norm.step(torch.where(mask[t][:, None], xs[t], float("nan")), state, mask[t])
        shown = torch.where(mask[t][:, None], y, 0.0)
        compare(shown, expected[t], tolerance=case.rounding(site) * case.steps)


@given(layer_cases(kinds=long, steps=(1, 12), batch=(1, 5), inputs=(1, 6), hidden=(3, 8)), st.booleans(), st.booleans())
def test_layers(case: LayerCase, ragged, per_gate):
    limit = lengths(case) if ragged and case.batch > 1 else None
    groups = GATES[case.cell] if per_gate else 1
    layer = case.layer(placement={"gates": "per_gate" if per_gate else "joint"})
    # 12 steps, each magnified by a norm of 3 features or more
    agrees(layer, case, limit, groups=groups, tolerance=1e-8)


@given(seed=seeds, k=st.integers(1, 300))
def test_long_sequences_keep_their_accuracy(seed, k):
    """2,000 steps with a spike after a third: no rounding accumulates and no trace of the spike remains."""
    xs = sequence("spike", seed, (2000, 2, 8)) + sequence("drifting", seed + 1, (2000, 2, 8))
    case = Case(seed, 2000, 2, 8, "layer", ("sliding", k), torch.float32, "spike")
    ys, _ = case.norm().scan(xs.float())
    tail = Case(seed, k, 2, 8, "layer", ("sliding", k), torch.float32, "normal")
    norm = tail.norm().double()
    fresh, _ = norm.scan(xs[-k:].float().double())
    compare(ys[-1].double(), fresh[-1], tolerance=2e-6)
