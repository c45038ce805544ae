"""A sequence cut anywhere continues from its state on any backend."""

import pytest
import torch

import atn_norms as an
from atn_norms.backends.native.library import unavailable
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import CELLS, EXACT, PLAIN_WINDOWS, Pair, functional
from tests.native.test_hidden import hiding
from tests.triton.strategies import made, moved, needs_triton, outcome, place

pytestmark = needs_triton

TURNS = ["triton", "reference"] if unavailable() else ["triton", "native", "reference"]


def in_segments(pair, backends, cuts):
    """Run segments on one backend each, and compute gradients through all segments."""
    layers = [made(pair, backend) for backend in backends]
    xs, lengths, state, parts = pair.xs().requires_grad_(), pair.lengths(), None, []
    edges = [0, *cuts, pair.steps]
    for backend, layer, start, end in zip(backends, layers, edges, edges[1:], strict=False):
        seen = None if lengths is None else (lengths - start).clamp(0, end - start)
        ys, state = layer.unroll(*(moved(tree, place(backend)) for tree in (xs[start:end], state, seen)))
        parts.append(ys.cpu())
    ys, state = torch.cat(parts), moved(state, "cpu")
    ends = [ys, *(leaf for leaf in leaves(state) if leaf.is_floating_point())]
    found = torch.autograd.grad(functional(ends), [xs, *(p for layer in layers for p in layer.parameters())])
    many = len(list(layers[0].parameters()))
    shared = [torch.stack([g.cpu() for g in found[1 + i :: many]]).sum(0) for i in range(many)]
    return ys, leaves(state), [found[0], *shared]


CUTS = [[4], [1, 2], [3, 8], [2, 4, 6], [1, 5, 6]]
CASES = [(cell, window) for cell in CELLS for window in PLAIN_WINDOWS]
SOME = {("lstm", "4"), ("gru", "100"), ("tanh", "exponential"), ("lstm", "cumulative"), ("relu", "2")}


@pytest.mark.parametrize(
    ("cell", "window"), [pytest.param(*case, marks=[] if case in SOME else pytest.mark.deep) for case in CASES]
)
def test_segments_equal_the_whole_on_any_backend(cell, window):
    number = CASES.index((cell, window))
    cuts = CUTS[number % len(CUTS)]
    pair = Pair(cell, "layer", window, hidden=5, batch=3, steps=9, seed=number, ragged=number % 2 == 0)
    backends = [TURNS[(number + turn) % len(TURNS)] for turn in range(len(cuts) + 1)]
    ys, state, found = in_segments(pair, backends, cuts)
    whole, final, expected = in_segments(pair, ["reference"], [])
    compare(ys, whole, tolerance=EXACT)
    compare(state, final, tolerance=EXACT)
    compare(found, expected, tolerance=EXACT, scale=level(*expected))


@pytest.mark.parametrize("window", ["1", "4", "exponential"])
def test_streaming_without_a_graph(window):
    pair = Pair(window=window, steps=9, batch=1, hidden=17)
    layer, state, parts = made(pair), None, []
    xs = moved(pair.xs(), place("triton"))
    with torch.no_grad():
        for x in xs.split(1):
            ys, state = layer.unroll(x, state)
            assert not any(leaf.requires_grad for leaf in [ys, *leaves(state)])
            parts.append(ys)
        compare(torch.cat(parts), layer.unroll(xs)[0], tolerance=EXACT)


def test_rows_of_a_state_may_be_reordered_and_repeated():
    pair = Pair("gru", batch=3, steps=4, hidden=5, before=6)
    device = place("triton")
    layer, order = made(pair), torch.tensor([2, 0, 0, 1], device=device)
    xs, state = moved(pair.xs(), device), moved(pair.state(), device)
    ys, after = layer.unroll(xs[:, order], an.reorder(state, order))
    expected, final = layer.unroll(xs, state)
    compare(ys, expected[:, order], tolerance=EXACT)
    compare(leaves(after), leaves(an.reorder(final, order)), tolerance=EXACT)


@pytest.mark.parametrize("window", ["1", "4", "cumulative"])
def test_a_state_keeps_its_type_and_shape(window):
    for dtype in (torch.float32, torch.float64):
        pair = Pair(window=window, norm="mixed", dtype=dtype, before=2)
        found = leaves(made(pair).unroll(moved(pair.xs(), place("triton")))[1])
        expected = leaves(made(pair, "reference").unroll(pair.xs())[1])
        assert [(leaf.shape, leaf.dtype) for leaf in found] == [(leaf.shape, leaf.dtype) for leaf in expected]


@pytest.mark.parametrize(
    ("window", "before", "hidden"),
    [("4", 2, None), ("4", 5, 1), ("100", 3, 97), ("cumulative", 0, None), ("exponential", 0, None)],
)
def test_masked_entries_are_not_read(window, before, hidden):
    """Statistics of weight 0 are masked in values and in gradients."""
    pair, results = Pair("gru", "layer", window, batch=4, steps=7, before=before, seed=2), []
    for backend, what in (("triton", 0.0), ("triton", float("nan")), ("reference", float("inf"))):
        found = outcome(made(pair, backend), pair.xs(), hiding(pair, hidden, what))
        results.append((found.ys, found.gradients))
    (clean, slopes), (ys, gradients), (expected, others) = results
    compare([ys, gradients], [clean, slopes], tolerance=0)
    compare(ys, expected, tolerance=EXACT)
    compare(gradients, others, tolerance=EXACT, scale=level(*others))
