"""Signals to the command line: SIGINT and SIGTERM shut it down cleanly; after SIGKILL no worker remains."""

import json
import signal
import time

import pytest

from atn_norms.ablation import load
from tests.faults import children
from tests.faults.children import ended
from tests.faults.programs import Program
from tests.faults.registry import fault
from tests.waiting import until

STUDY = {
    **children.STUDY,
    "model": {"cell": "rnn", "hidden_size": 3, "backend": "reference"},  # slow enough to be killed while training
    "train": {**children.STUDY["train"], "steps": 600, "log_every": 100, "eval_every": 300, "checkpoint_every": 50},
    "axes": {"norm": ["none", "layer"]},
}
SLOW = ["--set", "train.steps=1000000", "--set", "train.eval_every=1000000"]
HINT = "stopped; finished work is kept. To resume: "


@pytest.fixture
def ablate(place):
    """Start `atn-norms ablate` in a separate folder; the study is in the subfolder `here`."""
    (place / "study.json").write_text(json.dumps(STUDY))

    def start(*arguments, fault=None):
        command = ["atn_norms", "ablate", place / "study.json", "--out", "here", *arguments]
        return Program(["tests.faults.failing", fault, *command] if fault else command, place)

    return start


def at_work(folder):
    return folder.exists() and any(folder.glob("trials/*/checkpoint.pt"))


@fault("the run killed (kill -9) while its two local processes train", "the local processes end; resumed, identical")
@pytest.mark.deep
def test_a_killed_run_leaves_no_process(ablate, place):
    with ablate() as program:
        assert until(lambda: at_work(place / "here") or program.process.poll() is not None), program.output()
        assert len(program.members()) >= 3, program.output()
        program.signal(signal.SIGKILL)
        program.ends()
        assert until(lambda: not program.members())
    assert ended(children.whole, place / "here", STUDY).error == ""
    assert ended(children.whole, place / "whole", STUDY).error == ""
    assert children.truth(place / "here") == children.truth(place / "whole")


@pytest.mark.deep
@fault("SIGTERM to the run while its local processes train", "they end, the resume command is printed, exit code 143")
def test_sigterm_shuts_down_cleanly(ablate, place):
    with ablate(*SLOW) as program:
        assert until(lambda: at_work(place / "here") or program.process.poll() is not None), program.output()
        program.signal(signal.SIGTERM)
        assert program.ends() == 143, program.output()
        assert until(lambda: not program.members())
        assert program.output().endswith(f"{HINT}atn-norms resume here\n") and "Traceback" not in program.output()
    assert load(place / "here").count("pending") == 2


@fault("Ctrl-C or SIGTERM while the folder is created or opened", "clean shutdown, the resume command is printed")
@pytest.mark.parametrize(
    ("moment", "number"), [("study.yaml:written", signal.SIGINT), (".lock:written#2", signal.SIGTERM)]
)
def test_signals_before_training_shut_down_cleanly(moment, number, ablate, place):
    with ablate("--workers", "0", fault=f"stop@{moment}") as program:
        assert until(lambda: stands_still(program) or program.process.poll() is not None)
        program.signal(number)
        program.signal(signal.SIGCONT)
        assert program.ends() == 128 + number, program.output()
        command = "the same command" if number == signal.SIGINT else "atn-norms resume here --workers 0"
        assert program.output().endswith(f"{HINT}{command}\n") and "Traceback" not in program.output()
        assert not program.members()
    assert (place / "here").exists() == (number == signal.SIGTERM), "an incomplete folder is removed"


def stands_still(program):
    return "T" in program.states()


def interrupted_after(program, seconds, number):
    """Signal all processes some time after the first output; Python's own startup is not under test."""
    assert until(lambda: "study 'study'" in program.output() or program.process.poll() is not None)
    time.sleep(seconds)
    (program.signal_group if number == signal.SIGINT else program.signal)(number)
    # `python -m` dies of SIGINT when the signal arrives inside an `exec`, as in the import of dataclasses, even if the
    # program handles it. A shell reports 130 in both cases.
    assert program.ends() in ({128 + number, -number} if number == signal.SIGINT else {128 + number}), program.output()
    assert until(lambda: not program.members())
    assert program.output().endswith(f"{HINT}atn-norms resume here\n") and "Traceback" not in program.output()


@fault("Ctrl-C while the local processes start", "clean shutdown, no process left")
def test_interrupted_while_workers_start(ablate):
    with ablate(*SLOW) as program:
        interrupted_after(program, 1.0, signal.SIGINT)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("seconds", "number"),
    [(0.0, signal.SIGINT), (0.5, signal.SIGTERM), (1.5, signal.SIGHUP), (2.5, signal.SIGINT), (4.0, signal.SIGTERM)],
)
def test_signals_at_any_time_shut_down_cleanly(seconds, number, ablate):
    with ablate(*SLOW) as program:
        interrupted_after(program, seconds, number)
