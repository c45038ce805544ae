"""Accuracy of float32 against the reference in float64: ranges, spikes, saturation, and the spread of a NaN."""

from dataclasses import replace

import pytest
import torch

from atn_norms.backends.native import library
from tests.compare import compare
from tests.laws.strategies import REGIMES, leaves, level, sequence
from tests.native.strategies import CELLS, Pair, functional, needs_kernels, outcome

pytestmark = needs_kernels

EPS = torch.finfo(torch.float32).eps
ULPS = 4 * EPS  # limit for normalization and gates, at max(1, |y|), for identical pre-activations
WIDTH = 21


def both(pair, xs, state=None, dtype=torch.float32, prepare=None):
    """Return outputs and states of native in `dtype`, and of the reference in float64 on the same numbers."""
    results = []
    for backend, kind in (("native", dtype), ("reference", torch.float64)):
        layer = pair.layer(backend, kind)
        if prepare is not None:
            with torch.no_grad():
                prepare(layer)
        own = None if state is None else pair.state(kind)
        ys, after = layer.unroll(xs.to(kind), own)
        results.append((ys.detach().double(), [h.detach().double() for h in leaves(layer.hidden(after))], after))
    return results


def summed_in_float(dtype, width):
    """Return True if the kernels sum a row of that many features in float32: at least two vectors."""
    kernels = library.load()
    assert isinstance(kernels, library.Library)
    numbers = {"baseline": 4, "AVX2": 8, "AVX-512": 16}[kernels.level()]
    return dtype == torch.float32 and width >= 2 * numbers


def exact_products(layer):
    """Set weights to zeros and ones, so that the pre-activations equal the inputs in every dtype."""
    gates = layer.weight_ih_l0.shape[0] // layer.hidden_size
    layer.weight_ih_l0.copy_(torch.eye(*layer.weight_ih_l0.shape))
    layer.weight_hh_l0.copy_(torch.eye(layer.hidden_size).repeat(gates, 1))
    for bias in (layer.bias_ih_l0, layer.bias_hh_l0):
        bias.zero_()


