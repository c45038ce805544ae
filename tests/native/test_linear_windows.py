"""Windows of plugins whose weights depend on the statistics run on the reference, whatever the numbers of the test."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import atn_norms as an
from atn_norms.backends.fused.plugin_windows import recognized, unrecognized_reason
from atn_norms.pytree import expand_mask, where_mask
from tests.native.strategies import needs_kernels

pytestmark = needs_kernels


@dataclass(frozen=True)
class Changed(an.Window[Any]):
    """A cumulative window whose statistic, weight or result `change` replaces in one place."""

    place: Literal["now", "weight", "pooled", "initial"]
    change: Callable[..., Any]

    def initial(self, now: Any) -> Any:
        state = an.Cumulative().initial(now)
        return self.change(now, state) if self.place == "initial" else state

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        if self.place == "now":
            now = self.change(now)
        if self.place == "weight":
            weight = self.change(now, weight)
        pooled, state = an.Cumulative().push(now, weight, state)
        return (self.change(pooled) if self.place == "pooled" else pooled), state


class ChangedSpec(an.WindowSpec):
    """Options of a window for a layer."""

    kind: Literal["changed-in-a-test"] = "changed-in-a-test"
    window: Any

    def build(self) -> Any:
        return self.window


def each(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda now: type(now)(*map(function, now))


def without_large_steps(now: Any, weight: Tensor) -> Tensor:
    return torch.where(now[0].abs().flatten(1).amax(1) < 1e4, weight, 0.0)


def with_least_variance(pooled: Any) -> Any:
    return pooled._replace(var=pooled.var.clamp(min=1e-8)) if hasattr(pooled, "var") else pooled


def unless_large(now: Any, weight: Tensor) -> Tensor:
    return weight * 0.5 if float(now[0].detach().abs().max()) > 1e9 else weight


def unless_large_in_numpy(now: Any, weight: Tensor) -> Tensor:
    return weight * 0.5 if now[0].detach().numpy().max() > 1e9 else weight


def unless_many(now: Any, weight: Tensor) -> Tensor:
    return weight * 0.5 if len(weight) == int((weight > 5).sum()) else weight


def unless_equal(now: Any, weight: Tensor) -> Tensor:
    return weight * 0.5 if torch.equal(now[0], torch.full_like(now[0], 7.0)) else weight


def by_selected(now: Any, weight: Tensor) -> Tensor:
    return weight if len(weight[weight > 5]) == 0 else weight * 0.5


def by_written_weight(now: Any, weight: Tensor) -> Tensor:
    factor = torch.ones_like(weight)
    factor[:] += 1e-20 * now[0].flatten(1).sum(1)
    return weight * factor


def with_clipped_gradient(leaf: Tensor) -> Tensor:
    leaf = leaf * 1.0
    if leaf.requires_grad:
        leaf.register_hook(lambda gradient: gradient.clamp(-1e9, 1e9))
    return leaf


REFUSED: dict[str, tuple[Any, str]] = {
    "weight of 0 for large steps": (Changed("weight", without_large_steps), "abs is not linear in the statistic"),
    "least variance": (Changed("pooled", with_least_variance), "clamp is not linear in the statistic"),
    "largest statistic": (Changed("now", each(lambda leaf: leaf.clamp(max=1e9))), "clamp is not linear"),
    "number read": (Changed("weight", unless_large), "abs is not linear"),
    "number read in numpy": (Changed("weight", unless_large_in_numpy), "a number is read out of a tensor"),
    "number of a weight": (Changed("weight", unless_many), "a number is read out of a tensor"),
    "comparison": (Changed("weight", unless_equal), "a number is read out of a tensor"),
    "shape": (Changed("weight", by_selected), "index returns a shape that depends on numbers"),
    "weight written in place": (Changed("weight", by_written_weight), "gt is not linear in the statistic"),
    "product": (Changed("now", each(lambda leaf: leaf * (1 + 1e-20 * leaf))), "mul is not linear in the statistic"),
    "quotient": (Changed("now", each(lambda leaf: leaf + 1e-20 / (1 + leaf))), "reciprocal is not linear"),
    "whole numbers": (Changed("now", each(lambda leaf: leaf + 1e-20 * leaf.long())), "_to_copy is not linear"),
    "gradient": (Changed("now", each(with_clipped_gradient)), "clamp is not linear in the statistic"),
    "gradient of the result": (Changed("pooled", each(with_clipped_gradient)), "clamp is not linear in the statistic"),
    "first step": (
        Changed("initial", lambda now, state: (state[0], tuple(0 * leaf for leaf in now))),
        "a weight depends",
    ),
    "noise": (Changed("now", each(lambda leaf: leaf + 1e-20 * torch.randn(leaf.shape))), "randn is random"),
    "constant": (Changed("pooled", each(lambda leaf: leaf + 1e-30)), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_window_that_depends_on_the_statistics_runs_on_the_reference(name):
    window, reason = REFUSED[name]
    assert recognized(Changed("now", each(lambda leaf: 1.0 * leaf))) is not None
    assert recognized(window) is None
    assert reason in unrecognized_reason(window)


def test_explain_names_the_operation_and_its_line():
    layer = an.GRU(3, 4, norm="rms", window=ChangedSpec(window=REFUSED["weight of 0 for large steps"][0]))
    text = an.explain(layer)
    assert "backend 'reference'" in text
    assert "abs is not linear in the statistic (test_linear_windows.py, line " in text
    assert "torch.where(now[0].abs().flatten(1).amax(1) < 1e4, weight, 0.0))" in text


@pytest.mark.parametrize(("name", "scale"), [("weight of 0 for large steps", 1e6), ("least variance", 1e-5)])
def test_layers_agree_where_the_condition_holds(name, scale):
    layer = an.GRU(3, 4, norm="layer", window=ChangedSpec(window=REFUSED[name][0]), dtype=torch.float64, bias=False)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    x[4] *= scale
    assert torch.equal(layer(x)[0], an.with_backend(layer, "reference")(x)[0])


@dataclass(frozen=True)
class Written(an.Window[Any]):
    """A sliding window of three steps that writes into new tensors, and merges by a product of matrices."""

    by: str

    def initial(self, now: Any) -> Any:
        return an.Sliding(3).initial(now)

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        weights = weight.new_zeros(len(weight), 3)
        weights[:, :2], weights[:, 2] = state[0], weight
        leaves = []
        for old, new in zip(state[1], now, strict=True):
            leaf = torch.zeros_like(torch.cat([old, old, new.unsqueeze(1)], 1)[:, :3])
            leaf[:, :2], leaf[:, 2] = old, new
            leaves.append(leaf)
        if self.by == "pool" or len(leaves) > 1:
            pooled = type(now)(*leaves).pool(weights, 1)
        else:
            shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-300)
            pooled = type(now)(torch.einsum("nk,nkd->nd", shares, leaves[0]))
        order = torch.tensor([1, 2])
        after = weights[:, order], tuple(leaf.index_select(1, order) for leaf in leaves)
        return pooled, where_mask(weight > 0, after, state)

    def weight_at(self, age: Tensor) -> Tensor:
        return (age < 3).to(age.dtype)


@dataclass(frozen=True)
class Shifted(an.Window[Any]):
    """A running window with a blend in place of a merge, for averages; constants are read in Python."""

    def initial(self, now: Any) -> Any:
        return an.Cumulative().initial(now)

    def push(self, now: Any, weight: Tensor, state: Any) -> Any:
        decay = float(torch.tensor(0.5)) * torch.tensor([2.0]).tolist()[0] / 2
        total = state[0] * decay + weight
        if len(now) > 1:
            both = type(now)(*(torch.stack(pair, 1) for pair in zip(state[1], now, strict=True)))
            pooled = both.pool(torch.stack([state[0] * decay, weight], 1), 1)
        else:
            share = weight / torch.where(total > 0, total, 1.0)
            pooled = type(now)(state[1][0].lerp(now[0], expand_mask(share, now[0])))
        return pooled, where_mask(weight > 0, (total, tuple(pooled)), state)


@pytest.mark.parametrize("window", [Written("pool"), Written("product"), Shifted()])
def test_linear_code_runs_on_the_kernels(window):
    assert unrecognized_reason(window) == ""
    assert recognized(window) is not None


def test_the_triangular_window_of_the_page_runs_on_other_devices():
    page = (Path(__file__).parents[2] / "docs" / "windows.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"an": an, "torch": torch, "__name__": __name__}
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    for block in blocks:
        if "class Block" in block or "class Triangular" in block:
            exec(block, names)
    now, weight = an.Average(torch.zeros(2, 1, device="meta")), torch.ones(2, device="meta")
    window = names["Triangular"](3)
    pooled, _ = window.push(now, weight, window.initial(now))
    assert pooled.mean.is_meta
