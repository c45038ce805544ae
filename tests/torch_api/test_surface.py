"""The interface of torch.nn beyond the call: attributes, setters, argument types, replicas."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import atn_norms as an
from atn_norms.backends.fused.plugin_windows import recognized
from atn_norms.layers.spec import LayerSpec
from tests.compare import compare
from tests.native.test_weighted import Plugin
from tests.torch_api.features import feature
from tests.torch_api.test_transforms import CELLS, NORMS, every_layer

GROUP = "The interface of torch.nn"


@feature(GROUP, "replicas in threads (`DataParallel`)", "torch", "Each replica runs its own module of `torch.nn`.")
@every_layer
def test_replicas_keep_their_own_weights(cell):
    """A replica copies the attributes of its layer, so whatever a call changes must belong to that call."""
    layer = CELLS[cell](3, 4)
    replicas = [layer._replicate_for_data_parallel() for _ in range(2)]
    for value, replica in enumerate(replicas):
        for name in layer._flat_weights_names:
            setattr(replica, name, torch.full_like(getattr(layer, name), 0.1 * value))
    first, second = (replica._twin() for replica in replicas)
    assert (first._flat_weights[0] == 0).all() and (second._flat_weights[0] == 0.1).all()
    x = torch.randn(5, 2, 3)
    compare(first.forward(x)[0], replicas[0](x)[0], tolerance=0)


@feature(GROUP, "calls of replicas in several threads", "native", "Torch's code without a norm.")
@pytest.mark.parametrize("norm", [None, *NORMS])
@every_layer
def test_replicas_in_threads_do_not_disturb_each_other(cell, norm):
    layer, x = CELLS[cell](3, 4, norm=norm, window=2 if norm else 1).eval(), torch.randn(5, 2, 3)
    replicas = [layer._replicate_for_data_parallel() for _ in range(2)]
    for scale, replica in enumerate(replicas, 1):
        for name in layer._flat_weights_names:
            setattr(replica, name, getattr(layer, name).detach() * scale)
    expected = [replica(x)[0] for replica in replicas]
    assert not torch.equal(*expected)

    def disturbed(place):
        return sum(not torch.equal(replicas[place](x)[0], expected[place]) for _ in range(200))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(disturbed, range(2))) == [0, 0]
    finally:
        sys.setswitchinterval(before)


@every_layer
def test_copies_and_pickles_run_torch_s_module(cell):
    layer, x = CELLS[cell](3, 4, 2), torch.randn(5, 2, 3)
    for copied in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        compare(copied(x), layer(x), tolerance=0)


@feature(
    GROUP,
    "`out.mul_(2)` and other changes of the output in place before the backward pass",
    "torch's error",
    "As with `nn.LSTM`; `nn.GRU` and `nn.RNN` accept such changes on the CPU. Write `out = 2 * out`. Final states, "
    "packed sequences and outputs of bidirectional layers may be changed.",
)
@pytest.mark.parametrize("norm", NORMS)
@every_layer
def test_an_output_that_is_changed_in_place_has_no_wrong_gradients(cell, norm):
    def gradients(change, **options):
        torch.manual_seed(0)
        layer = CELLS[cell](3, 4, norm=norm, window=2, **options)
        out, state = layer(torch.linspace(-1, 1, 30).view(5, 2, 3))
        return torch.autograd.grad(change(out, state), list(layer.parameters()))

    def of_output(out, state):
        return (2 * out).sum()

    def in_place(out, state):
        return out.mul_(2).sum()

    def in_place_states(out, state):
        for each in state if isinstance(state, tuple) else [state]:
            each.mul_(0)
        return (2 * out).sum()

    both = {"bidirectional": True}
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: .* output 0 of RecurrentLayer, is at version 1"
    ):
        gradients(in_place)
    compare(gradients(in_place_states), gradients(of_output), tolerance=0)
    compare(gradients(in_place, **both), gradients(of_output, **both), tolerance=0)


@feature(GROUP, "`layer(input=x, hx=h)`", "native")
@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_the_argument_is_named_input(cell, norm):
    layer, x = CELLS[cell](3, 4, norm=norm), torch.randn(5, 2, 3)
    compare(layer(input=x, hx=None), layer(x), tolerance=0)


@feature(GROUP, "`layer.dropout = p`, `layer.batch_first = True`", "native")
@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_dropout_and_batch_first_may_be_assigned(cell, norm):
    layer, x = CELLS[cell](3, 4, 2, norm=norm, dropout=0.5), torch.randn(5, 2, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.dropout = 0.0
    expected = layer(x)[0]
    compare(layer(x)[0], expected, tolerance=0)
    layer.batch_first = True
    compare(layer(x.transpose(0, 1))[0], expected.transpose(0, 1), tolerance=0)
    assert layer.spec.batch_first and layer.spec.dropout == 0.0
    with pytest.raises(ValueError, match="dropout"):
        layer.dropout = 2.0


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_norm_without_gain_or_shift_is_the_same_on_every_backend(norm, name):
    layer = an.GRU(3, 4, norm={"kind": norm, "bias": True} if norm == "rms" else norm, window=2)
    for parameter in an.norm_parameters(layer).values():
        nn.init.normal_(parameter)
    identity, neutral = copy.deepcopy(layer), nn.init.ones_ if name == "weight" else nn.init.zeros_
    for module, other in zip(layer.children(), identity.children(), strict=True):
        setattr(module, name, None)
        neutral(other.get_parameter(name))
    x = torch.randn(5, 2, 3)
    for backend in ("native", "reference"):
        compare(an.with_backend(layer, backend)(x)[0], an.with_backend(identity, backend)(x)[0], tolerance=1e-6)
    layer.reset_parameters()
    assert all(getattr(module, name) is None for module in layer.children())


@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_options_that_cannot_be_assigned_raise(cell, norm):
    layer = CELLS[cell](3, 4, norm=norm)
    names = {*LayerSpec.model_fields, "nonlinearity", "proj_size", "spec"} - {"dropout", "batch_first"}
    for name in names:
        with pytest.raises(
            AttributeError, match=rf"\.{name}: got 5; expected no assignment, since .*(new layer|copy|another name)"
        ):
            setattr(layer, name, 5)
        assert vars(layer).get(name) != 5
    with pytest.raises(AttributeError, match=r"LSTMCell\.window: got 5; expected no assignment"):
        an.LSTMCell(3, 4, norm="layer").window = 5
    copied = copy.deepcopy(layer)
    with pytest.raises(AttributeError, match=r"backend: got 'native'; .*Use atn_norms\.with_backend"):
        copied.backend = "native"
    compare(copied(torch.ones(2, 1, 3))[0], layer(torch.ones(2, 1, 3))[0], tolerance=0)


@feature(
    GROUP,
    "`all_weights`, `_all_weights`, `_flat_weights`, `mode`, `check_input`, `permute_hidden`, `proj_size`",
    "torch",
    "Read-only; the checks are torch's.",
)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_attributes_of_torch_s_modules(cell, norm, options):
    theirs, ours = getattr(nn, cell.upper())(3, 4, **options), CELLS[cell](3, 4, norm=norm, **options)
    names = ["_all_weights", "_flat_weights_names", "mode", "proj_size", "num_layers", "batch_first", "dropout", "bias"]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.load_state_dict(theirs.state_dict(), strict=False)
    compare(ours._flat_weights, theirs._flat_weights, tolerance=0)
    x, order = torch.randn(5, 2, 3), torch.tensor([1, 0])
    h = torch.randn(*theirs.get_expected_hidden_size(x, None))
    hx: Any = (h, 2 * h) if cell == "lstm" else h
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    compare(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order), tolerance=0)
    for layer in (theirs, ours):
        layer.check_input(x, None)
        layer.check_forward_args(x, hx, None)
        with pytest.raises(RuntimeError, match="must be equal to input_size"):
            layer.check_input(x[..., :2], None)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            layer.check_hidden_size(h[:, :1], theirs.get_expected_hidden_size(x, None))


@every_layer
def test_a_recipe_that_fills_forget_biases_works(cell):
    layer = CELLS[cell](3, 4, norm="layer")
    for names in layer._all_weights:
        for name in filter(lambda name: "bias" in name, names):
            getattr(layer, name).data.fill_(1.0)
    assert (layer.bias_ih_l0 == 1).all() and (layer.bias_hh_l0 == 1).all()


@feature(
    GROUP,
    "`isinstance(layer, nn.LSTM)`, `nn.RNNBase`",
    "False",
    "Test for `(nn.RNNBase, atn_norms.Recurrent)` where code initializes recurrent layers.",
)
@every_layer
def test_isinstance_is_decided(cell):
    layer = CELLS[cell](3, 4)
    assert not isinstance(layer, nn.RNNBase)
    assert isinstance(layer, an.Recurrent)


TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@feature(GROUP, "`lengths` of every integer type, of numpy, and as a list", "native")
@pytest.mark.parametrize("backend", ["native", "reference"])
@every_layer
def test_lengths_of_every_integer_type(cell, backend):
    layer, x = CELLS[cell](3, 4, norm="layer", window=2, backend=backend), torch.randn(5, 2, 3)
    expected, _ = layer.unroll(x, lengths=[5, 2])
    many: list[Any] = [torch.tensor([5, 2]).to(dtype) for dtype in TYPES]
    many += [np.array([5, 2], dtype) for dtype in ("uint8", "int32", "uint64", "int64")]
    many += [[np.int64(5), np.uint8(2)], (5, 2)]
    for lengths in many:
        compare(layer.unroll(x, lengths=lengths)[0], expected, tolerance=0)
    with pytest.raises(ValueError, match="lengths: got .* in row 0"):
        layer.unroll(x, lengths=torch.tensor([2**64 - 1, 2], dtype=torch.uint64))


@feature(GROUP, "numpy integers as sizes, any `Mapping` as options", "native")
@every_layer
def test_numpy_integers_and_mappings_are_options(cell):
    norm = MappingProxyType({"kind": "layer", "eps": np.float64(1e-3)})
    window = MappingProxyType({"kind": "sliding", "steps": np.int64(3)})
    layer = CELLS[cell](np.int64(3), np.int32(4), np.int64(2), norm=norm, window=window)
    assert (layer.input_size, layer.hidden_size, layer.num_layers) == (3, 4, 2)
    assert layer.spec.window.steps == 3 and layer.spec.norm.eps == 1e-3
    assert CELLS[cell](3, 4, norm="layer", window=np.int64(3)).spec.window.steps == 3
    sites = MappingProxyType({"sites": MappingProxyType({"ih": norm})})
    assert CELLS[cell](3, 4, norm=sites).spec.norm.sites["ih"].eps == 1e-3


@pytest.mark.parametrize("norm", NORMS)
@every_layer
def test_a_layer_on_the_meta_device_computes_shapes(cell, norm):
    layer = CELLS[cell](3, 4, norm=norm, device="meta")
    ys, _ = layer(torch.empty(5, 2, 3, device="meta"))
    assert ys.is_meta and ys.shape == (5, 2, 4) and layer.unroll(torch.empty(5, 2, 3, device="meta"))[0].is_meta


@every_layer
def test_a_layer_whose_norms_are_none_has_no_norm(cell):
    layer, x = CELLS[cell](3, 4, norm="layer", window=2), torch.randn(5, 2, 3)
    for name, _ in list(layer.named_children()):
        setattr(layer, name, None)
    plain = CELLS[cell](3, 4)
    plain.load_state_dict(layer.state_dict())
    compare(layer(x), plain(x), tolerance=0)
    assert layer._delegates() and "backend 'torch'" in an.explain(layer)
    layer.reset_parameters()


@every_layer
def test_a_module_other_than_a_normalizer_is_rejected(cell):
    layer = CELLS[cell](3, 4, norm="layer")
    expected = r"\.norm_hh_l0: got Identity; expected a Normalizer, or None for a site without a norm$"
    with pytest.raises(TypeError, match=expected):
        layer.norm_hh_l0 = nn.Identity()
    assert isinstance(layer.norm_hh_l0, an.LayerNorm)
    layer.norm_head = nn.Identity()  # a module of a subclass
    assert layer(torch.randn(5, 2, 3))[0].isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", ["torch", "paper"])
@every_layer
def test_the_device_of_a_layer_overrides_the_default_device(cell, init, norm):
    torch.manual_seed(0)
    expected = CELLS[cell](3, 4, norm=norm, init=init)
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = CELLS[cell](3, 4, norm=norm, init=init, device="cpu")
    compare(dict(layer.state_dict()), dict(expected.state_dict()), tolerance=0)


@pytest.mark.parametrize("norm", [None, *NORMS])
@every_layer
def test_an_input_on_another_device_is_rejected(cell, norm):
    layer, x = CELLS[cell](3, 4, norm=norm), torch.randn(5, 2, 3, device="meta")
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    packed = packed._replace(data=packed.data.to("meta"))
    for call in (lambda: layer(x), lambda: layer.unroll(x), lambda: layer(packed)):
        with pytest.raises(RuntimeError, match="device"):
            call()
    if norm is not None:
        with pytest.raises(RuntimeError, match="x: got a tensor on meta; expected the device of the layer, cpu"):
            layer(x)


def test_a_default_device_does_not_move_lengths():
    layer = an.LSTM(3, 4, norm="layer")
    with torch.device("meta"):
        ys, _ = layer.unroll(torch.randn(5, 2, 3, device="cpu"), lengths=[5, 2])
    assert ys.shape == (5, 2, 4) and not ys[2:, 1].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("window", [3, "cumulative"])
@pytest.mark.parametrize("norm", ["batch", {"kind": "batch", "max_steps": 3}])
def test_a_default_device_does_not_move_batch_statistics(norm, window, training):
    layer, x = an.GRU(3, 4, norm=norm, window=window, backend="native").train(training), torch.randn(5, 3, 3)
    twin, found = copy.deepcopy(layer), []
    for each, device in ((layer, "meta"), (twin, "cpu")):
        with torch.device(device):
            y, state = each.unroll(x, lengths=[5, 2, 4])
            found.append([y, *each.unroll(x, state), *each.buffers()])
    compare(found[0], found[1], tolerance=0)


def test_a_default_device_does_not_move_the_comparisons_of_windows():
    assert recognized(Plugin((3.0, 2.0, 1.0))) is not None
    with torch.device("meta"):
        assert recognized(Plugin((2.0, 1.0))) is not None and an.Sliding(2).uniform_weights


class Counted(nn.Module):
    """A parametrization that draws a random number, as weight drop does, and counts its calls."""

    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * (1 + torch.rand(()))


CALLS: dict[str, Any] = {
    "x": lambda layer, x, h: layer(x),
    "x, hx": lambda layer, x, h: layer(x, h),
    "packed": lambda layer, x, h: layer(nn.utils.rnn.pack_sequence(list(x.unbind(1)))),
    "packed, hx": lambda layer, x, h: layer(nn.utils.rnn.pack_sequence(list(x.unbind(1))), h),
    "unroll": lambda layer, x, h: layer.unroll(x),
}


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("call", CALLS)
@every_layer
def test_a_parametrization_is_computed_once_in_a_call(cell, call, norm):
    layer, x = CELLS[cell](3, 4, norm=norm), torch.randn(5, 2, 3)
    counted = Counted()
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", counted)
    h = torch.zeros(1, 2, 4)
    counted.calls, state = 0, torch.get_rng_state()
    layer.train().eval().train()
    assert layer.mode.startswith(cell.upper())
    assert counted.calls == 0 and torch.equal(torch.get_rng_state(), state)
    CALLS[call](layer, x, (h, h) if cell == "lstm" else h)
    assert counted.calls == 1


@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_the_mode_may_be_set_while_a_weight_is_absent(cell, norm):
    """Weight drop deletes a weight, and sets it before each call."""
    layer = CELLS[cell](3, 4, norm=norm)
    raw = layer._parameters.pop("weight_hh_l0")
    layer.register_parameter("weight_hh_l0_raw", raw)
    layer.train().eval()
    layer.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert raw.grad is not None


@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_a_subclass_may_store_its_state_in_hidden(cell, norm):
    class Stateful(CELLS[cell]):
        hidden: Any

        def __init__(self):
            super().__init__(3, 4, norm=norm)
            self.hidden = None

        def forward(self, input, hx=None):
            y, self.hidden = super().forward(input, self.hidden)
            return y, self.hidden

    layer, x = Stateful(), torch.randn(5, 2, 3)
    plain = CELLS[cell](3, 4, norm=norm)
    plain.load_state_dict(layer.state_dict())
    first, state = plain(x)
    compare(layer(x)[0], first, tolerance=0)
    compare(layer(x)[0], plain(x, state)[0], tolerance=0)
    packed = nn.utils.rnn.pack_sequence(list(x.unbind(1)))
    layer.hidden = None
    compare(layer(packed)[0].data, plain(packed)[0].data, tolerance=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "make", [*CELLS.values(), an.LSTMCell, lambda *sizes, norm: an.replace(nn.GRU(3, 4), norm=norm)]
)
def test_a_layer_is_built_in_a_fake_tensor_mode(make, norm):
    with torch._subclasses.FakeTensorMode():
        layer = make(3, 4, norm=norm)
        shape = (2, 3) if isinstance(layer, an.LSTMCell) else (5, 2, 3)
        assert layer(torch.randn(shape))[0].shape == (*shape[:-1], 4)
