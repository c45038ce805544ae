"""Estimate the duration of a study before it starts, without side effects."""

import torch

from atn_norms.ablation import StudySpec, create, load, make_plan, run
from atn_norms.ablation.execution.estimate import duration_of, estimate

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
    assert len(timed) == 6, "seeds have the same cost, and so have points of one trial"


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
