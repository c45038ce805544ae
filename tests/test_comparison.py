"""Paired statistics against closed forms and scipy, and what becomes of trials without a value."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from atn_norms.ablation.comparison import Difference, Point, bootstrap, compare, outcome
from tests.recorded import study, trial

INF = math.inf


def point(*values: float) -> Point:
    """A point whose seeds 0, 1, ... have these scores; infinity is a diverged one."""
    trials = []
    for seed, value in enumerate(values):
        made = trial("layer", ["1"], seed, 1.0 if math.isinf(value) else value)
        trials.append(replace(made, status="diverged") if math.isinf(value) else made)
    return Point(({"norm": "layer"},), tuple(trials), dict(enumerate(values)))


def between(ours: list[float], theirs: list[float]) -> Difference:
    return Difference.between(point(*ours), point(*theirs))


def test_the_interval_agrees_with_scipy():
    values = np.random.default_rng(3).lognormal(size=12)
    ours = bootstrap(list(values))
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=100_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours is not None
    # A quantile from 10,000 resamples has a standard error of about 0.02 standard errors of the mean; five of them.
    margin = 0.1 * float(values.std() / math.sqrt(len(values)))
    assert abs(ours.low - theirs.low) < margin
    assert abs(ours.high - theirs.high) < margin


def test_the_interval_is_the_exact_one_where_resamples_can_be_counted():
    # Of two values the mean of a resample is a, (a + b) / 2 or b with chances 1/4, 1/2, 1/4: the ends are a and b.
    found = bootstrap([3.0, 7.0])
    assert found is not None
    assert (found.low, found.high) == (3.0, 7.0)
    assert bootstrap([3.0]) is None
    assert bootstrap([]) is None


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(300, 20))
    found = [interval for row in draws if (interval := bootstrap(list(row)))]
    covered = np.mean([not interval.excludes(0.0) for interval in found])
    assert 0.88 < covered < 0.98  # 0.95 less the known shortfall of about 0.02 at n = 20, 300 trials: +- 4 * 0.014


def test_the_same_values_give_the_same_interval():
    values = list(np.random.default_rng(1).normal(size=9))
    assert bootstrap(values) == bootstrap(values)


def test_differences_are_paired_by_seed():
    ours, theirs = [1.0, 12.0, 103.0, 1004.0, 10005.0], [2.0, 13.0, 104.0, 1005.0, 10006.0]
    found = between(ours, theirs)
    assert (found.mean, found.interval) == (-1.0, bootstrap([-1.0] * 5))  # unpaired, the spread would drown it
    assert (found.improvement, found.pairs, found.verdict) == (1.0, 5, "better")
    assert between(theirs, ours).verdict == "worse"


def test_only_shared_seeds_are_paired():
    mine = replace(point(1.0, 2.0, 3.0), scores={0: 1.0, 2: 3.0, 7: 9.0})
    found = Difference.between(mine, point(5.0, 5.0, 5.0))
    assert (found.pairs, found.mean) == (2, -3.0)


def test_ties_count_half_in_the_probability_of_improvement():
    assert between([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0]).improvement == pytest.approx(2.5 / 4)


def test_mean_and_median_are_those_of_numpy():
    values = list(np.random.default_rng(0).normal(size=8))
    assert point(*values).mean == pytest.approx(np.mean(values), rel=1e-14)
    assert point(*values).median == pytest.approx(np.median(values), rel=1e-14)


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_no_direction_is_claimed_below_five_pairs(pairs):
    assert between([0.0] * pairs, [1.0] * pairs).verdict == "too few seeds"


def test_an_interval_around_zero_is_undecided():
    assert between([1.0, 2.0, 1.0, 2.0, 1.0, 2.0], [2.0, 1.0, 2.0, 1.0, 2.0, 1.0]).verdict == "undecided"


def test_a_diverged_trial_leaves_the_mean_loses_its_pair_and_forbids_the_verdict():
    found = between([0.1, 0.1, 0.1, 0.1, 0.1, INF], [0.2] * 6)
    assert (found.pairs, found.ranked, found.diverged) == (5, 6, 1)
    assert found.mean == pytest.approx(-0.1)
    assert found.improvement == pytest.approx(5 / 6)
    assert found.verdict == "undecided"
    assert between([0.2] * 6, [0.1, 0.1, 0.1, 0.1, 0.1, INF]).verdict == "undecided"


def test_a_diverged_trial_ranks_last_in_the_median():
    assert point(1.0, 2.0, INF).median == 2.0
    assert point(1.0, INF, INF).median == INF
    assert point(1.0, 2.0, INF).mean == 1.5


def test_every_trial_is_counted():
    whole = study(lambda norm, window, seed: 0.1)
    ends = {0: "failed", 1: "diverged", 2: "running", 3: "pending"}
    trials = tuple(
        replace(t, status=ends[t.seed], result=None)  # type: ignore[arg-type]
        if t.points[0]["norm"] == "layer" and t.seed in ends
        else t
        for t in whole.trials
    )
    (found,) = compare(replace(whole, trials=trials))
    row = found.at({"norm": "layer", "window": "25"})
    assert row is not None
    assert row.point.counts == {"done": 2, "failed": 1, "diverged": 1, "running": 1, "pending": 1}
    assert len(row.point.trials) == 6
    assert row.point.scores == {1: INF, 4: 0.1, 5: 0.1}


@pytest.mark.parametrize("value", [math.nan, INF, -INF, 1e31, None, "0.1"])
def test_a_finished_trial_without_a_finite_metric_counts_as_diverged(value):
    record = study(lambda norm, window, seed: 0.1, seeds=1)
    broken = replace(record.trials[0], result={"metrics": {"test": {"mean squared error": value}}})
    assert outcome(record, broken) == "diverged"
    (found,) = compare(replace(record, trials=(broken, *record.trials[1:])))
    assert found.rows[0].point.counts == {"diverged": 1}


def test_points_that_collapsed_are_one_row():
    (found,) = compare(study(lambda norm, window, seed: 0.1))
    assert [len(row.point.cells) for row in found.rows] == [2, 1, 1, 1, 1]
    assert found.at({"norm": "none", "window": "1"}) is found.at({"norm": "none", "window": "25"})
    assert found.rows[0].is_reference


def test_the_reference_has_the_baseline_labels_and_is_otherwise_the_same():
    record = study(lambda norm, window, seed: {"1": 1.0, "25": 3.0}[window] + seed + (norm == "rms"))
    (found,) = compare(record, {"norm": "layer"})
    against = {tuple(row.point.cells[0].values()): row.against for row in found.rows}
    one, many = against["rms", "1"], against["rms", "25"]
    assert one is not None
    assert many is not None
    assert (one.mean, many.mean) == (1.0, 1.0)
    assert against["none", "1"] is None, "its two cells have different partners"
    (windows,) = compare(record, {"window": "1"})
    assert [row.against.mean for row in windows.rows if row.against] == [2.0, 2.0]


def test_without_the_baseline_among_the_points_there_is_no_difference():
    record = study(lambda norm, window, seed: 0.1, baseline={"norm": "group"})
    (found,) = compare(record)
    assert not found.has_reference
    assert not any(row.is_reference for row in found.rows)


def test_rows_keep_the_order_of_the_grid_whatever_the_order_of_the_trials():
    record = study(lambda norm, window, seed: 0.1)
    shuffled = replace(record, trials=tuple(reversed(record.trials)))
    assert [row.point.cells for row in compare(shuffled)[0].rows] == [
        row.point.cells for row in compare(record)[0].rows
    ]
    assert [t.seed for t in compare(shuffled)[0].rows[1].point.trials] == list(range(6))
