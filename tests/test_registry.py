"""Options are strict, fields bind late, and every error names path, value, choices and the nearest choice."""

import subprocess
import sys
import warnings
from abc import abstractmethod
from collections import UserDict, UserList
from contextlib import nullcontext
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

import atn_norms
from atn_norms.registry import KindField, Options, Problem, Registry, Source, SpecError, dotted, nearest, to_spec_error

own = Registry()


class Norm(Options):
    family: ClassVar[str | None] = "normalizer"
    kind: str


@own.normalizer
class Plain(Norm):
    kind: Literal["plain"] = "plain"
    eps: float = Field(default=1e-5, gt=0)
    shape: tuple[tuple[int, ...], ...] = ()


@own.normalizer
class Group(Norm):
    kind: Literal["group"] = "group"
    groups: int
    inner: Annotated[Norm, KindField("normalizer", source=own)] = Plain()


class Window(Options):
    family: ClassVar[str | None] = "window"
    kind: str


@own.window
class Last(Window):
    kind: Literal["last"] = "last"
    steps: int = Field(ge=1)


def steps_of(value: Any) -> Any:
    """Convert an integer into a mapping of that many steps, and `"all"` into a spec."""
    if value == "all":
        return Last(steps=10**6)
    return {"kind": "last", "steps": value} if type(value) is int else value


class Placement(Options):
    sum: Literal["separate", "joint"] = "separate"


class Layer(Options):
    norm: Annotated[Norm | None, KindField("normalizer", source=own)] = None
    size: int
    window: Annotated[
        Window, KindField("window", shorthand=steps_of, shorthand_schema={"type": "integer"}, source=own)
    ] = Last(steps=1)
    more: tuple[Annotated[Norm, KindField("normalizer", source=own)], ...] = ()
    placement: Placement = Placement()
    seeds: int | list[int] = 1
    scale: float = 1.0


def messages(data: dict[Any, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Layer.model_validate(data)
    return [str(problem) for problem in to_spec_error(caught.value, data=data).problems]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"size": True}, "size: got True; expected an integer"),
        ({"size": "3"}, "size: got '3'; expected an integer"),
        ({"size": 3.0}, "size: got 3.0; expected an integer"),
        ({"size": 1, "scale": float("nan")}, "scale: got nan; expected a finite number"),
        ({"size": 1, "scale": 10**400}, "scale: got 1" + 56 * "0" + "...; expected a number"),
        ({}, "size: got nothing; expected a value"),
        (
            {"size": 1, "placement": {"sum": "joined"}},
            "got 'joined'; expected 'separate' or 'joint'; did you mean 'joint'?",
        ),
        (
            {"size": 1, "norm": "plane"},
            "norm: got unknown normalizer 'plane'; expected one of group, plain, none; did you mean 'plain'?",
        ),
        ({"size": 1, "norm": {"kind": "?"}}, "norm.kind: got unknown normalizer '?'; expected one of group, plain"),
        ({"size": 1, "norm": {"eps": 1.0}}, "norm.kind: got nothing; expected a normalizer's kind: one of "),
        ({"size": 1, "norm": {"kind": 3}}, "norm.kind: got int 3; expected a normalizer's kind: one of group, plain"),
        ({"size": 1, "norm": 3}, "norm: got int 3; expected a normalizer's kind (one of group, "),
        ({"size": 1, "window": "none"}, "window: got unknown window 'none'; expected one of last"),
        ({"size": 1, "norm": "group"}, "norm.groups: got nothing; expected a value"),
        ({"size": 1, "norm": Last(steps=2)}, "norm: got Last "),
        ({"size": 1, "window": 0}, "window: got 0; expected at least 1"),
        (
            {"size": 1, "window": None},
            "window: got NoneType None; expected an integer, a window's kind (one of last), a mapping or a spec",
        ),
        ({"size": 1, "seeds": "x"}, "seeds: got 'x'; expected an integer, or a list"),
        ({"size": 1, "more": {"a"}}, "more: got {'a'}; expected a list"),
        (
            {"size": 1, "more": ["plain", {"kind": "plain", "shape": [[1], [2, "3"]]}]},
            "more[1].shape[1][1]: got '3'; expected an integer",
        ),
        (
            {"size": 1, "n{0}rm": 2},
            "n{0}rm: got an unknown key; expected one of norm, size, window, more, placement, seeds, scale",
        ),
        ({"size": 1, 7: 2}, "[7]: got an unknown key; expected one of norm, size"),
    ],
)
def test_an_error_names_place_value_choices_and_nearest(data, problem):
    (only,) = messages(data)
    assert problem in only


