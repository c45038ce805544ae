"""A sequence cut anywhere continues from its state on either backend."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import CELLS, EXACT, Pair, functional, needs_kernels, pairs

pytestmark = needs_kernels


def in_segments(pair, backends, cuts, lengths=None):
    """Run segments on one backend each, and compute gradients through all segments."""
    layers = [pair.layer(backend) for backend in backends]
    xs, state, parts = pair.xs().requires_grad_(), None, []
    edges = [0, *cuts, pair.steps]
    for layer, start, end in zip(layers, edges, edges[1:], strict=False):
        seen = None if lengths is None else (lengths - start).clamp(0, end - start)
        ys, state = layer.unroll(xs[start:end], state, seen)
        parts.append(ys)
    ys = torch.cat(parts)
    ends = [ys, *(leaf for leaf in leaves(state) if leaf.is_floating_point())]
    found = torch.autograd.grad(functional(ends), [xs, *(p for layer in layers for p in layer.parameters())])
    many = len(list(layers[0].parameters()))
    shared = [torch.stack(found[1 + i :: many]).sum(0) for i in range(many)]
    return ys, leaves(state), [found[0], *shared]


@given(pairs(before=None, steps=9), st.integers(1, 8), st.sampled_from(["native", "reference"]), st.booleans())
def test_segments_equal_the_whole_on_any_backend(pair: Pair, cut, first, other):
    pair = replace(pair, options=pair.options | {"bidirectional": False, "batch_first": False})
    second = {"native": "reference", "reference": "native"}[first] if other else first
    ys, state, found = in_segments(pair, [first, second], [cut], pair.lengths())
    whole, final, expected = in_segments(pair, ["reference"], [], pair.lengths())
    compare(ys, whole, tolerance=EXACT)
    compare(state, final, tolerance=EXACT)
    compare(found, expected, tolerance=EXACT, scale=level(*expected))


@pytest.mark.parametrize("window", ["2", "4", "cumulative", "exponential"])
@pytest.mark.parametrize("cell", CELLS)
def test_single_steps_and_alternating_backends(cell, window):
    pair = Pair(cell, window=window, steps=9, batch=3, hidden=5)
    backends = ["native", "reference"] * 5
    ys, state, found = in_segments(pair, backends[:9], range(1, 9))
    whole, final, expected = in_segments(pair, ["native"], [])
    compare(ys, whole, tolerance=EXACT)
    compare(state, final, tolerance=EXACT)
    compare(found, expected, tolerance=EXACT, scale=level(*expected))


@pytest.mark.parametrize("window", ["1", "4", "exponential"])
def test_streaming_without_a_graph(window):
    # In float64: a single row sums its products in another order than a sequence.
    pair = Pair(window=window, steps=12, batch=1, hidden=17)
    layer, state, parts = pair.layer("native"), None, []
    with torch.no_grad():
        for x in pair.xs().split(1):
            ys, state = layer.unroll(x, state)
            assert not any(leaf.requires_grad for leaf in [ys, *leaves(state)])
            parts.append(ys)
        compare(torch.cat(parts), layer.unroll(pair.xs())[0], tolerance=EXACT)


def test_rows_of_a_state_may_be_reordered_and_repeated():
    pair = Pair("gru", batch=3, steps=4, hidden=5, before=6)
    layer, order = pair.layer("native"), torch.tensor([2, 0, 0, 1])
    ys, after = layer.unroll(pair.xs()[:, order], an.reorder(pair.state(), order))
    expected, final = layer.unroll(pair.xs(), pair.state())
    compare(ys, expected[:, order], tolerance=EXACT)
    compare(leaves(after), leaves(an.reorder(final, order)), tolerance=EXACT)


def test_a_state_keeps_its_type_and_shape():
    for per_gate in (False, True):
        for dtype in (torch.float32, torch.float64):
            pair = Pair(per_gate=per_gate, dtype=dtype, before=2)
            native, reference = (leaves(pair.layer(b).unroll(pair.xs())[1]) for b in ("native", "reference"))
            assert [(x.shape, x.dtype) for x in native] == [(x.shape, x.dtype) for x in reference]
