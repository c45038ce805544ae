"""Group normalization: separate mean and variance for each block of neighbouring features."""

from typing import Literal

import atn_norms as an
import torch
from atn_norms.normalizers import FeatureMoments
from pydantic import Field
from torch import Tensor, nn


class GroupNorm(an.Normalizer):
    r"""Centre and scale each group of neighbouring features by the pooled mean and variance of the group.

    $$y_i = g_i \frac{a_i - \mu_{G(i)}}{\sqrt{v_{G(i)} + \epsilon}} + b_i$$

    Source: Wu, He, *Group Normalization*, arXiv 1803.08494, for the channels of an image. Here it applies to the
    pre-activations of a step, pooled over the steps of a window. Derived: groups are independent, so each group is
    layer normalization of its features.

    | symbol | meaning | shape |
    |---|---|---|
    | `weight` | gain g, starts at 1 | `[D]` |
    | `bias` | shift b, starts at 0 | `[D]` |
    | `groups` | number of groups, of D / groups features each | |
    | `eps` | added to the variance, inside the root; unit of the input squared | |

    Errors: `ValueError` if `groups` does not divide the number of features.

    >>> x = torch.randn(5, 2, 8, dtype=torch.float64)
    >>> y, _ = an.AssortedTime(GroupNorm(8, groups=4), window=1).scan(x)
    >>> torch.allclose(y, torch.nn.functional.group_norm(x.flatten(0, 1), 4).view_as(x), atol=1e-12)
    True
    """

    scale_invariant = True
    shift_invariant = True

    def __init__(self, features: int, groups: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        if features % groups:
            possible = ", ".join(str(n) for n in range(1, features + 1) if features % n == 0)
            raise ValueError(f"groups: got {groups} for {features} features; expected one of {possible}")
        self.features, self.groups, self.eps = features, groups, eps
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1 and the shift to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def measure(self, x: Tensor) -> an.Moments:
        mean, var = an.Moments.of(x.unflatten(-1, (self.groups, -1)))
        return an.Moments(mean.squeeze(-1), var.squeeze(-1))

    def normalize(self, x: Tensor, pooled: an.Moments) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        parts = (parts - pooled.mean.unsqueeze(-1)) * torch.rsqrt(pooled.var.unsqueeze(-1) + self.eps)
        return parts.flatten(-2) * self.weight + self.bias

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(self.groups, True, self.eps, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.features}, groups={self.groups}, eps={self.eps}"


class GroupNormSpec(an.NormSpec):
    """Options of `GroupNorm`."""

    kind: Literal["group"] = "group"
    groups: int = Field(default=4, ge=1, description="equal groups of neighbouring features")
    eps: float = Field(default=1e-5, ge=0, description="added to the variance, inside the root")

    def build(self, features: int) -> GroupNorm:
        return GroupNorm(features, self.groups, eps=self.eps)


@an.hookimpl
def atn_norms_register(registry):
    registry.normalizer(GroupNormSpec)
