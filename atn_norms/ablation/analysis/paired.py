"""Tests and intervals of a mean paired difference, for small numbers of seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from atn_norms.ablation.analysis import student
from atn_norms.ablation.analysis.intervals import Interval, mean

RESAMPLES = 10_000
RESAMPLED_FROM = 15  # pairs; below, resamples repeat too few values
SKEWED = 1.0  # skewness beyond which Student's t covers too seldom
ALPHA = 0.05
_EXACT = 14  # pairs whose 2^n sign flips are all counted
_ROUNDING = 1e-12  # relative spread up to which differences count as equal
Method = Literal["paired t", "paired t and studentized bootstrap"]


@dataclass(frozen=True)
class Paired:
    """Statistics of the mean of paired differences d; none depends on the order of the seeds.

        T* = (mean(d*) - mean(d)) / se(d*)          se(d) = sd(d) / sqrt(n)

    T* follows Student's t with n - 1 degrees of freedom: the paired t test (Student, 1908). With 15 pairs or more and
    a skewness above 1 in size, T* is also resampled: the studentized bootstrap (Efron, 1981; Hall, 1988). Each end of
    the interval is then the wider of both methods, and the p-value is the larger. The paired t test alone covers skewed
    differences too seldom. The bootstrap alone does so for symmetric differences with heavy tails, which are skewed by
    chance. Resamples are mirrored in pairs, so that the interval of -d is minus the interval of d.

    Equal differences have no spread, and T* has no distribution. Their p-value is that of the sign test: 2^(1-n).

    | symbol | meaning |
    |---|---|
    | `values` | d, at least two finite differences in one unit, in ascending order |
    | d* | n values drawn from d with replacement |

    >>> found = Paired.of([-1.2, -0.4, -0.9, -1.1, -0.6])
    >>> round(found.mean, 3), round(found.interval.low, 3), round(found.interval.high, 3), round(found.p, 4)
    (-0.84, -1.257, -0.423, 0.005)
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Paired | None:
        """Return the statistics of differences; None for fewer than two, which have no spread."""
        return cls(tuple(sorted(values))) if len(values) > 1 else None

    @cached_property
    def mean(self) -> float:
        """The mean difference."""
        return mean(self.values)

    @cached_property
    def _scaled(self) -> tuple[list[float], int]:
        """The differences over a power of 2, which is exact, and its exponent; the largest is near 1 in size.

        The squares of numbers below 1e-162 would be 0, and those of numbers above 1e154 would overflow.
        """
        exponent = math.frexp(max(map(abs, self.values)))[1]
        return [math.ldexp(value, -exponent) for value in self.values], exponent

    @cached_property
    def deviation(self) -> float:
        """The standard deviation of the differences (n - 1 in the denominator); 0 if they are equal up to rounding."""
        if self.values[-1] - self.values[0] <= _ROUNDING * max(map(abs, self.values)):
            return 0.0
        values, exponent = self._scaled
        centre = mean(values)
        variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
        return math.ldexp(math.sqrt(variance), exponent)

    @cached_property
    def skewness(self) -> float:
        """The third central moment over the second to the power 3/2; 0 if all differences are equal."""
        if not self.deviation:
            return 0.0
        values, _ = self._scaled
        n, centre = len(values), mean(values)
        second, third = (math.fsum((value - centre) ** power for value in values) / n for power in (2, 3))
        return third / second**1.5

    @cached_property
    def method(self) -> Method:
        """The name of the tests that give the interval and the p-values."""
        resampled = len(self.values) >= RESAMPLED_FROM and abs(self.skewness) > SKEWED
        return "paired t and studentized bootstrap" if resampled else "paired t"

    def interval_at(self, alpha: float) -> Interval:
        """Return the interval that contains the true mean with probability 1 - `alpha`."""
        error = self._error
        if not error:
            return Interval(self.mean, self.mean)
        low, high = self._quantile(alpha / 2), self._quantile(1 - alpha / 2)
        return Interval(self.mean - high * error, self.mean - low * error)

    @cached_property
    def interval(self) -> Interval:
        """The 95% interval of the mean difference."""
        return self.interval_at(ALPHA)

    @cached_property
    def p(self) -> float:
        """The two-sided p-value of "the mean difference is 0"."""
        return min(1.0, 2 * min(self._tails(self.mean)))

    def p_equivalence(self, margin: float) -> float:
        """The p-value of "the mean difference is `margin` or more, in either direction" (two one-sided tests).

        Schuirmann (1987). A small p-value shows that the mean difference is smaller than the margin.
        """
        below, _ = self._tails(self.mean - margin)
        _, above = self._tails(self.mean + margin)
        return max(below, above)

    @cached_property
    def p_sign_flip(self) -> float:
        """The two-sided p-value of the sign-flip permutation test, which assumes a symmetric distribution.

        Up to 14 pairs the test uses all 2^n signs, beyond 14 pairs 10,000 random ones. With all signs the p-value is
        at least 2^(1-n): 0.0625 at 5 pairs.
        """
        values = np.asarray(self.values)
        if len(values) <= _EXACT:
            signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
            extra = 0
        else:
            half = np.random.default_rng(0).choice((1.0, -1.0), size=(RESAMPLES // 2, len(values)))
            signs, extra = np.concatenate([half, -half]), 1
        seen = abs(float(values.sum()))
        reached = int((np.abs(signs @ values) >= seen * (1 - 1e-12)).sum())
        return (reached + extra) / (len(signs) + extra)

    @property
    def effect(self) -> float:
        """The mean difference in standard deviations; infinite if the differences are equal and not 0."""
        return self.standardized(self.mean)

    def standardized(self, difference: float) -> float:
        """Return a difference in units of the standard deviation of the differences."""
        if not difference:
            return 0.0
        return abs(difference) / self.deviation if self.deviation else math.inf

    @property
    def _error(self) -> float:
        return self.deviation / math.sqrt(len(self.values))

    @cached_property
    def _resampled(self) -> np.ndarray:
        """T* of 10,000 resamples, in ascending order."""
        sample, n = np.asarray(self._scaled[0]), len(self.values)
        draws = np.random.default_rng(0).integers(0, n, size=(RESAMPLES // 2, n))
        resamples = np.concatenate([sample[draws], sample[n - 1 - draws]])
        shifts, errors = resamples.mean(axis=1) - mean(self._scaled[0]), resamples.std(axis=1, ddof=1) / math.sqrt(n)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sort(np.nan_to_num(shifts / errors, nan=0.0, posinf=math.inf, neginf=-math.inf))

    def _quantile(self, q: float) -> float:
        t = student.quantile(q, len(self.values) - 1)
        if self.method == "paired t":
            return t
        if q > 0.5:
            return max(t, float(np.quantile(self._resampled, q, method="inverted_cdf")))
        return min(t, float(np.quantile(self._resampled, q, method="higher")))

    def _tails(self, distance: float) -> tuple[float, float]:
        """Return P(T* <= distance / se) and P(T* >= distance / se)."""
        if not self._error:
            unlikely = 0.5 ** len(self.values)  # all on one side, if each side is equally likely
            return (unlikely if distance < 0 else 1.0), (unlikely if distance > 0 else 1.0)
        t = distance / self._error
        tails = student.cdf(t, len(self.values) - 1), student.cdf(-t, len(self.values) - 1)
        if self.method == "paired t":
            return tails
        count = len(self._resampled)
        below = int(np.searchsorted(self._resampled, t, side="right"))
        above = count - int(np.searchsorted(self._resampled, t, side="left"))
        return max(tails[0], (below + 1) / (count + 1)), max(tails[1], (above + 1) / (count + 1))


def holm(values: Sequence[float]) -> list[float]:
    """Adjust the p-values of one family for their number (Holm, 1979); the order is kept.

        adjusted_(i) = max_(j <= i) min(1, (m - j + 1) p_(j))         p_(1) <= ... <= p_(m)

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted
