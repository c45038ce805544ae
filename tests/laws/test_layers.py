"""Initialization of layers, unsupported options, and replacement of torch layers in a model."""

from typing import Any

import pytest
import torch
from torch import nn

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import CELLS, GATES


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("inputs", "hidden"), [(2, 5), (5, 5), (40, 3), (1, 1)])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_the_paper_s_initialization(cell, inputs, hidden, norm):
    layer = getattr(an, cell)(inputs, hidden, 2, bidirectional=True, norm=norm, init="paper", dtype=torch.float64)
    for n in range(2):
        for end in ("", "_reverse"):
            w = getattr(layer, f"weight_ih_l{n}{end}").detach()
            tall = w if w.shape[0] >= w.shape[1] else w.T
            compare(tall.T @ tall, torch.eye(tall.shape[1], dtype=torch.float64), tolerance=1e-12)
            u = getattr(layer, f"weight_hh_l{n}{end}").detach()
            compare(u, torch.cat([torch.eye(hidden, dtype=torch.float64)] * GATES[cell]), tolerance=0)
            for name in ("bias_ih", "bias_hh"):
                assert (getattr(layer, f"{name}_l{n}{end}") == 0).all()


@pytest.mark.parametrize("init", ["torch", "paper"])
@pytest.mark.parametrize("base", ["layer", "rms", "batch"])
def test_gains_start_at_one_and_shifts_at_zero_whatever_the_initialization(init, base):
    layer = an.LSTM(3, 4, 2, norm={"kind": base, **({"bias": True} if base == "rms" else {})}, init=init)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        if name.startswith("norm_"):
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("cell", CELLS)
def test_reset_draws_the_same_values_as_torch(cell):
    mine, theirs = getattr(an, cell)(3, 4, 2, norm="layer"), getattr(nn, cell)(3, 4, 2)
    torch.manual_seed(9)
    mine.reset_parameters()
    torch.manual_seed(9)
    theirs.reset_parameters()
    for name, parameter in theirs.named_parameters():
        compare(mine.get_parameter(name), parameter, tolerance=0, what=name)


@pytest.mark.parametrize("norm", ["layer", "batch", {"kind": "rms", "bias": True}])
def test_the_forget_bias_is_a_shift_after_the_norm(norm):
    layer = an.LSTM(3, 4, 2, bidirectional=True, norm=norm, forget_bias=1.5)
    for n in range(2):
        for end in ("", "_reverse"):
            shift = getattr(layer, f"norm_ih_l{n}{end}").bias
            expected = torch.zeros(4, 4)
            expected[1] = 1.5  # gates i f g o
            compare(shift.detach().view(4, 4), expected, tolerance=0)
            assert (getattr(layer, f"norm_hh_l{n}{end}").bias == 0).all()


def test_the_forget_bias_opens_only_the_forget_gate():
    """With all weights 0 only the shift remains: c' = sigmoid(1.5) c + sigmoid(0) tanh(0)."""
    layer = an.LSTM(3, 4, norm="layer", forget_bias=1.5, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(layer, name).zero_()
    c = torch.randn(1, 2, 4, dtype=torch.float64)
    _, (_, after) = layer(torch.randn(1, 2, 3, dtype=torch.float64), (torch.zeros_like(c), c))
    compare(after, c * torch.tensor(1.5, dtype=torch.float64).sigmoid(), tolerance=1e-12)


@pytest.mark.parametrize("gates", ["joint", "per_gate"])
@pytest.mark.parametrize("summed", ["separate", "joint"])
def test_the_forget_bias_affects_its_gate_in_every_placement(gates, summed):
    layer = an.LSTM(3, 4, norm="layer", forget_bias=2.0, placement={"gates": gates, "sum": summed}, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(layer, name).zero_()
    c = torch.randn(1, 2, 4, dtype=torch.float64)
    _, (_, after) = layer(torch.randn(1, 2, 3, dtype=torch.float64), (torch.zeros_like(c), c))
    compare(after, c * torch.tensor(2.0, dtype=torch.float64).sigmoid(), tolerance=1e-12)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("LSTM", {"norm": "rms"}),
        ("LSTM", {"norm": None, "bias": False}),
        ("GRU", {"norm": "layer"}),
        ("RNN", {"norm": "layer"}),
    ],
)
def test_a_forget_bias_without_a_shift_is_rejected(cell, options):
    with pytest.raises(ValueError, match="forget_bias"):
        getattr(an, cell)(3, 4, forget_bias=1.0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"norm": "none", "window": {"kind": "cumulative"}},
        {"norm": "layer", "window": 0},
        {"norm": "layer", "window": True},
        {"norm": "layer", "window": 2.5},
        {"norm": "laier"},
        {"norm": {"kind": "layer", "epps": 1e-5}},
        {"norm": {"sites": {"cc": "layer"}}},
        {"norm": "layer", "placement": {"sum": "both"}},
        {"norm": "layer", "init": "papers"},
        {"norm": "layer", "backend": "referense"},
    ],
)
def test_unsupported_options_are_named(options):
    with pytest.raises((ValueError, TypeError)) as refused:
        an.LSTM(3, 4, **options)
    assert any(name in str(refused.value) for name in options), str(refused.value)


