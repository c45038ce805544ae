"""Save and load models: round trips, and errors for damaged or incompatible files."""

import json
import os
import re
import subprocess
import sys
from types import MethodType
from typing import Any, Literal

import pytest
import torch
from torch import nn

import atn_norms as an
from atn_norms.errors import SpecError
from atn_norms.layers import io
from atn_norms.normalizers import LayerNorm, NormSpec, RMSNorm
from atn_norms.tasks import Model

pytest.importorskip("safetensors")


class Tagger(nn.Module):
    """User-defined model whose code is not in the file."""

    def __init__(self, hidden=6):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.rnn = nn.LSTM(4, hidden, num_layers=2, bidirectional=True)
        self.out = nn.Linear(2 * hidden, 3)

    def forward(self, tokens):
        return self.out(self.rnn(self.embedding(tokens))[0])


def test_layer_round_trip(tmp_path):
    layer = an.LSTM(
        3, 5, num_layers=2, norm={"kind": "rms", "eps": 1e-3}, window={"kind": "exponential", "half_life": 4.0}
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    same = an.load(an.save(layer, tmp_path / "m.safetensors"))
    x = torch.randn(7, 2, 3)
    assert type(same) is an.LSTM and same.spec == layer.spec and not same.training
    assert torch.equal(same.unroll(x)[0], layer.eval().unroll(x)[0])


@pytest.mark.parametrize(
    "model",
    [
        an.GRUCell(2, 4, norm="layer", window=3),
        nn.Sequential(nn.Identity(), an.GRU(2, 3)),
        an.RNN(2, 4, nonlinearity="relu", norm={"sites": {"hh": "layer"}}, window={"sites": {"hh": 3}}),
        nn.Sequential(nn.Conv1d(2, 3, 5, padding=2, bias=False), nn.ReLU(), an.GRU(3, 4, norm="batch", window=2)),
        nn.ModuleDict({"a": an.AssortedTime(an.LayerNorm(4), an.Exponential(3.0)), "b": nn.Dropout(0.3)}),
        Model(nn.Embedding(5, 2), an.LSTM(2, 3, norm="layer", window=4), nn.Linear(3, 5)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_structures_are_rebuilt_from_the_file_alone(model, tmp_path):
    same = an.load(an.save(model, tmp_path / "m.safetensors"))
    assert repr(same) == repr(model)
    for (name, mine), (other, theirs) in zip(model.state_dict().items(), same.state_dict().items(), strict=True):
        assert name == other and torch.equal(mine, theirs)


def test_modules_keep_their_order(tmp_path):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)), an.GRU(3, 3, norm="layer")).eval()
    same, x = an.load(an.save(model, tmp_path / "m.safetensors")), torch.randn(4, 2, 3)
    assert [*dict(same.named_children())] == [str(i) for i in range(12)]
    assert torch.equal(same(x)[0], model(x)[0])


def test_types_ties_and_frozen_parameters_are_kept(tmp_path):
    model = Model(nn.Embedding(5, 3), an.LSTM(3, 3, norm="layer", window=4), nn.Linear(3, 5)).double()
    encoder, readout = model.encoder, model.readout
    assert isinstance(encoder, nn.Embedding) and isinstance(readout, nn.Linear)
    encoder.weight = readout.weight
    readout.bias.requires_grad_(False)
    same = an.load(an.save(model, tmp_path / "m.safetensors"))
    assert same.get_parameter("encoder.weight") is same.get_parameter("readout.weight")
    assert {each.dtype for each in same.parameters()} == {torch.float64}
    assert [n for n, p in same.named_parameters() if not p.requires_grad] == ["readout.bias"]


def test_loading_does_not_change_the_random_generator(tmp_path):
    an.save(an.GRU(2, 3), tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    an.load(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_instance_of_a_user_class_is_passed_to_load(tmp_path):
    model = an.replace(Tagger(), norm="layer", window=4).eval()
    tokens = torch.randint(11, (9, 2))
    path = an.save(model, tmp_path / "m.safetensors")
    with pytest.raises(SpecError, match=r"got a .*Tagger, whose code is not in the file; expected a new model"):
        an.load(path)
    same = an.load(path, Tagger())  # torch.nn.LSTM inside becomes the saved layer
    assert torch.equal(same(tokens), model(tokens))
    again = an.load(path, an.replace(Tagger(), norm="layer", window=4))
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Tagger(hidden=7), r"rnn: got LSTM\(4, 7, .*\); expected LSTM\(4, 6, .*\), as saved"),
        (lambda: an.replace(Tagger(), norm="rms", window=4), r"rnn: got LSTM\(.*norm=rms.*expected LSTM\(.*norm=layer"),
        (lambda: nn.Sequential(nn.Linear(1, 1)), "rnn: got nothing; expected LSTM"),
    ],
)
def test_an_incompatible_model_is_rejected(other, message, tmp_path):
    path = an.save(an.replace(Tagger(), norm="layer", window=4), tmp_path / "m.safetensors")
    with pytest.raises(SpecError, match=message):
        an.load(path, other())


