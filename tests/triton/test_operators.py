"""The operators in torch: schema, fakes, compilation, second gradients, and unwritten memory."""

import pytest
import torch

from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import EXACT, Pair, agree, functional
from tests.native.test_operators import Recorded, poisoned
from tests.native.test_safety import fuzzed
from tests.triton.strategies import made, moved, needs_triton, outcome, place

pytestmark = needs_triton
__all__ = ["poisoned"]  # a fixture

PAIRS = [
    Pair("lstm", "layer", "4", ragged=True, before=2),
    Pair("gru", "rms", "cumulative", dtype=torch.float32),
    Pair("tanh", "shifted", "exponential", before=3, options={"bias": False}),
    Pair("relu", "ih", "1", dtype=torch.float32),
    Pair("lstm", "c", "2", batch=1, steps=1, ragged=True),
]


def given(pair):
    """Return input, state and lengths on the device of the kernels."""
    return [moved(tree, place("triton")) for tree in (pair.xs(), pair.state(), pair.lengths())]


@pytest.mark.parametrize("pair", PAIRS[:2], ids=lambda pair: f"{pair.cell}-{pair.norm}-{pair.window}")
def test_opcheck(pair):
    with Recorded() as recorded:
        ys, _ = made(pair).unroll(*given(pair))
        ys.square().sum().backward()
    recorded.check([torch.ops.atn_norms.recurrent_triton, torch.ops.atn_norms.recurrent_triton_backward])


def test_without_a_graph_one_operator_is_called():
    pair = PAIRS[0]
    with Recorded() as recorded, torch.no_grad():
        ys, after = made(pair).unroll(*given(pair))
    assert [func.overloadpacket for func, _ in recorded.calls] == [torch.ops.atn_norms.recurrent_triton]
    expected, final = made(pair).unroll(*given(pair))
    compare([ys, *leaves(after)], [expected, *leaves(final)], tolerance=0)


@pytest.mark.parametrize(("cell", "both"), [("lstm", False), pytest.param("gru", True, marks=pytest.mark.deep)])
def test_compiled_without_a_graph_break(cell, both):
    """Inference and training, one or more layers, an initial hidden state, and other sequence lengths."""
    torch._dynamo.reset()
    options = {"window": 3, "num_layers": 1 + both, "bidirectional": both}
    pair = Pair(cell, batch=3, steps=6, dtype=torch.float32, options=options)
    layer, hidden = made(pair), None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for steps in (4, 6):
        for training in (False, True):
            results = []
            for run in (compiled, layer):
                xs = pair.xs()[:steps].to(place("triton")).requires_grad_(training)
                with torch.set_grad_enabled(training):
                    ys, last = run(xs, hidden)
                wanted = [xs, *layer.parameters()]
                found = torch.autograd.grad(functional([ys, *leaves(last)]), wanted) if training else []
                results.append((ys, last, found))
            # same operator and numbers; sums outside it (over two directions) may have another order
            compare(results[0][:2], results[1][:2], tolerance=0)
            compare(results[0][2], results[1][2], tolerance=1e-6, scale=level(*results[1][2]))
        hidden = tuple(h.detach() for h in last) if cell == "lstm" else last.detach()


@pytest.mark.parametrize(("cell", "window"), [("lstm", "4"), ("gru", "cumulative"), ("tanh", "exponential")])
def test_gradients_of_gradients(cell, window):
    """Gradient penalty: the gradient of a functional of all gradients."""
    pair, results = Pair(cell, "layer", window, steps=3, before=2, ragged=True), []
    for backend in ("triton", "reference"):
        layer = made(pair, backend)
        once = outcome(layer, pair.xs(), pair.state(), pair.lengths(), retain=True)
        penalty = functional([g for g in once.gradients if g.requires_grad])
        again = torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True)
        twice = [
            (torch.zeros_like(p) if g is None else g).cpu() for g, p in zip(again, layer.parameters(), strict=True)
        ]
        results.append((once, twice))
    (once, twice), (expected, expected_twice) = results
    compare(once.gradients, expected.gradients, tolerance=EXACT, scale=level(*expected.gradients))
    compare(twice, expected_twice, tolerance=EXACT, scale=level(*expected_twice))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one number": lambda x: x[:1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout):
    """Strided and expanded inputs, initial states, weights and output gradients."""
    pair, results = Pair("gru", batch=3, steps=4, inputs=3, hidden=5, before=3), []
    for backend in ("triton", "reference"):
        layer, base = made(pair, backend), moved(pair.xs(), place(backend)).requires_grad_()
        for p in layer.parameters():
            p.data = p.data.t().contiguous().t() if p.ndim == 2 else p.data.repeat_interleave(2)[::2]
            assert not p.is_contiguous()
        (carried, norms) = moved(pair.state(), place(backend))[0][0]
        carried = tuple(c[:1].expand(c.shape) for c in carried)
        ys, after = layer.unroll(LAYOUTS[layout](base), (((carried, norms),),))
        h = after[0][0][0][0]
        grads = LAYOUTS[layout](moved(pair.draw(*ys.shape), place(backend))), torch.ones_like(h)[:1].expand(h.shape)
        found = torch.autograd.grad([ys, h], [base, *layer.parameters()], grads)
        results.append((ys.cpu(), [g.cpu() for g in found]))
    (ys, found), (expected, gradients) = results
    compare(ys, expected, tolerance=EXACT)
    compare(found, gradients, tolerance=EXACT, scale=level(*gradients))


def test_poisoned_memory_has_no_effect(mode, request):
    """Allocated memory is written before it is read."""
    clean = [outcome(made(pair), pair.xs(), pair.state(), pair.lengths()) for pair in PAIRS]
    request.getfixturevalue("poisoned")
    for pair, expected in zip(PAIRS, clean, strict=True):
        agree(outcome(made(pair), pair.xs(), pair.state(), pair.lengths()), expected, 0)


@pytest.mark.parametrize("operator", ["recurrent_triton", "recurrent_triton_backward"])
def test_damaged_arguments_of_a_raw_operator_raise(operator):
    if place("triton") != "cpu":
        pytest.skip("the damaged tensors are on the CPU, where Triton's interpreter runs")
    accepted = int(fuzzed(operator, 150, TRITON_INTERPRET="1").split()[-3])
    assert 0 < accepted < 75