def test_errors_inside_a_late_bound_field_keep_their_path():
    """pydantic places a ValidationError of a nested validator below the outer path; the package relies on it."""
    inner = {"kind": "group", "groups": 1.5, "inner": {"kind": "plain", "eps": -1.0, "shpae": []}}
    assert messages({"size": 1, "norm": inner}) == [
        "norm.groups: got 1.5; expected an integer",
        "norm.inner.shpae: got an unknown key; expected one of kind, eps, shape; did you mean 'shape'?",
        "norm.inner.eps: got -1.0; expected a number above 0",
    ]


def test_all_problems_are_reported_together_with_their_paths():
    with pytest.raises(ValidationError) as caught:
        Layer.model_validate({"sise": 1, "norm": 3})
    error = to_spec_error(caught.value, where=lambda path: f"file:{len(path)}")
    assert [problem.split(";")[0] for problem in str(error).splitlines()] == [
        "file:1: sise: got an unknown key",
        "file:1: norm: got int 3",
        "file:1: size: got nothing",
    ]


def test_keywords_and_mappings_are_validated_alike():
    with pytest.raises(ValidationError, match="got an unknown key; expected one of norm, size"):
        Layer(size=1, nrom="plain")  # pyright: ignore[reportCallIssue]


@given(st.sampled_from(["norm", "size", "window", "placement"]), st.data())
def test_a_key_one_letter_off_is_recognized(word, data):
    position = data.draw(st.integers(0, len(word) - 1))
    misspelt = word[:position] + data.draw(st.sampled_from("qzxj")) + word[position + 1 :]
    assert nearest(misspelt, Layer.model_fields) == word


def test_options_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Plain().eps = 1.0  # pyright: ignore[reportAttributeAccessIssue]


plains = st.builds(
    Plain,
    eps=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    shape=st.lists(st.lists(st.integers(), max_size=2), max_size=2),
)
norms = st.recursive(plains, lambda inner: st.builds(Group, groups=st.integers(), inner=inner), max_leaves=3)
layers = st.builds(
    Layer,
    norm=st.none() | norms,
    size=st.integers(),
    window=st.integers(1, 9).map(lambda k: Last(steps=k)),
    more=st.lists(norms, max_size=2),
)


@given(layers)
def test_round_trips_keep_everything(layer):
    """JSON and plain data restore the spec, including the fields of its kind."""
    assert Layer.model_validate_json(layer.model_dump_json()) == layer
    assert Layer.model_validate(layer.model_dump(mode="json")) == layer
    assert Layer.model_validate(layer.model_dump()) == layer
    for norm in layer.more:
        assert type(norm) is type(Layer.model_validate(layer.model_dump()).more[layer.more.index(norm)])


def test_the_forms_of_a_field_agree():
    as_text, as_mapping = Layer(size=1, norm="plain"), Layer(size=1, norm={"kind": "plain"})  # pyright: ignore
    assert as_text == as_mapping == Layer(size=1, norm=Plain())
    assert Layer(size=1, window=4).window == Last(steps=4)  # pyright: ignore
    assert Layer(size=1, window="all").window == Last(steps=10**6)  # pyright: ignore
    assert Layer(size=1, norm=None).norm is None
    assert Layer(size=1, norm="none").norm is None  # pyright: ignore


def test_an_unregistered_spec_is_taken_as_it_is():
    class Unregistered(Norm):
        kind: Literal["unregistered"] = "unregistered"

    spec = Unregistered()
    assert Layer(size=1, norm=spec).norm is spec


def test_registration_after_the_class_was_built_counts():
    late = Registry()

    class Holder(Options):
        norm: Annotated[Norm, KindField("normalizer", source=late)]

    with pytest.raises(ValidationError, match="got unknown normalizer 'plain'; expected none"):
        Holder.model_validate({"norm": "plain"})
    assert "plain" not in str(Holder.model_json_schema())
    late.normalizer(Plain)
    assert Holder.model_validate({"norm": "plain"}).norm == Plain()
    assert "plain" in str(Holder.model_json_schema())


def test_the_schema_shows_every_kind_and_form():
    schema = Layer.model_json_schema()
    forms = schema["properties"]["norm"]["anyOf"]
    assert {"enum": ["plain", "none"]} in forms  # group has a required option, so its name alone is not a form
    assert {"type": "null"} in forms
    mappings = [form for form in forms if "allOf" in form]
    assert [form["required"] for form in mappings] == [["kind"], ["kind"]]
    assert {"type": "integer"} in schema["properties"]["window"]["anyOf"]
    assert {"type": "null"} not in schema["properties"]["window"]["anyOf"]


