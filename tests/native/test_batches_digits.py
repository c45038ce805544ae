"""Batch statistics: accuracy, NaN, threads and instruction sets."""

import itertools
from dataclasses import replace

import pytest
import torch

from atn_norms.backends.native import library
from tests.compare import compare
from tests.laws.strategies import REGIMES, leaves, level, sequence
from tests.native.batched import a_pair, made
from tests.native.strategies import CELLS, EXACT, Outcome, agree, functional, needs_kernels, outcome
from tests.native.test_digits import ULPS, WIDTH, exact_products, normalization_alone

pytestmark = needs_kernels


@pytest.mark.parametrize("hidden", [9, 70, 130])
@pytest.mark.parametrize("norm", ["batch", "batch, layer", "traced, batch"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "relu"])
def test_the_number_of_threads_changes_no_bit(cell, norm, hidden):
    pair = a_pair(cell, norm, "4", hidden, 40, 12, 5, before=3, dtype=torch.float32)
    given = pair.xs(), pair.state()
    results: list[tuple[Outcome, list[torch.Tensor]]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer = pair.layer("native")
            results.append((outcome(layer, *given), list(layer.buffers())))
    finally:
        torch.set_num_threads(1)
    for found, buffers in results[1:]:
        agree(found, results[0][0], 0)
        compare(buffers, results[0][1], tolerance=0)


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(limit, dtype):
    kernels = library.load()
    assert isinstance(kernels, library.Library)
    try:
        kernels.level(limit)
        for cell, norm in itertools.product(("lstm", "gru", "relu"), ("batch", "batch, layer")):
            pair = a_pair(cell, norm, "4", 35, 9, 6, 5, before=2, ragged=True, dtype=dtype)
            found = outcome(pair.layer("native"), pair.xs(), pair.state(), pair.lengths())
            exact = replace(pair, dtype=torch.float32)
            expected = outcome(
                exact.layer("reference", torch.float64), pair.xs().double(), pair.state(torch.float64), pair.lengths()
            )
            if dtype == torch.float64:
                expected = outcome(pair.layer("reference"), pair.xs(), pair.state(), pair.lengths())
            tolerance = 10 * EXACT if dtype == torch.float64 else 2e-4
            compare(found.ys.double(), expected.ys, tolerance=tolerance)
            compare(
                [g.double() for g in found.gradients],
                expected.gradients,
                tolerance=tolerance,
                scale=level(*expected.gradients),
            )
    finally:
        kernels.level(2)


@pytest.mark.parametrize("window", ["1", "4", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_of_normalization_in_every_regime(dtype, regime, window):
    """1e4 with deviations of 1e-2, spikes, constants, 1e-20, 1e30, drift, for identical pre-activations."""
    pair = a_pair("relu", "ih", window, WIDTH, 6, 24, WIDTH, dtype=dtype)
    xs = sequence(regime, 7, (24, 6, WIDTH)).to(dtype)
    for sign in (1, -1):
        results = []
        for backend, kind in (("native", dtype), ("reference", torch.float64)):
            layer = pair.layer(backend, kind)
            with torch.no_grad():
                normalization_alone(sign)(layer)
            ys, after = layer.unroll(xs.to(kind))
            results.append((ys.detach().double(), leaves(after)[2:], [b.double() for b in layer.buffers()]))
        (ys, state, populations), (expected, final, others) = results
        if dtype == torch.float32:
            tolerance = ULPS
        else:  # both sides round: centring magnifies by |x| / sqrt(v + eps)
            smallest = xs.var(1, correction=0).min()
            tolerance = 64 * torch.finfo(dtype).eps * max(1.0, float(xs.abs().max()) / float(smallest + 1e-5) ** 0.5)
        compare(ys, expected, tolerance=tolerance)
        for mine, theirs in zip(state, final, strict=True):
            compare(mine, theirs, tolerance=1e-12, scale=level(theirs))
        for mine, theirs in zip(populations, others, strict=True):
            stored = theirs.to(dtype).double()  # infinite beyond the range of float32
            compare(mine, stored, tolerance=2 * torch.finfo(dtype).eps + 1e-12, scale=level(theirs))


@pytest.mark.parametrize("cell", CELLS)
def test_accuracy_of_gradients(cell):
    """In float32, for well conditioned cases: 1e-5 of the norm of each gradient."""
    pair = a_pair(cell, "batch", "4", 64, 32, 20, 10, seed=1, before=5, dtype=torch.float32)
    found = outcome(pair.layer("native"), pair.xs(), pair.state())
    expected = outcome(pair.layer("reference", torch.float64), pair.xs().double(), pair.state(torch.float64))
    for place, (mine, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        # biases before batch statistics have a gradient only through the initial state
        floor = 1e-3 * level(*expected.gradients)
        error = float((mine.double() - theirs).norm() / theirs.norm().clamp(min=floor))
        assert error <= 1e-5, f"gradient {place}: {error:.2g} of its norm"


def test_accuracy_of_gates():
    """One step after exact products: float32 values are within 4 ulp of the reference in float64."""
    for cell in CELLS:
        gates = {"lstm": 4, "gru": 3}.get(cell, 1)
        pair = a_pair(cell, "ih", "4", WIDTH, 8, 1, gates * WIDTH, dtype=torch.float32)
        results = []
        for backend, kind in (("native", torch.float32), ("reference", torch.float64)):
            layer = pair.layer(backend, kind)
            with torch.no_grad():
                exact_products(layer)
                layer.weight_hh_l0.zero_()
            results.append(layer.unroll(5 * pair.xs().to(kind))[0].double())
        compare(*results, tolerance=ULPS, what=cell)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_in_evaluation_a_nan_stays_in_its_row(cell, dtype):
    pair = a_pair(cell, "per step", "4", 35, 5, 6, 3, dtype=dtype)
    layer, others, runs = made(pair, "native", training=False), [0, 2, 3, 4], []
    for value in (0.5, float("nan")):
        xs = pair.xs()
        xs[2, 1, 0] = value
        xs.requires_grad_()
        ys, _ = layer.unroll(xs)
        runs.append((ys, torch.autograd.grad(functional([ys]), xs)[0]))
    (ys, gradient), (poisoned_ys, reached) = runs
    compare(poisoned_ys[:, others], ys[:, others], tolerance=0)
    assert poisoned_ys[2:, 1].isnan().all() and not poisoned_ys[:2].isnan().any()
    compare(reached[:, others], gradient[:, others], tolerance=0)


@pytest.mark.parametrize("cell", CELLS)
def test_in_training_a_nan_affects_its_feature_in_all_rows(cell):
    layer, xs = a_pair(cell, "ih", "1", 5, 4, 1).layer("native"), torch.ones(1, 4, 2).double()
    xs[0, 1, 0] = float("nan")
    assert layer(xs)[0].isnan().all()
