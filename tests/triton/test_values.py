"""Triton equals the reference in float64: outputs, final states and every gradient, at every structure and size."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import CELLS, EXACT, NORMS, PLAIN_WINDOWS, Pair, agree, functional, open_state, pairs
from tests.triton.strategies import DEVICE, both, check, made, moved, needs_triton, outcome, place

pytestmark = needs_triton

K = 4
STEPS = [K + 1, 1, 3 * K + 1, 2, K, K - 1]
ROWS = [2, 17, 1, 3, 33]  # a program has 16 rows, or 32 in the norm of the input product
HIDDEN = [3, 17, 1, 33]  # blocks are of 16 units, or 32, or 64


def a_pair(cell, norm, window, number):
    """Return a pair in which sizes, ragged lengths and initial states alternate with different periods."""
    sizes = HIDDEN[number % 4], ROWS[number % 5], STEPS[number % 6]
    return Pair(cell, norm, window, *sizes, 3, number, ragged=number % 2 == 1, before=[None, 2, 5][number % 3])


STRUCTURES = [(cell, norm) for cell, norm in itertools.product(CELLS, NORMS) if norm != "c" or cell == "lstm"]


@pytest.mark.parametrize("number", range(len(STRUCTURES)))
def test_cells_and_norms(number, kernels, monkeypatch):
    """Every cell with every norm; windows alternate, and every third case has one launch for each step."""
    if number % 3 == 0:
        monkeypatch.setattr(kernels, "WHOLE", 0)
    windows = list(PLAIN_WINDOWS)
    cell, norm = STRUCTURES[number]
    check(a_pair(cell, norm, windows[(number + number // 6) % len(windows)], number))


@pytest.mark.deep
@pytest.mark.parametrize("window", PLAIN_WINDOWS)
@pytest.mark.parametrize("number", range(len(STRUCTURES)))
def test_every_structure(number, window, mode):
    """Several sizes for each structure."""
    cell, norm = STRUCTURES[number]
    for seed in range(3):
        check(a_pair(cell, norm, window, number + 7 * seed + list(PLAIN_WINDOWS).index(window)))


@pytest.mark.deep
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("batch", ROWS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_size(hidden, batch, steps, mode):
    number = hidden + batch + steps
    cell, norm = list(CELLS)[number % 4], ["layer", "rms"][number // 4 % 2]
    check(Pair(cell, norm, str(K), hidden, batch, steps, [1, 70][number % 2], number, before=[None, 7][number % 2]))


# Several blocks of hidden units in the product; several blocks of features and rows in the gradients of gains.
LARGE = [("gru", 65, 3, 3), ("lstm", 70, 18, 4), ("tanh", 257, 2, 2)]


@pytest.mark.parametrize(("cell", "hidden", "batch", "steps"), LARGE)
def test_more_units_than_a_block(cell, hidden, batch, steps):
    """257 units are too many for one program, and a row has several blocks of features."""
    check(Pair(cell, "layer", "2", hidden, batch, steps, inputs=5, ragged=True, before=3))


def any_structure(pair, step_by_step):
    from atn_norms.backends.triton import call

    with pytest.MonkeyPatch.context() as patch:
        if step_by_step:
            patch.setattr(call, "WHOLE", 0)
        check(pair)


@settings(max_examples=4)
@given(pairs(tuple(PLAIN_WINDOWS), per_gate=False), st.booleans())
def test_any_structure(pair: Pair, step_by_step):
    any_structure(pair, step_by_step)


@pytest.mark.deep
@pytest.mark.timeout(3000)
@settings(max_examples=100)
@given(pairs(tuple(PLAIN_WINDOWS), per_gate=False), st.booleans())
def test_any_structure_at_length(pair: Pair, step_by_step):
    any_structure(pair, step_by_step)


@pytest.mark.parametrize("before", [None, 3, 120])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_window_longer_than_the_sequence(cell, before):
    """The state holds no step of the window, some, or all."""
    check(Pair(cell, "layer", "100", batch=3, steps=7, ragged=True, before=before))


@pytest.mark.parametrize("window", ["4", "exponential"])
def test_all_rows_or_steps_are_masked(window, mode):
    for cell in CELLS:
        pair = Pair(cell, "layer", window, batch=3, before=5)
        given = pair.xs(), pair.state(), torch.zeros(3, dtype=torch.int64)
        found = outcome(made(pair), *given)
        agree(found, outcome(made(pair, "reference"), *given), 0)
        assert (found.ys == 0).all()
        compare(found.state, leaves(pair.state()), tolerance=0)


def test_padding_may_hold_anything(mode):
    pair = Pair("gru", window="4" if mode == "whole" else "cumulative", batch=5, steps=6, ragged=True, seed=3)
    lengths = pair.lengths()
    assert lengths is not None and 0 < int(lengths.sum()) < 30
    dead = torch.arange(6)[:, None] >= lengths
    dirty = pair.xs().masked_fill(dead[..., None], float("nan"))
    layer = made(pair)
    found = outcome(layer, dirty, None, lengths)
    agree(found, outcome(layer, pair.xs(), None, lengths), 0)
    assert (found.ys[dead] == 0).all()


@pytest.mark.parametrize(("cell", "depth", "directions"), [("lstm", 2, 2), ("gru", 1, 2), ("relu", 2, 1)])
def test_packed_input(cell, depth, directions):
    pair = Pair(cell, batch=5, steps=6, hidden=7, options={"num_layers": depth, "bidirectional": directions == 2})
    lengths, results = torch.tensor([3, 6, 1, 6, 2]), []
    for backend in ("triton", "reference"):
        layer, xs, device = made(pair, backend), pair.xs().requires_grad_(), place(backend)
        seeds = range(7, 7 + len(layer.cell.carried))
        hx = [pair.draw(depth * directions, 5, 7, seed=seed).requires_grad_() for seed in seeds]
        packed = pack_padded_sequence(xs.to(device), lengths, enforce_sorted=False)
        given = moved(tuple(hx), device)
        out, last = layer(packed, given if len(hx) > 1 else given[0])
        ends = [end.cpu() for end in (out.data, *leaves(last))]
        gradients = torch.autograd.grad(functional(ends), [xs, *hx, *layer.parameters()])
        results.append((ends, [gradient.cpu() for gradient in gradients]))
    (found, gradients), (expected, other) = results
    compare(found, expected, tolerance=EXACT)
    compare(gradients, other, tolerance=EXACT, scale=level(*other))


def test_without_bias(mode):
    check(Pair(ragged=True, batch=3, options={"bias": False, "batch_first": True}))


RESULTS = [(cell, window) for cell in ("lstm", "gru") for window in ("1", "4", "cumulative", "exponential")]
SOME = ("gru", "exponential")


@pytest.mark.parametrize(
    ("cell", "window"), [pytest.param(*case, marks=[] if case == SOME else pytest.mark.deep) for case in RESULTS]
)
def test_gradients_from_each_result_alone(cell, window, mode):
    """Outputs, last hidden states and every statistic of a window, one at a time; the other gradients are absent."""
    pair = Pair(cell, window=window, batch=3, steps=5, ragged=True, before=2, seed=5)
    runs = []
    for backend in ("triton", "reference"):
        layer = made(pair, backend)
        xs, state, lengths = (moved(tree, place(backend)) for tree in (pair.xs(), pair.state(), pair.lengths()))
        state, opened = open_state(state)
        ys, after = layer.unroll(xs.requires_grad_(), state, lengths)
        (carried, norms) = after[0][0]
        ends = [ys, *carried, *(leaf for _, (_, statistic) in norms for leaf in statistic if leaf.numel())]
        runs.append((ends, [xs, *layer.parameters(), *opened]))
    for number in range(len(runs[0][0])):
        results = []
        for ends, wanted in runs:
            loss = functional([ends[number]])
            found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            results.append(
                [(torch.zeros_like(w) if g is None else g).cpu() for g, w in zip(found, wanted, strict=True)]
            )
        found, expected = results
        compare(found, expected, tolerance=EXACT, scale=level(*expected), what=f"result {number}")


def test_every_run_gives_the_same_bits():
    """The order of every sum is fixed."""
    pair = Pair("lstm", "layer", "4", hidden=17, batch=17, steps=3, ragged=True, before=3, dtype=torch.float32)
    given = pair.xs(), pair.state(), pair.lengths()
    first = outcome(made(pair), *given)
    for _ in range(20 if DEVICE == "cuda" else 1):
        agree(outcome(made(pair), *given), first, 0)


def test_a_row_of_a_batch_equals_the_row_alone():
    pair = Pair("gru", "rms", "4", hidden=5, batch=20, steps=6)
    whole = outcome(made(pair), pair.xs())
    compare(outcome(made(pair), pair.xs()[:, :7]).ys, whole.ys[:, :7], tolerance=EXACT)


def test_an_empty_batch():
    found, expected = both(Pair(batch=0))
    agree(found, expected, 0)
