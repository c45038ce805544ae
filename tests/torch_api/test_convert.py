"""Converting models: replaced and unchanged layers, and the converters of torch on our layers."""

import copy
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import atn_norms as an
from tests.compare import compare
from tests.torch_api.features import feature
from tests.torch_api.test_transforms import CELLS, every_layer, every_norm

GROUP = "Converting models"
PLACEMENTS: dict[str, Any] = {"joint": None, "per gate": {"gates": "per_gate"}}
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)


class Own(nn.LSTM):
    """A subclass, whose behaviour a replacement would change."""


def model_of() -> Any:
    return nn.ModuleDict({"encoder": nn.LSTM(3, 4), "own": Own(3, 4), "steps": nn.GRUCell(3, 4), "last": nn.GRU(3, 4)})


@feature(
    GROUP, "`replace` on a model with subclasses, hooks or `nn.LSTMCell`", "warning", "These layers stay unchanged."
)
def test_a_layer_that_cannot_be_replaced_is_named_and_kept():
    model = model_of()
    with pytest.warns(UserWarning, match="replace: 2 recurrent layer") as caught:
        an.replace(model, norm="layer")
    text = str(caught[0].message)
    assert "own: got Own; expected exactly nn.LSTM, nn.GRU or nn.RNN" in text
    assert "steps: got GRUCell, which runs single steps" in text and "atn_norms.GRUCell" in text
    assert [type(m) for m in model.values()] == [an.LSTM, Own, nn.GRUCell, an.GRU]


