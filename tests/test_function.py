"""Studies of functions: the same engine and store, and faulty functions."""

import csv
import importlib
import json
import os
import random
import re
import runpy
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from atn_norms import ablation
from atn_norms.ablation import report
from atn_norms.ablation.execution.random_state import random_state, restore_random_state
from atn_norms.ablation.grid import functions, imports, sources
from atn_norms.ablation.grid.functions import hash_code, task_of
from atn_norms.ablation.grid.sources import hash_files
from atn_norms.ablation.store import checkpoints
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.cli import main
from atn_norms.errors import SpecError

GOOD = """
import torch

def train(norm, window, seed, trial):
    for step in range(1, 4):
        trial.report(step, 1.0 / step)
    return {"accuracy": 0.5 + 0.1 * (norm == "layer") + 0.01 * window + float(torch.rand(())) / 1000}
"""


def written(folder, body, name="mine.py"):
    path = folder / name
    path.write_text(textwrap.dedent(body))
    return path


def study(path, **options):
    task = {"kind": "python", "file": str(path), "goal": "max"} | options.pop("task", {})
    return {"task": task, "axes": {"norm": ["none", "layer"], "window": [1, 3]}, "seeds": 2} | options


def trials(folder, path, **options) -> Any:
    return ablation.run(ablation.create(study(path, **options), folder), workers=0).trials


def only(tmp_path, body, **options) -> Any:
    """Return the only trial of a study of a function without arguments."""
    (trial,) = trials(tmp_path / "study", written(tmp_path, body), axes={}, seeds=1, **options)
    return trial


def log(trial):
    return (trial.folder / "log.txt").read_text()


def test_points_without_a_norm_are_one_trial_and_the_report_is_written(tmp_path):
    record = ablation.run(ablation.create(study(written(tmp_path, GOOD)), tmp_path / "study"), workers=0)
    assert record.counts()["done"] == len(record.trials) == 6  # none, layer at 1, layer at 3; two seeds
    assert record.tasks["train"].metric == "accuracy"
    best = record.best()
    assert best.points[0]["norm"] == "layer" and [line["step"] for line in best.curve] == [1, 2, 3]


def test_every_reported_step_counts_where_the_study_sets_no_steps(tmp_path, capsys):
    body = """
    import torch

    def train(norm, window, trial):
        for step in range(1, 8):
            trial.report(step, torch.ones((), requires_grad=True) / step)
        return {"test accuracy": 0.5}
    """
    record: Any = ablation.run(ablation.create(study(written(tmp_path, body)), tmp_path / "study"), workers=0)
    assert {trial.step for trial in record.trials} == {7} == {trial.result["step"] for trial in record.trials}
    assert "Warning" not in log(record.trials[0]) and "finished after step 7" in log(record.trials[0])
    assert main(["status", str(tmp_path / "study")]) == 0
    assert "1 of 1" not in capsys.readouterr().out
    page = report.write(report.findings(record), tmp_path / "report")[0].read_text(encoding="utf-8")
    assert "test accuracy" in page and "test test" not in page
    rows = [*csv.DictReader((tmp_path / "report" / "results.csv").open(encoding="utf-8"))]
    assert [(row["step"], row["steps"]) for row in rows] == [("7", "")] * len(rows)


def test_integers_of_numpy_are_steps(tmp_path):
    body = """
    import numpy as np
    def train(trial):
        trial.report(np.int64(2), np.float32(0.5))
        return np.int64(3)
    """
    trial = only(tmp_path, body)
    assert trial.status == "done", trial.error
    assert trial.curve == [{"step": 2, "train_loss": 0.5, "validation": None}]


def test_more_steps_than_the_study_sets_are_no_damage(tmp_path):
    trial = only(tmp_path, "def train(trial):\n    trial.report(9, 1.0)\n    return 1.0\n", train={"steps": 5})
    assert (trial.status, trial.step) == ("done", 9)


@pytest.mark.deep
def test_the_same_trial_gives_the_same_number(tmp_path):
    path = written(tmp_path, GOOD)
    first, again = (trials(tmp_path / name, path) for name in ("a", "b"))
    assert [t.result["metrics"] for t in first] == [t.result["metrics"] for t in again]


@pytest.mark.deep
def test_a_script_without_a_guard_runs_in_processes_and_continues(tmp_path):
    body = GOOD + (
        "\nfrom atn_norms import ablation\n"
        "ablation.ablate(train, axes={'norm': ['none', 'layer'], 'window': [1]}, seeds=1, goal='max', out='study')\n"
    )
    path = written(tmp_path, body)
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[2/2] done" in done.stdout and "report: study/report/report.html" in done.stdout
    path.write_text(body.replace("seeds=1", "seeds=2"))  # only the call has changed: the same study with more seeds
    record = ablation.load(tmp_path / "study")
    folder = ablation.create(
        {**record.study, "seeds": 2, "name": "mine"} | {"task": {**record.study["task"], "file": str(path)}},
        tmp_path / "study",
    )
    counts = ablation.load(folder).counts()
    assert counts["done"] == 2 and counts["pending"] == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def train(): pass", "train: got NoneType None; expected a number, or a mapping of metric to number"),
        ("def train(): return {}", r"train: got dict \{\}; expected a number"),
        ("def train(): return {'loss': 'low'}", "train: got 'low' for 'loss'; expected a number"),
        ("def train(): return True", "train: got bool True; expected a number"),
        ("import numpy\ndef train(): return numpy.bool_(True)", "train: got bool.*True.*; expected a number"),
        (
            "import torch\ndef train(): return {'a': torch.tensor(True)}",
            r"train: got tensor\(True\) for 'a'; expected a",
        ),
        ("import numpy\ndef train(): return numpy.complex128(1 + 2j)", "train: got complex128 .*; expected a number"),
        (
            "import torch\ndef train(trial): trial.report(1, torch.tensor(2j))",
            "value: got Tensor .*; expected a number",
        ),
        (
            "import numpy\ndef train(trial): trial.report(numpy.bool_(True), 1.0)",
            "step: got .*True.*; expected an integer",
        ),
        ("import sys\ndef train(): sys.exit(3)", r"train: got a call of sys\.exit\(3\); expected returned metrics"),
        ("def train(): raise RuntimeError('out of cheese')", "RuntimeError: out of cheese"),
        ("def train(trial): trial.report(0, 1.0)", r"step: got 0; expected an integer of at least 1"),
        ("def train(trial): trial.report(1, 'low')", "value: got str 'low'; expected a number"),
        (
            "def train(): return 1\nraise ValueError('at import')",
            r"mine\.py:2: got ValueError: at import; expected a file that Python can load",
        ),
        ("def train(): return 1\ndel train", "got unknown function 'train'"),
    ],
)
def test_a_function_that_fails_is_one_failed_trial_with_one_message(tmp_path, body, message):
    trial = only(tmp_path, body)
    assert trial.status == "failed"
    assert re.search(message, trial.error["error"])


@pytest.mark.parametrize(
    "fault",
    [
        "raise RuntimeError('no')",
        "raise SystemExit(3)",
        "raise KeyError",
        "return None",
        "trial.report(1, 'low')",
        "import torch; torch.set_default_dtype(torch.float64); raise ValueError('and left a setting')",
        "import subprocess; train.left = subprocess.Popen(['sleep', '60']); raise ValueError('and left a process')",
    ],
)
def test_other_trials_continue_after_a_failure(tmp_path, fault):
    body = f"def train(norm, seed, trial):\n    if norm == 'layer': {fault}\n    return 1.0 + seed\n"
    found = trials(tmp_path / "study", written(tmp_path, body), axes={"norm": ["layer", "none"]})
    assert [t.status for t in found] == ["failed", "done", "failed", "done"]
    assert torch.get_default_dtype() == torch.float32
    assert all("\n" not in t.error["error"] for t in found if t.error)


