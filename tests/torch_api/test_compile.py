"""Compilers and exporters: one graph for every shape, and the numbers of an eager call."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

import atn_norms as an
from tests.compare import compare
from tests.native.strategies import functional
from tests.torch_api.features import feature
from tests.torch_api.test_transforms import CELLS, NORMS, every_layer, every_norm
from tests.traced.gallery import EVERY, GallerySpec

GROUP = "Compilers and exporters"
ROOT = Path(__file__).parents[2]
SHAPES = ((5, 2), (7, 2), (7, 3), (9, 4), (11, 20), (5, 3))
WINDOWS: dict[str, Any] = {
    "1": 1,
    "3": 3,
    "cumulative": "cumulative",
    "exponential": {"kind": "exponential", "half_life": 2.0},
}
SOME = ("LearnablePower", "TwoSided", "DynamicTanh")  # of the traced norms: parameters, two statistics, none
FIRST = SOME[:1]
STEPS, ROWS = Dim("steps", min=1, max=512), Dim("rows", min=1, max=64)
deep = pytest.mark.deep


def batch(steps: int, rows: int) -> torch.Tensor:
    return torch.randn(steps, rows, 3, generator=torch.Generator().manual_seed(steps + rows))


@pytest.fixture
def graphs():
    """Count the graphs of a fresh compiler."""
    torch._dynamo.reset()
    return CompileCounter()


class Output(nn.Module):
    """A layer whose only result is its output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class Stream(Output):
    """A layer that continues from a state."""

    def forward(self, x: torch.Tensor, state: Any) -> Any:  # type: ignore[override]
        return self.layer.unroll(x, state)


@feature(
    GROUP,
    "`torch.compile(fullgraph=True, dynamic=True)` of a layer without a norm: one graph for every length and batch",
    "native",
    "torch.nn's layers need `allow_rnn`.",
)
@every_layer
def test_a_layer_without_a_norm_compiles(cell, graphs, runs):
    layer = CELLS[cell](3, 4, 2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for shape in SHAPES:
        compare(compiled(batch(*shape)), layer(batch(*shape)), tolerance=1e-6)
    lengths = torch.tensor([5, 0, 2])
    run = torch.compile(layer.unroll, fullgraph=True, backend="eager")
    compare(run(batch(5, 3), None, lengths), layer.unroll(batch(5, 3), None, lengths), tolerance=1e-6)
    assert graphs.frame_count == 1 and runs["native"] == 4 * (len(SHAPES) + 1)


WITHOUT_NORM: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "projection": {"proj_size": 2},
    "dropout": {"num_layers": 2, "dropout": 0.5, "bidirectional": True},
    "torch": {"backend": "torch"},
}


@pytest.mark.parametrize("options", WITHOUT_NORM)
@every_layer
def test_a_compiled_layer_without_a_norm_can_be_trained(cell, options):
    if options == "projection" and cell != "lstm":
        return
    torch._dynamo.reset()
    layer, results = CELLS[cell](3, 4, **WITHOUT_NORM[options]), []
    x = batch(5, 2).requires_grad_(options == "dropout")
    wanted = [*layer.parameters(), *[x] * x.requires_grad]
    for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        torch.manual_seed(0)
        y, last = run(x)
        ends = [y, *(last if cell == "lstm" else [last])]
        results.append((ends, torch.autograd.grad(functional(ends), wanted)))
    compare(results[0], results[1], tolerance=1e-5)


@pytest.mark.filterwarnings("error:.*native")
def test_without_kernels_torch_runs_a_compiled_layer_without_a_norm(graphs, runs, monkeypatch):
    monkeypatch.setattr("atn_norms.backends.native.unavailable", lambda: "its kernels are not compiled")
    monkeypatch.setattr("atn_norms.backends.native.library._warned", [])
    layer = an.GRU(3, 4)
    compare(torch.compile(layer, fullgraph=True, backend=graphs)(batch(5, 2)), layer(batch(5, 2)), tolerance=1e-6)
    assert set(runs) == {"torch"}