def doubled(module, x, *others):
    return 2 * x


CODE: dict[str, Any] = {
    "a method of a Linear": lambda model: setattr(model[0], "forward", MethodType(doubled, model[0])),
    "a method of a layer": lambda model: setattr(model[1], "unroll", MethodType(doubled, model[1])),
    "a method of a norm": lambda model: setattr(model[1].norm_ih_l0, "normalize", lambda x, pooled: 2 * x),
    "a method inside a layer of torch": lambda model: setattr(model[2].out_proj, "forward", lambda x: 2 * x),
    "a hook of a norm": lambda model: model[1].norm_hh_l0.register_forward_hook(lambda module, xs, y: 2 * y),
    "a hook inside a layer of torch": lambda model: model[2].out_proj.register_forward_hook(
        lambda module, xs, y: 2 * y
    ),
}


@pytest.mark.parametrize("change", CODE)
def test_a_model_with_hooks_or_replaced_methods_is_passed_to_load(change, tmp_path):
    """Its code is not in the file, so a model without it would compute something else."""
    path = tmp_path / "m.safetensors"
    model, fresh = (
        nn.Sequential(nn.Linear(2, 2), an.GRU(2, 4, norm="layer"), nn.MultiheadAttention(4, 2)) for _ in "ab"
    )
    an.load(an.save(model, path))
    CODE[change](model)
    an.save(model, path)
    with pytest.raises(SpecError, match=r"Sequential, whose code is not in the file; expected a new model"):
        an.load(path)
    assert an.load(path, fresh) is fresh


WRAPPERS = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_module_inside_a_wrapper_is_saved_and_loaded(wrap, tmp_path):
    model = an.replace(Tagger(), norm="layer", window=4)
    path = an.save(wrap(model), tmp_path / "m.safetensors")
    an.save(model, tmp_path / "plain.safetensors")
    assert path.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    fresh = Tagger()
    wrapped = wrap(fresh)
    assert an.load(path, wrapped) is wrapped
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fresh.parameters(), model.parameters(), strict=True))


def test_other_arguments_of_load_are_named(tmp_path):
    path = an.save(an.replace(Tagger()), tmp_path / "m.safetensors")
    load: Any = an.load
    for arguments, message in (
        ((path, Tagger), r"^model: got the class Tagger; expected an instance, such as Tagger\(...\)$"),
        ((Tagger(), path), "^path: got Tagger; expected the path of a file; the model is the second argument$"),
        ((path, 3), "^model: got int; expected a torch.nn.Module$"),
    ):
        with pytest.raises(TypeError, match=message):
            load(*arguments)


class UnknownSpec(NormSpec):
    """A normalizer that no plugin registers."""

    kind: Literal["unknown"] = "unknown"
    gain: float = 2.0

    def build(self, features: int) -> LayerNorm:
        return LayerNorm(features)


class DisguisedSpec(UnknownSpec):
    """A normalizer with the kind of another one, which is registered."""

    kind: Literal["rms"] = "rms"  # type: ignore[assignment]


@pytest.mark.parametrize(("spec", "kind"), [(UnknownSpec, "unknown"), (DisguisedSpec, "rms")])
def test_a_normalizer_without_a_plugin_is_passed_to_load(spec, kind, tmp_path):
    path = tmp_path / "model.safetensors"
    model = nn.Sequential(an.LSTM(2, 3, norm=spec(gain=3.0), window=4))
    an.save(model, path)
    fresh = nn.Sequential(an.LSTM(2, 3, norm=spec(gain=3.0), window=4))
    assert an.load(path, fresh) is fresh
    assert all(map(torch.equal, model.state_dict().values(), fresh.state_dict().values()))
    with pytest.raises(
        SpecError, match=rf"model.safetensors: got a .*Sequential with the normalizer '{kind}', whose code"
    ):
        an.load(path)
    for other in (an.LSTM(2, 3, norm=spec(gain=2.0), window=4), an.LSTM(2, 3, norm="rms", window=4), nn.LSTM(2, 3)):
        with pytest.raises(SpecError, match=rf"0: got .*LSTM.*; expected the normalizer '{kind}' in a layer with"):
            an.load(path, nn.Sequential(other))


