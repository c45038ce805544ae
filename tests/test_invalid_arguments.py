"""Invalid arguments raise one message in every backend, before any computation or allocation."""

import re
import time
import warnings
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import atn_norms as an
from atn_norms.errors import SpecError
from atn_norms.pytree import tree_map, where_mask

BACKENDS = ["reference", "native"]


def normed(norm: Any = "layer", window: Any = 3, **options):
    return an.LSTM(2, 4, norm=norm, window=window, **options)


def streamed(layer, batch=2):
    return layer.unroll(torch.randn(3, batch, 2))[1]


def changed(state, place, value):
    """Return a layer's state with the subtree at `place` replaced (0: carried, 1: norms, then the index)."""
    ((cell,),) = state
    part, index = place
    branch = (*cell[part][:index], value, *cell[part][index + 1 :])
    return (((branch, cell[1]) if part == 0 else (cell[0], branch),),)


def one_line(error, *words):
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "other",
    [
        {"window": 2},
        {"window": 7},
        {"window": "cumulative"},
        {"norm": "rms"},
        {"norm": {"sites": {"ih": "layer"}}},
        {"norm": "batch"},
        {"placement": {"gates": "per_gate"}},
    ],
    ids=str,
)
def test_a_state_of_another_window_normalizer_or_site_is_rejected(backend, other):
    foreign = streamed(normed(**other))
    with pytest.raises(ValueError, match="^state: got .*; expected ") as error:
        normed(backend=backend).unroll(torch.randn(1, 2, 2), foreign)
    one_line(error)


def test_a_state_with_norms_is_rejected_where_there_is_none():
    foreign = streamed(normed())
    for backend in ("auto", "reference", "torch"):
        with pytest.raises(ValueError, match=r"^state: got .* at site 'ih'; expected \(\), as it has no norm"):
            an.LSTM(2, 4, backend=backend).unroll(torch.randn(1, 2, 2), foreign)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((0, 0), torch.zeros(2, 3)),
        ((0, 1), torch.zeros(2, 1)),
        ((0, 1), torch.zeros(2, 4, dtype=torch.float64)),
        ((0, 1), torch.zeros(2, 4, dtype=torch.int64)),
        ((0, 1), "c"),
        ((1, 0), None),
        ((1, 0), ()),
        ((1, 1), "junk"),
        ((1, 1), (torch.zeros(2, dtype=torch.int64), (torch.zeros(2, 1), (torch.zeros(2, 1, 1),) * 2))),
        ((1, 1), (torch.zeros(2), (torch.zeros(2, 2), (torch.zeros(2, 2, 1),) * 2))),
        ((1, 1), (torch.zeros(2, dtype=torch.int64), (torch.zeros(2, 2).long(), (torch.zeros(2, 2, 1),) * 2))),
        ((1, 2), (torch.zeros((), dtype=torch.int64), (torch.zeros(2, 2), (torch.zeros(2, 2, 1),) * 2))),
    ],
)
def test_an_incompatible_part_of_a_state_is_rejected(backend, place, value):
    layer = normed(backend=backend)
    state = changed(streamed(layer), place, value)
    with pytest.raises(ValueError, match="^state: got .*; expected ") as error:
        layer.unroll(torch.randn(1, 2, 2), state)
    one_line(error)


@pytest.mark.parametrize("junk", ["abc", 3, (), ((),), (3,), ((3,),), (((), ()),), {"a": 1}, torch.zeros(2)], ids=str)
def test_other_objects_as_state_are_rejected(junk):
    norm = an.AssortedTime(an.LayerNorm(4), 3)
    cell = an.LSTMCell(2, 4, norm="layer")
    for call in (
        lambda: normed().unroll(torch.randn(1, 2, 2), junk),
        lambda: cell(torch.randn(2, 2), junk),
        lambda: norm.step(torch.randn(2, 4), junk),
        lambda: norm.scan(torch.randn(1, 2, 4), junk),
        lambda: an.detach(junk) if not isinstance(junk, (tuple, torch.Tensor)) else norm.step(torch.ones(2, 4), junk),
    ):
        with pytest.raises(ValueError, match="^state: got .*; expected ") as error:
            call()
        one_line(error)


