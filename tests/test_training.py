"""Training: schedules, early stopping, kept weights, divergence, and recommended settings of a task."""

import copy
import math
from pathlib import Path

import pytest
import torch

from atn_norms.ablation import StudySpec, create, load, make_plan
from atn_norms.ablation.execution.trial import Diverged, Trainer, run_trial
from atn_norms.ablation.report.csv_export import scored_step
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.normalizers import BatchNorm
from atn_norms.tasks.adding import Adding
from tests.compare import compare

STUDY = {
    "model": {"cell": "lstm", "hidden_size": 4, "norm": "layer", "window": 3},
    "task": {"kind": "adding", "length": 5, "train": 40, "validation": 10, "test": 10},
    "seeds": 1,
}
TRAIN = {"steps": 12, "batch_size": 6, "eval_every": 2, "log_every": 1, "checkpoint_every": 1}


def study(task=None, **train):
    return {**STUDY, "task": task or STUDY["task"], "train": {**TRAIN, **train}}


def trial_of(data):
    (trial,) = make_plan(StudySpec.model_validate(data)).trials
    return trial.trial


def make(folder, data):
    create(data, folder)
    return StudyFolder(folder).trial(load(folder).trials[0].id)


def scored(trainer, scores):
    """Make validation return these scores in order; return the list of calls."""
    scores = iter(scores)
    trainer.task.evaluate = lambda model, split: {"mean squared error": next(scores)}
    return trainer


def steps_of(trainer):
    while not trainer.finished:
        trainer.advance()
    return trainer.step


def test_the_optimizer_receives_the_rate_of_each_step():
    schedule = {"kind": "linear", "warmup": 2}
    trainer = Trainer(trial_of(study(optimizer={"kind": "sgd", "lr": 1.0}, clip_grad_norm=1e-3, schedule=schedule)))
    moved = []
    for _ in range(6):
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.advance()
        differences = [(p - q).flatten() for p, q in zip(trainer.model.parameters(), before, strict=True)]
        moved.append(torch.cat(differences).norm().item() / 1e-3)
    assert moved == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.8, 0.7], rel=1e-2)


def test_patience_ends_training_and_is_reported(tmp_path, monkeypatch):
    trainer = scored(Trainer(trial_of(study(patience=2))), [3.0, 2.0, 2.5, 2.0, 1.0])
    assert steps_of(trainer) == 8, "two looks without a better score than that of step 4"
    data = study(patience=1, steps=1000, optimizer={"kind": "sgd", "lr": 1e-12})
    folder = make(tmp_path / "study", data)
    assert run_trial(folder) == "finished"
    result = folder.result()
    assert result is not None and result["step"] < 1000 and result["reason"] == "no improvement in 1 validation"
    assert result["metrics"].keys() == {"validation", "test"}
    assert load(tmp_path / "study").trials[0].status == "done"


def test_the_scored_step_of_the_report_is_that_of_the_best_validation(tmp_path):
    folder = make(tmp_path / "study", study(keep="best", steps=24, optimizer={"kind": "sgd", "lr": 0.5}))
    run_trial(folder)
    record = load(tmp_path / "study")
    (trial,), step = record.trials, scored_step(record, record.trials[0])
    looks = {line["step"]: line["validation"] for line in trial.curve if line["validation"] is not None}
    assert step is not None and step < 24, "otherwise the test is void"
    assert trial.result is not None
    assert trial.result["metrics"]["validation"]["mean squared error"] == looks[step] == min(looks.values())


def test_without_patience_all_steps_are_taken_and_no_reason_is_reported(tmp_path):
    folder = make(tmp_path / "study", study())
    run_trial(folder)
    result = folder.result()
    assert result is not None and result["step"] == 12 and "reason" not in result


@pytest.mark.parametrize(("goal", "best"), [("min", 2), ("max", 3)])
def test_the_best_weights_are_kept_for_both_goals(goal, best):
    trainer = scored(Trainer(trial_of(study(keep="best", steps=8))), [3.0, 2.0, 5.0, 4.0, 0.0, 0.0])
    trainer.task.goal = goal
    weights = []
    while not trainer.finished:
        trainer.advance()
        weights.append({name: each.clone() for name, each in trainer.model.state_dict().items()})
    compare(trainer.kept, weights[2 * best - 1], tolerance=0)


def test_the_last_weights_are_scored_by_default():
    trainer = scored(Trainer(trial_of(study(steps=4))), [1.0, 2.0, 0.0, 0.0])
    steps_of(trainer)
    last = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    trainer.conclude()
    compare(trainer.model.state_dict(), last, tolerance=0)
    assert trainer.kept is None