def test_a_claim_from_two_sources_is_unusable_and_names_both():
    both = Registry()

    class Other(Norm):
        kind: Literal["plain"] = "plain"

    with both.transaction(Source("a", "dist-a", "1")):
        both.normalizer(Plain)
        both.normalizer(Group)
    with both.transaction(Source("b", "dist-b", "2")):
        both.normalizer(Other)
    with pytest.raises(SpecError, match=r"'plain' is claimed by dist-a \(.*Plain\) and dist-b \(.*Other\)"):
        both.lookup("normalizer", "plain")
    assert list(both.kinds("normalizer")) == ["group"]
    assert list(both.conflicts("normalizer")) == ["plain"]


def test_two_classes_of_one_source_for_one_kind_are_named():
    class Other(Norm):
        kind: Literal["plain"] = "plain"

    for source in (Source("a", "dist-a", "1"), None):
        both = Registry()
        with both.transaction(source) if source else nullcontext():
            both.normalizer(Plain)
            both.normalizer(Other)
        name = source.distribution if source else __name__
        expected = (
            rf"'plain' is claimed by {name} \(\S*Plain and \S*Other\), so it is unusable; register only one of them$"
        )
        with pytest.raises(SpecError, match=expected):
            both.lookup("normalizer", "plain")


@pytest.mark.parametrize("again", [Source("b", "dist-b", "2"), Source("", "module", "")])
def test_a_class_that_a_plugin_registers_is_not_registered_again(again):
    once = Registry()
    with once.transaction(Source("a", "dist-a", "1")):
        once.normalizer(Plain)
    expected = (
        "^registry.normalizer: got Plain, which dist-a registers; expected a class that no other plugin registers$"
    )
    with pytest.raises(TypeError, match=expected), once.transaction(again):
        once.normalizer(Group)
        once.normalizer(Plain)
    assert {kind: entry.plugin for kind, entry in once.kinds("normalizer").items()} == {"plain": "a"}


def test_defining_a_class_again_replaces_it():
    again = Registry()
    for default in (1, 2):

        class Redefined(Norm):
            kind: Literal["redefined"] = "redefined"
            value: int = default

        again.normalizer(Redefined)
    assert again.lookup("normalizer", "redefined").model_fields["value"].default == 2


def test_a_transaction_that_raises_registers_nothing():
    undone = Registry()
    with pytest.raises(RuntimeError), undone.transaction(Source("a", "dist-a", "1")):
        undone.normalizer(Plain)
        raise RuntimeError
    assert not undone.kinds("normalizer")
    undone.normalizer(Plain)
    assert undone.kinds("normalizer")["plain"].distribution == __name__


class Abstract(Norm):
    kind: Literal["abstract"] = "abstract"

    @abstractmethod
    def build(self) -> None: ...


class Wide(Norm):
    kind: Literal["a", "b"] = "a"


class Parted(Norm):
    kind: Literal["a"] = "b"  # pyright: ignore


class Reserved(Norm):
    kind: Literal["none"] = "none"


with warnings.catch_warnings(action="ignore", category=UserWarning):  # pydantic's, about the attribute of the parent

    class Shadowing(Norm):
        kind: Literal["shadowing"] = "shadowing"
        family: str = "x"  # pyright: ignore


class Mutable(Norm):
    model_config = {"frozen": False}
    kind: Literal["mutable"] = "mutable"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (int, r"registry.normalizer: got int; expected an options model \(a subclass of Options\)"),
        (Plain(), "expected an options model"),
        (Last, "got Last of family 'window'; expected the options of a normalizer"),
        (Abstract, "got Abstract without build; expected a concrete options model"),
        (Norm, 'got Norm without a fixed kind; expected a field `kind: Literal\\["name"\\] = "name"`'),
        (Wide, "got Wide without a fixed kind"),
        (Parted, "got Parted without a fixed kind"),
        (
            Shadowing,
            "got Shadowing with a field 'family'; expected another name of the field, since `family` is a class",
        ),
        (Mutable, "got Mutable with `frozen` set to False in its model_config; expected a frozen options model"),
        (Reserved, "Reserved.kind: got 'none'; expected lower-case letters"),
    ],
)
def test_an_invalid_registration_is_rejected_with_the_reason(spec, message):
    with pytest.raises(TypeError, match=message):
        Registry().normalizer(spec)