def test_a_cell_rejects_carried_tensors_that_would_broadcast():
    cell = an.LSTMCell(2, 4, norm="layer", window=3)
    (h, c), norms = cell.initial(2)
    for carried in ((h, c[:, :1]), (h[:1], c), (h,), (h, c, c), (h, c.double()), (h.long(), c)):
        with pytest.raises(ValueError, match="^state: got .*; expected "):
            cell(torch.randn(2, 2), (carried, norms))


def test_states_of_one_kind_pass_between_backends_and_dtypes():
    torch.manual_seed(0)
    reference, native = normed(backend="reference"), normed()
    native.load_state_dict(reference.state_dict())
    x = torch.randn(1, 2, 2)
    state = streamed(reference)
    assert torch.allclose(reference.unroll(x, state)[0], native.unroll(x, state)[0], atol=1e-6)
    ((cell,),) = state
    single = tuple(
        (index, (weights.float(), tuple(leaf.float() for leaf in leaves))) for index, (weights, leaves) in cell[1]
    )
    assert torch.allclose(native.unroll(x, state)[0], native.unroll(x, (((cell[0], single),),))[0], atol=1e-5)


def test_a_list_of_rows_and_the_path_of_a_checkpoint_are_named():
    reorder: Any = an.reorder
    load_weights: Any = an.load_weights
    with pytest.raises(TypeError, match=r"^index: got list \[0, 1\]; expected an int64 tensor such as torch.tensor"):
        reorder(streamed(normed()), [0, 1])
    with pytest.raises(TypeError, match=r"^state_dict: got str 'x.pt'; expected a mapping, such as torch.load\(path\)"):
        load_weights(normed(), "x.pt")


def test_a_reordered_shared_state_is_used_once():
    norm = an.AssortedTime(an.BatchNorm(4), 3)
    _, state = norm.scan(torch.randn(3, 2, 4))
    repeated = an.reorder(state, torch.tensor([0, 0, 0]))
    x = torch.randn(2, 4)
    assert torch.equal(norm.step(x, state)[0], norm.step(x, repeated)[0])
    index, (weights, statistic) = repeated
    broken = index, (weights, tuple(torch.full_like(leaf, float("nan")) for leaf in statistic))
    norm.step(x, broken)  # a NaN equals its copies


def joined(first, second):
    return tree_map(lambda a, b: torch.cat([a, b], 0), first, second)


def reset(first, second):
    return where_mask(torch.tensor([True, False]), first, second)


@pytest.mark.parametrize("combine", [joined, reset])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_different_rows_of_a_shared_state_are_rejected(backend, combine):
    """Two streams have two statistics, and a batch has one."""
    layer = an.GRU(2, 4, norm="batch", window=3, backend=backend)
    (_, first), (_, second) = layer.unroll(torch.randn(5, 2, 2)), layer.unroll(torch.randn(3, 2, 2))
    state, x = combine(first, second), torch.randn(1, 4 if combine is joined else 2, 2)
    expected = "^state: got 2 different rows of batch statistics; expected 1 row, or equal rows, since the rows of a"
    with pytest.raises(ValueError, match=expected) as error:
        layer.unroll(x, state)
    one_line(error)
    norm = an.AssortedTime(an.BatchNorm(4), 3)
    states = [norm.scan(torch.randn(steps, 2, 4))[1] for steps in (1, 2)]
    with pytest.raises(ValueError, match=expected):
        norm.scan(torch.randn(1, 2, 4), combine(*states))


def test_a_compiled_layer_rejects_different_rows_of_a_shared_state():
    layer = an.GRU(2, 4, norm="batch", window=3)
    call: Any = torch.compile(layer.unroll, backend="eager", fullgraph=True)
    _, first = layer.unroll(torch.randn(5, 2, 2))
    _, second = layer.unroll(torch.randn(5, 2, 2))
    norms = tree_map(lambda leaf: leaf.expand(2, *leaf.shape[1:]), first[0][0][1])
    x = torch.randn(1, 2, 2)
    repeated = (((first[0][0][0], norms),),)
    assert torch.allclose(call(x, repeated)[0], layer.unroll(x, repeated)[0], atol=1e-6)
    with pytest.raises(RuntimeError, match="state: got 2 different rows of batch statistics"):
        call(x, reset(first, second))


@pytest.mark.parametrize("batch", [-1, True, "a", None, 1.5])
def test_an_invalid_number_of_rows_is_rejected(batch):
    for owner in (normed(), an.LSTMCell(2, 4, norm="layer")):
        with pytest.raises(ValueError, match="^batch: got .*; expected a number of rows"):
            owner.initial(batch)