@every_layer
def test_the_graph_of_a_layer_without_a_norm_is_as_long_for_every_length(cell):
    counts: dict[int, list[int]] = {}
    for steps in (3, 30):
        torch._dynamo.reset()
        counts[steps] = []

        def count(graph: Any, _: Any, counted: list[int] = counts[steps]) -> Any:
            counted.append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)

        compiler = aot_autograd(fw_compiler=count)
        torch.compile(CELLS[cell](3, 4), fullgraph=True, backend=compiler)(batch(steps, 2))[0].sum().backward()
    assert len(counts[3]) == 2 and counts[3] == counts[30]


@feature(GROUP, "`torch.export` of a layer without a norm, before its first call", "torch")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=deep)])
@every_layer
def test_a_layer_without_a_norm_exports(cell, strict):
    layer, x = CELLS[cell](3, 4), batch(5, 2)
    with torch._dynamo.config.patch(allow_rnn=True):
        program = export(layer, (x,), dynamic_shapes=({1: ROWS},), strict=strict).module()
    for rows in (2, 7):
        compare(program(batch(5, rows)), layer(batch(5, rows)), tolerance=1e-6)


@feature(GROUP, "`torch.compile(dynamic=True)`: one graph for every length and batch", "native")
@pytest.mark.parametrize("norm", [pytest.param(norm, marks=deep if norm == "rms" else ()) for norm in NORMS])
@pytest.mark.parametrize("cell", [pytest.param(name, marks=deep if name != "lstm" else ()) for name in CELLS])
def test_one_graph_for_every_shape(cell, norm, graphs):
    layer = CELLS[cell](3, 4, norm=norm, window=3)
    twin = an.with_backend(layer, "native")  # batch norm counts its updates
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for shape in SHAPES:
        compare(compiled(batch(*shape)), twin(batch(*shape)), tolerance=1e-6)
    assert graphs.frame_count == 1
    compare(dict(layer.state_dict()), dict(twin.state_dict()), tolerance=1e-6)


@feature(
    GROUP, "compiled `unroll` from a state: one graph for a stream", "native", "Calls without a state: another graph."
)
@pytest.mark.parametrize("norm", [pytest.param(norm, marks=deep if norm != "layer" else ()) for norm in NORMS])
@pytest.mark.parametrize("cell", [pytest.param(name, marks=deep if name != "lstm" else ()) for name in CELLS])
def test_a_stream_has_one_graph(cell, norm, graphs):
    layer = CELLS[cell](3, 4, norm=norm, window=3).eval()
    step, state = torch.compile(layer.unroll, fullgraph=True, backend=graphs), layer.initial(4)
    with torch.no_grad():
        _, state = layer.unroll(batch(2, 4))
        parts = []
        for x in batch(6, 4).split(1):
            y, state = step(x, state)
            parts.append(y)
        whole, _ = layer.unroll(torch.cat([batch(2, 4), batch(6, 4)]))
    compare(torch.cat(parts), whole[2:], tolerance=1e-6)
    assert graphs.frame_count == 1


@feature(
    GROUP, "compiled `unroll` with `lengths`, `fullgraph=True`", "native", "Lengths are checked when the graph runs."
)
@pytest.mark.parametrize("norm", [pytest.param(norm, marks=deep if norm == "rms" else ()) for norm in NORMS])
@pytest.mark.parametrize("cell", [pytest.param(name, marks=deep if name != "lstm" else ()) for name in CELLS])
def test_lengths_compile(cell, norm, graphs):
    layer = CELLS[cell](3, 4, norm=norm, window=3).eval()
    run = torch.compile(layer.unroll, fullgraph=True, backend=graphs)
    for last in range(3):
        lengths = torch.tensor([5, 0, last])
        compare(run(batch(5, 3), None, lengths), layer.unroll(batch(5, 3), None, lengths), tolerance=1e-6)
    assert graphs.frame_count == 1
    with pytest.raises(RuntimeError, match=r"lengths: got a number outside the sequence; expected 3 integer"):
        run(batch(5, 3), None, torch.tensor([5, 6, 0]))


@feature(GROUP, "many compiled layers of one kind share a graph", "native")
@pytest.mark.parametrize("norm", [pytest.param(norm, marks=deep if norm != "layer" else ()) for norm in NORMS])
@pytest.mark.parametrize("cell", [pytest.param(name, marks=deep if name != "lstm" else ()) for name in CELLS])
def test_ten_layers_share_a_graph(cell, norm, graphs):
    for _ in range(10):
        layer = CELLS[cell](3, 4, norm=norm, window=3).eval()
        compare(torch.compile(layer, fullgraph=True, backend=graphs)(batch(5, 2)), layer(batch(5, 2)), tolerance=1e-6)
    assert graphs.frame_count == 1


