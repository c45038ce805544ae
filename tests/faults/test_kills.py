"""Kill a study between steps and at random moments: weights, losses and results are bit-identical."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from atn_norms.ablation import create
from tests.compare import compare
from tests.faults import children
from tests.faults.children import STUDY, Child, ended
from tests.faults.registry import fault

STEPS = STUDY["train"]["steps"]


def last_state(folder):
    """Return the last checkpoint of a study's only trial, which is killed before it records its result."""
    create(STUDY, folder)
    assert ended(children.whole, folder, fault="kill@result.json:begin").code == -signal.SIGKILL
    (path,) = folder.glob("trials/*/checkpoint.pt")
    return torch.load(path, weights_only=True)


@fault("a trial killed after every single step", "identical weights, optimizer state, losses and result")
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.deep), 2, pytest.param(4, marks=pytest.mark.deep)])
def test_killed_after_every_step(every, place, undisturbed):
    whole, killed = place / "whole", place / "killed"
    state = last_state(whole)
    create({**STUDY, "train": {**STUDY["train"], "checkpoint_every": every}}, killed)
    for step in range(1, STEPS + 1):
        assert ended(children.dying_at, killed, step).code == -signal.SIGKILL
    compare(last_state(killed), state, tolerance=0)
    assert ended(children.whole, killed).error == ""
    ours, theirs = children.truth(killed), dict(undisturbed)
    for files in (ours, theirs):  # they contain the checkpoint interval
        for name in [name for name in files if name.endswith(("trial.json", ".yaml", "resolved.json"))]:
            del files[name]
    assert ours == theirs
    assert {Path(name).name for name in ours} == {"metrics.jsonl", "model.safetensors", "result.json"}


def kill_at_random(place, kills, seed):
    """Kill a study repeatedly at random moments; restart it where it finished before the kill."""
    dice = random.Random(seed)
    study = {**STUDY, "axes": {"norm": ["layer", "rms", "none"]}, "train": {**STUDY["train"], "steps": 60}}
    assert ended(children.whole, place / "undisturbed", study).error == ""
    truth = children.truth(place / "undisturbed")
    folders, hits = [place / "0"], 0
    while hits < kills:
        with Child(children.whole, folders[-1], study) as child:
            time.sleep(dice.uniform(0.0, 0.3))
            child.process.kill()
            hits += child.outcome().code == -signal.SIGKILL
        if len(list(folders[-1].glob("trials/*/result.json"))) == 3:
            folders.append(place / str(len(folders)))
    for folder in folders:
        assert ended(children.whole, folder, study).result["done"] == 3
        assert children.truth(folder) == truth


@fault("10 SIGKILLs in sequence at random moments; 100 in the extended tests", "identical")
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.deep)])
def test_killed_at_random(kills, place):
    kill_at_random(place, kills, seed=kills)


@fault("two runs started at once on one folder", "one trains, the other exits with an error; identical")
def test_two_runs_at_once(place, undisturbed):
    for number in range(3):
        folder = place / str(number)
        with Child(children.whole, folder) as one, Child(children.whole, folder) as other:
            outcomes = [one.outcome(), other.outcome()]
        refused = [each.error for each in outcomes if each.error]
        assert len(refused) <= 1 and all("another run is at work on this study" in each for each in refused)
        assert children.truth(folder) == undisturbed


@fault("two runs that both create the folder", "the rejected run removes no file of the other; identical")
def test_a_rejected_run_removes_nothing(place, undisturbed):
    folder = place / "above" / "study"
    with Child(children.whole, folder, fault="stop@.lock:begin") as late:
        late.stands_still()
        with Child(children.whole, folder, fault="stop@.lock:written") as first:
            first.stands_still()
            late.signal(signal.SIGCONT)
            assert "another run is at work on this study" in late.outcome().error
            assert (folder / ".lock").exists()
            first.signal(signal.SIGCONT)
            assert first.outcome().error == ""
    assert children.truth(folder) == undisturbed


@fault("four processes that claim the same trial", "one trains it, the others report it as busy; identical")
def test_one_trial_claimed_by_many(place, undisturbed):
    folder = place / "study"
    create(STUDY, folder)
    (identity,) = children.identities(folder)
    many = [Child(children.one_trial, folder, identity) for _ in range(4)]
    outcomes = [child.outcome().result for child in many]
    assert all(each == {} or "is being trained by another process" in each["busy"] for each in outcomes), outcomes
    assert {} in outcomes
    assert children.truth(folder) == undisturbed
