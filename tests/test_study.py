"""Study files: defaults, the trials they define, and errors with their paths."""

import copy
import json
import math
import re
from collections import UserDict, UserList
from datetime import date

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from atn_norms import LayerSpec
from atn_norms.ablation import StudySpec, TrainSpec, create, make_plan, override
from atn_norms.ablation.grid import optimizers, presets, schedules
from atn_norms.ablation.grid.overrides import placed
from atn_norms.ablation.store.identity import current_names, digest, identity
from atn_norms.errors import SpecError, to_spec_error
from atn_norms.specs import parse, validate
from atn_norms.tasks import AddingSpec

LSTM = {"cell": "lstm", "hidden_size": 3}
SMALL = {
    "model": LSTM,
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 4, "batch_size": 5},
}


def plan(**changes):
    return make_plan(StudySpec.model_validate({**SMALL, "seeds": 1, **changes}))


def complaint(**changes):
    data = {**SMALL, **changes}
    with pytest.raises(ValidationError) as caught:
        StudySpec.model_validate(data)
    return str(to_spec_error(caught.value, data=data))


def test_the_built_in_study_has_the_expected_trials():
    study = make_plan(StudySpec.model_validate(YAML(typ="safe").load(presets.text("quick"))))
    assert study.axes == {"norm": ["none", "layer", "batch", "rms"], "window": ["1", "5", "25"]}
    assert list(study.tasks) == ["adding", "charlm"] and study.baseline == {"window": "1"}
    assert len(study.trials) == 2 * 10 * 2, "without a norm three windows are one trial"
    assert sum(len(trial.points) for trial in study.trials) == 2 * 12 * 2


@pytest.mark.parametrize(
    ("model", "axes", "trials"),
    [
        ({"cell": "lstm"}, {"placement.gates": ["joint", "per_gate"]}, 1),
        ({"cell": "lstm"}, {"placement.sum": ["separate", "joint"], "norm": ["none", "layer"]}, 3),
        ({"cell": "lstm", "norm": {"sites": {"c": "layer"}}}, {"placement.gates": ["joint", "per_gate"]}, 1),
        ({"cell": "rnn", "norm": "layer"}, {"placement.gates": ["joint", "per_gate"]}, 1),
        ({"cell": "rnn", "norm": "layer"}, {"placement.sum": ["separate", "joint"]}, 2),
        ({"cell": "gru", "norm": "layer"}, {"placement.gates": ["joint", "per_gate"]}, 2),
    ],
)
def test_placements_that_change_nothing_are_one_trial(model, axes, trials):
    assert len(plan(model={"hidden_size": 4, **model}, axes=axes, baseline={}).trials) == trials


def test_every_default_of_a_trial_is_filled_in():
    (trial,) = plan(train={"steps": 200}, task=SMALL["task"] | {"train": 50}).trials
    assert trial.trial["train"] == {
        "steps": 200, "batch_size": 50, "clip_grad_norm": None, "eval_every": 20, "log_every": 2,
        "checkpoint_every": 20, "threads": 1,
        "optimizer": optimizers.resolve({"kind": "rmsprop", "lr": 1e-3}), "divergence_factor": 1e3,
        "schedule": schedules.resolve("constant"), "patience": None, "keep": "last",
    }  # fmt: skip
    assert set(trial.trial["model"]) == set(LayerSpec.model_fields)
    assert trial.trial["model"]["input_size"] == 2 and trial.trial["data"] == {} and trial.trial["version"] == 2
    assert json.loads(json.dumps(trial.trial)) == trial.trial


def test_an_id_does_not_depend_on_the_notation():
    written = [
        plan(model=LSTM | {"norm": "layer", "window": 5}),
        plan(
            model={
                "window": {"steps": 5, "kind": "sliding"},
                "norm": {"kind": "layer"},
                "hidden_size": 3,
                "cell": {"kind": "lstm"},
            }
        ),
        plan(
            model={
                "cell": "lstm",
                "hidden_size": 3,
                "norm": "layer",
                "window": {"kind": "sliding", "steps": 5},
                "num_layers": 1,
            }
        ),
        plan(model=LSTM, axes={"window": [5], "norm": ["layer"]}),
        plan(
            model=LSTM | {"norm": "layer", "window": 5},
            task=AddingSpec(length=4, train=20, validation=5, test=5),
        ),
        plan(
            model=LSTM | {"norm": "layer", "window": 5},
            train={**SMALL["train"], "checkpoint_every": 1},
        ),
        plan(model=LSTM | {"norm": "layer", "window": 5}, name="another name", seeds=[0]),
    ]
    assert len({each.trials[0].id for each in written}) == 1
    assert len({each.trials[0].id for each in [*written, plan()]}) == 2


def test_an_id_is_stable():
    trial = {"version": 1, "model": {"b": 1.0, "a": None}, "task": {"kind": "t"}, "train": {}, "seed": 0, "data": {}}
    assert identity(trial) == "2a8008bacd36bb9e"


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    else:
        yield path, value


def test_changing_anything_changes_the_id():
    (planned,) = plan(model=LSTM | {"norm": "layer", "window": 5}).trials
    paths = list(leaves(planned.trial))
    assert len(paths) > 25
    for path, value in paths:
        other = copy.deepcopy(planned.trial)
        place = other
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = [value]
        assert (identity(other) == planned.id) == (path == ("train", "checkpoint_every")), path