DIMS: dict[str, Any] = {
    "Dim.DYNAMIC": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    "Dim(min, max)": {0: STEPS, 1: ROWS},
    "rows": {1: ROWS},
    "steps": {0: STEPS},
}


@feature(GROUP, "`torch.export` with dynamic length and batch", "native")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=deep)])
@pytest.mark.parametrize("dims", [pytest.param(name, marks=deep if name == "steps" else ()) for name in DIMS])
@pytest.mark.parametrize("norm", ["layer", "batch", pytest.param("rms", marks=deep)])
@pytest.mark.parametrize("cell", [pytest.param(name, marks=deep if name != "gru" else ()) for name in CELLS])
def test_an_exported_layer_takes_every_shape(cell, norm, dims, strict):
    layer = CELLS[cell](3, 4, norm=norm, window=3, backend="native").eval()
    program = export(layer, (batch(5, 2),), dynamic_shapes=(DIMS[dims],), strict=strict)
    for steps, rows in ((5, 2), (9, 7), (4, 40)):
        x = batch(5 if dims == "rows" else steps, 2 if dims == "steps" else rows)
        compare(program.module()(x), layer(x), tolerance=1e-6)


@feature(
    GROUP,
    "`torch.export` with dynamic length and `torch.jit.trace` of batch norms with `max_steps`",
    "native",
)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=deep)])
@pytest.mark.parametrize("stream", [False, True])
@every_layer
def test_populations_of_single_steps_are_exported_for_every_length(cell, stream, strict, runs):
    """Lengths below, at and above the number of recorded steps and `max_steps`, from no state and from a state."""
    layer: Any = CELLS[cell](3, 4, norm={"kind": "batch", "max_steps": 8}, window=3)
    layer(batch(6, 5))
    assert layer.norm_hh_l0.num_batches_tracked.tolist() == [1] * 6 + [0] * 2
    model = (Stream if stream else Output)(layer.eval())
    given = (layer.unroll(batch(2, 2))[1],) if stream else ()
    dims = [{0: Dim.AUTO, 1: Dim.AUTO}, *(tree_map(lambda _: {0: Dim.STATIC}, each) for each in given)]
    program: Any = export(model, (batch(5, 2), *given), dynamic_shapes=tuple(dims), strict=strict).module()
    traced: Any = torch.jit.trace(model, (batch(5, 2), *given))
    for steps in (1, 4, 5, 6, 7, 8, 9, 30):
        x = batch(steps, 2 if stream else steps + 1)
        expected = model(x, *given)
        for found in (program(x, *given), traced(x, *given)):
            compare(found, expected, tolerance=1e-6)
    assert set(runs) == {"native"}


