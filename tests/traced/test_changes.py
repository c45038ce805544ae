"""Programs follow their Python code: edits, patches, and changed globals have an effect on the next call."""

import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal

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


EPS = 0.5
HIDDEN = types.ModuleType("hidden_settings")
HIDDEN.eps = EPS  # type: ignore[attr-defined]


def add(value: Any) -> Any:
    return value + EPS


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any) -> Any:
        return value + EPS

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients


class Sub(torch.nn.Module):
    def add(self, value):
        return value + EPS


class Named(Enum):
    FIRST = 1

    def add(self, value):
        return value + EPS


@dataclass(frozen=True)
class Frozen:
    def add(self, value):
        return value + EPS


class Helper:
    offset: ClassVar[Any] = HIDDEN

    def __new__(cls, value):
        return value + cls.offset.eps


class Sum:
    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return self.value + other + EPS


def imported(value: Any) -> Any:
    import hidden_settings  # type: ignore[import-not-found]

    return value + hidden_settings.eps


class Distant(an.Normalizer):
    """Divide by the mean magnitude plus `EPS`, which a method named by `way` reads."""

    TABLE: ClassVar = {"add": (add,)}
    WAYS: ClassVar[dict[str, Callable[..., Any]]] = {
        "a function in an attribute": lambda self, value: self.function(value),
        "a method of a submodule": lambda self, value: self.sub.add(value),
        "a method of a frozen object": lambda self, value: self.frozen.add(value),
        "a method of a member of an enum": lambda self, value: self.named.add(value),
        "a function in a table": lambda self, value: self.TABLE["add"][0](value),
        "a module that the code imports": lambda self, value: imported(value),
        "a name in a text": lambda self, value: value + getattr(HIDDEN, "eps"),  # noqa: B009
        "a default": lambda self, value, settings={"module": HIDDEN}: value + settings["module"].eps,
        "an autograd function": lambda self, value: Added.apply(value),
        "a constructor": lambda self, value: Helper(value),
        "an operator": lambda self, value: Sum(value) + 0.0,
    }

    def __init__(self, features: int, way: str) -> None:
        super().__init__()
        self.function, self.sub, self.frozen, self.named, self.way = add, Sub(), Frozen(), Named.FIRST, way

    def measure(self, x):
        return an.Average.of(promoted(x).abs())

    def normalize(self, x, pooled):
        return x / self.WAYS[self.way](self, pooled.mean)


class DistantSpec(an.NormSpec):
    kind: Literal["distant"] = "distant"
    way: str

    def build(self, features: int) -> an.Normalizer:
        return Distant(features, self.way)


@pytest.mark.parametrize("way", Distant.WAYS)
def test_a_number_that_is_read_in_another_way_changes_the_next_call(way, monkeypatch):
    monkeypatch.setitem(sys.modules, HIDDEN.__name__, HIDDEN)
    native, reference = layers(DistantSpec(way=way))

    def change() -> None:
        monkeypatch.setitem(globals(), "EPS", 3.0)
        monkeypatch.setattr(HIDDEN, "eps", 3.0)

    check_change(native, reference, change)


def test_code_that_cannot_be_followed_has_no_program(monkeypatch):
    class Called(Distant):
        def normalize(self, x, pooled):
            return x / operator.methodcaller("shifted", pooled.mean)(self)

        def shifted(self, value):
            return value + EPS

    reason = traced_norm(Called(4, "an operator"), 4)
    assert isinstance(reason, str)
    assert ".Called.shifted (test_changes.py, line " in reason and "whose changes could not be noticed" in reason


@pytest.mark.parametrize("name", ["globals", "eval", "environ"])
def test_names_that_hide_what_code_reads_have_no_program(name):
    kind = type("Hiding", (Distant,), {"normalize": eval(f"lambda self, x, pooled: x if {name} else x")})
    assert f"it uses {name} in " in str(traced_norm(kind(4, "an operator"), 4))


class Raised(an.Normalizer):
    """Raise the mean magnitude to a power that Python reads out of a buffer, or out of the shape of a tensor."""

    def __init__(self, features: int, power: float, read: str) -> None:
        super().__init__()
        self.register_buffer("power", torch.tensor(power))
        self.table, self.read = torch.zeros(int(power)), read

    def measure(self, x):
        return an.Average.of(promoted(x).abs())

    def normalize(self, x, pooled):
        power: Any = self.power.tolist() if self.read == "tolist" else len(self.table)  # type: ignore[operator]
        return x / (pooled.mean + 0.1) ** power


class RaisedSpec(an.NormSpec):
    kind: Literal["raised"] = "raised"
    power: float
    read: str

    def build(self, features: int) -> an.Normalizer:
        return Raised(features, self.power, self.read)


def test_a_list_of_numbers_of_a_tensor_has_no_program():
    for power in (0.0, 1.0):
        reason = traced_norm(Raised(4, power, "tolist"), 4)
        assert str(reason).startswith("a number is read out of a tensor (test_changes.py, line ")


def test_the_shape_of_a_tensor_is_a_part_of_the_key():
    for power in (1.0, 2.0):
        native, reference = layers(RaisedSpec(power=power, read="length"))
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        compare(native(x)[0], reference(x)[0], tolerance=1e-10)


def test_a_buffer_of_another_type_has_another_program():
    normalizer: Any = Raised(4, 1.0, "length")
    assert not isinstance(traced_norm(normalizer, 4), str)
    normalizer.power = torch.tensor(1)
    found = traced_norm(normalizer, 4)
    assert not isinstance(found, str) and found.parameters == 0


@dataclass(frozen=True)
class Halved:
    name: str = "same"
    factor: float = field(default=1.0, compare=False)