def test_a_text_counts_by_its_content_and_not_by_its_path(tmp_path):
    def charlm(name, content):
        (tmp_path / name).write_text(content)
        return plan(task={"kind": "charlm", "text": str(tmp_path / name)}).trials[0]

    here, moved, other = charlm("a.txt", "abc " * 50), charlm("b.txt", "abc " * 50), charlm("c.txt", "abd " * 50)
    assert here.id == moved.id != other.id
    assert here.trial["data"]["text"].startswith("sha256:")


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": {"x": 1, "y": [2.0]}, "b": None}) == digest({"b": None, "a": {"y": [2.0], "x": 1}})
    assert digest({"a": 1}) != digest({"a": 1.5}) != digest({"a": True})


@pytest.mark.parametrize("none", ["none", None, {"sites": {"ih": "none", "hh": None}}])
def test_points_without_a_norm_are_one_trial_whatever_the_window(none):
    study = plan(axes={"norm": [none, "layer"], "window": [1, 25, "cumulative"]})
    assert [len(trial.points) for trial in study.trials] == [3, 1, 1, 1]
    assert [point["window"] for point in study.trials[0].points] == ["1", "25", "cumulative"]


def test_a_window_for_one_site_of_three_is_kept():
    study = plan(axes={"norm": [{"sites": {"ih": "layer", "hh": "none"}}], "window": [1, 25]})
    assert len(study.trials) == 2


def test_options_of_an_absent_norm_are_dropped_like_its_window():
    study = plan(axes={"norm.eps": [1e-5, 1e-3], "norm": ["none", "layer"]})
    assert [len(trial.points) for trial in study.trials] == [2, 1, 1]
    assert [trial.trial["model"]["norm"] and trial.trial["model"]["norm"]["eps"] for trial in study.trials] == [
        None, 1e-5, 1e-3,
    ]  # fmt: skip


def test_an_axis_may_be_any_option():
    study = plan(
        model={"hidden_size": 3},
        axes={"train.optimizer.lr": [0.1, 0.01], "task.length": [4, 5], "model.cell": ["gru"]},
        train={"steps": 2, "optimizer": "sgd", "batch_size": 5},
    )
    assert list(study.axes) == ["train.optimizer.lr", "task.length", "cell"]
    settings = [(t.trial["train"]["optimizer"]["lr"], t.trial["task"]["length"]) for t in study.trials]
    assert settings == [(0.1, 4), (0.1, 5), (0.01, 4), (0.01, 5)]
    assert {t.trial["train"]["optimizer"]["kind"] for t in study.trials} == {"sgd"}
    assert study.baseline == {"train.optimizer.lr": "0.1"}, "without `none`, the first value of the first axis"


def test_an_axis_may_have_the_value_of_the_base():
    study = plan(
        axes={"hidden_size": [3, 5], "model.cell": ["lstm", "gru"], "norm.eps": [1.0]}, model=LSTM | {"norm": "rms"}
    )
    assert len(study.trials) == 4


def test_an_axis_may_add_an_option_to_the_base():
    assert len(plan(model={"cell": "gru"}, axes={"hidden_size": [3, 4]}).trials) == 2


def test_a_plateau_and_an_endpoint_that_act_are_accepted():
    plateau = {"kind": "plateau", "patience": 3}
    plan(train={"steps": 500, "batch_size": 5, "eval_every": 100, "schedule": plateau})
    for endpoint in ({"measure": "tail", "validations": 3}, {"measure": "final", "validations": 5}):
        spec = StudySpec.model_validate({**SMALL, "endpoint": endpoint})
        assert StudySpec.model_validate(spec.model_dump(mode="json")).endpoint == endpoint


def test_an_axis_may_be_an_option_that_the_values_of_another_axis_leave_open():
    axes = {"train.optimizer": [{"kind": "adam"}, "sgd"], "train.optimizer.lr": [0.1, 0.2], "norm": ["none", "rms"]}
    trials = plan(axes=axes, tune={"norm.eps": [1e-3]}).trials
    rates = {(t.points[0]["train.optimizer.lr"], t.trial["train"]["optimizer"]["lr"]) for t in trials}
    assert len(trials) == 8 and rates == {("0.1", 0.1), ("0.2", 0.2)}


@pytest.mark.parametrize(
    ("axes", "tune", "option"),
    [
        ({"window": [1, 5]}, {"train.optimizer.lr": [0.1, 0.2], "model.norm": ["none", "layer"]}, "model.norm"),
        ({"norm.eps": [1e-5, 1e-3]}, {"norm": ["none", "layer"]}, "norm"),
        ({"window": [1, 5]}, {"norm": ["none", "layer"]}, "norm"),
        ({"norm": ["none", "layer"], "window": [1, 5]}, {"norm.eps": [1e-5, 1e-3]}, None),
        ({"hidden_size": [3, 4]}, {"norm": ["none", "layer"], "window": [1, 5]}, None),
    ],
)
def test_tuned_values_that_merge_points_are_refused(axes, tune, option):
    """All values of a tuned option must be candidates of the same points."""
    if option is None:
        assert plan(axes=axes, tune=tune).trials
        return
    with pytest.raises(SpecError) as caught:
        plan(axes=axes, tune=tune)
    got = "got none and layer, which merge different points of the grid into one trial; expected an axis"
    assert f"tune.{option}: {got}" in str(caught.value)


