"""Paired statistics against closed forms and scipy, and the treatment of trials without a value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atn_norms.ablation.analysis.comparison import Difference, Measure, Point, compare, compare_task, outcome
from atn_norms.ablation.analysis.intervals import median, wilson
from atn_norms.ablation.analysis.time_to_target import level, steps_to
from atn_norms.ablation.report.findings import findings
from atn_norms.ablation.report.names import MINUS, change
from atn_norms.ablation.report.sentences import caution
from atn_norms.ablation.store.records import Goal, StudyRecord, TaskFacts
from tests.recorded import METRIC, grid, study, trial

INF = math.inf


def point(*values: float, goal: Goal = "min", limit: float | None = None, seeds: list[int] | None = None) -> Point:
    """Return a point with these scores of seeds 0, 1, ...; infinite: diverged, or `limit` steps without the level."""
    named = list(range(len(values))) if seeds is None else seeds
    lost = "diverged" if limit is None else "done"
    return Point(
        cells=({"norm": "layer"},),
        trials=tuple(trial("layer", ["1"], seed, 1.0) for seed in named),
        ends={seed: lost if math.isinf(value) else "done" for seed, value in zip(named, values, strict=True)},
        scores=dict(zip(named, values, strict=True)),
        measure=Measure("loss", goal, lambda trial: None, limit),
    )


def between(ours: list[float], theirs: list[float]) -> Difference:
    return Difference.between(point(*ours), point(*theirs))


def test_differences_are_paired_by_seed():
    ours, theirs = [0.0, 1.0, 12.0, 103.0, 1004.0, 10005.0], [1.0, 2.0, 13.0, 104.0, 1005.0, 10006.0]
    found = between(ours, theirs)
    assert found.mean == -1.0  # unpaired, the spread would hide it
    assert (found.improvement, found.pairs, found.verdict) == (1.0, 6, "helps")
    assert between(theirs, ours).verdict == "hurts"


def test_equal_differences_have_no_interval():
    """One point would exclude 0 with five seeds, where the p-value is 0.06 and the comparison undecided."""
    found = between([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found.interval, found.effect_interval, found.p, found.verdict) == (None, None, 0.0625, "undecided")
    assert point(1.0, 1.0, 1.0).interval is None
    assert change(found) == f"{MINUS}1.00 (5 seeds)"


def test_only_shared_seeds_are_paired():
    mine = point(1.0, 3.0, 9.0, seeds=[0, 2, 7])
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
    assert between([0.0] * pairs, [1.0] * pairs).verdict == "undecided"


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
    none = against["none", "1"]
    assert none is not None, "its two cells have different partners, of which the first counts"
    assert none.reference.cells == ({"norm": "layer", "window": "1"},)
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


@pytest.mark.parametrize(("wins", "of"), [(0, 5), (3, 5), (5, 5), (1, 1), (7, 20)])
def test_the_interval_of_a_probability_is_scipys_wilson(wins, of):
    found = wilson(wins, of)
    agreed = stats.binomtest(wins, of).proportion_ci(method="wilson")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((agreed.low, agreed.high), abs=1e-12)
    assert wilson(0, 0) is None


REALS = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
SCORES = st.one_of(REALS, REALS, REALS, st.just(INF))
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=9)


@given(PAIRS, st.randoms(use_true_random=False))
def test_permuting_the_seeds_changes_nothing(pairs, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    ours, theirs = zip(*pairs, strict=True)
    straight = Difference.between(point(*ours), point(*theirs))
    shuffled = Difference.between(
        point(*(ours[i] for i in order), seeds=order), point(*reversed(theirs), seeds=[*reversed(range(len(pairs)))])
    )
    renamed = Difference.between(point(*(ours[i] for i in order)), point(*(theirs[i] for i in order)))
    for name in ("mean", "interval", "median", "pairs", "improvement", "chance", "ranked", "diverged", "verdict"):
        assert repr(getattr(straight, name)) == repr(getattr(shuffled, name)), name
        assert repr(getattr(straight, name)) == repr(getattr(renamed, name)), name


@given(PAIRS)
def test_swapping_the_sides_mirrors_everything(pairs):
    ours, theirs = zip(*pairs, strict=True)
    one, other = between(list(ours), list(theirs)), between(list(theirs), list(ours))
    mirrored = {"helps": "hurts", "hurts": "helps"}
    assert other.verdict == mirrored.get(one.verdict, one.verdict)
    assert (other.pairs, other.diverged) == (one.pairs, one.reference_diverged)
    assert other.improvement == pytest.approx(1 - one.improvement)
    assert other.mean == -one.mean or math.isnan(one.mean)
    if one.interval:
        assert other.interval is not None
        size = max(abs(one.interval.low), abs(one.interval.high), 1.0)
        assert other.interval.low == pytest.approx(-one.interval.high, abs=1e-12 * size)
        assert other.interval.high == pytest.approx(-one.interval.low, abs=1e-12 * size)


@given(PAIRS)
def test_a_score_to_be_raised_is_a_loss_with_its_sign_flipped(pairs):
    ours, theirs = zip(*pairs, strict=True)
    loss = between(list(ours), list(theirs))
    raised = Difference.between(
        point(*(-value for value in ours), goal="max"), point(*(-value for value in theirs), goal="max")
    )
    same = ("pairs", "improvement", "chance", "ranked", "diverged", "reference_diverged", "verdict")
    assert [getattr(raised, name) for name in same] == [getattr(loss, name) for name in same]
    assert raised.mean == -loss.mean or math.isnan(loss.mean)
    assert raised.median == -loss.median


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, INF, math.nan, None]), min_size=1, max_size=7))
def test_no_seed_is_ever_lost(values):
    """Every seed is counted once, and ranks if it has an outcome."""
    record = study(lambda norm, window, seed: 1.0, norms=["none", "layer"], windows=["1"], seeds=len(values))
    trials = [
        replace(t, status="failed", result=None)
        if value is None
        else replace(t, result={"step": 20, "metrics": {"test": {METRIC: value}}})
        for t, value in zip(record.trials[len(values) :], values, strict=True)
    ]
    (found,) = compare(replace(record, trials=(*record.trials[: len(values)], *trials)))
    row = found.at({"norm": "layer", "window": "1"})
    assert row is not None
    assert row.against is not None
    ends = ["failed" if v is None else "done" if math.isfinite(v) else "diverged" for v in values]
    assert row.point.counts == {end: ends.count(end) for end in set(ends)}
    assert row.against.ranked == len(values) - ends.count("failed")
    assert (row.against.pairs, row.against.diverged) == (ends.count("done"), ends.count("diverged"))
    assert len(row.point.trials) == len(values)


def test_one_seed_has_a_difference_and_no_interval():
    found = between([1.0], [3.0])
    assert (found.mean, found.interval, found.pairs, found.verdict) == (-2.0, None, 1, "undecided")
    none = between([INF], [INF])
    assert (none.pairs, none.improvement, none.median, none.verdict) == (0, 0.5, 0.0, "undecided")
    assert math.isnan(none.mean)


def test_all_ties_are_undecided():
    found = between([1.0] * 6, [1.0] * 6)
    assert (found.mean, found.improvement, found.verdict) == (0.0, 0.5, "undecided")


def test_an_accuracy_is_compared_by_the_larger():
    facts = TaskFacts("accuracy", {"the most common": 0.1}, "max")
    record = grid(
        {"norm": ["none", "layer"]}, lambda p, s: {"none": 0.6, "layer": 0.9 + 0.002 * s}[p["norm"]] + 0.01 * s,
        baseline={"norm": "none"}, facts=facts,
    )  # fmt: skip
    diverged = replace(record.trials[-1], status="diverged", result={"step": 3, "metrics": {}})
    (found,) = compare(record)
    assert found.best is found.at({"norm": "layer"})
    assert [row.against.verdict for row in found.rows if row.against] == ["helps"]
    (found,) = compare(replace(record, trials=(*record.trials[:-1], diverged)))
    row = found.at({"norm": "layer"})
    assert row is not None
    assert row.against is not None
    assert (row.point.scores[4], row.against.diverged, row.against.improvement) == (-INF, 1, 0.8)


def reaching(validations: Mapping[str, Sequence[float | None]], steps: int = 40, goal: Goal = "min") -> StudyRecord:
    """Return a study in which all seeds of a normalizer have these validations, ten steps apart."""
    facts = TaskFacts(METRIC, {"guess": 1.0}, goal)
    record = grid({"norm": list(validations)}, lambda p, s: 0.0, baseline={"norm": "none"}, facts=facts, steps=steps)
    return replace(
        record,
        trials=tuple(
            replace(
                t,
                curve=[
                    {"step": 10 * i, "train_loss": float(t.seed), "validation": value}
                    for i, value in enumerate(validations[t.points[0]["norm"]], 1)
                ],
            )
            for t in record.trials
        ),
    )


def steps_of(record: StudyRecord, given: float | None = None) -> dict[str, Point]:
    to = level(record, "adding", given)
    found = compare_task(record, "adding", steps_to(record, "adding", to))
    return {row.point.cells[0]["norm"]: row.point for row in found.rows}


def test_a_level_is_reached_at_the_first_measurement_that_is_there():
    record = reaching({"none": [0.9, -1e31, 0.3, 0.9], "layer": [0.9, 0.5, 0.2, 0.1], "rms": [0.9, 0.8, 0.7, 0.51]})
    found = steps_of(record, 0.5)
    assert set(found["none"].scores.values()) == {30.0}, "a validation out of bounds reaches nothing"
    assert set(found["layer"].scores.values()) == {20.0}, "at the level is there"
    assert set(found["rms"].scores.values()) == {INF}
    assert (found["rms"].mean, found["rms"].median, found["rms"].lost) == (40.0, INF, 5)


def test_a_level_to_be_climbed_to_is_reached_from_below():
    found = steps_of(reaching({"none": [0.1, 0.5, 0.9, 0.8]}, goal="max"), 0.85)
    assert set(found["none"].scores.values()) == {30.0}


def test_a_trial_that_never_reaches_the_level_counts_with_all_steps_and_ties_with_its_like():
    record = reaching({"none": [0.9] * 4, "layer": [0.9] * 4, "rms": [0.9, 0.4, 0.4, 0.4]})
    to = level(record, "adding", 0.5)
    rows = compare_task(record, "adding", steps_to(record, "adding", to)).rows
    against = {row.point.cells[0]["norm"]: row.against for row in rows}
    never, soon = against["layer"], against["rms"]
    assert never is not None
    assert soon is not None
    assert (never.mean, never.improvement, never.pairs, never.verdict) == (0.0, 0.5, 5, "undecided")
    assert (soon.mean, soon.improvement, soon.pairs, soon.p) == (-20.0, 1.0, 5, 0.0625)


def test_a_trial_that_reaches_the_level_at_the_last_step_is_ahead_of_one_that_never_does():
    record = reaching({"none": [0.9] * 4, "late": [0.9, 0.9, 0.9, 0.4]})
    rows = compare_task(record, "adding", steps_to(record, "adding", level(record, "adding", 0.5))).rows
    (late,) = [row.against for row in rows if row.against]
    assert (late.mean, late.improvement, late.verdict) == (0.0, 1.0, "undecided")


def test_longer_training_is_no_head_start():
    """Steps beyond the end of the shortest trial are ignored."""
    record = reaching({"none": [0.9] * 4, "layer": [0.9] * 5 + [0.1]})
    longer = tuple(
        replace(t, trial={**t.trial, "train": {"steps": 60}}) if t.points[0]["norm"] == "layer" else t
        for t in record.trials
    )
    found = steps_of(replace(record, trials=longer), 0.5)
    assert set(found["layer"].scores.values()) == {INF}
    assert found["layer"].mean == 40.0


def test_more_validations_are_no_head_start():
    """Only the steps at which all trials were validated count; one that ended before has no part in later ones."""
    record = reaching({"none": [0.9, 0.9, 0.4, 0.4], "layer": [0.9, 0.9, 0.4, 0.4]})
    rare = tuple(
        replace(t, curve=[line for line in t.curve if t.points[0]["norm"] == "none" or line["step"] % 20 == 0])
        for t in record.trials
    )
    record = replace(record, trials=rare)
    found = steps_of(record, 0.5)
    assert set(found["none"].scores.values()) == set(found["layer"].scores.values()) == {40.0}
    assert steps_to(record, "adding", level(record, "adding", 0.5)).resolution == 20.0
    ended = tuple(replace(t, curve=t.curve[:1]) if t.points[0]["norm"] == "layer" else t for t in record.trials)
    assert set(steps_of(replace(record, trials=ended), 0.5)["none"].scores.values()) == {30.0}
    apart = tuple(
        replace(t, curve=[{**line, "step": line["step"] + t.seed} for line in t.curve]) for t in record.trials
    )
    found = steps_of(replace(record, trials=apart), 0.5)["none"].scores
    assert found == {seed: 30.0 + seed for seed in range(5)}, "without a common step, every validation counts"


@pytest.mark.parametrize("steps", [1, 90])
def test_a_function_that_stops_early_does_not_shorten_the_steps_of_the_others(steps):
    """A function takes 40 steps here; it declares none (1), or 90 for the progress line."""
    record = reaching({"none": [0.9] * 4, "layer": [0.9, 0.9, 0.1, 0.1]})
    trials = [replace(t, trial={**t.trial, "train": {"steps": steps}}, step=40) for t in record.trials]
    result = {**(trials[0].result or {}), "reason": "no improvement in 2 reports"}
    trials[0] = replace(trials[0], result=result, curve=trials[0].curve[:1], step=10)
    record = replace(record, trials=tuple(trials))
    assert level(record, "adding", 0.5).limit == 40
    assert set(steps_of(record, 0.5)["layer"].scores.values()) == {30.0}
    early = tuple(replace(t, result=result) for t in record.trials)
    assert level(replace(record, trials=early), "adding", 0.5).limit == (40 if steps == 1 else 90)


@pytest.mark.parametrize("without", [["none", "layer"], ["layer"], ["none"]])
def test_a_seed_without_the_level_excludes_no_difference(without):
    """The steps of a trial that never reaches the level are unknown, and so is its difference."""
    record = reaching({"none": [0.9, 0.9, 0.9, 0.4], "layer": [0.9, 0.9, 0.9, 0.4]})
    record = replace(record, study={**record.study, "reach": 0.5, "endpoint": "steps", "margin": 50})
    for lost, verdict in ((0, "no difference"), (1, "undecided"), (5, "undecided")):
        trials = tuple(
            replace(t, curve=t.curve[:-1]) if t.seed < lost and t.points[0]["norm"] in without else t
            for t in record.trials
        )
        found = findings(replace(record, trials=trials))
        ((_, decision),) = found.tasks[0].decided()
        assert (decision.difference.unreached, decision.verdict) == (lost, verdict)
        assert decision.p_equivalence is not None and decision.p_equivalence < 0.05
        notice = "A trial that never reached the level leaves the comparison undecided at layer: its steps are unknown."
        assert (notice in caution(found), decision.blocked, decision.power is None) == (lost > 0,) * 3


def test_a_point_that_never_reaches_the_level_is_slower_not_equal():
    """Counted with the limit, all seeds are behind by less than the margin; their true difference is unknown."""
    record = reaching({"none": [0.9, 0.9, 0.4, 0.4], "layer": [0.9] * 4})
    reached = {"none": 30, "layer": math.inf}
    early = tuple(
        replace(
            t, curve=[{"step": n, "validation": float(n < reached[t.points[0]["norm"]] - t.seed)} for n in range(41)]
        )
        for t in record.trials
    )
    study = {**record.study, "reach": 0.5, "endpoint": "steps", "margin": 25}
    ((_, decision),) = findings(replace(record, trials=early, study=study)).tasks[0].decided()
    assert decision.p_equivalence is not None and decision.p_equivalence < 0.05
    assert (decision.difference.mean, decision.difference.improvement, decision.verdict) == (12.0, 0.0, "hurts")


def test_the_resolution_of_steps_is_the_largest_distance_of_validations():
    record = reaching({"none": [0.9, None, 0.4, 0.4]})
    to = level(record, "adding", 0.5)
    assert steps_to(record, "adding", to).resolution == 20.0, "the second validation is missing"
    late = tuple(replace(trial, curve=trial.curve[-1:]) for trial in record.trials)
    assert steps_to(replace(record, trials=late), "adding", to).resolution == 40.0, "the first is at step 40"


def test_a_diverged_trial_counts_and_one_that_still_trains_does_not():
    record = reaching({"none": [0.4] * 4})
    first, second, third, *rest = record.trials
    early = {"step": 25, "outcome": "diverged", "metrics": {}}
    trials = (
        replace(first, status="diverged", result=early, curve=first.curve[:2]),
        replace(second, status="diverged", result=early, curve=[{"step": 10, "train_loss": 1.0, "validation": -INF}]),
        replace(third, status="running", result=None, curve=third.curve[:1]),
        *rest,
    )
    found = steps_of(replace(record, trials=trials), 0.5)["none"]
    assert found.scores == {0: 10.0, 1: INF, 3: 10.0, 4: 10.0}
    assert (found.diverged, found.mean) == (2, 17.5)


def test_the_default_level_lies_three_quarters_of_the_way():
    record = study(lambda norm, window, seed: {"none": 0.15, "layer": 0.1, "rms": 0.02}[norm])
    found = level(record, "adding")
    assert found.value == pytest.approx(1 / 6 + 0.75 * (0.0202 - 1 / 6)), "a validation is 1.01 of a test here"
    assert (found.limit, found.given) == (20, False)


def test_a_named_level_goes_first():
    record = study(lambda norm, window, seed: 0.1)
    named = replace(record, study={**record.study, "reach": {"adding": 0.05}})
    assert (level(named, "adding").value, level(named, "adding").given) == (0.05, True)
    assert level(replace(record, study={"reach": 0.04}), "adding").value == 0.04
    assert level(named, "adding", {"adding": 0.07}).value == 0.07
    assert level(replace(record, study={"reach": {"other": 1.0}}), "adding").given is False


def test_without_a_start_or_an_end_there_is_no_level():
    record = study(lambda norm, window, seed: 0.5)
    assert "ahead of the best trivial predictor" in level(record, "adding").why
    bare = replace(record, tasks={"adding": TaskFacts(METRIC)})
    assert "names no trivial predictor" in level(bare, "adding").why
    empty = replace(record, trials=tuple(replace(t, status="pending", result=None) for t in record.trials))
    assert level(empty, "adding").why == "no trial has finished"
    with pytest.raises(ValueError, match="no level to reach"):
        steps_to(empty, "adding", level(empty, "adding"))


def test_the_median_ranks_missing_numbers_last():
    assert median([3.0, 1.0, INF]) == 3.0
    assert median([-INF, 1.0, INF]) == 1.0
    assert median([-INF, INF]) == 0.0
    assert math.isnan(median([]))
