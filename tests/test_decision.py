"""Verdicts: primary endpoints, multiple comparisons, equivalence, power, tuned options, logarithms."""

import csv
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from atn_norms.ablation import StudySpec, make_plan
from atn_norms.ablation.analysis import student
from atn_norms.ablation.analysis.comparison import Measure, compare, compare_task, final, tail
from atn_norms.ablation.analysis.decision import Decision, decide
from atn_norms.ablation.report import html
from atn_norms.ablation.report.csv_export import results_csv
from atn_norms.ablation.report.findings import findings
from atn_norms.ablation.report.names import (
    MINUS,
    NOTHING,
    TIMES,
    chances,
    change,
    margin,
    seeds_needed,
    signed,
    verdict,
)
from atn_norms.ablation.report.sentences import caution, endpoint
from atn_norms.ablation.report.tables import table
from atn_norms.ablation.store.records import Endpoint, StudyRecord, TaskFacts, TrialRecord
from atn_norms.errors import SpecError
from tests.recorded import METRIC, grid, study
from tests.test_comparison import INF, between, point

NOISE = [0.03, -0.02, 0.01, -0.04, 0.02, 0.0, 0.015, -0.015]


def difference(shift: float, spread: float = 1.0, n: int = 8):
    return between([1.0 + shift + spread * each for each in NOISE[:n]], [1.0] * n)


def test_the_correction_makes_single_claims_undecided():
    clear, faint = difference(-0.2), difference(-0.025)
    assert faint.verdict == "helps", "taken alone"
    alone, corrected = decide([faint], [None])[0], decide([faint] + [difference(0.0)] * 5 + [clear], [None] * 7)
    assert alone.verdict == "helps"
    assert [each.verdict for each in corrected] == ["undecided"] * 6 + ["helps"]
    assert corrected[0].p == pytest.approx(6 * (faint.p or 0))
    assert {each.family for each in corrected} == {7}


def test_a_comparison_without_pairs_counts_in_the_family():
    none = between([1.0], [1.0])
    faint = difference(-0.025)
    found = decide([faint, none, none, none], [None] * 4)
    assert found[0].p == pytest.approx(4 * (faint.p or 0))
    assert [each.verdict for each in found[1:]] == ["undecided"] * 3
    assert (found[1].power, found[1].needed, seeds_needed(found[1])) == (None, None, NOTHING)


def test_a_difference_within_the_margin_counts_as_none():
    small = difference(-0.03, 0.5)
    assert decide([small], [None])[0].verdict == "helps"
    (found,) = decide([small], [0.06])
    assert (found.verdict, verdict(found)) == ("no difference", "no difference larger than 0.06")
    assert decide([small], [0.02])[0].verdict == "helps"
    assert decide([difference(0.0, 5.0)], [0.06])[0].verdict == "undecided", "too much noise for either"
    assert decide([difference(0.0, n=4)], [10.0])[0].verdict == "undecided", "four seeds carry no verdict"


def test_the_deciding_p_is_that_of_the_test_behind_the_verdict():
    equal, clear = decide([difference(0.001), difference(-0.5)], [0.06, 0.06])
    assert equal.difference.paired is not None
    assert (equal.verdict, clear.verdict) == ("no difference", "helps")
    assert equal.deciding_p == (equal.difference.paired.p_equivalence(0.06), equal.p_equivalence)
    assert clear.deciding_p == (clear.difference.p, clear.p)
    assert max(filter(None, equal.deciding_p)) < 0.05 < equal.p


def test_a_diverged_side_excludes_a_verdict_in_its_favour():
    lost = between([1.0 + each for each in NOISE] + [INF], [2.0] * 9)
    assert decide([lost], [None])[0].verdict == "undecided"
    assert decide([between([2.0] * 9, [1.0 + each for each in NOISE] + [INF])], [None])[0].verdict == "undecided"
    equal = between([1.0 + each for each in NOISE] + [INF], [1.0] * 9)
    assert decide([equal], [0.5])[0].verdict == "undecided"