def test_trivial_predictors_are_those_of_each_value_of_a_task_axis():
    sizes = {"kind": "copying", "recall": 2, "validation": 5, "test": 5}
    copying = plan(task=sizes, axes={"task.length": [2, 100], "norm": ["none", "layer"]})
    facts, cost = copying.tasks["copying"], 2 * math.log(8)
    assert facts.baselines == {}
    assert facts.baselines_at == {
        "task.length 2": {"no memory": pytest.approx(cost / 6)},
        "task.length 100": {"no memory": pytest.approx(cost / 104)},
    }
    assert facts.as_json() == copying.resolved()["tasks"]["copying"]
    equal = plan(axes={"task.length": [4, 5]}).tasks["adding"]
    assert equal.baselines == {"always 1": 1 / 6} and "baselines_at" not in equal.as_json()


def test_notes_of_the_data_name_the_values_of_a_task_axis(tmp_path):
    for name, rows in (("a.csv", 200), ("b.csv", 300)):
        (tmp_path / name).write_text("x\n" + "\n".join(str(row % 7) for row in range(rows)))
    task = {"kind": "series", "file": str(tmp_path / "a.csv"), "targets": ["x"], "context": 5}
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    notes = plan(task={k: v for k, v in task.items() if k != "file"}, axes={"task.file": files}).tasks["series"].notes
    assert [note.split(":")[0] for note in notes] == [f"task.file {file}" for file in files]
    assert plan(task=task, axes={"task.horizon": [1, 2]}).tasks["series"].notes[0].startswith("a.csv: 200 rows")
    with pytest.raises(SpecError) as caught:
        plan(task=task, axes={"task.metric": ["MAE", "MSE"]})
    assert "axes: got MSE, min, additive for series at task.metric MSE, and MAE, min, additive at" in str(caught.value)


def test_trials_are_ordered_by_seed():
    study = plan(axes={"norm": ["none", "layer"]}, seeds=[7, 3])
    assert [(t.seed, t.points[0]["norm"]) for t in map(_seeded, study.trials)] == [
        (7, "none"), (7, "layer"), (3, "none"), (3, "layer"),
    ]  # fmt: skip


def _seeded(planned):
    from atn_norms.ablation import TrialRecord

    return TrialRecord(planned.id, planned.trial, planned.points, planned.trial["seed"], "pending")


