"""Means, medians and the interval of a probability; none depends on the order of the seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

ENOUGH_SEEDS = 5
COVERAGE = 0.95
EXPLODED = 1e30  # a number of this size hides all others in a mean or on an axis


@dataclass(frozen=True)
class Interval:
    """The ends of an interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Return True if `value` is strictly outside the interval."""
        return value < self.low or value > self.high


def mean(values: Sequence[float]) -> float:
    """Return the mean, from an exact sum, so that the order of the values has no effect; NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def median(values: Iterable[float]) -> float:
    """Return the median, where infinite values rank first or last; NaN without values.

    >>> median([1.0, 2.0, float("inf")]), median([1.0, float("inf")])
    (2.0, inf)
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else 0.0 if math.isinf(low) and math.isinf(high) else (low + high) / 2


def wilson(wins: float, of: int) -> Interval | None:
    """Return Wilson's 95% score interval of a probability, from `wins` in `of` trials; a tie is half a win.

        (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)        Wilson (1927)

    The interval has a positive width even if all trials agree. Return None for `of = 0`.

    >>> found = wilson(5, 5)
    >>> round(found.low, 3), found.high
    (0.566, 1.0)
    """
    if not of:
        return None
    z, p = NormalDist().inv_cdf((1 + COVERAGE) / 2), wins / of
    centre, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))