def test_a_comparison_that_a_diverged_seed_leaves_undecided_has_no_power_and_names_it():
    """More seeds would not decide it. A difference within the noise is not blocked."""
    for scores, blocked in (([1.0 + each for each in NOISE], True), ([2.0 + each for each in NOISE], False)):
        (decision,) = decide([between([*scores, INF], [2.0] * 9)], [None])
        assert (decision.verdict, decision.blocked) == ("undecided", blocked)
        assert (decision.power is None, seeds_needed(decision) == NOTHING) == (blocked, blocked)

    def score(point, seed):
        return 1.0 + 0.01 * seed - (0.5 + 0.001 * (seed % 3)) * (point["norm"] == "layer")

    record = grid({"norm": ["none", "layer"]}, score, seeds=7, baseline={"norm": "none"})
    gone = {"outcome": "diverged", "step": 2, "metrics": {}}
    notice = "A diverged trial leaves the comparison undecided at layer: the better side must end at every seed."
    for norm in ("layer", "none"):
        trials = tuple(
            replace(t, status="diverged", result=gone) if (t.points[0]["norm"], t.seed) == (norm, 3) else t
            for t in record.trials
        )
        assert (notice in caution(findings(replace(record, trials=trials)))) == (norm == "layer")


def test_no_norm_is_compared_with_a_norm_at_the_first_window():
    record = study(lambda norm, window, seed: 1.0 + 0.01 * seed + (norm == "rms") + 0.2 * (window == "25"),
                   baseline={"norm": "layer"})  # fmt: skip
    found = findings(record)
    (task,) = found.tasks
    rows = {tuple(row.point.cells[0].values()): row for row, _ in task.decided()}
    none = next(row for row, _ in task.decided() if row.point.cells[0]["norm"] == "none")
    assert len(rows) == 3 and none.against is not None and none.several
    assert none.against.reference.cells == ({"norm": "layer", "window": "1"},)
    assert none.against.mean == pytest.approx(0.0)
    assert "none has one result for several points of the grid, and is compared with layer, window 1." in endpoint(
        found, task
    )
    (whole,) = findings(replace(record, baseline={"norm": "none"})).tasks
    assert not any(row.several for row in whole.final.rows)


def test_a_diverged_seed_excludes_a_verdict_also_where_the_other_side_has_no_score():
    record = grid({"norm": ["none", "layer"]}, lambda p, s: (2.0 if p["norm"] == "none" else 1.0) + 0.01 * s, seeds=6,
                  baseline={"norm": "none"})  # fmt: skip
    gone = {"outcome": "diverged", "step": 2, "metrics": {}}
    *others, last = record.trials
    assert (last.points[0]["norm"], last.seed) == ("layer", 5)
    for status in ("failed", "pending"):
        trials = tuple(replace(t, status=status, result=None) if t.seed == 5 else t for t in others)
        (task,) = findings(replace(record, trials=(*trials, replace(last, status="diverged", result=gone)))).tasks
        ((row, decision),) = task.decided()
        assert row.against is not None
        assert (row.against.pairs, row.against.ranked, row.against.diverged) == (5, 5, 1)
        assert (decision.verdict, row.against.verdict) == ("undecided", "undecided")


@pytest.mark.parametrize("margin", [None, 0.1])
def test_one_result_at_every_seed_is_undecided(margin):
    values = {"none": 0.15, "layer": 0.1, "rms": 0.15}
    record = study(lambda norm, window, seed: values[norm])
    found = findings(replace(record, study={**record.study, "margin": margin}))
    for row, decision in found.tasks[0].decided():
        difference = decision.difference
        assert difference.ignores_seed
        assert difference.mean == pytest.approx(-0.05 if row.point.cells[0]["norm"] == "layer" else 0.0)
        assert (decision.verdict, difference.verdict, decision.p, decision.power) == (*["undecided"] * 2, 1.0, None)


def test_equal_scores_of_trials_with_different_curves_are_not_one_result():
    record = grid(
        {"norm": ["none", "layer"]}, lambda p, s: float(p["norm"] == "none"), seeds=6, baseline={"norm": "none"}
    )
    ((_, decision),) = findings(record).tasks[0].decided()
    assert (decision.verdict, decision.difference.ignores_seed) == ("helps", False)


