"""Kills between steps and at random moments: weights, losses and results stay the same, bit for bit."""

import random
import signal
import time

import pytest
import torch

from atn_norms.ablation import create
from tests.compare import compare
from tests.faults import children
from tests.faults.children import STUDY, Child, ended
from tests.faults.registry import fault

STEPS = STUDY["train"]["steps"]


def last_state(folder):
    """The last checkpoint of a study's only trial, which is killed when it is about to declare itself done."""
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
    for files in (ours, theirs):  # which say how often to checkpoint
        for name in [name for name in files if name.endswith(("trial.json", ".yaml", "resolved.json"))]:
            del files[name]
    assert ours == theirs and len(ours) == 2


def kill_at_random(place, kills, seed):
    """A study, killed so often at random moments, and begun anew where it was done before that."""
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
        assert ended(children.whole, folder, study).said["done"] == 3
        assert children.truth(folder) == truth


@fault("10 SIGKILLs at random moments, one after the other; 100 in the long run", "identical")
@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.deep)])
def test_killed_at_random(kills, place):
    kill_at_random(place, kills, seed=kills)


@fault("two runs started on one folder at once", "one trains, the other says so and ends; identical")
def test_two_runs_at_once(place, undisturbed):
    for number in range(3):
        folder = place / str(number)
        with Child(children.whole, folder) as one, Child(children.whole, folder) as other:
            told = [one.outcome(), other.outcome()]
        refused = [each.error for each in told if each.error]
        assert len(refused) <= 1 and all("another run is at work on this study" in each for each in refused)
        assert children.truth(folder) == undisturbed


@fault("a run refused for another, both of which found no folder", "it removes nothing of the other's; identical")
def test_the_one_refused_removes_nothing(place, undisturbed):
    folder = place / "above" / "study"
    with Child(children.whole, folder, fault="stop@.lock:begin") as late:
        late.stands_still()
        with Child(children.whole, folder, fault="stop@.lock:told") as first:
            first.stands_still()
            late.signal(signal.SIGCONT)
            assert "another run is at work on this study" in late.outcome().error
            assert (folder / ".lock").exists()
            first.signal(signal.SIGCONT)
            assert first.outcome().error == ""
    assert children.truth(folder) == undisturbed


@fault("four processes that want the same trial", "one trains it, the others say that it is taken; identical")
def test_one_trial_wanted_by_many(place, undisturbed):
    folder = place / "study"
    create(STUDY, folder)
    (identity,) = children.identities(folder)
    many = [Child(children.one_trial, folder, identity) for _ in range(4)]
    told = [child.outcome().said for child in many]
    assert all(each == {} or "is being trained by another process" in each["busy"] for each in told), told
    assert {} in told
    assert children.truth(folder) == undisturbed
