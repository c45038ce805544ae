"""Compare first and second derivatives with finite differences for every cell, normalizer and window kind."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import atn_norms as an
from tests.laws.strategies import BASES, CELLS, KINDS, Case, LayerCase, leaves, window

SMOOTH = 1e-2  # eps of the checks: finite differences need a smooth normalizer


def run(layer, names, lengths=None):
    def outputs(xs, *parameters):
        given = dict(zip(names, parameters, strict=True))
        packed = (
            functional_call(layer, given, (xs,)) if lengths is None else functional_call(layer, given, (xs, lengths))
        )
        return (packed[0], *leaves(packed[1]))

    return outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_of_a_layer(cell, base, kind):
    case = LayerCase(11, cell, base, kind, steps=3, batch=3, inputs=2, hidden=3)
    layer = case.layer(norm={"kind": base, "eps": SMOOTH})
    names = [name for name, _ in layer.named_parameters()]
    start = [case.xs().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert gradcheck(run(layer, names), start, fast_mode=True)
    assert gradgradcheck(run(layer, names), start, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_second_derivatives_of_a_scan_in_every_entry(base, kind):
    norm = Case(5, 4, 3, 2, base, kind, torch.float64, "normal", eps=SMOOTH).norm()
    xs = Case(5, 4, 3, 2, base, kind, torch.float64, "normal").xs().requires_grad_()
    assert gradcheck(lambda x: norm.scan(x)[0], xs)
    assert gradgradcheck(lambda x: norm.scan(x)[0], xs)


@pytest.mark.parametrize("base", BASES)
def test_second_derivatives_of_a_ragged_scan(base):
    norm = Case(5, 4, 3, 2, base, ("sliding", 2), torch.float64, "normal", eps=SMOOTH).norm()
    xs = Case(5, 4, 3, 2, base, ("sliding", 2), torch.float64, "normal").xs().requires_grad_()
    limit = torch.tensor([4, 1, 4])
    assert gradcheck(lambda x: norm.scan(x, lengths=limit)[0], xs)
    assert gradgradcheck(lambda x: norm.scan(x, lengths=limit)[0], xs)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_pass_gradients_through_their_state(kind):
    norm = Case(5, 3, 2, 3, "layer", kind, torch.float64, "normal", eps=SMOOTH).norm()
    xs = Case(5, 3, 2, 3, "layer", kind, torch.float64, "normal").xs().requires_grad_()

    def stepped(x):
        state, ys = None, []
        for now in x:
            y, state = norm.step(now, state)
            ys.append(y)
        return torch.stack(ys)

    assert gradcheck(stepped, xs)


@pytest.mark.parametrize("cell", CELLS)
def test_given_states_carry_gradients(cell):
    case = LayerCase(11, cell, "layer", ("sliding", 2), steps=3, batch=2, inputs=2, hidden=3)
    layer = case.layer(norm={"kind": "layer", "eps": SMOOTH})
    hx: list[torch.Tensor] = [s.requires_grad_() for s in leaves(case.hx(layer))]

    def outputs(*states: torch.Tensor):
        ys, final = layer(case.xs(), states if len(states) > 1 else next(iter(states)))
        return (ys, *leaves(final))

    assert gradcheck(outputs, hx)


@pytest.mark.deep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_in_every_entry(cell, base, kind):
    case = LayerCase(12, cell, base, kind, steps=3, batch=3, inputs=2, hidden=2)
    layer = case.layer(norm={"kind": base, "eps": SMOOTH}, window=window(kind))
    names = [name for name, _ in layer.named_parameters()]
    start = [case.xs().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert gradcheck(run(layer, names), start)
    assert isinstance(layer, an.Recurrent)
