"""Memory safety: no declaration, operator argument or setting from Python reaches the kernels unchecked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import atn_norms as an
from atn_norms.backends.fused.inputs import Grads, Inputs
from atn_norms.backends.fused.plan import Plan, SitePlan
from atn_norms.backends.native.call import Kernels
from atn_norms.normalizers import BatchMoments, FeatureMoments
from tests.native.strategies import Pair, needs_kernels
from tests.native.test_operators import Recorded

pytestmark = needs_kernels
HIDDEN = 3
ROOT = Path(__file__).parents[2]
DECLARATIONS: dict[str, tuple[Any, str]] = {
    "no groups": (lambda d, own: FeatureMoments(0, True, 1e-5, own, own), "FeatureMoments.groups: got 0"),
    "groups of a fraction": (lambda d, own: FeatureMoments(1.5, True, 1e-5, own, own), "FeatureMoments.groups: got"),  # type: ignore[arg-type]
    "groups that do not divide": (
        lambda d, own: FeatureMoments(5, True, 1e-5, own, own),
        f"FeatureMoments.groups: got 5; expected a divisor of {4 * HIDDEN}",
    ),
    "another leaf": (
        lambda d, own: FeatureMoments(2, True, 1e-5, own, own, (1,)),
        "FeatureMoments.shape: got [1]; expected 2 elements",
    ),
    "a short gain": (
        lambda d, own: FeatureMoments(1, True, 1e-5, own[:-1], own),
        f"FeatureMoments.gain: got shape [{4 * HIDDEN - 1}]; expected [{4 * HIDDEN}]",
    ),
    "no number": (lambda d, own: FeatureMoments(1, True, float("nan"), own, own), "FeatureMoments.eps: got nan"),
    "a short shift of a batch": (
        lambda d, own: BatchMoments(1e-5, own, own[:2], True, False),
        f"BatchMoments.shift: got shape [2]; expected [{4 * HIDDEN}]",
    ),
    "another leaf of a batch": (
        lambda d, own: BatchMoments(1e-5, own, own, True, False, (2,)),
        f"BatchMoments.shape: got [2]; expected {4 * HIDDEN} elements",
    ),
}


class Wrong(an.LayerNorm):
    """A normalizer with a declaration that does not fit its features."""

    def __init__(self, features: int, name: str) -> None:
        super().__init__(features)
        self.name = name

    def feature_moments(self) -> Any:
        moments = DECLARATIONS[self.name][0](self.features, self.weight)
        return moments if isinstance(moments, FeatureMoments) else None

    def batch_moments(self) -> Any:
        moments = DECLARATIONS[self.name][0](self.features, self.weight)
        return moments if isinstance(moments, BatchMoments) else None


class WrongSpec(an.NormSpec):
    kind: Literal["wrong"] = "wrong"
    name: str

    def build(self, features: int) -> an.Normalizer:
        return Wrong(features, self.name)


@pytest.mark.parametrize("name", DECLARATIONS)
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_wrong_declaration_is_an_error(name: str, backend: Literal["auto", "native"]) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(DECLARATIONS[name][1])):
        layer = an.LSTM(2, HIDDEN, norm={"sites": {"ih": WrongSpec(name=name)}}, backend=backend)
        layer(torch.zeros(4, 3, 2))[0].sum().backward()


PLANS: dict[str, dict[str, Any]] = {
    "groups that do not divide": {"groups": 2, "leaf": (2,)},
    "more groups than lanes": {"features": 144, "groups": 72, "leaf": (72,)},
    "no groups": {"groups": 0, "leaf": (0,)},
    "negative groups": {"groups": -1},
    "another leaf": {"leaf": (3,)},
    "other features": {"features": 12},
    "a negative window": {"steps": -3},
    "a decay above 1": {"steps": 0, "decay": 7.0},
    "no eps": {"eps": ()},
    "eps of another kind": {"eps": (float("nan"),)},
    "eps that do not divide": {"groups": 3, "leaf": (3,), "eps": (1e-5, 1e-5)},
    "an unknown norm": {"coupled": 9},
    "groups that are no gates": {"groups": 3, "leaf": (3,), "coupled": 1},
    "an unknown site": {"site": "elsewhere"},
}


def operands(hidden: int = HIDDEN, steps: int = 4, batch: int = 2) -> list[Any]:
    """Arguments of the operator for a tanh cell with one layer norm at `ih`, from `xs` to `lengths`."""
    affine = [torch.ones(hidden), torch.zeros(hidden)]
    single = [torch.randn(steps, batch, 2), torch.randn(hidden, 2), torch.randn(hidden, hidden), None, None]
    return [*single, torch.zeros(batch, hidden), torch.zeros(0), None, affine, [], [], None]


def site(**changes: Any) -> SitePlan:
    options = {
        "site": "ih", "features": HIDDEN, "groups": 1, "centred": True, "eps": (1e-5,), "steps": 2, "decay": 1.0,
        "gain": True, "shift": True, "leaf": (1,),
    }  # fmt: skip
    return SitePlan(**(options | changes))


@pytest.mark.parametrize("name", PLANS)
def test_a_raw_operator_checks_its_plan(name: str) -> None:
    text = Plan("rnn_tanh", (site(**PLANS[name]),)).encode()
    with pytest.raises((RuntimeError, ValueError), match="plan"):
        torch.ops.atn_norms.recurrent(*operands(), text, True)


@pytest.mark.parametrize("sites", [("ih", "ih"), ("c",), ("hh", "ih")])
def test_a_raw_operator_checks_the_sites_of_its_plan(sites: tuple[str, ...]) -> None:
    arguments = operands()
    arguments[8] = arguments[8] * len(sites)
    text = Plan("rnn_tanh", tuple(site(site=name) for name in sites)).encode()
    with pytest.raises((RuntimeError, ValueError), match="plan"):
        torch.ops.atn_norms.recurrent(*arguments, text, True)


@pytest.mark.parametrize("text", ["", "lstm-other", "nonsense; ih 1", "tree; " + site().encode(), "rnn_tanh; ih x y"])
def test_a_raw_operator_checks_the_text_of_its_plan(text: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match="plan"):
        torch.ops.atn_norms.recurrent(*operands(), text, False)


@pytest.mark.parametrize("lengths", [[5, 0], [-1, 2], [2**62, 1]])
def test_a_raw_operator_checks_its_lengths(lengths: list[int]) -> None:
    arguments = [*operands()[:-1], torch.tensor(lengths)]
    with pytest.raises(RuntimeError, match="lengths"):
        torch.ops.atn_norms.recurrent(*arguments, Plan("rnn_tanh", (site(),)).encode(), False)
    assert Kernels().fit(Plan("rnn_tanh", (site(),)), Inputs(*arguments)) is None  # it bypasses the dispatcher


def recorded_backward(cell: str = "lstm") -> list[Any]:
    """Arguments of the backward operator, as autograd passes them."""
    pair = Pair(cell, "layer", "4", inputs=66, ragged=True, before=2)
    with Recorded() as recorded:
        ys, _ = pair.layer("native").unroll(pair.xs(), pair.state(), pair.lengths())
        ys.square().sum().backward()
    return list(recorded.calls[1][1])


PLACES = {"dys": 0, "dhn": 1, "dcn": 2, "weight_hh": 6, "h0": 9, "ys": 16}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("change", ["short", "dtype", "meta"])
def test_a_raw_backward_checks_its_tensors(name: str, change: str) -> None:
    arguments = recorded_backward()
    changes = {"short": lambda x: x[:1, :1], "dtype": torch.Tensor.float, "meta": lambda x: x.to("meta")}
    arguments[PLACES[name]] = changes[change](arguments[PLACES[name]])
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        grads, inputs, ys, kept = Grads(*arguments[:4]), Inputs.of(arguments[4:16]), arguments[16], arguments[17]
        Kernels().check_backward(Plan.decode(arguments[18]), inputs, grads, ys, kept)


@pytest.mark.parametrize("place", [0, 1, 2, 4])  # 3 is empty without a projection
def test_a_raw_backward_checks_the_saved_tensors(place: int) -> None:
    arguments = recorded_backward()
    kept = list(arguments[17])
    kept[place] = kept[place][:0]
    with pytest.raises(RuntimeError, match="kept"):
        torch.ops.atn_norms.recurrent_backward(*arguments[:17], kept, *arguments[18:])


def test_a_raw_backward_checks_gradients_of_states() -> None:
    arguments = recorded_backward()
    for dstates in (arguments[3][:-1], [torch.zeros(1)] * len(arguments[3])):
        with pytest.raises(RuntimeError, match="gradient"):
            torch.ops.atn_norms.recurrent_backward(*arguments[:3], dstates, *arguments[4:])


@pytest.mark.parametrize("parameter", ["norm_ih_l0.weight", "weight_hh_l0"])
def test_a_parameter_on_the_meta_device_is_an_error(parameter: str) -> None:
    layer = an.LSTM(2, HIDDEN, norm="layer", window=3)
    owner, _, name = parameter.rpartition(".")
    module = layer.get_submodule(owner)
    setattr(module, name, torch.nn.Parameter(getattr(module, name).to("meta")))
    with pytest.raises((RuntimeError, NotImplementedError)):
        layer(torch.zeros(4, 3, 2))[0].sum().backward()


def test_a_huge_number_of_threads_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = an.LSTM(4, 32, norm="layer", window=3), torch.randn(5, 64, 4)
    expected = layer(x)[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)
    y = layer(x)[0]
    y.sum().backward()
    assert torch.equal(y, expected)


def fuzzed(operator: str, count: int, **environment: str) -> str:
    """Call a raw operator with damaged arguments in another process, and return what it prints."""
    command = [sys.executable, "-m", "tests.native.fuzz", operator, "1", str(count)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode} after {done.stdout[-400:]} {done.stderr[-400:]}"
    return done.stdout


@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=pytest.mark.deep)])
@pytest.mark.parametrize("operator", ["recurrent", "recurrent_backward"])
def test_damaged_arguments_of_a_raw_operator_raise(operator: str, count: int) -> None:
    accepted = int(fuzzed(operator, count).split()[-3])
    assert 0 < accepted < count / 2
