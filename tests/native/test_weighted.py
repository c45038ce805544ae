"""Windows that declare weights by age: native equals the reference in values, states and every gradient."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import atn_norms as an
from atn_norms.backends.description import WindowPlan, window_of
from atn_norms.backends.fused.plugin_windows import MOST_AGES, Recognized, Weighted, recognized
from atn_norms.pytree import expand_mask, where_mask
from tests.native.strategies import EXACT, Pair, agree, check, functional, needs_kernels, outcome
from tests.traced.gallery import GallerySpec

pytestmark = needs_kernels

TAPS = {
    "triangular": (4.0, 3.0, 2.0, 1.0),
    "dilated": (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0),
    "single": (0.25,),
    "past": (0.0, 1.0, 0.5),
    "longer than the sequence": tuple(1.0 / (1 + age) for age in range(40)),
}


@dataclass(frozen=True)
class Plugin(an.Window[Any]):
    """A window as a plugin writes it: the pooled steps are selected and weighted before the merge."""

    taps: tuple[float, ...]

    def initial(self, now: Any) -> Any:
        past = len(self.taps) - 1
        leaves = tuple(leaf.new_zeros((leaf.shape[0], past, *leaf.shape[1:])) for leaf in now)
        return leaves[0].new_zeros((leaves[0].shape[0], past)), leaves

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights = torch.cat([state[0], weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        used = [place for place, tap in enumerate(reversed(self.taps)) if tap]
        taps = weights.new_tensor([tap for tap in reversed(self.taps) if tap])
        pooled = type(now)(*(leaf[:, used] for leaf in leaves)).pool(weights[:, used] * taps, 1)
        return pooled, where_mask(weight > 0, (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves)), state)

    def weight_at(self, age: Tensor) -> Tensor:
        taps = age.new_tensor(self.taps)
        inside = age < len(self.taps)
        return torch.where(inside, taps[torch.where(inside, age, 0).long()], 0.0)


class PluginSpec(an.WindowSpec):
    """Options of `Plugin`."""

    kind: Literal["weighted-in-a-test"] = "weighted-in-a-test"
    taps: tuple[float, ...]

    def build(self) -> Plugin:
        return Plugin(self.taps)


def pair(name: str, **fields: Any) -> Pair:
    window: Any = PluginSpec(taps=TAPS[name])
    if fields.pop("detached", False):
        window = {"kind": "detached", "window": window}
    options = {"window": window, **fields.pop("options", {})}
    return Pair(**{"hidden": 5, "batch": 3, "steps": 9, "options": options} | fields)


@pytest.mark.parametrize("norm", ["layer", "rms", "mixed"])
@pytest.mark.parametrize("name", TAPS)
def test_it_equals_the_reference(name, norm):
    before = 3 if name == "past" else None  # without a state its first window has no step
    check(pair(name, norm=norm, before=before))


@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
@pytest.mark.parametrize("name", TAPS)
def test_ragged_rows_and_carried_states(name, cell):
    check(pair(name, cell=cell, ragged=True, before=5, batch=19, per_gate=cell == "gru"))


@pytest.mark.parametrize("name", ["triangular", "dilated"])
def test_a_detached_past(name):
    check(pair(name, detached=True, ragged=True, before=4))


@pytest.mark.parametrize("norm", ["Mixed", "TwoSided"])
def test_traced_normalizers(norm):
    check(pair("triangular", ragged=True, before=3, hidden=6, options={"norm": GallerySpec(name=norm)}))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_norms_over_the_batch(training, ragged):
    found = []
    case = pair("dilated", ragged=ragged, batch=7, options={"norm": "batch"})
    for backend in ("native", "reference"):
        layer = case.layer(backend)
        if not training:
            layer.eval()
        found.append(outcome(layer, case.xs(), None, case.lengths()))
    agree(*found)


def test_gradients_of_gradients():
    found = []
    case = pair("triangular", steps=5)
    for backend in ("native", "reference"):
        layer = case.layer(backend)
        first = outcome(layer, case.xs(), retain=True)
        found.append(torch.autograd.grad(functional(first.gradients[1:]), list(layer.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_a_sequence_may_change_the_backend_in_the_middle():
    case = pair("dilated", before=2)
    native, reference = case.layer("native"), case.layer("reference")
    xs = case.xs()
    expected, end = reference.unroll(xs)
    first, state = native.unroll(xs[:4])
    second, _ = reference.unroll(xs[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(native.unroll(xs[4:], state)[1], end, rtol=EXACT, atol=EXACT)


def test_the_total_weight_may_be_too_small_for_a_reciprocal():
    """At the first step the only weight is 1e-320, whose reciprocal is infinite."""
    case = pair("triangular", options={"window": PluginSpec(taps=(1e-320, 1e-320, 1.0))})
    agree(outcome(case.layer("auto"), case.xs()), outcome(case.layer("reference"), case.xs()))
    assert recognized(Plugin((1e-320, 1e-320, 1.0))) is None


def test_equal_weights_are_a_sliding_window():
    assert window_of(Plugin((1.0, 1.0, 1.0))) == WindowPlan(3, 1.0)


@dataclass(frozen=True)
class Lying(Plugin):
    """Another window than the declared one."""

    def weight_at(self, age: Tensor) -> Tensor:
        return super().weight_at(age) * (1.0 + 0.01 * (age == 1))


@dataclass(frozen=True)
class Cut(Plugin):
    """A window that detaches its past without the declaration."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        return super().push(now, weight, an.detach(state))


