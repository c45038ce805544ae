"""Saved models of a study: it saves the scored weights and loads them without the training code."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from atn_norms import files
from atn_norms.ablation import TrainSpec, create, load, run
from atn_norms.ablation.execution.trial import Trainer, run_trial
from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.ablation.store.identity import identity
from atn_norms.ablation.store.records import TaskFacts
from atn_norms.errors import SpecError
from atn_norms.layers import io, structure
from atn_norms.tasks import SeriesSpec
from tests.recorded import METRIC
from tests.recorded import study as recorded

pytest.importorskip("safetensors")

STUDY = {
    "model": {"cell": "lstm", "hidden_size": 4},
    "task": {"kind": "adding", "length": 5, "train": 40, "validation": 10, "test": 10},
    "train": {"steps": 6, "batch_size": 5, "eval_every": 2},
    "axes": {"norm": ["none", "layer", "batch"], "window": [1, 3]},
    "seeds": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = create(STUDY, tmp_path_factory.mktemp("kept") / "study")
    return run(folder, workers=0)


def scored_again(trial):
    """Return the test score of a trial's saved model on the trial's task."""
    return score(trial, "test")


def score(trial, split):
    trainer: Any = Trainer(trial.trial)
    trainer.model = trial.model()
    return trainer._score(split)


def test_the_saved_model_has_the_score_of_the_trial(finished):
    for trial in finished.trials:
        assert not io.foreign(trial.folder / "model.safetensors"), "neither the task nor its data is needed"
        assert scored_again(trial) == (trial.result or {})["metrics"]["test"], trial.points


def test_best_accepts_labels_of_the_study_file(finished):
    trial = finished.best(norm="layer", window=3)
    assert {"norm": "layer", "window": "3"}.items() <= trial.points[0].items()
    assert finished.best(norm="none", window=1) is finished.best(norm="none", window=3)
    assert finished.best(seed=1).seed == 1


def test_best_accepts_values_of_tuned_options(tmp_path):
    study = {**STUDY, "axes": {"norm": ["none", "layer"]}, "tune": {"train.optimizer.lr": [0.001, 0.01]}, "seeds": 1}
    record = run(create(study, tmp_path / "study"), workers=0)
    for norm in ("none", "layer"):
        for rate in (0.001, 0.01):
            trial = record.best(norm=norm, **{"train.optimizer.lr": rate})
            assert trial.trial["train"]["optimizer"]["lr"] == rate and trial.points[0]["norm"] == norm
    with pytest.raises(SpecError, match=r"train\.optimizer\.lr: got 0\.1; expected one of 0\.001, 0\.01"):
        record.best(**{"train.optimizer.lr": 0.1})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"nrom": "layer"}, "nrom: got an unknown axis; expected one of task, seed, norm, window; .*'norm'"),
        ({"norm": "laier"}, "norm: got laier; expected one of none, layer, batch; .*'layer'"),
        ({"window": 4}, "window: got 4; expected one of 1, 3"),
    ],
)
def test_best_rejects_unknown_labels(finished, labels, message):
    with pytest.raises(SpecError, match=message):
        finished.best(**labels)


@pytest.mark.parametrize(("goal", "seed"), [("min", 0), ("max", 2)])
def test_best_uses_validation_and_never_test(goal, seed):
    record = recorded(lambda norm, window, seed: 1.0, seeds=3, tasks={"adding": TaskFacts(METRIC, {}, goal)})
    trials = []
    for trial in record.trials:
        metrics = {"validation": {METRIC: 1.0 + trial.seed}, "test": {METRIC: 9.0 - trial.seed}}
        trials.append(replace(trial, result={**(trial.result or {}), "metrics": metrics}))
    assert replace(record, trials=tuple(trials)).best().seed == seed


def test_best_needs_one_task_and_a_finished_trial(tmp_path):
    both = {**STUDY, "tasks": [STUDY["task"], {**STUDY["task"], "length": 6}], "axes": {}, "seeds": 1}
    del both["task"]
    folder = create(both, tmp_path / "study")
    with pytest.raises(SpecError, match="got no finished trial with any label"):
        load(folder).best()
    record = run(folder, workers=0)
    with pytest.raises(SpecError, match="got 2 tasks, whose scores do not compare"):
        record.best()
    assert record.best(task=next(iter(record.tasks))).status == "done"


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("keep_model", ["last", "best", None])
def test_keep_model_selects_the_saved_and_keep_the_scored_weights(tmp_path, keep, keep_model):
    train = {"steps": 9, "batch_size": 5, "eval_every": 1, "optimizer": {"kind": "sgd", "lr": 0.4}, "keep": keep}
    record = run(create({**STUDY, "axes": {}, "seeds": 1, "train": train}, tmp_path / "plain"), workers=0)
    chosen = run(
        create({**STUDY, "axes": {}, "seeds": 1, "train": {**train, "keep_model": keep_model}}, tmp_path / "chosen"),
        workers=0,
    )
    (plain,), (trial,) = record.trials, chosen.trials
    validations = [line["validation"] for line in trial.curve]
    assert min(validations) < validations[-1]  # the best weights are not the last ones
    assert trial.id == plain.id and trial.result == plain.result is not None
    assert score(trial, "validation")["mean squared error"] == (
        min(validations) if (keep_model or keep) == "best" else validations[-1]
    )


CHANGES = {  # the settings of the attempts, each with the step that interrupts it; step 3 has the best validation
    "last, best": (("last", 5), ("best", 9)),
    "none, best": (("none", 3), ("best", 9)),
    "best, last": (("best", 5), ("last", 9)),
    "best, last, best": (("best", 2), ("last", 5), ("best", 9)),
    "last, none": (("last", 9), ("none", 9)),
}


@pytest.mark.parametrize("attempts", CHANGES.values(), ids=CHANGES)
def test_a_changed_keep_model_of_an_interrupted_trial_saves_the_weights_that_it_selects(tmp_path, attempts):
    train = {"steps": 9, "batch_size": 5, "eval_every": 1, "checkpoint_every": 1}
    train |= {"optimizer": {"kind": "sgd", "lr": 0.4}}

    def made(keep_model, name):
        folder = create({**STUDY, "axes": {}, "seeds": 1, "train": {**train, "keep_model": keep_model}}, name)
        return StudyFolder(folder).trial(load(folder).trials[0].id)

    whole = made(attempts[-1][0], tmp_path / "whole")
    run_trial(whole)
    for keep_model, stop in attempts[:-1]:

        def interrupt(step, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        trial = made(keep_model, tmp_path / "changed")
        if stop == 9:  # after the model is saved
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(type(trial), "finish", lambda *_: interrupt(9))
                run_trial(trial)
        else:
            with pytest.raises(KeyboardInterrupt):
                run_trial(trial, interrupt)
    trial = made(attempts[-1][0], tmp_path / "changed")
    run_trial(trial)
    assert trial.result() == whole.result()
    assert trial.folder.has("model.safetensors") == whole.folder.has("model.safetensors")
    if trial.folder.has("model.safetensors"):
        assert trial.folder.read("model.safetensors") == whole.folder.read("model.safetensors")
    starts_over = "kept: got none, as of another keep_model; expected" in (trial.path / "log.txt").read_text()
    assert starts_over == (attempts[-1][0] == "best")


def test_keep_model_none_saves_nothing_and_is_reported(tmp_path):
    study = {**STUDY, "axes": {}, "seeds": 1, "train": {**STUDY["train"], "keep_model": "none"}}
    record = run(create(study, tmp_path / "study"), workers=0)
    with pytest.raises(
        SpecError, match=r"model\.safetensors: got no model; expected a saved model. train\.keep_model is none"
    ):
        record.best().model()


def test_a_linked_model_is_not_loaded(tmp_path):
    record = run(create({**STUDY, "axes": {}, "seeds": 1}, tmp_path / "study"), workers=0)
    trial = record.best()
    assert trial.folder is not None
    model = trial.folder / "model.safetensors"
    model.rename(tmp_path / "elsewhere.safetensors")
    model.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(StoreError, match=r"model\.safetensors: got a symbolic link; expected a regular file"):
        trial.model()


def test_a_model_in_a_linked_folder_is_not_loaded(tmp_path):
    record = run(create({**STUDY, "axes": {}, "seeds": 1}, tmp_path / "study"), workers=0)
    trial = record.best()
    assert trial.folder is not None
    trial.folder.rename(tmp_path / "elsewhere")
    trial.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=f"{trial.id}: got a symbolic link; expected a folder"):
        trial.model()


def test_a_model_over_the_size_limit_is_not_loaded(tmp_path, monkeypatch):
    trial = run(create({**STUDY, "axes": {}, "seeds": 1}, tmp_path / "study"), workers=0).best()
    monkeypatch.setattr(files, "most_bytes", lambda: 100)
    with pytest.raises(StoreError, match=r"model\.safetensors: got a file of over 100 bytes"):
        trial.model()


def test_a_model_with_a_plugins_modules_is_built_by_its_task(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "TRUSTED", ())  # as if encoder and read-out were classes of a plugin
    record = run(create({**STUDY, "axes": {}, "seeds": 1}, tmp_path / "study"), workers=0)
    monkeypatch.undo()
    trial = record.best()
    assert trial.folder is not None and io.foreign(trial.folder / "model.safetensors")
    assert scored_again(trial) == (trial.result or {})["metrics"]["test"]


def test_the_scaling_of_the_data_is_saved_with_the_model(tmp_path):
    file = tmp_path / "load.csv"
    file.write_text("load,heat\n" + "".join(f"{row % 7},{'' if row == 3 else row}\n" for row in range(60)))
    options = {"kind": "series", "file": str(file), "targets": ["load"], "covariates": ["heat"], "context": 4}
    study = STUDY | {"task": options, "axes": {"norm": ["layer"]}, "seeds": 1}
    (trial,) = run(create(study, tmp_path / "study"), workers=0).trials
    task = SeriesSpec(**options).build(0)
    file.unlink()
    assert trial.preprocessing == {"scaling": {k: list(v) for k, v in task.scaling.items()}, "masks": ["heat"]}
    with torch.no_grad():
        assert trial.model()(task.batch(0, 5).inputs)[0].shape == (4, 5, 1, 1)


def test_the_scaling_has_the_order_of_the_inputs(tmp_path):
    file = tmp_path / "load.csv"
    columns = ["load", *(f"x{i}" for i in range(11)), "heat"]
    rows = (",".join(str(row % 7 + i) for i in range(len(columns))) for row in range(60))
    file.write_text("\n".join([",".join(columns), *rows]))
    options = {"kind": "series", "file": str(file), "targets": ["load"], "covariates": columns[1:], "context": 4}
    study = STUDY | {"task": options, "axes": {"norm": ["layer"]}, "seeds": 1}
    (trial,) = run(create(study, tmp_path / "study"), workers=0).trials
    assert list(trial.preprocessing["scaling"]) == columns


def test_a_task_without_preprocessing_saves_none(finished):
    assert finished.trials[0].preprocessing == {}


def test_keep_model_is_not_part_of_the_identity():
    options = TrainSpec(keep_model="best").filled(5)
    trial = {"version": 2, "model": {}, "task": {}, "data": {}, "seed": 0, "train": options}
    assert "keep_model" not in TrainSpec().filled(5)
    assert identity(trial) == identity({**trial, "train": TrainSpec().filled(5)})


def test_a_record_without_a_folder_has_no_model():
    with pytest.raises(SpecError, match="got no model; expected a saved model"):
        recorded(lambda norm, window, seed: 1.0).trials[0].model()
