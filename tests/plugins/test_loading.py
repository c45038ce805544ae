"""Loading of plugins: success, blocking, failure, and cleanup after a failure."""

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from atn_norms import plugins
from atn_norms.registry import FAMILIES, Registry, SpecError
from tests.plugins.site import HOOK, NORMALIZER, Site


def _built_in() -> dict[str, list[str]]:
    registry = Registry()
    plugins.BuiltIn.atn_norms_register(registry)
    return {family: list(registry.kinds(family)) for family in FAMILIES}


BUILT_IN = _built_in()


def assert_only_built_in(registry: Registry) -> None:
    assert {family: list(registry.kinds(family)) for family in BUILT_IN} == BUILT_IN


def test_built_in_kinds_are_registered_like_plugins(site):
    registry, records = site.load()
    assert_only_built_in(registry)
    known = {"normalizer": "layer", "window": "sliding", "cell": "lstm", "task": "adding"}
    assert all(kind in BUILT_IN[family] for family, kind in known.items())
    record = records["built-in"]
    assert (record.status, record.distribution) == ("loaded", "atn-norms")
    assert set(record.kinds) == {f"{family}:{kind}" for family, kinds in BUILT_IN.items() for kind in kinds}


def test_a_plugin_loads_with_its_source(site):
    site.install("pmean", NORMALIZER.replace("KIND", "pmean"), version="3.1")
    registry, records = site.load()
    record = records["pmean"]
    assert (record.status, record.kinds, record.reason) == ("loaded", ("normalizer:pmean",), "")
    entry = registry.kinds("normalizer")["pmean"]
    assert (entry.distribution, entry.version, entry.plugin) == ("dist-pmean", "3.1", "pmean")
    assert registry.lookup("normalizer", "pmean").__name__ == "PMeanSpec"


