"""Estimates of a study's duration: before it starts, without side effects, and the remaining time while it runs."""

import csv
import heapq
import itertools
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from atn_norms.ablation import Event, StudySpec, TrialRecord, create, load, make_plan, run
from atn_norms.ablation.execution.estimate import costs, duration_of, estimate
from atn_norms.ablation.execution.remaining import RemainingTime

STUDY = {
    "model": {"cell": "rnn", "hidden_size": 3},
    "task": {"kind": "adding", "length": 5, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 2, "batch_size": 5},
    "axes": {"norm": ["none", "layer"], "train.steps": [2, 200]},
    "seeds": 2,
}


def test_an_estimate_is_a_positive_time_that_grows_with_the_work(tmp_path):
    short = estimate(load(create(STUDY | {"axes": {"norm": ["none", "layer"]}}, tmp_path / "short")), 1)
    long = estimate(load(create(STUDY, tmp_path / "long")), 1)
    assert short is not None
    assert long is not None
    assert 0 < short < long


def test_trials_of_different_cost_are_timed_separately(monkeypatch):
    timed = []
    monkeypatch.setattr("atn_norms.ablation.execution.estimate._timed", lambda trial: timed.append(trial) or (1.0, 1.0))
    axes = {"hidden_size": [3, 4], "norm": ["none", "batch"], "train.population_batches": [0, 9], "train.steps": [2, 3]}
    trials = make_plan(StudySpec.model_validate(STUDY | {"axes": axes})).trials
    assert duration_of([each.trial for each in trials], 1)
    assert len(timed) == 6, "seeds and numbers of steps have the same cost, and so have points of one trial"


