"""Tests and intervals of paired differences: compare with scipy, and measure their coverage."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atn_norms.ablation.analysis import student
from atn_norms.ablation.analysis.paired import ALPHA, Paired, holm

DEGREES = (1, 2, 3, 4, 9, 10, 50, 199)


def paired(values) -> Paired:
    found = Paired.of(list(values))
    assert found is not None
    return found


@pytest.mark.parametrize("df", DEGREES)
def test_students_distribution_is_scipys(df):
    for t in (-5.0, -1.0, 0.0, 0.3, 2.0, 20.0):
        assert abs(student.cdf(t, df) - stats.t.cdf(t, df)) < 1e-12  # roundings of at most 100 terms
    for q in (0.001, 0.025, 0.4, 0.975, 0.9999):
        assert student.quantile(q, df) == pytest.approx(stats.t.ppf(q, df), rel=1e-9)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 10, 33, 34, 199, 1000])
def test_a_tail_is_exact_down_to_the_smallest_numbers(df):
    ts = [0.0, 0.5, 1.7, 1.75, 2.0, 5.0, 9.0, 20.0, 40.0, 100.0, 1e3, 1e6, 1e8]
    previous = 0.6
    for t in ts:
        exact, found = float(stats.t.sf(t, df)), student.cdf(-t, df)
        assert found == pytest.approx(exact, rel=1e-12, abs=1e-300)
        assert 0 <= found < previous or exact == 0
        assert student.cdf(t, df) == pytest.approx(1 - found, rel=1e-15)
        previous = found


def test_the_p_value_of_many_seeds_is_above_zero():
    values = [1.0 + 0.145 * (-1) ** seed for seed in range(34)]
    found = paired(values).p
    agreed: Any = stats.ttest_1samp(values, 0)
    assert 0 < found == pytest.approx(agreed.pvalue, rel=1e-10)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.003])
def test_power_is_that_of_the_noncentral_distribution(n, alpha):
    bound = stats.t.ppf(1 - alpha / 2, n - 1)
    for shift in (0.0, 0.7, 2.0, 4.0):
        other = np.nan_to_num(stats.nct.cdf(-bound, n - 1, shift))  # scipy has no number for a tail below 1e-10
        exact = stats.nct.sf(bound, n - 1, shift) + other
        assert abs(student.power(shift / math.sqrt(n), n, alpha) - exact) < 1e-7


@pytest.mark.parametrize(("effect", "alpha"), [(3.0, 0.05), (1.0, 0.05), (0.2, 0.01)])
def test_the_seeds_needed_are_the_fewest_that_have_the_power(effect, alpha):
    n = student.needed(effect, alpha)
    assert n is not None
    assert student.power(effect, n - 1, alpha) < student.POWER <= student.power(effect, n, alpha)


def test_no_number_of_seeds_shows_a_zero_effect():
    assert student.needed(0.0, 0.05) is None
    assert student.needed(1e-4, 0.05) is None


@pytest.mark.parametrize("n", [2, 5, 14])
def test_interval_and_p_value_are_those_of_the_paired_t_test(n):
    ours, theirs = np.random.default_rng(n).normal(size=(2, n))
    found = paired(ours - theirs)
    agreed: Any = stats.ttest_rel(ours, theirs)
    interval = agreed.confidence_interval()
    assert found.method == "paired t"
    assert found.p == pytest.approx(agreed.pvalue, abs=1e-12)
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    values = np.random.default_rng(1).normal(0.1, 0.2, size=8)
    lower: Any = stats.ttest_1samp(values, -0.5, alternative="greater")
    upper: Any = stats.ttest_1samp(values, 0.5, alternative="less")
    assert paired(values).p_equivalence(0.5) == pytest.approx(max(lower.pvalue, upper.pvalue), abs=1e-12)


def test_equivalence_is_shown_where_the_90_percent_interval_lies_within_the_margin():
    for values in np.random.default_rng(2).normal(0.1, 0.3, size=(50, 6)):
        found = paired(values)
        inner = found.interval_at(2 * ALPHA)
        assert (found.p_equivalence(0.4) < ALPHA) == (-0.4 < inner.low and inner.high < 0.4)


def test_the_sign_flip_test_is_scipys_permutation_test():
    values = np.random.default_rng(3).normal(0.3, 1.0, size=9)
    agreed = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=2**9, alternative="two-sided"
    )
    assert paired(values).p_sign_flip == pytest.approx(agreed.pvalue)
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0]).p_sign_flip == 2 / 2**5
    many = np.random.default_rng(4).normal(0.4, 1.0, size=30)
    other: Any = stats.ttest_1samp(many, 0)
    assert abs(paired(many).p_sign_flip - other.pvalue) < 0.02


@pytest.mark.parametrize("values", [[0.01, 0.04, 0.03], [0.5, 0.5], [1e-6], [0.02] * 4, []])
def test_holm_equals_its_step_down_procedure(values):
    adjusted = holm(values)
    assert len(adjusted) == len(values)
    for alpha in (0.001, 0.05, 0.0601, 0.3):
        order, rejected = sorted(range(len(values)), key=values.__getitem__), set()
        for rank, place in enumerate(order):
            if values[place] > alpha / (len(values) - rank):
                break
            rejected.add(place)
        assert {place for place, p in enumerate(adjusted) if p <= alpha} == rejected


def test_a_skewed_sample_of_enough_seeds_is_resampled():
    rng = np.random.default_rng(5)
    assert paired(rng.lognormal(size=14)).method == "paired t"
    assert paired(rng.lognormal(sigma=1.5, size=20)).method == "paired t and studentized bootstrap"
    assert paired(rng.normal(size=20)).method == "paired t"


def test_the_studentized_bootstrap_agrees_with_one_written_out():
    values = np.random.default_rng(6).lognormal(sigma=1.5, size=20)
    found = paired(values)._resampled * values.std(ddof=1) / math.sqrt(20)
    draws = values[np.random.default_rng(7).integers(0, 20, size=(200_000, 20))]
    t = (draws.mean(1) - values.mean()) / (draws.std(1, ddof=1) / math.sqrt(20))
    error = values.std(ddof=1) / math.sqrt(20)
    low, high = values.mean() - np.quantile(t, [0.975, 0.025]) * error
    # A quantile of 10,000 resamples is between those of 2.5% +- 0.5% (three standard errors of a proportion).
    lows, highs = (values.mean() - np.quantile(t, qs) * error for qs in ([0.98, 0.97], [0.03, 0.02]))
    assert lows[0] < values.mean() - np.quantile(found, 0.975) < lows[1]
    assert highs[0] < values.mean() - np.quantile(found, 0.025) < highs[1]
    assert lows[0] < low < lows[1]
    assert highs[0] < high < highs[1]


def test_interval_and_p_value_agree_about_zero():
    rng = np.random.default_rng(8)
    for n in (5, 15, 25):
        for _ in range(20):
            found = paired(rng.lognormal(sigma=1.2, size=n) - 2.5)
            margin = 1e-9 if found.method == "paired t" else 5e-3  # a resample at the edge
            if abs(found.p - ALPHA) > margin:
                assert (found.p < ALPHA) == found.interval.excludes(0.0)


VALUES = st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 3)), min_size=2, max_size=24)


@given(VALUES, st.randoms(use_true_random=False))
def test_neither_order_nor_sign_matters(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    one, other = paired(values), paired(shuffled)
    assert (one.mean, one.interval, one.p, one.p_sign_flip) == (other.mean, other.interval, other.p, other.p_sign_flip)
    mirrored = paired([-value for value in values])
    size = max(map(abs, values)) + 1.0
    assert mirrored.mean == -one.mean
    assert mirrored.method == one.method
    assert mirrored.interval.low == pytest.approx(-one.interval.high, abs=1e-9 * size)
    assert mirrored.p == pytest.approx(one.p, abs=1e-9)


@pytest.mark.parametrize("exponent", [-1000, -700, -300, 300, 700, 1000])
@pytest.mark.parametrize("values", [[0.5, 1.25, -0.75, 2.0], [0.1] * 9 + [0.2] * 9 + [-0.3, 0.4, 9.0]])
def test_statistics_do_not_depend_on_the_unit(values, exponent):
    """Squares of small numbers would be 0, which gave p = 0, and those of large numbers would overflow."""
    found, same = paired(values), paired([math.ldexp(value, exponent) for value in values])
    assert (same.p, same.p_sign_flip, same.method) == (found.p, found.p_sign_flip, found.method)
    assert same.effect == found.effect and same.skewness == found.skewness
    assert same.deviation == math.ldexp(found.deviation, exponent) > 0
    ends = (same.interval.low, same.interval.high)
    assert ends == (math.ldexp(found.interval.low, exponent), math.ldexp(found.interval.high, exponent))


def test_constant_differences_give_a_point_interval():
    same = paired([-2.0] * 5)
    assert (same.interval.low, same.interval.high, same.p, same.effect) == (-2.0, -2.0, 0.0625, math.inf)
    assert same.p == same.p_sign_flip, "without a spread only the signs count"
    assert (same.p_equivalence(3.0), same.p_equivalence(1.0)) == (0.03125, 1.0)
    zero = paired([0.0] * 5)
    assert (zero.p, zero.p_equivalence(0.1), zero.p_sign_flip, zero.effect) == (1.0, 0.03125, 1.0, 0.0)
    scores = [(0.55, 0.5), (0.6, 0.55), (0.85, 0.8), (0.3, 0.25), (0.95, 0.9)]
    rounded = paired([a - b for a, b in scores])
    assert rounded.values[0] < rounded.values[-1]
    assert (rounded.deviation, rounded.p) == (0.0, 0.0625), "equal but for rounding"
    assert paired([1e-200, 2e-200]).deviation > 0
    assert [student.power(math.inf, n, 0.05) for n in (5, 6)] == [0.0, 1.0]
    assert (student.needed(math.inf, 0.05), student.needed(math.inf, 0.05 / 60)) == (6, 12)
    assert Paired.of([1.0]) is None
    assert Paired.of([]) is None


Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
SHAPES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "bimodal": (lambda rng, shape: rng.choice([-1.0, 1.0], size=shape) + 0.3 * rng.normal(size=shape), 0.0),
    "log-normal": (lambda rng, shape: rng.lognormal(size=shape), math.exp(0.5)),
    "of log-normal scores": (lambda rng, shape: rng.lognormal(size=shape) - rng.lognormal(size=shape), 0.0),
    "of their logarithms": (lambda rng, s: np.log(rng.lognormal(size=s)) - np.log(rng.lognormal(size=s)), 0.0),
}
# The table of docs/report.md. Normal, bimodal and logarithmic differences have 93 to 97% at every n.
COVERED = {
    "normal": (0.95, 0.95, 0.95),
    "bimodal": (0.94, 0.94, 0.95),
    "log-normal": (0.82, 0.84, 0.92),
    "of log-normal scores": (0.97, 0.97, 0.97),
    "of their logarithms": (0.95, 0.95, 0.95),
}
DRAWS = 1500


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_coverage_of_an_interval_matches_the_page(shape, n):
    draw, centre = SHAPES[shape]
    rows = draw(np.random.default_rng(n), (DRAWS, n))
    covered = np.mean([not paired(row).interval.excludes(centre) for row in rows])
    stated = COVERED[shape][(5, 10, 20).index(n)]
    assert abs(covered - stated) < 0.005 + 3 * math.sqrt(stated * (1 - stated) / DRAWS)  # the table has two digits


@pytest.mark.parametrize(("n", "stated"), [(5, 0.033), (10, 0.004)])
def test_small_p_values_of_differences_with_two_modes_are_as_frequent_as_on_the_page(n, stated):
    rows = SHAPES["bimodal"][0](np.random.default_rng(n), (100_000, n))
    t = rows.mean(1) / (rows.std(1, ddof=1) / math.sqrt(n))
    assert np.mean(np.abs(t) > student.quantile(1 - ALPHA / 36 / 2, n - 1)) == pytest.approx(stated, abs=0.0015)


@pytest.mark.parametrize(("family", "half"), [(1, (0.67, 0.71)), (36, (0.28, 0.37))])
@pytest.mark.parametrize("effect", [0.5, 1.0, 1.5])
def test_the_seeds_needed_decide_as_often_as_on_the_page(effect, family, half):
    """`effect` is the margin in standard deviations; the true difference is 0 or half the margin."""
    alpha = ALPHA / family
    n = student.needed(effect, alpha)
    assert n is not None
    one, two = (student.quantile(1 - level, n - 1) for level in (alpha, alpha / 2))
    for share, (low, high) in ((0.0, (0.71, 0.89)), (0.5, half)):
        rows = np.random.default_rng(n).normal(share * effect, 1.0, size=(20_000, n))
        means, errors = rows.mean(1), rows.std(1, ddof=1) / math.sqrt(n)
        equal = np.abs(means) + one * errors < effect
        found = equal if not share else equal | (np.abs(means) > two * errors)
        assert low < found.mean() < high


def test_skewed_samples_of_20_are_covered_more_often_by_the_studentized_bootstrap_than_by_t_or_bca():
    """The reason for resampling skewed samples of many seeds, and for not using BCa."""
    draw, centre = SHAPES["log-normal"]
    rows = [row for row in draw(np.random.default_rng(20), (400, 20)) if paired(row).method != "paired t"]
    covered = {"studentized": 0, "t": 0, "BCa": 0}
    for row in rows:
        error = row.std(ddof=1) / math.sqrt(len(row)) * student.quantile(0.975, len(row) - 1)
        found: Any = stats.bootstrap((row,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(0))
        covered["studentized"] += not paired(row).interval.excludes(centre)
        covered["t"] += abs(row.mean() - centre) <= error
        covered["BCa"] += found.confidence_interval.low <= centre <= found.confidence_interval.high
    assert len(rows) > 200
    assert covered["studentized"] > max(covered["t"], covered["BCa"]) + 0.02 * len(rows)


def test_a_skewed_sample_has_the_wider_interval_and_the_larger_p_value_of_both_methods():
    """Skewness by chance: heavy tails without an effect made the bootstrap alone reject in 8% of the cases."""
    for values in np.random.default_rng(9).lognormal(sigma=1.5, size=(20, 20)) - 3.0:
        found, resampled = paired(values), paired(values)._resampled
        if found.method == "paired t":
            continue
        agreed: Any = stats.ttest_1samp(values, 0)
        error, interval = values.std(ddof=1) / math.sqrt(20), agreed.confidence_interval()
        low, high = values.mean() - np.quantile(resampled, [0.975, 0.025]) * error
        ends = min(low, interval.low), max(high, interval.high)
        assert (found.interval.low, found.interval.high) == pytest.approx(ends, abs=0.02)
        assert found.p >= agreed.pvalue * (1 - 1e-9)
        for margin in (0.5, 5.0):
            below: Any = stats.ttest_1samp(values, margin, alternative="less")
            assert found.p_equivalence(margin) >= below.pvalue * (1 - 1e-9)


@pytest.mark.parametrize("n", [5, 20])
def test_equal_arms_differ_in_one_study_in_twenty(n):
    rng, studies, comparisons = np.random.default_rng(n), 300, 6
    claimed = sum(
        min(holm([paired(row).p for row in rng.normal(size=(comparisons, n))])) < ALPHA for _ in range(studies)
    )
    assert claimed / studies < ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / studies)


@pytest.mark.parametrize(
    ("effect", "needed"), [(float("inf"), 7), (3.0, 4), (-0.2, 241), (0.028, None), (1e-200, None)]
)
def test_the_seeds_needed_are_found_by_a_few_powers(effect, needed, monkeypatch):
    calls, power = [], student.power
    monkeypatch.setattr(student, "power", lambda *arguments: calls.append(arguments) or power(*arguments))
    assert student.needed(effect, 0.025) == needed
    assert len(calls) <= 8, "a search from 2 takes 20"
