"""Regression tests of known defects of windowed normalizers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import CELLS, LayerCase, layer_cases, leaves, seeds, sequence


@given(layer_cases(bases=["layer", "rms"]))
def test_no_state_leaks_into_the_next_sequence(case: LayerCase):
    layer, first, second = case.layer(num_layers=2), case.xs(), sequence("offset", case.seed, case.xs().shape)
    expected = case.layer(num_layers=2)(second)
    layer(first)
    compare(layer(second), expected, tolerance=0)
    tensors = {id(t) for t in (*layer.parameters(), *layer.buffers())}
    held = [
        v for m in layer.modules() for v in vars(m).values() if isinstance(v, torch.Tensor) and id(v) not in tensors
    ]
    assert not held, "a module keeps a tensor of the last sequence"


@given(layer_cases(bases=["layer", "rms"]))
def test_every_layer_of_the_stack_starts_fresh(case: LayerCase):
    """Windows of the second layer must not keep state from the previous call either."""
    layer, xs = case.layer(num_layers=3), case.xs()
    once = layer(xs)
    compare(layer(xs), once, tolerance=0)
    _, state = layer.unroll(xs)
    fresh = layer.initial(case.batch)
    assert len(fresh) == len(state) == 3
    compare(leaves(layer.unroll(xs, fresh)[1]), leaves(state), tolerance=0)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("batch", "hidden", "inputs", "steps"), [(1, 4, 2, 3), (3, 1, 2, 3), (1, 1, 1, 3), (1, 1, 1, 1)]
)
def test_no_axis_of_size_one_is_squeezed_away(cell, first, batch, hidden, inputs, steps):
    case = LayerCase(1, cell, "layer", ("sliding", 2), steps, batch, inputs, hidden)
    layer = case.layer(batch_first=first, num_layers=2, bidirectional=True)
    xs = case.xs().transpose(0, 1) if first else case.xs()
    ys, final = layer(xs)
    assert ys.shape == ((batch, steps, 2 * hidden) if first else (steps, batch, 2 * hidden))
    assert all(leaf.shape == (4, batch, hidden) for leaf in leaves(final))
    wide = torch.cat([xs, xs], 0 if first else 1)
    together = layer(wide)[0]
    compare(together.narrow(0 if first else 1, batch, batch), ys, tolerance=1e-12)
    norm = an.AssortedTime(an.LayerNorm(hidden).double(), window=2)
    y, state = norm.step(torch.randn(batch, hidden, dtype=torch.float64))
    assert y.shape == (batch, hidden)
    assert all(leaf.shape[0] == batch for leaf in leaves(state))


def kept_bytes(run) -> int:
    """Return the bytes that autograd saves for a forward pass, each storage counted once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out is not None
    return sum(kept.values())


@pytest.mark.parametrize("where", ["scan", "layer"])
def test_memory_does_not_grow_by_stacked_pre_activations(where):
    """A longer window may store scalars per step and row; pre-activations would need `features` times as much."""
    steps, batch, k, scalars = 40, 2, 30, 8

    def growth(features):
        def kept(window):
            if where == "scan":
                norm = an.AssortedTime(an.LayerNorm(features), window=window)
                xs = torch.randn(steps, batch, features, requires_grad=True)
                return kept_bytes(lambda: norm.scan(xs)[0])
            layer = an.RNN(2, features, norm="layer", window=window)
            xs = torch.randn(steps, batch, 2, requires_grad=True)
            return kept_bytes(lambda: layer(xs)[0])

        return kept(k) - kept(1)

    narrow, wide = growth(8), growth(256)
    sites = 1 if where == "scan" else 2
    assert wide <= sites * steps * batch * k * 8 * scalars
    assert abs(wide - narrow) <= 0.25 * abs(narrow) + 4096  # growth must not depend on the number of features
    stacked = 4 * steps * batch * k * 256
    assert wide < stacked


def test_the_state_holds_statistics_and_no_pre_activations():
    def size(features):
        norm = an.AssortedTime(an.LayerNorm(features), window=25)
        _, state = norm.scan(torch.randn(40, 3, features))
        return sum(leaf.numel() for leaf in leaves(state))

    assert size(8) == size(512) <= 3 * (1 + 24 * 3)  # a counter; of each past step a weight, a mean, a variance


@pytest.mark.parametrize("cell", CELLS)
def test_the_hidden_state_crosses_a_segment(cell):
    case = LayerCase(3, cell, "layer", ("sliding", 3), steps=6, batch=2, inputs=2, hidden=4)
    layer, xs = case.layer(), case.xs()
    whole, _ = layer(xs)
    _, state = layer.unroll(xs[:3])
    carried, _ = layer.unroll(xs[3:], state)
    compare(carried, whole[3:], tolerance=1e-12)
    fresh, _ = layer(xs[3:])
    assert (fresh - whole[3:]).abs().max() > 1e-3
    hidden_only, _ = layer.unroll(xs[3:], layer.initial(2, layer.hidden(state)))
    assert (hidden_only - whole[3:]).abs().max() > 1e-6  # the window state must cross, too
    given, _ = layer(xs[3:], layer.hidden(state))
    compare(given, hidden_only, tolerance=0)


@given(seed=seeds, norm=st.sampled_from(["layer", "rms"]))
def test_a_plain_normalizer_is_a_window_of_one(seed, norm):
    """Compare with torch functions: the default has no window."""
    case = LayerCase(seed, "LSTM", norm, ("sliding", 1), steps=5, batch=3, inputs=2, hidden=4)
    layer = case.layer(window=1)
    del_window = an.LSTM(2, 4, norm=norm, dtype=torch.float64)
    del_window.load_state_dict(layer.state_dict())

    def apply(name, a):
        module = getattr(layer, name)
        if norm == "layer":
            return F.layer_norm(a, a.shape[-1:], module.weight, module.bias, 1e-5)
        return F.rms_norm(a, a.shape[-1:], module.weight, 1e-5)

    xs, h, c = case.xs(), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    ys, _ = del_window(xs)
    for x, y in zip(xs, ys, strict=True):
        gates = apply("norm_ih_l0", x @ layer.weight_ih_l0.T + layer.bias_ih_l0)
        gates = gates + apply("norm_hh_l0", h @ layer.weight_hh_l0.T + layer.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * apply("norm_c_l0", c).tanh()
        compare(y, h, tolerance=1e-10)


@pytest.mark.parametrize("init", ["torch", "paper"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_seed_initializes_every_variant_alike(cell, init):
    """Otherwise a study would compare initializations."""

    def weights(**options):
        torch.manual_seed(5)
        layer = getattr(an, cell)(3, 6, num_layers=2, bidirectional=True, init=init, **options)
        return {name: p for name, p in layer.named_parameters() if "norm_" not in name}

    plain = weights()
    for options in (
        {"norm": "layer"},
        {"norm": "rms", "window": 25},
        {"norm": "batch", "window": "cumulative"},
        {"norm": "layer", "placement": {"gates": "per_gate"}},
        {"norm": {"sites": {"hh": "layer"}}},
        {"backend": "reference"},
    ):
        compare(weights(**options), plain, tolerance=0, what=str(options))


def test_the_hidden_size_is_the_requested_size():
    layer = an.LSTM(20, 100, norm="layer", window=20)
    assert layer.hidden_size == 100
    assert layer.weight_hh_l0.shape == (400, 100)
    assert layer(torch.zeros(2, 1, 20))[0].shape == (2, 1, 100)
