"""Layers without a norm on the native backend, which compiled graphs use: results equal those of the reference."""

from typing import Any

import pytest
import torch
from hypothesis import given

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import CELLS, EXACT, Pair, check, functional, needs_kernels, outcome, pairs
from tests.native.test_half import UNIT
from tests.native.test_operators import Recorded
from tests.native.test_values import LARGE

pytestmark = needs_kernels


def without_norm(pair: Pair, **fields: Any) -> Pair:
    """Return the pair of layers without norms; an LSTM may have a projection."""
    options = pair.options | fields.pop("options", {}) | {"norm": None, "window": 1}
    return Pair(**(vars(pair) | fields | {"options": options}))


@given(pairs())
def test_any_structure(pair: Pair):
    check(without_norm(pair))
    if pair.cell == "lstm" and pair.hidden > 1:
        check(without_norm(pair, options={"proj_size": pair.hidden // 2}))


@pytest.mark.parametrize(("cell", "hidden"), [(cell, 37) for cell in CELLS] + LARGE)
@pytest.mark.parametrize("inputs", [5, 70])
def test_more_rows_than_a_block_and_weights_larger_than_the_cache(cell, hidden, inputs):
    check(without_norm(Pair(cell, hidden=hidden, batch=70, steps=4, inputs=inputs, ragged=True, before=3)))


@pytest.mark.parametrize("placement", [{"sum": "joint"}, {"carry": "normed"}, {"sum": "joint", "carry": "normed"}])
def test_a_placement_has_no_effect(placement):
    check(without_norm(Pair(batch=3, steps=6, ragged=True, before=2), options={"placement": placement}))


@given(pairs(hidden=3, batch=2, inputs=2, steps=3))
def test_gradients_of_gradients(pair: Pair):
    pair, results = without_norm(pair), []
    for backend in ("native", "reference"):
        layer = pair.layer(backend)
        once = outcome(layer, pair.xs(), pair.state(), pair.lengths(), retain=True).gradients
        penalty = functional([gradient for gradient in once if gradient.requires_grad])
        wanted = list(layer.parameters())
        again = torch.autograd.grad(penalty, wanted, allow_unused=True)
        results.append([torch.zeros_like(p) if g is None else g for g, p in zip(again, wanted, strict=True)])
    compare(results[0], results[1], tolerance=EXACT, scale=level(*results[1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, training):
    pair = without_norm(Pair(cell, ragged=True, before=2, options={"bias": cell != "gru"}))
    with Recorded() as recorded, torch.set_grad_enabled(training):
        ys, _ = pair.layer("native").unroll(pair.xs(), pair.state(), pair.lengths())
        if training:
            ys.square().sum().backward()
    forward, backward = torch.ops.atn_norms.recurrent, torch.ops.atn_norms.recurrent_backward
    recorded.check([forward, backward] if training else [forward], differentiable=training)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_is_rounded_once(cell, dtype):
    pair = without_norm(Pair(cell, batch=3, dtype=dtype))
    found, expected = (pair.layer("native", each)(pair.xs().to(each))[0] for each in (dtype, torch.float64))
    assert found.dtype == dtype
    compare(found.double(), expected, tolerance=1.01 * UNIT[dtype])


def test_vmap_of_a_gradient_of_each_sample():
    pair = without_norm(Pair("gru", batch=4))
    layer, xs = pair.layer("native"), pair.xs()
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(weights: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, weights, (x.unsqueeze(1),))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, xs)
    for place in range(4):
        alone = torch.autograd.grad(layer(xs[:, place : place + 1])[0].square().sum(), list(layer.parameters()))
        compare([gradient[place] for gradient in found.values()], list(alone), tolerance=EXACT)


def test_it_is_selected_by_name_and_by_a_compiler_only():
    """In plain calls the layer is that of torch, with its numbers."""
    layer = an.GRU(2, 3, 2, bidirectional=True)
    assert an.explain(layer).count("backend 'torch'") == 4
    assert an.explain(layer).count("native: supported; used inside torch.compile") == 4
    by_name = an.explain(an.with_backend(layer, "torch"))
    assert by_name.count("native: supported") == 4 and "compile" not in by_name
    assert an.explain(an.with_backend(layer, "native")).count("backend 'native'") == 4
    x = torch.randn(5, 2, 2)
    theirs = torch.nn.GRU(2, 3, 2, bidirectional=True)
    theirs.load_state_dict(layer.state_dict())
    compare(layer(x), theirs(x), tolerance=0)
    compare([*leaves(an.with_backend(layer, "native")(x))], [*leaves(theirs(x))], tolerance=1e-6)