@pytest.mark.parametrize(("shift", "margin"), [(-0.5, None), (0.5, None), (0.0, 0.1)])
def test_a_failed_trial_excludes_a_verdict_in_favour_of_its_side(shift, margin):
    def score(point, seed):
        return 1.0 + 0.01 * seed + (shift + 0.001 * (seed % 3 - 1)) * (point["norm"] == "layer")

    record = grid({"norm": ["none", "layer"]}, score, seeds=7, baseline={"norm": "none"})
    record = replace(record, study={**record.study, "margin": margin})
    verdict = "no difference" if margin else "helps" if shift < 0 else "hurts"
    notice = "A failed trial leaves the comparison undecided at layer: the missing score could be the worst."
    for norm in (None, "none", "layer"):
        trials = tuple(
            replace(t, status="failed", result=None) if (t.points[0]["norm"], t.seed) == (norm, 3) else t
            for t in record.trials
        )
        found = findings(replace(record, trials=trials))
        ((_, decision),) = found.tasks[0].decided()
        better = {"helps": ["layer"], "hurts": ["none"], "no difference": ["none", "layer"]}[verdict]
        assert decision.verdict == ("undecided" if norm in better else verdict)
        assert (notice in caution(found)) == (norm in better)
        if margin is None:
            assert decision.difference.verdict == decision.verdict


def test_power_and_seeds_are_for_the_margin_or_else_for_the_observed_difference():
    found = difference(-0.01)
    paired = found.paired
    assert paired is not None
    deviation = float(np.std(NOISE, ddof=1))
    observed, named = decide([found] * 2, [None, None])[0], decide([found] * 2, [0.02, 0.02])[0]
    assert observed.power == pytest.approx(student.power(abs(found.mean) / deviation, 8, 0.025))
    assert named.power == pytest.approx(student.power(0.02 / deviation, 8, 0.025))
    assert observed.needed == student.needed(abs(found.mean) / deviation, 0.025)
    assert named.needed is not None
    assert student.power(0.02 / deviation, named.needed, 0.025) >= 0.8
    assert seeds_needed(decide([difference(-sum(NOISE) / 8)], [None])[0]) == ">10000"
    assert decide([difference(-10.0, n=3)], [None])[0].needed == 5, "no verdict has fewer seeds"


def test_multiplicative_scores_are_compared_as_logarithms():
    rng = np.random.default_rng(0)
    values = {norm: rng.lognormal(shift, 0.5, size=8) for norm, shift in (("none", -4.0), ("layer", -5.0))}
    facts = TaskFacts(METRIC, {"always 1": 1 / 6}, spread="multiplicative")
    record = grid({"norm": ["none", "layer"]}, lambda p, s: float(values[p["norm"]][s]), seeds=8,
                  baseline={"norm": "none"}, facts=facts)  # fmt: skip
    (found,) = compare(record)
    (row,) = [each for each in found.rows if each.against]
    assert row.against is not None and row.against.effect_interval is not None
    logs = np.log(values["layer"]) - np.log(values["none"])
    agreed: Any = stats.ttest_1samp(logs, 0)
    low, high = np.exp(agreed.confidence_interval())
    assert row.point.mean == pytest.approx(stats.gmean(values["layer"]))
    assert row.against.effect == pytest.approx(math.exp(logs.mean()))
    assert (row.against.effect_interval.low, row.against.effect_interval.high) == pytest.approx((low, high))
    assert row.against.p == pytest.approx(agreed.pvalue)
    assert change(row.against).startswith(f"{TIMES}0.")
    (decision,) = decide([row.against], [1.25])
    assert decision.margin == pytest.approx(math.log(1.25))
    assert margin(decision) == f"{TIMES}1.25"


def test_a_score_of_zero_keeps_a_multiplicative_task_on_its_own_scale():
    facts = TaskFacts(METRIC, {"always 1": 1 / 6}, spread="multiplicative")
    record = grid({"norm": ["none", "layer"]}, lambda p, s: float(s), baseline={"norm": "none"}, facts=facts)
    assert not final(record, "adding").log
    assert compare(record)[0].rows[0].point.mean == 2.0


def test_a_diverged_trial_keeps_the_logarithms_of_scores_whose_worst_is_minus_infinity():
    facts = TaskFacts(METRIC, {}, "max", spread="multiplicative")
    record = grid({"norm": ["none"]}, lambda p, s: 1.0 + s, facts=facts)
    gone = replace(record.trials[0], status="diverged", result={"outcome": "diverged", "step": 2, "metrics": {}})
    assert final(replace(record, trials=(gone, *record.trials[1:])), "adding").log