@pytest.mark.parametrize(
    "hx",
    [torch.zeros(1, 2, 4), "ab", (torch.zeros(1, 2, 4), 3), (torch.zeros(2, 2, 4),) * 2, (torch.zeros(1, 2, 3),) * 2],
)
def test_an_initial_state_of_another_structure_is_rejected(hx):
    with pytest.raises(ValueError, match="^hx: got .*; expected "):
        normed().initial(2, hx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_hx_of_another_dtype_is_rejected(backend):
    hx = (torch.zeros(1, 2, 4, dtype=torch.float64),) * 2
    with pytest.raises(RuntimeError, match="^hx: got torch.float64; expected the type of the layer, torch.float32"):
        normed(backend=backend)(torch.randn(3, 2, 2), hx)


def test_parameters_of_another_size_never_reach_the_kernels():
    layer: Any = normed(backend="native")
    layer.norm_hh_l0.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"^FeatureMoments.gain: got shape \[3\]; expected \[16\]"):
        layer(torch.randn(3, 2, 2))
    layer = normed(backend="native")
    layer.weight_hh_l0 = nn.Parameter(torch.ones(8, 4))
    with pytest.raises(RuntimeError, match=r"^weight_hh: got .*; expected torch.float32 \[16, 4\] on cpu"):
        layer(torch.randn(3, 2, 2))


class StrangeSpec(an.NormSpec):
    kind: Literal["strange"] = "strange"
    how: str

    def build(self, features: int) -> Any:
        if self.how == "raises":
            raise KeyError("no such thing")
        if self.how == "reads":
            torch.ones(features).sum().item()
            return an.LayerNorm(features)
        return nn.LayerNorm(features) if self.how == "torch" else None


def test_a_plugin_s_build_must_return_a_normalizer():
    with pytest.raises(
        ValueError, match="norm: 'strange' at site 'ih' with 16 features: build: got NoneType; expected a Normalizer"
    ):
        normed(StrangeSpec(how="nothing"))
    with pytest.raises(ValueError, match="build: got LayerNorm; expected a Normalizer"):
        normed(StrangeSpec(how="torch"))
    with pytest.raises(ValueError, match="norm: 'strange' at site 'ih' with 16 features: 'no such thing'"):
        normed(StrangeSpec(how="raises"))
    normed(StrangeSpec(how="reads"))


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 10**7},
        {"num_layers": 10**12},
        {"norm": {"kind": "batch", "max_steps": 10**9}},
        {"norm": {"kind": "batch", "max_steps": 10**30}},
        {"hidden_size": 10**9, "norm": "layer"},
    ],
    ids=str,
)
def test_impossible_sizes_are_rejected_at_once(options):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"num_layers|max_steps"):
        an.LSTM(**{"input_size": 2, "hidden_size": 60} | options)
    assert time.perf_counter() - begin < 1


def test_validation_draws_no_random_number_and_leaves_no_meta_tensor():
    torch.manual_seed(0)
    an.LayerSpec.model_validate({"cell": "lstm", "input_size": 2, "hidden_size": 4, "norm": "layer"})
    drawn = torch.randn(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(1))
    assert not any(parameter.is_meta for parameter in normed("batch").parameters())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_not_floating_point_are_rejected(dtype):
    norm = an.AssortedTime(an.LayerNorm(4), 3)
    for call in (lambda: norm.step(torch.ones(2, 4, dtype=dtype)), lambda: norm.scan(torch.ones(3, 2, 4, dtype=dtype))):
        with pytest.raises(ValueError, match=f"^xs?: got {dtype}; expected .* floating-point"):
            call()
    for kind in (None, "layer"):
        with pytest.raises(ValueError, match=f"^dtype: got {dtype}; expected a floating-point type"):
            an.LSTM(2, 4, norm=kind, dtype=dtype)


@pytest.mark.parametrize("kind", [an.LayerNorm, an.RMSNorm, an.BatchNorm])
@pytest.mark.parametrize("features", [1, 5])
def test_another_number_of_features_is_rejected(kind, features):
    norm = an.AssortedTime(kind(4), 3)
    with pytest.raises(ValueError, match=rf"^x: got shape \[2, {features}\]; expected \[batch, ..., 4\]"):
        norm.step(torch.randn(2, features))
    with pytest.raises(ValueError, match=rf"^xs: got shape \[3, 2, {features}\]; expected \[time, batch, ..., 4\]"):
        norm.scan(torch.randn(3, 2, features))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_an_empty_batch_runs(backend, norm):
    layer = normed(norm, backend=backend)
    with warnings.catch_warnings(action="error"):
        y, state = layer.unroll(torch.zeros(3, 0, 2, requires_grad=True))
        y, state = layer.unroll(torch.zeros(3, 0, 2), state)
        y.sum().backward()
    assert y.shape == (3, 0, 4)