@pytest.mark.parametrize("cell", [an.LSTM, an.LSTMCell])
@pytest.mark.parametrize("fresh", [False, True])
def test_options_that_were_changed_on_a_norm_are_kept(cell, fresh, tmp_path):
    def made() -> Any:
        torch.manual_seed(0)
        return nn.ModuleList([cell(3, 5, norm={"sites": {"ih": "batch", "hh": "rms"}}, window=3)]).eval()

    model, x = made(), torch.randn(2, 2, 3)[0] if cell is an.LSTMCell else torch.randn(4, 2, 3)
    end = "" if cell is an.LSTMCell else "_l0"
    model[0].get_submodule(f"norm_ih{end}").momentum = None
    setattr(model[0], f"norm_hh{end}", RMSNorm(20, eps=0.5))
    an.save(model, tmp_path / "model.safetensors")
    loaded: Any = an.load(tmp_path / "model.safetensors", made() if fresh else None)
    assert loaded[0].get_submodule(f"norm_ih{end}").momentum is None
    assert torch.equal(loaded[0](x)[0], model[0](x)[0])
    assert not torch.equal(loaded[0](x)[0], made()[0](x)[0])


@pytest.mark.parametrize("placement", [None, {"gates": "per_gate"}])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_gain_or_shift_of_none_is_kept(placement, fresh, tmp_path):
    def made() -> Any:
        return an.LSTM(3, 5, norm="layer", placement=placement)

    model, x = made(), torch.randn(4, 2, 3)
    inside = [module for module in model.modules() if isinstance(module, LayerNorm)]
    inside[0].weight, inside[1].bias = None, None  # pyright: ignore[reportAttributeAccessIssue]
    path = an.save(model, tmp_path / "model.safetensors")
    loaded: Any = an.load(path, made() if fresh else None)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded(x)[0], model(x)[0])


def test_a_norm_of_another_class_than_the_options_give_is_not_saved(tmp_path):
    class Other(LayerNorm):
        pass

    model = an.GRU(3, 5, norm="layer")
    model.norm_hh_l0 = Other(15)
    with pytest.raises(
        TypeError, match=r"norm_hh_l0: got a .*Other; expected the .*LayerNorm of the options of the layer"
    ):
        an.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_layer_with_other_norms_than_the_options_give_is_not_saved(tmp_path):
    fewer, none, more = an.LSTM(3, 5, norm="layer"), an.GRU(3, 5, norm="layer"), an.GRU(3, 5)
    del fewer.norm_c_l0
    none.norm_hh_l0 = None  # pyright: ignore[reportAttributeAccessIssue]
    more.norm_hh_l0 = LayerNorm(15)
    layer_norm = r"atn_norms\.\S*\.LayerNorm"
    for model, message in [
        (fewer, rf"norm_c_l0: got nothing; expected the {layer_norm} of the options of the layer"),
        (none, rf"norm_hh_l0: got nothing; expected the {layer_norm} of the options of the layer"),
        (more, rf"norm_hh_l0: got an {layer_norm}; expected nothing, as in the options of the layer"),
    ]:
        with pytest.raises(TypeError, match=message):
            an.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changed",
    [
        {"norm_hh_l0": {"forward": 1}},
        {"norm_hh_l0": {"eps": [1]}},
        {"norm_hh_l0": {"weight": 1}},
        {"norm_hh_l0": {"forward": None}},
        {"": {"input_size": 1}},
        {"": {"weight_hh_l0": None}},
    ],
)
def test_a_file_cannot_set_any_attribute(changed, tmp_path):
    path = tmp_path / "model.safetensors"
    content = io.to_bytes(an.GRU(3, 5, norm="layer"))
    description, _ = io._parse(path, content)
    description["attributes"] = {"": changed}
    with pytest.raises(SpecError, match=r"model.safetensors: .*expected a number, text or None of a norm of the layer"):
        io._loaded(path, description, io._parse(path, content)[1], None)


