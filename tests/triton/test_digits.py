"""Accuracy of float32 against the reference in float64: ranges, spikes, saturation, and the spread of a NaN."""

import pytest
import torch

from atn_norms.pytree import tree_map
from tests.compare import compare
from tests.laws.strategies import REGIMES, leaves, level, sequence
from tests.native.strategies import CELLS, Pair, functional
from tests.native.test_digits import normalization_alone
from tests.triton.strategies import made, moved, needs_triton, outcome, place

pytestmark = needs_triton

ULPS = 4 * torch.finfo(torch.float32).eps  # limit for normalization, at max(1, |y|), for identical pre-activations
WIDTH = 21
FLOAT, DOUBLE = torch.float32, torch.float64
SOME = {("layer", "4"), ("rms", "4"), ("layer", "cumulative"), ("rms", "exponential")}
NORMS_OVER = [
    pytest.param(norm, window, marks=[] if (norm, window) in SOME else pytest.mark.deep)
    for norm in ("layer", "rms")
    for window in ("1", "4", "100", "cumulative", "exponential")
]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("norm", "window"), NORMS_OVER)
def test_the_norm_of_the_inputs_keeps_its_digits(regime, norm, window):
    """1e4 with deviations of 1e-2, a spike of 1e6 that leaves the window, constants, 1e-20, 1e30, drift."""
    options = {"norm": {"sites": {"ih": norm}}}
    pair = Pair("relu", norm, window, WIDTH, 3, 16, WIDTH, dtype=FLOAT, options=options)
    xs, results = sequence(regime, 7, (16, 3, WIDTH)).to(FLOAT), []
    for backend, dtype in (("triton", FLOAT), ("reference", DOUBLE)):
        layer = made(pair, backend, dtype)
        with torch.no_grad():
            for sign in (1, -1):  # relu shows one half of the normalized values at a time
                normalization_alone(sign)(layer)
                ys, state = layer.unroll(xs.to(place(backend), dtype))
                results.append((ys.cpu().double(), moved(state, "cpu")))
    for (ys, state), (expected, final) in zip(results[:2], results[2:], strict=True):
        compare(ys, expected, tolerance=ULPS)
        statements(state, final)


def statements(state, final):
    """Return the statistics of the windows: float64 on both sides, from sums in float32."""
    for mine, theirs in zip(leaves(state)[2:], leaves(final)[2:], strict=True):
        compare(mine, theirs, tolerance=ULPS, scale=level(theirs))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("norm", "window"), NORMS_OVER)
def test_the_norm_of_the_recurrence_keeps_its_digits(regime, norm, window, mode):
    """Run single steps from a given hidden state: with weights of 0 and 1 the product equals that state bit for bit."""
    options = {"norm": {"sites": {"hh": norm}}}
    pair = Pair("relu", norm, window, WIDTH, 3, 1, 2, dtype=FLOAT, options=options)
    rows, results = sequence(regime, 7, (8, 3, WIDTH)).to(FLOAT), []
    for backend, dtype in (("triton", FLOAT), ("reference", DOUBLE)):
        layer, ys = made(pair, backend, dtype), []
        with torch.no_grad():
            for parameter in (layer.weight_ih_l0, layer.bias_ih_l0, layer.bias_hh_l0):
                parameter.zero_()
            layer.weight_hh_l0.copy_(torch.eye(WIDTH))
            state = layer.initial(3)
            for row in rows:
                (((_, norms),),) = state
                h = row.to(place(backend), dtype)
                y, state = layer.unroll(torch.zeros(1, 3, 2, dtype=dtype, device=h.device), ((((h,), norms),),))
                ys.append(y.cpu().double())
        results.append((torch.cat(ys), moved(state, "cpu")))
    (ys, state), (expected, final) = results
    compare(ys, expected, tolerance=ULPS)
    statements(state, final)