def test_two_tasks_of_a_kind_have_different_names():
    study = plan(task=None, tasks=[{"kind": "adding", "length": 4}, {"kind": "adding", "length": 5}])
    assert list(study.tasks) == ["adding(length=4)", "adding(length=5)"]
    alike = [{"kind": "adding", "length": n, "train": 20} for n in (4, 5)]
    assert list(plan(task=None, tasks=[*alike, "copying"]).tasks) == [*study.tasks, "copying"]
    named = {"short": {"kind": "adding", "length": 4}, "long": {"kind": "adding", "length": 5}}
    same = plan(task=None, tasks=named, margin={"long": 2.0}, reach={"short": 0.1})
    assert list(same.tasks) == ["short", "long"]
    assert [trial.id for trial in same.trials] == [trial.id for trial in study.trials]
    assert StudySpec.model_validate(same.study).tasks == named
    wider = plan(task=None, tasks={**named, "middle": {"kind": "adding", "length": 6}})
    assert not wider.lacks(same.resolved()) and same.lacks(wider.resolved()) == 1
    (change,) = same.changes(wider.resolved())
    assert change.path == ("tasks",) and "'length': 6" in change.expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"cell": "lstm"}}, "model.hidden_size: got nothing; expected a value"),
        ({"model": LSTM | {"norm": "laier"}}, "model.norm: got unknown normalizer 'laier'"),
        ({"model": LSTM | {"norm": {"kind": "layer", "epz": 1}}}, "model.norm.epz: got an unknown key; expected one of "),  # noqa: E501
        ({"model": LSTM | {"input_size": 2}}, "model.input_size: comes from the task"),
        ({"model": LSTM | {"batch_first": True}}, "model.batch_first: a task feeds time first"),
        ({"model": LSTM | {"input_size": None}}, "model.input_size: comes from the task"),
        ({"model": LSTM | {"hiden_size": 2}}, "model.hiden_size: got an unknown key; expected one of cell, hidden_size, num_layers, "),  # noqa: E501
        ({"model": LSTM | {"input_sise": 2}}, "model.input_sise: got an unknown key; expected one of cell, hidden_size, num_layers, "),  # noqa: E501
        ({"axes": {"norm": ["none", "laier"]}}, "axes.norm[1]: got unknown normalizer 'laier'"),
        ({"axes": {"norm": ["layer", {"kind": "layer", "eps": -1.0}]}}, "axes.norm[1].eps: "),
        ({"axes": {"model.norm": ["laier"]}}, "axes.model.norm[0]: got unknown normalizer 'laier'"),
        ({"axes": {"window": [0]}, "model": LSTM | {"norm": "rms"}}, "axes.window[0]"),
        ({"axes": {"train.step": [1]}}, "axes.train.step[0]: got an unknown key; expected one of steps,"),
        ({"axes": {"train.optimizer.lr": [-1.0]}}, "axes.train.optimizer.lr[0]: torch rejects the options: Invalid"),
        ({"axes": {"norm": []}}, "axes.norm: got no values; expected at least one"),
        ({"axes": {"norm": ["layer", "layer"]}}, "axes.norm[1]: got layer twice; expected different values"),
        ({"axes": {"norm": ["layer"], "model.norm": ["rms"]}}, "axes.model.norm: got an option that is an axis"),
        ({"axes": {"task": ["adding"]}}, "axes.task: got task; expected an option"),
        ({"task": "addding"}, "task: got unknown task 'addding'; expected one of adding, charlm, copying, denoise, "),
        ({"task": None}, "task: got neither `task` nor `tasks`; expected one of them"),
        ({"tasks": ["adding"]}, "task: got both `task` and `tasks`; expected one of them"),
        ({"task": None, "tasks": {}}, "task: got neither `task` nor `tasks`; expected one of them"),
        ({"task": None, "tasks": 5}, "tasks: got 5; expected a list"),
        ({"task": None, "tasks": ["adding", 5]}, "tasks[1]: got 5; expected text, or a mapping"),
        ({"task": None, "tasks": {"one": "adding", "two": 5}}, "tasks.two: got 5; expected text, or a mapping"),
        ({"task": None, "tasks": {"one": "adding", "two": {"kind": "adding"}}}, "tasks.two: got adding twice; "),
        ({"task": None, "tasks": {"one": {"kind": "adding", "length": 1}}}, "tasks.one.length"),
        ({"task": None, "tasks": {"a/b": "adding"}}, "tasks.a/b: got 'a/b'; expected 1 to 80 letters"),
        ({"task": None, "tasks": {"one": "adding"}, "margin": {"adding": 2}}, "margin.adding: got no task of this study; expected one of one"),  # noqa: E501
        ({"task": None, "tasks": ["adding", {"kind": "adding", "length": 1}]}, "tasks[1].length"),
        ({"train": {"steps": True}}, "train.steps: got True; expected an integer"),
        ({"train": {"optimizer": "adm"}}, "train.optimizer: got unknown optimizer 'adm'"),
        ({"train": {"optimizer": {"kind": "sgd", "mometum": 1}}}, "mometum: got an unknown option of 'sgd'; expected one of lr,"),  # noqa: E501
        ({"train": {"optimizer": {"kind": "adam", "betas": [0.9]}}}, "betas: got [0.9]; expected a value like"),
        ({"train": {"optimizer": {"kind": "adam", "learning_rate": 1}}}, "decoupled_weight_decay; did you mean 'lr'?"),
        ({"reach": "low"}, "reach: got 'low'; expected a number, or a mapping of task to number"),
        ({"reach": {"adding": True}}, "reach.adding: got True; expected a number"),
        ({"axes": {"norm": ["none", "group"]}}, "rms, none. Install the package that has the normalizer."),
        ({"axes": {"norm": ["nonee"]}}, "one of batch, layer, rms, none; did you mean 'none'?"),
        ({"train": {"optimizer": "lbfgs"}}, "train.optimizer: got unknown optimizer 'lbfgs'"),
        ({"train": {"clip_grad_norm": 0.0}}, "train.clip_grad_norm"),
        ({"seeds": 0}, "seeds: got 0; expected at least one seed"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1]; expected different numbers"),
        ({"seeds": [1, 2**63]}, "seeds: got [1, 9223372036854775808]; expected at most 9223372036854775807"),
        ({"baseline": {"norm": "none"}}, "baseline.norm: got no axis of this study; expected"),
        ({"axes": {"norm": ["layer"]}, "baseline": {"norm": "none"}}, "baseline.norm: got none; expected a value of"),
        ({"axes": {"norm": ["layer"]}, "baseline": {"nrom": "layer"}}, "expected one of norm; did you mean 'norm'?"),
        ({"axes": {"norm": ["layer"]}, "baseline": {"norm": "laier"}}, "this axis: layer; did you mean 'layer'?"),
        ({"axes": {"norm.kind": ["layer", "rms"]}}, "axes.norm.kind: got an option of a norm, which no"),
        ({"axes": {"norm.sites.ih": ["layer"]}}, "axes.norm.sites.ih: got an option of a norm, which no point has"),
        ({"axes": {"window": [1, 5]}}, "axes.window: got windows without a norm, where they change nothing; expected"),
        ({"axes": {"norm": ["none"], "norm.foo": [1]}}, "axes.norm.foo: got an option of a norm, which no point has"),
        ({"tune": {"model.norm.eps": [1e-5, 1e-3]}}, "tune.model.norm.eps: got an option of a norm, which"),
        ({"axes": {"nrm": ["layer", "rms"]}}, "axes.nrm: got an unknown key; expected one of cell, "),
        ({"axes": {"norm": ["laier", "layer"]}}, "axes.norm[0]: got unknown normalizer 'laier'"),
        ({"task": None, "tasks": ["adding", "charlm", {"kind": "adding"}]}, "tasks[2]: got adding twice; expected"),
        (
            {"task": None, "tasks": [{"kind": "adding", "length": 9}, {"length": 9, "kind": "adding"}]},
            "tasks[1]: got adding(length=9) twice; expected different tasks",
        ),
        ({"name": "_x"}, "; expected 1 to 80 letters, digits, blanks and . _ - with a letter or digit first"),
        ({"name": ".hidden"}, "; expected 1 to 80 letters, digits, blanks and . _ - with a letter or digit first"),
        ({"seeds": 10**9}, "seeds: got 1000000000; expected at most 100000"),
        ({"seeds": 60_000, "axes": {"hidden_size": [3, 4]}}, "seeds: got 120000 trials (2 points with"),
        ({"train": {"threads": 100_000}}, "train.threads: got 100000; expected at most 1024"),
        ({"axes": {"train.optimizer.lr": [0.1, float("nan")]}}, "axes.train.optimizer.lr[1]: got nan; expected a finite number"),  # noqa: E501
        ({"axes": {"norm": [{"layer"}]}}, "axes.norm[0]: got set {'layer'}; expected text, numbers,"),
        ({"model": LSTM | {"norm": date(2024, 1, 2)}}, "model.norm: got date datetime.date(2024, 1, 2); expected"),
        ({"train": {3: 4}}, "train: got the key 3; expected text"),
        ({"name": "\ud800"}, "name: got '\\ud800', which has an unpaired surrogate; expected text"),
        ({"model": LSTM | {"backend": "nativ"}}, "model.backend: got unknown backend 'nativ'"),
        ({"model": LSTM | {"hidden_size": 10**200}}, "a number is too large"),
        ({"model": LSTM | {"norm": "layer", "window": 5}, "axes": {"window": [1, 3]}}, "model.window: got 5, which the axis window replaces; expected no value, or one of the axis"),  # noqa: E501
        ({"train": {"optimizer": {"kind": "sgd", "lr": 0.5}}, "axes": {"train.optimizer.lr": [0.1]}}, "train.optimizer.lr: got 0.5, which the axis train.optimizer.lr replaces"),  # noqa: E501
        ({"model": LSTM | {"norm": {"kind": "rms"}}, "axes": {"norm": ["layer"]}}, "model.norm: got rms, which the"),
        ({"tune": {"task.length": [4, 5]}}, "tune.task.length: got an option of the task; expected an option of the model or"),  # noqa: E501
        *(
            ({"train": {}, "tune": {f"train.{option}": [2, 4]}}, f"tune.train.{option}: got an option of the budget;")
            for option in ("steps", "batch_size", "eval_every", "patience")
        ),
        ({"train": {"optimizer": {"kind": "sgd", "lr": 0.5}}, "tune": {"train.optimizer.lr": [0.1]}}, "train.optimizer.lr: got 0.5, which tune.train.optimizer.lr replaces"),  # noqa: E501
        ({"task": None, "tasks": ["copying", {"kind": "adding", "length": 9}], "axes": {"task.length": [4]}}, "tasks[1].length: got 9, which"),  # noqa: E501
        ({"axes": {"train.optimizer": ["sgd", {"kind": "adam", "lr": 0.1}], "train.optimizer.lr": [0.1, 0.2]}}, "axes.train.optimizer[1].lr: got 0.1, which the axis train.optimizer.lr replaces; expected no value there"),  # noqa: E501
        ({"axes": {"norm": [{"kind": "layer", "eps": 0.1}]}, "tune": {"model.norm.eps": [0.2]}}, "axes.norm[0].eps: got 0.1, which tune.model.norm.eps replaces"),  # noqa: E501
        ({"tune": {"norm": ["rms"]}, "axes": {"norm.kind": ["layer"]}}, "tune.norm[0]: got rms, which the axis norm.kind replaces"),  # noqa: E501
        ({"train": {"learning_rate": 0.1}}, "threads; did you mean 'train.optimizer.lr'?"),
        ({"axes": {"train.lr": [0.1]}}, "threads; did you mean 'train.optimizer.lr'?"),
        ({"train": {"steps": 8, "batch_size": 5, "eval_every": 3, "patience": 4}}, "train.patience: got 4; expected at most 3, the number of validations"),  # noqa: E501
        ({"endpoint": "tail", "train": {"steps": 4, "batch_size": 5}}, "endpoint: got the last 5 validations for adding; expected at most 4, the number of validations"),  # noqa: E501
        ({"endpoint": "tail", "train": {"steps": 8, "batch_size": 5, "eval_every": 1, "patience": 3}}, "endpoint: got the last 5 validations for adding; expected at most 4, after which train.patience may end a trial"),  # noqa: E501
        ({"endpoint": {"adding": {"measure": "tail", "validations": 99}}}, "endpoint.adding: got the last 99 validations for adding; expected at most 4"),  # noqa: E501
        ({"endpoint": {"measure": "tail", "validations": 2}, "axes": {"train.eval_every": [1, 9]}}, "endpoint: got the last 2 validations for adding; expected at most 1"),  # noqa: E501
        ({"endpoint": {"measure": "final", "validations": 3}}, "endpoint.validations: got 3; expected no value, since final averages no validations"),  # noqa: E501
        ({"endpoint": {"adding": {"measure": "steps", "validations": 3}}, "reach": 0.1}, "endpoint.adding.validations: got 3; expected no value, since steps"),  # noqa: E501
        ({"train": {"steps": 500, "eval_every": 100, "schedule": {"kind": "plateau", "patience": 4}}}, "train.schedule.patience: got patience 4 with 5 validations; expected at most 3, so that it acts before the last validation"),  # noqa: E501
        ({"train": {"steps": 4, "eval_every": 2, "schedule": "plateau"}}, "train.schedule: got patience 3 with 2 validations; expected another schedule, since a plateau needs 3"),  # noqa: E501
        ({"train": {"steps": 40, "batch_size": 5, "patience": 11}}, "train.patience: got 11; expected at most 10, the"),
        ({"train": {"steps": 4, "batch_size": 5, "schedule": {"kind": "cosine", "warmup": 5}}}, "train.schedule.warmup: got 5; expected at most 4, the steps"),  # noqa: E501
        ({"train": {"batch_size": 5, "schedule": {"warmup": 5}}, "axes": {"train.steps": [9, 4]}}, "train.schedule.warmup: got 5; expected at most 4"),  # noqa: E501
        ({"axis": {}}, "axis: got an unknown key; expected one of "),
        ({"task": "charlm", "model": LSTM | {"bidirectional": True}}, "model: task charlm: a bidirectional layer"),
        ({"axes": {each: list(range(1, 1001)) for each in ("hidden_size", "num_layers")}}, "axes: got 1000000 points"),
    ],
)  # fmt: skip
def test_an_invalid_option_is_reported_with_its_path(changes, message):
    text = complaint(**changes)
    assert message in text, text
    assert "\n" not in text, "each problem is reported once"