@pytest.mark.parametrize("placement", [{"sum": "joint"}, {"carry": "normed"}])
def test_a_gru_does_not_support_some_placements(placement):
    with pytest.raises(ValueError, match="placement"):
        an.GRU(3, 4, norm="layer", placement=placement)


def test_an_explicit_backend_reports_why_it_is_unsupported():
    with pytest.raises(ValueError, match="torch"):
        an.LSTM(3, 4, norm="layer", backend="torch")
    assert "reference" in an.explain(an.LSTM(3, 4, norm="layer"))


class Model(nn.Module):
    """Recurrent layers at several depths, one of them shared."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(3, 4, batch_first=True, bidirectional=True, proj_size=2)
        self.blocks: Any = nn.ModuleList([nn.ModuleDict({"core": nn.GRU(4, 4, 2, batch_first=True, dropout=0.25)})])
        self.again = self.blocks[0]["core"]
        self.last = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.rnn = nn.RNN(5, 2, nonlinearity="relu", bias=False, batch_first=True)

    def forward(self, x):
        x = self.blocks[0]["core"](self.first(x)[0])[0]
        return self.rnn(self.last(self.again(x)[0]))[0]


def test_replacing_keeps_weights_numbers_and_everything_else():
    torch.manual_seed(0)
    model: Any = Model().double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    expected, weights = model(x), dict(model.state_dict())
    objects = {name: id(p) for name, p in model.named_parameters()}
    changed = an.replace(model, norm=None)
    assert changed is model
    assert [type(m) for m in (model.first, model.again, model.rnn)] == [an.LSTM, an.GRU, an.RNN]
    assert model.again is model.blocks[0]["core"]
    assert not any(isinstance(m, nn.RNNBase) for m in model.modules())
    assert not model.first.training
    compare(model(x), expected, tolerance=1e-12)
    compare(dict(model.state_dict()), weights, tolerance=0)
    assert {name: id(p) for name, p in model.named_parameters()} == objects


def test_replacing_with_a_norm_keeps_the_weights_and_adds_norms():
    model: Any = Model().double()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    an.replace(model, norm="layer", window=3)
    after = dict(model.state_dict())
    compare({name: after[name] for name in weights}, weights, tolerance=0)
    added = [name for name in after if name not in weights]
    assert added
    assert all("norm_" in name for name in added)
    assert {after[name].dtype for name in added} == {torch.float64}
    assert model.again.dropout == 0.25
    assert model.rnn.nonlinearity == "relu"
    assert model.first.proj_size == 2
    ys = model(torch.randn(2, 6, 3, dtype=torch.float64))
    assert ys.shape == (2, 6, 2)
    ys.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_replacing_a_layer_itself_returns_the_new_one(cell):
    theirs = getattr(nn, cell)(3, 4)
    mine: Any = an.replace(theirs, norm="rms", window=2)
    assert type(mine) is getattr(an, cell)
    compare({n: p for n, p in mine.state_dict().items() if "norm_" not in n}, dict(theirs.state_dict()), tolerance=0)


def test_an_unsupported_replacement_leaves_the_model_unchanged():
    class Own(nn.LSTM):
        pass

    model = nn.Sequential(nn.GRU(3, 4), Own(4, 4))
    with pytest.raises(TypeError, match="1: got Own"):
        an.replace(model, norm="layer", only=["0", "1"])
    assert type(model[0]) is nn.GRU
    with pytest.raises(ValueError, match="laier"):
        an.replace(nn.Sequential(nn.GRU(3, 4)), norm="laier")


@pytest.mark.parametrize("cell", CELLS)
def test_build_and_the_class_make_the_same_layer(cell):
    torch.manual_seed(4)
    skin = getattr(an, cell)(3, 4, 2, norm="layer", window=3)
    torch.manual_seed(4)
    built = an.build(
        {"cell": cell.lower(), "input_size": 3, "hidden_size": 4, "num_layers": 2, "norm": "layer", "window": 3}
    )
    assert type(built) is type(skin)
    assert built.spec == skin.spec
    x = torch.randn(5, 2, 3)
    compare(built(x), skin(x), tolerance=0)
