"""The public interface: names, call shapes and parameter names that other code relies on."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import atn_norms as an

NAMES = """
AssortedTime Average BatchNorm Cell CellSpec Cumulative Exponential GRU GRUCell LSTM LSTMCell
LayerNorm LayerSpec Moments NormSpec Normalizer RMSNorm RNN RNNCell Recurrent Sliding Statistic
TaskSpec Window WindowSpec build detach explain hookimpl reorder replace
""".split()  # noqa: SIM905
COMMANDS = "ablate bench check doctor init list new-plugin plugins report resume schema show status".split()  # noqa: SIM905
NORMS = [None, "none", "layer", "batch", "rms", {"kind": "layer", "eps": 1e-4}]
WINDOWS = [
    3,
    {"kind": "sliding", "steps": 3},
    {"kind": "cumulative"},
    {"kind": "exponential", "half_life": 2.0},
    an.Sliding(3),
]
LAYERS = [an.LSTM, an.GRU, an.RNN]
ROOT = Path(__file__).parents[1]
LENGTHS = torch.tensor([6, 2, 4])


@pytest.fixture
def x():
    return torch.randn(6, 3, 4)


def test_the_public_names_are_importable():
    assert not [name for name in NAMES if not hasattr(an, name)]
    assert set(NAMES) <= set(an.__all__)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_take_the_arguments_of_torch_in_its_order(layer):
    assert isinstance(layer(4, 5, 2, norm=None), torch.nn.Module)
    theirs = getattr(torch.nn, layer.__name__)
    assert list(layer(4, 5, 2, norm=None).state_dict()) == list(theirs(4, 5, 2).state_dict())


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_accept_every_form_of_norm(layer, norm, x):
    assert layer(4, 5, norm=norm)(x)[0].shape == (6, 3, 5)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_accept_every_form_of_window(layer, window, x):
    assert layer(4, 5, norm="layer", window=window)(x)[0].shape == (6, 3, 5)


@pytest.mark.parametrize("layer", LAYERS)
def test_unroll_takes_and_returns_the_state(layer, x):
    module = layer(4, 5, norm="layer", window=3)
    _, state = module.unroll(x[:2])
    assert module.unroll(x[2:], state)[0].shape == (4, 3, 5)
    assert module.unroll(x, lengths=LENGTHS)[0].shape == (6, 3, 5)


def test_norms_are_named_after_site_and_layer():
    for layer in LAYERS:
        assert {"norm_ih_l0.weight", "norm_hh_l0.bias"} <= {
            name for name, _ in layer(4, 5, norm="layer").named_parameters()
        }
    assert "norm_c_l0.weight" in dict(an.LSTM(4, 5, norm="layer").named_parameters())


def test_a_cell_runs_one_step(x):
    assert an.LSTMCell(4, 5, norm="rms", window=2)(x[0])[0].shape == (3, 5)


def test_assorted_time_steps_and_scans(x):
    norm = an.AssortedTime(an.LayerNorm(4), window=3)
    assert norm.scan(x)[0].shape == x.shape
    assert norm.step(x[1], norm.step(x[0])[1])[0].shape == x[0].shape


def test_moments_keep_the_axis_and_are_rebuilt_from_their_leaves(x):
    moments = an.Moments.of(x, dim=-1)
    assert moments.mean.shape == moments.var.shape == (6, 3, 1)
    assert type(moments)(*moments) == moments


def test_the_methods_of_a_normalizer():
    assert list(inspect.signature(an.Normalizer.normalize).parameters)[1:] == ["x", "pooled"]
    assert "x" in inspect.signature(an.Normalizer.measure).parameters


def test_build_and_explain(x):
    layer = an.build({"cell": "lstm", "input_size": 4, "hidden_size": 5, "norm": "layer", "window": 3})
    assert layer(x)[0].shape == (6, 3, 5)
    assert isinstance(an.explain(layer), str)
    assert an.LSTM(4, 5, norm="layer", init="paper").spec.init == "paper"


def test_the_commands_are_there():
    program = Path(sys.executable).parent / "atn-norms"
    listing = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert not [command for command in COMMANDS if f" {command} " not in listing]


CHECKED = {
    "an.NoSuchThing\n": "NoSuchThing",
    "an.LSTM(2, 3, norm='layer', windows=5)\n": "windows",
    "an.LSTM(2, 3, norm='layer', window=5)\nan.LayerNorm(3)\n": None,
}


@pytest.mark.parametrize("checker", [pytest.param("mypy", marks=pytest.mark.deep), "pyright"])
def test_type_checkers_know_the_public_names(checker, tmp_path):
    pytest.importorskip(checker)
    options = ["--follow-imports=silent", "--cache-dir", tmp_path / "cache"] if checker == "mypy" else []
    for place, (line, error) in enumerate(CHECKED.items()):
        file = tmp_path / f"use_{place}.py"
        file.write_text(f"import atn_norms as an\n{line}")
        command = [sys.executable, "-m", checker, *options, file]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode == 0) == (error is None), done.stdout
        assert error is None or error in done.stdout
