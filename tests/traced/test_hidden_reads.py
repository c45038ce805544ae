"""Normalizers that read or change what no recorded operation shows have no program."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.dlpack import to_dlpack

import atn_norms as an
from atn_norms.backends.traced.cache import traced_norm
from atn_norms.statistics import promoted
from tests.compare import compare
from tests.native.strategies import needs_kernels

pytestmark = needs_kernels

READ, SET, GRAPH = "a number is read out of a tensor", "the attribute 'data' of a tensor is set", "reads grad_fn in "


def _positive(values: Any) -> bool:
    return bool((values > 0).all())


def _counted(self: Any, y: Any, mean: Any) -> Any:
    self.seen.numpy()[...] += 1
    return y


def _replaced(self: Any, y: Any, mean: Any) -> Any:
    self.seen.data = mean.reshape(-1)[:1]
    return y


def _counted_in_a_list(self: Any, y: Any, mean: Any) -> Any:
    torch._foreach_add_([self.seen], 1.0)
    return y


def _written(self: Any, y: Any, mean: Any) -> Any:
    torch.mean(mean, dim=(0, 1), out=self.seen[0])
    return y


def _applied(self: Any, y: Any, mean: Any) -> Any:
    mean.clone().apply_(lambda value: value)
    return y


class Hidden(an.Normalizer):
    """Divide by the mean magnitude; the sign of the result depends on a property of the statistic."""

    # name: what follows the division, and a part of the reason why there is no program
    WAYS: ClassVar[dict[str, tuple[Callable[..., Any], str]]] = {
        "numpy": (lambda self, y, mean: y if _positive(mean.numpy()) else -y, READ),
        "asarray": (lambda self, y, mean: y if _positive(np.asarray(mean)) else -y, READ),
        "array": (lambda self, y, mean: y if _positive(mean.__array__()) else -y, READ),
        "dlpack": (lambda self, y, mean: y if _positive(np.from_dlpack(mean)) else -y, READ),
        "capsule": (lambda self, y, mean: to_dlpack(mean) and y, "it uses to_dlpack in "),
        "pointer": (lambda self, y, mean: y if mean.data_ptr() else -y, READ),
        "storage": (lambda self, y, mean: y if mean.untyped_storage().data_ptr() else -y, READ),
        "repr": (lambda self, y, mean: y if "-" not in repr(mean) else -y, READ),
        "format": (lambda self, y, mean: y if "-" not in f"{mean}" else -y, READ),
        "float": (lambda self, y, mean: y if float(mean.sum()) > 0 else -y, READ),
        "int": (lambda self, y, mean: y if int(mean.sum() + 1) > 0 else -y, READ),
        "bool": (lambda self, y, mean: y if mean.sum() > 0 else -y, READ),
        "apply": (_applied, READ),
        "a buffer in numpy": (_counted, READ),
        "a buffer in a list": (_counted_in_a_list, "_foreach_add_ writes to a list of tensors or to `out`"),
        "a buffer as out": (_written, "mean writes to a list of tensors or to `out`"),
        "a replaced buffer": (_replaced, SET),
        "grad_fn": (lambda self, y, mean: y if y.grad_fn is not None else -y, GRAPH),
        "grad_fn by name": (lambda self, y, mean: y if getattr(y, "grad_" + "fn") else -y, "attribute 'grad_fn'"),
        "retains_grad": (lambda self, y, mean: -y if y.retains_grad else y, "reads retains_grad in "),
        "is_leaf": (lambda self, y, mean: -y if y.is_leaf else y, "reads is_leaf in "),
        "version": (lambda self, y, mean: -y if mean._version else y, "the attribute '_version' of a tensor is read"),
        "grad": (lambda self, y, mean: y if self.gain.grad is None else -y, "the attribute 'grad' of a tensor is read"),
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(1))
        self.way = way

    def measure(self, x: Any) -> Any:
        return an.Average.of(promoted(x).abs())

    def normalize(self, x: Any, pooled: Any) -> Any:
        return self.WAYS[self.way][0](self, self.gain * x / (pooled.mean + 0.1), pooled.mean.detach())


class HiddenSpec(an.NormSpec):
    kind: Literal["hidden"] = "hidden"
    way: str

    def build(self, features: int) -> an.Normalizer:
        return Hidden(self.way)


@pytest.mark.parametrize("way", Hidden.WAYS)
def test_code_that_reads_a_tensor_outside_of_operations_has_no_program(way, monkeypatch):
    function, reason = Hidden.WAYS[way]
    monkeypatch.setattr(Hidden, "WAYS", {way: (function, reason)})  # the code of all functions is followed
    found = str(traced_norm(Hidden(way), 4))
    assert reason in found
    if reason is READ or reason is SET:
        assert "(test_hidden_reads.py, line " in found


def test_data_without_its_gradient_has_a_program(monkeypatch):
    monkeypatch.setattr(Hidden, "WAYS", {"data": (lambda self, y, mean: y * mean.data, "")})
    assert not isinstance(traced_norm(Hidden("data"), 4), str)


def test_a_branch_on_an_array_is_computed_in_every_call(monkeypatch):
    ways = {"array": (lambda self, y, mean: y if bool((np.asarray(mean) > 0.5).all()) else -y, READ)}
    monkeypatch.setattr(Hidden, "WAYS", ways)
    layer: Any = an.GRU(3, 4, norm=HiddenSpec(way="array"), dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    compare(layer(x)[0], an.with_backend(layer, "reference")(x)[0], tolerance=0.0)


class Shifted(an.Normalizer):
    """Add a constant that has the default type."""

    stateless = True

    def normalize(self, x: Any, pooled: Any) -> Any:
        return x + torch.tensor(0.3)


class ShiftedSpec(an.NormSpec):
    kind: Literal["shifted"] = "shifted"

    def build(self, features: int) -> an.Normalizer:
        return Shifted()


def test_a_changed_default_type_changes_the_next_call():
    layer: Any = an.GRU(3, 4, norm=ShiftedSpec(), dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    before = layer(x)[0]
    compare(before, an.with_backend(layer, "reference")(x)[0], tolerance=1e-14)
    torch.set_default_dtype(torch.float64)
    try:
        after = layer(x)[0]
        compare(after, an.with_backend(layer, "reference")(x)[0], tolerance=1e-14)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not torch.equal(before, after)
    assert torch.equal(layer(x)[0], before)


# -- global hooks of torch.nn


class Doubled(nn.Module):
    def forward(self, x: Any) -> Any:
        return 2 * x


class Nested(Shifted):
    """Call a module, for which global hooks run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Doubled()

    def normalize(self, x: Any, pooled: Any) -> Any:
        return self.inner(x)