def test_an_estimate_leaves_the_random_state_and_the_folder_alone(tmp_path):
    folder = create(STUDY, tmp_path / "study")
    before, files, threads = torch.get_rng_state(), sorted(folder.rglob("*")), torch.get_num_threads()
    estimate(load(folder), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert sorted(folder.rglob("*")) == files


def test_a_finished_study_is_estimated_without_timing(tmp_path):
    folder = create(STUDY | {"axes": {}}, tmp_path / "study")
    assert estimate(run(folder, workers=0), 1) is None


def test_an_arm_with_finished_trials_takes_their_time(tmp_path, monkeypatch):
    folder = create(STUDY | {"axes": {"norm": ["none", "layer"]}}, tmp_path / "study")
    done: Any = run(folder, workers=0)
    for trial in done.trials:
        if trial.seed == 1:
            (trial.folder / "result.json").unlink()
    monkeypatch.setattr("atn_norms.ablation.execution.estimate._timed", lambda trial: pytest.fail("timed"))
    expected = {trial.points[0]["norm"]: trial.run["seconds"] for trial in done.trials if trial.seed == 0}
    record, predicted = load(folder), costs(load(folder)) or {}
    left = [trial for trial in record.trials if trial.id in predicted]
    assert {trial.points[0]["norm"]: predicted[trial.id] for trial in left} == expected and len(predicted) == 2


RESULTS = sorted(Path(__file__).parent.parent.glob("docs/results/*/results.csv"))
TENTHS = [each / 10 for each in range(1, 10)]


def trial(arm, number, steps=1000, kind="adding", step=0):
    content = {"task": {"kind": kind}, "model": {"norm": arm}, "train": {"steps": steps}}
    return TrialRecord(f"{arm}/{number}", content, ({"norm": arm},), number, "pending", step=step)


def events(trials, seconds, workers, ends: Any = None, startup=0.0, looks=20):
    """Return the events (time, event) of a run in which trial i takes `seconds[i]` and ends after `ends[i]` steps."""
    free, made = [0.0] * workers, []
    for number, (each, duration) in enumerate(zip(trials, seconds, strict=True)):
        began = heapq.heappop(free)
        start = began + (startup if began == 0 else 0.0)  # the first trial of each process imports torch
        heapq.heappush(free, start + duration)
        steps = each.trial["train"]["steps"]
        last = steps if ends is None else ends[number]
        made.append((began, "started", each, 0))
        made += [(start + duration * i / looks, "step", each, last * i // looks) for i in range(1, looks)]
        made.append((start + duration, "done", each, last))
    made.sort(key=lambda one: (one[0], one[1] == "started"))
    over = itertools.accumulate(kind == "done" for _, kind, _, _ in made)
    return [
        (time, Event(kind, each.id, {}, step, each.trial["train"]["steps"], ended, len(trials)))
        for (time, kind, each, step), ended in zip(made, over, strict=True)
    ]


def errors(trials, seconds, workers, predicted=None, at=TENTHS, **options):
    """Return the factors by which the estimates at these shares of a run differ from the true remaining time."""
    seen, factors = events(trials, seconds, workers, **options), []
    total, remaining = seen[-1][0], RemainingTime(trials, workers, predicted)
    for share in at:
        now = share * total
        while seen[0][0] <= now:
            time, event = seen.pop(0)
            remaining.see(event, time)
        left = remaining.seconds(now)
        factors.append(math.inf if left is None else math.exp(abs(math.log(max(left, 1e-9) / (total - now)))))
    return factors


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_the_remaining_time_of_a_recorded_study_is_within_a_factor_after_a_tenth(file, workers):
    """Recorded trials with the median time of their arm: the machine had other, changing load meanwhile."""
    rows = [row for row in csv.DictReader(file.open()) if row["seconds"]]  # a study may be unfinished
    arms = [f"{row['norm']} {row['window']}" for row in rows]
    times = {arm: [float(row["seconds"]) for row, of in zip(rows, arms, strict=True) if of == arm] for arm in arms}
    trials = [trial(arm, number, int(row["steps"])) for number, (row, arm) in enumerate(zip(rows, arms, strict=True))]
    draw = random.Random(len(rows) + workers)
    seconds = [statistics.median(times[arm]) for arm in arms]
    timed = {arm: draw.uniform(0.4, 0.6) for arm in sorted(times)}  # a few steps of an idle process are faster
    predicted = {each.id: timed[arm] * seconds[i] for i, (each, arm) in enumerate(zip(trials, arms, strict=True))}
    found = errors(trials, seconds, workers, predicted)
    assert max(found) < 1.5, found


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_arms_of_different_speeds_are_estimated_within_a_factor_after_a_tenth(workers, seeds):
    draw = random.Random(seeds * workers)
    speeds = {"none": 10.0, "layer": 25.0, "batch": 40.0, "slow": 90.0}
    trials = [trial(arm, seed) for seed in range(seeds) for arm in speeds]
    seconds = [speeds[each.points[0]["norm"]] * draw.uniform(0.9, 1.1) for each in trials]
    timed = {arm: draw.uniform(0.8, 1.2) / workers for arm in speeds}  # a single trial is faster than parallel ones
    predicted = {each.id: speeds[each.points[0]["norm"]] * timed[each.points[0]["norm"]] for each in trials}
    found = errors(trials, seconds, workers, predicted, startup=6.0)
    assert max(found) < 1.5, found


@pytest.mark.parametrize("workers", [1, 2])
def test_trials_that_stop_early_are_expected_to_stop_early_again(workers):
    trials = [trial("layer", seed) for seed in range(12)]
    found = errors(trials, [30.0] * 12, workers, ends=[200] * 12, at=TENTHS[workers:])
    assert max(found) < 1.5, found


@pytest.mark.parametrize("looks", [1, 20])
def test_functions_with_an_unknown_number_of_reports_are_estimated_by_ended_trials(looks):
    trials = [trial("layer", seed, 1, "python") for seed in range(20)]
    last = 0 if looks == 1 else 20  # 20 epochs, or no reports at all
    assert errors(trials, [30.0] * 20, 1, ends=[last] * 20, looks=looks, at=[0.02]) == [math.inf], "nothing is known"
    found = errors(trials, [30.0] * 20, 2, ends=[last] * 20, looks=looks)
    assert max(found) < 1.5, found


def test_steps_of_an_earlier_run_do_not_count_as_speed():
    first, second = trial("layer", 0, step=900), trial("layer", 1)
    remaining = RemainingTime([first, second], 1)
    made: Any = ((0.0, "started", 0), (1.0, "step", 900), (11.0, "step", 910), (101.0, "done", 1000))
    for time, kind, step in made:
        remaining.see(Event(kind, first.id, {}, step, 1000, 0, 2), time)
        if kind == "step":
            left = remaining.seconds(time)
            assert left == (None if step == 900 else pytest.approx(90 + 1000))
    assert remaining.seconds(101.0) == pytest.approx(1000)


def test_a_trial_of_another_process_takes_no_worker_and_a_failed_one_no_time():
    trials = [trial("layer", number, 100) for number in range(4)]
    remaining = RemainingTime(trials, 1)

    def see(time, kind: Any, number, step=0):
        remaining.see(Event(kind, trials[number].id, {}, step, 100, 0, 4), time)

    for time, kind, step in ((0.0, "started", 0), (1.0, "step", 1), (11.0, "step", 11)):
        see(time, kind, 0, step)
        see(time, kind, 1, step)
    see(11.0, "busy", 1, 11)
    assert remaining.seconds(11.0) == pytest.approx(89 + 100 + 100)
    see(11.0, "failed", 0, 11)
    assert remaining.seconds(11.0) == pytest.approx(100 + 100)
    remaining = RemainingTime(trials[:2], 1)
    for time, kind, step in ((0.0, "started", 0), (1.0, "step", 1), (91.0, "step", 91)):
        see(time, kind, 0, step)
    for step in (1, 11):
        see(81.0 + step - 1, "busy", 1, step)
    assert remaining.seconds(91.0) == pytest.approx(89), "the run waits for the trial of the other process"


def test_an_arm_that_has_run_takes_its_own_time_instead_of_the_predicted_one():
    trials = [trial("fast", 0), *(trial("slow", seed) for seed in range(4))]
    (factor,) = errors(trials, [10.0, *[100.0] * 4], 1, at=[0.27])  # all are predicted to take equally long
    assert factor < 1.01


def test_trials_that_outlast_their_estimate_have_no_remaining_time():
    trials = [trial("a", 1, kind="python", steps=1), trial("b", 2, kind="python", steps=1)]
    remaining = RemainingTime(trials, 1)

    def see(kind, which, step, now):
        remaining.see(Event(kind, which.id, {}, step, 1, 0, 2), now)

    see("started", trials[0], 0, 0.0)
    see("done", trials[0], 2, 1.0)
    see("started", trials[1], 0, 1.0)
    assert remaining.seconds(1.5) == 0.5
    see("step", trials[1], 2, 3.0)
    assert remaining.seconds(3.0) is None, "not 0 s: its steps are unknown"
