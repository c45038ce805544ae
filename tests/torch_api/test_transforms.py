"""torch.func, forward-mode AD and batched gradients: every transform gives the numbers of plain autograd."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import stirred
from tests.torch_api.features import feature
from tests.traced.gallery import GallerySpec

GROUP = "Function transforms"
FORWARD = "The native backend has no rule for forward-mode AD, and `explain` gives this reason inside one."
EACH = "One call for each element."
CELLS: dict[str, Any] = {"lstm": an.LSTM, "gru": an.GRU, "rnn": an.RNN}
NORMS = ("layer", "rms", "batch")
EXACT = 1e-12

every_layer = pytest.mark.parametrize("cell", CELLS)
every_norm = pytest.mark.parametrize("norm", NORMS)


def layer_of(cell: str, norm: Any = "layer", **options: Any) -> Any:
    """Return a small float64 layer with random gains; batch norm is in evaluation, where a call changes no buffer."""
    torch.manual_seed(0)
    made = stirred(CELLS[cell](2, 3, norm=norm, window=2, dtype=torch.float64, **options), 1)
    return made.eval() if norm == "batch" else made


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def jacobian(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the Jacobian of the output, row by row with plain autograd."""
    return torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)  # type: ignore[return-value]


def loss_of(layer: Any) -> Any:
    return lambda parameters, x: functional_call(layer, parameters, (x,))[0].square().sum()


