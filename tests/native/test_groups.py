"""A plugin's normalizer that declares moments over groups of features runs in the kernels."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import atn_norms as an
from atn_norms.normalizers import FeatureMoments
from tests.native.strategies import CELLS, Pair, check, needs_kernels

pytestmark = needs_kernels


class GroupNorm(an.Normalizer):
    """Normalization by the moments, or mean squares, of groups of neighbouring features; with gain, without shift."""

    def __init__(self, features: int, groups: int, centred: bool) -> None:
        super().__init__()
        self.groups, self.centred = groups, centred
        self.weight = nn.Parameter(torch.ones(features))

    def measure(self, x: Tensor) -> Any:
        parts = x.unflatten(-1, (self.groups, -1)).double()
        statistic = an.Moments.of(parts) if self.centred else an.Average.of(parts.square())
        return type(statistic)(*(leaf.squeeze(-1) for leaf in statistic))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        parts, (*mean, spread) = x.unflatten(-1, (self.groups, -1)), (leaf.unsqueeze(-1) for leaf in pooled)
        parts = parts - mean[0] if mean else parts
        return (parts * torch.rsqrt(spread + 1e-4)).flatten(-2) * self.weight

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(self.groups, self.centred, 1e-4, self.weight, None, (self.groups,))


class GroupNormSpec(an.NormSpec):
    kind: Literal["group-of-tests"] = "group-of-tests"
    groups: int = 1
    centred: bool = True

    def build(self, features: int) -> an.Normalizer:
        return GroupNorm(features, self.groups, self.centred)


@pytest.mark.parametrize("window", ["1", "4", "cumulative", "exponential"])
@pytest.mark.parametrize(("groups", "centred"), [(2, True), (5, False), (10, True), (64, True), (64, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_groups(cell, groups, centred, window):
    """Groups that cross gates, groups of one feature, and the maximum number of groups."""
    hidden = 64 if groups == 64 else 10
    options = {"norm": GroupNormSpec(groups=groups, centred=centred)}
    pair = Pair(cell, "layer", window, hidden, 19, 6, 3, groups, ragged=True, before=3, options=options)
    assert "backend 'native'" in an.explain(pair.layer("auto"))
    check(pair)