def test_every_problem_is_reported():
    text = complaint(
        model=LSTM | {"norm": "laier"},
        train={"stepz": 1},
        task={"kind": "adding", "length": 0},
    )
    assert {line.split(":")[0] for line in text.splitlines()} == {"model.norm", "train.stepz", "task.length"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"kind": "charlm", "embedding": 10**6}, "model": LSTM | {"hidden_size": 300}}, "parameters"),
        ({"model": LSTM | {"hidden_size": 10**5}}, "hidden_size"),
        (
            {"task": {"kind": "adding", "train": 20}, "train": {"batch_size": 21}},
            "train.batch_size: got 21; expected 1 to 20",
        ),
    ],
)
def test_an_impossible_training_is_rejected_before_any_write(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("atn_norms.layers.memory.physical_memory", lambda: 10**10)
    with pytest.raises(SpecError, match=message):
        create({**SMALL, "seeds": 1, **changes}, tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


def test_encoder_and_read_out_count_in_the_size_of_a_model(monkeypatch):
    task = {"kind": "charlm", "embedding": 1000}
    numbers = 4 * 3 * (1000 + 3 + 2) + 4 * len(set(text_of_python())) + 1000 * len(set(text_of_python()))
    monkeypatch.setattr("atn_norms.layers.memory.physical_memory", lambda: 8 * numbers)
    assert plan(task=task)
    monkeypatch.setattr("atn_norms.layers.memory.physical_memory", lambda: 8 * numbers - 1)
    with pytest.raises(SpecError, match="expected what fits this machine's"):
        plan(task=task)


def text_of_python():
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def test_a_missing_text_is_named_before_anything_is_written(tmp_path):
    (tmp_path / "not.txt").write_text("to be")
    message = (
        r"^task.text: got .*no.txt \(No such file or directory\); expected a readable file; did you mean 'not.txt'\?$"
    )
    with pytest.raises(SpecError, match=message):
        plan(task={"kind": "charlm", "text": str(tmp_path / "no.txt")})


def test_an_error_of_a_task_has_its_position_in_the_file(tmp_path):
    text = f"""\
model: {{cell: lstm, hidden_size: 4}}
tasks:
- adding
- {{kind: charlm, text: {tmp_path}/no.txt}}
train: {{batch_size: 5}}
axes: {{train.batch_size: [5, 600], norm: [layer]}}
"""
    data, where = parse(text, "study.yaml")
    with pytest.raises(SpecError, match=r"^study.yaml:4:\d+: tasks\[1\].text: got "):
        make_plan(validate(StudySpec, {**data, "axes": {}}, where), where)
    with pytest.raises(
        SpecError,
        match=r"^study.yaml:6:\d+: axes.train.batch_size\[1\]: got 600; expected 1 to 500",
    ):
        make_plan(validate(StudySpec, {**data, "tasks": [{"kind": "adding", "train": 500}]}, where), where)
    with pytest.raises(SpecError, match=r"^--set tasks\[1\].text: tasks\[1\].text: got .*nope \(No such file"):
        setting = ["tasks[1].text=nope"]
        make_plan(validate(StudySpec, {**override(data, setting), "axes": {}}), placed(data, setting, where))


def test_settings_from_the_command_line():
    data = {"train": {"optimizer": "adam"}, "tasks": ["adding", {"kind": "charlm"}], "model": {"norm": "layer"}}
    changed = override(
        data,
        ["train.optimizer.lr=1e-3", "tasks.0.length=9", "axes.train.clip_grad_norm=[0.1, 1]", "model.norm.eps=1e-4",
         "axes.cell=[lstm, gru]", "axes.cell[1].bias=no", "axes.train.clip_grad_norm[0]=0.2",
         "seeds=3", "model.window={kind: exponential, half_life: 2.0}", "baseline.norm=none", "tasks.1=adding"],
    )  # fmt: skip
    assert changed == {
        "train": {"optimizer": {"kind": "adam", "lr": 1e-3}},
        "tasks": [{"kind": "adding", "length": 9}, "adding"],
        "model": {"norm": {"kind": "layer", "eps": 1e-4}, "window": {"kind": "exponential", "half_life": 2.0}},
        "axes": {"train.clip_grad_norm": [0.2, 1], "cell": ["lstm", {"kind": "gru", "bias": "no"}]},
        "seeds": 3,
        "baseline": {"norm": "none"},
    }
    assert data["train"] == {"optimizer": "adam"}, "the argument is not changed"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "--set steps: got no path=value; expected path=value"),
        ("=3", "--set =3: got no path=value; expected path=value"),
        ("train..x=3", "expected path=value"),
        ("train.steps=[1", "--set train.steps: not a YAML value"),
        ("train.steps=&x [*x]", "--set train.steps: not a YAML value: got an alias"),
        ("train.steps=2024-13-45", "--set train.steps: not a YAML value: got '2024-13-45'; expected a valid timestamp"),
        ("train.steps=" + "1" * 5000, "--set train.steps: not a YAML value: got '1111"),
        ("train.steps=" + "[" * 2000 + "]" * 2000, "--set train.steps: not a YAML value: nested too deeply"),
        ("tasks.7.length=3", "--set tasks.7.length: got index 7 of tasks; expected an index below 1"),
        ("tasks[7].length=3", "--set tasks[7].length: got index 7 of tasks; expected an index below 1"),
        ("tasks[" + "1" * 5000 + "].length=3", "of tasks; expected an index below 1"),
        (
            "train.keep[0]=3",
            "--set train.keep[0]: got an index; expected the whole list, since the file has no train.keep",
        ),
        ("tasks.x=3", "--set tasks.x: got index 'x' of tasks; expected an index below 1"),
        ("seeds.a=3", "--set seeds.a: got 'a' of seeds, which is 2; expected a mapping or a list there"),
    ],
)
def test_invalid_settings_are_rejected(setting, message):
    with pytest.raises(SpecError) as caught:
        override({"tasks": ["adding"], "seeds": 2, "train": {}}, [setting])
    assert message in str(caught.value)