@pytest.mark.parametrize("momentum", [0.1, None])
def test_renewed_populations_are_those_of_the_weights_that_are_scored(momentum):
    data = study(population_batches=7, optimizer={"kind": "sgd", "lr": 0.3})
    norm = {"kind": "batch", "momentum": momentum}
    data["model"] = data["model"] | {"norm": norm, "num_layers": 2, "dropout": 0.3}
    trial = trial_of(data)
    plain = Trainer(trial | {"train": trial["train"] | {"population_batches": 0}})
    steps_of(plain)
    ended, random, lagging = copy.deepcopy(plain.model.state_dict()), torch.get_rng_state(), plain.conclude()
    for each in plain.model.modules():
        if isinstance(each, BatchNorm):
            each.running_mean.fill_(1e6)  # values from training must have no effect
            each.momentum, each.num_batches_tracked[...] = None, 0
    plain.model.train()
    with torch.no_grad():
        for step in range(7):
            plain.task.loss(plain.model, plain.task.batch(step, 6), None)
    by_hand = plain.conclude()

    trainer = Trainer(trial)
    steps_of(trainer)
    for _ in range(2):
        compare(trainer.model.state_dict(), ended, tolerance=0)  # the state of training is unchanged
        assert torch.equal(torch.get_rng_state(), random)
        assert trainer.conclude() == by_hand != lagging
    assert {each.momentum for each in trainer.model.modules() if isinstance(each, BatchNorm)} == {momentum}