def test_a_model_of_other_shapes_is_rejected(tmp_path):
    path = an.save(nn.Sequential(an.GRU(2, 3)), tmp_path / "m.safetensors")
    with pytest.raises(SpecError, match=r"1.weight: got \[2, 3\].*|1.weight: got no such tensor in the file"):
        an.load(path, nn.Sequential(nn.GRU(2, 3), nn.Linear(3, 2)))


def test_damage_is_detected_at_every_byte(tmp_path):
    path = an.save(an.GRU(2, 3, norm="layer", window=2), tmp_path / "m.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(SpecError, match="damaged"):
        an.load(path)
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(SpecError, match="expected tensors that match the checksum"):
        an.load(path)
    path.write_bytes(b"")
    with pytest.raises(SpecError, match="damaged"):
        an.load(path)


def test_foreign_missing_and_newer_files_are_rejected(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(SpecError, match="without a description of a model"):
        an.load(tmp_path / "foreign.safetensors")
    an.save(an.GRU(2, 3), tmp_path / "model.safetensors")
    (tmp_path / "models").mkdir()
    with pytest.raises(SpecError, match=r"modles: got no such folder; expected a folder; did you mean 'models'\?$"):
        an.save(nn.Linear(1, 1), tmp_path / "modles" / "model.safetensors")
    with pytest.raises(SpecError, match=r"got no such file; expected a file; did you mean 'model.safetensors'\?"):
        an.load(tmp_path / "modle.safetensors")
    monkeypatch.setattr(io, "FORMAT", io.FORMAT + 1)
    an.save(an.GRU(2, 3), tmp_path / "newer.safetensors")
    monkeypatch.undo()
    with pytest.raises(SpecError, match="got format 2, written by atn-norms .*Upgrade atn-norms"):
        an.load(tmp_path / "newer.safetensors")


def test_a_plugin_mismatch_is_reported(tmp_path, monkeypatch):
    path = an.save(an.GRU(2, 3, norm="layer", window=2), tmp_path / "m.safetensors")
    read = io._read

    def saved_with(kind, version):
        def changed(file):
            description, tensors = read(file)
            plugin = {"distribution": "atn-norms", "version": version}
            return {**description, "plugins": {f"normalizer:{kind}": plugin}}, tensors

        monkeypatch.setattr(io, "_read", changed)

    saved_with("layer", "9.9")
    with pytest.warns(UserWarning, match=r"'layer' here is from atn-norms .*; the model was saved with atn-norms 9\.9"):
        an.load(path)
    saved_with("lost", "1.0")
    with pytest.raises(SpecError, match="got no normalizer 'lost' here; expected the one of atn-norms 1.0"):
        an.load(path)


def test_only_plugins_that_the_model_uses_are_recorded(tmp_path):
    path = an.save(an.GRU(2, 3, norm="layer", window=2), tmp_path / "m.safetensors")
    assert io._read(path)[0]["plugins"] == {}


def test_a_file_cannot_name_any_class_but_torchs_and_ours(tmp_path, monkeypatch):
    path = an.save(nn.Sequential(an.GRU(2, 3)), tmp_path / "m.safetensors")
    read = io._read

    def changed(file):
        description, tensors = read(file)
        return {**description, "structure": {"class": "subprocess.Popen", "arguments": {"args": "true"}}}, tensors

    monkeypatch.setattr(io, "_read", changed)
    with pytest.raises(SpecError, match="class: got subprocess.Popen; expected a class of torch.nn or atn_norms"):
        an.load(path)


def test_the_file_holds_no_pickle(tmp_path):
    path = an.save(an.GRU(2, 3, norm="layer", window=2), tmp_path / "m.safetensors")
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {*header} == {"__metadata__", *an.load(path).state_dict()}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = an.save(an.GRU(2, 3), tmp_path / "m.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(io.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        an.save(an.GRU(2, 3), path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["m.safetensors"]


def test_without_safetensors_the_message_names_the_extra(tmp_path):
    script = (
        "import sys; sys.modules['safetensors'] = None; sys.modules['safetensors.torch'] = None\n"
        "import atn_norms as an\n"
        "try: an.save(an.GRU(2, 3), 'm.safetensors')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (
        "got no package safetensors; expected an installed package. Run pip install 'atn-norms[export]'" in done.stdout
    )


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(1, 2), an.GRU(2, 3)), Tagger(), an.LSTM(2, 3)])
def test_explain_takes_any_module(model):
    text = an.explain(model)
    assert ("backend 'torch'" in text) != isinstance(model, Tagger)
    assert ("contains no atn_norms layer" in text) == isinstance(model, Tagger)
    assert ("1: GRU(2, 3, norm=none)" in text) == isinstance(model, nn.Sequential)