BROKEN = {
    "raises-on-import": ("1 / 0", r"ZeroDivisionError: division by zero \(.*plugin_broken.py:1\)"),
    "cannot-be-parsed": ("def", "SyntaxError: .*plugin_broken.py, line 1"),
    "exits": ("import sys\nsys.exit(3)", r"SystemExit: 3 \(.*plugin_broken.py:2\)"),
    "raises-in-the-hook": (HOOK + "raise KeyError('x')", r"KeyError: 'x' \(.*plugin_broken.py:4\)"),
    "registers-nonsense": (
        HOOK + "registry.normalizer(3)",
        "TypeError: registry.normalizer: got 3; expected an options model",
    ),
    "wrong-arguments": (HOOK.replace("(registry)", "(registrar)") + "0", "PluginValidationError: .*registrar"),
    "no-hook": ("x = 1", "implements no hook; it needs `@atn_norms.hookimpl def atn_norms_register.registry.`"),
    "misspelt-and-marked": (
        HOOK.replace("atn_norms_register", "atn_norms_registr") + "0",
        "implements an unknown hook 'atn_norms_registr'; expected one of atn_norms_register; did you mean 'atn_norms_register'?",  # noqa: E501
    ),
    "marked-under-any-name": (
        HOOK.replace("atn_norms_register", "register") + "0",
        "implements an unknown hook 'register'; expected one of atn_norms_register",
    ),
    "misspelt-and-unmarked": (
        "def atn_norms_regster(registry):\n    0",
        "has a function 'atn_norms_regster' that lacks `@atn_norms.hookimpl`, so it does nothing; .*did you mean",
    ),
    "unmarked": (
        "def atn_norms_register(registry):\n    0",
        "has a function 'atn_norms_register' that lacks `@atn_norms.hookimpl`, so it does nothing$",
    ),
    "unmarked-beside-a-good-one": (
        HOOK + "0\ndef atn_norms_resume(registry):\n    0",
        "has a function 'atn_norms_resume' that lacks",
    ),
    "kind-twice-in-one": (
        NORMALIZER.replace("KIND", "p") + "    registry.window(PMeanSpec)",
        "TypeError: registry.window: got PMeanSpec of family 'normalizer'; expected the options of a window",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_reported_without_side_effects(site, fault, caplog):
    code, reason = BROKEN[fault]
    site.install("broken", code)
    site.install("good", NORMALIZER.replace("KIND", "good"))
    registry, records = site.load()
    record = records["broken"]
    assert record.status == "failed"
    assert re.search(reason, record.reason), record.reason
    assert record.kinds == ()
    assert "Traceback" in record.traceback or "Error" in record.traceback
    assert [entry.plugin for entry in registry.kinds("normalizer").values()].count("good") == 1
    assert f"plugin 'broken' of dist-broken 1.0 failed and is left out: {record.reason}" in caplog.messages
    assert set(registry.kinds("normalizer")) == {*BUILT_IN["normalizer"], "good"}


def test_an_exception_while_registering_leaves_nothing_behind(site):
    late = NORMALIZER.replace("KIND", "half") + '    raise RuntimeError("late")\n'
    site.install("half", late)
    registry, records = site.load()
    assert_only_built_in(registry)
    assert records["half"].status == "failed"


def test_an_unreadable_distribution_hides_no_other(site):
    site.install("bad", "", points="[atn_norms]\nthis is no entry point\n")
    site.install("good", NORMALIZER.replace("KIND", "good"))
    _, records = site.load()
    assert records["good"].status == "loaded"
    (bad,) = [record for record in records.values() if record.status == "failed"]
    assert (bad.name, bad.distribution, bad.version) == ("dist-bad", "dist-bad", "1.0")
    assert "entry points cannot be read" in bad.reason


def test_an_object_may_be_the_plugin(site):
    door = "class Door:\n    @staticmethod\n    @hookimpl\n    def atn_norms_register(registry):\n        "
    code = NORMALIZER.replace("KIND", "held").replace(HOOK.partition("\n")[2], door)
    site.install("held", code, points="[atn_norms]\nheld = plugin_held:Door\n")
    _, records = site.load()
    assert records["held"].kinds == ("normalizer:held",), records["held"].reason


def test_a_kind_claimed_twice_names_both_distributions(site):
    site.install("one", NORMALIZER.replace("KIND", "same"))
    site.install("two", NORMALIZER.replace("KIND", "same"))
    site.install("three", NORMALIZER.replace("KIND", "layer"))
    site.install("four", NORMALIZER.replace("KIND", "four"))
    registry, _ = site.load()
    with pytest.raises(SpecError, match=r"'same' is claimed by dist-\w+ \(.*\) and dist-\w+ \(.*\), so it is unusable"):
        registry.lookup("normalizer", "same")
    with pytest.raises(SpecError, match=r"'layer' is claimed by atn-norms.* and dist-three"):
        registry.lookup("normalizer", "layer")
    assert list(registry.kinds("normalizer")) == ["batch", "four", "rms"]
    assert list(registry.conflicts("normalizer")) == ["layer", "same"]


def test_the_same_distribution_twice_on_the_path_counts_once(site, tmp_path, monkeypatch):
    site.install("pmean", NORMALIZER.replace("KIND", "pmean"), version="2.0")
    older = tmp_path / "older"
    older.mkdir()
    Site(older).install("pmean", NORMALIZER.replace("KIND", "pmean"), version="1.0")
    monkeypatch.setattr(sys, "path", [*sys.path, str(older)])
    registry, records = site.load()
    assert registry.conflicts("normalizer") == {}
    assert records["pmean"].version == "2.0"


@pytest.mark.parametrize(
    ("variables", "loaded"),
    [
        ({}, {"a", "b", "c"}),
        ({"ATN_NORMS_DISABLE_PLUGINS": "a,b"}, {"c"}),
        ({"ATN_NORMS_DISABLE_PLUGINS": " a , "}, {"b", "c"}),
        ({"ATN_NORMS_DISABLE_PLUGINS": ""}, {"a", "b", "c"}),
        ({"ATN_NORMS_LOAD_PLUGINS": ""}, set()),
        ({"ATN_NORMS_LOAD_PLUGINS": "a, c"}, {"a", "c"}),
        ({"ATN_NORMS_LOAD_PLUGINS": "a,c", "ATN_NORMS_DISABLE_PLUGINS": "a"}, {"c"}),
    ],
)
def test_environment_variables_block_and_block_before_import(site, monkeypatch, variables, loaded):
    for name in "abc":
        site.install(name, NORMALIZER.replace("KIND", name))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    registry, records = site.load()
    assert {name for name in "abc" if records[name].status == "loaded"} == loaded
    assert {name for name in "abc" if name in registry.kinds("normalizer")} == loaded
    assert {name for name in "abc" if f"plugin_{name}" in sys.modules} == loaded
    for name in set("abc") - loaded:
        assert records[name].status == "blocked"
        assert "ATN_NORMS_" in records[name].reason


def test_the_built_in_kinds_cannot_be_blocked(site, monkeypatch, caplog):
    monkeypatch.setenv(plugins.DISABLE, "built-in")
    registry, records = site.load()
    assert_only_built_in(registry)
    assert "the kinds of atn-norms itself cannot be blocked" in records["built-in"].reason
    monkeypatch.delenv(plugins.DISABLE)
    monkeypatch.setenv(plugins.LOAD, "built-in")
    _, records = site.load()
    assert [(name, record.status) for name, record in records.items()] == [("built-in", "loaded")]


@pytest.mark.parametrize("variable", [plugins.DISABLE, plugins.LOAD])
def test_a_misspelt_name_in_the_environment_is_reported(site, monkeypatch, variable, caplog):
    site.install("pmean", NORMALIZER.replace("KIND", "pmean"))
    monkeypatch.setenv(variable, "pmaen")
    with caplog.at_level(logging.WARNING):
        _, records = site.load()
    assert records["pmaen"].status == "failed"
    wanted = f"named in {variable}, but no plugin of this name is installed; did you mean 'pmean'?"
    assert records["pmaen"].reason == wanted
    assert any(wanted in message for message in caplog.messages)


def test_a_third_party_normalizer_works_everywhere(site):
    """In a new interpreter, through the global registry: cells, windows, spec, schema, dump and report."""
    site.install("pmean", NORMALIZER.replace("KIND", "pmean"))
    site.install("bad", "1 / 0")
    code = """
    import json, torch, atn_norms as an
    from atn_norms import plugins, specs
    for cell in ("lstm", "gru", "rnn"):
        for window in (1, 3, {"kind": "cumulative"}, {"kind": "exponential", "half_life": 2.0}):
            norm = {"kind": "pmean", "p": 3.0}
            layer = an.build({"cell": cell, "input_size": 2, "hidden_size": 3, "norm": norm, "window": window})
            y, _ = layer.unroll(torch.randn(4, 2, 2))
            y.sum().backward()
            assert y.isfinite().all()
            again = an.LayerSpec.model_validate_json(layer.spec.model_dump_json())
            assert again == layer.spec and '"p":3.0' in again.model_dump_json()
    assert "pmean" in json.dumps(specs.schema(an.LayerSpec))
    print({record.name: record.status for record in plugins.report()})
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site.folder), str(Path(__file__).parents[2])])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.replace("'", '"')) == {"built-in": "loaded", "pmean": "loaded", "bad": "failed"}
    assert "plugin 'bad' of dist-bad 1.0 failed and is left out: ZeroDivisionError" in done.stderr


def test_the_hook_matches_the_documentation():
    import inspect

    hooks = {name: inspect.signature(hook) for name, hook in vars(plugins.Hooks).items() if name.startswith("atn_")}
    assert [str(name) for name in hooks] == ["atn_norms_register"]
    assert list(hooks["atn_norms_register"].parameters) == ["self", "registry"]


HAS = """
import datetime, enum, pathlib
from typing import Any, Literal, Optional
from pydantic import BeforeValidator, Field, PlainSerializer
from typing_extensions import Annotated
from atn_norms.normalizers import NormSpec, RMSNorm
from atn_norms.plugins import hookimpl

class Mode(enum.Enum):
    A = "a"

class StrMode(str, enum.Enum):
    A = "a"

class OddSpec(NormSpec):
    kind: Literal["odd"] = "odd"
    OPTION

    def build(self, features):
        return RMSNorm(features)

@hookimpl
def atn_norms_register(registry):
    registry.normalizer(OddSpec)
"""

UNSTORABLE = {
    "mode: Mode = Mode.A": "mode: got an Enum",
    "mode: StrMode = StrMode.A": "mode: got an Enum",
    "mode: Optional[Mode] = None": "mode: got an Enum",
    "mode: Literal[Mode.A] = Mode.A": "mode: got the literal <Mode.A",
    "mask: pathlib.Path": "mask: got an instance of a Python class",
    "day: datetime.date = datetime.date(2026, 1, 2)": "day: got a date",
    "days: tuple[datetime.datetime, ...] = ()": "days: got a datetime",
    "ages: frozenset[int] = frozenset()": "ages: got a frozenset",
    "ages: dict[int, float] = {}": "ages: got a mapping with keys of type int",
    "ages: dict[str, set[int]] = {}": "ages: got a set",
    "data: bytes = b''": "data: got a bytes",
    "p: float = Field(2.0, alias='power')": "p: got an alias",
    "p: float = Field(2.0, exclude=True)": "p: got a field excluded from dumps",
    "p: Any = (1, 2)": "p: got [1, 2] after JSON; expected (1, 2)",
    "p: Any = complex(1)": "p: got '1+0j' after JSON; expected (1+0j)",
    "p: float = 'x'": "p: got 'x'; expected a number",
}


@pytest.mark.parametrize("option", UNSTORABLE)
def test_options_that_a_study_cannot_store_are_rejected_when_the_plugin_loads(option, site):
    site.install("odd", HAS.replace("OPTION", option))
    _, records = site.load()
    reason = records["odd"].reason
    assert f"a study cannot store the options of normalizer:odd: {UNSTORABLE[option]}" in reason
    assert records["odd"].status == "failed"


STORABLE = [
    "mode: Literal['a', 1, None] = 'a'",
    "mode: Annotated[Mode, BeforeValidator(lambda m: Mode(m)), PlainSerializer(lambda m: m.value)] = Mode.A",
    "sizes: tuple[tuple[int, ...], ...] = ((1,),)",
    "named: dict[str, list[float]] = {'a': [1.0]}",
    "inner: Optional[NormSpec] = None",
    "p: float = Field(ge=1)",
]


@pytest.mark.parametrize("option", STORABLE)
def test_options_that_a_study_can_store_load(option, site):
    site.install("odd", HAS.replace("OPTION", option))
    _, records = site.load()
    assert (records["odd"].status, records["odd"].reason) == ("loaded", "")
