"""Batch statistics: operators, compilation, inference mode, and unsupported cases."""

import itertools
from typing import Any

import pytest
import torch

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.batched import MIXED, a_pair, check, fits, made
from tests.native.strategies import functional, needs_kernels, outcome
from tests.native.test_operators import Recorded, poisoned

pytestmark = needs_kernels
__all__ = ["poisoned"]  # a fixture

PAIRS = [
    a_pair("lstm", "batch", "4", batch=4, ragged=True, before=2),
    a_pair("gru", "per step", "cumulative", per_gate=True, dtype=torch.float32),
    a_pair("tanh", "hh", "exponential", before=3, options={"bias": False}),
    a_pair("relu", "ih", "1", inputs=66, hidden=35, dtype=torch.float32),
    a_pair("lstm", "batch, layer, batch", "4", batch=4, ragged=True, before=2),
    a_pair("gru", "traced, batch", "cumulative", inputs=66, hidden=35),
    a_pair("lstm", "batch", "4", hidden=4, before=1, options={"proj_size": 3}),
]


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.deep)])
def test_opcheck(pair, training):
    with Recorded() as recorded:
        ys, _ = made(pair, "native", training).unroll(pair.xs(), pair.state(), pair.lengths())
        ys.square().sum().backward()
    recorded.check([torch.ops.atn_norms.recurrent, torch.ops.atn_norms.recurrent_backward])


@pytest.mark.parametrize(
    ("cell", "norm"),
    [
        ("lstm", "per step"),
        ("gru", "batch, layer"),
        *[
            pytest.param(*each, marks=pytest.mark.deep)
            for each in [("lstm", "batch"), ("lstm", "batch, layer"), ("gru", "batch"), ("gru", "per step")]
        ],
    ],
)
def test_compiled_without_a_graph_break(cell, norm):
    """Training, which records a population, and evaluation, which uses it."""
    torch._dynamo.reset()
    pair = a_pair(cell, norm, "4", 7, 4, 6, dtype=torch.float32)
    layers = pair.layer("native"), pair.layer("native")
    compiled = torch.compile(layers[0], fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        results = []
        for run, layer in ((compiled, layers[0]), (layers[1], layers[1])):
            layer.train(training)
            ys, last = run(pair.xs())
            found = torch.autograd.grad(functional([ys, *leaves(last)]), list(layer.parameters()))
            results.append(([ys, *leaves(last)], found, [b.clone() for b in layer.buffers()]))
        compare(results[0][0], results[1][0], tolerance=1e-6)
        compare(results[0][1], results[1][1], tolerance=1e-6, scale=level(*results[1][1]))
        compare(results[0][2], results[1][2], tolerance=1e-6)


@pytest.mark.parametrize("window", ["1", "4", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("training", [True, False])
def test_no_kernel_reads_unwritten_memory(window, training, poisoned):
    for cell, ragged, before, inputs in (("lstm", True, 2, 66), ("gru", False, None, 3), ("tanh", True, None, 3)):
        for norm in ("batch", *MIXED):
            if not fits(cell, norm):
                continue
            pair = a_pair(cell, norm, window, 37, 5, 6, inputs, ragged=ragged, before=before, dtype=torch.float32)
            layer = made(pair, "native", training)
            found = outcome(layer, pair.xs(), pair.state(), pair.lengths())
            tensors = (found.ys, *found.state, *found.gradients, *layer.buffers())
            assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())


def test_inference_equals_training():
    for pair, training in itertools.product(PAIRS, (True, False)):
        layers = [made(pair, "native", training) for _ in range(2)]
        ys, after = layers[0].unroll(pair.xs(), pair.state(), pair.lengths())
        with torch.no_grad():
            quiet, state = layers[1].unroll(pair.xs(), pair.state(), pair.lengths())
        assert ys.requires_grad and not any(leaf.requires_grad for leaf in [quiet, *leaves(state)])
        compare([quiet, *leaves(state)], [ys, *leaves(after)], tolerance=0)
        compare(list(layers[1].buffers()), list(layers[0].buffers()), tolerance=0)


def test_one_row_is_rejected_in_training():
    pair = a_pair(batch=1)
    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            pair.layer(backend).unroll(pair.xs())
    check(pair, training=False)


class Doubled(an.BatchNorm):
    """A subclass that differs from the declaration of its base class."""

    def normalize(self, x, pooled):
        return 2 * super().normalize(x, pooled)


def test_overridden_batch_statistics_are_unsupported():
    layer: Any = an.LSTM(2, 3, norm="batch")
    assert "backend 'native'" in an.explain(layer)
    layer.norm_ih_l0.__class__ = Doubled
    assert "the norm at ih (Doubled): it overrides population, which has no native kernel" in an.explain(layer)
    gates: Any = an.LSTM(2, 3, norm="batch", placement={"gates": "per_gate"})
    assert "backend 'native'" in an.explain(gates)
    gates.norm_hh_l0.gates[1].eval()  # one gate with a population, the others with the batch
    assert "the norm at hh (PerGate): it overrides population" in an.explain(gates)
