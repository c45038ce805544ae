"""Wrong statistics, each in the normalizer that pools it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import atn_norms as an
from atn_norms.pytree import expand_mask
from tests.testing.gallery.entry import wrong


class Uses(an.Normalizer):
    """Right for a right `Said`: layer normalization with a statistic of its own."""

    Said: type

    permutation_equivariant = True

    def __init__(self, features: int) -> None:
        super().__init__()

    def measure(self, x: Tensor) -> an.Moments:
        x = x.double()
        return self.Said(x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0))

    def normalize(self, x: Tensor, pooled: an.Moments) -> Tensor:
        return (x - pooled.mean) * torch.rsqrt(pooled.var + 1e-5)


def share(weights: Tensor, leaf: Tensor, dim: int) -> Tensor:
    if weights.ndim == 1:
        weights = weights.reshape((1,) * dim + weights.shape)
    weights = expand_mask(weights, leaf)
    return weights / weights.sum(dim, keepdim=True).clamp(min=1e-30)


@wrong("a_statement_is_a_tuple_of_tensors")
class StatesStatements(Uses):
    """States the moments of two halves as a statement of two statements, which nobody pools."""

    class Said(NamedTuple):
        one: an.Moments
        other: an.Moments

        def pool(self, weights: Tensor, dim: int) -> "StatesStatements.Said":
            return type(self)(self.one.pool(weights, dim), self.other.pool(weights, dim))

    def measure(self, x: Tensor) -> "StatesStatements.Said":  # type: ignore[override]
        return self.Said(an.Moments.of(x), an.Moments.of(x.abs()))


@wrong("a_statement_is_a_tuple_of_tensors")
class StatesADictionary(Uses):
    """States its numbers in a dictionary, by name."""

    def measure(self, x: Tensor) -> Any:
        return dict(zip(("mean", "var"), an.Moments.of(x), strict=True))

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, an.Moments(**pooled))


@wrong("a_statement_is_a_tuple_of_tensors")
class PoolsToAnotherType(Uses):
    """Pools its own moments to those of the package: a window would have to state another type from step to step."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> an.Moments:
            return an.Moments(self.mean, self.var).pool(weights, dim)


@wrong("a_statement_is_a_tuple_of_tensors")
class AsksForMoreThanItsTensors(Uses):
    """A statement that cannot be made of its tensors again, since it wants to be told what they are of."""

    class Said(tuple[Tensor, ...]):
        def __new__(cls, mean: Tensor, var: Tensor, *, of: str) -> "AsksForMoreThanItsTensors.Said":
            return super().__new__(cls, (mean, var))

        def pool(self, weights: Tensor, dim: int) -> "AsksForMoreThanItsTensors.Said":
            return type(self)(*an.Moments(self[0], self[1]).pool(weights, dim), of="a window")

    def measure(self, x: Tensor) -> Any:
        return self.Said(*an.Moments.of(x), of="a step")

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return super().normalize(x, an.Moments(*pooled))


@wrong("merging_needs_no_order")
class TakesTheLatest(Uses):
    """Pools by taking the last entry that has a weight."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "TakesTheLatest.Said":
            weights = expand_mask(weights, self.mean).expand(self.mean.shape)
            place = torch.arange(weights.shape[dim]).reshape((1,) * dim + (-1,) + (1,) * (weights.ndim - dim - 1))
            last = ((weights > 0) * place).amax(dim, keepdim=True)
            return type(self)(*(leaf.gather(dim, last).squeeze(dim) for leaf in self))


@wrong("merging_needs_no_order")
class DividesByOneLess(Uses):
    """Pools variances as an unbiased estimate over the entries, which is another one for every grouping."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> an.Moments:
            mean, var = an.Moments(self.mean, self.var).pool(weights, dim)
            count = expand_mask(weights, self.mean).sum(dim)
            return type(self)(mean, var * count / (count - 1).clamp(min=1))  # type: ignore[return-value]


@wrong("a_weight_counts_copies")
class CountsEveryEntryAlike(Uses):
    """Takes a weight for yes or no: batches of 30 rows and of 2 are merged as if they were alike."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> an.Moments:
            return type(self)(*an.Moments(self.mean, self.var).pool((weights > 0).double(), dim))  # type: ignore[return-value]


@wrong("a_weight_of_zero_hides")
class MultipliesByZero(Uses):
    """Hides an entry by multiplying it with its weight of 0, which hides no NaN."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "MultipliesByZero.Said":
            w = share(weights, self.mean, dim)
            mean = (w * self.mean).sum(dim, keepdim=True)
            var = (w * (self.var + (self.mean - mean).square())).sum(dim)
            return type(self)(mean.squeeze(dim), var)


@wrong("a_weight_of_zero_hides")
class DividesByNothing(Uses):
    """Divides by the sum of the weights, also where it is 0."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "DividesByNothing.Said":
            w = expand_mask(weights, self.mean)
            seen = [torch.where(w > 0, leaf, 0.0) for leaf in self]
            w = w / w.sum(dim, keepdim=True)
            mean = (w * seen[0]).sum(dim, keepdim=True)
            var = (w * (seen[1] + (seen[0] - mean).square())).sum(dim)
            return type(self)(mean.squeeze(dim), var)


@wrong("pooling_works_along_any_axis")
class PoolsTheLastAxisButOne(Uses):
    """Pools along the last axis but one whatever it is told: right until a statement has an axis more, as gates do."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "PoolsTheLastAxisButOne.Said":
            w = expand_mask(weights, self.mean).expand(self.mean.shape)
            seen = [torch.where(w > 0, leaf, 0.0) for leaf in self]
            w = w / w.sum(-2, keepdim=True).clamp(min=1e-30)
            mean = (w * seen[0]).sum(-2, keepdim=True)
            return type(self)(mean.squeeze(-2), (w * (seen[1] + (seen[0] - mean).square())).sum(-2))


@wrong("a_union_says_what_its_parts_pool_to")
class ForgetsTheSpreadBetween(Uses):
    """Averages the variances and forgets how far apart the means are."""

    class Said(NamedTuple):
        mean: Tensor
        var: Tensor

        def pool(self, weights: Tensor, dim: int) -> "ForgetsTheSpreadBetween.Said":
            means, variances = (an.Average(leaf).pool(weights, dim).mean for leaf in self)
            return type(self)(means, variances)


@wrong("a_union_says_what_its_parts_pool_to")
class MeasuresUnbiased(Uses):
    """Measures the unbiased variance, torch's default, which does not merge."""

    Said = an.Moments

    def measure(self, x: Tensor) -> an.Moments:
        x = x.double()
        return an.Moments(x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1)))
