"""Normalizers in plain PyTorch without declarations, which the traced path must run."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import atn_norms as an
from atn_norms.statistics import promoted


class Scaled(an.Normalizer):
    """A base with one gain."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.ones(features))

    def measure(self, x: Tensor) -> Any:
        return an.Average.of(promoted(x).abs())

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return x / (pooled.mean + 0.1) * self.weight


class L1(Scaled):
    """Division by the mean magnitude."""


class PowerMean(Scaled):
    """Division by a power mean of a fixed exponent."""

    p = 3.0

    def measure(self, x: Tensor) -> Any:
        return an.Average.of(promoted(x).abs().pow(self.p))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return self.weight * x * (pooled.mean + 0.01**self.p).pow(-1 / self.p)


class RootPower(PowerMean):
    """Division by a power mean with a fractional exponent."""

    p = 1.7


class LearnablePower(Scaled):
    """Division by a power mean whose exponent is learned."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.log_p = nn.Parameter(torch.tensor(0.5))

    def measure(self, x: Tensor) -> Any:
        return an.Average.of((promoted(x).abs() + 1e-3).pow(1 + self.log_p.exp()))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return self.weight * x * (pooled.mean + 1e-3).pow(-1 / (1 + self.log_p.exp()))


class Geometric(Scaled):
    """Division by the geometric mean of the magnitudes."""

    def measure(self, x: Tensor) -> Any:
        return an.Average.of((promoted(x).abs() + 1e-3).log())

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return self.weight * x * torch.exp(-pooled.mean)


class Sides(NamedTuple):
    """Means of the positive and of the negative parts."""

    above: Tensor
    below: Tensor

    def pool(self, weights: Tensor, dim: int) -> Sides:
        return Sides(an.Average(self.above).pool(weights, dim).mean, an.Average(self.below).pool(weights, dim).mean)


class TwoSided(Scaled):
    """Division of positive and negative elements by separate means, with a custom statistic."""

    def measure(self, x: Tensor) -> Any:
        wide = promoted(x)
        return Sides(wide.clamp(min=0).mean(-1, keepdim=True), (-wide).clamp(min=0).mean(-1, keepdim=True))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return torch.where(x > 0, x / (pooled.above + 0.1), x / (pooled.below + 0.1)) * self.weight


class SoftClipped(Scaled):
    """Layer normalization followed by tanh."""

    def measure(self, x: Tensor) -> Any:
        return an.Moments.of(x)

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        normal = (x - pooled.mean) * torch.rsqrt(pooled.var + 1e-5)
        return 3 * torch.tanh(normal / 3) * self.weight


class PerHead(Scaled):
    """RMS normalization of heads of three features."""

    def measure(self, x: Tensor) -> Any:
        return an.Average(promoted(x).unflatten(-1, (-1, 3)).square().mean(-1))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        heads = x.unflatten(-1, (-1, 3))
        return (heads * torch.rsqrt(pooled.mean.unsqueeze(-1) + 1e-5)).flatten(-2) * self.weight


class SharedHead(PerHead):
    """RMS normalization of heads with a shared gain of three features."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.weight = nn.Parameter(torch.ones(3))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        heads = x.unflatten(-1, (-1, 3))
        return (heads * torch.rsqrt(pooled.mean.unsqueeze(-1) + 1e-5) * self.weight).flatten(-2)


class Mixed(Scaled):
    """Layer normalization by a learned mix of the statistics of the window and of the step."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.mix = nn.Parameter(torch.tensor(0.3))
        self.bias = nn.Parameter(torch.zeros(features))

    def measure(self, x: Tensor) -> Any:
        return an.Moments.of(x)

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        own, share = an.Moments.of(x), torch.sigmoid(self.mix)
        mean = share * pooled.mean + (1 - share) * own.mean
        var = share * pooled.var + (1 - share) * own.var
        return (x - mean) * torch.rsqrt(var + 1e-5) * self.weight + self.bias


class Grouped(Scaled):
    """Group normalization in three groups, without a declaration."""

    def measure(self, x: Tensor) -> Any:
        each = an.Moments.of(x.unflatten(-1, (3, -1)))
        return an.Moments(each.mean.squeeze(-1), each.var.squeeze(-1))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        groups = x.unflatten(-1, (3, -1))
        normal = (groups - pooled.mean.unsqueeze(-1)) * torch.rsqrt(pooled.var.unsqueeze(-1) + 1e-5)
        return normal.flatten(-2) * self.weight


class Halves(Scaled):
    """A different rule for each third of the features, with slicing and concatenation."""

    def measure(self, x: Tensor) -> Any:
        first, second, _ = promoted(x).chunk(3, -1)
        return an.Average(torch.cat([first.abs().mean(-1, True), second.square().mean(-1, True)], -1))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        first, second, third = x.chunk(3, -1)
        size, square = pooled.mean.split(1, -1)
        parts = first / (size + 0.1), second * torch.rsqrt(square + 1e-3), torch.sigmoid(third)
        return torch.cat(parts, -1) * self.weight


class InPlace(Scaled):
    """In-place operations on intermediate results."""

    def measure(self, x: Tensor) -> Any:
        size = promoted(x).abs()
        size += 1e-2
        return an.Average.of(size.sqrt_())

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        y = x / (pooled.mean + 0.1)
        y *= self.weight
        y[..., :2] = y[..., :2] * 2
        return y


class Norms(Scaled):
    """Euclidean length, unbiased deviation and a softplus."""

    def measure(self, x: Tensor) -> Any:
        wide = promoted(x)
        return an.Average(
            torch.stack([torch.linalg.vector_norm(wide, dim=-1), wide.std(-1), wide.var(-1, correction=0)], -1)
        )

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        length, deviation, var = pooled.mean.unbind(-1)
        scale = length + nn.functional.softplus(deviation) + var
        return x / scale.unsqueeze(-1) * self.weight


class Elementwise(Scaled):
    """One statistic for each feature, without reduction."""

    def measure(self, x: Tensor) -> Any:
        return an.Average(promoted(x).square())

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return x * torch.rsqrt(pooled.mean + 1e-2) * self.weight + torch.log1p(x.abs()) * math.pi


class DynamicTanh(an.Normalizer):
    """Tanh of a multiple of x, without a statistic."""

    stateless = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


EVERY: dict[str, type[Scaled] | type[DynamicTanh]] = {
    kind.__name__: kind
    for kind in (
        L1, PowerMean, RootPower, LearnablePower, Geometric, TwoSided, SoftClipped, PerHead, SharedHead, Mixed, Grouped,
        Halves, InPlace, Norms, Elementwise, DynamicTanh,
    )
}  # fmt: skip


def built(name: str, features: int) -> an.Normalizer:
    """Return a normalizer of the gallery with non-default parameters."""
    normalizer = EVERY[name](features)
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in normalizer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=source)
    return normalizer


class GallerySpec(an.NormSpec):
    """Options of a normalizer of the gallery."""

    kind: Literal["gallery"] = "gallery"
    name: str

    def build(self, features: int) -> an.Normalizer:
        return built(self.name, features)
