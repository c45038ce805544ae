"""Exported models: the same numbers in a process without this package, whole and frame by frame."""

import json
import re
import shutil
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import atn_norms as an
from atn_norms.cli import main
from atn_norms.errors import SpecError
from atn_norms.layers.export import WholeSequence, export
from atn_norms.pytree import tree_leaves
from tests.compare import compare

WINDOWS = [1, 4, "cumulative", {"kind": "exponential", "half_life": 3.0}]


def trained(layer):
    """A layer in evaluation mode with other numbers than fresh ones, populations included."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    layer.train()
    layer(torch.randn(6, 5, layer.input_size, dtype=next(layer.parameters()).dtype))
    return layer.eval()


def names(step):
    return ["frame", *(f"state_{i}" for i in range(len(step.initial())))]


@pytest.mark.parametrize("norm", [None, "layer", "rms", "batch", {"kind": "batch", "max_steps": 3}])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", [an.LSTM, an.GRU, an.RNN])
def test_a_streamed_sequence_equals_unroll(kind, norm, window):
    layer = trained(kind(3, 4, num_layers=2, norm=norm, window=window if norm else 1))
    xs = torch.randn(9, 2, 3)
    expected, last = layer.unroll(xs)
    step = an.StreamingStep(layer, batch=2)
    state, outputs = step.initial(), []
    for x in xs:
        y, *state = step(x, *state)
        outputs.append(y)
    compare(torch.stack(outputs), expected, tolerance=1e-6)
    for mine, theirs in zip(state, tree_leaves(last), strict=True):
        compare(mine, theirs, tolerance=1e-6)


def test_encoder_and_read_out_are_part_of_the_step():
    layer, before, after = trained(an.GRU(4, 6, norm="layer", window=3)), nn.Embedding(7, 4), nn.Linear(6, 7)
    tokens = torch.randint(7, (5, 2))
    step = an.StreamingStep(layer, before, after, batch=2)
    state, outputs = step.initial(), []
    for token in tokens:
        y, *state = step(token, *state)
        outputs.append(y)
    compare(torch.stack(outputs), after(layer.unroll(before(tokens))[0]), tolerance=1e-6)


def test_the_model_is_left_as_it_was():
    layer = an.LSTM(3, 4, norm="layer", window=3)
    an.StreamingStep(layer)
    assert layer.training and layer.spec.backend == "auto" and all(p.requires_grad for p in layer.parameters())


def test_a_streamed_step_uses_the_current_weights_of_a_pruned_layer(tmp_path):
    layer: Any = trained(an.GRU(3, 4, norm="layer", window=3))
    prune.l1_unstructured(layer, "weight_ih_l0", 0.5)  # the first step depends on it
    with torch.no_grad():
        layer(torch.randn(1, 2, 3))  # a weight with a gradient cannot be copied
        layer.weight_ih_l0_orig.copy_(torch.randn(12, 3))
        step = an.StreamingStep(layer)
    inputs = [torch.randn(1, 3), *step.initial()]
    compare(step(*inputs)[0], layer(inputs[0].unsqueeze(0))[0][0], tolerance=1e-6)
    assert export(step, inputs, tmp_path / "m.pt2", "pt2").difference == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for each in (layer, step.layer):
            each.weight_ih_l0_orig.copy_(torch.arange(36.0).sin().reshape(12, 3))
    compare(step(*inputs)[0], layer(inputs[0].unsqueeze(0))[0][0], tolerance=1e-6)


def test_bidirectional_layers_are_rejected():
    with pytest.raises(SpecError, match="layer: got a bidirectional layer, .*; expected a layer of one direction"):
        an.StreamingStep(an.LSTM(3, 4, bidirectional=True))
    with pytest.raises(TypeError, match=r"layer: got LSTM|layer: got Linear; expected a layer of atn_norms"):
        an.StreamingStep(nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("change", "got"), [(-13, "1 tensor"), (-1, "13 tensors"), (1, "15 tensors")])
def test_another_number_of_state_tensors_is_rejected(change, got):
    step = an.StreamingStep(an.LSTM(3, 4, norm="layer", window=5))
    state = [*step.initial(), torch.zeros(1)][: 14 + change]
    with pytest.raises(ValueError, match=re.escape(f"state: got {got}; expected 14: call `initial()`")):
        step(torch.zeros(1, 3), *state)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_whole_model_with_native_layers_is_exported(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.read_out = trained(an.GRU(3, 4, norm="layer", window=3)), nn.Linear(4, 2)

        def forward(self, x):
            return self.read_out(self.layer(x)[0])

    model = Tagger().eval()
    done = export(model, [torch.randn(4, 2, 3)], tmp_path / f"m.{format}", format)
    assert done.difference is not None and done.difference <= 1e-6
    assert model.layer.spec.backend == "auto"


def test_onnxruntime_loads_a_graph_that_is_not_optimized_without_warnings(tmp_path, monkeypatch, capfd):
    """A whole sequence has too many nodes for the optimization of torch's exporter, which would remove `CastLike`."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("atn_norms.layers.export.MOST_OPTIMIZED", 0)
    layer = trained(an.RNN(3, 4, norm={"kind": "batch", "max_steps": 3}, window=2))
    export(WholeSequence(layer), [torch.randn(2, 2, 3)], tmp_path / "m.onnx", "onnx")
    capfd.readouterr()
    runtime.InferenceSession(str(tmp_path / "m.onnx"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "format", "cure"),
    [
        ("m.pt2", "onnx", "got the ending '.pt2'; expected .onnx for onnx. Use format='pt2' or format='aoti'"),
        ("m.onnx", "aoti", "got the ending '.onnx'; expected .pt2 for aoti. Use format='onnx'"),
    ],
)
def test_the_format_of_an_ending_is_named(file, format, cure, tmp_path):
    with pytest.raises(SpecError, match=re.escape(cure)):
        export(an.RNN(3, 4), [torch.randn(4, 2, 3)], tmp_path / file, format)


