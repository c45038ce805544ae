"""Cases that the Triton backend does not support, their reasons, and that `auto` never imports Triton."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import atn_norms as an
from atn_norms.backends import choose
from atn_norms.backends.triton import available
from tests.native.test_unsupported import ForeignSpec, LatelySpec
from tests.triton.strategies import DEVICE, needs_triton

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "batch norm": (
        lambda: an.LSTM(2, 3, norm="batch", device=DEVICE),
        "it has no kernel for norms over the rows of a batch",
    ),
    "gate by gate": (
        lambda: an.LSTM(2, 3, norm="layer", placement={"gates": "per_gate"}, device=DEVICE),
        "it has no kernel for a norm of groups, and the one at ih has 4",
    ),
    "half precision": (
        lambda: an.GRU(2, 3, norm="layer", dtype=torch.bfloat16, device=DEVICE),
        "it runs float32 and float64, and the layer is torch.bfloat16",
    ),
    "a window of another class": (
        lambda: an.GRU(2, 3, norm="layer", window=LatelySpec(), device=DEVICE),
        "it has no kernel for the window Lately(steps=3) at ih",
    ),
    "a detached window": (
        lambda: an.GRU(2, 3, norm="layer", window={"sites": {"hh": an.Detached(an.Sliding(3))}}, device=DEVICE),
        "it has no kernel for detached windows, and there is one at hh",
    ),
    "a normalizer that declares nothing": (
        lambda: an.GRU(2, 3, norm=ForeignSpec(), device=DEVICE),
        "the norm at ih (Foreign): median has no native instruction (test_unsupported.py, line 35: "
        "return an.Average(x.double().median(-1, keepdim=True).values))",
    ),
    "joint sum": (
        lambda: an.LSTM(2, 3, norm="layer", placement={"sum": "joint"}, device=DEVICE),
        "it runs the default placement only, and the cell is lstm-joint",
    ),
    "no norm": (lambda: an.RNN(2, 3, device=DEVICE), "it runs normed cells only"),
    "another device": (
        lambda: an.LSTM(2, 3, norm="layer", device="meta"),
        "it runs on a GPU, and the layer is on meta",
    ),
}


def refused(layer: Any) -> str:
    """Check that every entry point gives the same reason."""
    with pytest.raises(ValueError, match="'triton' cannot run this layer") as caught:
        choose("triton", layer.cell, layer.cell_weights("_l0"))
    reason = str(caught.value).removeprefix("backend: 'triton' cannot run this layer: ")
    assert f"  triton: unsupported: {reason}" in an.explain(layer).splitlines()
    return reason


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_case_has_a_reason(case):
    make, sentence = REFUSED[case]
    assert refused(make()) == sentence


def test_a_layer_on_the_cpu_is_rejected_when_it_is_made(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' cannot run this layer: it runs on a GPU, and the layer is on cpu"):
        an.LSTM(2, 3, norm="layer", backend="triton")
    layer = an.LSTM(2, 3, norm="layer")
    assert refused(layer) == "it runs on a GPU, and the layer is on cpu"
    for value in ("0", "", "false"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert refused(layer) == "it runs on a GPU, and the layer is on cpu"


@pytest.fixture
def fresh_lookup():
    """Detect Triton for this test only."""
    available._unavailable.cache_clear()
    yield
    available._unavailable.cache_clear()


@pytest.mark.usefixtures("fresh_lookup")
def test_without_triton(monkeypatch):
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    layer = an.LSTM(2, 3, norm="layer", device=DEVICE)
    assert refused(layer) == "Triton is not installed (torch's builds for CUDA bring it along)"


@pytest.mark.usefixtures("fresh_lookup")
@pytest.mark.parametrize("found", ["3.5.1", "2.3.1", "3.6.0.dev20251001"])
def test_with_a_triton_too_old(monkeypatch, found):
    monkeypatch.setattr(available, "find_spec", lambda name: object())
    monkeypatch.setattr(available, "version", lambda name: found)
    layer = an.LSTM(2, 3, norm="layer", device=DEVICE)
    assert refused(layer) == f"Triton {found} is installed, and it needs 3.6 or newer"


@pytest.mark.usefixtures("fresh_lookup")
@pytest.mark.parametrize("found", ["3.6.0", "3.10.0", "4.0+git1", None])
def test_with_a_triton_new_enough(monkeypatch, found):
    def version(name):
        if found is None:  # built in place, without metadata
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(available, "find_spec", lambda name: object())
    monkeypatch.setattr(available, "version", version)
    layer = an.LSTM(2, 3, norm="layer", device=DEVICE)
    assert choose("triton", layer.cell, layer.cell_weights("_l0")).name == "triton"


@needs_triton
def test_auto_never_takes_it():
    for make, norm in ((an.LSTM, "layer"), (an.GRU, "rms"), (an.RNN, "layer")):
        layer = make(2, 3, norm=norm, device=DEVICE)
        assert choose("triton", layer.cell, layer.cell_weights("_l0")).name == "triton"
        assert choose("auto", layer.cell, layer.cell_weights("_l0")).name in ("native", "reference")
        assert "  triton: supported" in an.explain(layer).splitlines()
        chosen = make(2, 3, norm=norm, device=DEVICE, backend="triton")
        assert "cell _l0: backend 'triton'" in an.explain(chosen).splitlines()


def alone(script: str) -> None:
    """Run in a fresh process, without the interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.environ.pop('TRITON_INTERPRET', None)\n" + script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PLAIN = """
import sys, torch
import atn_norms as an
layer = an.LSTM(2, 3, norm="layer")
layer(torch.zeros(4, 2, 2))[0].sum().backward()
assert "triton: unsupported: it runs on a GPU, and the layer is on cpu" in an.explain(layer)
"""


WATCHED = """
import builtins
importers, imported = set(), builtins.__import__

def watching(name, names=None, *rest):
    if name.partition(".")[0] == "triton":
        importers.add((names or {}).get("__name__"))
    return imported(name, names, *rest)

builtins.__import__ = watching
"""


def test_triton_is_imported_only_by_its_backend():
    """torch's compiler imports Triton too, for its own use."""
    none = "assert not [name for name in importers if name.startswith('atn_norms')], importers\n"
    alone(WATCHED + PLAIN + none + "assert 'atn_norms.backends.triton.call' not in sys.modules")


def test_everything_else_works_where_triton_does_not():
    """A package that is installed, and raises when it is imported."""
    alone("import sys; sys.modules['triton'] = None\n" + PLAIN)