def test_an_option_of_an_unknown_task_is_rejected():
    data = {"tasks": {"typing": {"kind": "adding"}, "long": {"kind": "copying"}}}
    message = (
        "--set tasks.typign.length: got no task of this study; expected one of typing, long; did you mean 'typing'?"
    )
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        override(data, ["tasks.typign.length=3"])
    new = override(data, ["tasks.short.length=3", "tasks.short.kind=adding", "tasks.typing.length=4"])
    assert new["tasks"]["short"] == {"kind": "adding", "length": 3} and new["tasks"]["typing"]["length"] == 4


def test_an_empty_text_on_an_axis_differs_from_none(tmp_path):
    (tmp_path / "mine.py").write_text("def train(x):\n    return 1.0\n")
    task = {"kind": "python", "file": str(tmp_path / "mine.py")}
    study = StudySpec.model_validate({"task": task, "axes": {"x": ["", None, "a"]}})
    assert study.axis_labels() == {"x": ['""', "none", "a"]}


@pytest.mark.parametrize(
    ("axis", "setting", "refused"),
    [
        ("norm", "model.norm=layer", True),
        ("model.norm", "model.norm.eps=1", True),
        ("train.optimizer.lr", "train.optimizer.lr=1", True),
        ("task.length", "tasks.0.length=3", True),
        ("train.optimizer.lr", "train.optimizer=adam", False),
        ("train.optimizer.lr", "train.optimizer={kind: adam, lr: 5}", True),
        ("train.optimizer.lr", "train={optimizer: {lr: 5}}", True),
        ("train.optimizer.lr", "train={optimizer: adam, steps: 3}", False),
        ("norm", "model={norm: rms}", True),
        ("norm", "model={window: 3}", False),
        ("task.length", "tasks.0={kind: adding, length: 9}", True),
        ("task.length", "tasks.0={kind: adding}", False),
        ("norm", "model.norm_=1", False),
        ("task.length", "tasks=[{kind: adding}, {kind: adding, length: 77}]", True),
        ("task.length", "tasks=[{kind: adding}, copying]", False),
        ("task.length", "tasks={one: {kind: adding, length: 77}}", True),
        ("task.length", "tasks={length: {kind: adding}}", False),
        ("cell.kind", "model.cell=gru", True),
        ("train.optimizer.kind", "train={optimizer: adam}", True),
        ("norm", "axes.norm=[rms]", False),
    ],
)
def test_a_setting_that_an_axis_overrides_is_rejected(axis, setting, refused):
    data = {"tasks": [{"kind": "adding"}], "axes": {axis: ["none"]}}
    if not refused:
        override(data, [setting])
        return
    name = setting.partition("=")[0]
    with pytest.raises(
        SpecError,
        match=re.escape(f"--set {name}: got an option that the axis {axis} sets; expected another option. Use --set"),
    ):
        override(data, [setting])