@every_layer
def test_a_training_graph_that_is_exported_records_the_populations_of_single_steps(cell):
    layer = CELLS[cell](3, 4, norm={"kind": "batch", "max_steps": 8}, window=3, backend="native")
    program: Any = export(Output(layer), (batch(5, 2),), dynamic_shapes=(DIMS["Dim(min, max)"],)).module()
    twin = Output(an.with_backend(layer, "native"))
    for shape in ((5, 2), (8, 3), (20, 4)):
        compare(program(batch(*shape)), twin(batch(*shape)), tolerance=1e-6)
        compare(dict(program.named_buffers()), dict(twin.named_buffers()), tolerance=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@every_norm
@every_layer
def test_a_program_exported_without_gradients_can_be_trained(cell, norm, frozen):
    layer = CELLS[cell](3, 4, norm=norm, window=3, backend="native").eval().requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        program: Any = export(layer, (batch(5, 2),), dynamic_shapes=(DIMS["Dim.DYNAMIC"],)).module()
    gradients = []
    for model in (program, layer):
        parameters = dict(model.requires_grad_(True).named_parameters())
        loss = model(batch(7, 3))[0].square().sum()
        gradients.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    compare(gradients[0], gradients[1], tolerance=1e-5)


@feature(GROUP, "traced norms of plugins in `torch.compile`, `torch.export` and `torch.jit.trace`", "native")
@pytest.mark.parametrize("placement", ["joint", pytest.param("per_gate", marks=deep)])
@pytest.mark.parametrize("norm", [pytest.param(name, marks=deep if name not in FIRST else ()) for name in EVERY])
def test_traced_norms_compile_and_export(norm, placement, graphs, runs, recwarn):
    options: dict[str, Any] = {"norm": GallerySpec(name=norm), "window": 3, "placement": {"gates": placement}}
    layer = an.LSTM(3, 6, **options).eval()
    assert "backend 'native'" in an.explain(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    stream = torch.compile(layer.unroll, fullgraph=True, dynamic=True, backend=graphs)
    program = export(layer, (batch(5, 2),), dynamic_shapes=({0: STEPS, 1: ROWS},)).module()
    traced: Any = torch.jit.trace(Output(layer), batch(5, 2))
    for shape in ((5, 2), (7, 2), (9, 20)):
        x = batch(*shape)
        expected = layer(x)
        for found in (compiled(x), program(x), (traced(x), expected[1])):
            compare(found, expected, tolerance=1e-6)
    assert graphs.frame_count == 1
    _, state = layer.unroll(batch(4, 2))
    for x in batch(3, 2).split(1):
        found, expected = stream(x, state), layer.unroll(x, state)
        compare(found, expected, tolerance=1e-6)
        state = expected[1]
    assert graphs.frame_count == 2
    assert set(runs) == {"native"}
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=deep if name not in FIRST else ()) for name in SOME])
def test_a_norm_first_seen_by_a_compiler_runs_on_the_reference_there_alone(name, graphs, runs):
    """A compiler cannot trace a program; the reason is not cached, and a warning has the fix."""
    layer = an.LSTM(3, 6, norm=GallerySpec(name=name), window=2)
    for module in layer.modules():
        module.__dict__["unseen"] = 0.125  # part of the key of a program
    with pytest.warns(RuntimeWarning, match="call the layer once before"):
        found = torch.compile(layer, fullgraph=True, backend=graphs)(batch(2, 2))
    runs.clear()
    compare(found, layer(batch(2, 2)), tolerance=1e-6)
    assert set(runs) == {"native"}