def test_an_unknown_family_is_named():
    with pytest.raises(
        SpecError, match=r"got unknown family 'normaliser'; expected one of .*; did you mean 'normalizer'?"
    ):
        own.kinds("normaliser")


def test_the_loader_runs_once_and_at_the_first_look_up(monkeypatch):
    calls = []

    def load(registry):
        calls.append(list(registry.kinds("normalizer")))  # a look-up during loading must not load again
        registry.normalizer(Plain)
        return "loaded"

    monkeypatch.setattr(sys.modules[__name__], "load", load, raising=False)
    lazy = Registry(loader=f"{__name__}:load")
    lazy.normalizer(Group)
    assert calls == []
    assert list(lazy.kinds("normalizer")) == ["group", "plain"]
    assert lazy.load() == "loaded"
    assert calls == [["group"]]


def test_paths_are_formatted_as_users_write_them():
    assert dotted(("axes", "norm", 0, "eps")) == "axes.norm[0].eps"
    assert dotted(()) == ""


def test_a_spec_error_survives_a_process_boundary():
    import pickle

    problems = Problem(("a", 0), "1", "2", "two", "f.yaml:1:2", "Run it.", "code"), Problem(("b",), detail="no")
    error = pickle.loads(pickle.dumps(SpecError.of(problems)))
    assert error.problems == problems
    assert str(error) == "f.yaml:1:2: a[0]: got 1; expected 2; did you mean 'two'? Run it.\nb: no"


def test_a_specification_error_has_fields():
    """Programs read the fields; a problem of a nested validator keeps them, below the outer path."""
    with pytest.raises(ValidationError) as caught:
        Layer.model_validate({"size": 1, "norm": {"kind": "group", "groups": 1, "inner": {"kind": "plane"}}})
    error = to_spec_error(caught.value, where=lambda path: f"file:{len(path)}")
    assert (error.path, error.expected, error.nearest) == (("norm", "inner", "kind"), "one of group, plain", "plain")
    assert (error.got, error.position) == ("unknown normalizer 'plane'", "file:3")
    assert error.problems[0].code == "unknown_kind"


def test_a_check_of_several_options_names_the_rejected_option():
    class Range(Options):
        low: int
        high: int

        @model_validator(mode="after")
        def _ordered(self):
            if self.low > self.high:
                raise SpecError("high", str(self.high), f"at least {self.low}")
            return self

    class Outer(Options):
        inner: tuple[Range, ...]

    data = {"inner": [{"low": 0, "high": 1}, {"low": 3, "high": 2}]}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    error = to_spec_error(caught.value, data=data)
    assert error.path == ("inner", 1, "high") and str(error) == "inner[1].high: got 2; expected at least 3"


def test_importing_the_registry_loads_no_torch_and_no_plugin():
    code = "import sys, atn_norms.registry; print('torch' in sys.modules, 'pluggy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


class Numbers(Options):
    count: int = 1
    rate: float = 1.0
    sizes: tuple[int, ...] = ()
    named: dict[str, int] = {}


def test_numbers_of_numpy_and_other_mappings_are_numbers_and_mappings():
    numpy = pytest.importorskip("numpy")
    options = Numbers.model_validate(
        UserDict(count=numpy.int64(3), rate=numpy.float32(0.5), sizes=UserList([numpy.int8(2)]), named=UserDict(a=1))
    )
    assert options == Numbers(count=3, rate=0.5, sizes=(2,), named={"a": 1})
    assert [type(each) for each in (options.count, options.rate, options.sizes[0])] == [int, float, int]
    for wrong in (numpy.bool_(True), numpy.float64(3.0), True, "3"):
        with pytest.raises(ValueError, match="count"):
            Numbers.model_validate({"count": wrong})
    assert Numbers.model_json_schema()["properties"]["count"] == {"default": 1, "title": "Count", "type": "integer"}


def test_a_layer_takes_numbers_of_numpy_and_any_mapping():
    numpy = pytest.importorskip("numpy")
    two, three, five = numpy.int64(2), numpy.int32(3), numpy.int16(5)
    mapping = UserDict(cell="gru", input_size=two, hidden_size=three, norm=UserDict(kind="layer"), window=five)
    layer = atn_norms.build(mapping)
    assert layer.spec == atn_norms.GRU(2, 3, norm="layer", window=5).spec
    assert atn_norms.GRU(two, three, norm="layer", window=five).spec == layer.spec
    assert atn_norms.Sliding(five) == atn_norms.Sliding(5) and type(atn_norms.Sliding(five).steps) is int
    assert atn_norms.LayerNorm(three).weight.shape == (3,)
