"""Division by a pooled power mean: RMS normalization with a configurable exponent, up to the maximum."""

import math
from typing import Annotated, Any, Literal, NamedTuple

import atn_norms as an
import torch
from atn_norms.normalizers import FeatureMoments
from atn_norms.statistics import promoted
from pydantic import Field, field_validator
from torch import Tensor, nn

INFINITY: Literal["inf"] = "inf"  # JSON has no infinity, so options use a string


class Largest(NamedTuple):
    r"""The maximum per step, pooled as $\max_{s : w_s > 0} m_s$; a weight only includes or excludes a step.

    | symbol | meaning | shape |
    |---|---|---|
    | `top` | $m_s$, not negative, in the unit of the compared values | `[..., d]` |
    """

    top: Tensor

    def pool(self, weights: Tensor, dim: int) -> "Largest":
        dim = dim % self.top.ndim
        if weights.ndim == 1:
            weights = weights.reshape((1,) * dim + weights.shape)
        seen = (weights > 0).reshape(weights.shape + (1,) * (self.top.ndim - weights.ndim))
        return Largest(torch.where(seen, self.top, torch.zeros_like(self.top)).amax(dim))


class PMean(an.Normalizer):
    r"""Divide by the pooled power mean of the magnitudes, without centring.

    $$y = g \odot \frac{a}{\left(\overline{|a|^p} + \epsilon^p\right)^{1/p}}, \qquad
    p = \infty:\; y = g \odot \frac{a}{\max(\max |a|, \epsilon)}$$

    Source: p = 2 is RMS normalization, Zhang, Sennrich, arXiv 1910.07467; other p are the Lp batch normalizations of
    Hoffer, Banner, Golan, Soudry, arXiv 1803.01814, without centring and over features and window (derived).

    | symbol | meaning | shape |
    |---|---|---|
    | `weight` | gain g, starts at 1 | `[D]` |
    | `p` | exponent, 1 to 32; or infinity, for the largest magnitude | |
    | `eps` | lower bound of the mean, in the unit of the input; the eps of RMS normalization is its square | |

    Errors: `ValueError` for an infinite p with a window whose weights differ, since a maximum cannot be weighted.

    >>> x = torch.randn(7, 2, 8, dtype=torch.float64)
    >>> y, _ = an.AssortedTime(PMean(8, p=2.0, eps=0.01), window=3).scan(x)
    >>> torch.allclose(y, an.AssortedTime(an.RMSNorm(8, eps=0.0001), window=3).scan(x)[0], atol=1e-12)
    True
    >>> an.AssortedTime(PMean(8, p=math.inf), an.Exponential(half_life=5.0))
    Traceback (most recent call last):
    ...
    ValueError: window: Exponential(half_life=5.0) with PMean: a maximum (p infinite) ...
    """

    scale_invariant = True
    permutation_equivariant = True

    def __init__(self, features: int, p: float, *, eps: float = 3e-3) -> None:
        super().__init__()
        self.features, self.p, self.eps = features, p, eps
        self.weight = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1."""
        nn.init.ones_(self.weight)

    def measure(self, x: Tensor) -> an.Average | Largest:
        size = promoted(x).abs()
        return Largest(size.amax(-1, keepdim=True)) if math.isinf(self.p) else an.Average.of(size.pow(self.p))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        if math.isinf(self.p):
            return self.weight * x / pooled.top.clamp(min=self.eps)
        return self.weight * x * (pooled.mean + self.eps**self.p).pow(-1 / self.p)

    def unsupported_reason(self, window: an.Window[Any]) -> str | None:
        if math.isfinite(self.p) or window.uniform_weights:
            return None
        return (
            "a maximum (p infinite) requires a window with uniform weights; "
            "expected a sliding or cumulative window, or a finite p"
        )

    def feature_moments(self) -> FeatureMoments | None:
        return FeatureMoments(1, False, self.eps**2, self.weight, None) if self.p == 2 else None

    def extra_repr(self) -> str:
        return f"{self.features}, p={self.p}, eps={self.eps}"


class PMeanSpec(an.NormSpec):
    """Options of `PMean`."""

    kind: Literal["pmean"] = "pmean"
    p: Annotated[float, Field(ge=1, le=32)] | Literal["inf"] = Field(
        default=1.0, description="exponent of the mean; inf: the largest magnitude"
    )
    eps: float = Field(default=3e-3, gt=0, description="lower bound of the mean, in the unit of the input")

    @field_validator("p", mode="before")
    @classmethod
    def _spell_infinity(cls, p: Any) -> Any:
        return INFINITY if isinstance(p, float) and p == math.inf else p

    def build(self, features: int) -> PMean:
        return PMean(features, float(self.p), eps=self.eps)


@an.hookimpl
def atn_norms_register(registry):
    registry.normalizer(PMeanSpec)