def gradients_of(layer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of the same loss with plain autograd, on the native backend."""
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(layer(x)[0].square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        compare(found[name], gradient, tolerance=1e-10, what=name)


@feature(GROUP, "`torch.func.jvp`, `jacfwd`", "reference", FORWARD)
@every_norm
@every_layer
def test_jvp_is_the_jacobian_times_the_tangent(cell, norm, runs):
    layer, x, tangent = layer_of(cell, norm), numbers(4, 2, 2), numbers(4, 2, 2).flip(0)
    expected = jacobian(layer, x)
    runs.clear()
    found = jvp(lambda x: layer(x)[0], (x,), (tangent,))[1]
    compare(found, torch.einsum("abcdef,def->abc", expected, tangent), tolerance=EXACT)
    compare(jacfwd(lambda x: layer(x)[0])(x), expected, tolerance=EXACT)
    assert set(runs) == {"reference"}


@feature(GROUP, "`torch.autograd.forward_ad`", "reference", "Inside a dual level.")
@every_norm
@every_layer
def test_forward_mode_propagates_tangents_of_inputs_and_parameters(cell, norm, runs):
    layer, x, tangent = layer_of(cell, norm), numbers(4, 2, 2), numbers(4, 2, 2).flip(0)
    expected = torch.einsum("abcdef,def->abc", jacobian(layer, x), tangent)
    gain = next(p for name, p in layer.named_parameters() if name.startswith("norm_ih"))
    runs.clear()
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))[0]).tangent
    compare(found, expected, tolerance=EXACT)
    name = next(name for name, p in layer.named_parameters() if p is gain)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(gain.detach(), torch.ones_like(gain))}
        moved = forward_ad.unpack_dual(functional_call(layer, dual, (x,))[0]).tangent
    assert set(runs) == {"reference"}
    step = 1e-6
    with torch.no_grad():
        ends = [functional_call(layer, {name: gain + sign * step}, (x,))[0] for sign in (1, -1)]
    compare(moved, (ends[0] - ends[1]) / (2 * step), tolerance=1e-7)  # central difference: step**2, and 1e-16 / step


@feature(GROUP, "`torch.func.grad`, `vjp`", "native")
@every_norm
@every_layer
def test_grad_is_autograd(cell, norm, runs):
    layer, x = layer_of(cell, norm), numbers(4, 2, 2)
    expected, parameters = gradients_of(layer, x), {k: v.detach() for k, v in layer.named_parameters()}
    runs.clear()
    agree(grad(loss_of(layer))(parameters, x), expected)
    pull: Any = vjp(lambda p: loss_of(layer)(p, x), parameters)[1]
    agree(pull(torch.ones((), dtype=x.dtype))[0], expected)
    assert set(runs) == {"native"}


@feature(
    GROUP, "`torch.func.vmap` over inputs and states", "native", "One call for all elements; batch norm: one each."
)
@every_norm
@every_layer
def test_vmap_is_a_loop(cell, norm, runs):
    layer, xs = layer_of(cell, norm), numbers(3, 4, 2, 2)
    lengths = torch.tensor([4, 1])
    expected = torch.stack([layer.unroll(x, lengths=lengths)[0] for x in xs])
    runs.clear()
    compare(vmap(lambda x: layer.unroll(x, lengths=lengths)[0])(xs), expected, tolerance=EXACT)
    assert dict(runs) == {"native": 3 if norm == "batch" else 1}
    compare(vmap(lambda x: layer(x)[0], 2, 2)(xs), torch.stack([layer(x)[0] for x in xs.unbind(2)], 2), tolerance=EXACT)
    assert vmap(lambda x: layer(x)[0])(xs[:0]).shape == (0, 4, 2, 3)


@pytest.mark.parametrize("shared", [False, True])
@every_norm
@every_layer
def test_vmap_continues_streams(cell, norm, shared):
    """The state is mapped with the inputs, or shared by all elements."""
    layer, xs = layer_of(cell, norm, num_layers=2), numbers(3, 4, 2, 2)

    def stream(x, state=None):
        _, state = layer.unroll(x[:2], state)
        return layer.unroll(x[2:], state)

    begun = layer.unroll(numbers(2, 2, 2))[1] if shared else None
    each = [stream(x, begun) for x in xs]
    found = vmap(lambda x: stream(x, begun))(xs)
    compare(found, tree_map(lambda *leaves: torch.stack(leaves), *each), tolerance=EXACT)


@feature(GROUP, "`vmap` over stacked models (ensembles)", "native", EACH)
@every_norm
@every_layer
def test_an_ensemble_is_a_loop_over_its_members(cell, norm, runs):
    layers, x = [layer_of(cell, norm) for _ in range(3)], numbers(4, 2, 2)
    for seed, layer in enumerate(layers):
        stirred(layer, seed)
    parameters, buffers = torch.func.stack_module_state(layers)
    expected = torch.stack([layer(x)[0] for layer in layers])
    runs.clear()
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,))[0])(parameters, buffers)
    compare(found, expected, tolerance=EXACT)
    assert dict(runs) == {"native": 3}


@pytest.mark.parametrize("max_steps", [None, 3])
@every_layer
def test_an_ensemble_in_training_updates_the_population_of_each_member(cell, max_steps):
    norm, x = {"kind": "batch", "max_steps": max_steps}, numbers(4, 5, 2)
    layers = [stirred(layer_of(cell, norm), seed).train() for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}

    def loss(parameters, buffers):
        return functional_call(layers[0], (parameters, buffers), (x,))[0].square().sum(), buffers

    found, updated = vmap(grad(loss, has_aux=True))(parameters, buffers)
    each = [gradients_of(layer, x) for layer in layers]
    agree(found, {name: torch.stack([member[name] for member in each]) for name in found})
    agree(updated, {name: torch.stack([dict(layer.named_buffers())[name] for layer in layers]) for name in updated})


@feature(GROUP, "`vmap(grad)`: per-sample gradients", "native", EACH)
@every_norm
@every_layer
def test_per_sample_gradients_are_a_loop(cell, norm, runs):
    layer, xs = layer_of(cell, norm), numbers(3, 4, 1, 2)
    each = [gradients_of(layer, x) for x in xs]
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    runs.clear()
    found = vmap(grad(loss_of(layer)), (None, 0))(parameters, xs)
    agree(found, {name: torch.stack([sample[name] for sample in each]) for name in each[0]})
    assert dict(runs) == {"native": 6}


@every_norm
@every_layer
def test_gradients_cross_a_vmap(cell, norm, runs):
    """With an outer transform and with plain autograd, through inputs, parameters and constants."""
    layer, xs = layer_of(cell, norm), numbers(3, 4, 2, 2)
    expected = gradients_of(layer, torch.cat(xs.unbind(0), 1)) if norm != "batch" else None
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    found = grad(lambda p: vmap(loss_of(layer), (None, 0))(p, xs).sum())(parameters)
    each = [gradients_of(layer, x) for x in xs]
    agree(found, {name: sum(sample[name] for sample in each) for name in each[0]})  # type: ignore[misc]
    if expected is not None:
        agree(found, expected)
    runs.clear()
    total = vmap(lambda x: layer(x)[0])(xs).square().sum()
    agree(dict(zip(parameters, torch.autograd.grad(total, list(layer.parameters())), strict=True)), found)
    assert set(runs) == {"native"}

    def unmapped(x):
        return vmap(lambda factor: factor * layer(x)[0].square().sum())(torch.ones(2, dtype=x.dtype)).sum()

    compare(grad(unmapped)(xs[0]), 2 * grad(lambda x: layer(x)[0].square().sum())(xs[0]), tolerance=EXACT)


@feature(GROUP, "`torch.func.jacrev`", "native", EACH)
@every_norm
@every_layer
def test_jacrev_is_autograd(cell, norm, runs):
    layer, x = layer_of(cell, norm), numbers(2, 2, 2)
    expected = jacobian(layer, x)
    runs.clear()
    compare(jacrev(lambda x: layer(x)[0])(x), expected, tolerance=EXACT)
    assert dict(runs) == {"native": 1 + expected[..., 0, 0, 0].numel()}


@feature(
    GROUP,
    "`torch.func.hessian`, `grad` of `grad`",
    "reference, native first gradients of `grad`",
    "`hessian` is forward over reverse.",
)
@every_norm
@every_layer
def test_second_derivatives_are_autograd(cell, norm):
    layer, x = layer_of(cell, norm), numbers(2, 2, 2)
    scalar = lambda x: layer(x)[0].square().sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(scalar, x)
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(grad(f))):
        compare(transform(scalar)(x), expected, tolerance=1e-10)
    twice = grad(lambda x: grad(scalar)(x).square().sum())(x)
    compare(twice, 2 * torch.einsum("abcdef,abc->def", expected, grad(scalar)(x)), tolerance=1e-10)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    found = grad(lambda p: grad(loss_of(layer), 1)(p, x).square().sum())(parameters)
    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), list(layer.parameters()), allow_unused=True)
    for (name, given), gradient in zip(found.items(), second, strict=True):
        compare(given, torch.zeros_like(given) if gradient is None else gradient, tolerance=1e-10, what=name)


OTHERS: dict[str, dict[str, Any]] = {
    "no bias": {"bias": False},
    "shift": {"norm": {"kind": "rms", "bias": True}},
    "one site": {"norm": {"sites": {"hh": "layer"}}},
    "traced": {"norm": GallerySpec(name="LearnablePower")},
    "traced, two statistics": {"norm": GallerySpec(name="TwoSided")},
    "two layers": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("options", OTHERS)
@every_layer
def test_transforms_take_every_argument_of_the_operator(cell, options, runs):
    layer, xs = layer_of(cell, **OTHERS[options]), numbers(3, 4, 1, 2)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    each = [gradients_of(layer, x) for x in xs]
    found = vmap(grad(loss_of(layer)), (None, 0))(parameters, xs)
    agree(found, {name: torch.stack([sample[name] for sample in each]) for name in each[0]})
    scalar = lambda x: layer(x)[0].square().sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(scalar, xs[0])
    assert set(runs) == {"native", "reference"}  # the second derivative
    compare(jacrev(jacrev(scalar))(xs[0]), expected, tolerance=1e-10)
    compare(vmap(lambda x: layer(x)[0])(xs), torch.stack([layer(x)[0] for x in xs]), tolerance=EXACT)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_layer
def test_transforms_keep_the_types_of_mixed_precision(cell, dtype, autocast):
    layer = layer_of(cell).to(dtype)
    xs = numbers(3, 4, 2, 2).to(torch.bfloat16)
    if not autocast:
        xs = xs.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = torch.stack([layer(x)[0] for x in xs])
        found = vmap(lambda x: layer(x)[0])(xs)
        slopes = vmap(grad(lambda x: layer(x)[0].float().square().sum()))(xs)
    # other batches are summed in another order, a few roundings a step
    tolerance = 8 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert found.dtype == (torch.bfloat16 if autocast else dtype)
    compare(found.float(), expected.float(), tolerance=tolerance)
    leaf = xs.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total = torch.stack([layer(x)[0].float().square().sum() for x in leaf]).sum()
    compare(slopes, torch.autograd.grad(total, leaf)[0], tolerance=tolerance)


@feature(
    GROUP,
    "`is_grads_batched=True`, `vectorize=True`",
    "native forward, reference backward",
    "The backward pass of the native operator has no batched form.",
)
@every_norm
@every_layer
def test_batched_gradients_are_single_ones(cell, norm):
    layer, x = layer_of(cell, norm), numbers(3, 2, 2).requires_grad_()
    expected = jacobian(layer, x)
    y = layer(x)[0]
    basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    found = torch.autograd.grad(y, x, basis, is_grads_batched=True)[0]
    assert not found.requires_grad
    compare(found.view(*y.shape, *x.shape), expected, tolerance=EXACT)
    for strategy in ("reverse-mode", "forward-mode"):
        f = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x, vectorize=True, strategy=strategy)
        compare(f, expected, tolerance=EXACT)


@every_norm
@every_layer
def test_differentiable_gradients_inside_autocast_are_computed_in_the_type_of_the_layer(cell, norm):
    layer, x = layer_of(cell, norm).float(), numbers(5, 4, 2).float().requires_grad_()
    y = layer(x)[0]
    basis = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(3))
    expected = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in basis]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batched = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)[0]
        differentiable = torch.autograd.grad(y, x, basis[0], create_graph=True)[0]
    compare(batched, torch.stack(expected), tolerance=1e-5)
    compare(differentiable.detach(), expected[0], tolerance=1e-5)


@pytest.mark.parametrize("transform", ["jvp", "jvp of grad", "functionalize"])
def test_explain_names_the_transform_and_native_by_name_rejects_it(transform):
    layer, x = layer_of("lstm"), numbers(2, 2, 2)
    named = layer_of("lstm", backend="native")
    reason = "it has rules for vmap" if transform == "functionalize" else "it has no rule for forward-mode AD"
    apply: dict[str, Any] = {
        "jvp": lambda f: jvp(f, (x,), (x,)),
        "jvp of grad": lambda f: jvp(grad(f), (x,), (x,)),
        "functionalize": lambda f: functionalize(f)(x),
    }
    texts = []

    def look(x):
        texts.append(an.explain(layer))
        return x.sum()

    apply[transform](look)
    assert "backend 'reference'" in texts[0] and f"native: unsupported: {reason}" in texts[0]
    with pytest.raises(ValueError, match=f"'native' cannot run this layer: {reason}"):
        apply[transform](lambda x: named(x.reshape(-1, 2, 2))[0].sum())


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_a_compiled_transform_keeps_its_numbers(transform):
    torch._dynamo.reset()
    layer, x = layer_of("gru"), numbers(2, 2, 2)
    apply: dict[str, Any] = {
        "jvp": lambda x: jvp(lambda x: layer(x)[0], (x,), (x.flip(0),))[1],
        "grad": grad(lambda x: layer(x)[0].square().sum()),
        "vmap": lambda x: vmap(lambda x: layer(x)[0])(torch.stack([x, 2 * x])),
    }
    found = torch.compile(apply[transform], backend="eager", fullgraph=True)(x)
    compare(found, apply[transform](x), tolerance=EXACT)


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad"])
def test_a_traced_transform_holds_the_operator(transform):
    layer, xs = layer_of("gru").requires_grad_(False), numbers(3, 4, 2, 2)
    loss = lambda x: layer(x)[0].square().sum()  # noqa: E731
    apply: Any = {"grad": lambda xs: grad(loss)(xs[0]), "vmap": vmap(loss), "vmap of grad": vmap(grad(loss))}[transform]
    graph = make_fx(apply)(xs)
    assert any("atn_norms.recurrent" in str(node.target) for node in graph.graph.nodes)
    compare(graph(2 * xs), apply(2 * xs), tolerance=EXACT)


def test_a_graph_that_holds_the_operator_rejects_a_tangent():
    """A graph made without a transform holds the native operator; a tangent would be dropped."""
    layer, x = layer_of("lstm").requires_grad_(False), numbers(2, 2, 2)
    graph = make_fx(lambda x: layer(x)[0])(x)
    compare(graph(x), layer(x)[0], tolerance=0)
    with pytest.raises(RuntimeError, match="got a call under forward-mode AD; expected a call of the layer itself"):
        jvp(graph, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="under forward-mode AD"):
        graph(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("cell", CELLS)
def test_transforms_of_a_layer_without_a_norm_are_torch_s(cell):
    """Our layer gives the numbers or the error of torch's layer, in its first call."""
    theirs = getattr(torch.nn, cell.upper())(2, 3, dtype=torch.float64)
    x = numbers(4, 2, 2)

    def answers(layer):
        transforms: dict[str, Any] = {
            "grad": lambda: grad(lambda x: layer(x)[0].sum())(x),
            "jvp": lambda: jvp(lambda x: layer(x)[0], (x,), (x,))[1],
            "vmap": lambda: vmap(lambda x: layer(x)[0])(torch.stack([x, x])),
            "vmap(grad)": lambda: vmap(grad(lambda x: layer(x)[0].sum()))(torch.stack([x, x])),
        }
        results = {}
        for name, transform in transforms.items():
            try:
                results[name] = transform()
            except Exception as error:  # noqa: BLE001  (torch's error is the expected answer)
                results[name] = f"{type(error).__name__}: {error}"
        return results

    ours = CELLS[cell](2, 3, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    expected = answers(theirs)
    for name, answer in answers(ours).items():
        if isinstance(expected[name], str):
            assert answer == expected[name]
        else:
            compare(answer, expected[name], tolerance=EXACT)