@pytest.mark.parametrize("p", [0.0494, 0.0496, 0.04996, 0.05 - 1e-9, 0.05, 0.0501, 0.0999, 0.049])
def test_a_printed_p_value_is_below_5_percent_as_the_value_is(p):
    assert (float(chances(p)) < 0.05) == (p < 0.05)
    assert float(chances(p)) == pytest.approx(p, abs=5e-4)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((-0.5, -1.0, -0.0003), ["-0.5000", "-1.0000", "-0.0003"]),
        ((300.0, 0.2, 599.8), ["+300.0", "+0.2", "+599.8"]),
        ((0.0, -0.5, 0.5), ["0", "-0.500", "+0.500"]),
        ((1e-17, -0.5, 0.5), ["+0.000", "-0.500", "+0.500"]),
    ],
)
def test_an_end_that_is_not_0_is_not_printed_as_0(values, texts):
    """A mean of 0 up to rounding needs no more digits."""
    assert [text.replace(MINUS, "-") for text in signed(*values)] == texts


@pytest.mark.parametrize("size", [0.01239, 1234.0, 1e-8])
def test_a_margin_is_written_with_every_digit(size):
    (found,) = decide([difference(0.0)], [size])
    assert float(margin(found)) == size


@pytest.mark.parametrize("zero", [False, True])
def test_a_margin_that_is_a_ratio_is_not_tested_on_differences(zero):
    facts = TaskFacts(METRIC, {"always 1": 1 / 6}, spread="multiplicative")
    record = grid({"norm": ["none", "layer"]}, lambda p, s: 0.0 if zero and s == 0 else 0.1 + 0.0001 * s, seeds=6,
                  baseline={"norm": "none"}, facts=facts)  # fmt: skip
    found = findings(replace(record, study={**record.study, "margin": 1.25}))
    ((_, decision),) = found.tasks[0].decided()
    notice = f"The margin, {TIMES}1.25, is a ratio and is not tested, because a score is not positive."
    assert (notice in endpoint(found, found.tasks[0])) == zero
    assert decision.verdict == ("undecided" if zero else "no difference")
    assert (decision.margin, decision.p_equivalence is None) == ((None, True) if zero else (math.log(1.25), False))
    assert table(found).records[1]["decision"]["margin"] == (None if zero else 1.25)


def test_the_tail_is_the_mean_of_the_last_validations():
    record = grid({"norm": ["none"]}, lambda p, s: 0.1, seeds=2)
    trial = record.trials[0]
    looks = [{"step": i, "train_loss": 0.0, "validation": v} for i, v in enumerate([9.0, 1.0, None, 2.0, 3.0])]
    measure = tail(record, "adding", 3)
    assert measure.score(replace(trial, curve=looks)) == 2.0
    assert measure.score(replace(trial, status="diverged", curve=looks)) == INF
    assert measure.score(replace(trial, status="running", result=None, curve=looks)) is None


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (None, Endpoint("final", 5, None, False)),
        ("steps", Endpoint("steps", 5, None, True)),
        ({"measure": "tail", "validations": 3}, Endpoint("tail", 3, None, True)),
        ({"adding": "tail", "copying": "steps"}, Endpoint("tail", 5, None, True)),
        ({"copying": "steps"}, Endpoint("final", 5, None, False)),
    ],
)
def test_the_endpoint_of_a_task_is_set_by_the_study(endpoint, expected):
    assert Endpoint.of({"endpoint": endpoint}, "adding") == expected
    found = Endpoint.of({"endpoint": endpoint, "margin": {"adding": 2.0, "copying": 0.1}}, "adding")
    assert found == replace(expected, margin=2.0)


@pytest.mark.parametrize("measure", ["final", "tail", "steps"])
def test_verdicts_use_the_primary_endpoint(measure):
    record = grid(
        {"norm": ["none", "layer"]}, lambda p, s: (0.1 if p["norm"] == "none" else 0.02) + 0.001 * s,
        seeds=6, baseline={"norm": "none"},
    )  # fmt: skip
    record = replace(record, study={**record.study, "endpoint": measure, "reach": 0.05})
    (task,) = findings(record).tasks
    ((_, decision),) = task.decided()
    names = {
        "final": f"test {METRIC}",
        "tail": f"mean of the last 5 validations of {METRIC}",
        "steps": "steps to the level",
    }
    assert decision.difference.measure.name == names[measure]
    assert decision.verdict == "helps"


