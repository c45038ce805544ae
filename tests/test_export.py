"""Exported models: the same numbers in a process without this package, whole and frame by frame."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

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


def test_bidirectional_layers_are_refused():
    with pytest.raises(SpecError, match="layer: got a bidirectional layer, .*; expected a layer of one direction"):
        an.StreamingStep(an.LSTM(3, 4, bidirectional=True))
    with pytest.raises(TypeError, match=r"layer: got LSTM|layer: got Linear; expected a layer of atn_norms"):
        an.StreamingStep(nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


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


@pytest.mark.parametrize("streaming", [True, False])
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


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("window", WINDOWS)
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
    layer = trained(an.GRU(3, 4, norm="layer", window=3))
    done = export(WholeSequence(layer), [torch.randn(5, 2, 3)], tmp_path / "m.onnx", names=["sequence"])
    assert done.outputs == ("output",) and done.difference is not None and done.difference <= 1e-6


def test_a_file_that_computes_something_else_is_refused_and_removed(tmp_path, monkeypatch):
    from atn_norms.layers import export as module

    write = module._WRITERS["pt2"]

    def wrong(*arguments):
        outputs, run, note = write(*arguments)
        assert run is not None
        return outputs, lambda *inputs: [each + 1e-3 for each in run(*inputs)], note

    monkeypatch.setitem(module._WRITERS, "pt2", wrong)
    layer = trained(an.RNN(3, 4, norm="rms", window=2))
    with pytest.raises(SpecError, match="the exported model differs from the module by 0.001; expected at most"):
        export(WholeSequence(layer), [torch.randn(3, 1, 3)], tmp_path / "m.pt2", "pt2", names=["sequence"])
    assert not (tmp_path / "m.pt2").exists()


def test_the_command_exports_a_saved_layer(tmp_path, capsys):
    pytest.importorskip("safetensors")
    path = an.save(trained(an.GRU(3, 4, norm="layer", window=3)), tmp_path / "m.safetensors")
    assert main(["export", str(path), "--format", "pt2", "--streaming", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"].endswith("m-step.pt2") and facts["difference"] <= 1e-6 and facts["microseconds"] > 0
    assert facts["inputs"]["frame"] == {"type": "float32", "shape": [1, 3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onxx"], r"--format: got 'onxx'; expected one of onnx, pt2, aoti; did you mean 'onnx'\?"),
        (["--streaming"], "a bidirectional layer"),
    ],
)
def test_the_command_refuses_bad_input(tmp_path, capsys, arguments, message):
    pytest.importorskip("safetensors")
    path = an.save(an.GRU(3, 4, bidirectional=True), tmp_path / "m.safetensors")
    assert main(["export", str(path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
