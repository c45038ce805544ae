"""Gradients by result, source and memory layout; and gradients of gradients."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

import atn_norms as an
from atn_norms.pytree import tree_map
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import (
    CELLS,
    EXACT,
    WINDOWS,
    Pair,
    functional,
    needs_kernels,
    open_state,
    outcome,
    pairs,
)
from tests.traced.gallery import GallerySpec

pytestmark = needs_kernels

WANTED = ("xs", "weight_ih", "weight_hh", "bias", "norm", "carried", "window")


def split(opened, state):
    """Return the leaves of an open state of one cell: carried tensors, and tensors of windows."""
    many = len(state[0][0][0])
    return opened[:many], opened[many:]


@pytest.mark.parametrize("window", ["4", "cumulative"])
@pytest.mark.parametrize("wanted", [w for n in range(8) for w in itertools.combinations(WANTED, n)])
def test_every_subset_of_requires_grad(wanted, window):
    pair = Pair(cell=list(CELLS)[len(wanted) % 4], window=window, batch=2, steps=3, before=3)
    results = []
    for backend in ("native", "reference"):
        layer, xs = pair.layer(backend), pair.xs()
        state, opened = open_state(pair.state())
        groups = dict.fromkeys(WANTED, ()) | dict(zip(("carried", "window"), split(opened, state), strict=True))
        groups |= {"xs": (xs,), "norm": [p for name, p in layer.named_parameters() if "norm" in name]}
        for name in ("weight_ih", "weight_hh", "bias"):
            groups[name] = [p for full, p in layer.named_parameters() if full.startswith(name)]
        for name, tensors in groups.items():
            for tensor in tensors:
                tensor.requires_grad_(name in wanted)
        ys, after = layer.unroll(xs, state)
        assert ys.requires_grad == bool(wanted)
        sources = [tensor for name in wanted for tensor in groups[name]]
        ends = [ys, *(leaf for leaf in leaves(after) if leaf.is_floating_point())]
        found = torch.autograd.grad(functional(ends), sources) if sources else ()
        results.append((ys, leaves(after), found))
    (ys, after, found), (ys_expected, after_expected, expected) = results
    compare(ys, ys_expected, tolerance=EXACT)
    compare(after, after_expected, tolerance=EXACT)
    compare(found, expected, tolerance=EXACT, scale=level(*expected))


@pytest.mark.parametrize("window", ["1", "4", "cumulative", "exponential"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_from_each_result_alone(cell, window):
    """Outputs, last hidden states and every statistic of a window, one at a time; the other gradients are absent."""
    pair = Pair(cell, window=window, batch=3, steps=5, ragged=True, before=2, seed=5)
    runs = []
    for backend in ("native", "reference"):
        layer, xs = pair.layer(backend), pair.xs().requires_grad_()
        state, opened = open_state(pair.state())
        ys, after = layer.unroll(xs, state, pair.lengths())
        (carried, norms) = after[0][0]
        ends = [ys, *carried, *(leaf for _, (_, statistic) in norms for leaf in statistic if leaf.numel())]
        runs.append((ends, [xs, *layer.parameters(), *opened]))
    for place in range(len(runs[0][0])):
        found, expected = (
            torch.autograd.grad(functional([ends[place]]), wanted, retain_graph=True, allow_unused=True)
            for ends, wanted in runs
        )
        found, expected = (
            [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
            for grads, (_, wanted) in zip((found, expected), runs, strict=True)
        )
        compare(found, expected, tolerance=EXACT, scale=level(*expected), what=f"result {place}")


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "one row": lambda x: x[:, :1].expand(x.shape),
    "one step": lambda x: x[:1].expand(x.shape),
    "one number": lambda x: x[:1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_any_layout_in_memory(cell, layout):
    """Strided and expanded inputs, initial states, weights and output gradients."""
    pair = Pair(cell, batch=3, steps=4, inputs=3, hidden=5, before=3)
    shaped, results = LAYOUTS[layout], []
    for backend in ("native", "reference"):
        layer, base = pair.layer(backend), pair.xs().requires_grad_()
        owned = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        laid = {
            name: p.t().contiguous().t() if p.ndim == 2 else p.repeat_interleave(2)[::2] for name, p in owned.items()
        }
        (carried, norms) = pair.state()[0][0]
        carried = tuple(c[:1].expand(c.shape) for c in carried)
        xs = shaped(base)
        ys, after = functional_call(
            Unrolled(layer), {"layer." + k: v for k, v in laid.items()}, (xs, (((carried, norms),),))
        )
        h = after[0][0][0][0]
        grads = shaped(pair.draw(*ys.shape)), torch.ones(()).double().expand(h.shape)
        found = torch.autograd.grad([ys, h], [base, *owned.values()], grads)
        results.append((ys, found))
    (ys, found), (expected, gradients) = results
    compare(ys, expected, tolerance=EXACT)
    compare(found, gradients, tolerance=EXACT, scale=level(*gradients))


class Unrolled(torch.nn.Module):
    """Module whose `forward` is `unroll`, for functional calls."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *given):
        return self.layer.unroll(*given)