def tuned(scores: dict[tuple[str, str], list[tuple[float, float]]], **more) -> StudyRecord:
    """Return a study of norms with tuned learning rates: (norm, rate) -> (validation, test) of each seed."""
    norms, rates = ([*dict.fromkeys(key[i] for key in scores)] for i in (0, 1))
    trials = []
    for (norm, rate), values in scores.items():
        for seed, (validation, test) in enumerate(values):
            name = f"{norm}-{rate}-{seed}"
            metrics = {"validation": {METRIC: validation}, "test": {METRIC: test}}
            points = ({"task": "adding", "norm": norm, "lr": rate},)
            result = {"trial": name, "outcome": "finished", "step": 5, "metrics": metrics}
            trials.append(TrialRecord(name, {"seed": seed, "train": {"steps": 5}}, points, seed, "done", result))
    return StudyRecord(
        "tuned",
        {},
        {},
        {"norm": norms},
        {"adding": TaskFacts(METRIC)},
        {"norm": norms[0]},
        tuple(trials),
        {"lr": rates},
    )


def test_each_point_is_tuned_on_validation_and_scored_on_test():
    record = tuned({
        ("none", "0.1"): [(0.5, 9.0), (0.5, 9.0)],
        ("none", "0.2"): [(0.9, 1.0), (0.4, 1.0)],
        ("layer", "0.1"): [(0.3, 2.0), (0.9, 2.0)],
        ("layer", "0.2"): [(0.2, 7.0), (0.2, 7.0)],
    })  # fmt: skip
    none, layer = compare(record)[0].rows
    assert (none.point.tuned, none.point.mean) == ({"lr": "0.1"}, 9.0), "a better test score does not count"
    assert (layer.point.tuned, layer.point.mean) == ({"lr": "0.2"}, 7.0)
    assert (len(layer.point.trials), len(layer.point.candidates)) == (2, 4)
    assert layer.against is not None and layer.against.mean == -2.0


def test_a_value_that_diverges_is_not_chosen_and_an_unfinished_seed_does_not_decide():
    record = tuned({("none", "0.1"): [(0.5, 1.0), (0.5, 1.0)], ("none", "0.2"): [(0.1, 2.0), (0.1, 2.0)]})
    trials = list(record.trials)
    gone = {"outcome": "diverged", "step": 2, "metrics": {}}
    diverged = replace(record, trials=(*trials[:3], replace(trials[3], status="diverged", result=gone)))
    assert compare(diverged)[0].rows[0].point.tuned == {"lr": "0.1"}
    late = {**(trials[0].result or {}), "metrics": {"validation": {METRIC: 0.01}, "test": {METRIC: 1.0}}}
    half = (replace(trials[0], result=late), trials[1], replace(trials[2], status="running", result=None), trials[3])
    assert compare(replace(record, trials=half))[0].rows[0].point.tuned == {"lr": "0.2"}, "seed 1 alone decides"


def test_a_divergence_counts_at_a_seed_that_the_other_values_lack():
    record = tuned({("none", rate): [(loss, loss)] * 3 for rate, loss in {"0.1": 0.1, "0.2": 0.3, "0.3": 0.2}.items()})
    gone = {"outcome": "diverged", "step": 2, "metrics": {}}
    ends = {("0.1", 0): {"status": "diverged", "result": gone}, ("0.2", 0): {"status": "failed", "result": None}}
    trials = tuple(replace(t, **ends.get((t.points[0]["lr"], t.seed), {})) for t in record.trials)
    assert compare(replace(record, trials=trials))[0].rows[0].point.tuned == {"lr": "0.3"}


