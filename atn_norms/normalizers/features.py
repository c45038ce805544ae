"""Normalizers over the features of a row: layer and RMS normalization."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from atn_norms.normalizers.base import (
    FeatureMoments,
    Normalizer,
    NormSpec,
    affine,
    checked_eps,
    checked_features,
    parameter_of,
    reset_affine,
)
from atn_norms.statistics import Average, Moments, promoted


def _rounded(values: Tensor, x: Tensor) -> Tensor:
    """Return float64 values in the type of `x`, or in float32 if `x` is of half precision."""
    return values.to(x.dtype if x.dtype.itemsize >= torch.float32.itemsize else torch.float32)


class LayerNorm(Normalizer):
    r"""Centre and scale by the pooled mean and variance over the features.

    $$y = g \odot \frac{a - \mu}{\sqrt{v + \epsilon}} + b$$

    Source: Ba, Kiros, Hinton, arXiv 1607.06450; pooled over time as in Pospisil, Zadorozhnyy, Ye, arXiv 2209.14439.

    | symbol | meaning | shape |
    |---|---|---|
    | `weight` | gain g, starts at 1 | `[D]` |
    | `bias` | shift b, starts at 0 | `[D]` |
    | `eps` | added to the variance, inside the root; unit of the input squared | |

    >>> import torch
    >>> from atn_norms import AssortedTime, LayerNorm
    >>> x = torch.randn(5, 2, 8, dtype=torch.float64)
    >>> y, _ = AssortedTime(LayerNorm(8), window=1).scan(x)
    >>> torch.allclose(y, torch.nn.functional.layer_norm(x, (8,)), atol=1e-12)
    True
    """

    scale_invariant = True
    shift_invariant = True
    permutation_equivariant = True

    def __init__(self, features: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.features, self.eps = checked_features(features), checked_eps(eps)
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1 and the shift to 0."""
        reset_affine(self.weight, self.bias)

    def measure(self, x: Tensor) -> Moments:
        return Moments.of(x)

    def normalize(self, x: Tensor, pooled: Moments) -> Tensor:
        normal = (x - pooled.mean) * torch.rsqrt(pooled.var + self.eps)
        return affine(_rounded(normal, x), self.weight, self.bias)

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(1, True, self.eps, parameter_of(self, "weight"), parameter_of(self, "bias"))

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}"


class LayerNormSpec(NormSpec):
    """Options of `LayerNorm`."""

    kind: Literal["layer"] = "layer"
    eps: float = Field(default=1e-5, ge=0, description="added to the variance, inside the root")

    def build(self, features: int) -> LayerNorm:
        return LayerNorm(features, eps=self.eps)


class RMSNorm(Normalizer):
    r"""Scale by the pooled root mean square over the features, without centring.

    $$y = g \odot \frac{a}{\sqrt{\overline{a^2} + \epsilon}} \; (+\, b)$$

    Source: Zhang, Sennrich, arXiv 1910.07467; pooled over time: the mean square over window and features (derived).

    | symbol | meaning | shape |
    |---|---|---|
    | `weight` | gain g, starts at 1 | `[D]` |
    | `bias` | shift b, starts at 0; None by default | `[D]` |
    | `eps` | added to the mean square, inside the root; unit of the input squared | |

    >>> import torch
    >>> from atn_norms import AssortedTime, RMSNorm
    >>> x = torch.randn(5, 2, 8, dtype=torch.float64)
    >>> y, _ = AssortedTime(RMSNorm(8), window=1).scan(x)
    >>> torch.allclose(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-5), atol=1e-12)
    True
    """

    scale_invariant = True
    permutation_equivariant = True
    bias: nn.Parameter | None

    def __init__(self, features: int, *, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.features, self.eps = checked_features(features), checked_eps(eps)
        self.weight = nn.Parameter(torch.empty(features))
        self.register_parameter("bias", nn.Parameter(torch.empty(features)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1 and the shift to 0."""
        reset_affine(self.weight, self.bias)

    def measure(self, x: Tensor) -> Average:
        return Average.of(promoted(x).square())

    def normalize(self, x: Tensor, pooled: Average) -> Tensor:
        return affine(x * _rounded(torch.rsqrt(pooled.mean + self.eps), x), self.weight, self.bias)

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(1, False, self.eps, parameter_of(self, "weight"), parameter_of(self, "bias"))

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, bias={self.bias is not None}"


class RMSNormSpec(NormSpec):
    """Options of `RMSNorm`."""

    kind: Literal["rms"] = "rms"
    eps: float = Field(default=1e-5, ge=0, description="added to the mean square, inside the root")
    bias: bool = Field(default=False, description="learn a shift too")

    def build(self, features: int) -> RMSNorm:
        return RMSNorm(features, eps=self.eps, bias=self.bias)