def test_an_empty_batch_of_batch_normalization():
    norm = an.AssortedTime(an.BatchNorm(4), 3)
    with pytest.raises(
        ValueError, match="Expected more than 1 value per channel.*: got 0 row.*; expected a batch of at least 2 rows"
    ):
        norm.step(torch.zeros(0, 4))
    assert norm.normalizer.num_batches_tracked == 0
    assert norm.eval().scan(torch.zeros(3, 0, 4))[0].shape == (3, 0, 4)


@pytest.mark.parametrize("max_steps", [None, 5])
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_rejects_unknown_axes(max_steps, training):
    norm = an.AssortedTime(an.BatchNorm(4, max_steps=max_steps), 3).train(training)
    for call in (lambda: norm.scan(torch.randn(3, 2, 5, 4)), lambda: norm.step(torch.randn(2, 5, 4))):
        with pytest.raises(ValueError, match=r"^x: got 1 axes between batch and features; expected \[batch, 4\]"):
            call()


@pytest.mark.parametrize(
    "lengths",
    [
        ["a", "b"],
        "ab",
        [[1], [2, 3]],
        [None, 1],
        [2**70, 1],
        [True, False],
        [1.0, 2.0],
        object(),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ],
    ids=lambda lengths: re.sub(" at 0x.*", "", repr(lengths)),  # an address differs in every process
)
def test_lengths_of_wrong_types_are_rejected(lengths):
    with pytest.raises(ValueError, match="^lengths: got .*; expected 2 integer") as error:
        normed().unroll(torch.randn(3, 2, 2), lengths=lengths)
    one_line(error)
    with pytest.raises(ValueError, match="^lengths: got .*; expected 2 integer"):
        an.AssortedTime(an.LayerNorm(4), 3).scan(torch.randn(3, 2, 4), lengths=lengths)


@pytest.mark.parametrize(
    "mask", [[True, False], torch.ones(3).bool(), torch.ones(2), torch.ones(2, 1).bool(), "a"], ids=repr
)
def test_a_mask_of_another_shape_or_dtype_is_rejected(mask):
    with pytest.raises(ValueError, match=r"^mask: got .*; expected a bool tensor of shape \[2\]"):
        an.AssortedTime(an.LayerNorm(4), 3).step(torch.randn(2, 4), mask=mask)


def pruned():
    model = nn.LSTM(2, 3)
    prune.l1_unstructured(model, "weight_hh_l0", 0.3)
    return model


def old_weight_norm():
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(nn.LSTM(2, 3), "weight_hh_l0")


def hooked(name, kind: Any = nn.GRU):
    model = kind(2, 3)
    getattr(model, name)(lambda *_: None)
    return model


def with_a_forward():
    model: Any = nn.GRU(2, 3)
    model.forward = lambda *inputs: nn.GRU.forward(model, *inputs)
    return model


def with_a_child():
    model = nn.GRU(2, 3)
    model.head = nn.Linear(2, 2)
    return model


def test_a_normalizer_that_overrides_forward_is_rejected():
    class Halved(an.LayerNorm):
        def forward(self, x, pooled):
            return 0.5 * super().forward(x, pooled)

    with pytest.raises(TypeError, match="Halved: got a `forward`; expected a `normalize`, which fast backends compute"):
        Halved(4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (pruned, "got a parametrized LSTM; expected plain parameters"),
        (old_weight_norm, "got a parametrized LSTM; expected plain parameters"),
        (lambda: parametrizations.weight_norm(nn.LSTM(2, 3), "weight_hh_l0"), "got a parametrized"),
        (lambda: hooked("register_forward_hook"), "got a GRU with hooks; expected"),
        (lambda: hooked("register_forward_pre_hook"), "got a GRU with hooks; expected"),
        (lambda: hooked("register_full_backward_hook"), "got a GRU with hooks; expected"),
        (lambda: hooked("register_forward_hook", nn.LSTM), "got an LSTM with hooks; expected"),
        (with_a_forward, "got a GRU with a replaced `forward`; expected"),
        (with_a_child, r"got a GRU with modules or buffers inside \(head\); expected"),
    ],
)
def test_replace_rejects_modules_with_parts_it_would_drop(make, words):
    model = nn.Sequential(nn.Linear(2, 2), make())
    inside = model[1]
    with pytest.raises(TypeError, match=f"^1: {words}"):
        an.replace(model, norm="layer")
    assert model[1] is inside


