"""Statistics with a `pool` that is a weighted mean of some numbers alone run on the reference."""

from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

import atn_norms as an
from atn_norms.backends.traced.normalizer import TracedNorm, trace
from atn_norms.pytree import expand_mask
from tests.traced.gallery import Scaled


def of_squares(kind: type, features: int = 4, change: Any = lambda x: x) -> an.Normalizer:
    """Return a normalizer with a statistic of this class."""

    class Squares(Scaled):
        def measure(self, x: Any) -> Any:
            return kind(x.double().square().mean(-1, keepdim=True))

        def normalize(self, x: Any, pooled: Any) -> Any:
            return change(x) * torch.rsqrt(pooled[0] + 1e-3)

    return Squares(features)


class WithoutInfinite(NamedTuple):
    """A mean of the finite entries."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        used = expand_mask(weights, self.mean) * self.mean.isfinite()
        total = used.sum(dim)
        values = torch.where(used > 0, self.mean, 0.0)
        return WithoutInfinite((used * values).sum(dim) / torch.where(total > 0, total, 1.0))


class Bounded(NamedTuple):
    """A mean of entries of at most 1e5."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        return Bounded(an.Average(self.mean.clamp(max=1e5)).pool(weights, dim).mean)


class LightEntries(NamedTuple):
    """A mean whose entries count at most once."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        return LightEntries(an.Average(self.mean).pool(weights.clamp(max=1.0), dim).mean)


class HeavyTotal(NamedTuple):
    """A mean whose total weight is at least 1."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        shares = weights / weights.sum(dim, keepdim=True).clamp(min=1.0)
        seen = torch.where(expand_mask(shares, self.mean) > 0, self.mean, 0.0)
        return HeavyTotal((expand_mask(shares, self.mean) * seen).sum(dim))


class Constant(NamedTuple):
    """A mean without a gradient."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        return Constant(an.Average(self.mean.detach()).pool(weights, dim).mean)


class Shifted(NamedTuple):
    """A mean plus a small number."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        return Shifted(an.Average(self.mean).pool(weights, dim).mean + 1e-20)


class SecondAxis(NamedTuple):
    """A mean along axis 1, and a maximum along another axis."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        pooled = an.Average(self.mean).pool(weights, dim).mean
        return SecondAxis(pooled if dim == 1 else self.mean.amax(dim))


POOLS = {
    WithoutInfinite: "abs is not linear in the statistic (test_pools.py, line ",
    Bounded: "clamp is not linear in the statistic (test_pools.py, line ",
    LightEntries: "",
    HeavyTotal: "",
    Constant: "",
    Shifted: "",
    SecondAxis: "amax is not linear in the statistic (test_pools.py, line ",
}


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_that_is_a_weighted_mean_of_some_numbers_alone_has_no_program(kind):
    found = trace(of_squares(kind), 4)
    assert isinstance(found, str)
    assert found.startswith(f"its statistic {kind.__name__} is not pooled by a weighted mean")
    assert POOLS[kind] in found


class PooledSpec(an.NormSpec):
    """Options of a normalizer with the statistic `WithoutInfinite`."""

    kind: Literal["pooled-in-a-test"] = "pooled-in-a-test"

    def build(self, features: int) -> an.Normalizer:
        return of_squares(WithoutInfinite, features, lambda x: torch.where(x == x, x, 0.0))


def test_layers_agree_on_infinite_statistics():
    layer = an.GRU(3, 4, norm=PooledSpec(), window=3, dtype=torch.float64)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    x[3, 0, 1] = float("nan")
    y, expected = layer(x)[0], an.with_backend(layer, "reference")(x)[0]
    assert torch.isfinite(y[-1]).all()
    torch.testing.assert_close(y, expected, equal_nan=True)


class Weighted(NamedTuple):
    """A mean as a product of a matrix and a vector, of two leaves."""

    mean: Tensor

    def pool(self, weights: Tensor, dim: int) -> Any:
        seen = torch.where(expand_mask(weights, self.mean) > 0, self.mean, 0.0).movedim(dim, -1)
        total = weights.sum(dim)
        shares = (weights / torch.where(total > 0, total, 1.0).unsqueeze(dim)).unsqueeze(dim)
        return Weighted((seen * shares).sum(-1))


def test_a_weighted_mean_in_another_form_has_a_program():
    assert isinstance(trace(of_squares(Weighted), 4), TracedNorm)
