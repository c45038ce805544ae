"""Copies of layers and states: state dicts, pickles, deep copies; states detached, reordered, saved and moved."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import atn_norms as an
from tests.compare import compare
from tests.laws.strategies import (
    BASES,
    CELLS,
    KINDS,
    LayerCase,
    layer_cases,
    leaves,
    normalizer,
    sequence,
    stirred,
    window,
)

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: _saved(thing),
}


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_a_parametrized_layer_is_copied_after_a_call():
    """`parametrize` copies the attributes of a module without its `__getstate__`."""
    layer, x = an.LSTM(3, 5, norm="layer", window=2), torch.randn(4, 2, 3)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    expected = layer(x)[0]
    assert torch.equal(copy.deepcopy(layer)(x)[0], expected)
    assert torch.equal(torch.optim.swa_utils.AveragedModel(layer)(x)[0], expected)


@pytest.mark.parametrize("way", COPIES)
@given(layer_cases(), st.integers(1, 2), st.booleans())
def test_a_copy_of_a_layer_is_the_layer(way, case: LayerCase, depth, both):
    layer = case.layer(num_layers=depth, bidirectional=both, placement={"gates": "per_gate"})
    layer(case.xs())  # copies must include running statistics and other buffers
    twin = COPIES[way](layer)
    assert type(twin) is type(layer)
    assert twin.spec == layer.spec
    compare(dict(twin.state_dict()), dict(layer.state_dict()), tolerance=0)
    compare(twin(case.xs()), layer(case.xs()), tolerance=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert any((p != 0).any() for p in layer.parameters()), "the copy shares its parameters"


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_copy_of_a_plain_layer_is_the_layer(way, cell):
    layer = getattr(an, cell)(2, 3, 2, bidirectional=True)
    xs = torch.randn(4, 3, 2)
    layer(xs)
    twin = COPIES[way](layer)
    compare(twin(xs), layer(xs), tolerance=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert (twin(xs)[0] == 0).all()
    assert (layer(xs)[0] != 0).any()


@given(layer_cases(), st.sampled_from([None, 3]))
def test_a_state_dict_transfers_everything(case: LayerCase, slots):
    norm = {"kind": case.base, **({"max_steps": slots} if case.base == "batch" else {})}
    layer, other = case.layer(norm=norm), LayerCase(**{**case.__dict__, "seed": case.seed + 1}).layer(norm=norm)
    layer(case.xs())
    assert list(other.state_dict()) == list(layer.state_dict())
    other.load_state_dict(layer.state_dict())
    for training in (True, False):
        layer.train(training)
        other.train(training)
        compare(other(case.xs()), layer(case.xs()), tolerance=0)
    compare(dict(other.state_dict()), dict(layer.state_dict()), tolerance=0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cell", CELLS)
def test_parameters_and_state_dict_agree_and_start_like_torch_s(cell, base):
    layer = getattr(an, cell)(2, 3, 2, bidirectional=True, norm=base, window=3)
    names = [name for name, _ in layer.named_parameters()]
    buffers = [name for name, _ in layer.named_buffers()]
    assert sorted(layer.state_dict()) == sorted(names + buffers)
    plain = [name for name, _ in getattr(torch.nn, cell)(2, 3, 2, bidirectional=True).named_parameters()]
    assert names[: len(plain)] == plain
    sites = ["ih", "hh", *(["c"] if cell == "LSTM" else [])]
    modules = [f"norm_{site}_l{n}{end}" for n in range(2) for end in ("", "_reverse") for site in sites]
    affine = ["weight"] if base == "rms" else ["weight", "bias"]
    assert sorted(names[len(plain) :]) == sorted(f"{module}.{name}" for module in modules for name in affine)
    assert all(isinstance(layer.get_submodule(module), an.Normalizer) for module in modules)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_values(kind):
    one, other = window(kind), window(kind)
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one) == one
    with pytest.raises((AttributeError, TypeError)):
        one.anything = 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_a_copied_assorted_time_continues_from_a_saved_state(base, kind):
    norm = stirred(an.AssortedTime(normalizer(base, 4).double(), window=window(kind)), 1)
    xs = sequence("normal", 0, (7, 3, 4))
    whole, _ = norm.scan(xs)
    _, state = norm.scan(xs[:4])
    for way in COPIES.values():
        ys, _ = way(norm).scan(xs[4:], way(state))
        compare(ys, whole[4:], tolerance=1e-12)


@given(layer_cases())
def test_state_is_a_plain_tuple_of_tensors_with_the_batch_first(case: LayerCase):
    layer = case.layer(num_layers=2)
    _, state = layer.unroll(case.xs())
    coupled = case.base == "batch"

    def check(tree):
        if isinstance(tree, torch.Tensor):
            assert tree.shape[0] in ((case.batch, 1) if coupled else (case.batch,))
        else:
            assert type(tree) is tuple
            for part in tree:
                check(part)

    check(state)
    assert [leaf.shape for leaf in leaves(layer.initial(case.batch))] == [leaf.shape for leaf in leaves(state)]


@given(layer_cases(steps=(2, 5)))
def test_detaching_a_state_only_cuts_the_gradient(case: LayerCase):
    layer, xs = case.layer(), case.xs().requires_grad_()
    _, state = layer.unroll(xs[:1])
    cut = an.detach(state)
    compare(leaves(cut), leaves(state), tolerance=0)
    assert not any(leaf.requires_grad for leaf in leaves(cut))
    ys, _ = layer.unroll(xs[1:], cut)
    (gradient,) = torch.autograd.grad(ys.square().sum(), xs)
    assert (gradient[0] == 0).all()
    kept, _ = layer.unroll(xs[1:], state)
    compare(ys, kept, tolerance=0)


@given(
    layer_cases(bases=["layer", "rms"], batch=(2, 4), steps=(2, 5)), st.lists(st.integers(0, 1), min_size=1, max_size=6)
)
def test_a_reordered_state_continues_the_rows_it_names(case: LayerCase, beam):
    layer, xs, index = case.layer(), case.xs(), torch.tensor(beam)
    whole, _ = layer(xs[:, index])
    _, state = layer.unroll(xs[:-1])
    ys, _ = layer.unroll(xs[-1:, index], an.reorder(state, index))
    compare(ys, whole[-1:], tolerance=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_a_reordered_state_of_a_coupled_batch_keeps_its_shared_rows(cell):
    case = LayerCase(1, cell, "batch", ("sliding", 3), steps=4, batch=3, inputs=2, hidden=3)
    layer, xs, order = case.layer().eval(), case.xs(), torch.tensor([2, 0, 1])
    whole, _ = layer(xs[:, order])
    _, state = layer.unroll(xs[:-1])
    ys, _ = layer.unroll(xs[-1:, order], an.reorder(state, order))
    compare(ys, whole[-1:], tolerance=1e-10)


def test_reordering_by_a_missing_row_is_rejected():
    _, state = an.GRU(2, 3, norm="layer", window=2).unroll(torch.randn(4, 3, 2))
    for wrong in ([3], [-1]):
        with pytest.raises(IndexError):
            an.reorder(state, torch.tensor(wrong))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_a_layer_changes_its_type_as_a_whole(cell, norm):
    torch.manual_seed(0)
    layer = getattr(an, cell)(2, 3, 2, norm=norm)
    xs = torch.randn(5, 3, 2)
    layer(xs)
    layer.double()
    ys, final = layer(xs.double())
    assert ys.dtype == torch.float64
    assert all(leaf.dtype == torch.float64 for leaf in leaves(final))
    ys, _ = layer.bfloat16()(xs.bfloat16())
    assert ys.dtype == torch.bfloat16


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_parameters_may_be_swapped_by_functional_call(cell, norm):
    layer = getattr(an, cell)(2, 3, norm=norm, dtype=torch.float64)
    other = getattr(an, cell)(2, 3, norm=norm, dtype=torch.float64)
    xs = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = other(xs)
    compare(torch.func.functional_call(layer, dict(other.named_parameters()), (xs,)), expected, tolerance=0)


def test_a_layer_is_rebuilt_from_its_spec():
    layer = an.LSTM(
        2, 3, 2, norm={"kind": "rms", "eps": 1e-3}, window=4, placement={"carry": "normed"}, bidirectional=True
    )
    other = layer.spec.build()
    assert type(other) is an.LSTM
    other.load_state_dict(layer.state_dict())
    xs = torch.randn(4, 3, 2)
    compare(other(xs), layer(xs), tolerance=0)
    assert type(layer.spec).model_validate_json(layer.spec.model_dump_json()) == layer.spec
