"""Traced normalizers in the kernels: values, states and every gradient equal the reference."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch

import atn_norms as an
from atn_norms.backends.native.library import load
from atn_norms.backends.traced.cache import traced_norm
from atn_norms.normalizers import PerGate
from tests.compare import compare
from tests.native.strategies import EXACT, Pair, agree, check, needs_kernels, outcome
from tests.traced.gallery import EVERY, L1, GallerySpec, built

pytestmark = needs_kernels

ROOT = Path(__file__).parents[2]

WINDOWS = {
    "1": 1,
    "3": 3,
    "cumulative": "cumulative",
    "exponential": {"kind": "exponential", "half_life": 1.5},
    "detached": {"kind": "detached", "window": 3},
}


def pair(name: str, cell: str = "lstm", window: Any = 3, **fields: Any) -> Pair:
    options = {"norm": GallerySpec(name=name), "window": window} | fields.pop("options", {})
    return Pair(cell, hidden=fields.pop("hidden", 6), batch=5, steps=6, options=options, **fields)


@pytest.mark.parametrize("name", EVERY)
def test_every_normalizer_is_native_without_a_declaration(name):
    assert "backend 'native'" in an.explain(an.LSTM(2, 6, norm=GallerySpec(name=name), window=3))


def test_a_first_layer_does_not_import_the_compiler_of_torch():
    code = """
import sys
import atn_norms as an
from tests.traced.gallery import PerHead

class Spec(an.NormSpec):
    kind: str = "per-head"
    def build(self, features):
        return PerHead(features)  # without random numbers, for which torch itself imports its compiler

