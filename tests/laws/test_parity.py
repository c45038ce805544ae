"""Without a norm, a layer equals torch's layer: names, outputs, random numbers, packing, errors."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import level

pytestmark = pytest.mark.filterwarnings("ignore:dropout option adds dropout")
EXACT = 1e-12


def combinations():
    for depth, bias, first, dropout, both in product([1, 2], [True, False], [False, True], [0.0, 0.5], [False, True]):
        options = {"num_layers": depth, "bias": bias, "batch_first": first, "dropout": dropout, "bidirectional": both}
        yield "GRU", options
        yield from (("LSTM", options | {"proj_size": size}) for size in (0, 2))
        yield from (("RNN", options | {"nonlinearity": name}) for name in ("tanh", "relu"))


COMBINATIONS = list(combinations())


def pair(cell, options, **ours):
    torch.manual_seed(1)
    theirs = getattr(nn, cell)(3, 4, dtype=torch.float64, **options)
    torch.manual_seed(1)
    mine = getattr(an, cell)(3, 4, dtype=torch.float64, **options, **ours)
    return mine, theirs


def states(cell, options, batch=None):
    deep = options["num_layers"] * (2 if options["bidirectional"] else 1)
    rows = () if batch is None else (batch,)
    h = torch.randn(deep, *rows, options.get("proj_size") or 4, dtype=torch.float64)
    return (h, torch.randn(deep, *rows, 4, dtype=torch.float64)) if cell == "LSTM" else h


def inputs(cell, options):
    """Return batched, unbatched and packed (sorted and unsorted) inputs, with and without initial states."""
    first = options["batch_first"]
    xs = torch.randn(*((3, 5, 3) if first else (5, 3, 3)), dtype=torch.float64)
    packed = [
        pack_padded_sequence(xs, torch.tensor(limit), batch_first=first, enforce_sorted=ordered)
        for limit, ordered in (([5, 3, 1], True), ([2, 5, 3], False))
    ]
    for x in (xs, *packed):
        yield x, None
        yield x, states(cell, options, 3)
    yield torch.randn(5, 3, dtype=torch.float64), None
    yield torch.randn(5, 3, dtype=torch.float64), states(cell, options)


def unpacked(result):
    y, final = result
    if isinstance(y, torch.Tensor):
        return y, final
    indices = [index for index in (y.sorted_indices, y.unsorted_indices) if index is not None]
    return (y.data, y.batch_sizes, *indices), final


def called(layer, x, hx):
    torch.manual_seed(2)  # dropout draws the same
    return unpacked(layer(x) if hx is None else layer(x, hx))


@pytest.mark.parametrize(("cell", "options"), COMBINATIONS)
def test_without_a_norm_the_numbers_are_torch_s(cell, options):
    mine, theirs = pair(cell, options)
    compare(dict(mine.state_dict()), dict(theirs.state_dict()), tolerance=0, what="initialization")
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for training in (True, False):
        mine.train(training)
        theirs.train(training)
        for x, hx in inputs(cell, options):
            compare(called(mine, x, hx), called(theirs, x, hx), tolerance=EXACT)
    x = torch.randn(*((3, 5, 3) if options["batch_first"] else (5, 3, 3)), dtype=torch.float64)
    gradients = []
    for layer in (mine, theirs):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))
    compare(gradients[0], gradients[1], tolerance=EXACT, scale=level(*gradients[1]))


@pytest.mark.parametrize(("cell", "options"), [c for c in COMBINATIONS if c[1]["dropout"] == 0.0])
def test_the_reference_without_a_norm_is_torch_s_too(cell, options):
    mine, theirs = pair(cell, options, backend="reference")
    for x, hx in inputs(cell, options):
        compare(called(mine, x, hx), called(theirs, x, hx), tolerance=EXACT)
    x = torch.randn(*((3, 5, 3) if options["batch_first"] else (5, 3, 3)), dtype=torch.float64)
    gradients = [torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())) for layer in (mine, theirs)]
    compare(gradients[0], gradients[1], tolerance=EXACT, scale=level(*gradients[1]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("cell", "options"), [c for c in COMBINATIONS if not c[1]["dropout"] and not c[1]["batch_first"]]
)
def test_weights_load_both_ways(cell, options, backend):
    torch.manual_seed(3)
    theirs = getattr(nn, cell)(3, 4, dtype=torch.float64, **options)
    mine = getattr(an, cell)(3, 4, dtype=torch.float64, backend=backend, **options)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    assert (mine(x)[0] - theirs(x)[0]).abs().max() > 1e-3
    mine.load_state_dict(theirs.state_dict())
    compare(mine(x), theirs(x), tolerance=EXACT)
    fresh = getattr(nn, cell)(3, 4, dtype=torch.float64, **options)
    fresh.load_state_dict(mine.state_dict())
    compare(fresh(x), mine(x), tolerance=EXACT)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_attributes_are_torch_s(cell):
    mine, theirs = pair(cell, {"num_layers": 2, "bidirectional": True, "dropout": 0.25, "batch_first": True})
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(mine, name) == getattr(theirs, name), name
    mine.flatten_parameters()


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_dtype_and_device_are_passed_as_in_torch(cell, norm):
    layer = getattr(an, cell)(3, 4, norm=norm, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


def h(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


WRONG = {
    "a vector": lambda: (h(3),),
    "four axes": lambda: (h(5, 2, 3, 1),),
    "another input size": lambda: (h(5, 2, 7),),
    "another input size, unbatched": lambda: (h(5, 7),),
    "another type": lambda: (h(5, 2, 3, dtype=torch.float64),),
    "integers": lambda: (h(5, 2, 3, dtype=torch.int64),),
    "states of another batch": lambda: (h(5, 2, 3), (h(1, 3, 4), h(1, 3, 4))),
    "states of another size": lambda: (h(5, 2, 3), (h(1, 2, 5), h(1, 2, 5))),
    "states of another depth": lambda: (h(5, 2, 3), (h(2, 2, 4), h(2, 2, 4))),
    "unbatched states of a batch": lambda: (h(5, 2, 3), (h(1, 4), h(1, 4))),
    "batched states of one sequence": lambda: (h(5, 3), (h(1, 2, 4), h(1, 2, 4))),
    "states of another type": lambda: (h(5, 2, 3), (h(1, 2, 4, dtype=torch.float64), h(1, 2, 4, dtype=torch.float64))),
    "a list": lambda: ([1.0, 2.0],),
    "nothing": lambda: (None,),
}


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_and_dtypes_raise_torch_s_message(cell, norm, name):
    x, *hx = WRONG[name]()
    given = [x, *(pair if cell == "LSTM" else pair[0] for pair in hx)]
    with pytest.raises(Exception) as theirs:  # noqa: PT011 any error of torch is expected
        getattr(nn, cell)(3, 4)(*given)
    with pytest.raises(Exception) as mine:  # noqa: PT011
        getattr(an, cell)(3, 4, norm=norm)(*given)
    assert type(mine.value) is type(theirs.value), f"{mine.value!r}, torch: {theirs.value!r}"
    if norm is None or name != "states of another type":  # torch names its kernel here
        assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_a_wrong_cell_state_raises_torch_s_message(norm):
    for hx in ((h(1, 2, 4), h(1, 2, 6)), (h(1, 2, 4), h(2, 2, 4)), (h(1, 2, 4), h(1, 4))):
        with pytest.raises(RuntimeError) as theirs:
            nn.LSTM(3, 4)(h(5, 2, 3), hx)
        with pytest.raises(RuntimeError) as mine:
            an.LSTM(3, 4, norm=norm)(h(5, 2, 3), hx)
        assert str(mine.value) == str(theirs.value)


def test_packed_input_of_the_wrong_size_is_rejected():
    """torch checks this in its kernels; a layer with a norm raises torch's message for padded input."""
    hx = (h(1, 3, 4), h(1, 3, 4))
    fits, wide = (pack_padded_sequence(h(5, 2, size), torch.tensor([5, 3])) for size in (3, 7))
    for layer in (nn.LSTM(3, 4), an.LSTM(3, 4)):
        with pytest.raises(RuntimeError):
            layer(fits, hx)
        with pytest.raises(RuntimeError):
            layer(wide)
    layer = an.LSTM(3, 4, norm="layer")
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 4\), got \[1, 3, 4\]"):
        layer(fits, hx)
    with pytest.raises(RuntimeError, match="Expected 3, got 7"):
        layer(wide)


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(
    ("cell", "positional"),
    [
        ("LSTM", (3, 4, 2, False, True, 0.25, True, 2)),
        ("GRU", (3, 4, 2, False, True, 0.25, True)),
        ("RNN", (3, 4, 2, "relu", False, True, 0.25, True)),
        ("LSTM", (3, 4, 2, True, False, 0)),
    ],
)
def test_arguments_have_torch_s_order(cell, positional, norm):
    mine, theirs = getattr(an, cell)(*positional, norm=norm), getattr(nn, cell)(*positional)
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(mine, name) == getattr(theirs, name), name
    for name in ("proj_size", "nonlinearity"):
        if name in vars(theirs) and hasattr(mine, name):
            assert getattr(mine, name) == getattr(theirs, name), name


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_batch_of_no_rows_gives_no_rows(cell, norm):
    y, final = getattr(an, cell)(3, 4, norm=norm)(h(5, 0, 3))
    expected, last = getattr(nn, cell)(3, 4)(h(5, 0, 3))
    compare(y, expected, tolerance=0)
    compare(final, last, tolerance=0)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_states_may_be_a_list_as_in_torch(norm):
    layer, x = an.LSTM(3, 4, norm=norm), torch.randn(5, 2, 3)
    pair = (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    compare(layer(x, list(pair)), layer(x, pair), tolerance=0)


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("LSTM", {"hidden_size": 0}),
        ("LSTM", {"hidden_size": 4.0}),
        ("LSTM", {"num_layers": 0}),
        ("LSTM", {"dropout": 1.5}),
        ("LSTM", {"dropout": -0.1}),
        ("LSTM", {"dropout": True}),
        ("LSTM", {"proj_size": 4}),
        ("LSTM", {"proj_size": -1}),
        ("GRU", {"proj_size": 2}),
        ("RNN", {"nonlinearity": "sine"}),
    ],
)
def test_wrong_options_are_rejected_as_in_torch(cell, norm, options):
    arguments = {"input_size": 3, "hidden_size": 4, **options}
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        getattr(nn, cell)(**arguments)
    with pytest.raises((ValueError, TypeError)) as mine:
        getattr(an, cell)(norm=norm, **arguments)
    assert next(iter(options)) in str(mine.value)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_dropout_applies_between_layers_in_training_only(cell):
    torch.manual_seed(0)
    layer = getattr(an, cell)(3, 4, 2, dropout=0.5, norm="layer", window=3, dtype=torch.float64)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    first = layer(x)[0]
    torch.manual_seed(1)
    compare(layer(x)[0], first, tolerance=0)
    assert (layer(x)[0] - first).abs().max() > 1e-6
    layer.eval()
    compare(layer(x)[0], layer(x)[0], tolerance=0)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_dropout_acts_only_on_outputs_between_layers(cell):
    torch.manual_seed(0)
    options = {"norm": "layer", "window": 3, "dtype": torch.float64}
    stack = getattr(an, cell)(3, 4, 2, dropout=0.5, **options)
    first, second = getattr(an, cell)(3, 4, **options), getattr(an, cell)(4, 4, **options)
    named = stack.state_dict()
    first.load_state_dict({name: named[name] for name in first.state_dict()})
    second.load_state_dict({name: named[name.replace("_l0", "_l1")] for name in second.state_dict()})
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    y = stack(x)[0]
    torch.manual_seed(1)
    compare(y, second(nn.functional.dropout(first(x)[0], 0.5))[0], tolerance=EXACT)


def test_one_layer_with_dropout_warns_as_torch_does():
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        an.LSTM(3, 4, dropout=0.5, norm="layer")
