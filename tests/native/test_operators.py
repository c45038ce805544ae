"""The operators in torch: schema, fakes, compilation, and unwritten memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.compare import compare
from tests.laws.strategies import leaves, level
from tests.native.strategies import CELLS, EXACT, NORMS, Outcome, Pair, agree, functional, needs_kernels, outcome

pytestmark = needs_kernels

PAIRS = [
    Pair("lstm", "layer", "4", ragged=True, before=2),
    Pair("gru", "rms", "cumulative", per_gate=True, dtype=torch.float32),
    Pair("tanh", "shifted", "exponential", before=3, options={"bias": False}),
    Pair("relu", "ih", "1", inputs=66, dtype=torch.float32),
    Pair("lstm", "c", "2", batch=1, steps=1, ragged=True),
]


class Recorded(TorchDispatchMode):
    """Mode that records the arguments of every call of the package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "atn_norms":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def check(self, operators, differentiable=True):
        """Check that these operators were called in this order and pass opcheck; the first with gradients.

        Tensors that are kept for the backward pass have padding that no kernel writes. It is 0 here, since opcheck
        compares two calls.
        """
        assert [func.overloadpacket for func, _ in self.calls] == operators
        for func, args in self.calls:
            with_gradients = differentiable and func.overloadpacket is operators[0]
            with pytest.MonkeyPatch.context() as patch:
                fill_uninitialized(patch, 0.0)
                found = torch.library.opcheck(func, tuple(_fresh(arg, with_gradients) for arg in args))
            assert set(found.values()) == {"SUCCESS"}, found


def _fresh(arg, differentiable):
    if isinstance(arg, (list, tuple)):
        return [_fresh(each, differentiable) for each in arg]
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.detach().clone().requires_grad_(differentiable and arg.is_floating_point())


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.cell}-{pair.norm}-{pair.window}")
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(pair, training):
    with Recorded() as recorded, torch.set_grad_enabled(training):
        ys, _ = pair.layer("native").unroll(pair.xs(), pair.state(), pair.lengths())
        if training:
            ys.square().sum().backward()
    forward, backward = torch.ops.atn_norms.recurrent, torch.ops.atn_norms.recurrent_backward
    recorded.check([forward, backward] if training else [forward], differentiable=training)


@pytest.mark.parametrize(("cell", "both"), [("lstm", False), ("gru", True), ("tanh", False)])
def test_compiled_without_a_graph_break(cell, both):
    """Inference and training, one or more layers, an initial hidden state, and other sequence lengths."""
    torch._dynamo.reset()
    options = {"window": 3, "num_layers": 1 + both, "bidirectional": both}
    pair = Pair(cell, batch=3, steps=9, dtype=torch.float32, options=options)
    layer, hidden = pair.layer("native"), None
    compiled = torch.compile(layer, fullgraph=True, backend="eager" if both else "aot_eager")
    for steps in (4, 9):
        for training in (False, True):
            results = []
            for run in (compiled, layer):
                xs = pair.xs()[:steps].requires_grad_(training)
                with torch.set_grad_enabled(training):
                    ys, last = run(xs, hidden)
                wanted = [xs, *layer.parameters()]
                found = torch.autograd.grad(functional([ys, *leaves(last)]), wanted) if training else []
                results.append((ys, last, found))
            # same operator and numbers; sums outside it (over two directions) may have another order
            compare(results[0][:2], results[1][:2], tolerance=0)
            compare(results[0][2], results[1][2], tolerance=1e-6, scale=level(*results[1][2]))
        hidden = tuple(h.detach() for h in last) if cell == "lstm" else last.detach()


def test_a_compiled_stream_continues_from_its_state():
    torch._dynamo.reset()
    pair = Pair("lstm", batch=2, steps=8, dtype=torch.float32)
    layer, state = pair.layer("native"), None
    _, state = layer.unroll(pair.xs()[:2])
    step, parts = torch.compile(layer.unroll, fullgraph=True, backend="aot_eager"), []
    with torch.no_grad():
        for x in pair.xs()[2:].split(1):
            ys, state = step(x, state)
            parts.append(ys)
    compare(torch.cat(parts), layer.unroll(pair.xs())[0][2:], tolerance=1e-6)


def fill_uninitialized(monkeypatch, value):
    """Fill every uninitialized tensor of floating-point numbers with a value."""

    def filled(make):
        def allocate(*args, **options):
            made = make(*args, **options)
            return made.fill_(value) if made.is_floating_point() else made

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "empty_strided")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every uninitialized tensor with NaN."""
    fill_uninitialized(monkeypatch, float("nan"))
    assert torch.ones(3).new_empty(2).isnan().all() and torch.empty(2).isnan().all()


@pytest.mark.parametrize("window", ["1", "4", "100", "cumulative", "exponential"])
@pytest.mark.parametrize("norm", [name for name in NORMS if name != "c"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_kernel_reads_unwritten_memory(cell, norm, window, poisoned):
    for ragged, before, inputs in ((False, None, 3), (True, 2, 66)):
        pair = Pair(cell, norm, window, 17, 5, 6, inputs, ragged=ragged, before=before, dtype=torch.float32)
        given = pair.xs(), pair.state(), pair.lengths()
        found = outcome(pair.layer("native"), *given)
        assert all(torch.isfinite(tensor).all() for tensor in (found.ys, *found.state, *found.gradients))


def test_poisoned_memory_has_no_effect(monkeypatch, request):
    clean: list[Outcome] = []
    for turn in range(2):
        if turn:
            request.getfixturevalue("poisoned")
        for place, pair in enumerate(PAIRS):
            found = outcome(pair.layer("native"), pair.xs(), pair.state(), pair.lengths())
            clean.append(found)
            if turn:
                agree(found, clean[place], 0)


def test_junk_in_the_workspace_has_no_effect():
    """Let glibc fill new memory with a byte: -1.7e38 in float32, -5.3e303 in float64."""
    script = (
        "import torch; torch.set_num_threads(1); from tests.native.strategies import check, outcome; "
        "from tests.native.test_operators import PAIRS\n"
        "for pair in PAIRS: check(pair, 1e-10 if pair.dtype == torch.float64 else 1e-5)"
    )
    junk = {"MALLOC_PERTURB_": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}  # mapped memory would be zeros
    here = Path(__file__).parents[2]
    surroundings = os.environ | junk | {"PYTHONPATH": str(here)}
    done = subprocess.run([sys.executable, "-c", script], env=surroundings, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inference_saves_nothing_for_backward():
    """Inference returns the numbers of training, without a graph."""
    for pair in PAIRS:
        layer, given = pair.layer("native"), (pair.xs(), pair.state(), pair.lengths())
        ys, after = layer.unroll(*given)
        with torch.no_grad():
            quiet, state = layer.unroll(*given)
        assert ys.requires_grad and not any(leaf.requires_grad for leaf in [quiet, *leaves(state)])
        compare(quiet, ys, tolerance=EXACT if pair.dtype == torch.float64 else 1e-6)
        compare(leaves(state), leaves(after), tolerance=EXACT if pair.dtype == torch.float64 else 1e-6)