def test_the_verdict_and_the_report_are_printed(tmp_path):
    body = GOOD + (
        "\nfrom atn_norms import ablation\nimport numpy\n"
        "ablation.ablate(train, axes={'norm': ['none', 'layer'], 'window': numpy.array([1])}, seeds=numpy.int64(2), "
        "goal='max', out='study', workers=0)\n"
    )
    done = subprocess.run(
        [sys.executable, written(tmp_path, body)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    start, first, *_, verdict, report = done.stdout.splitlines()
    assert start == "study 'mine': 4 of 4 trials to run; folder: study"
    assert re.fullmatch(r"\[1/4\] done norm=none, window=1, seed=0  \(about .* left\)", first)
    assert verdict.startswith("train: Norm: ") and report == "report: study/report/report.html"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def train(trial): trial.report(1, float('nan'))", "the reported loss is nan"),
        (
            "def train(trial):\n    trial.report(1, 1.0)\n    trial.report(2, 1e9)",
            r"the reported loss is 1e\+09, over 1000",
        ),
        ("def train(): return float('inf')", "the returned score is inf"),
        ("def train(trial):\n    try: trial.report(1, float('nan'))\n    except Exception: return 1", "loss is nan"),
    ],
)
def test_divergence_is_an_outcome(tmp_path, body, reason):
    trial = only(tmp_path, body)
    assert trial.status == "diverged"
    assert re.search(reason, trial.result["reason"])


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_another_metric_that_is_not_finite_is_missing(metric, tmp_path):
    body = """
    def train(seed):
        found = {"loss": float("inf"), "precision": float("nan") if seed else 0.5, "accuracy": 0.75}
        return found if METRIC else {"accuracy": 0.75} | found
    """
    path = written(tmp_path, body.replace("METRIC", repr(metric)))
    record: Any = ablation.run(
        ablation.create(study(path, task={"metric": metric}, axes={}), tmp_path / "study"), workers=0
    )
    assert [t.status for t in record.trials] == ["done", "done"]
    metrics = [t.result["metrics"]["test"] for t in record.trials]
    assert metrics == [{"accuracy": 0.75, "precision": 0.5}, {"accuracy": 0.75}]
    assert next(iter(metrics[0])) == "accuracy"
    assert "train: the returned loss is inf; it has no number in the results" in log(record.trials[0])
    page = report.write(report.findings(record), tmp_path / "report")[0]
    first, second = csv.DictReader((page.parent / "results.csv").open())
    assert (first["test precision"], second["test precision"], second["test"]) == ("0.5", "", "0.75")


def test_prints_go_to_the_log(tmp_path, capfd):
    body = """
    import sys
    def train():
        print("one", "two")
        print("three", file=sys.stderr, end="")
        for i in range(2000): print(i)
        return 1
    """
    text = log(only(tmp_path, body))
    assert "printed: one two\n" in text and "printed more than 1000 lines" in text and "printed: 1500" not in text
    assert capfd.readouterr() == ("", "")


def test_processes_left_behind_are_ended(tmp_path):
    body = """
    import subprocess
    def train():
        train.process = subprocess.Popen(["sleep", "60"])
        return 1
    """
    started = time.monotonic()
    trial = only(tmp_path, body)
    assert trial.status == "done" and time.monotonic() - started < 30
    assert "left a process running (" in log(trial) and "sleep 60" in log(trial)


def test_global_settings_are_restored(tmp_path):
    body = """
    import os, torch
    def train():
        torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True); os.chdir("/"); os.environ["LEFT"] = "behind"
        return 1
    """
    before = torch.get_rng_state()
    text = log(only(tmp_path, body))
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled() and torch.equal(torch.get_rng_state(), before)
    for setting in ("default dtype", "records gradients", "deterministic", "working directory", "environment"):
        assert setting in text


def test_a_trial_in_this_process_may_change_the_working_directory(tmp_path, monkeypatch):
    body = f"""
    import os, torch
    def train(x, trial):
        os.chdir({str(tmp_path / "elsewhere")!r})
        print("hello")
        trial.report(1, 1.0)
        trial.keep(torch.nn.Linear(1, 1))
        trial.checkpoint.save({{"a": 1}})
        (trial.folder / "mine.txt").write_text("kept")
        return 1
    """
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    record = ablation.run(ablation.create(study(written(tmp_path, body), axes={"x": [1]}), "here"), workers=0)
    assert {trial.status for trial in record.trials} == {"done"}
    for trial in record.trials:
        assert trial.folder is not None
        assert "hello" in log(trial) and (trial.folder / "files" / "mine.txt").read_text() == "kept"
        assert (trial.folder / "model.safetensors").exists()
    assert not [*(tmp_path / "elsewhere").iterdir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": None}, "axes: got NoneType None; expected a mapping of name to values"),
        ({"axes": ["x"]}, "axes: got list .*; expected a mapping of name to values"),
        ({"arguments": [1]}, "arguments: got list .*; expected a mapping of name to value"),
        ({"baseline": 1}, "baseline: got int 1; expected a mapping of name to value"),
        ({"on_event": 3}, "on_event: got int 3; expected a function of one event"),
        ({"workers": "2"}, "workers: got str '2'; expected a whole number"),
    ],
)
def test_arguments_of_another_type_are_named(tmp_path, monkeypatch, options, message):
    written(tmp_path, "def train(x):\n    return 1\n", "typed.py")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("typed").train
    with pytest.raises(SpecError, match=message):
        ablation.ablate(function, **{"axes": {"x": [1]}, "out": tmp_path / "study", **options})


def test_patience_stops_a_trial_and_logs_the_reason(tmp_path):
    body = """
    def train(trial):
        for step in range(1, 100):
            trial.report(step, 1.0)
            if trial.should_stop: break
        return step
    """
    trial = only(tmp_path, body, train={"patience": 3})
    assert trial.result["metrics"]["test"] == {"score": 4.0}
    assert trial.result["reason"] == "no improvement in 3 reports"


@pytest.mark.parametrize(("goal", "stops"), [("max", 13), ("min", 4)])
def test_patience_uses_the_goal_where_the_metric_is_reported(tmp_path, goal, stops):
    body = """
    def train(trial):
        for step in range(1, 100):
            trial.report(step, min(step, 10) / 10)
            if trial.should_stop: break
        return step
    """
    trial = only(tmp_path, body, train={"patience": 3}, task={"reports": "metric", "goal": goal})
    assert trial.result["metrics"]["test"] == {"score": float(stops)}
    assert trial.curve[0]["validation"] == 0.1


RESUMED = """
import random, os, torch, numpy
def train(trial, stop):
    state = trial.checkpoint.load()
    step, drawn = (state["step"], state["drawn"]) if state else (0, [])
    while step < 6:
        step += 1
        drawn.append(float(torch.rand(())) + random.random() + numpy.random.rand())
        trial.report(step, 1.0 + drawn[-1])
        if step % 2 == 0:
            trial.checkpoint.save({"step": step, "drawn": drawn})
        if step == 3 and not os.path.exists(stop):
            open(stop, "w").close()
            raise RuntimeError("interrupted")
    return sum(drawn)
"""


def test_a_resumed_function_equals_the_uninterrupted(tmp_path):
    path = written(tmp_path, RESUMED)
    outputs = []
    for name in ("whole", "stopped"):
        stop = tmp_path / f"{name}.txt"
        if name == "whole":
            stop.touch()
        given = {"axes": {}, "seeds": 1, "task": {"arguments": {"stop": str(stop)}}}
        trial: Any
        (trial,) = trials(tmp_path / name, path, **given)
        if name == "stopped":
            assert trial.status == "failed" and "interrupted" in trial.error["error"]
            (trial,) = ablation.run(tmp_path / name, workers=0).trials
            assert trial.run["attempts"] == 2
        outputs.append((trial.result["metrics"], trial.curve))
    assert outputs[0] == outputs[1] and len(outputs[0][1]) == 6


NOT_LOADED = """
import os, torch
def train(trial, stop, reports):
    first = not os.path.exists(stop)
    for step in range(1, 8 if first else reports + 1):
        trial.report(step, 1.0 / step)
        if step == 5 and first:
            trial.keep(torch.nn.Linear(1, 1))
            trial.checkpoint.save({"step": step})
    if first:
        open(stop, "w").close()
        raise RuntimeError("interrupted")
    assert not reports or trial.checkpoint.load() is None
    return 1.0
"""


@pytest.mark.parametrize("reports", [10, 3, 0])
def test_an_attempt_that_does_not_load_the_checkpoint_starts_an_empty_curve(reports, tmp_path):
    given = {"axes": {}, "seeds": 1, "task": {"arguments": {"stop": str(tmp_path / "stop"), "reports": reports}}}
    trial: Any
    (trial,) = trials(tmp_path / "study", written(tmp_path, NOT_LOADED), **given)
    assert trial.status == "failed" and "interrupted" in trial.error["error"]
    (trial,) = ablation.run(tmp_path / "study", workers=0).trials
    assert (trial.status, trial.result["step"]) == ("done", reports)
    assert [line["step"] for line in trial.curve] == list(range(1, reports + 1))
    assert not (trial.folder / "model.safetensors").exists()
    assert "the function did not load it" in log(trial)


