"""Extended tests of wide, long and deep layers with any window: `-m deep --hypothesis-profile deep`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import level, seeds, sequence
from tests.native.strategies import CELLS, Pair, agree, check, needs_kernels, outcome, pairs
from tests.native.test_digits import EPS, WIDTH, normalization_alone

pytestmark = [needs_kernels, pytest.mark.deep, pytest.mark.timeout(3000)]

windows = st.one_of(
    st.integers(1, 120),
    st.just("cumulative"),
    st.floats(0.05, 200.0).map(lambda half_life: {"kind": "exponential", "half_life": half_life}),
)


@given(pairs(), windows, st.integers(1, 70), st.integers(1, 40), st.integers(1, 60), st.integers(1, 80))
def test_any_size(pair: Pair, window, hidden, batch, steps, inputs):
    sizes = {"hidden": hidden, "batch": batch, "steps": steps, "inputs": inputs}
    pair = replace(pair, **sizes, options=pair.options | {"window": window})
    given = pair.xs(), pair.state(), pair.lengths()
    expected = outcome(pair.layer("reference"), *given)
    # roundings grow with the gradients over 60 steps
    agree(outcome(pair.layer("native"), *given), expected, 1e-10 * level(*expected.gradients))


@given(pairs())
def test_any_structure(pair: Pair):
    check(pair)


@given(seeds, windows, st.sampled_from(["layer", "rms"]), st.sampled_from([1, -1]))
def test_long_sequences_keep_their_accuracy(seed, window, norm, sign):
    """2,000 steps with a spike after a third: no rounding accumulates and no trace of the spike remains."""
    options = {"norm": {"sites": {"ih": norm}}, "window": window}
    pair = Pair("relu", hidden=WIDTH, batch=3, steps=2000, inputs=WIDTH, dtype=torch.float32, options=options)
    xs = sequence("spike", seed, (2000, 3, WIDTH)).float()
    results = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        layer = pair.layer(backend, dtype)
        with torch.no_grad():
            normalization_alone(sign)(layer)
            results.append(layer.unroll(xs.to(dtype))[0].double())
    compare(results[0], results[1], tolerance=4 * EPS)


@given(seeds, st.sampled_from(sorted(CELLS)), windows)
def test_a_thousand_steps_one_at_a_time(seed, cell, window):
    pair = Pair(cell, hidden=7, batch=2, steps=1000, seed=seed % 2**20, options={"window": window})
    layer, state, parts = pair.layer("native"), None, []
    with torch.no_grad():
        whole, final = layer.unroll(pair.xs())
        for place, x in enumerate(pair.xs().split(1)):
            ys, state = layer.unroll(x, state if place % 7 else (None if state is None else an.detach(state)))
            parts.append(ys)
    compare(torch.cat(parts), whole, tolerance=1e-9)
    compare(layer.hidden(state), layer.hidden(final), tolerance=1e-9)
