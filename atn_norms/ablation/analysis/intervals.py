"""Means, medians and the interval of a probability; none depends on the order of the seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

ENOUGH_SEEDS = 5
COVERAGE = 0.95
EXPLODED = 1e30  # next to a number of this size no mean and no axis shows the others


@dataclass(frozen=True)
class Interval:
    """The ends of an interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Return whether `value` lies strictly outside."""
        return value < self.low or value > self.high


def mean(values: Sequence[float]) -> float:
    """The mean, from a sum without rounding, so that no order of the values changes it; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the middle two; infinities rank at their ends; NaN of none.

    >>> median([1.0, 2.0, float("inf")]), median([1.0, float("inf")])
    (2.0, inf)
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else 0.0 if math.isinf(low) and math.isinf(high) else (low + high) / 2


def wilson(wins: float, of: int) -> Interval | None:
    """Wilson's score interval of a probability, 95% wide, from `wins` (ties as halves) in `of` trials.

        (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)        Wilson (1927)

    It does not shrink to a point when all trials agree. None without a trial.

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