def test_populations_are_renewed_only_where_requested_and_the_identity_is_kept(monkeypatch):
    assert "population_batches" not in trial_of(study())["train"]
    assert trial_of(study(population_batches=2)) == trial_of(study()), "a layer norm has no population to renew"
    data = study(population_batches=2)
    data["model"] = data["model"] | {"norm": {"sites": {"hh": "batch"}}}
    assert trial_of(data)["train"]["population_batches"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(Adding, "encoder", lambda self: BatchNorm(2))  # a task may contain norms
        assert trial_of(study(population_batches=2))["train"]["population_batches"] == 2
    trial = trial_of(study({**SMALL, "kind": "copying"}))
    trainer = Trainer(trial | {"train": trial["train"] | {"population_batches": 2}})
    monkeypatch.setattr(trainer.task, "loss", None)
    trainer.evaluate("test")


def test_an_interrupted_renewal_restores_the_populations(monkeypatch):
    data = study(population_batches=3)
    data["model"] = data["model"] | {"norm": "batch"}
    trainer = Trainer(trial_of(data))
    trainer.advance()
    before, loss, calls = copy.deepcopy(trainer.model.state_dict()), trainer.task.loss, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(trainer.task, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate("test")
    compare(trainer.model.state_dict(), before, tolerance=0)


def test_a_loss_that_is_not_finite_is_divergence_at_its_step(monkeypatch):
    trainer = Trainer(trial_of(study()))
    loss = trainer.task.loss

    def broken(model, batch, carry):
        value, carry = loss(model, batch, carry)
        return value * (math.nan if trainer.step == 4 else 1), carry

    monkeypatch.setattr(trainer.task, "loss", broken)
    with pytest.raises(Diverged, match="the training loss is nan"):
        steps_of(trainer)
    assert trainer.step == 5


@pytest.mark.parametrize(("explosion", "diverges"), [(1e3, True), (1e6, False), (None, False)])
def test_a_loss_that_grows_beyond_bounds_is_divergence(tmp_path, monkeypatch, explosion, diverges):
    from atn_norms.tasks import Adding

    loss = Adding.loss
    steps = []

    def growing(self, model, batch, carry):
        value, carry = loss(self, model, batch, carry)
        steps.append(value.item())
        return value / value.detach() * 10 ** min(len(steps) - 1, 5), carry

    monkeypatch.setattr(Adding, "loss", growing)
    folder = make(tmp_path / "study", study(divergence_factor=explosion))
    assert run_trial(folder) == ("diverged" if diverges else "finished")
    result = folder.result()
    assert result is not None
    if diverges:
        assert result["step"] == 5 and result["metrics"] == {}
        assert result["reason"] == "the training loss is 1e+04, over 1000 times what it was at first"
        record = load(tmp_path / "study").trials[0]
        assert record.status == "diverged" and record.curve[-1]["step"] == 4


def texts(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question\n" * 20)
    return str(path)


DATA = Path(__file__).parent / "data"
SMALL = {"recall": 2, "length": 3, "validation": 9, "test": 9}
VARIANTS = {
    "plateau": {  # the rate is so high that validation becomes worse; the rate is halved, and training ends early
        "schedule": {"kind": "plateau", "patience": 1},
        "optimizer": {"kind": "adam", "lr": 0.3},
        "patience": 4,
        "keep": "best",
        "steps": 30,
    },
    "cosine": {"schedule": {"kind": "cosine", "warmup": 3}, "optimizer": {"kind": "asgd", "lr": 0.5}},
    "words": {"task": {"kind": "wordlm", "embedding": 4, "segment": 3, "carry": "hidden"}, "keep": "best"},
    "populations": {"task": SMALL | {"kind": "copying"}, "population_batches": 3, "keep": "best"},
    "copying": {"task": SMALL | {"kind": "copying"}, "schedule": "linear"},
    "denoise": {"task": SMALL | {"kind": "denoise"}, "optimizer": "adagrad"},
    "series": {
        "task": {"kind": "series", "file": str(DATA / "load.csv"), "targets": ["load"], "context": 9, "horizon": 2},
        "keep": "best",
    },
    "sequences": {"task": {"kind": "sequences", "path": str(DATA / "strokes")}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trial_stopped_after_every_step_equals_the_uninterrupted(tmp_path, variant):
    options = dict(VARIANTS[variant])
    task = options.pop("task", None)
    if task and task["kind"] == "wordlm":
        task = {**task, "text": texts(tmp_path)}
    data = study(task, **options)
    if variant == "populations":
        data["model"] = data["model"] | {"norm": "batch"}
    whole, stopped = make(tmp_path / "whole", data), make(tmp_path / "stopped", data)
    run_trial(whole)
    if variant == "plateau":
        scores = [line["validation"] for line in whole.curve() if line["validation"] is not None]
        assert min(scores) < scores[-1] and "reason" in whole.result(), "there is a schedule's state to lose"  # type: ignore[operator]

    class Stopped(Exception):
        pass

    def stop(step):
        raise Stopped

    for _ in range(whole.result()["step"]):  # type: ignore[index]
        with pytest.raises(Stopped):
            run_trial(stopped, stop)
    run_trial(stopped)
    for file in ("result.json", "metrics.jsonl"):
        assert (stopped.path / file).read_bytes() == (whole.path / file).read_bytes(), file


def test_a_task_s_settings_apply_where_the_study_has_none():
    bare = {**STUDY, "task": "copying"}
    assert trial_of(bare)["train"] | {"log_every": 0} == trial_of(bare)["train"] | {
        "steps": 4000, "batch_size": 128, "eval_every": 400, "log_every": 0
    }  # fmt: skip
    optimizer = trial_of(bare)["train"]["optimizer"]
    assert (optimizer["kind"], optimizer["lr"], optimizer["momentum"]) == ("rmsprop", 2e-4, 0.9)

    def optimizer_of(**changes):
        found = trial_of({**bare, **changes})["train"]["optimizer"]
        return found["kind"], found["lr"], found.get("momentum")

    assert optimizer_of(train={"optimizer": "sgd"}) == ("sgd", 1e-3, 0.0), "another optimizer has its own defaults"
    assert optimizer_of(train={"optimizer": {"kind": "sgd"}}) == ("sgd", 1e-3, 0.0)
    assert optimizer_of(train={"optimizer": {"lr": 0.5}}) == ("rmsprop", 0.5, 0.9), "an option changes one thing"
    assert optimizer_of(axes={"train.optimizer.lr": [0.25]}) == ("rmsprop", 0.25, 0.9)
    assert trial_of({**bare, "train": {"steps": 7}})["train"]["steps"] == 7
    assert trial_of({**STUDY, "task": "charlm"})["train"]["clip_grad_norm"] == 3.0
    assert trial_of({**STUDY, "task": "charlm", "train": {"clip_grad_norm": None}})["train"]["clip_grad_norm"] is None


def test_shared_weights_are_trained_together(tmp_path):
    task = {"kind": "charlm", "text": texts(tmp_path), "embedding": 4, "segment": 5}
    trainer = Trainer(trial_of(study(task, optimizer={"kind": "sgd", "lr": 0.5})))
    trainer.advance()
    encoder, readout = trainer.model.encoder.weight, trainer.model.readout.weight
    assert (
        encoder is readout
        and sum(parameter is encoder for parameter in trainer.optimizer.param_groups[0]["params"]) == 1
    )
    trainer.restore(trainer.state())
    assert trainer.model.encoder.weight is trainer.model.readout.weight


def test_each_of_several_tasks_has_its_own_settings():
    plan = make_plan(StudySpec.model_validate({**STUDY, "task": None, "tasks": ["adding", "copying", "wordlm"]}))
    found = {trial.trial["task"]["kind"]: trial.trial["train"] for trial in plan.trials}
    assert {kind: train["steps"] for kind, train in found.items()} == {
        "adding": 20_000,
        "copying": 4000,
        "wordlm": 2000,
    }
    assert found["adding"]["optimizer"]["kind"] == "rmsprop" and found["wordlm"]["optimizer"]["kind"] == "adam"