def run_program(path: Path, imports: str, check: str) -> None:
    """Load a program in a fresh process and compare its output with the stored one."""
    script = (
        f"import sys, {imports}\n"
        f"program = torch.export.load({str(path)!r}).module()\n"
        f"x, expected = torch.load({str(path.with_suffix('.pt'))!r})\n"
        f"torch.testing.assert_close(program(x)[0], expected)\n"
        f"assert {check}\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def save_program(layer: Any, path: Path) -> Path:
    x = batch(5, 2)
    torch.export.save(export(layer, (x,), dynamic_shapes=({1: Dim.DYNAMIC},)), path)
    torch.save((x, layer(x)[0].detach()), path.with_suffix(".pt"))
    return path


@feature(GROUP, "`torch.export.load` after `import atn_norms`", "native")
@deep
@pytest.mark.parametrize("imports", ["torch, atn_norms", "atn_norms, torch"])
def test_a_saved_program_loads_after_an_import_of_the_package(imports, tmp_path):
    path = save_program(an.LSTM(3, 4, norm="layer", window=3), tmp_path / "layer.pt2")
    run_program(path, imports, "'atn_norms.backends.native.call' in sys.modules")


@feature(GROUP, '`torch.export` of `with_backend(model, "reference")`', "reference", "Loads without this package.")
@deep
@pytest.mark.parametrize(("cell", "norm"), [*zip(CELLS, NORMS, strict=True)])
def test_a_decomposed_program_loads_without_this_package(cell, norm, tmp_path):
    layer = an.with_backend(CELLS[cell](3, 4, norm=norm, window=3).eval(), "reference")
    path = save_program(layer, tmp_path / "layer.pt2")
    run_program(path, "torch", "'atn_norms' not in sys.modules")


@feature(GROUP, "AOTInductor (`aoti_compile_and_package`)", "native", "`import atn_norms` before a package is loaded.")
@deep
@pytest.mark.timeout(900)  # the C++ compiler runs twice
@pytest.mark.parametrize(
    ("cell", "norm"),
    [("lstm", "layer"), ("gru", "batch"), ("rnn", "rms"), ("lstm", "TwoSided"), ("gru", "DynamicTanh")],
)
def test_a_compiled_package_has_the_same_numbers(cell, norm, tmp_path, runs):
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler: g++ is not installed")
    chosen = norm if norm in NORMS else GallerySpec(name=norm)
    layer = CELLS[cell](3, 4, norm=chosen, window=3).eval().requires_grad_(False)
    _, state = layer.unroll(batch(4, 2))
    runs.clear()
    packages = []
    sequences = export(Output(layer), (batch(5, 2),), dynamic_shapes=({0: STEPS, 1: ROWS},))
    for name, program in (("whole", sequences), ("stream", export(Stream(layer), (batch(1, 2), state)))):
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{name}.pt2"))
        packages.append(torch._inductor.aoti_load_package(path))
    whole, stream = packages
    for shape in ((5, 2), (9, 7), (1, 1)):
        compare(whole(batch(*shape)), layer(batch(*shape))[0], tolerance=1e-6)
    for x in batch(5, 2).split(1):
        found, expected = stream(x, state), layer.unroll(x, state)
        compare(found, expected, tolerance=1e-6)
        state = found[1]
    assert set(runs) == {"native"}


@feature(GROUP, "`torch.jit.trace`, TensorBoard `add_graph`", "native", "Deprecated in torch.")
@pytest.mark.parametrize("training", [False, True])
@every_norm
@every_layer
def test_a_trace_takes_every_shape(cell, norm, training, runs):
    layer = CELLS[cell](3, 4, norm=norm, window=3).train(training and norm != "batch")
    traced: Any = torch.jit.trace(Output(layer), batch(5, 2))
    for shape in ((5, 2), (9, 7)):
        compare(traced(batch(*shape)), layer(batch(*shape))[0], tolerance=1e-6)
    assert set(runs) == {"native"}


@every_norm
@every_layer
def test_a_trace_of_unroll_continues_from_a_state(cell, norm, runs):
    layer = CELLS[cell](3, 4, norm=norm, window=3).eval()
    state = layer.unroll(batch(4, 2))[1]
    traced: Any = torch.jit.trace(Stream(layer), (batch(5, 2), state))
    for _ in range(2):
        found, expected = traced(batch(5, 2), state), layer.unroll(batch(5, 2), state)
        compare(found, expected, tolerance=1e-6)
        state = expected[1]
    assert set(runs) == {"native"}


@feature(GROUP, "`torch.jit.script`", "refused", "Deprecated in torch; use `torch.export`.")
@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_script_is_rejected_with_the_alternatives(cell, norm):
    model = nn.Sequential(CELLS[cell](3, 4, norm=norm))
    with pytest.raises(TypeError, match=r"torch.jit.script: got an? .*; expected .* Use torch.export.export"):
        torch.jit.script(model)


@feature(GROUP, "`FlopCounterMode`", "native", "Products alone are counted, as for torch's operators.")
@every_norm
@every_layer
def test_flops_are_those_of_the_reference(cell, norm):
    counts = {}
    for backend in ("native", "reference"):
        layer, x = CELLS[cell](3, 4, norm=norm, window=2, backend=backend), batch(5, 2).requires_grad_()
        h = torch.zeros(1, 2, 4, requires_grad=True)
        hx: Any = (h, h) if cell == "lstm" else h
        with FlopCounterMode(display=False) as mode:
            layer(x, hx)[0].sum().backward()
        counts[backend] = mode.get_total_flops()
    assert counts["native"] == counts["reference"] > 0


@feature(GROUP, "ONNX (`torch.onnx.export`), whole sequences and streams", "reference", "The number of steps is fixed.")
@deep
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("norm", [*NORMS, *SOME])
@every_layer
def test_onnx_gives_the_same_numbers(cell, norm, window):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    norm = norm if norm in NORMS else GallerySpec(name=norm)
    layer = CELLS[cell](3, 4, norm=norm, window=WINDOWS[window]).eval().requires_grad_(False)
    _, state = layer.unroll(batch(4, 2))
    for model, arguments in ((layer, (batch(5, 2),)), (Stream(layer).eval(), (batch(1, 2), state))):
        program: Any = torch.onnx.export(model, arguments, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), tree_flatten(arguments)[0], strict=True)}
        found = [torch.from_numpy(output) for output in session.run(None, feed)]
        compare(found, tree_flatten(model(*arguments))[0], tolerance=1e-5)
