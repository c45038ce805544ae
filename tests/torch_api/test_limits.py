"""Limits of the recurrent layers of torch.nn, and the layers of this package without them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap

from tests.compare import compare
from tests.torch_api.features import feature
from tests.torch_api.test_transforms import CELLS, every_layer

GROUP = "Limits of torch.nn"
REFERENCE = 'A layer with a norm runs, and a layer without one does with `backend="reference"`.'
DYNAMIC = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def pair(cell: str, **options: Any) -> tuple[Any, Any]:
    """A layer of torch, and ours with the same weights."""
    theirs, ours = getattr(nn, cell.upper())(3, 4), CELLS[cell](3, 4, **options)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours


@feature(GROUP, "`torch.compile(fullgraph=True)`", "refused", "torch's compiler runs these layers outside the graph.")
@every_layer
def test_torch_compiles_no_recurrent_layer(cell):
    torch._dynamo.reset()
    theirs, ours = pair(cell)
    x = numbers(5, 2, 3)
    with pytest.raises(Exception, match="Attempted to wrap RNN, GRU, or LSTM"):
        torch.compile(theirs, fullgraph=True, backend="eager")(x)
    compare(torch.compile(ours, fullgraph=True, backend="eager")(x), theirs(x), tolerance=1e-6)


@feature(GROUP, "`vmap` over inputs or over stacked models", "refused", REFERENCE)
@every_layer
def test_torch_maps_no_recurrent_layer(cell):
    theirs, ours = pair(cell, backend="reference")
    xs = numbers(3, 5, 2, 3)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda x: theirs(x)[0])(xs)
    compare(vmap(lambda x: ours(x)[0])(xs), torch.stack([theirs(x)[0] for x in xs]), tolerance=1e-6)
    weights = {name: torch.stack([w.detach(), 2 * w.detach()]) for name, w in theirs.named_parameters()}
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda w: functional_call(theirs, w, (xs[0],))[0])(weights)
    found = vmap(lambda w: functional_call(ours, w, (xs[0],))[0])(weights)
    for place in range(2):
        expected = functional_call(theirs, {name: w[place] for name, w in weights.items()}, (xs[0],))[0]
        compare(found[place], expected, tolerance=1e-6)


@feature(GROUP, "`vmap(grad)` of `nn.GRU` and `nn.RNN`", "refused", REFERENCE)
@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_torch_has_no_per_sample_gradients(cell):
    theirs, ours = pair(cell, backend="reference")
    xs = numbers(3, 5, 1, 3)

    def gradients(layer: Any) -> Any:
        loss = lambda w, x: functional_call(layer, w, (x,))[0].square().sum()  # noqa: E731
        return vmap(grad(loss), (None, 0))({name: w.detach() for name, w in layer.named_parameters()}, xs)

    with pytest.raises(RuntimeError, match="broadcast"):
        gradients(theirs)
    found = gradients(ours)
    for place, x in enumerate(xs):
        single = torch.autograd.grad(theirs(x)[0].square().sum(), list(theirs.parameters()))
        compare([gradient[place] for gradient in found.values()], list(single), tolerance=1e-5)


@feature(GROUP, "forward-mode AD of `nn.LSTM` in float32", "refused", REFERENCE)
def test_torch_has_no_tangents_of_an_lstm():
    theirs, ours = pair("lstm", backend="reference")
    x, step = numbers(5, 2, 3), 1e-6
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(lambda x: theirs(x)[0], (x,), (x,))
    theirs, ours, x = theirs.double(), ours.double(), x.double()
    found = jvp(lambda x: ours(x)[0], (x,), (x,))[1]
    ends = [theirs((1 + sign * step) * x)[0] for sign in (1, -1)]
    compare(found, (ends[0] - ends[1]) / (2 * step), tolerance=1e-8)  # central difference: step**2, and 1e-16 / step


@feature(
    GROUP,
    "`torch.export` with a dynamic length",
    "refused",
    'A layer with a norm exports, and a layer without one does with `backend="native"`.',
)
@every_layer
def test_torch_exports_a_fixed_length(cell):
    x = numbers(5, 2, 3)
    for options in ({"norm": "layer"}, {"backend": "native"}):
        theirs, ours = pair(cell, **options)
        with pytest.raises(Exception, match="Constraints violated"):
            export(theirs, (x,), dynamic_shapes=DYNAMIC)
        program = export(ours, (x,), dynamic_shapes=DYNAMIC).module()
        compare(program(numbers(7, 3, 3)), ours(numbers(7, 3, 3)), tolerance=1e-6)


@every_layer
def test_the_limits_of_torch_hold_for_layers_without_a_norm(cell):
    """With the same error, so that code which handles it needs no change."""
    theirs, ours = pair(cell)
    x = numbers(5, 2, 3)
    calls = {
        "vmap": lambda layer: vmap(lambda x: layer(x)[0])(x.unsqueeze(0)),
        "export": lambda layer: export(layer, (x,), dynamic_shapes=DYNAMIC),
    }
    for call in calls.values():
        errors = []
        for layer in (theirs, ours):
            with pytest.raises(Exception) as caught:  # noqa: PT011  (the other error is the expected one)
                call(layer)
            errors.append((type(caught.value), str(caught.value).splitlines()[0]))
        assert errors[0] == errors[1]
