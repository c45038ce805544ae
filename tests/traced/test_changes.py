"""Programs follow their Python code: edits, patches, and changed globals have an effect on the next call."""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

import atn_norms as an
from atn_norms.backends.fused.plugin_windows import recognized
from atn_norms.backends.traced.cache import CHANGES, MOST_TRACES, traced_norm
from atn_norms.pytree import where_mask
from atn_norms.statistics import promoted
from tests.compare import compare

SCALE = 1.0
OPTIONS: dict[str, Any] = {"powers": {"first": 1.0}, "list": [1.0]}
SETTINGS = types.ModuleType("settings")
SETTINGS.shift = 0.5  # type: ignore[attr-defined]


class Config:
    offset = 0.25


def size(x: Any) -> Any:
    return promoted(x).abs()


def made(slope: float) -> tuple[Any, Callable[[float], None]]:
    """Return a class whose method reads a variable of this function, and a function that sets the variable."""

    class Inner(an.Normalizer):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(features))

        def measure(self, x):
            return an.Average.of(size(x))

        def normalize(self, x, pooled):
            return slope * self._scaled(x) / (pooled.mean + Config.offset)

        def _scaled(self, x):
            return SCALE * OPTIONS["powers"]["first"] * OPTIONS["list"][-1] * self.weight * x + SETTINGS.shift

    def set_slope(value: float) -> None:
        nonlocal slope
        slope = value

    return Inner, set_slope


Inner, set_slope = made(1.0)


class Outer(Inner):
    pass


class OuterSpec(an.NormSpec):
    kind: Literal["outer"] = "outer"

    def build(self, features: int) -> an.Normalizer:
        return Outer(features)


def other_size(x: Any) -> Any:
    return 2.0 * promoted(x).abs()


def other_normalize(self: Any, x: Any, pooled: Any) -> Any:
    return self._scaled(x) / (pooled.mean + 1.0)


CHANGED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a number": lambda patch: patch.setitem(globals(), "SCALE", 3.0),
    "an element": lambda patch: patch.setitem(OPTIONS["powers"], "first", 2.0),
    "a container": lambda patch: patch.setitem(OPTIONS, "list", [2.0]),
    "an attribute of a module": lambda patch: patch.setattr(SETTINGS, "shift", 2.0),
    "an attribute of a class": lambda patch: patch.setattr(Config, "offset", 2.0),
    "a function": lambda patch: patch.setitem(globals(), "size", other_size),
    "the code of a function": lambda patch: patch.setattr(size, "__code__", other_size.__code__),
    "a method of a base class": lambda patch: patch.setattr(Inner, "normalize", other_normalize),
    "the code of a method": lambda patch: patch.setattr(Inner._scaled, "__code__", (lambda self, x: x).__code__),
    "the class": lambda patch: patch.setattr(Outer, "normalize", other_normalize, raising=False),
}


def layers(norm: Any, window: Any = 3) -> list[Any]:
    found = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        found.append(an.GRU(3, 4, norm=norm, window=window, backend=backend, dtype=torch.float64))
    return found


def check_change(native: Any, reference: Any, change: Callable[[], None]) -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    before = reference(x)[0]
    compare(native(x)[0], before, tolerance=1e-10)
    change()
    after = reference(x)[0]
    assert (after - before).abs().max() > 1e-3
    compare(native(x)[0], after, tolerance=1e-10)


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_global_or_function_changes_the_next_call(name, monkeypatch):
    native, reference = layers(OuterSpec())
    check_change(native, reference, lambda: CHANGED[name](monkeypatch))


def test_a_changed_variable_of_an_outer_function_changes_the_next_call():
    native, reference = layers(OuterSpec())
    try:
        check_change(native, reference, lambda: set_slope(3.0))
    finally:
        set_slope(1.0)


