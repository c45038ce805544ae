"""Errors at and after the resumption of a trial: an error of the machine keeps the checkpoint."""

import errno
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from atn_norms.ablation import create, run
from atn_norms.ablation.execution.trial import BadState, Trainer
from atn_norms.ablation.grid import optimizers
from atn_norms.ablation.store.files import Folder, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.tasks.adding import Adding
from tests.test_trial import Stopped, make, outputs, run_trial, stop_at

ALLOCATION = "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes"
MACHINE = {
    "no memory": MemoryError(),
    "no memory of torch": RuntimeError(ALLOCATION),
    "no memory of a device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "a system error": OSError(errno.EIO, "Input/output error"),
}


def stopped(folder: Path) -> Any:
    """Return a trial that was stopped after its checkpoint at step 6."""
    trial = make(folder)
    with pytest.raises(Stopped):
        run_trial(trial, stop_at(7))
    return trial


def raising(error: BaseException) -> Any:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def resumed(trial: Any) -> int:
    """Train a trial to its end; return the first step that it took."""
    steps: list[int] = []
    run_trial(trial, steps.append)
    return steps[0]


@pytest.mark.parametrize("error", [*MACHINE.values(), ValueError("odd")], ids=[*MACHINE, "another error"])
def test_an_error_of_the_first_step_after_the_resumption_keeps_the_checkpoint(error, tmp_path, monkeypatch):
    whole, trial = make(tmp_path / "whole"), stopped(tmp_path / "study")
    run_trial(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Adding, "batch", raising(error))
        with pytest.raises(type(error)):
            run_trial(trial)
    assert (trial.path / "checkpoint.pt").exists()
    assert resumed(trial) == 7
    assert outputs(trial) == outputs(whole)


def test_such_an_error_is_a_failed_trial_of_the_run(tmp_path, monkeypatch):
    trial = stopped(tmp_path / "study")
    with monkeypatch.context() as patch:
        patch.setattr(Adding, "batch", raising(RuntimeError(ALLOCATION)))
        (failed,) = run(tmp_path / "study", workers=0).trials
    assert failed.status == "failed" and ALLOCATION in (failed.error or {})["error"]
    assert resumed(trial) == 7


@pytest.mark.parametrize("place", ["model", "optimizer", "archive"])
@pytest.mark.parametrize("error", MACHINE.values(), ids=MACHINE)
def test_an_error_of_the_machine_while_a_checkpoint_is_loaded_keeps_it(error, place, tmp_path, monkeypatch):
    trial = stopped(tmp_path / "study")
    owner, name = {
        "model": (torch.nn.Module, "load_state_dict"),
        "optimizer": (torch.optim.Optimizer, "load_state_dict"),
        "archive": (torch, "load"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(error))
        with pytest.raises(type(error)):
            run_trial(trial)
    assert (trial.path / "checkpoint.pt").exists() and resumed(trial) == 7


def test_a_checkpoint_that_the_system_cannot_read_is_kept(tmp_path, monkeypatch):
    trial, open_file = stopped(tmp_path / "study"), Folder.open

    def fail(folder: Folder, name: str, flags: int = os.O_RDONLY) -> int:
        if name == "checkpoint.pt":
            raise OSError(errno.EIO, "Input/output error")
        return open_file(folder, name, flags)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "open", fail)
        with pytest.raises(StoreError, match=r"cannot read .*checkpoint.pt: Input/output error"):
            run_trial(trial)
    assert (trial.path / "checkpoint.pt").exists() and resumed(trial) == 7


FUNCTION = """
from pathlib import Path


def train(trial, stop):
    state = trial.checkpoint.load() or {"step": 0}
    for step in range(state["step"] + 1, 5):
        trial.report(step, 1 / step)
        trial.checkpoint.save({"step": step})
        if step == 2 and not Path(stop).exists():
            Path(stop).touch()
            raise RuntimeError("stopped")
    return 1.0
"""


@pytest.mark.parametrize("error", MACHINE.values(), ids=MACHINE)
def test_an_error_of_the_machine_keeps_the_checkpoint_of_a_function(error, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FUNCTION)
    arguments = {"stop": str(tmp_path / "stop")}
    task = {"kind": "python", "file": str(tmp_path / "mine.py"), "function": "train", "arguments": arguments}
    folder = create({"task": task, "seeds": 1}, tmp_path / "study")
    (first,) = run(folder, workers=0).trials
    assert first.status == "failed" and first.step == 2
    with monkeypatch.context() as patch:
        patch.setattr("atn_norms.ablation.execution.function.restore_random_state", raising(error))
        (second,) = run(folder, workers=0).trials
    assert second.status == "failed" and second.step == 2, second.error
    assert (StudyFolder(folder).trial(second.id).path / "checkpoint.pt").exists()
    (third,) = run(folder, workers=0).trials
    assert third.status == "done" and third.step == 4


@pytest.mark.parametrize("optimizer", optimizers.kinds())
@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_of_every_optimizer_is_restored(steps, optimizer, tmp_path):
    trial = make(tmp_path / "study", optimizer=optimizer).trial()
    straight = Trainer(trial)
    for _ in range(steps):
        straight.advance()
    state = deepcopy(straight.state())
    straight.advance()
    again = Trainer(trial)
    again.restore(state)
    again.advance()
    pairs = zip(straight.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("change", ["shape", "entry"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor", "adagrad"])
def test_a_state_that_does_not_fit_the_optimizer_is_rejected_while_it_is_loaded(optimizer, change, tmp_path):
    options = {"kind": "sgd", "lr": 0.1, "momentum": 0.9} if optimizer == "sgd" else optimizer
    trial = make(tmp_path / "study", optimizer=options).trial()
    trainer = Trainer(trial)
    trainer.advance()
    state = deepcopy(trainer.state())
    entries = next(iter(state["optimizer"]["state"].values()))
    name = next(name for name, value in entries.items() if value.numel() > 1)
    if change == "shape":
        entries[name] = torch.zeros(99)
    else:
        del entries[name]
    with pytest.raises(BadState, match=r"optimizer: got another state; expected that of the trial's optimizer"):
        Trainer(trial).restore(state)
