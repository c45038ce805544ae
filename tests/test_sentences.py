"""Sentences of a report, and the names of grid points."""

import random
import re
import statistics
from dataclasses import replace

import pytest

from atn_norms.ablation.analysis.comparison import compare
from atn_norms.ablation.report.canvas import MUTED
from atn_norms.ablation.report.findings import findings
from atn_norms.ablation.report.forest import colour_of, forest
from atn_norms.ablation.report.names import qualified, short_names
from atn_norms.ablation.report.sentences import answer, endpoint, question, verdict_line
from atn_norms.ablation.report.tables import verdict_table
from atn_norms.ablation.store.records import StudyRecord, TaskFacts
from tests.recorded import METRIC, grid, score, study, verdict_text


def test_the_answer_begins_with_the_verdict_and_names_the_decided_points():
    words = verdict_text(study(score))
    assert words.startswith("Norm: helps at 4, hurts at 0, undecided at 0 of 4 All 30 trials finished.")
    assert re.search(r"The lowest mean test mean squared error is 0.0090 \[0.0076, 0.0104\] \(rms, ", words)
    assert re.search(r"Norm helps at layer, window 1 \(-0\.\d+ \[-0\.\d+, -0\.\d+\], adjusted p <0.001\), ", words)
    assert "rms, window 1 (" in words and "and 1 more in the table." in words


def test_the_verdict_is_undecided_where_chance_explains_the_difference():
    words = verdict_text(
        study(lambda norm, window, seed: 1.0 + (-1) ** (seed + (norm == "layer")) * 0.1 - 0.001 * (norm == "layer"))
    )
    assert words.startswith("Norm: helps at 0, hurts at 0, undecided at 4 of 4; both worse than a guess at 4 ")
    assert "Norm helps" not in words and "Norm hurts" not in words


def test_a_verdict_uses_the_four_words_and_names_the_margin():
    def values(norm, window, seed):
        shift = {"none": 0.0, "layer": -0.5, "rms": 0.001}[norm] + {"1": 0.0, "25": 0.4}[window] * (norm == "rms")
        return 1.0 + shift + 0.01 * seed + 0.004 * ((seed * 7) % 3) * (norm != "none")

    record = study(values)
    record = replace(record, study={**record.study, "margin": 0.1, "endpoint": "final"})
    found = findings(record)
    line = verdict_line(found, found.tasks[0])
    words = "Norm: helps at 2, hurts at 1, no difference larger than 0.1 at 1, undecided at 0 of 4"
    assert line == f"{words}; both worse than a guess at 4"
    assert "as the study declares" in endpoint(found, found.tasks[0])
    none = findings(study(values))
    assert "the study declares none" in endpoint(none, none.tasks[0])
    assert "4 declared comparisons (Holm)" in endpoint(none, none.tasks[0])


def test_the_tail_as_endpoint_is_named_with_the_verdict_and_decides_the_best_point():
    """The last validation of `layer` is best, and the mean of the last three is that of `none`."""
    ends = {"none": (0.2, 0.2, 0.2), "layer": (0.9, 0.9, 0.1), "rms": (0.9, 0.9, 0.9)}
    record = study(lambda norm, window, seed: ends[norm][-1] + 0.001 * seed)
    trials = tuple(
        replace(
            trial,
            curve=[
                {"step": step, "train_loss": 1.0, "validation": value + 0.001 * trial.seed}
                for step, value in enumerate(ends[trial.points[0]["norm"]], 1)
            ],
        )
        for trial in record.trials
    )
    tail = {"measure": "tail", "validations": 3}
    for declared, best in ((tail, "none"), ("final", "layer")):
        found = findings(replace(record, trials=trials, study={**record.study, "endpoint": declared}))
        named = f" (by the mean of the last 3 validations of {record.tasks['adding'].metric})"
        assert verdict_line(found, found.tasks[0]).endswith(named) == (declared == tail)
        (lowest,) = [each for each in answer(found, found.tasks[0]) if "The lowest " in each]
        assert f"({best}" in lowest and ("mean of the last 3" in lowest) == (declared == tail)


def test_a_level_that_the_study_does_not_declare_is_stated_with_the_endpoint():
    record = study(score)
    record = replace(record, study={**record.study, "reach": 0.1, "endpoint": "steps"})
    notice = "The level, 0.0500, was named for this report instead of the declared level, 0.100."
    for levels, is_shown in ((None, False), ({"adding": 0.1}, False), ({"adding": 0.05}, True)):
        found = findings(record, levels)
        words = endpoint(found, found.tasks[0])
        assert words.startswith("Primary endpoint: steps to the level, as the study declares.")
        assert (notice in words) == is_shown