FOREIGN = """
import sys
sys.modules["atn_norms"] = None  # as if it were not installed
import torch
model = torch.export.load(sys.argv[1]).module()
inputs, expected = torch.load(sys.argv[2])
outputs = model(*inputs)
outputs = outputs if isinstance(outputs, tuple) else (outputs,)
print(max(float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True)))
"""


@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.deep)])
def test_torch_export_runs_without_this_package(streaming, tmp_path):
    layer = trained(an.LSTM(3, 4, norm="layer", window=4))
    module = an.StreamingStep(layer) if streaming else WholeSequence(layer)
    inputs = [torch.randn(1, 3), *module.initial()] if isinstance(module, an.StreamingStep) else [torch.randn(5, 2, 3)]
    done = export(module, inputs, tmp_path / "m.pt2", "pt2", names=[str(i) for i in range(len(inputs))])
    expected = module(*inputs)
    torch.save((inputs, expected if streaming else (expected,)), tmp_path / "numbers.pt")
    ran = subprocess.run(
        [sys.executable, "-c", FOREIGN, done.path, tmp_path / "numbers.pt"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) <= 1e-6 and done.difference is not None and done.difference <= 1e-6


@pytest.mark.parametrize(
    ("norm", "window"),
    [
        ("layer", 4),
        ("batch", "cumulative"),
        ({"kind": "batch", "max_steps": 3}, {"kind": "exponential", "half_life": 3.0}),
        *[
            pytest.param(norm, window, marks=pytest.mark.deep)
            for norm, window in product(["layer", "batch"], WINDOWS)
            if (norm, window) not in (("layer", 4), ("batch", "cumulative"))
        ],
    ],
)
def test_onnx_steps_of_every_window_equal_unroll(window, norm, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = trained(an.LSTM(3, 4, norm=norm, window=window))
    step = an.StreamingStep(layer)
    done = export(step, [torch.randn(1, 3), *step.initial()], tmp_path / "m.onnx", names=names(step))
    session = onnxruntime.InferenceSession(str(done.path))
    xs = torch.randn(8, 1, 3)
    state, outputs = [leaf.numpy() for leaf in step.initial()], []
    for x in xs:
        y, *state = session.run(None, dict(zip(names(step), [x.numpy(), *state], strict=True)))
        outputs.append(torch.from_numpy(y))
    compare(torch.stack(outputs), layer.unroll(xs)[0], tolerance=1e-6)


def test_a_whole_sequence_with_a_sliding_window_runs_in_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    layer = trained(an.GRU(3, 4, norm="layer", window=2))
    done = export(WholeSequence(layer), [torch.randn(3, 2, 3)], tmp_path / "m.onnx", names=["sequence"])
    assert done.outputs == ("output",) and done.difference is not None and done.difference <= 1e-6


def test_a_file_that_computes_something_else_is_rejected_and_the_old_one_stays(tmp_path, monkeypatch):
    from atn_norms.layers import export as module

    write = module._WRITERS["pt2"]

    def wrong(*arguments):
        outputs, run, note = write(*arguments)
        assert run is not None
        return outputs, lambda *inputs: [each + 1e-3 for each in run(*inputs)], note

    monkeypatch.setitem(module._WRITERS, "pt2", wrong)
    layer = trained(an.RNN(3, 4, norm="rms", window=2))
    (tmp_path / "m.pt2").write_text("old")
    with pytest.raises(
        SpecError, match="m.pt2: got an exported model that differs from the module by 0.001; expected at most"
    ):
        export(WholeSequence(layer), [torch.randn(3, 1, 3)], tmp_path / "m.pt2", "pt2", names=["sequence"])
    assert [each.name for each in tmp_path.iterdir()] == ["m.pt2"] and (tmp_path / "m.pt2").read_text() == "old"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious.txt").write_text("years of work")
    (tmp_path / "m.pt2").symlink_to(tmp_path / "precious.txt")
    layer = trained(an.RNN(3, 4))
    export(WholeSequence(layer), [torch.randn(3, 1, 3)], tmp_path / "m.pt2", "pt2", names=["sequence"])
    assert (tmp_path / "precious.txt").read_text() == "years of work"
    assert (tmp_path / "m.pt2").is_file() and not (tmp_path / "m.pt2").is_symlink()
    with pytest.raises(SpecError, match="nowhere: got no such folder; expected a folder"):
        export(WholeSequence(layer), [torch.randn(3, 1, 3)], tmp_path / "nowhere" / "m.pt2", "pt2")


ALONE = """
import sys
sys.modules["atn_norms"] = None  # as if it were not installed
import numpy as np
kind, file, numbers = sys.argv[1:]
sequence = np.load(numbers)
if kind == "onnx":
    sys.modules["torch"] = None
    import onnxruntime
    session = onnxruntime.InferenceSession(file)
    names = [each.name for each in session.get_inputs()]
    shapes = [(each.shape, np.int64 if "int64" in each.type else np.float64 if "double" in each.type else np.float32)
              for each in session.get_inputs()[1:]]
    state = [np.zeros(shape, dtype) for shape, dtype in shapes]
    run = lambda *inputs: session.run(None, dict(zip(names, inputs)))
else:
    import torch
    if kind == "pt2":
        program = torch.export.load(file)
        model, state = program.module(), [torch.zeros_like(each) for each in program.example_inputs[0][1:]]
    else:
        model = torch._inductor.aoti_load_package(file)
        state = [torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape in __STATE__]
    sequence = torch.from_numpy(sequence)
    def run(*inputs):
        with torch.no_grad():
            outputs = model(*inputs)
        return outputs if isinstance(outputs, (tuple, list)) else (outputs,)
if state:
    outputs = []
    for frame in sequence:
        output, *state = run(frame, *state)
        outputs.append(np.asarray(output))
    output = np.stack(outputs)
else:
    (output,) = run(sequence)
np.save(numbers, np.asarray(output))
"""


def exported_by_the_command(layer, kind, streaming, folder, capsys):
    """Export a layer with the command; return what the file computes, in a process without this package."""
    path = an.save(layer, folder / "m.safetensors")
    options = ["--streaming"] if streaming else ["--length", "7"]
    assert main(["export", str(path), "--format", kind, "--batch", "2", "--json", *options]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["difference"] <= 1e-6 and facts["microseconds"] > 0 and printed.err == ""
    xs = torch.randn(7, 2, 3)
    numpy = pytest.importorskip("numpy")
    numpy.save(folder / "x.npy", xs.numpy())
    _, *state = [(each["type"], each["shape"]) for each in facts["inputs"].values()]
    script = ALONE.replace("__STATE__", repr(state))
    ran = subprocess.run(
        [sys.executable, "-c", script, kind, facts["file"], str(folder / "x.npy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return torch.from_numpy(numpy.load(folder / "x.npy")), layer.unroll(xs)[0].detach()


@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.deep)], ids=["step", "sequence"])
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_files_of_the_command_equal_unroll_without_this_package(kind, streaming, tmp_path, capsys):
    for module in ("safetensors", *(["onnxscript", "onnxruntime"] if kind == "onnx" else [])):
        pytest.importorskip(module)
    layer = trained(an.GRU(3, 4, norm="layer", window=3))
    compare(*exported_by_the_command(layer, kind, streaming, tmp_path, capsys), tolerance=1e-6)


compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("streaming", [True, False], ids=["step", "sequence"])
def test_compiled_files_equal_unroll_without_this_package(streaming, tmp_path, capsys):
    pytest.importorskip("safetensors")
    layer = trained(an.LSTM(3, 4, norm="batch", window=3))
    compare(*exported_by_the_command(layer, "aoti", streaming, tmp_path, capsys), tolerance=1e-6)


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", [an.LSTM, an.GRU, an.RNN])
def test_compiled_steps_of_every_window_equal_unroll(kind, norm, window, tmp_path, capsys):
    pytest.importorskip("safetensors")
    layer = trained(kind(3, 4, norm=norm, window=window))
    compare(*exported_by_the_command(layer, "aoti", True, tmp_path, capsys), tolerance=1e-6)


@pytest.mark.deep
def test_a_long_sequence_is_not_optimized_by_the_exporter(monkeypatch):
    """Its time grows with the cube of the length: 100 steps took over 10 minutes."""
    optimized = []
    monkeypatch.setattr(torch.onnx, "export", lambda *inputs, **options: optimized.append(options["optimize"]) or 1 / 0)
    monkeypatch.setattr("atn_norms.layers.export._need", lambda *modules: None)
    layer = an.LSTM(3, 4, norm="layer", window=3)
    for length in (2, 30):
        with pytest.raises(SpecError, match="got ZeroDivisionError; expected a model whose operations ONNX has"):
            export(WholeSequence(layer), [torch.randn(length, 1, 3)], "never.onnx", names=["sequence"])
    assert optimized == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onxx"], r"--format: got 'onxx'; expected one of onnx, pt2, aoti; did you mean 'onnx'\?"),
        (["--streaming"], "a bidirectional layer"),
        (["--out", "m"], "m: got the ending ''; expected .onnx for onnx"),
        (["--format", "aoti", "--out", "m.so"], "m.so: got the ending '.so'; expected .pt2 for aoti"),
        (["--out", "nowhere/m.onnx"], "nowhere: got no such folder; expected a folder"),
    ],
)
def test_the_command_rejects_bad_input(tmp_path, capsys, arguments, message):
    pytest.importorskip("safetensors")
    path = an.save(an.GRU(3, 4, bidirectional=True), tmp_path / "m.safetensors")
    assert main(["export", str(path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