def test_kept_models_are_loaded_with_their_trial(tmp_path):
    pytest.importorskip("safetensors")
    body = """
    import atn_norms as an
    def train(trial):
        trial.keep(an.GRU(2, 3, norm="rms", window=4))
        return 1
    """
    trial = only(tmp_path, body)
    assert repr(trial.model()) == "GRU(2, 3, norm=rms, window=4)"


def test_changed_metrics_fail(tmp_path):
    body = "def train(seed): return {'a': 1} if seed == 0 else {'b': 1}"
    first, second = trials(tmp_path / "study", written(tmp_path, body), axes={})
    assert first.status == "done" and "got 'b' as its first metric; expected 'a'" in second.error["error"]


def test_functions_with_other_first_metrics_share_a_study(tmp_path):
    body = """
    def first(window): return {"accuracy": 0.1 * window}
    def second(window, seed): return {"error": 0.2 * window} if seed == 0 else {"accuracy": 0.1 * window}
    """
    task = {"kind": "python", "file": str(written(tmp_path, body))}
    tasks = [{**task, "function": "first", "goal": "max"}, {**task, "function": "second"}]
    study = {"tasks": tasks, "axes": {"window": [1, 2]}, "seeds": 2}
    record = ablation.run(ablation.create(study, tmp_path / "study"), workers=0)
    assert [facts.metric for facts in record.tasks.values()] == ["accuracy", "error"]
    failed = [trial for trial in record.trials if trial.status != "done"]
    assert [(trial.trial["task"]["function"], trial.seed) for trial in failed] == [("second", 1)] * 2
    for trial in failed:
        assert "got 'accuracy' as its first metric; expected 'error', as in trial" in (trial.error or {})["error"]


def test_a_function_and_a_built_in_task_share_a_study(tmp_path):
    body = "def train(window, **others): return {'accuracy': 0.1 * window}"
    function = {"kind": "python", "file": str(written(tmp_path, body)), "goal": "max"}
    adding = {"kind": "adding", "length": 4, "train": 60, "validation": 10, "test": 10}
    axes = {"cell": ["gru"], "hidden_size": [3], "norm": ["layer"], "window": [1, 2]}
    study = {"tasks": [adding, function], "axes": axes, "train": {"steps": 2}, "seeds": 2}
    record = ablation.run(ablation.create(study, tmp_path / "study"), workers=0)
    assert record.counts()["done"] == 8, [trial.error for trial in record.trials]
    assert [facts.metric for facts in record.tasks.values()] == ["mean squared error", "accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"function": "tarin"}}, r"task\.function: got 'tarin'; expected a function .*'train'"),
        ({"task": {"file": "/nowhere/mine.py"}}, "got /nowhere/mine.py, which does not exist; expected a"),
        ({"task": {"arguments": {"rate": 1}}}, r"got no argument of train in mine\.py; expected norm, window"),
        (
            {"task": {"arguments": {"windwo": 1}}, "axes": {"norm": ["none"]}},
            r"task\.arguments\.windwo: got no argument of train in mine\.py; expected norm.*; did you mean 'window'\?",
        ),
        (
            {"task": {"arguments": {"norm": {"kind": "layer", "epss": 1}}}, "axes": {"window": [1]}},
            r"task\.arguments\.norm\.epss: got .*; did you mean 'eps'\?",
        ),
        ({"task": {"arguments": {"seed": 1}}}, r"task\.arguments\.seed: got an argument that the study sets"),
        ({"axes": {"norm": ["none"]}}, "got no value for window, which train in mine.py needs"),
        ({"axes": {"norm": ["laier"], "window": [1]}}, r"axes\.norm\[0\]: got unknown normalizer .laier.*layer"),
        ({"axes": {"norm": ["layer"], "window": [0]}}, r"axes\.window"),
        ({"axes": {"norm": ["none"], "window": [1], "seed": [1]}}, "seed"),
        *(
            (
                {"axes": {"norm": ["none"], "window": [1], name: [1]}},
                rf"axes\.{name}: got {name}; expected .*, or an argument of a function .*; {name} is reserved",
            )
            for name in ("model", "task", "tasks", "train", "seed", "seeds")
        ),
        ({"train": {"optimizer": "adam"}}, r"train\.optimizer: got an option that a python task does not use"),
        ({"model": {"cell": "lstm"}}, r"model\.cell: got an option; expected none: a python task has arguments"),
        (
            {"task": {"arguments": {"window": 9}}},
            r"task\.arguments\.window: got an argument that is an axis already; expected each argument once",
        ),
        (
            {"axes": {"norm": ["none"]}, "tune": {"window": [1, 3]}},
            "tune: got tuned options for a function; expected a task with validation scores",
        ),
        (
            {"endpoint": "tail"},
            "endpoint: got tail for train, whose function reports losses; expected final, or reports: metric",
        ),
        (
            {"endpoint": {"train": "steps"}, "reach": 0.5},
            r"endpoint\.train: got steps for train, whose function reports losses; expected final, or reports: metric",
        ),
        ({"reach": 0.5}, "reach: got a level for train, whose function reports losses; expected no level, or reports:"),
        ({"reach": {"train": 0.5}}, r"reach\.train: got a level for train, whose function reports losses; expected no"),
    ],
)
def test_bad_points_are_rejected_before_training(tmp_path, change, message):
    task = change.pop("task", {})
    with pytest.raises(SpecError, match=message):
        ablation.create(study(written(tmp_path, GOOD), task=task, **change), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("endpoint", ["tail", "steps"])
def test_a_function_that_reports_its_metric_may_have_any_endpoint(tmp_path, endpoint):
    options = {"task": {"reports": "metric"}, "endpoint": endpoint, "reach": 0.5}
    assert ablation.create(study(written(tmp_path, GOOD), **options), tmp_path / "study").is_dir()


MODULE, NAME = "from atn_norms import ablation", "from atn_norms.ablation import ablate"


def test_changed_code_is_another_study(tmp_path):
    path = written(tmp_path, GOOD)
    folder = ablation.create(study(path), tmp_path / "study")
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(SpecError, match=r"other data or code \(task\.file \(.*mine\.py\) has changed\)"):
        ablation.create(study(path), folder)
    with pytest.raises(SpecError, match=r"task\.file: got changed .*mine\.py; expected the content of the time"):
        ablation.resume(folder, workers=0)


def test_the_changed_file_is_named(tmp_path):
    path, helper = written(tmp_path, "import helper\n" + GOOD), written(tmp_path, "x = 1", "helper.py")
    data, other = tmp_path / "data.csv", tmp_path / "other.csv"
    for each in (data, other):
        each.write_text("1")
    task = {"files": [str(data), str(other)]}
    folder = ablation.create(study(path, task=dict(task)), tmp_path / "study")
    helper.write_text("x = 2")
    other.write_text("2")
    cause = rf"\(task\.file \({helper}\) has changed; task\.files \({other}\) has changed\)"
    with pytest.raises(SpecError, match=cause):
        ablation.create(study(path, task=dict(task)), folder)
    with pytest.raises(SpecError, match=rf"task\.file: got changed {helper}; .*\n.*task\.files: got changed {other};"):
        ablation.resume(folder, workers=0)
    resolved = json.loads((folder / "study.resolved.json").read_text())
    del resolved["sources"]  # as in a study of an earlier version
    (folder / "study.resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(
        SpecError, match=rf"task\.file: got changed {path}; .*\n.*task\.files: got changed {data}, {other};"
    ):
        ablation.resume(folder, workers=0)


def test_the_files_of_a_study_are_hashed_once(tmp_path, monkeypatch):
    path, data = written(tmp_path, GOOD), tmp_path / "data.csv"
    data.write_text("1")
    read = []
    for module, name in ((sources, "sha256"), (functions, "syntax_tree"), (imports, "syntax_tree")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda file, call=original: read.append(file) or call(file))
    options = study(path, task={"files": [str(data)]})
    spec = ablation.StudySpec.model_validate(options)
    read.clear()
    plan = ablation.make_plan(spec)
    assert len(plan.trials) == 6 and read.count(data) == 1
    assert read.count(path) == 2, "its imports, and its counted lines"
    resolved = plan.resolved()
    read.clear()
    functions.refuse_changed_functions(tmp_path, resolved)
    assert read.count(data) == 1 and read.count(path) == 2


def test_an_axis_of_files_has_the_hashes_of_each_value(tmp_path):
    files = [written(tmp_path, GOOD.replace("0.5", each), f"m{each}.py") for each in ("0.1", "0.2")]
    axes = {"task.file": list(map(str, files)), "norm": ["none"]}
    task = {"arguments": {"window": 1}}
    plan = ablation.make_plan(ablation.StudySpec.model_validate(study(files[0], task=task, axes=axes)))
    trials = [each.trial for each in plan.trials[:2]]
    assert [each["data"]["file"] for each in trials] == [hash_code(Path(each["task"]["file"])) for each in trials]
    assert trials[0]["data"] != trials[1]["data"]


def test_additional_files_count_by_content(tmp_path):
    path, data = written(tmp_path, GOOD), tmp_path / "data.csv"
    data.write_text("1")
    before = ablation.make_plan(ablation.StudySpec.model_validate(study(path, task={"files": [str(data)]}))).key
    data.write_text("2")
    after = ablation.make_plan(ablation.StudySpec.model_validate(study(path, task={"files": [str(data)]}))).key
    assert before != after


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("x = 1", "x = 2", False),
        ("if __name__ == '__main__':\n    a()", "if __name__ == '__main__':\n    b()", True),
        ("if '__main__' == __name__:\n    a()", "if '__main__' == __name__:\n    b()", True),
        ("if __name__ != '__main__':\n    a()", "if __name__ != '__main__':\n    b()", False),
        ("if __name__ == '__main__' or x:\n    a()", "if __name__ == '__main__' or x:\n    b()", False),
        (
            "if __name__ == '__main__':\n    a()\nelse:\n    a()",
            "if __name__ == '__main__':\n    a()\nelse:\n    b()",
            False,
        ),
        (f"{MODULE}\nablation.ablate(train, seeds=1)", f"{MODULE}\nablation.ablate(train, seeds=2)", True),
        (f"{NAME}\nrecord = ablate(train, seeds=1)", f"{NAME}\nrecord = ablate(train, seeds=2)", True),
        (f"{NAME} as go\ngo(train,\n  seeds=1)", f"{NAME} as go\ngo(train,\n  seeds=2)", True),
        (
            "import atn_norms as an\nan.ablation.ablate(f, seeds=1)",
            "import atn_norms as an\nan.ablation.ablate(f, seeds=2)",
            True,
        ),
        (f"{NAME}\nx = 1; ablate(train)", f"{NAME}\nx = 2; ablate(train)", False),
        ("from lesion import ablate\nW = ablate(2)", "from lesion import ablate\nW = ablate(3)", False),
        (
            f"{NAME}\ndef ablate(n):\n    return n\nW = ablate(2)",
            f"{NAME}\ndef ablate(n):\n    return n\nW = ablate(3)",
            False,
        ),
        ("W = model.ablate(2)", "W = model.ablate(3)", False),
        ("if x:\n    a()", "if x:\n    b()", False),
        *(
            (
                f"{NAME}\ndef train(k): return {read}\n{loop.format(1)}",
                f"{NAME}\ndef train(k): return {read}\n{loop.format(2)}",
                same,
            )
            for read, loop, same in [
                ("k", "for k in ({},):\n    ablate(train)", True),
                ("k", "for k in (1,):\n    ablate(train, seeds={})\n    del k", True),
                ("k", "for k in (1,):\n    n = {}\n    print(n)\n    r = ablate(train, seeds=n)", True),
                ("k", "for k in (1,):\n    for n in (1,):\n        if k > {}:\n            ablate(train)", True),
                ("k", "if m > {}:\n    ablate(train)", True),
                ("n", "for n in ({},):\n    ablate(train)", False),
                ("[(lambda: n)() for x in k]", "for k in (1,):\n    n = {}\n    ablate(train)", False),
                ("k", "for k in ({},):\n    setup(k)\n    ablate(train)", False),
                ("k", "for k in (1,):\n    c[0] = {}\n    ablate(train)", False),
                ("k", "for k in (1,):\n    if k: f({})\n    else: ablate(train)", False),
                ("k", "for k in ({},):\n    n = k", False),
                ("n", "for k in ({},):\n    ablate(train)\nfor n in (1,):\n    ablate(train)", False),
                ("k", "for k in ({},):\n    ablate(train)\nfor k in (1,):\n    ablate(train)", True),
                ("k", "while k > {}:\n    ablate(train)", False),
                ("k", "for k in setup({}):\n    ablate(train)", False),
                ("k", "for k in (1,):\n    n = setup({})\n    ablate(train)", False),
                ("k", "if setup({}):\n    ablate(train)", False),
                ("k", "for k in (1,):\n    print(setup({}))\n    ablate(train)", False),
                ("k", "for k, n in sorted(zip(range({}), {{}}.items())):\n    ablate(train)", True),
            ]
        ),
    ],
)
def test_code_that_only_starts_studies_does_not_count(tmp_path, before, after, same):
    path = written(tmp_path, before)
    first = hash_code(path)
    path.write_text(after)
    assert (hash_code(path) == first) == same