def test_a_verdict_on_two_sides_that_are_worse_than_a_guess_carries_a_warning():
    """The trivial predictor scores 1/6; `rms` helps against `none`, and both are worse."""
    means = {"none": 1.0, "rms": 0.5, "layer": 0.1}
    record = study(lambda norm, window, seed: means[norm] + 0.01 * seed + 0.001 * ((seed * 7) % 3) * (norm != "none"))
    found = findings(record)
    task = found.tasks[0]
    assert (
        verdict_line(found, task) == "Norm: helps at 4, hurts at 0, undecided at 0 of 4; both worse than a guess at 2"
    )
    cells = {row.point.cells[0]["norm"]: qualified(decision) for row, decision in task.decided()}
    assert cells == {"layer": "helps", "rms": "helps (both worse than a guess)"}
    colours = {row.point.cells[0]["norm"]: colour_of(decision) for row, decision in task.decided()}
    assert colours["rms"] == MUTED != colours["layer"], "no colour of a verdict for a comparison of two failures"
    table = verdict_table(record, task)
    assert table is not None
    assert [row[-1] for row in table.rows] == ["helps"] * 2 + ["helps (both worse than a guess)"] * 2
    assert re.search(r"rms, window 1 \([^()]*; both worse than a guess\)", verdict_text(record))
    assert "both worse" not in verdict_text(study(score))


def test_a_verdict_of_no_difference_shows_the_p_values_that_decide_it():
    noise = (0.3, -0.2, 0.1, -0.4, 0.2, 0.01)
    record = study(lambda norm, window, seed: 1.0 + 0.1 * seed + 0.01 * noise[seed] * (norm != "none"))
    found = findings(replace(record, study=record.study | {"margin": 0.02}))
    table = verdict_table(found.record, found.tasks[0])
    assert table is not None
    for row in table.rows:
        shown = dict(zip(table.headers, row, strict=True))
        assert shown["verdict"].startswith("no difference larger than 0.02")
        assert {shown["p"], shown["adjusted p"]} == {"<0.001"}
    picture = forest(found.record, found.tasks[0], "forest")
    assert picture is not None and picture.text.count("adjusted p <0.001, no difference") == len(table.rows)


def test_a_verdict_line_has_no_full_stop():
    whole = study(score, norms=["rms"], windows=["1"])
    none = replace(whole, trials=tuple(replace(trial, status="pending", result=None) for trial in whole.trials))
    for record, line in (
        (whole, "No verdict: the study compares nothing with a baseline"),
        (none, "No trial of adding has finished"),
    ):
        found = findings(record)
        assert verdict_line(found, found.tasks[0]) == line


def test_the_verdict_of_a_study_that_still_runs_is_interim():
    whole = study(score)
    started = [replace(trial, status="pending", result=None) for trial in whole.trials if trial.seed == 5]
    trials = tuple(trial for trial in whole.trials if trial.seed != 5)
    record = replace(whole, trials=(*trials, *started))
    found = findings(record)
    line = verdict_line(found, found.tasks[0])
    assert line == "Interim, after 25 of 30 trials. Norm: helps at 4, hurts at 0, undecided at 0 of 4"
    assert "Interim" not in verdict_text(whole)


def test_a_seed_without_effect_is_reported():
    values = {"none": 0.15, "layer": 0.012, "rms": 0.15}
    words = verdict_text(study(lambda norm, window, seed: values[norm]))
    assert words.startswith("Norm: helps at 0, hurts at 0, undecided at 4 of 4 ")
    notice = "The seed has no effect: the scores of {} are the same at every seed, and so are those of the baseline."
    assert notice.format("4 points") in words
    assert "The seed has no effect" not in verdict_text(study(score))


def test_a_side_that_is_more_than_a_guess_is_judged_by_the_goal_of_the_task():
    facts = {"sequences": TaskFacts("accuracy", {"majority class": 0.5}, "max")}
    for values, worse in (({"none": 0.3, "layer": 0.4}, True), ({"none": 0.3, "layer": 0.6}, False)):
        record = study(lambda n, w, s, v=values: v[n] + 0.001 * s, norms=("none", "layer"), tasks=facts)
        assert {decision.both_trivial for _, decision in findings(record).tasks[0].decided()} == {worse}


