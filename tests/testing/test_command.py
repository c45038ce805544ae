"""`atn-norms check`: a table of every law, JSON, and an exit code."""

import json
import re
from typing import Literal

import pytest

from atn_norms.cli import main
from atn_norms.registry import Source, registry
from atn_norms.testing import LAWS
from atn_norms.windows import Sliding, SlidingSpec
from tests.testing.gallery.options import PowerSpec
from tests.testing.gallery.windows import ForgetsAStepLate


class LateSpec(SlidingSpec):
    """A registered window that is wrong."""

    kind: Literal["late"] = "late"  # type: ignore[assignment]

    def build(self) -> Sliding:
        return ForgetsAStepLate()  # type: ignore[return-value]


class LayerWindowSpec(SlidingSpec):
    """A window with the kind of a normalizer."""

    kind: Literal["layer"] = "layer"  # type: ignore[assignment]
    steps: int = 2


class PowerByName(PowerSpec):
    """A registered normalizer with an option."""

    kind: Literal["power"] = "power"  # type: ignore[assignment]


class Enough(Exception):
    """Roll back the registrations."""


@pytest.fixture
def more_kinds():
    registry.load()
    with pytest.raises(Enough), registry.transaction(Source("tests", "tests", "")):
        registry.window(LateSpec)
        registry.window(LayerWindowSpec)
        registry.normalizer(PowerByName)
        yield
        raise Enough


def test_every_law_has_a_line_and_a_right_kind_exits_with_0(capsys):
    assert main(["check", "cumulative"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("window 'cumulative': 20 laws\n")
    for law in LAWS.values():
        if {"window", "layer"} & set(law.applies_to):
            assert f"\n{law.name} " in output
    assert "skipped  weight_at declares a window that never forgets" in output
    assert output.endswith("18 passed, 2 skipped\n")


def test_a_failure_shows_the_example_and_exits_with_1(capsys, more_kinds):
    assert main(["check", "late", "--set", "steps=3"]) == 1
    output = capsys.readouterr().out
    assert "steps_count_as_declared" in output
    assert re.search(r"smallest example: seed=\d+, steps=\d, batch=\d, statistic=\w+\n", output)
    assert "\nThe page docs/when-a-law-fails.md lists the usual causes of each failure.\n" in output
    assert " failed" in output.splitlines()[-1]


def test_json_holds_the_same(capsys, more_kinds):
    assert main(["check", "power", "--set", "p=3.0", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["family"], output["kind"], output["options"]) == ("normalizer", "power", {"kind": "power", "p": 3.0})
    statuses = {each["law"]: each["status"] for each in output["results"]}
    assert statuses["the_registry_builds_the_same"] == "passed"
    assert set(output["results"][0]) == {"law", "group", "status", "message", "example"}


def test_backends_are_kinds_too(capsys):
    assert main(["check", "reference"]) == 0
    assert capsys.readouterr().out.startswith("backend 'reference': ")


def test_a_kind_of_two_families_needs_the_family(capsys, more_kinds):
    assert main(["check", "layer"]) == 2
    assert (
        "--family: got the kind 'layer' of several families; expected one of normalizer, window"
        in capsys.readouterr().err
    )
    assert main(["check", "layer", "--family", "window", "--set", "steps=0"]) == 1
    output = capsys.readouterr().out
    count = sum(bool({"window", "layer"} & set(law.applies_to)) for law in LAWS.values())
    assert output.startswith(f"window 'layer': {count} laws\n")
    assert "build() raises ValueError: steps: got 0; expected an integer of at least 1" in output
    assert output.endswith(f"1 failed, {count - 1} skipped\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["laier"], "got unknown kind 'laier'; expected one of adding, batch, "),
        (["laier"], "did you mean 'layer'? Install the package that has the kind, such as pip install -e FOLDER."),
        (["lstm", "--family", "window"], "got unknown window 'lstm'; expected one of cumulative, "),
        (
            ["lstm", "--family", "windows"],
            "--family: got unknown family 'windows'; expected one of normalizer, window, ",
        ),
        (["layer", "--set", "ep=1"], "ep: got an unknown key; expected one of kind, eps; did you mean 'eps'?"),
        (["layer", "--set", "eps=-1"], "eps: got -1; expected at least 0"),
        (["layer", "--set", "eps"], "--set eps: got no OPTION=VALUE; expected OPTION=VALUE, such as eps=1e-3"),
        (["sliding"], "steps: got nothing; expected an integer >= 1"),
        (["native", "--set", "threads=2"], "--set threads=2: got an option of a backend; expected no options"),
    ],
)
def test_bad_input_is_a_sentence(words, message, capsys):
    assert main(["check", *words]) == 2
    assert message in capsys.readouterr().err