def normalization_alone(sign):
    """Return a layer relu(N(x)) without recurrence; a negative `sign` shows the negative half."""

    def prepare(layer):
        exact_products(layer)
        layer.weight_hh_l0.zero_()
        for parameter in layer.norm_ih_l0.parameters():
            parameter.mul_(sign)

    return prepare


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("window", ["1", "4", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_of_normalization_in_every_regime(dtype, regime, norm, window, sign):
    """1e4 with deviations of 1e-2, a spike of 1e6 that leaves the window, constants, 1e-20, 1e30, drift."""
    pair = Pair("relu", norm, window, WIDTH, 3, 24, WIDTH, dtype=dtype, options={"norm": {"sites": {"ih": norm}}})
    xs = sequence(regime, 7, (24, 3, WIDTH)).to(dtype)
    (ys, _, after), (expected, _, final) = both(pair, xs, dtype=dtype, prepare=normalization_alone(sign))
    if dtype == torch.float32:
        tolerance = ULPS
    else:  # both sides round: centring magnifies by |x| / sqrt(v + eps)
        smallest = xs.var(-1, correction=0).min() if norm == "layer" else xs.square().mean(-1).min()
        tolerance = 64 * torch.finfo(dtype).eps * max(1.0, float(xs.abs().max()) / float(smallest + 1e-5) ** 0.5)
    compare(ys, expected, tolerance=tolerance)
    for mine, theirs in zip(leaves(after)[2:], leaves(final)[2:], strict=True):  # statistics are float64 on both sides
        compare(mine, theirs, tolerance=ULPS if summed_in_float(dtype, WIDTH) else 1e-12, scale=level(theirs))


@pytest.mark.parametrize("silent", ["ih", "hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_accuracy_of_the_gates(cell, silent):
    """One step with identical pre-activations: one site has gain 0, the other has no norm."""

    def prepare(layer):
        exact_products(layer)
        for parameter in getattr(layer, f"norm_{silent}_l0").parameters():
            parameter.zero_()

    gates = {"lstm": 4, "gru": 3}.get(cell, 1)
    options = {"norm": {"sites": {silent: "layer"}}}
    for seed in range(5):
        pair = Pair(
            cell, "layer", "4", WIDTH, 8, 1, gates * WIDTH, seed, before=6, dtype=torch.float32, options=options
        )
        xs = 5 * pair.xs()
        (ys, hidden, _), (expected, last, _) = both(pair, xs, state=6, prepare=prepare)
        compare(ys, expected, tolerance=ULPS, what="ys")
        compare(hidden, last, tolerance=ULPS, what="last hidden")


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_accuracy_of_the_normed_cell_state(norm):
    """With forget and output gate 1 and input gate 0, the cell state equals the initial state bit for bit."""

    def prepare(layer):
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.zero_()
        layer.bias_hh_l0.zero_()
        layer.bias_ih_l0.copy_(torch.tensor([-200.0, 200.0, 0.0, 200.0]).repeat_interleave(WIDTH))

    pair = Pair(window="4", hidden=WIDTH, batch=8, steps=1, before=6, dtype=torch.float32)
    pair = replace(pair, options={"norm": {"sites": {"c": norm}}})
    (ys, (_, c), _), (expected, (_, kept), _) = both(pair, pair.xs(), state=6, prepare=prepare)
    compare(c, kept, tolerance=0)
    compare(ys, expected, tolerance=ULPS)


@pytest.mark.parametrize("cell", CELLS)
def test_gates_saturate(cell):
    """Pre-activations of any size, also infinite, give their limits, and gradients without NaN."""
    site = "c" if cell == "lstm" else "hh"
    values = torch.tensor([0.0, 1.0, -1.0, 80.0, -80.0, 88.5, -88.5, 700.0, -750.0, 1e30, -1e30])
    values = torch.cat([values, torch.tensor([float("inf"), float("-inf")])]) if cell != "relu" else values
    for dtype in (torch.float32, torch.float64):
        pair = Pair(
            cell, hidden=len(values), batch=2, steps=2, dtype=dtype, options={"norm": {"sites": {site: "layer"}}}
        )

        def prepare(layer, values=values):
            layer.weight_ih_l0.zero_()
            layer.weight_hh_l0.zero_()
            layer.bias_hh_l0.zero_()
            layer.bias_ih_l0.copy_(values.repeat(len(layer.bias_ih_l0) // len(values)))

        (ys, hidden, _), (expected, last, _) = both(pair, pair.xs(), dtype=dtype, prepare=prepare)
        tolerance = 16 * torch.finfo(dtype).eps
        compare(ys, expected, tolerance=tolerance)
        compare(hidden, last, tolerance=tolerance)
        layer = pair.layer("native")
        with torch.no_grad():
            prepare(layer)
        assert all(torch.isfinite(g).all() for g in outcome(layer, pair.xs()).gradients)


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_error_of_the_product_is_at_most_twice_torch_s(cell, norm, steps):
    """Compare with float64: the reference in float32 is torch's product and an almost exact normalization."""
    errors = {"native": 0.0, "reference": 0.0}
    for seed in range(4):
        pair = Pair(cell, norm, "4", 64, 8, steps, 300, seed, dtype=torch.float32)
        exact = pair.layer("reference", torch.float64).unroll(pair.xs().double())[0]
        for backend in errors:
            ys = pair.layer(backend).unroll(pair.xs())[0]
            errors[backend] += float((ys - exact).detach().square().sum())
    assert errors["native"] ** 0.5 <= 2 * errors["reference"] ** 0.5, errors


@pytest.mark.parametrize("window", ["1", "4", "exponential"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cell", CELLS)
def test_accuracy_of_gradients(cell, norm, window):
    """For well conditioned cases: 1e-5 of the norm of each gradient. With other seeds, the reference has a similar
    error in float32, where the cell state of a row is almost 0 under its norm."""
    pair = Pair(cell, norm, window, 64, 16, 20, 10, seed=1, before=5, dtype=torch.float32)
    found = outcome(pair.layer("native"), pair.xs(), pair.state())
    expected = outcome(pair.layer("reference", torch.float64), pair.xs().double(), pair.state(torch.float64))
    for place, (mine, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        error = float((mine.double() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        assert error <= 1e-5, f"gradient {place}: {error:.2g} of its norm"


@pytest.mark.parametrize("where", ["input", "given state"])
@pytest.mark.parametrize("window", ["1", "4", "cumulative"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_affects_only_its_row(dtype, cell, norm, window, where):
    pair = Pair(cell, norm, window, 17, 5, 6, 3, before=4, dtype=dtype)
    layer, step = pair.layer("native"), 2 if where == "input" else 0
    clean, dirty = ((pair.xs().requires_grad_(), pair.state()) for _ in range(2))
    with torch.no_grad():
        if where == "input":
            dirty[0][2, 1, 0] = float("nan")
        else:
            dirty[1][0][0][0][0][1, 5] = float("nan")
    others, runs = [0, 2, 3, 4], []
    for xs, state in (clean, dirty):
        ys, after = layer.unroll(xs, state)
        gradient = torch.autograd.grad(functional([ys]), xs)[0]
        runs.append((ys, leaves(after), gradient))
    (ys, after, gradient), (poisoned, state, reached) = runs
    compare(poisoned[:, others], ys[:, others], tolerance=0)
    compare(poisoned[:step], ys[:step], tolerance=0)
    assert poisoned[step:, 1].isnan().all()
    compare([leaf[others] for leaf in state], [leaf[others] for leaf in after], tolerance=0)
    compare(reached[:, others], gradient[:, others], tolerance=0)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_nan_in_the_pre_activations_affects_its_row(cell, norm):
    """The NaN is in the statistic of its row, and so in every feature."""
    layer = Pair(cell, hidden=17, batch=2, steps=1, options={"norm": {"sites": {"ih": norm}}}).layer("native")
    with torch.no_grad():
        layer.bias_ih_l0[5] = float("nan")
        assert layer(torch.ones(1, 2, 2).double())[0].isnan().all()