def test_each_point_is_judged_by_its_own_trivial_predictor():
    """At length 100 all scores are below the predictor of length 2, and above that of length 100."""
    facts = TaskFacts(METRIC, baselines_at={"task.length 2": {"guess": 0.7}, "task.length 100": {"guess": 0.04}})
    means = {"none": 0.3, "layer": 0.1}
    record = grid(
        {"task.length": ["2", "100"], "norm": ["none", "layer"]},
        lambda point, seed: means[point["norm"]] * (1 if point["task.length"] == "2" else 0.9) + 0.001 * seed,
        baseline={"norm": "none"},
        facts=facts,
    )
    found = findings(record)
    (task,) = found.tasks
    cells = {row.point.cells[0]["task.length"]: decision.both_trivial for row, decision in task.decided()}
    assert cells == {"2": False, "100": True}
    assert "(length 100, layer), no better than the trivial predictor “guess”, 0.0400." in verdict_text(record)
    assert task.level.value is None and task.level.why == "the trivial predictors of its points differ"
    assert replace(record, study=record.study | {"reach": 0.2}).tasks == record.tasks
    across = findings(replace(record, baseline={"task.length": "2"})).tasks[0]
    assert not any(decision.both_trivial for _, decision in across.decided()), "length 2 is better than its own guess"


def test_points_that_are_the_best_together_are_all_named():
    text = verdict_text(study(lambda norm, window, seed: {"layer": 0.1, "rms": 0.2, "none": 0.3}[norm] + seed / 100))
    assert "is 0.125 [0.105, 0.145] (layer, window 1, tied with layer, window 25)" in text
    assert "(none, the baseline, tied with 4 other points)" in verdict_text(
        study(lambda norm, window, seed: 0.1 + seed / 100)
    )


def test_the_baseline_is_named_where_the_point_is():
    text = verdict_text(study(lambda norm, window, seed: (0.2 if norm == "none" else 0.3) + 0.01 * seed))
    assert "(none, the baseline), no better than the trivial predictor" in text
    assert ", the baseline" not in verdict_text(study(score))
    alone = verdict_text(grid({}, lambda point, seed: 0.1 + 0.001 * seed))
    assert "the baseline" not in alone


def test_the_best_point_is_named_with_the_seeds_that_its_mean_excludes():
    """A mean of the seeds that finished is too good: those that diverged may be the hard ones."""
    gone = {"outcome": "diverged", "step": 2, "metrics": {}}
    record = grid({"norm": ["none", "layer"]}, lambda p, s: 0.1 if p["norm"] == "none" else 0.05, seeds=10,
                  baseline={"norm": "none"})  # fmt: skip
    lost = {("layer", seed): "diverged" for seed in range(4)} | {("layer", 4): "failed"}
    trials = tuple(
        replace(t, status=lost[key], result=gone if lost[key] == "diverged" else None)  # type: ignore[arg-type]
        if (key := (t.points[0]["norm"], t.seed)) in lost
        else t
        for t in record.trials
    )
    assert "is 0.0500 (5 seeds) (layer; 4 diverged, 1 failed)." in verdict_text(replace(record, trials=trials))
    assert "(layer)." in verdict_text(record)
    alone = replace(record, axes={}, trials=tuple(t for t in trials if t.points[0]["norm"] == "layer"))
    assert "squared error is 0.0500 (5 seeds); 4 diverged, 1 failed." in verdict_text(alone)


def test_the_tables_of_a_study_that_still_runs_are_interim():
    whole = study(score)
    started = tuple(replace(t, status="pending", result=None) if t.seed == 5 else t for t in whole.trials)
    for record, interim in ((whole, ""), (replace(whole, trials=started), "interim, after 25 of 30 trials")):
        found = findings(record)
        table = verdict_table(record, found.tasks[0])
        picture = forest(record, found.tasks[0], "forest")
        assert table is not None and picture is not None
        assert table.title.endswith(interim or "lower is better")
        assert picture.title.endswith(interim or "difference to none")


def test_points_without_a_number_are_counted():
    def diverged(trial):
        gone = {"outcome": "diverged", "step": 2, "metrics": {}}
        return replace(trial, status="diverged", result=gone) if trial.points[0]["norm"] == "rms" else trial

    record = study(score, windows=("1", "5", "25"))
    record = replace(record, trials=tuple(map(diverged, record.trials)))
    text = verdict_text(record)
    assert text.startswith("Norm: helps at 3, hurts at 0, undecided at 3 of 6 ")
    assert "Exploratory, against window 1 of the same normalizer: helps at 2, hurts at 0, undecided at 2 of 4." in text
    (task,) = findings(record).tasks
    assert sum(row.against is not None for row in task.final.rows) == 6


