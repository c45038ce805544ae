"""Native equals the reference in float64: outputs, final states and every gradient, for every structure and size."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from torch.nn.utils.rnn import pack_padded_sequence

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import CELLS, EXACT, NORMS, Pair, agree, check, functional, needs_kernels, outcome, pairs

pytestmark = needs_kernels

K = 4
SIZES = list(itertools.product([1, 3, 17, 60, 64, 65], [1, 2, 5, 33], [1, 2, K - 1, K, K + 1, 3 * K + 1]))
random.Random(0).shuffle(SIZES)
STRUCTURES = [
    (cell, norm, window, per_gate)
    for cell, norm, window, per_gate in itertools.product(
        CELLS, NORMS, ["1", "4", "cumulative", "exponential"], [False, True]
    )
    if (norm != "c" or cell == "lstm") and (not per_gate or (norm in ("layer", "mixed") and cell in ("lstm", "gru")))
]


@pytest.mark.parametrize("place", range(len(STRUCTURES)))
def test_every_structure(place):
    cell, norm, window, per_gate = STRUCTURES[place]
    hidden, batch, steps = SIZES[place % len(SIZES)]
    check(Pair(cell, norm, window, hidden, batch, steps, 3, place, per_gate, place % 2 == 1, [None, 2, 5][place % 3]))


@pytest.mark.parametrize("place", range(len(SIZES)))
def test_every_size(place):
    hidden, batch, steps = SIZES[place]
    cell, norm = list(CELLS)[place % 4], ["layer", "rms"][place // 4 % 2]
    inputs = [1, 2, 65, 70][place // 8 % 4]
    check(
        Pair(
            cell, norm, str(K), hidden, batch, steps, inputs, place, ragged=place % 3 == 0, before=[None, 7][place % 2]
        )
    )


@given(pairs())
def test_any_structure(pair: Pair):
    check(pair)


@pytest.mark.parametrize("window", ["4", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_many_groups_of_rows_over_a_long_sequence(cell, window):
    """More rows and steps than one block or one chunk of the backward pass."""
    check(Pair(cell, "layer", window, hidden=5, batch=37, steps=40, ragged=True, before=3))


@pytest.mark.parametrize("cell", CELLS)
def test_all_rows_or_steps_are_masked(cell):
    pair = Pair(cell, "layer", "4", batch=3, before=5)
    given = pair.xs(), pair.state(), torch.zeros(3, dtype=torch.int64)
    found = outcome(pair.layer("native"), *given)
    agree(found, outcome(pair.layer("reference"), *given), 0)
    assert (found.ys == 0).all()
    compare(found.state, leaves(pair.state()), tolerance=0)


def test_padding_may_hold_anything():
    pair = Pair(batch=5, steps=6, ragged=True, seed=3)
    lengths = pair.lengths()
    assert lengths is not None and 0 < int(lengths.sum()) < 30
    dead = torch.arange(6)[:, None] >= lengths
    dirty = pair.xs().masked_fill(dead[..., None], float("nan"))
    layer = pair.layer("native")
    agree(outcome(layer, dirty, None, lengths), outcome(layer, pair.xs(), None, lengths), 0)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_input(cell, depth, both):
    pair = Pair(cell, batch=5, steps=6, hidden=7, options={"num_layers": depth, "bidirectional": both})
    lengths, results = torch.tensor([3, 6, 1, 6, 2]), []
    for backend in ("native", "reference"):
        layer, xs = pair.layer(backend), pair.xs().requires_grad_()
        hx = [
            pair.draw(depth * (1 + both), 5, 7, seed=s).requires_grad_() for s in range(7, 7 + len(layer.cell.carried))
        ]
        packed = pack_padded_sequence(xs, lengths, enforce_sorted=False)
        out, last = layer(packed, tuple(hx) if len(hx) > 1 else hx[0])
        ends = [out.data, *leaves(last)]
        results.append((ends, torch.autograd.grad(functional(ends), [xs, *hx, *layer.parameters()])))
    (found, gradients), (expected, other) = results
    compare(found, expected, tolerance=EXACT)
    compare(gradients, other, tolerance=EXACT, scale=level(*other))


@pytest.mark.parametrize("inputs", [64, 65])
def test_projected_inputs_kept_or_computed_twice(inputs):
    """Input sizes below and above the limit up to which the backward pass recomputes the input products."""
    for cell in CELLS:
        check(Pair(cell, inputs=inputs, hidden=5, batch=3, steps=6, ragged=True))


LARGE = [("lstm", 190), ("gru", 215), ("relu", 365)]


@pytest.mark.parametrize(("cell", "hidden"), LARGE)
def test_recurrent_weights_larger_than_the_cache(cell, hidden):
    """Above a megabyte of weights, several blocks of rows are computed together at each step."""
    check(Pair(cell, "layer", "4", hidden, batch=70, steps=4, inputs=5, ragged=True, before=3))


def test_input_weights_larger_than_the_cache():
    check(Pair("lstm", hidden=40, batch=70, steps=3, inputs=900, ragged=True))


# One part of the rows, several, and the largest number of parts with more blocks than parts.
PARTS = [(16, 3), (70, 4), (70, 9), (530, 9)]


@pytest.mark.parametrize(("batch", "steps"), PARTS)
@pytest.mark.parametrize("inputs", [4, 5])
def test_parts_of_the_rows_with_separate_sums(inputs, batch, steps):
    check(Pair("lstm", hidden=5, batch=batch, steps=steps, inputs=inputs, ragged=True, before=2))


THREADED = [
    *[(cell, hidden, 70, 4) for cell, hidden in [*LARGE, ("lstm", 9), ("gru", 9)]],
    *[("lstm", 9, *part) for part in PARTS],
]


@pytest.mark.parametrize(("cell", "hidden", "batch", "steps"), THREADED)
def test_the_number_of_threads_changes_no_bit(cell, hidden, batch, steps):
    pair = Pair(cell, "layer", "4", hidden, batch=batch, steps=steps, inputs=5, before=3)
    given, results = (pair.xs(), pair.state()), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(pair.layer("native"), *given))
    finally:
        torch.set_num_threads(1)
    for found in results[1:]:
        agree(found, results[0], 0)


@pytest.mark.parametrize("norm", [{"kind": "rms", "eps": 0.0}, {"sites": {"hh": "layer"}}])
def test_a_nan_passes_the_gradient_of_relu(norm):
    """As in torch: a check of gradients for NaN then finds the step."""
    counts = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        layer: Any = an.RNN(3, 4, nonlinearity="relu", bias=False, norm=norm, backend=backend)
        x = torch.randn(5, 4, 3)
        x[2, 1, 0] = float("nan")
        layer(x)[0].sum().backward()
        counts.append([int(p.grad.isnan().sum()) for p in layer.parameters()])
    assert counts[0] == counts[1] and counts[0][0] > 0