@pytest.mark.parametrize("start", ["for k in (1, 2):\n    {}", "def start(k):\n    {}\nfor k in (1, 2): start(k)"])
def test_a_loop_that_starts_studies_grows_them_or_names_the_cause(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = "ablation.ablate(train, axes={'h': [1]}, arguments={'k': k}, seeds=SEEDS, out=f's{k}', workers=0)"
    text = f"{MODULE}\ndef train(h, k, seed): return k\n{start.format(call)}"
    path = tmp_path / "mine.py"
    for _ in range(2):
        run_as_script(path, text.replace("SEEDS", "1"))
    if "def start" in text:
        cause = "The calls of ablate in line 4 of mine.py count as code; those in the block under "
        for grow in (lambda: run_as_script(path, text.replace("SEEDS", "2")), lambda: ablation.resume("s2", workers=0)):
            with pytest.raises(SpecError, match=cause):
                grow()
        return
    run_as_script(path, text.replace("SEEDS", "2"))
    assert [scores(ablation.resume(folder, workers=0)) for folder in ("s1", "s2")] == [[1, 1], [2, 2]]


def scores(record: Any) -> list[float]:
    return [trial.result["metrics"]["test"]["score"] for trial in record.trials]


GLOBALS = [  # the file, the statement under `if __name__ == "__main__":`, the message
    ("LR = 0.1\ndef train(h): return LR", "LR = 0.9", r"LR: got 0\.9 in this process; expected 0\.1, as in the trials"),
    (
        "def train(h): return args",
        "args = 1",
        r"args: got 1 in .*; expected a name that the trials define\. Trials .* mine\.py",
    ),
    ("def train(h): return f() if h > 9 else 1", "def f(): pass", "f: got f in this process; expected a name that"),
    ("LR = 1\ndef rate(): return LR\ndef train(h): return rate()", "LR = 2", "LR: got 2"),
    ("LR = 1\ndef train(h): return [(lambda: LR)() for x in [1]][0]", "LR = 2", "LR: got 2"),
    ("LR = 1\nclass A:\n    def rate(self): return LR\ndef train(h): return A().rate()", "LR = 2", "LR: got 2"),
    ("LR = 1\nclass A:\n    x = 1\nclass B(A): pass\ndef train(h): return B().x", "A.x = 2", r"A\.x: got 2"),
    ("import torch\nLR = 1\n@torch.no_grad()\ndef f(): return LR\ndef train(h): return f()", "LR = 2", "LR: got 2"),
    (
        "C = {'a': [1]}\ndef train(h): return C['a'][0]",
        "C['a'] = [2]",
        r"C\['a'\]: got \[2\] in this process; expected \[1\]",
    ),
    (
        "import types\nC = types.SimpleNamespace(x=1)\ndef train(h): return C.x",
        "C.x = None",
        r"C\.x: got None .* 1, as",
    ),
    ("import other\ndef train(h): return other.LR", "other.LR = 2", r"other\.LR: got 2 .* expected 1, as"),
    ("def train(h, k=1): return k", "train.__defaults__ = (2,)", r"train\(k\): got 2"),
    (
        "def a(k):\n    def f(): return k\n    return f\nf = a(1)\ndef train(h): return f()",
        "f = a(2)",
        r"f\(k\): got 2",
    ),
    (
        "def a(): pass\ndef b(): pass\nf = a\ndef train(h): return f()",
        "f = b",
        "f: got b at line 2 .* expected a at line 1",
    ),
    ("import torch\nF = torch.relu\ndef train(h): return F(h)", "F = torch.tanh", "F: got .*tanh .* expected .*relu"),
    (
        "DATA = None\ndef train(h): return DATA",
        "import torch; DATA = torch.ones(1)",
        "DATA: got a Tensor .* expected None",
    ),
    ("C = [{'a': 1}]\ndef train(h): return C[0]['a']", "C[0]['a'] = 2", r"C\[0\]\['a'\]: got 2 .* expected 1, as"),
    ("C = {'a': ({'b': 1}, 3)}\ndef train(h): return C", "C['a'][0]['b'] = 2", r"C\['a'\]\[0\]\['b'\]: got 2 "),
    ("C = [{'a': 1}]\ndef train(h): return C[-1]['a']", "C.append({'a': 2})", r"C\[1\]: got a dict"),
    ("class A: x = 1\nC = [A()]\ndef train(h): return C[0].x", "C[0].x = 2", r"C\[0\]\.x: got 2 "),
    ("class A: __slots__ = 'x',\nC = A()\nC.x = 1\ndef train(h): return C.x", "C.x = 2", r"C\.x: got 2 .* expected 1"),
    ("class A: __slots__ = 'rate'\nC = A()\nC.rate = 1\ndef train(h): return C.rate", "C.rate = 2", r"C\.rate: got 2"),
    ("class A(list): pass\nC = A([{}])\nC.x = 1\ndef train(h): return C.x", "C.x = 2", r"C\.x: got 2 .* expected 1"),
    ("class A(list): pass\nC = A([1])\ndef train(h): return C[0]", "C[0] = 2", r"C\[0\]: got 2 .* expected 1"),
    ("def f(): pass\nf.rate = 1\ndef train(h): return f.rate", "f.rate = 2", r"f\.rate: got 2 .* expected 1, as"),
    (
        "import functools\ndef f(k): return k\nG = functools.partial(f, 1)\ndef train(h): return G()",
        "G = functools.partial(f, 2)",
        r"G\.args: got \(2\) .* expected \(1\)",
    ),
    (
        "import functools\ndef f(k): return k\nG = functools.partial(f, k=1)\ndef train(h): return G()",
        "G.keywords['k'] = 2",
        r"G\.keywords\['k'\]: got 2 .* expected 1",
    ),
    (
        "import functools\ndef f(): pass\ndef g(): pass\nG = functools.partial(f)\ndef train(h): return G()",
        "G = functools.partial(g)",
        r"G\.func: got g at .* expected f at",
    ),
]
CALL = "ablation.ablate(train, axes={'h': [1]}, seeds=1, out='study', workers=0)"
MAIN = f"\n{MODULE}\nif __name__ == '__main__':\n"


def run_as_script(path: Path, text: str) -> None:
    runpy.run_path(str(written(path.parent, text, path.name)), run_name="__main__")


@pytest.mark.parametrize(("body", "statement", "message"), GLOBALS)
def test_globals_that_trials_have_with_other_values_are_refused(body, statement, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    written(tmp_path, "LR = 1", "other.py")
    with pytest.raises(SpecError, match=message):
        run_as_script(tmp_path / "mine.py", f"{body}{MAIN}    {statement}\n    {CALL}")
    assert not (tmp_path / "study").exists()
    sys.modules.pop("other", None)


@pytest.mark.parametrize(
    "imports",
    [
        "import importlib\nf = importlib.import_module('helper').f",
        "from importlib import import_module\ndef f(x): return import_module('helper').f(x)",
        "f = __import__('helper').f",
    ],
)
def test_a_module_imported_by_a_call_is_part_of_the_code(imports, tmp_path):
    helper = written(tmp_path, "def f(x): return x", "helper.py")
    file = written(tmp_path, f"{imports}\ndef train(h): return f(h)", "mine.py")
    before = hash_code(file)
    helper.write_text("def f(x): return 5 * x")
    assert hash_code(file) != before


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_a_module_that_no_hash_covers_is_named(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "lib").mkdir()
    common = written(tmp_path / "lib", "def f(x): return x", "common.py")
    body = f"import sys\nsys.path.insert(0, {str(common.parent)!r})\nfrom common import f\ndef train(h): return f(h)"
    call = CALL.replace("workers=0", "workers=0, files=['lib']") if named else CALL
    warning = f"{common}: a change of this module makes no other study, because mine.py does not import it from its own"
    script = written(tmp_path, f"{body}{MAIN}    {call}", "mine.py")
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path).stderr
    (log,) = (tmp_path / "study").glob("trials/*/log.txt")
    assert [warning in text for text in (printed, log.read_text())] == [not named] * 2
    assert (f"{script}:" in printed) == (not named)


def test_later_calls_of_ablate_have_the_globals_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = CALL.replace("'study'", "str(K)")
    text = f"{MODULE}\ndef train(h): return K\nfor K in (1, 2):\n    {call}"
    with pytest.raises(SpecError, match="K: got 2 in this process; expected 1, as in the trials"):
        run_as_script(tmp_path / "mine.py", text)
    assert scores(ablation.load(tmp_path / "1")) == [1] and not (tmp_path / "2").exists()
    text = f"{MODULE}\ndef train(h): return 1\n{CALL}\ndef train(h): return 2\n{CALL}"
    with pytest.raises(SpecError, match="train: got train at line 4 in this process; expected train at line 2"):
        run_as_script(tmp_path / "again.py", text)


def test_a_function_below_the_first_call_of_ablate_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"{MODULE}\ndef train(h): return 1\n{CALL}\ndef later(h): return 2\n"
    message = (
        r"mine\.py: got unknown function 'later'; expected one of train\. Define it above the first call of ablate"
    )
    with pytest.raises(SpecError, match=message):
        run_as_script(tmp_path / "mine.py", text + CALL.replace("train", "later").replace("study", "second"))
    assert not (tmp_path / "second").exists()


def test_arguments_of_the_command_line_are_no_globals_of_trials(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mine.py", "--lr", "0.9"])
    body = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', type=float, default=0.1)\n"
    with pytest.raises(SpecError, match=r"ARGS\.lr: got 0\.9 in this process; expected 0\.1, as in the trials"):
        run_as_script(
            tmp_path / "mine.py", f"{body}ARGS = p.parse_args()\ndef train(h): return ARGS.lr{MAIN}    {CALL}"
        )


def test_objects_and_names_that_differ_by_process_are_no_settings(tmp_path, monkeypatch, capfd):
    body = """
    import dataclasses, enum, functools, logging, random
    from pathlib import Path
    import torch
    log, HERE, DATA, COUNT = logging.getLogger(__name__), Path(__file__).parent, torch.ones(2), 0
    print("printed")
    torch.set_default_dtype(torch.float64)
    random.seed(0)
    Mode = enum.Enum("Mode", "A B")

    @dataclasses.dataclass
    class Config:
        mode: Mode = Mode.A
        names: list = dataclasses.field(default_factory=list)

    class Model(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    CONFIG = Config()
    MODEL = Model(CONFIG)
    LOADED = [Config(), torch.ones(1)]

    class Odd:
        def __getattribute__(self, name):
            raise RuntimeError

    ODD = Odd()

    def data():
        if data.cache is None:
            data.cache = LOADED[1] + 1
        return data.cache.sum() - 2

    data.cache = None

    @functools.cache
    def size(name):
        return len(name) + size(name[1:]) if name else 0

    def train(h, config=CONFIG):
        global COUNT
        COUNT += 1
        log.info(__name__)
        COUNT += data()
        return COUNT + size("abc") + DATA.sum() + isinstance(MODEL, Model) + HERE.exists() + (CONFIG.mode is Mode.A)
    """
    monkeypatch.chdir(tmp_path)
    statements = "    size('x'); train(1); LOADED[1] *= 3; DATA *= 2; state = random.getstate()"
    text = f"{textwrap.dedent(body)}{MAIN}{statements}\n    {CALL}\n    assert random.getstate() == state"
    before = torch.get_default_dtype()
    run_as_script(tmp_path / "mine.py", text)
    torch.set_default_dtype(before)
    assert scores(ablation.load(tmp_path / "study")) == [12] and capfd.readouterr().out.count("printed") == 1


def test_a_study_of_a_function_prints_its_answer_and_its_failures(tmp_path, capsys, monkeypatch):
    path = written(
        tmp_path, "def train(x):\n    if x > 2:\n        raise ValueError('no')\n    return float(x)", "printing.py"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module(path.stem).train
    record = ablation.ablate(function, axes={"x": [1, 2, 3]}, seeds=1, out=tmp_path / "study", workers=0)
    out = " ".join(capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ").split())
    assert "train: X: helps at 0, hurts at 0, undecided at" in out and "The lowest mean test score is 1" in out
    assert f"1 trial failed; see atn-norms status {tmp_path / 'study'} report:" in out
    assert repr(record).startswith(
        "StudyRecord(name='printing', tasks=['train'], axes={'x': ['1', '2', '3']}, trials: 2 done"
    )
    assert "1 failed)" in repr(record) and len(repr(record.best())) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "data.csv"}, "files: got str 'data.csv'; expected a list of paths"),
        ({"files": Path("data.csv")}, "files: got .*Path.*; expected a list of paths"),
        ({"seeds": None}, "seeds: got NoneType None; expected a number or a list of seeds"),
        ({"seeds": "12"}, "seeds: got str '12'; expected a number or a list of seeds"),
        ({"seeds": 1.5}, r"seeds: got float 1\.5; expected a number or a list of seeds"),
        ({"axes": {"x": "abc"}}, r"axes\.x: got str 'abc'; expected a list of values"),
        ({"axes": {"x": {1, 2}}}, r"axes\.x: got set \{1, 2\}; expected a list of values"),
        ({"axes": {"x": {"a": 1}}}, r"axes\.x: got dict \{'a': 1\}; expected a list of values"),
        ({"axes": {"x": 3}}, r"axes\.x: got int 3; expected a list of values"),
        ({"steps": 0}, r"train\.steps: got 0; expected at least 1"),
        ({"name": ""}, "name: got ''; expected 1 to 80 letters"),
    ],
)
def test_bad_arguments_of_ablate_are_refused(change, message, tmp_path, monkeypatch):
    path = written(tmp_path, "def train(x):\n    return x", "arguments.py")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module(path.stem).train
    given: Any = {"axes": {"x": range(1, 3)}, "seeds": 1, "out": tmp_path / "study", "workers": 0} | change
    with pytest.raises(SpecError, match=message):
        ablation.ablate(function, **given)
    assert not (tmp_path / "study").exists()
    del sys.modules[path.stem]


