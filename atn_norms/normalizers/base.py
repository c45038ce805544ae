"""What a normalizer is: it measures one row, and normalizes it with what a window pooled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from atn_norms.registry import Options
from atn_norms.statistics import Statistic

LARGEST = 3e38  # what float32 holds, rounded down


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


@contextmanager
def scanning(normalizers: Sequence[Normalizer]) -> Iterator[None]:
    """One scan of several normalizers: their records are committed together when it ends, or not at all."""
    if not normalizers:
        yield
        return
    with normalizers[0].scanning(), scanning(normalizers[1:]):
        yield
