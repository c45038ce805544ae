"""Per-step statistics, and the pooling of several into one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from atn_norms.errors import mismatch
from atn_norms.pytree import expand_mask


@runtime_checkable
class Statistic(Protocol):
    """A named tuple of tensors with `pool`: the interface between normalizers and windows.

    Leaves have shape `[..., d]`. The leading axes are those of the pre-activations `[..., D]`. The last axis is the
    size of the statistic: 1 for a statistic over features, D for a statistic of each feature. A statistic is rebuilt
    from its leaves as `type(s)(*leaves)`.
    """

    def pool(self, weights: Tensor, dim: int) -> Self:
        """Merge the entries along the stacked axis `dim`, each with its non-negative weight.

        | symbol | meaning | shape |
        |---|---|---|
        | `weights` | weight of each entry, over the leaf's axes 0 to `dim`; 0 hides an entry | `[..., n]` |
        | `dim` | the stacked axis, which the merge removes | |

        Equal weights give the average, weights in {0, 1} a sliding window, and decaying weights an exponential
        average. An entry of weight 0 is masked in value and in gradient, even if it is NaN. If every weight is 0, the
        result is finite but undefined.
        """
        ...

    def __iter__(self) -> Iterator[Tensor]: ...


def promoted(x: Tensor) -> Tensor:
    """Convert `x` to the type of statistics: float64, or float32 on a device without float64."""
    return x.to(statistics_dtype(x.device))


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Shares(NamedTuple):
    """Weights along one stacked axis, normalized to sum to 1, with the axes of the leaves."""

    share: Tensor
    dim: int

    @classmethod
    def of(cls, weights: Tensor, dim: int, like: Tensor) -> _Shares:
        dim = dim % like.ndim
        if weights.ndim == 1:
            weights = weights.reshape((1,) * dim + weights.shape)
        if weights.ndim != dim + 1 and weights.ndim != like.ndim:
            got = f"shape {list(weights.shape)} for leaves {list(like.shape)} pooled along axis {dim}"
            expected = f"one axis ({like.shape[dim]} weights), or axes 0 to {dim} of the leaf"
            raise ValueError(mismatch("weights", got, expected))
        total = weights.sum(dim, keepdim=True)
        return cls(weights / torch.where(total > 0, total, torch.ones_like(total)), dim)

    def seen(self, leaf: Tensor) -> Tensor:
        """Return `leaf` with every entry of weight 0 replaced by 0, so that its value and gradient are unused."""
        return torch.where(
            expand_mask(self.share, leaf) > 0, leaf, torch.zeros((), dtype=leaf.dtype, device=leaf.device)
        )

    def average(self, leaf: Tensor) -> Tensor:
        """Return the weighted mean along the stacked axis, which is kept with length 1."""
        return (expand_mask(self.share, leaf) * leaf).sum(self.dim, keepdim=True)


class Moments(NamedTuple):
    r"""Mean and biased variance, pooled in the centred form.

    $$\bar\mu = \sum_s w_s \mu_s \qquad \bar v = \sum_s w_s \left[ v_s + (\mu_s - \bar\mu)^2 \right]
    \qquad \sum_s w_s = 1$$

    Derived: the variance of a union is the mean of the variances within, plus the variance of the means between.
    No subtraction cancels digits, so the result stays exact where the mean is large and the deviation small.

    | symbol | meaning | shape |
    |---|---|---|
    | `mean` | $\mu_s$, unit of the input | `[..., d]` |
    | `var` | $v_s$, biased, unit of the input squared | `[..., d]` |

    >>> import torch
    >>> steps = Moments(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [0.5]]))
    >>> steps.pool(torch.tensor([1.0, 1.0]), dim=0)
    Moments(mean=tensor([2.]), var=tensor([1.5000]))
    """

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, x: Tensor, dim: int = -1) -> Moments:
        """Compute the moments of `x` over one axis, which is kept with length 1; float64 where the device has it."""
        x = promoted(x)
        mean = x.mean(dim, keepdim=True)
        return cls(mean, (x - mean).square().mean(dim, keepdim=True))

    def pool(self, weights: Tensor, dim: int) -> Moments:
        shares = _Shares.of(weights, dim, self.mean)
        means, variances = shares.seen(self.mean), shares.seen(self.var)
        mean = shares.average(means)
        var = shares.average(variances + (means - mean).square())
        return Moments(mean.squeeze(shares.dim), var.squeeze(shares.dim))


class Average(NamedTuple):
    r"""Mean of each step, such as the mean square: $\bar m = \sum_s w_s m_s$ with $\sum_s w_s = 1$.

    | symbol | meaning | shape |
    |---|---|---|
    | `mean` | $m_s$, unit of the averaged values | `[..., d]` |

    >>> import torch
    >>> Average(torch.tensor([[1.0], [3.0]])).pool(torch.tensor([3.0, 1.0]), dim=0)
    Average(mean=tensor([1.5000]))
    """

    mean: Tensor

    @classmethod
    def of(cls, x: Tensor, dim: int = -1) -> Average:
        """Compute the mean of `x` over one axis, which is kept with length 1; float64 where the device has it."""
        return cls(promoted(x).mean(dim, keepdim=True))

    def pool(self, weights: Tensor, dim: int) -> Average:
        shares = _Shares.of(weights, dim, self.mean)
        return Average(shares.average(shares.seen(self.mean)).squeeze(shares.dim))


class NoStatistic(NamedTuple):
    """The empty statistic of a stateless normalizer."""

    def pool(self, weights: Tensor, dim: int) -> NoStatistic:
        return self


class CountedMoments(NamedTuple):
    """`Moments` with the number of samples, which an unbiased variance needs.

    `count` `[..., 1]` is the total weight of the last merge; the count of a single row is 1. Batch statistics are
    merged with the number of rows as their weight, so `count` is then the number of samples in the window.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def pool(self, weights: Tensor, dim: int) -> CountedMoments:
        mean, var = Moments(self.mean, self.var).pool(weights, dim)
        if weights.ndim == 1:
            weights = weights.reshape((1,) * (dim % self.mean.ndim) + weights.shape)
        total = expand_mask(weights, self.mean).sum(dim, keepdim=True)[..., :1]
        pooled = [1 if axis == dim % self.count.ndim else n for axis, n in enumerate(self.count.shape)]
        return CountedMoments(mean, var, total.expand(pooled).squeeze(dim))