def test_a_field_that_equality_ignores_is_a_part_of_the_key():
    programs = []
    for factor in (1.0, 2.0):
        normalizer: Any = Distant(4, "an operator")
        normalizer.held = Halved(factor=factor)
        programs.append(traced_norm(normalizer, 4))
    assert not any(isinstance(each, str) for each in programs)
    assert programs[0] is not programs[1]


@pytest.mark.parametrize("computed", [False, True])
def test_a_normalizer_that_cannot_be_copied_yet_is_traced_later(computed):
    normalizer: Any = Raised(4, 1.0, "length")
    normalizer.unique = f"computed {computed}"  # another key than in other tests
    power = normalizer.power
    if computed:
        normalizer.power = (torch.ones((), requires_grad=True) * 2).clone()
        with pytest.warns(RuntimeWarning, match="was not called before"):
            assert isinstance(traced_norm(normalizer, 4), str)
    else:
        normalizer.power = power.to("meta")
        assert traced_norm(normalizer, 4) == "its tensors are on the meta device, which has no values"
    normalizer.power = power
    assert not isinstance(traced_norm(normalizer, 4), str)


def test_a_default_device_does_not_affect_a_trace():
    normalizer: Any = Raised(4, 1.0, "length")
    normalizer.unique = "default device"
    with torch.device("meta"):
        assert not isinstance(traced_norm(normalizer, 4), str)


def test_an_empty_slice_has_no_program():
    class Split(Distant):
        def normalize(self, x, pooled):
            return torch.cat([x[..., :4] / (pooled.mean + 1.0), 2 * x[..., 4:]], -1)

    assert "makes or reads an empty tensor" in str(traced_norm(Split(4, "an operator"), 4))
    assert not isinstance(traced_norm(Split(6, "an operator"), 6), str)


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


CALLS = 0


class Counting(an.Normalizer):
    """Changes itself at its twentieth call; no comparison on random rows comes so far."""

    where = "attribute"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def measure(self, x):
        return an.Average.of(size(x))

    def normalize(self, x, pooled):
        global CALLS
        if self.where == "attribute":
            self.calls += 1
        else:
            CALLS += 1
        return x * (pooled.mean + 1.0) * (1.0 if max(self.calls, CALLS) < 20 else 0.5)


class CountingGlobally(Counting):
    where = "global"


@pytest.mark.parametrize("kind", [Counting, CountingGlobally])
def test_a_normalizer_that_counts_its_calls_has_no_program(kind, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CALLS", 0)
    assert traced_norm(kind(), 4) == "its methods change an attribute or a global at every call"


class Stats:
    pass


class Noting(Counting):
    """Sets an attribute that may change unnoticed."""

    def normalize(self, x, pooled):
        self.stats = Stats()
        return x * (pooled.mean + 1.0)


def test_a_normalizer_that_sets_an_object_has_no_program():
    assert traced_norm(Noting(), 4) == "its attribute 'stats' is a Stats, which may change unnoticed"


class Remembering(an.Normalizer):
    """Keeps a number at its first call."""

    exponent: float | None = None

    def measure(self, x):
        self.exponent = self.exponent or 2.0
        return an.Average.of(size(x) ** self.exponent)

    def normalize(self, x, pooled):
        return x / (pooled.mean + 1.0)


def test_a_value_that_is_kept_by_the_first_call_may_stay():
    assert not isinstance(traced_norm(Remembering(), 4), str)


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


HALF_LIFE = 4.0


class Decaying:
    def initial(self, now):
        return an.Cumulative().initial(now)

    def push(self, now, weight, state):
        total, past = state[0] * 0.5 ** (1 / self.half_life()), state[1]  # type: ignore[attr-defined]
        both = type(now)(*(torch.stack(pair, 1) for pair in zip(past, now, strict=True)))
        pooled = both.pool(torch.stack([total, weight], 1), 1)
        return pooled, where_mask(weight > 0, (total + weight, tuple(pooled)), state)


@dataclass(frozen=True)
class Decay(Decaying, an.Window[Any]):
    def half_life(self):
        return HALF_LIFE


@dataclass(frozen=True)
class Own(Decaying, an.Window[Any]):
    life: float = field(default=4.0, compare=False)

    def half_life(self):
        return self.life


@dataclass(frozen=True)
class Around(an.Window[Any]):
    inner: Any

    def initial(self, now):
        return self.inner.initial(now)

    def push(self, now, weight, state):
        return self.inner.push(now, weight, state)


class AnySpec(an.WindowSpec):
    kind: Literal["any"] = "any"
    made: ClassVar[Any] = None

    def build(self) -> an.Window:
        return type(self).made


def spec_of(window: Any) -> Any:
    return type("Made", (AnySpec,), {"made": window, "__module__": __name__})()


@pytest.mark.parametrize("window", [Decay(), Around(Decay())])
def test_a_changed_global_changes_a_window_inside_a_window(window, monkeypatch):
    native, reference = layers("layer", spec_of(window))
    check_change(native, reference, lambda: monkeypatch.setitem(globals(), "HALF_LIFE", 30.0))


def test_windows_that_differ_in_a_field_that_equality_ignores_are_compared_apart():
    first, second = recognized(Own()), recognized(Own(life=30.0))
    assert first is not None and second is not None
    assert first.decay == pytest.approx(0.5**0.25) and second.decay == pytest.approx(0.5 ** (1 / 30))


def test_a_patched_method_of_a_built_in_norm_is_called(monkeypatch):
    native, reference = layers("layer")
    check_change(native, reference, lambda: monkeypatch.setattr(an.LayerNorm, "normalize", lambda self, x, pooled: x))