def test_the_page_names_the_value_of_a_tuned_option_and_the_step_of_every_trial(tmp_path):
    record = tuned({("none", "0.1"): [(0.5, 1.0)] * 2, ("none", "0.2"): [(0.1, 2.0)] * 2})
    curve = [{"step": 5, "train_loss": 1.0, "validation": 0.1}]
    record = replace(record, study={"reach": 0.2}, trials=tuple(replace(t, curve=curve, step=5) for t in record.trials))
    found = findings(record)
    assert [line["labels"] for line in html._lines(found)] == [["none", "0.1"]] * 2 + [["none", "0.2"]] * 2
    assert {line["name"] for line in html._lines(found)} == {"none, lr 0.1", "none, lr 0.2"}
    lines = list(csv.DictReader(io.StringIO(results_csv(found))))
    assert [line["reached_at"] for line in lines] == ["5"] * 4


@pytest.mark.parametrize("status", ["failed", "pending"])
def test_a_value_without_an_outcome_does_not_prevent_tuning(status):
    losses = {"1e-4": 5.0, "1e-3": 0.5, "1e-2": 0.1, "1.0": 0.0}
    record = tuned({("none", rate): [(loss, loss)] * 2 for rate, loss in losses.items()})
    trials = tuple(
        replace(each, status=status, result=None) if each.points[0]["lr"] == "1.0" else each for each in record.trials
    )
    record = replace(record, trials=trials)
    (row,) = compare(record)[0].rows
    assert (row.point.tuned, row.point.mean) == ({"lr": "1e-2"}, 0.1)
    notice = "Every trial with lr 1.0 failed at none. A value without an outcome is not chosen."
    assert (notice in caution(findings(record))) == (status == "failed")
    nothing = replace(record, trials=tuple(replace(each, status=status, result=None) for each in record.trials))
    assert compare(nothing)[0].rows[0].point.tuned == {"lr": "1e-4"}


def test_values_without_a_common_seed_are_tuned_by_the_mean_of_each():
    record = tuned({("none", rate): [(loss, loss)] * 2 for rate, loss in {"1e-4": 5.0, "1e-3": 0.5}.items()})
    lost = {("1e-4", 0), ("1e-3", 1)}
    trials = tuple(
        replace(each, status="failed", result=None) if (each.points[0]["lr"], each.seed) in lost else each
        for each in record.trials
    )
    (row,) = compare(replace(record, trials=trials))[0].rows
    assert row.point.tuned == {"lr": "1e-3"}


def test_a_tuned_option_multiplies_the_trials_and_is_no_axis():
    options = {"model": {"cell": "lstm", "hidden_size": 4}, "task": "adding", "seeds": 2}
    plan = make_plan(StudySpec(**options, axes={"norm": ("none", "layer")}, tune={"train.optimizer.lr": (0.001, 0.01)}))
    assert plan.axes == {"norm": ["none", "layer"]}
    assert plan.resolved()["tune"] == plan.tune == {"train.optimizer.lr": ["0.001", "0.01"]}
    assert len(plan.trials) == 8
    assert {trial.trial["train"]["optimizer"]["lr"] for trial in plan.trials} == {0.001, 0.01}
    assert {trial.points[0]["train.optimizer.lr"] for trial in plan.trials} == {"0.001", "0.01"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "tial"}, "got 'tial'; expected final, tail, steps, .*'tail'"),
        ({"endpoint": {"addin": "tail"}}, "got no task of this study; expected one of adding.*'adding'"),
        ({"endpoint": {"measure": "tail", "validations": 0}}, "got 0; expected at least 1"),
        ({"endpoint": 3}, "got 3; expected final, tail, steps"),
        ({"endpoint": "steps"}, "got steps for adding; expected a level for it in reach"),
        ({"margin": 0}, "got 0; expected a number above 0"),
        ({"margin": {"adding": "wide"}}, "got 'wide'; expected a number above 0"),
        ({"margin": 0.5}, "margin: got 0.5; expected a ratio above 1"),
        ({"axes": {"norm": ["none"]}, "tune": {"model.norm": ["layer"]}}, "got an option that is an axis already"),
        ({"tune": {"norm": []}}, "got no values; expected at least one"),
    ],
)
def test_an_invalid_analysis_is_rejected_with_its_path(options, message):
    with pytest.raises((ValueError, SpecError), match=message):
        make_plan(StudySpec(model={"cell": "lstm", "hidden_size": 4}, task="adding", **options))