@pytest.mark.parametrize("window", ["4", "cumulative"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cell", CELLS)
def test_values_within_1e_5_and_gradients_within_1e_4(cell, norm, window):
    pair = Pair(cell, norm, window, 33, 9, 10, 5, seed=1, ragged=True, before=5, dtype=FLOAT)
    found = outcome(made(pair), pair.xs(), pair.state(), pair.lengths())
    expected = outcome(made(pair, "reference", DOUBLE), pair.xs().double(), pair.state(DOUBLE), pair.lengths())
    compare(found.ys.double(), expected.ys, tolerance=1e-5)
    for number, (mine, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        error = float((mine.double() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        assert error <= 1e-4, f"gradient {number}: {error:.2g} of its norm"


@pytest.mark.parametrize("cell", CELLS)
def test_gates_saturate(cell, mode):
    """Pre-activations of any size, also infinite, give their limits, and gradients without NaN."""
    site = "c" if cell == "lstm" else "hh"
    values = torch.tensor([0.0, 1.0, -1.0, 80.0, -80.0, 88.5, -88.5, 700.0, -750.0, 1e30, -1e30])
    values = torch.cat([values, torch.tensor([float("inf"), float("-inf")])]) if cell != "relu" else values
    for dtype in (FLOAT, DOUBLE):
        options = {"norm": {"sites": {site: "layer"}}}
        pair, results = Pair(cell, hidden=len(values), steps=2, dtype=dtype, options=options), []
        for backend, kind in (("triton", dtype), ("reference", DOUBLE)):
            layer = made(pair, backend, kind)
            with torch.no_grad():
                for parameter in (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_hh_l0):
                    parameter.zero_()
                layer.bias_ih_l0.copy_(values.repeat(len(layer.bias_ih_l0) // len(values)))
            results.append(outcome(layer, pair.xs().to(kind)))
        found, expected = results
        compare(found.ys.double(), expected.ys, tolerance=16 * torch.finfo(dtype).eps)
        assert all(torch.isfinite(gradient).all() for gradient in found.gradients)


def in_row(state, row):
    """Return the state with a NaN in h of one row."""
    (((carried, norms),),) = state
    h = carried[0].clone()
    h[row, 5] = float("nan")
    return ((((h, *carried[1:]), norms),),)


@pytest.mark.parametrize("where", ["input", "given state"])
@pytest.mark.parametrize(
    ("cell", "norm", "window"),
    [("lstm", "layer", "4"), ("gru", "rms", "4"), ("relu", "layer", "cumulative"), ("tanh", "rms", "1")],
)
def test_a_nan_affects_only_its_row(cell, norm, window, where, mode):
    pair, row, others = Pair(cell, norm, window, 17, 5, 4, 3, before=4, dtype=FLOAT), 1, [0, 2, 3, 4]
    layer, step = made(pair), 2 if where == "input" else 0
    dirty, state = pair.xs(), pair.state()
    if where == "input":
        dirty[step, row, 0] = float("nan")
    else:
        state = in_row(state, row)
    runs = []
    for xs, given in ((pair.xs(), pair.state()), (dirty, state)):
        xs = xs.to(place("triton")).requires_grad_()
        ys, after = layer.unroll(xs, moved(given, place("triton")))
        gradient = torch.autograd.grad(functional([ys]), xs)[0]
        runs.append((ys.cpu(), leaves(tree_map(lambda leaf: leaf[others].cpu(), after)), gradient.cpu()))
    (ys, after, gradient), (poisoned, left, reached) = runs
    compare(poisoned[:, others], ys[:, others], tolerance=0)
    compare(poisoned[:step], ys[:step], tolerance=0)
    assert poisoned[step:, row].isnan().all()
    compare(left, after, tolerance=0)
    compare(reached[:, others], gradient[:, others], tolerance=0)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_nan_in_the_pre_activations_affects_its_row(cell, norm):
    """The NaN is in the statistic of its row, and so in every feature."""
    options = {"norm": {"sites": {"ih": norm}}}
    layer = made(Pair(cell, hidden=17, steps=1, options=options))
    with torch.no_grad():
        layer.bias_ih_l0[5] = float("nan")
        assert layer(torch.ones(1, 2, 2, dtype=DOUBLE, device=place("triton")))[0].isnan().all()
