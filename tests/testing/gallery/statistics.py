"""Wrong statistics, each in the normalizer that pools it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import atn_norms as an
from atn_norms.pytree import expand_mask
from tests.testing.gallery.entry import wrong


class Uses(an.Normalizer):
    """Correct for a correct `Custom`: layer normalization with another statistic."""

    Custom: type

    permutation_equivariant = True

    def __init__(self, features: int) -> None:
        super().__init__()

    def measure(self, x: Tensor) -> an.Moments:
        x = x.double()
        return self.Custom(x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0))

    def normalize(self, x: Tensor, pooled: an.Moments) -> Tensor:
        return (x - pooled.mean) * torch.rsqrt(pooled.var + 1e-5)


def share(weights: Tensor, leaf: Tensor, dim: int) -> Tensor:
    if weights.ndim == 1:
        weights = weights.reshape((1,) * dim + weights.shape)
    weights = expand_mask(weights, leaf)
    return weights / weights.sum(dim, keepdim=True).clamp(min=1e-30)


@wrong("a_statistic_is_a_tuple_of_tensors")
class NestsStatistics(Uses):
    """Returns a statistic of two nested statistics, which no window can pool."""

    class Custom(NamedTuple):
        one: an.Moments
        other: an.Moments

        def pool(self, weights: Tensor, dim: int) -> "NestsStatistics.Custom":
            return type(self)(self.one.pool(weights, dim), self.other.pool(weights, dim))

    def measure(self, x: Tensor) -> "NestsStatistics.Custom":  # type: ignore[override]
        return self.Custom(an.Moments.of(x), an.Moments.of(x.abs()))


@wrong("a_statistic_is_a_tuple_of_tensors")
class StatesADictionary(Uses):
    """Returns its numbers as a dictionary."""

    def measure(self, x: Tensor) -> Any:
        return dict(zip(("mean", "var"), an.Moments.of(x), strict=True))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, an.Moments(**pooled))


@wrong("a_statistic_is_a_tuple_of_tensors")
class PoolsToAnotherType(Uses):
    """Pools its moments to those of the package: the type of the statistic changes from step to step."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> an.Moments:
            return an.Moments(self.mean, self.var).pool(weights, dim)


@wrong("a_statistic_is_a_tuple_of_tensors")
class NeedsMoreThanItsTensors(Uses):
    """Returns a statistic that needs another argument, so it cannot be rebuilt from its tensors."""

    class Custom(tuple[Tensor, ...]):
        def __new__(cls, mean: Tensor, var: Tensor, *, of: str) -> "NeedsMoreThanItsTensors.Custom":
            return super().__new__(cls, (mean, var))

        def pool(self, weights: Tensor, dim: int) -> "NeedsMoreThanItsTensors.Custom":
            return type(self)(*an.Moments(self[0], self[1]).pool(weights, dim), of="a window")

    def measure(self, x: Tensor) -> Any:
        return self.Custom(*an.Moments.of(x), of="a step")

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, an.Moments(*pooled))


@wrong("merging_needs_no_order")
class TakesTheLatest(Uses):
    """Pools by selecting the last entry with a weight."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "TakesTheLatest.Custom":
            weights = expand_mask(weights, self.mean).expand(self.mean.shape)
            place = torch.arange(weights.shape[dim]).reshape((1,) * dim + (-1,) + (1,) * (weights.ndim - dim - 1))
            last = ((weights > 0) * place).amax(dim, keepdim=True)
            return type(self)(*(leaf.gather(dim, last).squeeze(dim) for leaf in self))


@wrong("merging_needs_no_order")
class DividesByOneLess(Uses):
    """Pools variances as an unbiased estimate over the entries, which depends on the grouping."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> an.Moments:
            mean, var = an.Moments(self.mean, self.var).pool(weights, dim)
            count = expand_mask(weights, self.mean).sum(dim)
            return type(self)(mean, var * count / (count - 1).clamp(min=1))  # type: ignore[return-value]


@wrong("a_weight_counts_copies")
class CountsEveryEntryAlike(Uses):
    """Uses weights as a mask: batches of 30 rows and of 2 rows count the same."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> an.Moments:
            return type(self)(*an.Moments(self.mean, self.var).pool((weights > 0).double(), dim))  # type: ignore[return-value]


@wrong("a_weight_of_zero_hides")
class MultipliesByZero(Uses):
    """Masks an entry by a factor of 0, which does not remove NaN."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "MultipliesByZero.Custom":
            w = share(weights, self.mean, dim)
            mean = (w * self.mean).sum(dim, keepdim=True)
            var = (w * (self.var + (self.mean - mean).square())).sum(dim)
            return type(self)(mean.squeeze(dim), var)


@wrong("a_weight_of_zero_hides")
class DividesByNothing(Uses):
    """Divides by the sum of the weights, even if it is 0."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "DividesByNothing.Custom":
            w = expand_mask(weights, self.mean)
            seen = [torch.where(w > 0, leaf, 0.0) for leaf in self]
            w = w / w.sum(dim, keepdim=True)
            mean = (w * seen[0]).sum(dim, keepdim=True)
            var = (w * (seen[1] + (seen[0] - mean).square())).sum(dim)
            return type(self)(mean.squeeze(dim), var)


@wrong("pooling_works_along_any_axis")
class PoolsTheLastAxisButOne(Uses):
    """Always pools along the second last axis: wrong for a statistic with another axis, such as gates."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "PoolsTheLastAxisButOne.Custom":
            w = expand_mask(weights, self.mean).expand(self.mean.shape)
            seen = [torch.where(w > 0, leaf, 0.0) for leaf in self]
            w = w / w.sum(-2, keepdim=True).clamp(min=1e-30)
            mean = (w * seen[0]).sum(-2, keepdim=True)
            return type(self)(mean.squeeze(-2), (w * (seen[1] + (seen[0] - mean).square())).sum(-2))


@wrong("a_union_equals_its_pooled_parts")
class ForgetsTheSpreadBetween(Uses):
    """Averages the variances and omits the differences of the means."""

    class Custom(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "ForgetsTheSpreadBetween.Custom":
            means, variances = (an.Average(leaf).pool(weights, dim).mean for leaf in self)
            return type(self)(means, variances)


@wrong("a_union_equals_its_pooled_parts")
class MeasuresUnbiased(Uses):
    """Measures the unbiased variance, torch's default, which cannot be merged."""

    Custom = an.Moments

    def measure(self, x: Tensor) -> an.Moments:
        x = x.double()
        return an.Moments(x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1)))
