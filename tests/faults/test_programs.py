"""The command line: asked to end at any moment it ends in order; killed, it leaves nobody at work."""

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
    "model": {"cell": "rnn", "hidden_size": 3, "backend": "reference"},  # slow enough to be killed at it
    "train": {**children.STUDY["train"], "steps": 600, "log_every": 100, "eval_every": 300, "checkpoint_every": 50},
    "axes": {"norm": ["none", "layer"]},
}
SLOW = ["--set", "train.steps=1000000", "--set", "train.eval_every=1000000"]
HINT = "stopped; what is finished is kept. To go on: "


@pytest.fixture
def ablate(place):
    """Start `atn-norms ablate` in a folder of its own; the study is at `here`."""
    (place / "study.json").write_text(json.dumps(STUDY))

    def start(*arguments, fault=None):
        command = ["atn_norms", "ablate", place / "study.json", "--out", "here", *arguments]
        return Program(["tests.faults.failing", fault, *command] if fault else command, place)

    return start


def at_work(folder):
    return folder.exists() and any(folder.glob("trials/*/checkpoint.pt"))


@fault("the run killed (kill -9) while its two local processes train", "they end by themselves; resumed, identical")
@pytest.mark.deep
def test_a_killed_run_leaves_nobody(ablate, place):
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
@fault("SIGTERM to the run while its local processes train", "they are ended, the way to go on is said, exit code 143")
def test_asked_to_end_it_ends_in_order(ablate, place):
    with ablate(*SLOW) as program:
        assert until(lambda: at_work(place / "here") or program.process.poll() is not None), program.output()
        program.signal(signal.SIGTERM)
        assert program.ends() == 143, program.output()
        assert until(lambda: not program.members())
        assert program.output().endswith(f"{HINT}atn-norms resume here\n") and "Traceback" not in program.output()
    assert load(place / "here").count("pending") == 2


@fault("Ctrl-C or SIGTERM while the folder is laid down, or opened", "ended in order, the way to go on is said")
@pytest.mark.parametrize(
    ("moment", "number"), [("study.yaml:written", signal.SIGINT), (".lock:told#2", signal.SIGTERM)]
)
def test_asked_to_end_before_training(moment, number, ablate, place):
    with ablate("--workers", "0", fault=f"stop@{moment}") as program:
        assert until(lambda: stands_still(program) or program.process.poll() is not None)
        program.signal(number)
        program.signal(signal.SIGCONT)
        assert program.ends() == 128 + number, program.output()
        how = "the same command" if number == signal.SIGINT else "atn-norms resume here --workers 0"
        assert program.output().endswith(f"{HINT}{how}\n") and "Traceback" not in program.output()
        assert not program.members()
    assert (place / "here").exists() == (number == signal.SIGTERM), "a half-made folder is taken away"


def stands_still(program):
    with open(f"/proc/{program.process.pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def interrupted_after(program, seconds, number):
    """Some time after the first words, all are told to end; what Python does before those is not the program's."""
    assert until(lambda: "study 'study'" in program.output() or program.process.poll() is not None)
    time.sleep(seconds)
    (program.everybody if number == signal.SIGINT else program.signal)(number)
    # `python -m` ends by SIGINT itself when that came inside an `exec` of a text, such as dataclasses do while they are
    # imported, whatever the program then made of it. To a shell both are 130.
    assert program.ends() in ({128 + number, -number} if number == signal.SIGINT else {128 + number}), program.output()
    assert until(lambda: not program.members())
    assert program.output().endswith(f"{HINT}atn-norms resume here\n") and "Traceback" not in program.output()


@fault("Ctrl-C while the local processes start", "ended in order, nobody left")
def test_interrupted_while_workers_start(ablate):
    with ablate(*SLOW) as program:
        interrupted_after(program, 1.0, signal.SIGINT)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("seconds", "number"),
    [(0.0, signal.SIGINT), (0.5, signal.SIGTERM), (1.5, signal.SIGHUP), (2.5, signal.SIGINT), (4.0, signal.SIGTERM)],
)
def test_asked_to_end_at_any_time(seconds, number, ablate):
    with ablate(*SLOW) as program:
        interrupted_after(program, seconds, number)