def test_replace_checks_its_arguments_without_a_layer_to_replace():
    with pytest.raises(ValueError, match="unknown normalizer 'laier'"):
        an.replace(nn.Linear(2, 2), norm="laier")
    with pytest.raises(TypeError, match="^model: got int; expected a torch.nn.Module"):
        an.replace(3)  # pyright: ignore[reportArgumentType]
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="expected a model with an nn.LSTM, nn.GRU or nn.RNN"):
        assert an.replace(model, norm={"sites": {"c": "layer"}}) is model


def test_numbers_beyond_float32_are_rejected_with_their_path():
    with pytest.raises(ValueError, match="^forget_bias: "):
        an.LSTM(2, 4, forget_bias=1e39)
    with pytest.raises(ValueError, match=r"^norm\.initial_gain: "):
        normed({"kind": "batch", "initial_gain": -1e39})
    for gain in (float("nan"), 1e39, True):
        with pytest.raises(ValueError, match="^initial_gain: got .*; expected a number"):
            an.BatchNorm(4, initial_gain=gain)
    with pytest.raises(ValueError, match="^momentum: got True; expected a number"):
        an.BatchNorm(4, momentum=True)


class Misbehaving(an.LayerNorm):
    measured: Any = staticmethod(an.Moments.of)
    normalized: Any = staticmethod(lambda x: x)

    def measure(self, x: torch.Tensor) -> Any:
        return self.measured(x)

    def normalize(self, x: torch.Tensor, pooled: Any) -> Any:
        return self.normalized(x)


@pytest.mark.parametrize(
    "measured",
    [lambda x: None, lambda x: x, lambda x: (x, x), lambda x: an.Moments.of(x[:1]), lambda x: an.Average(x.sum())],
)
def test_a_measure_that_returns_something_else_is_named(measured):
    norm = Misbehaving(4)
    norm.measured = measured
    for call in (lambda n: n.step(torch.randn(2, 4)), lambda n: n.scan(torch.randn(3, 2, 4))):
        with pytest.raises(TypeError, match=r"^Misbehaving\.measure: got .*; expected a Statistic"):
            call(an.AssortedTime(norm, 3))


@pytest.mark.parametrize("normalized", [lambda x: None, lambda x: x[..., :1], lambda x: 3])
def test_a_normalize_that_returns_something_else_is_named(normalized):
    norm = Misbehaving(4)
    norm.normalized = normalized
    for call in (lambda n: n.step(torch.randn(2, 4)), lambda n: n.scan(torch.randn(3, 2, 4))):
        with pytest.raises(TypeError, match=r"^Misbehaving\.normalize: got .*; expected a tensor"):
            call(an.AssortedTime(norm, 3))


@pytest.mark.parametrize("cell", [an.LSTM, an.GRU])
def test_a_state_of_unroll_is_no_hidden_state_of_torch(cell):
    layer, x = cell(3, 5, norm="layer", window=4), torch.randn(7, 2, 3)
    with pytest.raises(TypeError, match=r"hx: got \(.*; expected h.* as tensors; `unroll` takes a state of `unroll`"):
        layer(x, layer.unroll(x)[1])


def test_a_window_that_is_a_word_may_be_meant_as_a_number():
    with pytest.raises(SpecError, match="window: got unknown window 'abc'; expected one of .*, sliding, an integer"):
        normed(window="abc")


def test_windows_of_numpy_s_integers_are_accepted_everywhere():
    numpy = pytest.importorskip("numpy")
    assert an.AssortedTime(an.LayerNorm(4), numpy.int64(3)).window == an.Sliding(3)
    assert normed(window=numpy.int64(3)).spec.window == normed(window=3).spec.window
    with pytest.raises(TypeError, match="window: got 3.0; expected an integer of at least 1, or a Window"):
        an.AssortedTime(an.LayerNorm(4), 3.0)  # pyright: ignore[reportArgumentType]
