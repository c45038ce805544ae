"""Layers of float32: programs run in float32 only where results and gradients keep the digits of float64."""

from typing import Any, Literal

import pytest
import torch

import atn_norms as an
from atn_norms.backends.traced import cache
from atn_norms.backends.traced.cache import traced_norm
from atn_norms.backends.traced.normalizer import PROGRAMS, TracedNorm
from atn_norms.statistics import promoted
from tests.native.strategies import needs_kernels
from tests.traced.gallery import EVERY, built

pytestmark = needs_kernels

FEATURES = 64


class Variance(an.Normalizer):
    """Store E[x] and E[x^2]; their difference in `normalize` cancels the digits of a large mean."""

    def measure(self, x: Any) -> Any:
        wide = promoted(x)
        return an.Average(torch.cat([wide.mean(-1, keepdim=True), wide.square().mean(-1, keepdim=True)], -1))

    def normalize(self, x: Any, pooled: Any) -> Any:
        mean, square = pooled.mean.chunk(2, -1)
        return (x - mean) * torch.rsqrt((square - mean * mean).clamp(min=0) + 1e-6)


class Saturated(Variance):
    """The same for a function that is constant for rows of mean 1e4."""

    def measure(self, x: Any) -> Any:
        return super().measure(1e3 * torch.tanh(promoted(x) / 1e3))


class Gated(Variance):
    """Multiply the same by the square of a parameter that starts at 0: neither value nor gradient shows errors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def normalize(self, x: Any, pooled: Any) -> Any:
        return self.gate.square() * super().normalize(x, pooled)


KINDS = {kind.__name__: kind for kind in (Variance, Saturated, Gated)}


class CancellingSpec(an.NormSpec):
    kind: Literal["cancelling"] = "cancelling"
    name: str

    def build(self, features: int) -> an.Normalizer:
        return KINDS[self.name]()


def outcome(layer: Any, x: Any) -> tuple[Any, Any]:
    """Return the outputs and the gradient of x, in float64."""
    x = x.clone().requires_grad_()
    outputs = layer(x)[0]
    (gradient,) = torch.autograd.grad(outputs.sin().sum(), x)
    return outputs.detach().double(), gradient.double()


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("mean", [0.0, 30.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("name", KINDS)
def test_digits_that_cancel_between_two_programs_are_kept(name, mean, window):
    layer: Any = an.RNN(
        FEATURES, FEATURES, norm={"sites": {"ih": CancellingSpec(name=name)}}, window=window, bias=False
    )
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(FEATURES))
        layer.weight_hh_l0.zero_()
    assert "backend 'native'" in an.explain(layer)
    x = mean + torch.randn(8, 2, FEATURES, generator=torch.Generator().manual_seed(0))
    layer(x)
    if name == "Gated":  # as after training
        layer.norm_ih_l0.gate.data.fill_(1.0)
    found = outcome(layer, x)
    expected = outcome(an.with_backend(layer, "reference").double(), x.double())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_only_the_programs_that_lose_digits_are_wide():
    traced = traced_norm(Variance(), FEATURES)
    assert isinstance(traced, TracedNorm)
    assert {name: getattr(traced, name).narrow for name in PROGRAMS} == {
        "measure": False,
        "normalize": True,
        "measure_back": False,
        "normalize_back": True,
    }


@pytest.mark.parametrize("features", [6, 60, 240])
@pytest.mark.parametrize("name", [name for name in EVERY if name != "Elementwise"])
def test_programs_that_keep_their_digits_are_narrow(name, features, monkeypatch):
    monkeypatch.setattr(cache, "_kept", {})  # other tests build the normalizer with other parameters
    traced = traced_norm(built(name, features), features)
    assert isinstance(traced, TracedNorm), traced
    assert [name for name in PROGRAMS if not getattr(traced, name).narrow] == []