@pytest.mark.parametrize("kind", sorted(optimizers.kinds()))
def test_every_optimizer_takes_a_step(kind):
    import torch

    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = optimizers.make(optimizers.resolve(kind), [weight])
    weight.square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3, 2))


def test_a_schema_shows_every_option_of_every_section():
    schema = json.dumps(StudySpec.model_json_schema())
    for option in ("hidden_size", "optimizer", "checkpoint_every", "embedding", "half_life", "baseline", "rmsprop"):
        assert f'"{option}"' in schema, option
    assert '"input_size"' not in schema


def test_options_of_a_trial_are_checked_separately():
    assert TrainSpec(optimizer={"kind": "sgd", "lr": 1}).optimizer["lr"] == 1.0
    with pytest.raises(ValidationError, match="optimizer"):
        TrainSpec.model_validate({"optimizer": 3})


def test_a_schema_describes_without_examples():
    from atn_norms.specs import schema

    text = json.dumps(schema(StudySpec))
    assert ">>>" in json.dumps(StudySpec.model_json_schema()), "the docstrings have examples"
    assert ">>>" not in text and "Options of the training of a trial" in text


OLD_NAMES = {
    "train": {"batch_size": 5, "clip": 2.0, "explosion": 50.0, "schedule": {"kind": "step", "every": 2, "by": 0.3}},
    "task": {"kind": "adding", "length": 5, "train": 20, "validation": 5, "test": 5},
    "model": LSTM,
}
NEW_NAMES = {
    **OLD_NAMES,
    "train": {
        "batch_size": 5,
        "clip_grad_norm": 2.0,
        "divergence_factor": 50.0,
        "schedule": {"kind": "step", "every": 2, "gamma": 0.3},
    },
}