@dataclass(frozen=True)
class Halving(Plugin):
    """A window that changes the weights in its state."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled, (weights, leaves) = super().push(now, weight, state)
        return pooled, (weights * 0.5, leaves)


class Mutable(Plugin):
    """A window whose attributes may change."""

    __dataclass_params__ = None


class Robust(Plugin):
    """A window that ignores steps with a large statistic."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        small = torch.stack([leaf.abs().flatten(1).amax(1) < 10 for leaf in now]).all(0)
        pooled, after = super().push(now, weight * small, state)
        return pooled, after


@pytest.mark.parametrize("kind", [Lying, Cut, Halving, Mutable, Robust])
def test_a_window_that_differs_from_its_declaration_runs_on_the_reference(kind):
    assert recognized(Plugin(TAPS["triangular"])) == Recognized(TAPS["triangular"])
    assert recognized(kind(TAPS["triangular"])) is None


def test_weights_without_an_end_are_not_recognized():
    assert recognized(Plugin((1.0,) * (MOST_AGES + 1))) is None
    assert recognized(Weighted((1.0, 0.5))) is None  # it declares none


@dataclass(frozen=True)
class Before(an.Window[Any]):
    """As the online plugin: the steps before the current step, whose weights fall by `decay`."""

    decay: float
    includes_now: bool = False

    def initial(self, now: Any) -> Any:
        leaves = tuple(torch.zeros_like(leaf) for leaf in now)
        return leaves[0].new_zeros(leaves[0].shape[0]), leaves

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        total, past = state
        both = type(now)(*(torch.stack(pair, 1) for pair in zip(past, now, strict=True)))
        after = both.pool(torch.stack([total * self.decay, weight], 1), 1)
        pairs = zip(past, now, strict=True)
        pooled = type(now)(*(torch.where(expand_mask(total > 0, new), old, new) for old, new in pairs))
        if self.includes_now:
            pooled = after
        return pooled, where_mask(weight > 0, (total * self.decay + weight, tuple(after)), state)


class BeforeSpec(an.WindowSpec):
    """Options of `Before`."""

    kind: Literal["before-in-a-test"] = "before-in-a-test"
    decay: float
    includes_now: bool = False

    def build(self) -> Before:
        return Before(self.decay, self.includes_now)


@dataclass(frozen=True)
class Capped(Before):
    """A window whose total weight has a limit."""

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        pooled, (total, past) = super().push(now, weight, state)
        return pooled, (total.clamp(max=500.0), past)


def test_a_running_window_with_a_limit_runs_on_the_reference():
    assert recognized(Before(1.0)) == Recognized(decay=1.0, past=True)
    assert recognized(Capped(1.0)) is None


def before(decay: float, *, includes_now: bool = False, detached: bool = False, **fields: Any) -> Pair:
    window: Any = BeforeSpec(decay=decay, includes_now=includes_now)
    window = {"kind": "detached", "window": window} if detached else window
    options = {"window": window, **fields.pop("options", {})}
    return Pair(**{"hidden": 5, "steps": 7, "batch": 19, "options": options} | fields)


@pytest.mark.parametrize("includes_now", [False, True])
@pytest.mark.parametrize("decay", [0.7, 1.0])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_running_windows(norm, decay, includes_now):
    assert "backend 'native'" in an.explain(before(decay, includes_now=includes_now, norm=norm).layer("auto"))
    check(before(decay, includes_now=includes_now, norm=norm))
    check(before(decay, includes_now=includes_now, norm=norm, ragged=True, before=4))


@pytest.mark.parametrize("cell", ["gru", "tanh"])
def test_running_windows_of_other_cells(cell):
    check(before(0.9, cell=cell, ragged=True, before=2, per_gate=cell == "gru"))
    check(before(0.9, cell=cell, detached=True, ragged=True, before=2))


def test_running_windows_of_traced_normalizers():
    check(before(0.8, ragged=True, before=1, options={"norm": GallerySpec(name="TwoSided")}))


def test_a_step_at_a_time_equals_the_whole_sequence():
    case = before(0.8, batch=3)
    layer, xs = case.layer("native"), case.xs()
    whole, end = layer.unroll(xs)
    state, parts = None, []
    for x in xs:
        y, state = layer.unroll(x.unsqueeze(0), state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(state, end, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("spec", [PluginSpec(taps=TAPS["triangular"]), BeforeSpec(decay=0.8)])
def test_compiled_layers_run_the_same_kernels(spec):
    layer, xs = an.GRU(3, 4, norm="layer", window=spec), torch.randn(6, 2, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(xs)[0], layer(xs)[0])


def test_a_window_of_another_process_is_compared_again():
    window = Plugin(TAPS["triangular"])
    assert recognized(window) == Recognized(TAPS["triangular"])
    object.__setattr__(window, "_atn_norms_recognized", ("of another process", ((1.0, 2.0), 1.0, False)))
    assert recognized(window) == Recognized(TAPS["triangular"])
    assert window == Plugin(TAPS["triangular"])
