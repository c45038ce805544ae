"""torch.func, forward-mode AD and batched gradients: every transform gives the numbers of plain autograd."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import stirred
from tests.torch_api.features import feature

GROUP = "Function transforms"
SENTENCE = "The native backend has no rule for the transform, and `explain` prints that reason inside one."
CELLS: dict[str, Any] = {"lstm": an.LSTM, "gru": an.GRU, "rnn": an.RNN}
NORMS = ("layer", "rms", "batch")
EXACT = 1e-12

every_layer = pytest.mark.parametrize("cell", CELLS)
every_norm = pytest.mark.parametrize("norm", NORMS)


def layer_of(cell: str, norm: Any = "layer", **options: Any) -> Any:
    """A small float64 layer with random gains; batch norm in evaluation, where a call changes no buffer."""
    torch.manual_seed(0)
    made = stirred(CELLS[cell](2, 3, norm=norm, window=2, dtype=torch.float64, **options), 1)
    return made.eval() if norm == "batch" else made


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def jacobian(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The Jacobian of the output, row by row with plain autograd."""
    return torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)  # type: ignore[return-value]


def loss_of(layer: Any) -> Any:
    return lambda parameters, x: functional_call(layer, parameters, (x,))[0].square().sum()


def gradients_of(layer: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the same loss with plain autograd, which the native backend runs."""
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(layer(x)[0].square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        compare(found[name], gradient, tolerance=1e-10, what=name)


@feature(GROUP, "`torch.func.jvp`, `jacfwd`", "reference", SENTENCE)
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


@feature(GROUP, "`torch.autograd.forward_ad`", "reference", "A dual level counts as a transform.")
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


@feature(GROUP, "`torch.func.grad`, `vjp`", "reference", SENTENCE)
@every_norm
@every_layer
def test_grad_is_autograd(cell, norm, runs):
    layer, x = layer_of(cell, norm), numbers(4, 2, 2)
    expected, parameters = gradients_of(layer, x), {k: v.detach() for k, v in layer.named_parameters()}
    runs.clear()
    agree(grad(loss_of(layer))(parameters, x), expected)
    pull: Any = vjp(lambda p: loss_of(layer)(p, x), parameters)[1]
    agree(pull(torch.ones((), dtype=x.dtype))[0], expected)
    assert set(runs) == {"reference"}


@feature(GROUP, "`torch.func.vmap`", "reference", SENTENCE)
@every_norm
@every_layer
def test_vmap_is_a_loop(cell, norm, runs):
    layer, xs = layer_of(cell, norm), numbers(3, 4, 2, 2)
    lengths = torch.tensor([4, 1])
    expected = torch.stack([layer.unroll(x, lengths=lengths)[0] for x in xs])
    runs.clear()
    compare(vmap(lambda x: layer.unroll(x, lengths=lengths)[0])(xs), expected, tolerance=EXACT)
    assert set(runs) == {"reference"}


@feature(GROUP, "`vmap` over stacked models (ensembles)", "reference", SENTENCE)
@every_norm
@every_layer
def test_an_ensemble_is_a_loop_over_its_members(cell, norm):
    layers, x = [layer_of(cell, norm) for _ in range(3)], numbers(4, 2, 2)
    for seed, layer in enumerate(layers):
        stirred(layer, seed)
    parameters, buffers = torch.func.stack_module_state(layers)
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,))[0])(parameters, buffers)
    compare(found, torch.stack([layer(x)[0] for layer in layers]), tolerance=EXACT)


@feature(GROUP, "`vmap(grad)`: per-sample gradients", "reference", SENTENCE)
@every_norm
@every_layer
def test_per_sample_gradients_are_a_loop(cell, norm):
    layer, xs = layer_of(cell, norm), numbers(3, 4, 1, 2)
    each = [gradients_of(layer, x) for x in xs]
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    found = vmap(grad(loss_of(layer)), (None, 0))(parameters, xs)
    agree(found, {name: torch.stack([sample[name] for sample in each]) for name in each[0]})


@feature(GROUP, "`torch.func.jacrev`, `hessian`", "reference", SENTENCE)
@every_norm
@every_layer
def test_jacrev_and_hessian_are_autograd(cell, norm):
    layer, x = layer_of(cell, norm), numbers(2, 2, 2)
    compare(jacrev(lambda x: layer(x)[0])(x), jacobian(layer, x), tolerance=EXACT)
    scalar = lambda x: layer(x)[0].square().sum()  # noqa: E731
    compare(hessian(scalar)(x), torch.autograd.functional.hessian(scalar, x), tolerance=1e-10)


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


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_explain_names_the_transform_and_native_by_name_refuses_it(transform):
    layer, x = layer_of("lstm"), numbers(2, 2, 2)
    named = layer_of("lstm", backend="native")
    apply: dict[str, Any] = {
        "jvp": lambda f: jvp(f, (x,), (x,)),
        "grad": lambda f: grad(f)(x),
        "vmap": lambda f: vmap(f)(x),
    }
    texts = []

    def look(x):
        texts.append(an.explain(layer))
        return x.sum()

    apply[transform](look)
    assert "backend 'reference'" in texts[0] and "native: unsupported: it has no rule for torch.func" in texts[0]
    with pytest.raises(ValueError, match="'native' cannot run this layer: it has no rule for torch.func transforms"):
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


def test_a_graph_that_holds_the_operator_refuses_a_tangent():
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
    """Whatever torch's own layer answers, numbers or an error, ours answers too, in its first call."""
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