def test_positional_only_parameters_are_refused(tmp_path):
    path = written(tmp_path, "def train(norm, window, /):\n    return 1")
    message = r"task\.function: got positional-only parameters of train in mine\.py: norm, window; expected parameters"
    with pytest.raises(SpecError, match=message):
        ablation.create(study(path, task={"function": "train"}), tmp_path / "study")


def test_margin_endpoint_and_level_are_those_of_a_study_file(tmp_path, capsys, monkeypatch):
    body = """
    def train(x, seed, trial):
        for step in range(1, 6):
            trial.report(step, step * x / 10)
        return x + seed / 1000
    """
    path = written(tmp_path, body, "declared.py")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module(path.stem).train
    given: Any = {"axes": {"x": [1, 2]}, "seeds": 2, "goal": "max", "reports": "metric", "out": tmp_path / "study"}
    record: Any = ablation.ablate(function, **given, workers=0, reach=0.4)
    finished = [(trial.folder / "result.json").stat().st_mtime_ns for trial in record.trials]
    declared: Any = {"margin": 2.5, "endpoint": "steps", "reach": 0.4}
    record = ablation.ablate(function, **given, workers=0, **declared)
    assert {option: record.study[option] for option in declared} == declared
    assert [(trial.folder / "result.json").stat().st_mtime_ns for trial in record.trials] == finished
    with (tmp_path / "study/report/results.csv").open() as file:
        assert [line["reached_at"] for line in csv.DictReader(file)] == ["4", "2", "4", "2"]
    from_file = study(path, task={"reports": "metric"}, axes={"x": [1, 2]}, name="declared", baseline={}, **declared)
    assert not ablation.load(ablation.create(from_file, tmp_path / "study")).counts()["pending"]
    with pytest.raises(SpecError, match=r"margin: got -1; expected a number above 0"):
        ablation.ablate(function, **given, margin=-1)
    with pytest.raises(SpecError, match=r"endpoint: got 'tial'; expected final, tail, steps.*did you mean 'tail'\?"):
        ablation.ablate(function, **given, endpoint="tial")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="endpoint: got steps for train; expected a level for it in reach"):
        ablation.ablate(function, **given, endpoint={"measure": "steps"})


