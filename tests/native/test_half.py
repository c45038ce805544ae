"""Layers of bfloat16 and float16: computed in float32, rounded once where results leave the kernels."""

from typing import Any

import pytest
import torch

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import level
from tests.native.strategies import CELLS, needs_kernels
from tests.traced.gallery import GallerySpec

pytestmark = needs_kernels

MIXED = {"sites": {"ih": "batch", "hh": "layer"}}
NORMS = ["layer", "rms", "batch", MIXED, GallerySpec(name="Geometric"), GallerySpec(name="DynamicTanh")]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place of 1


def a_layer(cell, norm, dtype):
    torch.manual_seed(0)
    make, own = CELLS[cell]
    return make(3, 12, norm=norm, window=3, backend="native", dtype=dtype, **own)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_those_of_float64_rounded_once(cell, norm, dtype):
    layer = a_layer(cell, norm, dtype)
    exact = a_layer(cell, norm, torch.float64)
    exact.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items()})
    xs = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = []
    for each, given in ((layer, xs.clone().requires_grad_()), (exact, xs.double().requires_grad_())):
        ys, _ = each(given)
        assert ys.dtype == given.dtype
        ys.sum().backward()
        gradients.append([given.grad, *(parameter.grad for parameter in each.parameters())])
        if each is layer:
            found = ys
    compare(found.double(), ys, tolerance=UNIT[dtype] * 1.01)
    assert [g.dtype for g in gradients[0]] == [dtype] * len(gradients[0])
    scale = level(*gradients[1])
    # a gradient is rounded at the exit of the kernels, and dy at the entry
    compare([g.double() for g in gradients[0]], gradients[1], tolerance=4 * UNIT[dtype], scale=scale, what="gradient")
    populations = [[buffer.double() for buffer in each.buffers()] for each in (layer, exact)]
    compare(*populations, tolerance=UNIT[dtype] * 1.01, what="population")


@pytest.mark.parametrize("dtype", UNIT)
def test_types_are_those_of_torch(dtype):
    ours, theirs = an.LSTM(3, 4, norm="layer", dtype=dtype), torch.nn.LSTM(3, 4, dtype=dtype)
    xs = torch.randn(5, 2, 3, dtype=dtype)
    (y, (h, c)), (ty, (th, tc)) = ours(xs), theirs(xs)
    assert (y.dtype, h.dtype, c.dtype) == (ty.dtype, th.dtype, tc.dtype)


@pytest.mark.parametrize("dtype", UNIT)
def test_a_stream_carries_hidden_states_of_the_type_and_statistics_in_float64(dtype):
    layer = an.LSTM(3, 4, norm="layer", window=4, dtype=dtype)
    xs = torch.randn(6, 2, 3, dtype=dtype)
    _, state = layer.unroll(xs[:3])
    (((h, c), norms),) = state[0]
    assert (h.dtype, c.dtype, norms[0][1][0].dtype) == (dtype, dtype, torch.float64)
    more, _ = layer.unroll(xs[3:], state)
    compare(more.double(), layer.unroll(xs)[0][3:].double(), tolerance=16 * UNIT[dtype])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_weights_of_several_types_are_an_error(backend):
    """The kernels compute in float32, in which such weights would be accepted."""
    layer: Any = an.LSTM(2, 3, norm={"sites": {"c": "layer"}}, backend=backend)
    layer.weight_hh_l0.data = layer.weight_hh_l0.data.bfloat16()
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        layer(torch.zeros(4, 2, 2))