print(an.explain(an.LSTM(2, 6, norm=Spec(), window=3)), sorted(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "backend 'native'" in done.stdout
    assert "'atn_norms.backends.traced.normalizer'" in done.stdout
    assert "'torch._dynamo'" not in done.stdout


@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
@pytest.mark.parametrize("name", EVERY)
def test_it_equals_the_reference(name, cell):
    check(pair(name, cell))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["Geometric", "TwoSided", "Mixed", "DynamicTanh"])
def test_windows_ragged_rows_and_carried_states(name, window):
    check(pair(name, window=WINDOWS[window], ragged=True, before=4))


@pytest.mark.parametrize("name", ["LearnablePower", "Grouped", "DynamicTanh"])
def test_layers_and_directions(name):
    check(pair(name, "gru", ragged=True, options={"num_layers": 2, "bidirectional": True}))


@pytest.mark.parametrize("name", ["LearnablePower", "TwoSided", "Mixed", "Halves", "DynamicTanh"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_statistics_per_gate(name, cell):
    check(pair(name, cell, per_gate=True, ragged=True, before=2))


class GatesSpec(an.NormSpec):
    """Options of normalizers that differ between the gates of a site, but have statistics of one kind."""

    kind: Literal["gates"] = "gates"
    names: tuple[str, ...]

    def build(self, features: int) -> an.Normalizer:
        width = features // len(self.names)
        declared = {"layer": an.LayerNorm, "eps": partial(an.LayerNorm, eps=1e-2), "rms": an.RMSNorm}
        return PerGate([declared[name](width) if name in declared else built(name, width) for name in self.names])


@pytest.mark.parametrize("names", ["layer eps layer eps", "Geometric L1 rms Geometric", "L1 L1 PowerMean L1"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_with_different_normalizers(names, cell):
    spec = GatesSpec(names=tuple(names.split()[: 4 if cell == "lstm" else 3]))
    norm = {"sites": {"ih": spec, "hh": spec}}
    check(pair("L1", cell, ragged=True, before=2, options={"norm": norm}))
    check(pair("L1", cell, WINDOWS["exponential"], options={"norm": norm}))


def test_traced_and_declared_normalizers_at_different_sites():
    sites = {"ih": GallerySpec(name="Mixed"), "hh": "layer", "c": GallerySpec(name="DynamicTanh")}
    check(pair("L1", ragged=True, before=3, options={"norm": {"sites": sites}}))
    check(pair("L1", options={"norm": {"sites": {"hh": GallerySpec(name="TwoSided")}}}))


@pytest.mark.parametrize("name", ["SoftClipped", "LearnablePower"])
def test_wide_rows_and_many_of_them(name):
    """More features than a tile, more rows than a block, and weights larger than the cache."""
    check(Pair("lstm", hidden=300, batch=19, steps=3, options={"norm": GallerySpec(name=name), "window": 2}))


def test_the_number_of_threads_has_no_effect():
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            options = {"norm": GallerySpec(name="Mixed"), "window": 2}
            given = Pair("lstm", hidden=300, batch=37, steps=3, options=options)
            found.append(outcome(given.layer("native"), given.xs()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].ys, found[1].ys)
    assert all(torch.equal(a, b) for a, b in zip(found[0].gradients, found[1].gradients, strict=True))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set_equals_the_reference(level):
    library = load()
    assert not isinstance(library, str)
    try:
        library.level(level)
        for name in ("LearnablePower", "SoftClipped", "Halves"):
            check(pair(name, hidden=9, ragged=True))
    finally:
        library.level(2)


@pytest.mark.parametrize("name", ["Geometric", "TwoSided", "DynamicTanh"])
def test_the_gradient_can_be_differentiated_again(name):
    found = []
    for backend in ("native", "reference"):
        given = pair(name, hidden=3, ragged=True, before=2)
        layer, xs = given.layer(backend), given.xs().requires_grad_()
        ys, _ = layer.unroll(xs, given.state(), given.lengths())
        (first,) = torch.autograd.grad((ys * ys).sum(), xs, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [xs, *layer.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        if a is not None or b is not None:
            compare(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, tolerance=1e-8)


@pytest.mark.parametrize("name", ["TwoSided", "SoftClipped", "DynamicTanh"])
def test_accuracy_of_float32_with_a_large_mean(name):
    """For mean 100 and deviation 1, float32 is within a few roundings of the same layer in float64."""
    given = pair(name, dtype=torch.float32, hidden=12)
    xs = given.xs() * 10
    with torch.no_grad():
        found = given.layer("native").unroll(xs)[0]
        expected = given.layer("reference", torch.float64).unroll(xs.double())[0]
    compare(found.double(), expected, tolerance=2e-6)


def test_the_operator_equals_the_eager_path():
    given = pair("TwoSided", ragged=True, before=2)
    plain = outcome(given.layer("native"), given.xs(), given.state(), given.lengths())
    with torch.profiler.profile() as profile:
        watched = outcome(given.layer("native"), given.xs(), given.state(), given.lengths())
    assert any("atn_norms::recurrent" in event.key for event in profile.key_averages())
    agree(watched, plain, 0.0)


def test_a_state_moves_between_backends():
    given = pair("TwoSided", per_gate=True)
    native, reference = given.layer("native"), given.layer("reference")
    xs = given.xs()
    whole, _ = reference.unroll(xs)
    _, state = native.unroll(xs[:3])
    more, state = reference.unroll(xs[3:4], state)
    last, _ = native.unroll(xs[4:], state)
    compare(torch.cat([more, last]), whole[3:], tolerance=EXACT)


def test_a_state_of_another_shape_is_rejected():
    given = pair("TwoSided")
    _, state = pair("L1").layer("native").unroll(given.xs())
    with pytest.raises(ValueError, match="state: "):
        given.layer("native").unroll(given.xs(), state)


class Changed(an.NormSpec):
    kind: Literal["changed"] = "changed"

    def build(self, features: int) -> an.Normalizer:
        norm = L1(features)
        norm.register_buffer("scale", torch.tensor(2.0))
        return norm


class Option(L1):
    power = 1.0

    def normalize(self, x: Any, pooled: Any) -> Any:
        return super().normalize(x, pooled) * self.power


class OptionSpec(an.NormSpec):
    kind: Literal["option"] = "option"

    def build(self, features: int) -> an.Normalizer:
        return Option(features)


def test_a_changed_option_takes_effect_at_the_next_call():
    layers = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        layers.append(an.GRU(2, 4, norm=OptionSpec(), backend=backend, dtype=torch.float64))
    xs = torch.randn(3, 2, 2, dtype=torch.float64)
    before = layers[0](xs)[0]
    for layer in layers:
        layer.norm_hh_l0.power = 0.5
    compare(layers[0](xs)[0], layers[1](xs)[0], tolerance=EXACT)
    assert not torch.equal(layers[0](xs)[0], before)


def test_rows_past_their_end_may_hold_anything():
    given = pair("Geometric", ragged=True)
    layer, lengths = given.layer("native"), given.lengths()
    assert lengths is not None
    xs = given.xs()
    clean = outcome(layer, xs, None, lengths)
    spoilt = xs.clone()
    for row, length in enumerate(lengths.tolist()):
        spoilt[length:, row] = float("nan")
    agree(outcome(layer, spoilt, None, lengths), clean, 0.0)


def test_a_program_is_traced_once_for_all_layers_of_a_kind():
    first, second = (cast("Any", an.LSTM)(2, 6, norm=GallerySpec(name="L1")) for _ in range(2))
    assert traced_norm(first.norm_ih_l0, 24) is traced_norm(second.norm_hh_l0, 24)