class NestedSpec(an.NormSpec):
    kind: Literal["nested"] = "nested"

    def build(self, features: int) -> an.Normalizer:
        return Nested()


def _tripled(module: Any, inputs: Any, output: Any) -> Any:
    return 1.5 * output if isinstance(module, Doubled) else None


def _negated(module: Any, inputs: Any) -> Any:
    return (-inputs[0],) if isinstance(module, Doubled) else None


HOOKS = {
    "forward": (nn.modules.module.register_module_forward_hook, _tripled),
    "forward pre": (nn.modules.module.register_module_forward_pre_hook, _negated),
    "backward": (nn.modules.module.register_module_full_backward_hook, lambda *gradients: None),
    "backward pre": (nn.modules.module.register_module_full_backward_pre_hook, lambda *gradients: None),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_global_hook_runs_for_a_module_inside_a_normalizer(name):
    layer: Any = an.GRU(3, 4, norm=NestedSpec(), dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    before = layer(x)[0]
    assert "backend 'native'" in an.explain(layer)
    register, hook = HOOKS[name]
    handle = register(hook)
    try:
        assert "the norm at ih has hooks" in an.explain(layer)
        after = layer(x)[0]
        assert torch.equal(after, an.with_backend(layer, "reference")(x)[0])
        assert torch.allclose(after, before, atol=1e-10) == name.startswith("backward")
    finally:
        handle.remove()
    assert "backend 'native'" in an.explain(layer)
    assert torch.equal(layer(x)[0], before)


@pytest.mark.parametrize("norm", ["layer", ShiftedSpec()])
@pytest.mark.parametrize("gates", ["joint", "per_gate"])
def test_a_global_hook_does_not_change_the_backend_of_a_normalizer_without_modules(norm, gates):
    layer: Any = an.GRU(3, 4, norm=norm, placement={"gates": gates})
    handle = nn.modules.module.register_module_forward_hook(_tripled)
    try:
        assert "backend 'native'" in an.explain(layer)
    finally:
        handle.remove()