def test_a_norm_of_the_kind_sliding_has_a_repr():
    class SlidingNormSpec(an.NormSpec):
        kind: Literal["sliding"] = "sliding"
        eps: float = 1e-5

        def build(self, features: int) -> LayerNorm:
            return LayerNorm(features, eps=self.eps)

    layer = an.GRU(2, 3, norm=SlidingNormSpec(eps=0.5), window=4)
    assert repr(layer) == "GRU(2, 3, norm=sliding(eps=0.5), window=4)"
    assert an.explain(layer).startswith(repr(layer))


def test_explain_rejects_other_objects():
    with pytest.raises(TypeError, match=r"model: got int; expected a torch\.nn\.Module"):
        an.explain(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", ["pipe", "device", "folder"])
def test_only_regular_files_are_loaded(make, tmp_path):
    """Reading a pipe would block, and reading a device would exhaust the memory."""
    path = tmp_path / "m.safetensors"
    if make == "pipe":
        os.mkfifo(path)
    elif make == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(
        SpecError, match=r"m\.safetensors: got (a special file|Is a directory); expected a readable file"
    ):
        an.load(path)


def test_a_file_over_the_memory_limit_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "most_bytes", lambda: 100)
    path = an.save(an.GRU(2, 3), tmp_path / "m.safetensors")
    with pytest.raises(SpecError, match=r"m\.safetensors: got a file of more than 100 bytes"):
        an.load(path)


def structure(**arguments):
    return {"structure": {"class": "torch.nn.modules.linear.Linear", "arguments": arguments}}


SEQUENTIAL = "torch.nn.modules.container.Sequential"
CANNOT = "got a description of a model that cannot be built"
HOSTILE = {
    "no JSON": ("{", "got a damaged description of a model"),
    "nested": ("[" * 100_000, "got a damaged description of a model"),
    "a list": ("[]", r"got \[\]; expected"),
    "no format": ({"format": None}, "format: got None; expected an integer"),
    "a boolean format": ({"format": True}, "format: got True; expected an integer"),
    "no versions": ({"versions": 3}, "versions: got 3"),
    "frozen numbers": ({"frozen": [3]}, r"frozen\[0\]: got 3; expected text"),
    "an unknown frozen name": ({"frozen": ["x.y"]}, CANNOT),
    "an unknown alias": ({"aliases": {"x": "y"}}, f"{CANNOT} .KeyError"),
    "plugins without versions": ({"plugins": {"normalizer:layer": {}}}, f"{CANNOT} .KeyError"),
    "no arguments": ({"structure": {"class": "torch.nn.modules.linear.Linear"}}, f"{CANNOT} .KeyError"),
    "other arguments": (structure(x=1), f"{CANNOT} .TypeError"),
    "wrong types": (structure(in_features="x", out_features=3), f"{CANNOT} .TypeError"),
    "petabytes": (structure(in_features=10**8, out_features=10**7), r"weight: got no such tensor in the file"),
    "a foreign class": (
        {"structure": {"class": "os.system", "arguments": {}}},
        "class: got os.system; expected a class",
    ),
    "an unknown module": ({"structure": {"class": "torch.nn.nothing.X", "arguments": {}}}, CANNOT),
    "children with dots": ({"structure": {"class": SEQUENTIAL, "children": {"a.b": structure()["structure"]}}}, CANNOT),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_description_is_one_error_that_names_the_file(name, tmp_path):
    change, message = HOSTILE[name]
    description, tensors = io._parse(tmp_path, io.to_bytes(nn.Sequential(an.GRU(2, 3))))
    text = change if isinstance(change, str) else json.dumps(description | change)
    path = tmp_path / "m.safetensors"
    path.write_bytes(io._serialized(tensors, {io.KEY: text}))
    with pytest.raises(SpecError) as caught:
        an.load(path)
    assert re.search(message, str(caught.value)), caught.value
    assert all(line.startswith(f"{path}: ") and len(line) < 500 for line in str(caught.value).splitlines())