def test_the_option_of_an_axis_is_not_repeated_for_the_model():
    record = grid({"cell": ["lstm", "gru"], "train.optimizer.lr": ["0.1", "0.2"]}, lambda point, seed: 0.1)
    train = {"clip_grad_norm": None, "steps": 5, "optimizer": {"kind": "adam", "lr": 0.1}, "schedule": {"warmup": 1}}
    declared = {"model": {"cell": "rnn", "hidden_size": 60, "norm": {"kind": "layer", "eps": 0.1}}, "train": train}
    text = dict(question(replace(record, study=declared)))
    assert text["Model"] == "hidden_size 60, norm kind layer, eps 0.1"
    assert text["Training"] == "clip_grad_norm null, steps 5, optimizer kind adam, schedule warmup 1"
    assert declared["train"]["optimizer"]["lr"] == 0.1, "the record stays"


def test_short_names_stay_apart():
    long = "batch(max_steps=100, initial_gain=0.1)"
    record = grid(
        {"norm": ["layer", long], "window": ["1", "5"], "train.optimizer.lr": ["0.1", "1e+09"]}, lambda *_: 0.1
    )
    points = [row.point for row in compare(record)[0].rows]
    for width in (5, 24, 44, 200):
        names = short_names(record, points, width)
        assert len(set(names)) == len(points) == 8
    assert short_names(record, points, 44)[-1] == "batch(max_step…gain=0.1), window 5, lr 1e+09"
    assert max(map(len, short_names(record, points, 44))) <= 44
    assert short_names(record, points, 200)[-1] == f"{long}, window 5, lr 1e+09"


def noisy(level, validations: int = 40, seeds: int = 8) -> StudyRecord:
    """Return a study in which the noise of one validation decides the final metric; `level` of a norm and a seed."""
    record = study(lambda norm, window, seed: 1.0, norms=["none", "layer"], windows=["1"], seeds=seeds)
    trials = []
    for trial in record.trials:
        norm = trial.points[0]["norm"]
        noise = random.Random(f"{norm} {trial.seed}").gauss
        looks = [level(norm, trial.seed) + noise(0, 0.1) for _ in range(validations)]
        curve = [{"step": step, "validation": value} for step, value in enumerate(looks, 1)]
        metrics = {"test": {METRIC: looks[-1]}, "validation": {METRIC: looks[-1]}}
        trials.append(replace(trial, curve=curve, result={**(trial.result or {}), "metrics": metrics}))
    return replace(record, trials=tuple(trials))


def test_a_report_names_an_endpoint_that_varies_less_than_the_final_metric():
    record = noisy(lambda norm, seed: 1.0 + 0.01 * seed)
    (task,) = (found := findings(record)).tasks
    ends, means = {}, {}
    for trial in record.trials:
        looks = [line["validation"] for line in trial.curve]
        ends[trial.points[0]["norm"], trial.seed] = looks[-1]
        means[trial.points[0]["norm"], trial.seed] = statistics.mean(looks[-10:])
    spread = [
        statistics.variance([values["layer", seed] - values["none", seed] for seed in range(8)])
        for values in (means, ends)
    ]
    assert task.steadier is not None and task.steadier.validations == 10
    assert task.steadier.share == pytest.approx(spread[0] / spread[1]) and 0.01 < task.steadier.share < 0.5
    words = "The mean of the last 10 validations varies less between seeds. As the endpoint of another study,"
    assert words in endpoint(found, task) and f"about {task.steadier.share:.0%} of the seeds" in endpoint(found, task)


def test_a_report_names_no_other_endpoint_where_it_would_not_help():
    def named(record: StudyRecord) -> bool:
        found = findings(record)
        return "As the endpoint of another study" in endpoint(found, found.tasks[0])

    alike = noisy(lambda norm, seed: 1.0)
    best = [
        replace(trial, trial={"seed": trial.seed, "train": {"steps": 40, "keep": "best"}}) for trial in alike.trials
    ]
    assert named(alike)
    assert not named(replace(alike, trials=tuple(best))), "the last validations are not those of the scored weights"
    assert not named(replace(alike, study=alike.study | {"endpoint": "tail"}))
    assert not named(noisy(lambda norm, seed: 1.0, validations=19)), "fewer than five to average"
    assert not named(noisy(lambda norm, seed: 1.0, seeds=4)), "too few seeds to estimate a variance"
    assert not named(noisy(lambda norm, seed: 1.0 + random.Random(f"{norm}{seed}").gauss(0, 2))), "the seeds vary more"
    assert not named(noisy(lambda norm, seed: 1.0 + 5 * (norm == "layer"))), "decided already"
