"""Student's t distribution for whole degrees of freedom, and the power of a paired t test, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

MOST_SEEDS = 10_000  # larger numbers of seeds are not practical
POWER = 0.8
_CENTRE = 3.0  # t^2 below which a tail is so large that 1 - P(|T| <= t) loses no more than two digits
_NODES = 2_000  # of the trapezoid rule over the logarithm of the spread; the error is below 1e-9
_DIGITS = 9  # of a power, so that every machine computes the same number


def within(t: float, df: int) -> float:
    """Return P(|T| <= t) of Student's t with `df` degrees of freedom (Abramowitz, Stegun, 26.7.3 and 26.7.4).

    >>> round(within(2.776445, 4), 6), within(float("inf"), 3)
    (0.95, 1.0)
    """
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = df % 2
    term, total = 1.0, 0.0
    for i in range(df // 2):  # cos^(2i), or cos^(2i + 1), with its coefficient
        total += term
        term *= square * ((2 * i + 2) / (2 * i + 3) if odd else (2 * i + 1) / (2 * i + 2))
    return 2 / math.pi * (angle + sine * math.cos(angle) * total) if odd else sine * total


def cdf(t: float, df: int) -> float:
    """Return P(T <= t) of Student's t with `df` degrees of freedom; a small tail keeps all its digits.

    >>> cdf(0.0, 3), f"{cdf(-40.0, 33):.6e}"
    (0.5, '7.651542e-30')
    """
    if t * t < _CENTRE:
        return 0.5 + math.copysign(within(t, df) / 2, t)
    return _tail(-t, df) if t < 0 else 1 - _tail(t, df)


def _tail(t: float, df: int) -> float:
    """Return P(T >= t) for t > 0: half the incomplete beta function I_x(df/2, 1/2) by its series in x.

        x = df / (df + t^2)                                         (Abramowitz, Stegun, 26.5.4 and 26.7.1)

    All terms are positive, so no digits cancel, as they do in 1 - P(|T| <= t).
    """
    a, ratio = df / 2, t * t / df
    x = 1 / (1 + ratio)
    beta = math.pi if df % 2 else 2.0  # B(1/2, 1/2), or B(1, 1/2)
    for i in range(2 - df % 2, df, 2):
        beta *= i / (i + 1)
    term, total, n = 1.0, 0.0, 0
    while term > 1e-17 * total:
        total += term
        term *= x * (a + 0.5 + n) / (a + 1 + n)
        n += 1
    return math.exp(-a * math.log1p(ratio)) * math.sqrt(1 - x) * total / (df * beta)


@lru_cache(maxsize=1024)
def quantile(q: float, df: int) -> float:
    """Return the t with P(T <= t) = q, for 0 < q < 1.

    >>> round(quantile(0.975, 4), 6), quantile(0.5, 7)
    (2.776445, 0.0)
    """
    if q == 0.5:
        return 0.0
    share, low, high = abs(2 * q - 1), 0.0, 1.0
    while within(high, df) < share:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if within(middle, df) < share else (low, middle)
    return math.copysign(high, q - 0.5)


def power(effect: float, n: int, alpha: float) -> float:
    """Return the probability that a paired t test at level `alpha` rejects "no difference".

        E_S[ Phi(d sqrt(n) - c S) + Phi(-d sqrt(n) - c S) ],   S^2 ~ chi^2_(n-1) / (n-1),   c = t_(n-1)(1 - alpha/2)

    | symbol | meaning |
    |---|---|
    | `effect` | d, the true mean difference over the true standard deviation of the differences |
    | `n` | pairs |
    | `alpha` | level of the test, two-sided |

    >>> round(power(1.0, 10, 0.05), 3), round(power(0.0, 10, 0.05), 3)
    (0.803, 0.05)
    """
    if n < 2:
        return 0.0
    if math.isinf(effect):  # equal differences, which the sign test rejects or not
        return float(0.5 ** (n - 1) < alpha)
    df, shift = n - 1, abs(effect) * math.sqrt(n)
    bound = quantile(1 - alpha / 2, df)
    wide = 12 / math.sqrt(2 * df)  # twelve deviations of log S; its lower tail falls as S^df only
    first = -wide - 40 / df
    logs = [first + (wide - first) * node / (_NODES - 1) for node in range(_NODES)]
    spreads = [math.exp(log) for log in logs]
    exponents = [df * (log - spread**2 / 2) for log, spread in zip(logs, spreads, strict=True)]
    largest = max(exponents)
    density = [math.exp(exponent - largest) for exponent in exponents]
    normal = NormalDist().cdf
    rejected = (normal(shift - bound * spread) + normal(-shift - bound * spread) for spread in spreads)
    total = math.fsum(chance * share for chance, share in zip(rejected, density, strict=True))
    return round(total / math.fsum(density), _DIGITS)


def needed(effect: float, alpha: float, wanted: float = POWER) -> int | None:
    """Return the smallest number of pairs at which a paired t test has the `wanted` power; None above `MOST_SEEDS`.

    >>> needed(1.0, 0.05), needed(0.0, 0.05)
    (10, None)
    """
    if not effect:
        return None
    high = _about(effect, alpha, wanted)
    low, step = high - 1, 1
    while power(effect, high, alpha) < wanted:
        if high == MOST_SEEDS:
            return None
        low, high, step = high, min(high + step, MOST_SEEDS), 2 * step
    while power(effect, low, alpha) >= wanted:
        low, high, step = max(low - step, 1), low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, alpha) >= wanted else (middle, high)
    return high


def _about(effect: float, alpha: float, wanted: float) -> int:
    """Approximate `needed` by the normal distribution, with a correction for the estimated spread."""
    bound, reach = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(wanted)
    root = (bound + reach) / abs(effect)
    return max(2, math.ceil(min(MOST_SEEDS, min(root, MOST_SEEDS) ** 2 + bound**2 / 2)))