def test_an_interrupted_study_of_a_function_states_how_to_resume(tmp_path, capsys, monkeypatch):
    path = written(tmp_path, "def train(x):\n    raise KeyboardInterrupt", "interrupted.py")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module(path.stem).train
    with pytest.raises(KeyboardInterrupt) as caught:
        ablation.ablate(function, axes={"x": [1]}, seeds=1, out=tmp_path / "study", workers=0)
    assert caught.value.__suppress_context__
    expected = f"interrupted; the same call resumes, and so does atn-norms resume {tmp_path / 'study'}"
    assert capsys.readouterr().out.splitlines()[-1] == expected


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.deep)])
def test_functions_of_two_folders_import_their_own_helpers(workers, tmp_path):
    for folder, value in (("a", 1.0), ("b", 100.0)):
        (tmp_path / folder).mkdir()
        written(
            tmp_path, "import shared_name\ndef train(x):\n    return x * shared_name.VALUE", f"{folder}/{folder}.py"
        )
        written(tmp_path, f"VALUE = {value}", f"{folder}/shared_name.py")
    tasks = [{"kind": "python", "file": str(tmp_path / each / f"{each}.py")} for each in ("a", "b")]
    content = {"tasks": tasks, "axes": {"x": [1, 2]}, "seeds": 1}
    record = ablation.run(ablation.create(content, tmp_path / "study"), workers=workers)
    assert scores(record) == [1, 2, 100, 200]