def test_a_global_that_cannot_be_tracked_has_no_program(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", type("Scale", (), {"__mul__": lambda self, other: other})())
    for _ in range(2):
        assert traced_norm(Outer(4), 4) == "it reads 'SCALE', a Scale, which may change unnoticed"
    monkeypatch.undo()
    assert not isinstance(traced_norm(Outer(4), 4), str)


def test_the_methods_of_a_base_class_of_an_installed_package_are_followed(monkeypatch):
    package = types.ModuleType("installed_base")
    package.__file__ = "/site-packages/installed_base/__init__.py"
    monkeypatch.setitem(sys.modules, package.__name__, package)
    source = "class Base(Outer):\n    def _scaled(self, x): return x if x.requires_grad else 2 * x\n"
    exec(source, vars(package) | {"Outer": Outer, "__name__": package.__name__}, vars(package))
    kind = type("Derived", (package.Base,), {})
    assert "reads requires_grad" in str(traced_norm(kind(4), 4))


def test_a_value_that_changes_at_every_call_is_not_traced_forever():
    normalizer: Any = Outer(4)
    for step in range(MOST_TRACES):
        normalizer.step = step
        assert not isinstance(traced_norm(normalizer, 4), str)
    normalizer.step = MOST_TRACES
    assert traced_norm(normalizer, 4) == CHANGES
    normalizer.step = 0
    assert not isinstance(traced_norm(normalizer, 4), str)
    assert not isinstance(traced_norm(Outer(4), 4), str)


def test_a_buffer_may_change_at_every_call():
    class Annealed(Outer):
        mix: torch.Tensor

        def __init__(self, features: int) -> None:
            super().__init__(features)
            self.register_buffer("mix", torch.zeros(()))

        def normalize(self, x, pooled):
            return x + self.mix * (super().normalize(x, pooled) - x)

    class AnnealedSpec(an.NormSpec):
        kind: Literal["annealed"] = "annealed"

        def build(self, features: int) -> an.Normalizer:
            return Annealed(features)

    native, reference = layers(AnnealedSpec())
    programs = {id(traced_norm(norm, 12)) for norm in native.modules() if isinstance(norm, Annealed)}

    def change() -> None:
        for layer in (native, reference):
            for norm in layer.modules():
                if isinstance(norm, Annealed):
                    norm.mix.fill_(0.5)

    check_change(native, reference, change)
    assert {id(traced_norm(norm, 12)) for norm in native.modules() if isinstance(norm, Annealed)} == programs


WEIGHTS = {0: 1.0, 1: 0.5, 2: 0.25}


@dataclass(frozen=True)
class Fading(an.Window[Any]):
    def weight_at(self, age):
        return sum(weight * (age == place) for place, weight in WEIGHTS.items())

    def spec(self):
        return FadingSpec()

    def initial(self, now):
        return an.Sliding(len(WEIGHTS)).initial(now)

    def layout(self, now):
        return an.Sliding(len(WEIGHTS)).layout(now)

    def push(self, now, weight, state):
        weights = torch.cat([state[0], weight.unsqueeze(1)], 1)
        leaves = tuple(torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip(state[1], now, strict=True))
        pooled = type(now)(*leaves).pool(weights * weights.new_tensor([*WEIGHTS.values()][::-1]), 1)
        return pooled, where_mask(weight > 0, (weights[:, 1:], tuple(leaf[:, 1:] for leaf in leaves)), state)


class FadingSpec(an.WindowSpec):
    kind: Literal["fading"] = "fading"

    def build(self) -> an.Window:
        return Fading()


def test_a_changed_global_changes_a_window(monkeypatch):
    native, reference = layers("layer", Fading())
    found = recognized(Fading())
    assert found is not None and found.taps == (1.0, 0.5, 0.25)
    check_change(native, reference, lambda: monkeypatch.setitem(WEIGHTS, 1, 3.0))


def test_a_patched_method_of_a_built_in_norm_is_called(monkeypatch):
    native, reference = layers("layer")
    check_change(native, reference, lambda: monkeypatch.setattr(an.LayerNorm, "normalize", lambda self, x, pooled: x))