def unchanged(model: Any, message: str, tmp_path: Any) -> None:
    """Check that `replace`, and `load` into the model, raise an error and leave the layers of torch."""
    before = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=message):
        an.replace(model, norm="layer")
    plain = copy.deepcopy(getattr(model, "module", model))
    fresh = nn.ModuleDict({"rnn": nn.LSTM(3, 4)}) if "rnn" in plain._modules else nn.LSTM(3, 4)
    an.save(an.replace(fresh, norm="layer"), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        an.load(tmp_path / "m.safetensors", model)
    assert [type(m) for m in model.modules()] == before


@feature(GROUP, "`replace` on a model whose layer is compiled", "refused", "Call `torch.compile` after `replace`.")
def test_a_compiled_layer_is_not_replaced_inside_its_wrapper(tmp_path):
    """The compiled function calls the layer that it was built with."""
    compiled: Any = torch.compile(nn.LSTM(3, 4), backend="eager")
    message = "got an LSTM that is compiled; expected a plain one. Call torch.compile after replace or load"
    unchanged(compiled, message, tmp_path)
    model = Holder(compiled._orig_mod)
    model.fast = compiled
    unchanged(model, f"rnn: {message}", tmp_path)
    whole: Any = torch.compile(nn.Sequential(nn.LSTM(3, 4)), backend="eager")
    an.replace(whole, norm="layer")  # the model inside is changed in place, and compiled again
    x = torch.randn(5, 2, 3)
    compare(whole(x), whole._orig_mod(x), tolerance=1e-6)


@feature(GROUP, "`replace` inside `DistributedDataParallel`", "refused", "Wrap the model after `replace`.")
def test_a_layer_inside_data_parallel_training_is_not_replaced(tmp_path):
    """The wrapper synchronizes the parameters that it was built with."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model: Any = nn.parallel.DistributedDataParallel(nn.ModuleDict({"rnn": nn.LSTM(3, 4)}))
        message = (
            "rnn: got an LSTM inside DistributedDataParallel; expected a plain model. Wrap the model after replace"
        )
        unchanged(model, message, tmp_path)
        converted = an.replace(nn.ModuleDict({"rnn": nn.LSTM(3, 4)}), norm="layer")
        wrapped: Any = nn.parallel.DistributedDataParallel(converted)
        assert an.load(an.save(wrapped, tmp_path / "wrapped.safetensors"), wrapped) is wrapped
    finally:
        torch.distributed.destroy_process_group()


class Holder(nn.Module):
    """A model with a layer and plain attributes."""

    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.rnn = rnn
        self.steps = []


HELD: dict[str, Any] = {
    "a list": lambda rnn: [rnn],
    "nested containers": lambda rnn: {"all": [(0, rnn)]},
    "a bound method": lambda rnn: rnn.forward,
    "bound methods in a list": lambda rnn: [rnn.forward, rnn.train],
}


@feature(
    GROUP,
    "`replace` on a layer that a plain attribute also holds",
    "refused",
    "Use `nn.ModuleList` or `nn.ModuleDict`.",
)
@pytest.mark.parametrize("held", HELD)
def test_a_layer_in_a_plain_attribute_is_not_replaced(held, tmp_path):
    model = Holder(nn.LSTM(3, 4))
    model.steps = HELD[held](model.rnn)
    message = "rnn: got an LSTM that the attribute 'steps' of Holder also holds; expected registered modules only"
    unchanged(model, message, tmp_path)
    other = nn.ModuleDict({"held": model, "free": nn.GRU(3, 4)})
    with pytest.warns(UserWarning, match=r"replace: 1 recurrent layer\(s\) unchanged. held.rnn: got an LSTM that the"):
        an.replace(other, norm="layer")
    assert type(other["free"]) is an.GRU and type(model.rnn) is nn.LSTM


def test_weak_references_and_other_modules_in_attributes_are_ignored():
    model = Holder(nn.Sequential(nn.LSTM(3, 4)))
    model.steps = [weakref.proxy(model.rnn), weakref.proxy(nn.Linear(1, 1)), model.rnn]
    an.replace(model, norm="layer")
    assert type(model.rnn[0]) is an.LSTM


@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_tied_weights_stay_tied(cell, norm):
    theirs: Any = getattr(nn, CELLS[cell].__name__)(4, 4, num_layers=2)
    theirs.weight_hh_l1 = theirs.weight_hh_l0
    tied: Any = an.replace(theirs, norm=norm)
    assert tied.weight_hh_l1 is tied.weight_hh_l0 is theirs.weight_hh_l0
    free, x = CELLS[cell](4, 4, 2, norm=norm), torch.randn(5, 2, 4)
    free.load_state_dict(tied.state_dict())
    compare(tied(x), free(x), tolerance=0)
    for layer in (tied, free):
        layer(x)[0].sum().backward()
    compare(tied.weight_hh_l0.grad, free.weight_hh_l0.grad + free.weight_hh_l1.grad, tolerance=1e-5)


@feature(GROUP, "`replace(only=..., skip=...)`", "native")
def test_only_and_skip_select_by_qualified_name():
    model: Any = nn.Sequential(model_of(), nn.RNN(3, 4))
    an.replace(model, norm="rms", only=["0.enc*", "1"])
    assert [type(m) for m in (*model[0].values(), model[1])] == [an.LSTM, Own, nn.GRUCell, nn.GRU, an.RNN]
    model = model_of()
    an.replace(model, norm="rms", skip=["own", "steps", "last"])
    assert [type(m) for m in model.values()] == [an.LSTM, Own, nn.GRUCell, nn.GRU]
    model = model_of()
    with pytest.raises(TypeError, match="own: got Own; expected exactly nn.LSTM"):
        an.replace(model, norm="rms", only="own")
    unknown: list[dict[str, Any]] = [{"only": "encodr"}, {"skip": "encodr"}]
    for options in unknown:
        with pytest.raises(ValueError, match=f"{next(iter(options))}: got 'encodr'; expected .*did you mean 'encoder'"):
            an.replace(model, norm="rms", **options)
    assert type(model["encoder"]) is nn.LSTM


def test_nothing_to_replace_warns():
    with pytest.warns(UserWarning, match="replace: got Linear; expected a model with an nn.LSTM, nn.GRU or nn.RNN"):
        an.replace(nn.Linear(2, 2), norm="layer")
    with pytest.warns(UserWarning, match="expected a model with an nn.LSTM"):
        an.replace(nn.Sequential(nn.LSTM(3, 4)), norm="layer", skip="0")
    replaced = an.replace(nn.ModuleDict({"encoder": nn.LSTM(3, 4)}), norm="layer")
    with pytest.warns(
        UserWarning, match=r"got ModuleDict, which has layers of atn_norms already \(encoder\); expected"
    ):
        an.replace(replaced, norm="rms")
    with pytest.raises(TypeError, match="0: got Own"):
        an.replace(nn.Sequential(Own(3, 4)), norm="layer")


@feature(GROUP, "an optimizer built before `replace`", "warning", "The warning has the call that adds the parameters.")
def test_an_optimizer_without_the_new_norms_is_noticed():
    model: Any = nn.Sequential(nn.LSTM(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"got SGD with the weights of the model, without its 6 norm parameters"):
        an.replace(model, norm="layer")
    optimizer.add_param_group({"params": list(an.norm_parameters(model).values())})
    gain = model[0].norm_ih_l0.weight.detach().clone()
    model(torch.randn(5, 2, 3))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(gain, model[0].norm_ih_l0.weight)
    del optimizer
    with warnings.catch_warnings(action="error"):
        an.replace(nn.Sequential(nn.LSTM(3, 4)), norm="layer")
    other = nn.Sequential(nn.LSTM(3, 4))
    kept = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings(action="error"):
        an.replace(other)  # no norms, no new parameters
    assert len(kept.param_groups) == 1


@feature(GROUP, "`norm_parameters` for groups without weight decay", "native")
@every_norm
def test_norm_parameters_lists_gains_and_shifts(norm):
    model = nn.Sequential(an.LSTM(3, 4, 2, norm=norm, placement={"gates": "per_gate"}), nn.LayerNorm(4))
    names = set(an.norm_parameters(model))
    assert names == {name for name, _ in model.named_parameters() if "norm_" in name} != set()


@feature(
    GROUP,
    "checkpoints of `nn.LSTM` in layers with norms, and back",
    "native",
    "By `load_weights`, which the error names.",
)
@every_norm
@every_layer
def test_checkpoints_load_both_ways(cell, norm):
    theirs: Any = nn.Sequential(getattr(nn, cell.upper())(3, 4, 2, bidirectional=True), nn.Linear(8, 1))
    ours: Any = nn.Sequential(CELLS[cell](3, 4, 2, bidirectional=True, norm=norm), nn.Linear(8, 1))
    norms = {key: value.clone() for key, value in ours.state_dict().items() if "norm_" in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*atn_norms.load_weights loads"):
        ours.load_state_dict(theirs.state_dict())
    fresh, dropped = an.load_weights(ours, theirs.state_dict())
    assert set(fresh) == set(norms) and not dropped
    compare({key: value for key, value in ours.state_dict().items() if key in norms}, norms, tolerance=0)
    compare({k: v for k, v in ours.state_dict().items() if k not in norms}, dict(theirs.state_dict()), tolerance=0)
    nn.init.ones_(ours[0].weight_hh_l0)
    fresh, dropped = an.load_weights(theirs, ours.state_dict())
    assert set(dropped) == set(norms) and not fresh and (theirs[0].weight_hh_l0 == 1).all()
    plain: Any = nn.Sequential(CELLS[cell](3, 4, 2, bidirectional=True), nn.Linear(8, 1))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*atn_norms.load_weights loads"):
        plain.load_state_dict(ours.state_dict())
    an.load_weights(plain, ours.state_dict())
    compare(dict(plain.state_dict()), dict(theirs.state_dict()), tolerance=0)


def test_load_weights_rejects_keys_other_than_norms():
    ours, state = an.LSTM(3, 4, norm="layer"), nn.LSTM(3, 4).state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        an.load_weights(ours, {key: value for key, value in state.items() if key != "weight_hh_l0"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*norm_ih_l7"):
        an.load_weights(ours, state | {"norm_ih_l7.weight": torch.ones(1)})
    missing, _ = ours.load_state_dict(state, strict=False)
    assert set(missing) == set(an.norm_parameters(ours))


def test_load_weights_accepts_modules_named_like_norms():
    theirs: Any = nn.ModuleDict({"norm_enc": nn.LSTM(3, 4), "norm_ih_l0": nn.LSTM(3, 4)})
    ours: Any = nn.ModuleDict({"norm_enc": an.LSTM(3, 4, norm="rms"), "norm_ih_l0": an.LSTM(3, 4, norm="rms")})
    fresh, dropped = an.load_weights(theirs, ours.state_dict())
    assert dropped == list(an.norm_parameters(ours)) and not fresh
    compare(dict(theirs.state_dict()), {k: v for k, v in ours.state_dict().items() if k not in dropped}, tolerance=0)


@feature(GROUP, "`torch.optim.swa_utils.update_bn`", "native")
@every_placement
@every_layer
def test_update_bn_computes_populations(cell, placement):
    """One pass over the data with the mean of all updates, as for `nn.BatchNorm1d`."""
    layer = CELLS[cell](3, 4, norm="batch", window=2, placement=PLACEMENTS[placement])
    model = nn.Sequential(layer)
    data = [torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = copy.deepcopy(layer)
    for norm in expected.modules():
        if isinstance(norm, an.BatchNorm):
            norm.momentum = None
    expected.train()
    for x in data:
        expected(x)
    layer(10 * data[0])  # a population that must be discarded
    model.eval()
    torch.optim.swa_utils.update_bn(data, model)
    compare(dict(layer.named_buffers()), dict(expected.named_buffers()), tolerance=0)
    assert not layer.training
    assert {n.momentum for n in layer.modules() if isinstance(n, an.BatchNorm)} == {0.1}


@feature(GROUP, "`nn.SyncBatchNorm.convert_sync_batchnorm`", "reference", "It sets `sync` of each batch norm.")
@every_placement
@every_layer
def test_convert_sync_batchnorm_sets_sync(cell, placement):
    model: Any = nn.Sequential(
        CELLS[cell](3, 4, norm="batch", placement=PLACEMENTS[placement]),
        an.AssortedTime(an.BatchNorm(4), 3),
        nn.BatchNorm1d(4),
    )
    before = dict(model.state_dict())
    converted: Any = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ours = [module for module in converted.modules() if isinstance(module, an.BatchNorm)]
    assert ours and all(norm.sync for norm in ours)
    assert isinstance(converted[2], nn.SyncBatchNorm)
    assert {id(p) for p in converted.state_dict(keep_vars=True).values()} >= {id(p) for p in model.parameters()}
    compare(dict(converted.state_dict()), before, tolerance=0)
    converted[0](torch.randn(5, 2, 3))  # in one process it is batch norm


@feature(GROUP, "`torch.ao.quantization.quantize_dynamic`", "warning", "The layer stays in floating point.")
@pytest.mark.parametrize("norm", [None, "layer"])
@every_layer
def test_quantize_dynamic_warns(cell, norm):
    model = nn.Sequential(CELLS[cell](3, 4, norm=norm)).eval()
    with pytest.warns(UserWarning, match="got a quantization config; the layer stays in floating point"):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear})
    x = torch.randn(5, 2, 3)
    compare(quantized(x), model(x), tolerance=0)


@feature(GROUP, "forward hooks on `norm_*`", "reference", "A hook sees `(x, pooled)` and the normalized result.")
@every_placement
@every_norm
@every_layer
def test_hooks_on_norms_are_called(cell, norm, placement, runs):
    layer = CELLS[cell](3, 4, norm=norm, window=2, placement=PLACEMENTS[placement]).eval()
    x, calls = torch.randn(5, 2, 3), []
    expected = layer(x)
    assert set(runs) == {"native"}
    target = layer.norm_hh_l0.gates[0] if placement == "per gate" and cell != "rnn" else layer.norm_hh_l0
    handle = target.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    runs.clear()
    compare(layer(x), expected, tolerance=1e-5)
    assert set(runs) == {"reference"} and len(calls) == 5
    assert "the norm at hh has hooks" in an.explain(layer)
    handle.remove()
    layer(x)
    assert runs["native"] == 1


RECOMPUTED: dict[str, Any] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", 0.5),
    "weight norm": lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
    "spectral norm": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0"),
}


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("utility", RECOMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_unroll_recomputes_weights_as_forward_does(utility, norm):
    layer, other = (an.GRU(3, 4, norm=norm).eval() for _ in range(2))
    for each in (layer, other):
        RECOMPUTED[utility](each)
    x = torch.randn(5, 2, 3)
    for each in (layer, other):
        each(x)
    layer.load_state_dict(other.state_dict())
    compare(layer.unroll(x)[0], other(x)[0], tolerance=1e-6)
    for _ in range(2):
        layer.unroll(x)[0].sum().backward()


def test_unroll_calls_no_hook_of_the_caller():
    layer, calls = an.GRU(3, 4, norm="layer"), []
    layer.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    layer.unroll(torch.randn(5, 2, 3))
    assert not calls


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_forward_that_is_replaced_on_a_norm_is_called(placement):
    layer: Any = an.GRU(3, 4, norm="layer", window=2, placement=PLACEMENTS[placement])
    norm = layer.norm_hh_l0.gates[0] if placement == "per gate" else layer.norm_hh_l0
    x, inputs = torch.randn(5, 2, 3), []
    expected = layer(x)
    original = norm.forward
    norm.forward = lambda x, pooled: (inputs.append(x), original(x, pooled))[1]
    compare(layer(x), expected, tolerance=1e-5)
    assert len(inputs) == 5
    assert "the norm at hh has hooks" in an.explain(layer)


def test_the_option_sync_changes_no_description_where_it_is_off():
    """Ids of trials are hashes of descriptions."""
    described = an.LSTM(3, 4, norm="batch").spec.model_dump()["norm"]
    assert "sync" not in described
    assert an.LSTM(3, 4, norm={"kind": "batch", "sync": True}).spec.model_dump()["norm"]["sync"] is True