def test_a_margin_of_steps_is_a_number_of_steps():
    options = {"model": {"cell": "lstm", "hidden_size": 4}, "task": "adding", "reach": 0.05, "endpoint": "steps"}
    study = StudySpec(**options, train={"steps": 4, "eval_every": 2}, margin=2.5)
    assert make_plan(study).study["margin"] == 2.5
    with pytest.raises(ValidationError, match=r"train\.eval_every, 5; expected"):
        StudySpec(**options, train={"steps": 50}, margin=5)
    for small in (0.5, 2):
        problem = rf"margin\n  got {small} for adding, whose steps are known up to train\.eval_every, 2; expected"
        with pytest.raises(ValidationError, match=problem):
            StudySpec(**options, train={"steps": 4, "eval_every": 2}, margin=small)


@pytest.mark.parametrize(
    ("margin", "verdict"), [(9, "undecided"), (10, "undecided"), (15, "undecided"), (25, "no difference")]
)
def test_no_difference_in_steps_allows_for_steps_without_a_validation(margin, verdict):
    """Validations are 10 steps apart, and every seed reaches the level at the same validation or at a neighbour."""

    def reached(point, seed):
        return 20 + 10 * (seed % 3 - 1) * (point["norm"] == "layer")

    record = grid({"norm": ["none", "layer"]}, lambda p, s: 0.1 * s, seeds=8, baseline={"norm": "none"})
    curves = [
        [
            {"step": n, "train_loss": 1.0, "validation": float(n < reached(t.points[0], t.seed))}
            for n in range(10, 50, 10)
        ]
        for t in record.trials
    ]
    trials = tuple(replace(t, curve=curve) for t, curve in zip(record.trials, curves, strict=True))
    study = {**record.study, "endpoint": "steps", "reach": 0.5, "margin": margin}
    found = findings(replace(record, trials=trials, study=study))
    ((_, decision),) = found.tasks[0].decided()
    assert decision.verdict == verdict
    assert (decision.margin is None) == (margin <= 10)
    assert decision.difference.paired is not None
    if verdict == "no difference":
        assert decision.deciding_p[0] == decision.difference.paired.p_equivalence(margin - 10)
    note = f" The margin, {margin} steps, is not tested, because validations are up to 10 steps apart."
    assert (note in endpoint(found, found.tasks[0])) == (margin <= 10)


def test_endpoint_and_margin_change_no_trial():
    options = {"model": {"cell": "lstm", "hidden_size": 4}, "task": "adding", "axes": {"norm": ["none", "layer"]}}
    one = make_plan(StudySpec(**options))
    other = make_plan(StudySpec(**options, endpoint="tail", margin=1.2))
    assert [each.id for each in one.trials] == [each.id for each in other.trials]
    assert one.key == other.key


def test_the_default_baseline_is_window_1_where_the_study_varies_the_window():
    axes = {"norm": ["none", "layer"], "window": [1, 5]}
    assert StudySpec(model={"cell": "lstm", "hidden_size": 4}, task="adding", axes=axes).baseline_labels() == {
        "window": "1"
    }


@pytest.mark.parametrize(
    ("axes", "baseline"),
    [
        ({"norm": ["layer"], "hidden_size": [4, 8]}, {"hidden_size": "4"}),
        ({"norm": ["none"], "hidden_size": [4, 8]}, {"hidden_size": "4"}),
        ({"norm": ["none", "layer"], "window": [1]}, {"norm": "none"}),
        ({"norm": ["layer"]}, {}),
    ],
)
def test_an_axis_with_one_value_is_no_default_baseline(axes, baseline):
    assert StudySpec(model={"cell": "lstm", "hidden_size": 4}, task="adding", axes=axes).baseline_labels() == baseline


def test_a_measure_without_pairs_still_compares():
    record = grid({"norm": ["none", "layer"]}, lambda p, s: 0.1, seeds=1, baseline={"norm": "none"})
    (row,) = [each for each in compare_task(record, "adding", Measure("x", "min", lambda t: 1.0)).rows if each.against]
    assert row.against is not None
    (decision,) = decide([row.against], [0.5])
    assert isinstance(decision, Decision)
    assert (decision.verdict, decision.p, decision.p_equivalence) == ("undecided", 1.0, 1.0)
    assert point(1.0, 2.0).interval is not None