def test_options_under_their_old_names_are_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning, match="train.clip is deprecated; use train.clip_grad_norm"):
        old = make_plan(StudySpec.model_validate({**OLD_NAMES, "axes": {"train.schedule.by": [0.3, 0.5]}}))
    new = make_plan(StudySpec.model_validate({**NEW_NAMES, "axes": {"train.schedule.gamma": [0.3, 0.5]}}))
    assert old.resolved() == {**new.resolved(), "source": old.source} and list(old.axes) == ["train.schedule.gamma"]
    with pytest.warns(DeprecationWarning, match="train.explosion is deprecated"):
        assert override({"train": {"clip": 1}}, ["train.explosion=9", "axes.train.clip=[2]"]) == {
            "train": {"clip_grad_norm": 1, "divergence_factor": 9},
            "axes": {"train.clip_grad_norm": [2]},
        }


def test_an_option_under_both_names_is_rejected():
    both = {**NEW_NAMES, "train": {"clip": 1.0, "clip_grad_norm": 2.0}}
    with pytest.raises(SpecError, match=r"got train.clip and train.clip_grad_norm; expected one of them"):
        validate(StudySpec, both)


def test_a_rename_changes_no_id():
    trial = make_plan(StudySpec.model_validate(NEW_NAMES)).trials[0]
    train = dict(trial.trial["train"])
    train["clip"], train["explosion"] = train.pop("clip_grad_norm"), train.pop("divergence_factor")
    train["schedule"] = {("by" if name == "gamma" else name): value for name, value in train["schedule"].items()}
    stored = {**trial.trial, "train": train}
    assert identity(stored) == trial.id and current_names(stored) == trial.trial


def test_a_folder_with_the_old_names_continues(tmp_path):
    import json

    from atn_norms.ablation import create, run

    folder = create({**NEW_NAMES, "train": {**NEW_NAMES["train"], "steps": 3}}, tmp_path / "study")
    for path in [folder / "study.resolved.json", *folder.glob("trials/*/trial.json")]:
        text = path.read_text().replace('"clip_grad_norm"', '"clip"').replace('"divergence_factor"', '"explosion"')
        path.write_text(text.replace('"gamma"', '"by"'))
        assert "clip" in json.loads(path.read_text()).get("train", {"clip": 1})
    assert run(folder, workers=0).count("done") == 5
    assert run(create({**NEW_NAMES, "train": {**NEW_NAMES["train"], "steps": 3}}, folder), workers=0).count("done") == 5


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": 10**400}, "train.steps"),
        (
            {"steps": 10**9, "log_every": 10},
            "train.log_every: got 10, which makes 100000000 points of the learning curve",
        ),
    ],
)
def test_a_training_beyond_its_limits_is_rejected(train, message):
    assert message in complaint(train=train)


def test_a_layer_is_validated_once_in_the_plan_and_once_where_it_trains(tmp_path, monkeypatch):
    from atn_norms.ablation import create, run
    from atn_norms.layers import LayerSpec

    count = []
    equations = LayerSpec._check_sites
    monkeypatch.setattr(LayerSpec, "_check_sites", lambda *a: count.append(1) or equations(*a))
    study = {
        **NEW_NAMES,
        "train": {"steps": 2, "batch_size": 5},
        "axes": {"norm": ["none", "layer", "rms"]},
        "seeds": 1,
    }
    folder = create(study, tmp_path / "study")
    assert len(count) == 3
    run(folder, workers=0)
    assert len(count) == 6


def test_a_folder_is_loaded_once_by_a_run(tmp_path, monkeypatch):
    from atn_norms.ablation import create, run
    from atn_norms.ablation.store.folder import StudyFolder

    folder = create({**NEW_NAMES, "train": {"steps": 2, "batch_size": 5}, "seeds": 2}, tmp_path / "study")
    count, load = [], StudyFolder.load
    monkeypatch.setattr(StudyFolder, "load", lambda *a, **k: count.append(1) or load(*a, **k))
    assert run(folder, workers=0).count("done") == 2
    assert len(count) == 1


@pytest.mark.parametrize("norm", ["none", None])
def test_a_window_without_a_norm_is_rejected_as_in_a_layer(norm):
    """Unless norms or windows vary: then the points without a norm have no window."""
    study = {"model": {"cell": "gru", "hidden_size": 3, "norm": norm, "window": 5}, "task": "adding", "seeds": 1}
    with pytest.raises(ValueError, match=r"a 'sliding' window without a norm"):
        StudySpec.model_validate(study)
    for change in ({"window": 1}, {"norm": "layer"}):
        StudySpec.model_validate({**study, "model": {**study["model"], **change}})
    varied = StudySpec.model_validate({**study, "axes": {"norm": ["none", "layer"]}})
    assert [each.trial["model"]["window"]["steps"] for each in make_plan(varied).trials] == [1, 5]


def test_numbers_and_arrays_of_numpy_and_any_mapping_give_the_same_trials():
    numpy = pytest.importorskip("numpy")
    plain = {
        "model": {"cell": "rnn", "hidden_size": 3},
        "task": {"kind": "adding", "length": 5},
        "axes": {"norm": ["layer"], "window": [1, 5], "train.optimizer.lr": [0.5]},
        "seeds": [0, 2],
    }
    other = UserDict(
        model=UserDict(cell="rnn", hidden_size=numpy.int64(3)),
        task=UserDict(kind="adding", length=numpy.int32(5)),
        axes=UserDict(norm=UserList(["layer"]), window=numpy.array([1, 5]))
        | {"train.optimizer.lr": [numpy.float32(0.5)]},
        seeds=numpy.array([0, 2]),
    )
    expected, got = (make_plan(StudySpec.model_validate(each)).trials for each in (plain, other))
    assert [trial.id for trial in got] == [trial.id for trial in expected]
    with pytest.raises(ValidationError, match="seeds"):
        StudySpec.model_validate({**plain, "seeds": numpy.bool_(True)})