@given(pairs(hidden=3, batch=2, inputs=2), st.integers(1, 4))
def test_gradients_of_gradients(pair: Pair, steps):
    """Gradient penalty: the gradient of a functional of all gradients."""
    pair = Pair(**(vars(pair) | {"steps": steps}))
    results = []
    for backend in ("native", "reference"):
        layer, given = pair.layer(backend), (pair.xs(), pair.state(), pair.lengths())
        once = outcome(layer, *given, retain=True)
        penalty = functional([g for g in once.gradients if g.requires_grad])
        again = torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True)
        results.append(
            (once, [torch.zeros_like(p) if g is None else g for g, p in zip(again, layer.parameters(), strict=True)])
        )
    (once, twice), (expected, expected_twice) = results
    compare(once.gradients, expected.gradients, tolerance=EXACT, scale=level(*expected.gradients))
    compare(twice, expected_twice, tolerance=EXACT, scale=level(*expected_twice))


@pytest.mark.parametrize(
    ("cell", "window", "per_gate"),
    [("lstm", "4", False), ("gru", "cumulative", True), ("tanh", "exponential", False), ("relu", "1", False)],
)
def test_gradgradcheck(cell, window, per_gate):
    pair = Pair(cell, window=window, per_gate=per_gate, batch=2, steps=3, before=2, ragged=True)
    layer, lengths = pair.layer("native"), pair.lengths()
    state, opened = open_state(pair.state())
    names = [name for name, _ in layer.named_parameters()]

    def run(xs, *given):
        parameters = {"layer." + name: tensor for name, tensor in zip(names, given, strict=True)}
        ys, after = functional_call(Unrolled(layer), parameters, (xs, state, lengths))
        return ys, *after[0][0][0]

    given = [pair.xs().requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert opened
    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_weights_that_depend_on_the_input_differentiate_twice():
    """Every gradient of the operator is a partial derivative, even if one argument is a function of another."""
    pair, results = Pair(steps=3), []
    for backend in ("native", "reference"):
        layer, xs = pair.layer(backend), pair.xs().requires_grad_()
        parameters = {"layer." + name: p * (1 + xs.sum() / 9) for name, p in layer.named_parameters()}
        ys, _ = functional_call(Unrolled(layer), parameters, (xs,))
        (once,) = torch.autograd.grad(functional([ys]), xs, create_graph=True)
        results.append((once, torch.autograd.grad(functional([once]), xs)[0]))
    (once, twice), (expected, expected_twice) = results
    compare(once, expected, tolerance=EXACT, scale=level(expected))
    compare(twice, expected_twice, tolerance=EXACT, scale=level(expected_twice))


@pytest.mark.parametrize("half_life", [1e-3, 9e-4, 1e-300])
def test_a_window_that_forgets_at_once_differentiates_twice(half_life):
    found = []
    for window in ({"kind": "exponential", "half_life": half_life}, 1):
        torch.manual_seed(0)
        layer = an.RNN(2, 3, norm="layer", window=window, dtype=torch.float64, backend="native")
        xs = torch.linspace(-1, 2, 16, dtype=torch.float64).reshape(4, 2, 2).requires_grad_()
        (first,) = torch.autograd.grad(layer(xs)[0].square().sum(), xs, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), xs)[0])
    compare(*found, tolerance=EXACT, scale=level(found[1]))


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("window", ["4", "exponential"])
def test_weights_of_a_state_have_no_gradient_in_any_backend(norm, window):
    """Weights are numbers of samples; their gradients would differ between backends."""
    xs = torch.randn(4, 3, 2, dtype=torch.float64)
    for backend in ("native", "reference"):
        layer = an.LSTM(2, 3, norm=norm, window=WINDOWS[window], backend=backend, dtype=torch.float64)
        _, state = layer.unroll(xs)
        (carried, ((index, (weights, leaves)), *others)) = state[0][0]
        weights = weights.detach().clone().requires_grad_()
        opened = (((carried, ((index, (weights, leaves)), *others)),),)
        ys, after = layer.unroll(xs, opened)
        (found,) = torch.autograd.grad(ys.sum(), [weights], allow_unused=True)
        assert found is None
        assert not after[0][0][1][0][1][0].requires_grad


@pytest.mark.parametrize("norm", ["layer", "batch", GallerySpec(name="TwoSided")], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_state_requires_gradients_where_that_of_the_reference_does(norm, window):
    """For example, no state of a detached window has a gradient."""
    flags = []
    for backend in ("native", "reference"):
        layer = an.LSTM(2, 3, norm=norm, window=WINDOWS[window], backend=backend)
        _, state = layer.unroll(torch.randn(4, 3, 2))
        _, after = layer.unroll(torch.randn(2, 3, 2), state)
        leaf_state = tree_map(lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), state)
        _, of_leaves = layer.unroll(torch.randn(2, 3, 2), leaf_state)
        every = [leaf for each in (state, after, of_leaves) for leaf in leaves(each)]
        flags.append([leaf.requires_grad for leaf in every if leaf.numel()])
    assert flags[0] == flags[1]
    if window.startswith("detached"):
        assert sum(flags[0]) == 6  # h and c, three times
