"""Normalizers: what a step measures of itself, and how a pooled statement normalizes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from atn_norms.registry import Options
from atn_norms.statistics import Average, CountedMoments, Moments, Statistic, promoted


class Normalizer(nn.Module, ABC):
    """Measure one row, normalize it with what a window pooled; the window itself is somebody else's business.

    | symbol | meaning | shape |
    |---|---|---|
    | `x` | pre-activations; every leading axis is a row | `[..., D]` |
    | statistic | one row's own statement | leaves `[..., d]` |
    | `pooled` | the same statement over the window | leaves `[..., d]`, or 1 where rows share it |
    | `step` | index of each live step since the state was fresh, -1 where no row is alive | `[...]`, int64 |

    `couples_batch` declares that a step's statement is about all of its rows together: AssortedTime then merges the
    batch before the window. What is not declared is not claimed.
    """

    couples_batch: bool = False

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def measure(self, x: Tensor) -> Statistic:
        """One row's own statement, for every row of `x` `[..., D]`; leaves in float64 where the device has it."""

    @abstractmethod
    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        """Normalize `x` `[..., D]` with the pooled statement; the result may keep a wider type than `x`."""

    def population(self, pooled: Any, step: Tensor) -> Any:
        """The statement to normalize with: the pooled one, unless a population's stands in for it."""
        return pooled

    @contextmanager
    def scanning(self) -> Iterator[None]:
        """Everything `population` records inside belongs to one scan; a no-op for what keeps no records."""
        yield

    def feature_moments(self) -> FeatureMoments | None:
        """Declare that `measure` and `normalize` are exactly `FeatureMoments`, and a fast backend may compute them."""
        return None


@dataclass(frozen=True)
class FeatureMoments:
    r"""The declaration of a normalizer that scales by moments over its features, group by group.

    $$y_i = g_i \frac{x_i - \mu_{G(i)}}{\sqrt{v_{G(i)} + \epsilon}} + b_i$$

    | symbol | meaning | shape |
    |---|---|---|
    | `groups` | equal blocks of neighbouring features, each with a statement of its own | |
    | `centred` | the statement is `Moments`; otherwise $\mu = 0$, and it is the `Average` of squares | |
    | `eps` | added inside the root | |
    | `gain`, `shift` | g and b; None where there is none | `[D]` |
    | `shape` | how one row's statement lies in its leaves; `(groups,)` unless it says otherwise | |
    """

    groups: int
    centred: bool
    eps: float
    gain: Tensor | None
    shift: Tensor | None
    shape: tuple[int, ...] = ()

    @property
    def leaf(self) -> tuple[int, ...]:
        """Trailing axes of a leaf of the statement."""
        return self.shape or (self.groups,)


def feature_moments(normalizer: Normalizer) -> FeatureMoments | None:
    """What a normalizer declares of itself, unless a subclass has changed what the declaration was made about."""
    order = type(normalizer).__mro__
    place = {
        name: next(i for i, base in enumerate(order) if name in vars(base))
        for name in ("feature_moments", "measure", "normalize", "population")
    }
    return normalizer.feature_moments() if place["feature_moments"] == min(place.values()) else None


class NormSpec(Options, ABC):
    """Options of a normalizer: a frozen model with a `kind`, which builds the normalizer for a number of features."""

    family: ClassVar[str | None] = "normalizer"
    kind: str

    @abstractmethod
    def build(self, features: int) -> Normalizer:
        """A fresh normalizer over `features` features; `ValueError` where these options cannot serve that many."""


def checked_features(features: int) -> int:
    """`features` as it is; `TypeError` or `ValueError` if it is no positive integer."""
    if isinstance(features, bool) or not isinstance(features, int):
        raise TypeError(f"features: {features!r} is {type(features).__name__}; allowed: an integer of at least 1")
    if features < 1:
        raise ValueError(f"features: {features}; allowed: an integer of at least 1")
    return features