def fresh_module(name: str) -> Any:
    """Import a module without writing its bytecode."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return importlib.import_module(name)
    finally:
        sys.dont_write_bytecode = before


@pytest.mark.parametrize("name", ["mine.py", "pkg/mine.py"])
def test_an_edited_helper_is_imported_again_in_the_same_process(name, tmp_path, monkeypatch):
    (tmp_path / "pkg").mkdir()
    if "/" in name:
        written(tmp_path, "", "pkg/__init__.py")
    helper = "pkg.edited" if "/" in name else "edited"
    path = written(
        tmp_path,
        f"import {helper} as edited\ndef train():\n    import late\n    return edited.VALUE + late.VALUE",
        name,
    )
    monkeypatch.syspath_prepend(tmp_path)
    places = list(sys.path)
    own = None
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for value in (1.0, 3.0, 2.0):
        for file, number in ((f"{helper.replace('.', '/')}.py", value), ("late.py", value * 2)):
            os.utime(written(tmp_path, f"VALUE = {number}", file), (1e9, 1e9))  # edits within one second
        own = own or fresh_module(helper)
        content = {"task": {"kind": "python", "file": str(path)}, "seeds": 2}
        record = ablation.run(ablation.create(content, tmp_path / f"study-{value}"), workers=0)
        assert scores(record) == [value * 3] * 2
    assert sys.modules[helper] is own and own.VALUE == 1.0, "the modules of the caller come back"
    assert sys.path == places and "late" not in sys.modules


@pytest.mark.parametrize("folder", ["", "pkg/"])
def test_trials_share_no_state_of_a_local_module(folder, tmp_path):
    (tmp_path / "pkg" / "inner").mkdir(parents=True)
    written(tmp_path, "DRAWS = []", "pkg/__init__.py")
    written(tmp_path, "import random\ngenerator = random.Random(0)", "pkg/inner/data.py")  # a namespace package
    written(tmp_path, "COUNTS = {'calls': 0}", "state.py" if not folder else "pkg/state.py")
    body = f"""
    import pkg
    from pkg.inner import data
    {"from . import" if folder else "import"} state
    def train():
        state.COUNTS["calls"] += 1
        pkg.DRAWS.append(data.generator.random())
        return 10 * state.COUNTS["calls"] + len(pkg.DRAWS) + pkg.DRAWS[-1]
    """
    path = written(tmp_path, body, f"{folder}mine.py")
    record = ablation.run(ablation.create(study(path, axes={}, seeds=3), tmp_path / "study"), workers=0)
    assert scores(record) == [11 + random.Random(0).random()] * 3


def test_trials_see_no_arguments_of_the_command_line(tmp_path, monkeypatch, capsys):
    body = """
    import argparse, sys
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    ARGS = parser.parse_args()
    def train(x):
        assert sys.argv == [__file__]
        return ARGS.lr
    """
    folder = ablation.create(study(written(tmp_path, body), axes={"x": [1]}, seeds=1), tmp_path / "study")
    words = ["mine.py", "--lr", "0.9", "--other"]
    monkeypatch.setattr(sys, "argv", words)
    assert main(["resume", str(folder), "--workers", "0"]) == 0, capsys.readouterr().out
    assert scores(ablation.load(folder)) == [0.1]
    assert sys.argv is words and words == ["mine.py", "--lr", "0.9", "--other"]


@pytest.mark.parametrize("imports", ["", "from pkg import mine"])
def test_a_file_of_a_package_needs_no_guard(imports, tmp_path):
    (tmp_path / "pkg").mkdir()
    written(tmp_path, imports, "pkg/__init__.py")
    written(tmp_path, "VALUE = 2.0", "pkg/helper.py")
    call = "" if imports else f"{MODULE}\nablation.ablate(train, axes={{'x': [1]}})\n"
    path = written(tmp_path, f"from .helper import VALUE\ndef train(x): return x * VALUE\n{call}", "pkg/mine.py")
    record = ablation.run(ablation.create(study(path, axes={"x": [1, 2]}, seeds=1), tmp_path / "study"), workers=0)
    assert scores(record) == [2, 4]


def test_installed_modules_and_those_of_python_are_not_imported_again(tmp_path):
    written(tmp_path, "x = 1", "json.py")
    path = written(
        tmp_path, "import json, hypothesis, atn_norms.tasks\ndef train():\n    return float(hasattr(json, 'dumps'))"
    )
    before = {name: sys.modules[name] for name in ("json", "torch", "atn_norms.tasks")}
    record = ablation.run(
        ablation.create({"task": {"kind": "python", "file": str(path)}, "seeds": 1}, tmp_path / "study"), workers=0
    )
    assert scores(record) == [1.0]
    assert all(sys.modules[name] is module for name, module in before.items())


def test_a_local_module_that_is_imported_counts(tmp_path):
    path, helper = written(tmp_path, "import helper"), written(tmp_path, "import deeper", "helper.py")
    written(tmp_path, "x = 1", "deeper.py")
    first = hash_code(path)
    written(tmp_path, "x = 2", "deeper.py")
    assert hash_code(path) != first and helper.exists()


class Cuda:
    """The random generators of two CUDA devices."""

    def __init__(self, initialized: bool = True, devices: int = 2) -> None:
        self.initialized = initialized
        self.states = [torch.tensor([each], dtype=torch.uint8) for each in range(devices)]

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_initialized", lambda: self.initialized)
        patch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        patch.setattr(torch.cuda, "init", self.init)
        patch.setattr(torch.cuda, "get_rng_state_all", lambda: [each.clone() for each in self.states])
        patch.setattr(torch.cuda, "set_rng_state", self.set_rng_state)

    def init(self) -> None:
        """Apply the seed, as torch does after all other calls from before the initialization."""
        if not self.initialized:
            self.initialized, self.states = True, [torch.tensor([7], dtype=torch.uint8) for _ in self.states]

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        if self.initialized:
            self.states[device] = state


def test_a_checkpoint_has_the_random_states_of_initialized_cuda_devices(monkeypatch):
    assert "cuda" not in random_state()  # without a device
    Cuda(initialized=False).install(monkeypatch)
    without = random_state()
    assert "cuda" not in without  # the function does not use it, and reading the state would initialize it
    cuda = Cuda()
    cuda.install(monkeypatch)
    state = random_state()
    assert checkpoints.first_unloadable(state, "state") is None
    cuda.states = [torch.tensor([9], dtype=torch.uint8)] * 2
    restore_random_state(without)
    assert [each.item() for each in cuda.states] == [9, 9]
    restore_random_state(state)
    assert [each.item() for each in cuda.states] == [0, 1]
    fewer = Cuda(initialized=False, devices=1)  # another process, on another machine
    fewer.install(monkeypatch)
    restore_random_state(state)
    assert [each.item() for each in fewer.states] == [0]
    monkeypatch.undo()
    restore_random_state(state)  # on a machine without a device


@pytest.mark.parametrize("saved", [False, True])
def test_the_model_of_a_failed_attempt_survives_with_its_checkpoint_only(saved, tmp_path):
    """The first attempt keeps a model and fails; the second keeps none."""
    body = f"""
    import torch, pathlib
    def train(trial):
        state = trial.checkpoint.load()
        mark = pathlib.Path({str(tmp_path / "mark")!r})
        if not mark.exists():
            mark.touch()
            trial.report(1, 1.0)
            trial.keep(torch.nn.Linear(2, 2))
            if {saved}:
                trial.checkpoint.save({{"weight": torch.zeros(1)}})
            raise RuntimeError("once")
        assert (state is not None) == {saved}
        return 1.0
    """
    trial = only(tmp_path, body)
    assert trial.status == "failed"
    record: Any = ablation.run(tmp_path / "study", workers=0)
    (trial,) = record.trials
    assert trial.status == "done" and (trial.folder / "model.safetensors").exists() == saved


@pytest.mark.parametrize("bad", [lambda: 1, len, print, str.upper, GOOD])
def test_functions_that_workers_cannot_load_are_rejected(bad):
    with pytest.raises(SpecError, match="expected a function defined by def at the top level of a file"):
        task_of(bad)


def test_a_function_at_a_prompt_is_rejected():
    scope = {}
    exec("def train(): return 1", scope)
    with pytest.raises(SpecError, match="defined at a prompt or in a notebook"):
        task_of(scope["train"])


def test_the_command_line_runs_a_study_file_of_a_function(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, GOOD, "my_task.py")
    (tmp_path / "study.yaml").write_text(
        "name: mine\ntask: {kind: python, file: my_task.py, function: train, goal: max}\n"
        "axes: {norm: [none, layer], window: [1]}\nseeds: 2\n"
    )
    assert main(["ablate", "study.yaml", "--workers", "0", "--out", "study"]) == 0
    printed = capsys.readouterr()
    assert "4 trials" in printed.out and "accuracy" in printed.out and (tmp_path / "study/report/report.html").exists()
    assert main(["status", "study"]) == 0 and StudyFolder("study").load().counts()["done"] == 4


def test_trials_of_a_study_file_have_the_globals_of_the_file(tmp_path, monkeypatch):
    """Also in a process that has imported the file, and has set a global to another value."""
    monkeypatch.syspath_prepend(tmp_path)
    path = written(tmp_path, "K = 1\ndef train(): return K", "of_a_study_file.py")
    monkeypatch.setattr(importlib.import_module("of_a_study_file"), "K", 2)
    (trial,) = trials(tmp_path / "study", path, axes={}, seeds=1)
    assert trial.result["metrics"]["test"]["score"] == 1
    assert importlib.import_module("of_a_study_file").K == 2


@pytest.mark.parametrize("folder", ["", "package/"])
def test_settings_of_an_imported_module_hold_in_every_trial(folder, tmp_path):
    """Python executes a module at its first import alone, but every trial has its settings."""
    (tmp_path / folder).mkdir(exist_ok=True)
    if folder:
        (tmp_path / folder / "__init__.py").touch()
    name = f"double_{bool(folder)}"
    written(
        tmp_path, "import os, torch\ntorch.set_default_dtype(torch.float64)\nos.environ['MINE'] = '1'", f"{name}.py"
    )
    body = f"import {name}, os, torch\ndef train(a): return len(os.environ['MINE']) + torch.ones(1).element_size()\n"
    found = trials(tmp_path / "study", written(tmp_path, body, f"{folder}mine.py"), axes={"a": [1, 2]})
    assert [t.result and t.result["metrics"]["test"]["score"] for t in found] == [9.0] * 4, found[0].error
    assert torch.get_default_dtype() == torch.float32 and "MINE" not in os.environ


SURROGATE = {
    "print": ("print('file \\udc80')", "done", ""),
    "raise": ("raise FileNotFoundError('file \\udc80')", "failed", r"FileNotFoundError: file \\udc80"),
    "metric": ("return {'a \\udc80': 1.0}", "failed", "train: got 1.0 for 'a .udc80'; expected a number, or a mapping"),
}


@pytest.mark.parametrize("place", SURROGATE)
def test_text_that_utf_8_cannot_encode_does_not_end_the_run(place, tmp_path):
    """Python makes lone surrogates of the undecodable bytes of a file name."""
    statement, status, message = SURROGATE[place]
    body = f"def train(norm):\n    if norm == 'layer':\n        {statement}\n    return 1.0\n"
    faulty, other = trials(tmp_path / "study", written(tmp_path, body), axes={"norm": ["layer", "none"]}, seeds=1)
    assert (faulty.status, other.status) == (status, "done")
    assert re.search(message, faulty.error["error"] if message else "") and "\\udc80" in log(faulty)


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("utf-8", marks=pytest.mark.deep)])
def test_printed_names_are_escaped_in_any_encoding(encoding, tmp_path):
    evil = "\N{GREEK SMALL LETTER ALPHA}\x1b]0;owned\x07"
    body = (
        "from atn_norms import ablation\n"
        "def train(a):\n    if a != 1: raise ValueError(a)\n    return 1.0\n"
        f"ablation.ablate(train, axes={{'a': [1, {evil!r}]}}, seeds=1, out='study', workers=0, name={evil[0]!r})\n"
    )
    done = subprocess.run(
        [sys.executable, written(tmp_path, body)],
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    out = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in out and "\x07" not in out and "ValueError: " in out
    assert out.count(("\\u03b1" if encoding == "ascii" else "\u03b1") + r"\x1b]0;owned\x07") >= 2
    assert "report: study/report/report.html" in out


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"step": 1, "best": numpy.float64(2)}', r"state['best']: got numpy.float64 np.float64(2.0); expected "),
        ('{"of": [1, {"all": numpy.zeros(1)}]}', r"state['of'][1]['all']: got numpy.ndarray array([0.]); expected "),
        ('{"counts": collections.defaultdict(int)}', "state['counts']: got collections.defaultdict "),
        ('{numpy.int64(3): 1}', "state: got numpy.int64 np.int64(3); expected tensors, "),
        ("3", "state: got int 3; expected a mapping such as "),
        ("None", "state: got NoneType None; expected a mapping such as "),
    ],
)  # fmt: skip
def test_a_checkpoint_that_could_not_be_loaded_is_refused(state, message, tmp_path):
    trial = only(tmp_path, f"import collections, numpy\ndef train(trial):\n    trial.checkpoint.save({state})\n")
    assert trial.status == "failed" and message in trial.error["error"]
    assert not (trial.folder / "checkpoint.pt").exists()


def test_whatever_torch_loads_is_a_checkpoint(tmp_path):
    body = """
    import collections, torch
    def train(trial):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        count = collections.Counter("ab")
        trial.checkpoint.save({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "parameter": model.weight, "count": count,
            "set": {1, 2}, "tuple": (1, [None, 2j]), 3: b"x", "dtype": torch.float64, "size": torch.Size([2]),
        })
        raise RuntimeError("interrupted")
    """
    trial = only(tmp_path, body)
    assert "interrupted" in trial.error["error"]
    checkpoints.unpack(trial.id, (trial.folder / "checkpoint.pt").read_bytes())


FOREIGN = {
    "random": lambda state: state.update(random={"torch": torch.zeros(3, dtype=torch.uint8), "python": [3, [], None]}),
    "no random": lambda state: state.update(random={}),
    "no watch": lambda state: state.update(watch={}),
    "a step beyond the curve": lambda state: state["watch"].update(step=10**9),
    "true for a step": lambda state: state["watch"].update(step=True),
    "no number": lambda state: state["watch"].update(best=float("nan")),
    "a negative count": lambda state: state["watch"].update(since=-1),
    "an infinite loss": lambda state: state["watch"].update(first=float("inf")),
    "text": lambda state: state["watch"].update(first="x"),
    "other parts": lambda state: state.pop("watch"),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_a_foreign_checkpoint_of_a_function_costs_a_fresh_start(change, tmp_path):
    path, stop = written(tmp_path, RESUMED), tmp_path / "stop.txt"
    given = {"axes": {}, "seeds": 1, "task": {"arguments": {"stop": str(stop)}}}
    (stopped,) = trials(tmp_path / "stopped", path, **given)
    (whole,) = trials(tmp_path / "whole", path, **given)
    content = (stopped.folder / "checkpoint.pt").read_bytes()
    state, mark = checkpoints.unpack(stopped.id, content)
    FOREIGN[change](state)
    (stopped.folder / "checkpoint.pt").write_bytes(checkpoints.pack(stopped.id, state, mark))
    (resumed,) = ablation.run(tmp_path / "stopped", workers=0).trials
    assert resumed.status == "done", resumed.error
    assert (resumed.result, resumed.curve) == (whole.result, whole.curve)
    assert "checkpoint.pt cannot be used and is now checkpoint.rejected.pt" in log(resumed)


@pytest.mark.parametrize("name", ["file", "files"])
@pytest.mark.parametrize("make", ["pipe", "device"])
def test_only_regular_files_are_hashed(make, name, tmp_path):
    path = tmp_path / "odd.py"
    if make == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    options = {"file": str(path)} if name == "file" else {"files": [str(path)]}
    with pytest.raises(SpecError, match=r"odd\.py.*a special file"):
        ablation.create(study(written(tmp_path, GOOD), task=options), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_linked_folder_counts_by_its_content(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    (data / "a.txt").write_text("1")
    first = hash_files(data)
    (data / "more").symlink_to(elsewhere)
    (elsewhere / "b.txt").write_text("2")
    (elsewhere / "back").symlink_to(data)  # endless, if it were followed
    second = hash_files(data)
    (elsewhere / "b.txt").write_text("3")
    assert len({first, second, hash_files(data)}) == 3


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(SpecError, match=r"data: got Permission denied; expected a readable folder"):
        hash_files(tmp_path / "data")


IMPORTS = {
    "a module of the package": ("pkg/train.py", "from pkg.helper import x", "pkg/helper.py"),
    "a relative module": ("pkg/train.py", "from .helper import x", "pkg/helper.py"),
    "a module of the package above": ("pkg/inner/train.py", "from ..helper import x", "pkg/helper.py"),
    "the package itself": ("pkg/train.py", "", "pkg/__init__.py"),
    "a package on the way": ("train.py", "import pkg.inner.helper", "pkg/inner/__init__.py"),
    "an import of a helper": ("train.py", "import pkg.first", "pkg/helper.py"),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_every_local_module_counts(case, tmp_path):
    name, code, changed = IMPORTS[case]
    (tmp_path / "pkg" / "inner").mkdir(parents=True)
    for each in ("pkg/__init__.py", "pkg/helper.py", "pkg/inner/__init__.py", "pkg/inner/helper.py"):
        (tmp_path / each).write_text("x = 1\n")
    (tmp_path / "pkg" / "first.py").write_text("from pkg import helper\n")
    path = written(tmp_path, code, name)
    before = hash_code(path)
    (tmp_path / changed).write_text("x = 2\n")
    assert hash_code(path) != before


def test_installed_modules_do_not_count(tmp_path):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "torch.py").write_text("x = 1")
    path = written(folder, "import torch")
    before = hash_code(path)
    (folder / "torch.py").write_text("x = 2")
    assert hash_code(path) == before
    (tmp_path / "atn_norms.py").write_text("x = 1")
    mine = written(tmp_path, "import atn_norms.layers\nfrom atn_norms import layers")
    before = hash_code(mine)
    (tmp_path / "atn_norms.py").write_text("x = 2")
    assert hash_code(mine) == before


def test_a_form_feed_is_no_line_end_of_code(tmp_path):
    """The line of the call of `ablate` is left out of the hash, and no other one."""
    code = f"'\x0c'\nx = {{}}\n{NAME}\nablate(train)\ny = 2\n"
    first, second, third = (
        hash_code(written(tmp_path, text))
        for text in (code.format(1), code.format(2), code.format(1).replace("ablate(train)", "ablate(train, seeds=3)"))
    )
    assert first != second and first == third


@pytest.mark.parametrize("code", ["x = " + "(" * 5000, "x = " + "-" * 200_000 + "1", "x = \0", b"\xff\xfe"])
def test_code_that_python_cannot_read_is_named(code, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(code if isinstance(code, bytes) else code.encode())
    with pytest.raises(SpecError, match=r"file: got .*mine\.py"):
        hash_code(path)


def test_a_byte_order_mark_of_code_is_ignored(tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(b"\xef\xbb\xbfx = 1\n")
    assert hash_code(path)


def test_a_window_without_a_norm_may_mean_anything(tmp_path):
    path = written(tmp_path, "def train(window, seed):\n    return float(len(window)) + seed\n")
    found = trials(tmp_path / "study", path, axes={"window": ["short", "longer"]})
    assert sorted(t.result["metrics"]["test"]["score"] for t in found) == [5.0, 6.0, 6.0, 7.0]


def test_a_data_loader_in_a_cycle_ends_its_own_processes(tmp_path):
    body = """
    import torch

    class Holder:
        pass

    def train(seed):
        holder = Holder()
        holder.itself = holder
        loader = torch.utils.data.DataLoader(range(4), num_workers=1, persistent_workers=True)
        holder.batches = iter(loader)
        return float(next(holder.batches))
    """
    trial = only(tmp_path, body)
    assert trial.status == "done", trial.error
    (log,) = (tmp_path / "study" / "trials").glob("*/log.txt")
    assert "left a process" not in log.read_text()
