"""The eager path that bypasses the dispatcher: modes, tracers and profilers still receive the operators."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import atn_norms as an
from atn_norms.backends.native.call import OPERATORS
from atn_norms.pytree import tree_map
from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import CELLS, EXACT, Pair, functional, needs_kernels, outcome

pytestmark = needs_kernels


class PassingDispatchMode(TorchDispatchMode):
    """Mode that calls every function unchanged."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassingFunctionMode(TorchFunctionMode):
    """Mode that calls every function unchanged."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A subclass of Tensor."""


@pytest.fixture
def operators(monkeypatch):
    """Count the calls of each operator."""
    calls = {"forward": 0, "backward": 0}

    def counted(name: str) -> Callable[..., Any]:
        operator = getattr(OPERATORS, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return operator(*args)

        return call

    for name in calls:
        monkeypatch.setattr(OPERATORS, name, counted(name))
    return calls


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("training", [True, False])
def test_an_eager_call_needs_no_operator(operators, cell, training):
    pair = Pair(cell, before=2, steps=3)
    with torch.set_grad_enabled(training):
        ys, _ = pair.layer("native").unroll(pair.xs(), pair.state())
        if training:
            ys.sum().backward()
    assert operators == {"forward": 0, "backward": 0}


LISTENERS = {
    "a dispatch mode": PassingDispatchMode,
    "a profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("who", LISTENERS)
def test_every_observer_receives_the_operators(operators, who):
    pair = Pair("gru", before=2, steps=3)
    layer, xs, state = pair.layer("native"), pair.xs(), pair.state()
    quiet, _ = layer.unroll(xs, state)
    with LISTENERS[who]():
        ys, _ = layer.unroll(xs, state)
        ys.sum().backward()
    assert operators == {"forward": 1, "backward": 1}
    compare(ys, quiet, tolerance=0)


def test_a_function_mode_receives_the_operator(operators):
    """In the backward pass the mode is off: torch disables it while it handles `backward`."""
    pair = Pair("gru", before=2, steps=3)
    layer, xs, state = pair.layer("native"), pair.xs(), pair.state()
    with PassingFunctionMode():
        ys, _ = layer.unroll(xs, state)
    assert operators["forward"] == 1
    compare(ys, layer.unroll(xs, state)[0], tolerance=0)


def test_traces_hold_the_operator():
    pair = Pair("lstm", steps=3, before=2, dtype=torch.float32)
    layer, xs, state = pair.layer("native").requires_grad_(False), pair.xs(), pair.state()
    traced: Any = torch.jit.trace(lambda x: layer.unroll(x, state)[0], xs, check_trace=False)
    assert "atn_norms::recurrent" in str(traced.graph)
    graph = make_fx(lambda x: layer.unroll(x, state)[0])(xs)
    assert torch.ops.atn_norms.recurrent.default in [node.target for node in graph.graph.nodes]


def test_function_transforms_call_no_operator(operators):
    """The rules for function transforms call the kernels themselves."""
    pair = Pair("tanh", steps=3)
    layer, xs = pair.layer("auto"), pair.xs()
    torch.func.grad(lambda x: layer(x)[0].sum())(xs)
    assert operators == {"forward": 0, "backward": 0}


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers with torch's negation bit set."""
    seen = torch._neg_view(-tensor)
    assert seen.is_neg() and seen.is_contiguous()
    return seen


def test_lazy_tensors_are_materialized():
    pair = Pair("gru", before=2, steps=3)
    layer, xs, state = pair.layer("native"), pair.xs(), pair.state()
    expected = layer.unroll(xs, state)
    other = tree_map(lambda leaf: negated(leaf) if leaf.is_floating_point() else leaf, state)
    for given in ((negated(xs), state), (xs, other)):
        compare(layer.unroll(*given), expected, tolerance=0)
    nothing = torch._efficientzerotensor(xs.shape, dtype=xs.dtype)
    compare(layer.unroll(nothing, state), layer.unroll(torch.zeros_like(xs), state), tolerance=0)


def test_a_tensor_subclass_uses_the_operator(operators):
    pair = Pair("gru", before=2, steps=3)
    layer, xs, state = pair.layer("native"), pair.xs(), pair.state()
    ys, _ = layer.unroll(xs.as_subclass(Own), state)
    assert operators["forward"] == 1
    compare(ys.as_subclass(torch.Tensor), layer.unroll(xs, state)[0], tolerance=0)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_layer_keeps_its_program_while_its_description_is_unchanged(backend):
    pair = Pair("gru", steps=3, options={"num_layers": 2})
    layer, xs = pair.layer(backend), pair.xs()
    first, kept = layer(xs)[0], dict(layer._programs)
    assert len(kept) == 2 and all(selected.program.name == "native" for selected in kept.values())
    pair.layer(backend)(xs[:2])
    layer(xs[:2, :1])
    with torch.no_grad():
        layer.eval()(xs)
    assert all(layer._programs[name] is selected for name, selected in kept.items())
    layer.norm_ih_l0.eps = 0.5
    assert (layer(xs)[0] - first).abs().max() > 1e-3
    assert layer._programs["_l0"] is not kept["_l0"]
    assert layer._programs["_l1"] is kept["_l1"]


def test_equal_layers_share_a_plan():
    first, second = (Pair("gru", steps=3, seed=seed).layer("native") for seed in (0, 1))
    programs = [layer._programs["_l0"].program for layer in (first, second)]
    assert programs[0].plan is programs[1].plan
    assert copy.deepcopy(first)._programs == {}


def test_lazy_gradients_are_materialized():
    pair = Pair("gru", steps=3)
    layer, xs = pair.layer("native"), pair.xs().requires_grad_()
    upstream = torch.randn(3, *layer(xs)[0].shape[1:], dtype=xs.dtype)
    for given in (negated(upstream), upstream.transpose(0, 1).contiguous().transpose(0, 1)):
        compare(*(torch.autograd.grad(layer(xs)[0], xs, g) for g in (given, upstream)), tolerance=0)


@pytest.mark.parametrize("training", [True, False])
def test_tensors_may_have_any_memory_layout(training):
    """Transposed, strided and expanded inputs, carried states and window states."""
    pair = Pair("lstm", before=4, batch=3, steps=4)
    layer, xs, state = pair.layer("native"), pair.xs(), pair.state()
    turned = tree_map(lambda leaf: leaf.clone().movedim(0, -1).contiguous().movedim(-1, 0), state)
    assert not turned[0][0][0][0].is_contiguous()
    with nullcontext() if training else torch.no_grad():
        compare(
            layer.unroll(xs.transpose(0, 1).contiguous().transpose(0, 1), turned), layer.unroll(xs, state), tolerance=0
        )


class Doubled(nn.Module):
    """Parametrization that doubles the numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def swapped(layer: Any) -> None:
    layer.norm_hh_l0 = an.RMSNorm(layer.norm_hh_l0.features).double()


def removed(layer: Any) -> None:
    del layer.norm_c_l0


def set_to_none(layer: Any) -> None:
    layer.norm_c_l0 = None


def shared(layer: Any) -> None:
    layer.norm_ih_l0 = layer.norm_hh_l0


def replaced(layer: Any) -> None:
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().flip(0))


def data(layer: Any) -> None:
    layer.weight_ih_l0.data = layer.weight_ih_l0.data.t().contiguous().t() * 3


def loaded(layer: Any) -> None:
    layer.load_state_dict({name: value + 0.5 for name, value in layer.state_dict().items()})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another eps": lambda layer: setattr(layer.norm_ih_l0, "eps", 0.5),
    "another norm": swapped,
    "no norm any more": removed,
    "a norm of None": set_to_none,
    "one norm for two sites": shared,
    "another parameter": replaced,
    "other data of a parameter": data,
    "a state dict": loaded,
    "a parametrized weight": lambda layer: parametrize.register_parametrization(layer, "weight_hh_l0", Doubled()),
    "a parametrized gain": lambda layer: parametrize.register_parametrization(layer.norm_hh_l0, "weight", Doubled()),
    "a weight norm": lambda layer: torch.nn.utils.weight_norm(layer, "weight_hh_l0"),
    "another type": lambda layer: layer.float(),
    "another type and back": lambda layer: layer.float().double(),
    "evaluation": lambda layer: layer.eval(),
    "a copy": copy.deepcopy,
    "a pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_calls_take_effect(change):
    pair = Pair("lstm", before=2, steps=3)
    found = []
    for backend in ("native", "reference"):
        layer = pair.layer(backend)
        outcome(layer, pair.xs(), pair.state())  # fill all caches of the layer
        with torch.no_grad():
            layer.unroll(pair.xs(), pair.state())
        made = CHANGES[change](layer)
        layer = made if isinstance(made, an.LSTM) else layer
        dtype = next(layer.parameters()).dtype
        state = tree_map(lambda leaf, d=dtype: leaf.to(d) if leaf.is_floating_point() else leaf, pair.state())
        if change in ("no norm any more", "a norm of None"):
            state = (((state[0][0][0], (*state[0][0][1][:2], ())),),)
        elif change == "another norm":
            state = None
        with torch.no_grad():
            quiet = layer.unroll(pair.xs().to(dtype), state)
        found.append((quiet, outcome(layer, pair.xs().to(dtype), state)))
    (quiet, native), (expected, reference) = found
    tolerance = EXACT if quiet[0].dtype == torch.float64 else 1e-5
    compare(quiet, expected, tolerance=tolerance)
    compare(native.gradients, reference.gradients, tolerance=tolerance, scale=level(*reference.gradients))
    before = pair.layer("reference").unroll(pair.xs(), pair.state())[0]
    same = ("another type and back", "another type", "evaluation", "a copy", "a pickle", "a weight norm")
    assert bool((before - expected[0]).abs().max() > 1e-3) == (change not in same)


def test_parameters_swapped_for_one_call_are_used_for_that_call():
    pair = Pair("gru", before=2, steps=3)
    layer, xs, state = pair.layer("native"), pair.xs(), pair.state()
    expected = layer.unroll(xs, state)
    others = {name: (2 * value).requires_grad_() for name, value in layer.state_dict().items()}

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, xs: torch.Tensor) -> Any:
            return self.layer.unroll(xs, state)

    named = {f"layer.{name}": value for name, value in others.items()}
    ys, _ = torch.func.functional_call(Unrolled(), named, (xs,))
    gradients = torch.autograd.grad(ys.sum(), list(others.values()))
    compare(layer.unroll(xs, state), expected, tolerance=0)
    layer.load_state_dict(others)
    ys, _ = layer.unroll(xs, state)
    compare(gradients, torch.autograd.grad(ys.sum(), list(layer.parameters())), tolerance=EXACT)


@pytest.mark.parametrize("biased", [True, False])
def test_second_derivatives_belong_to_their_arguments(biased):
    """Also if some arguments need no gradient, and without biases."""
    pair = Pair("gru", before=2, steps=3, options={"bias": biased})
    found = []
    for backend in ("native", "reference"):
        layer = pair.layer(backend)
        if biased:
            layer.bias_hh_l0.requires_grad_(False)
        wanted = [p for p in layer.parameters() if p.requires_grad]
        ys, after = layer.unroll(pair.xs(), pair.state())
        ends = [leaf for leaf in (ys, *leaves(after)) if leaf.is_floating_point()]
        first = torch.autograd.grad(functional(ends), wanted, create_graph=True)
        found.append((first, torch.autograd.grad(functional(first), wanted)))
    compare(found[0], found[1], tolerance=EXACT, scale=level(*found[1][1]))


def test_checkpoints_and_saved_tensor_hooks():
    pair = Pair("lstm", steps=3)
    layer, xs = pair.layer("native"), pair.xs().requires_grad_()
    expected = torch.autograd.grad(layer(xs)[0].sum(), xs)
    compare(
        torch.autograd.grad(checkpoint(lambda x: layer(x)[0], xs, use_reentrant=False).sum(), xs), expected, tolerance=0
    )
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.clone(), lambda t: t):
        ys = layer(xs)[0]
    assert len(packed) > len(list(layer.parameters()))
    compare(torch.autograd.grad(ys.sum(), xs), expected, tolerance=0)


def test_backward_after_an_in_place_change_is_an_error():
    pair = Pair("lstm", steps=3)
    layer, xs = pair.layer("native"), pair.xs()
    ys, _ = layer(xs)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_lengths_may_be_changed_before_backward(norm, backend):
    layer, xs = an.LSTM(2, 3, norm=norm, bidirectional=True, backend=backend), torch.randn(4, 3, 2)
    gradients = []
    for change in (0, 1):
        lengths = torch.tensor([4, 3, 1])
        ys, _ = layer.unroll(xs, lengths=lengths)
        lengths -= change
        gradients.append(torch.autograd.grad(ys.square().sum(), list(layer.parameters())))
    compare(gradients[1], gradients[0], tolerance=0)