def checked_eps(eps: float) -> float:
    """`eps` as it is; `ValueError` if it is negative or not finite."""
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: {eps}; allowed: a finite number of at least 0")
    return eps


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

    def __init__(self, features: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.features, self.eps = checked_features(features), checked_eps(eps)
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, shift 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def measure(self, x: Tensor) -> Moments:
        return Moments.of(x)

    def normalize(self, x: Tensor, pooled: Moments) -> Tensor:
        return (x - pooled.mean) * torch.rsqrt(pooled.var + self.eps) * self.weight + self.bias

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(1, True, self.eps, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}"


class LayerNormSpec(NormSpec):
    """Options of `LayerNorm`."""

    kind: Literal["layer"] = "layer"
    eps: float = Field(default=1e-5, ge=0, description="added to the variance, inside the root")

    def build(self, features: int) -> LayerNorm:
        return LayerNorm(features, eps=self.eps)


class RMSNorm(Normalizer):
    r"""Scale by the pooled root mean square over the features; nothing is centred.

    $$y = g \odot \frac{a}{\sqrt{\overline{a^2} + \epsilon}} \; (+\, b)$$

    Source: Zhang, Sennrich, arXiv 1910.07467; pooled over time: the mean square over window and features (derived).

    | symbol | meaning | shape |
    |---|---|---|
    | `weight` | gain g, starts at 1 | `[D]` |
    | `bias` | shift b, starts at 0; None unless asked for | `[D]` |
    | `eps` | added to the mean square, inside the root; unit of the input squared | |

    >>> import torch
    >>> from atn_norms import AssortedTime, RMSNorm
    >>> x = torch.randn(5, 2, 8, dtype=torch.float64)
    >>> y, _ = AssortedTime(RMSNorm(8), window=1).scan(x)
    >>> torch.allclose(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-5), atol=1e-12)
    True
    """

    bias: nn.Parameter | None

    def __init__(self, features: int, *, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        self.features, self.eps = checked_features(features), checked_eps(eps)
        self.weight = nn.Parameter(torch.empty(features))
        self.register_parameter("bias", nn.Parameter(torch.empty(features)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, shift 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def measure(self, x: Tensor) -> Average:
        return Average.of(promoted(x).square())

    def normalize(self, x: Tensor, pooled: Average) -> Tensor:
        y = x * torch.rsqrt(pooled.mean + self.eps) * self.weight
        return y if self.bias is None else y + self.bias

    def feature_moments(self) -> FeatureMoments:
        return FeatureMoments(1, False, self.eps, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, bias={self.bias is not None}"


class RMSNormSpec(NormSpec):
    """Options of `RMSNorm`."""

    kind: Literal["rms"] = "rms"
    eps: float = Field(default=1e-5, ge=0, description="added to the mean square, inside the root")
    bias: bool = Field(default=False, description="whether to learn a shift too")

    def build(self, features: int) -> RMSNorm:
        return RMSNorm(features, eps=self.eps, bias=self.bias)


class BatchNorm(Normalizer):
    r"""Centre and scale each feature by its mean and variance over batch and window; populations stand in later.

    $$y = g \odot \frac{a - \mu}{\sqrt{v + \epsilon}} + b, \qquad
    \hat\mu \leftarrow (1 - m)\,\hat\mu + m\,\mu, \qquad \hat v \leftarrow (1 - m)\,\hat v + m\,\tfrac{n}{n-1} v$$

    Source: Ioffe, Szegedy, arXiv 1502.03167; in recurrent networks Cooijmans et al., arXiv 1603.09025, who keep one
    population per time step and start the gain at 0.1; pooled over time: live rows of every step in the window, each
    counting alike (derived). In training the window's own statistic is used and recorded: one update per scan, with
    the mean over its live steps; or, with `max_steps`, one per step index below it. In evaluation the population is
    used, nothing mixes rows, and steps later than any that was recorded reuse the last one.

    | symbol | meaning | shape |
    |---|---|---|
    | `weight`, `bias` | gain g, starts at `initial_gain`; shift b, starts at 0 | `[D]` |
    | `running_mean`, `running_var` | population, starts at 0 and 1 | `[D]`, or `[max_steps, D]` |
    | `num_batches_tracked` | updates so far | `[]`, or `[max_steps]` |
    | `momentum` | m in (0, 1]; None averages all updates alike | |
    | n | live rows in the window | |

    Errors: `ValueError` for a single row in training, as in torch.

    >>> import torch
    >>> from atn_norms import AssortedTime, BatchNorm
    >>> norm = AssortedTime(BatchNorm(8), window=1)
    >>> y, _ = norm.scan(torch.randn(5, 16, 8))
    >>> y.mean(1).abs().max() < 1e-6
    tensor(True)
    """

    couples_batch = True
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        max_steps: int | None = None,
        initial_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.features, self.eps = checked_features(features), checked_eps(eps)
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum: {momentum}; allowed: a number in (0, 1], or None for the mean of all updates")
        if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1):
            raise ValueError(f"max_steps: {max_steps}; allowed: an integer of at least 1, or None for one population")
        self.momentum, self.max_steps, self.initial_gain = momentum, max_steps, initial_gain
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        steps = () if max_steps is None else (max_steps,)
        self.register_buffer("running_mean", torch.empty(*steps, features))
        self.register_buffer("running_var", torch.empty(*steps, features))
        self.register_buffer("num_batches_tracked", torch.empty(steps, dtype=torch.int64))
        self._records: list[tuple[CountedMoments, Tensor]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain `initial_gain`, shift 0, and a population of mean 0 and variance 1."""
        nn.init.constant_(self.weight, self.initial_gain)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def measure(self, x: Tensor) -> CountedMoments:
        if self.training and x.ndim > 1 and x.shape[-2] == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {list(x.shape)}; "
                f"allowed: a batch of at least 2 rows, or evaluation mode"
            )
        rows = promoted(x)
        return CountedMoments(rows, torch.zeros_like(rows), torch.ones_like(rows[..., :1]))

    def normalize(self, x: Tensor, pooled: Moments | CountedMoments) -> Tensor:
        return (x - pooled.mean) * torch.rsqrt(pooled.var + self.eps) * self.weight + self.bias

    def population(self, pooled: CountedMoments, step: Tensor) -> Moments | CountedMoments:
        if self.training:
            with torch.no_grad():
                record = CountedMoments(*(leaf.detach() for leaf in pooled)), step
                if self._records is None:
                    self._update([record])
                else:
                    self._records.append(record)
            return pooled
        mean, var = promoted(self.running_mean), promoted(self.running_var)
        if self.max_steps is not None:
            last = ((self.num_batches_tracked > 0).sum() - 1).clamp(min=0)
            place = torch.minimum(step.clamp(min=0), last)
            mean, var = mean[place], var[place]
        return Moments(mean.expand(pooled.mean.shape), var.expand(pooled.var.shape))

    @contextmanager
    def scanning(self) -> Iterator[None]:
        if self._records is not None:  # an outer scan commits
            yield
            return
        self._records = []
        try:
            yield
            with torch.no_grad():
                self._update(self._records)
        finally:
            self._records = None

    def _update(self, records: list[tuple[CountedMoments, Tensor]]) -> None:
        """Average the recorded steps of each slot of the population, and move the slot towards that average."""
        if not records:
            return
        step = torch.cat([step.flatten() for _, step in records])
        mean, var, count = (
            torch.cat([leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves])
            for leaves in zip(*(pooled for pooled, _ in records), strict=True)
        )
        var = var * torch.where(count > 1, count / (count - 1), 1.0)
        alive = step >= 0
        slots = 1 if self.max_steps is None else self.max_steps
        slot = torch.zeros_like(step) if self.max_steps is None else step
        member = alive & (slot == torch.arange(slots, device=step.device).unsqueeze(1))  # [slots, recorded steps]
        share = member.to(mean.dtype) / member.sum(1, keepdim=True).clamp(min=1)
        touched = member.any(1)
        tracked = self.num_batches_tracked.reshape(slots) + touched
        updates = tracked.clamp(min=1).to(mean.dtype)
        rate = 1.0 / updates if self.momentum is None else torch.full_like(updates, self.momentum)
        rate = torch.where(touched, rate, 0.0).unsqueeze(1)
        for running, leaf in ((self.running_mean, mean), (self.running_var, var)):
            old = promoted(running).reshape(slots, -1)
            new = share @ torch.where(alive.unsqueeze(1), leaf, 0.0)
            running.copy_(torch.where(rate > 0, old + rate * (new - old), old).reshape(running.shape))
        self.num_batches_tracked.copy_(tracked.reshape(self.num_batches_tracked.shape))

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, momentum={self.momentum}, max_steps={self.max_steps}"


class BatchNormSpec(NormSpec):
    """Options of `BatchNorm`."""

    kind: Literal["batch"] = "batch"
    eps: float = Field(default=1e-5, ge=0, description="added to the variance, inside the root")
    momentum: float | None = Field(
        default=0.1, gt=0, le=1, description="weight of one update; null: mean of all updates"
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="one population per step up to here; null: one for all"
    )
    initial_gain: float = Field(default=1.0, description="what the gain starts at (0.1 in arXiv 1603.09025)")

    def build(self, features: int) -> BatchNorm:
        return BatchNorm(
            features,
            eps=self.eps,
            momentum=self.momentum,
            max_steps=self.max_steps,
            initial_gain=self.initial_gain,
        )


class PerGate(Normalizer):
    """One normalizer for each gate of a site: the features are cut into equal blocks that never meet.

    | symbol | meaning | shape |
    |---|---|---|
    | `gates` | G normalizers over D / G features each | |
    | statistic | the gates' own statistics, stacked | leaves `[..., G, d]` |
    """

    def __init__(self, gates: Sequence[Normalizer]) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)
        self.couples_batch = gates[0].couples_batch

    def measure(self, x: Tensor) -> Any:
        return self._stack([gate.measure(part) for gate, part in self._parts(x)])

    def normalize(self, x: Tensor, pooled: Any) -> Tensor:
        return torch.cat([g.normalize(part, self._of(pooled, i)) for i, (g, part) in enumerate(self._parts(x))], -1)

    def population(self, pooled: Any, step: Tensor) -> Any:
        return self._stack([gate.population(self._of(pooled, i), step) for i, gate in enumerate(self._gates())])

    @contextmanager
    def scanning(self) -> Iterator[None]:
        with scanning(self._gates()):
            yield

    def feature_moments(self) -> FeatureMoments | None:
        every = [feature_moments(gate) for gate in self._gates()]
        known = [moments for moments in every if moments is not None]
        first = known[0] if known else None
        if first is None or len(known) < len(every):
            return None
        if len({(m.groups, m.centred, m.eps, m.gain is None, m.shift is None) for m in known}) > 1:
            return None
        return FeatureMoments(
            first.groups * len(known),
            first.centred,
            first.eps,
            _joined([m.gain for m in known]),
            _joined([m.shift for m in known]),
            (len(known), *first.leaf),
        )

    def _gates(self) -> list[Normalizer]:
        return [gate for gate in self.gates if isinstance(gate, Normalizer)]

    def _parts(self, x: Tensor) -> Iterator[tuple[Normalizer, Tensor]]:
        return zip(self._gates(), x.chunk(len(self.gates), -1), strict=True)

    @staticmethod
    def _stack(statistics: Sequence[Any]) -> Any:
        return type(statistics[0])(*(torch.stack(leaves, -2) for leaves in zip(*statistics, strict=True)))

    @staticmethod
    def _of(pooled: Any, gate: int) -> Any:
        return type(pooled)(*(leaf[..., gate, :] for leaf in pooled))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None


@contextmanager
def scanning(normalizers: Sequence[Normalizer]) -> Iterator[None]:
    """One scan of several normalizers: their records are committed together when it ends, or not at all."""
    if not normalizers:
        yield
        return
    with normalizers[0].scanning(), scanning(normalizers[1:]):
        yield
