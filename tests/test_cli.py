"""The command line: fast help with examples, one message and exit code 2 for bad input, complete studies."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import atn_norms
from atn_norms.ablation import StudySpec, create, load
from atn_norms.ablation.grid import presets
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.cli import COMMANDS, _sentence, main
from atn_norms.specs import read
from tests.waiting import PATIENCE, until

ROOT = Path(__file__).parents[1]

CHANGED = "as when the study was created"
STUDY = """\
model: {cell: lstm, hidden_size: 4}
task: {kind: adding, length: 6, train: 40, validation: 10, test: 10}
train: {steps: 4, batch_size: 5}
axes: {norm: [none, layer], window: [1, 3]}
seeds: 1
"""
MODEL = "cell: lstm\ninput_size: 2\nhidden_size: 3\nnorm: layer\nwindow: 5\n"


def program(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "atn_norms", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding=environment.get("PYTHONIOENCODING"),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        start_new_session=True,
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "model.yaml").write_text(MODEL)
    return tmp_path


def printed(capsys, *arguments: str, code: int = 0) -> str:
    """Return the standard output of a command, whose exit code must be `code`."""
    assert main(arguments) == code
    return capsys.readouterr().out


def error_of(capsys, *arguments: str, code: int = 2) -> str:
    """Return the standard error of a command, whose standard output must be empty."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command, capsys):
    out = printed(capsys, command, "--help")
    assert f"Usage: atn-norms {command}" in out
    assert "Example:\n" in out
    assert f"atn-norms {command}" in out.partition("Example:")[2]


def test_the_overview_names_every_command(capsys):
    for arguments in ([], ["--help"]):
        out = printed(capsys, *arguments)
        for command, (_, short, _) in COMMANDS.items():
            assert f"  {command} " in out
            assert short in out


def test_help_loads_nothing_heavy():
    code = "import sys; from atn_norms.cli import main; main(['ablate', '--help']); print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "rich", "ruamel.yaml", "distributed", "matplotlib"}


BAD = [
    (["ablat"], "No such command 'ablat'"),
    (["show"], "Missing argument 'MODEL.yaml'"),
    (["show", "model.yml"], "model.yml: got no such file; expected a file; did you mean 'model.yaml'?"),
    (["show", "study.yaml"], "study.yaml: got a study; expected a model file. For its trials: atn-norms ablate"),
    (
        ["list", "norms"],
        "got unknown family 'norms'; expected one of normalizers, windows, cells, tasks, studies; did you mean 'normalizers'?",  # noqa: E501
    ),
    (["check", "python"], "KIND: got 'python', the task of a function; expected a kind with conformance tests"),
    (["schema", "studdy"], "got unknown schema 'studdy'; expected one of study, model; did you mean 'study'?"),
    (["schema", "--out", "no/where.json"], "no/where.json: got No such file or directory; expected a writable file"),
    (
        ["init", "study.yaml"],
        "study.yaml: got an existing file; expected a new name. Choose another name, or overwrite with --force",
    ),
    (["init", "study.json"], "study.json: got the ending '.json'; expected .yaml or .yml"),
    (["init", "no/where.yaml"], "where.schema.json: got No such file or directory; expected a writable file"),
    (["status", "."], "got no study.resolved.json; expected a study's folder"),
    (["report", "nowhere"], "nowhere: got no such folder; expected a study's folder"),
    (["resume", "nowhere"], "nowhere: got no such folder; expected a study's folder"),
    (["ablate", "stduy.yaml"], "stduy.yaml: got no such file; expected a file; did you mean 'study.yaml'?"),
    (
        ["ablate", "study.yaml", "--set", "axes.norm=[laier]"],
        "--set axes.norm: axes.norm[0]: got unknown normalizer 'laier'",
    ),
    (
        ["ablate", "study.yaml", "--set", "axes.norm[1]=nonee"],
        "--set axes.norm[1]: axes.norm[1]: got unknown normalizer",
    ),
    (["ablate", "study.yaml", "--set", "trian.steps=4"], "atn-norms: --set trian.steps: trian: got an unknown key"),
    (
        ["ablate", "study.yaml", "--set", "reach.adding=abc"],
        "atn-norms: --set reach.adding: reach.adding: got 'abc'; expected a number",
    ),
    (
        ["ablate", "study.yaml", "--set", "tasks[0]=adding"],
        "--set tasks[0]: got an index; expected none, since the file has one task; did you mean 'task'?",
    ),
    (["ablate", "study.yaml", "--set", "norm=layer"], "did you mean 'model.norm'?"),
    (["ablate", "study.yaml", "--set", "hiden_size=3"], "did you mean 'model.hidden_size'?"),
    (["ablate", "study.yaml", "--set", "step=3"], "did you mean 'train.steps'?"),
    (["ablate", "study.yaml", "--set", "axis=3"], "did you mean 'axes'?"),
    (["ablate", "study.yaml", "--set", "model.3=4"], "--set model.3: model.3: got an unknown key"),
    (["ablate", "study.yaml", "--set", "seeds=[2, 2]", "--set", "seeds[0]=x"], "--set seeds[0]"),
    (["report", ".", "--reach", "a=1", "--reach", "a=2"], "--reach: got 'a' twice; expected one level for each task"),
    (["ablate", "study.yaml", "--set", "train.steps=0"], "--set train.steps: train.steps: got 0; expected"),
    (
        ["ablate", "study.yaml", "--set", "task=addding"],
        "got unknown task 'addding'; expected one of adding, charlm, copying, denoise, ",
    ),
    (["ablate", "study.yaml", "--set", "steps"], "--set steps: got no path=value; expected path=value"),
    (["ablate", "study.yaml", "--set", "task={kind: charlm, text: nothing.txt}"], "nothing.txt"),
    (["ablate", "study.yaml", "--workers", "-1"], "--workers: got '-1'; expected at least 0 (see `atn-norms ablate"),
    (
        ["ablate", "study.yaml", "--workers", "x"],
        "--workers: got 'x'; expected an integer (see `atn-norms ablate --help",
    ),
    (["bench", "--budget", "x"], "--budget: got 'x'; expected a number"),
    (["bench", "--tiny", "--out", "nowhere"], "--check: got nothing; expected --device cuda --check"),
    (["bench", "--out", "nowhere"], "--check: got nothing; expected --device cuda --check"),
    (
        ["bench", "--check", "--device", "cpu", "--csv", "a.csv"],
        "--csv: got an option of the benchmark; expected no other",
    ),
    (
        ["bench", "--check", "--device", "cpu", "--no-memory"],
        "--no-memory: got an option of the benchmark; expected no",
    ),
    (
        ["export", "m.safetensors", "--streaming", "--length", "5"],
        "--length: got 5 with --streaming; expected no length",
    ),
    (["new-plugin", "torch"], "NAME: got 'torch', the name of a backend; expected a new name"),
    (
        ["new-plugin", "python", "--kind", "task"],
        "NAME: got 'python', the name of the task of a function; expected a new",
    ),
    (
        ["ablate", "study.yaml", "--scheduler", "nonsense"],
        "scheduler: got 'nonsense'; expected an address such as tcp://host:port",
    ),
    (["ablate", "study.yaml", "--set", "train.threads=100000"], "got 100000; expected at most 1024"),
    (
        ["ablate", "study.yaml", "--set", "seeds=1000000000", "--dry-run"],
        "seeds: got 1000000000; expected at most 100000",
    ),
    (["ablate", "study.yaml", "--set", "model.hidden_size=1000000"], "what fits this machine's"),
    (
        ["ablate", "study.yaml", "--set", "task={kind: charlm, embedding: 1000000000000}"],
        "task.embedding: got 1000000000000; expected at most",
    ),
    (["ablate", "study.yaml", "--set", "axes.norm=!!set {layer}"], "axes.norm: got set {'layer'}; expected text"),
    (
        ["ablate", "study.yaml", "--set", "model.window=3"],
        "--set model.window: got an option that the axis window sets; expected another option. Use",
    ),
    (
        ["ablate", "study.yaml", "--set", "model.norm.eps=1"],
        "--set model.norm.eps: got an option that the axis norm sets",
    ),
    (
        ["ablate", "study.yaml", "--set", "axes.nrm=[layer, rms]"],
        "--set axes.nrm: axes.nrm: got an unknown key; expected one of cell",
    ),
    (["ablate", "study.yaml", "--set", "axes.norm=layer"], "--set axes.norm: axes.norm: got 'layer'; expected a list"),
    (["ablate", "study.yaml", "--set", "axes="], "--set axes: axes: got None; expected a mapping"),
    (
        ["ablate", "study.yaml", "--set", "name=a/b"],
        "name: got 'a/b'; expected 1 to 80 letters, digits, blanks and . _ - with",
    ),
    (["ablate", "study.yaml", "--set", "train.batch_size=9999999"], "expected 1 to 40, the training sequences"),
    (["ablate", "study.yaml", "--set", "task={kind: charlm, text: /dev/zero}"], "/dev/zero (a special file)"),
    (["ablate", "study.yaml", "--set", "task={kind: charlm, text: ~no-such-user/x}"], "expected a readable file"),
    (["ablate", "study.yaml", "--set", 'task={kind: charlm, text: "a\\0b"}'], "embedded null byte"),
    (
        ["ablate", "study.yaml", "--set", "train.steps=1" + "0" * 400],
        "--set train.steps: not a YAML value: got an integer of more",
    ),
    (["ablate", "."], ".: got a folder; expected a study file. To resume a study in it: atn-norms resume ."),
    (
        ["init", "quick", "study.yaml/other.yaml"],
        "study.yaml/other.schema.json: got Not a directory; expected a writable file",
    ),
    (["ablate", "study.yaml", "--out", "model.yaml"], "model.yaml: got a file; expected a folder"),
    (["ablate", "study.yaml", "--out", "."], "expected an empty folder, or the folder of a study"),
    (["ablate", "study.yaml", "--out", "/proc/nowhere"], "/proc/nowhere"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda each: " ".join(each) if isinstance(each, list) else ""
)
def test_bad_input_gives_one_message_and_leaves_no_files(arguments, message, capsys, folder):
    before = sorted(folder.rglob("*"))
    error = error_of(capsys, *arguments)
    assert message in error
    assert all(line.startswith("atn-norms: ") for line in error.splitlines())
    assert len(error.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


def test_a_tilde_is_expanded_to_the_home_folder(capsys, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out=~/a study", "--set", "axes={}")
    out = printed(capsys, "status", "~/a study")
    assert "1 done" in out and not (folder / "~").exists()
    (folder / "home/a study/trials").rename(folder / "lost")
    assert f"to resume: atn-norms resume '{folder}/home/a study'" in printed(capsys, "status", "~/a study")
    printed(capsys, "schema", "--out=~/a schema.json")
    printed(capsys, "new-plugin", "homely", "--out=~/plugin")
    assert {"a schema.json", "plugin"} <= {path.name for path in (folder / "home").iterdir()}


def test_a_study_that_is_running_is_rejected_before_any_output(capsys, folder):
    create(read("study.yaml")[0], "here")
    with StudyFolder("here").lock():
        assert main(["resume", "here", "--workers", "0"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert f"here: another run is at work on this study; wait for it or stop it (process {os.getpid()} on " in (
            captured.err
        )
        assert "gone after" not in captured.err, "one on this machine keeps its study"
    assert main(["resume", "here", "--workers", "0"]) == 0


@pytest.mark.parametrize("command", [["ablate", "study.yaml", "--out", "here"], ["resume", "here"]])
@pytest.mark.parametrize("output", [[], ["--json"]])
def test_a_command_loads_the_folder_of_a_study_once(command, output, capsys, folder, monkeypatch):
    create(read("study.yaml")[0], "here")
    loads, load = [], StudyFolder.load
    monkeypatch.setattr(StudyFolder, "load", lambda *a, **k: loads.append(1) or load(*a, **k))
    printed(capsys, *command, "--workers", "0", *output)
    assert len(loads) == 1


def test_an_edited_study_file_is_not_ignored_by_resume(capsys, folder):
    printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here", "--set", "axes={}")
    printed(capsys, "resume", "here", "--workers", "0")
    file = folder / "here/study.yaml"
    file.write_text("# a comment changes nothing\n" + file.read_text())
    printed(capsys, "resume", "here", "--workers", "0")
    file.write_text(file.read_text().replace("seeds: 1", "seeds: 2"))
    error = error_of(capsys, "resume", "here", "--workers", "0")
    command = "atn-norms ablate here/study.yaml --out here"
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if text.startswith("seeds"))
    place = f"here/study.yaml:{line}:1: seeds"
    assert error == f"atn-norms: {place}: got 2; expected 1, {CHANGED}. To extend the study: {command}\n"
    out = printed(capsys, *command.split()[1:], "--workers", "0")
    assert "training 1 of 2 trials" in out
    printed(capsys, "resume", "here", "--workers", "0")


def test_the_verdict_names_an_endpoint_that_the_table_does_not_show(capsys, folder):
    small = ["--workers", "0", "--set", "axes={norm: [none, layer]}", "--set", "train.eval_every=1"]
    out = printed(capsys, "ablate", "study.yaml", *small)
    assert "undecided at 1 of 1" in out and "(by the" not in out
    out = printed(capsys, "ablate", "study.yaml", *small, "--set", "endpoint={measure: tail, validations: 2}")
    assert " (by the mean of the last 2 validations of mean squared error)\n" in out


@pytest.mark.parametrize("name", ["mine", "quick", "./mine"])
def test_a_folder_in_the_place_of_a_study_file_is_named(name, capsys, folder):
    if name == "quick":  # a ready-made study, also next to a folder of this name
        Path("quick").mkdir()
        assert "'quick': 40 trials" in printed(capsys, "ablate", "quick", "--dry-run")
        return
    create(read("study.yaml")[0], "mine")
    error = error_of(capsys, "ablate", name)
    cure = f"To resume a study in it: atn-norms resume {name}"
    assert f"{name}: got a folder; expected a study file" in error and cure in error


def test_the_folder_of_a_report_is_no_study(capsys, folder):
    printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here", "--set", "axes={}")
    for command in ("status", "resume"):
        error = error_of(capsys, command, "here/report")
        assert "here/report: got the folder of a report; expected a study's folder" in error
    error = error_of(capsys, "export", "here")
    assert "MODEL: got here, a study's folder; expected the folder of one trial, such as here/trials/ID" in error


def test_a_study_needs_the_package_that_saves_models(capsys, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name))
    error = error_of(capsys, "ablate", "study.yaml", "--workers", "0")
    assert "safetensors" in error and "pip install 'atn-norms[ablation]'" in error


@pytest.mark.parametrize("more", [[], ["--set", "margin=1.5"]])
def test_an_edited_study_file_is_not_ignored_by_ablate(capsys, folder, more):
    original = ["ablate", "study.yaml", "--workers", "0", "--out", "here", "--set", "axes={}"]
    printed(capsys, *original)
    file = folder / "here/study.yaml"
    edited = file.read_text().replace("seeds: 1", "seeds: 2  # a note")
    file.write_text(edited)
    error = error_of(capsys, *original, *more)
    command = "atn-norms ablate here/study.yaml --out here"
    assert f"seeds: got 2; expected 1, {CHANGED}. To extend the study: {command}\n" in error
    assert file.read_text() == edited
    assert "training 3 of 4 trials" in printed(capsys, *command.split()[1:], "--workers", "0", "--set", "seeds=4")
    printed(capsys, *original, "--set", "seeds=[0, 1, 2, 3, 4]")
    file.write_text(file.read_text() + "margin: null\n")
    for command in ("resume here", "ablate study.yaml --out here --set axes={} --set seeds=5"):
        printed(capsys, *command.split(), "--workers", "0")


def test_a_message_names_the_current_folder_by_its_whole_path(capsys, folder, monkeypatch):
    printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here", "--set", "axes={}")
    monkeypatch.chdir(folder / "here")
    error = error_of(capsys, "ablate", "study.yaml", "--workers", "0", "--out", ".", "--set", "train.steps=9")
    assert f"train.steps: got 9; expected 4, as in {folder / 'here'}. " in error


@pytest.mark.parametrize(
    ("edit", "problem", "reused"),
    [
        (("steps: 2", "steps: 4"), "train.steps: got 4; expected 2, as in here", 0),
        (
            ("[none, layer]", "[none, rms]"),
            "axes.norm: got ['none', 'rms']; expected 'layer' among them, as in here",
            1,
        ),
        (("seeds: 1", "seeds: [1]"), "seeds: got [1]; expected seed 0 among them, as in here", 0),
    ],
)
@pytest.mark.parametrize("file", ["study.yaml", "here/study.yaml"])
def test_the_command_for_another_folder_trains_an_edited_study(file, edit, problem, reused, capsys, folder):
    """The edited file is the user's file, or its copy in the folder."""
    (folder / "study.yaml").write_text(STUDY.replace(", window: [1, 3]", "").replace("steps: 4", "steps: 2"))
    printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here")
    before = {path: path.read_bytes() for path in Path("here/trials").rglob("*") if path.is_file()}
    text = Path(file).read_text()
    assert edit[0] in text
    Path(file).write_text(text.replace(*edit))
    (folder / "here-2").mkdir()
    commands = [["ablate", file, "--workers", "0", "--out", "here"], *([["resume", "here"]] if "/" in file else [])]
    for command in commands:
        error = error_of(capsys, *command)
        assert re.match(rf"atn-norms: {file}:\d+:\d+: {re.escape(problem)}\. ", error)
        _, _, cure = error.partition(" To train this study in another folder: atn-norms ")
    out = printed(capsys, *cure.split(), *([] if "--workers" in cure else ["--workers", "0"]))
    assert "folder: here-3" in out and f"training {2 - reused} of 2 trials" in out
    assert {path: path.read_bytes() for path in Path("here/trials").rglob("*") if path.is_file()} == before


def test_an_edited_study_file_is_not_silently_ignored_by_report(capsys, folder):
    printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here", "--set", "axes={}")
    assert main(["report", "here"]) == 0
    assert capsys.readouterr().err == ""
    file = folder / "here/study.yaml"
    whole = file.read_text()
    for text, problem in ((whole.replace("seeds: 1", "seeds: 2"), CHANGED), ("a: [", "expected the node content")):
        file.write_text(text)
        assert main(["report", "here", "--out", "published", "--formats", "md"]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith("warning: here/study.yaml:") and problem in captured.err
        assert captured.err.endswith("The report is of the study as it was created.\n")
        assert "report: published/report.html" in captured.out
        assert main(["report", "published"]) == 0
        assert capsys.readouterr().err == "", "the published file is that of the study"


@pytest.mark.parametrize(
    "edit",
    [
        ("reach: 0.1", "reach: 0.2"),
        ("name: study", "name: other"),
        ("seeds: 1", "seeds: [0]"),
        ("every: 2", "every: 1"),
    ],
)
def test_the_suggested_command_applies_an_edited_file(edit, capsys, folder):
    """Also an edit that leaves every trial unchanged."""
    settings = ["--set", "axes={}", "--set", "reach=0.1", "--set", "train.checkpoint_every=2", "--set", "name=study"]
    printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here", *settings)
    file = folder / "here/study.yaml"
    assert edit[0] in file.read_text()
    file.write_text(file.read_text().replace(*edit))
    assert CHANGED in error_of(capsys, "resume", "here", "--workers", "0")
    printed(capsys, "ablate", "here/study.yaml", "--out", "here", "--workers", "0")
    assert edit[1] in file.read_text()
    printed(capsys, "resume", "here", "--workers", "0")


def test_a_preset_has_precedence_over_a_folder_of_its_name(capsys, folder):
    (folder / "quick").mkdir()
    small = ["--set", "train.steps=1", "--set", "seeds=1"]
    assert "study 'quick'" in printed(capsys, "ablate", "quick", "--dry-run", *small)


def test_debug_shows_the_traceback(capsys):
    assert main(["show", "nothing.yaml", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_list_shows_kinds_sources_and_options(capsys):
    out = printed(capsys, "list")
    for word in ("layer", "rms", "sliding", "half_life", "lstm", "adding", "charlm", "atn-norms"):
        assert word in out
    for option in ("length: integer >= 2 and <= 1000000 (default 100)", "path: string (required)", "(default none)"):
        assert option in out
    assert "Options of" not in out and "pooled root mean square over the features" in out
    assert "lstm" not in printed(capsys, "list", "windows")
    data = json.loads(printed(capsys, "list", "--json"))
    assert list(data) == ["normalizers", "windows", "cells", "tasks"]
    (layer,) = [entry for entry in data["normalizers"] if entry["kind"] == "layer"]
    assert layer["distribution"] == "atn-norms"
    assert layer["options"]["eps"]["default"] == 1e-5
    assert [entry["kind"] for entry in data["tasks"]] == sorted(entry["kind"] for entry in data["tasks"])
    (python,) = [entry for entry in data["tasks"] if entry["kind"] == "python"]
    assert python["distribution"] == "atn-norms" and python["plugin"] == data["tasks"][0]["plugin"]
    assert python["options"]["arguments"]["default"] == {} and "default" not in python["options"]["file"]


@pytest.mark.parametrize("task", ["pyton", "{kind: pyton, file: mine.py}"])
def test_the_task_of_a_function_is_suggested(task, capsys, folder):
    (folder / "study.yaml").write_text(
        STUDY.replace("{kind: adding, length: 6, train: 40, validation: 10, test: 10}", task)
    )
    error = error_of(capsys, "ablate", "study.yaml")
    assert "got unknown task 'pyton'; expected one of adding, " in error and "; did you mean 'python'?" in error


def test_the_task_of_a_function_needs_a_file(capsys, folder):
    (folder / "study.yaml").write_text("task: python\n")
    assert (
        error_of(capsys, "ablate", "study.yaml")
        == "atn-norms: study.yaml:1:1: task.file: got nothing; expected a value\n"
    )


def test_list_shows_the_presets(capsys):
    out = printed(capsys, "list", "studies")
    assert "A first study" in out and "\nlstm" not in out
    data = json.loads(printed(capsys, "list", "cells", "studies", "--json"))
    assert list(data) == ["cells", "studies"]
    assert [entry["name"] for entry in data["studies"]] == presets.names()


def test_plugins_are_reported(capsys):
    assert "built-in" in printed(capsys, "plugins")
    (built_in, *_) = json.loads(printed(capsys, "plugins", "--json"))
    assert (built_in["name"], built_in["status"]) == ("built-in", "loaded")


def test_show_prints_the_parts_of_a_model(capsys):
    out = printed(capsys, "show", "model.yaml")
    explanation = atn_norms.explain(atn_norms.build("model.yaml"))  # the backend depends on the machine
    for word in ("norm_ih_l0.weight", "sliding(steps=5)", "state of one sequence", explanation):
        assert word in out
    facts = json.loads(printed(capsys, "show", "model.yaml", "--json"))
    assert facts["parameter_count"] == sum(parameter["count"] for parameter in facts["parameters"])
    assert [site["site"] for site in facts["sites"]] == ["ih", "hh", "c"]
    # h and c of 3 numbers; at each of 3 sites the step index and 4 earlier weights, means and variances
    assert facts["state"]["numbers"] == 2 * 3 + 3 * (3 * 4 + 1)


def test_the_schemas_show_options_of_every_kind(capsys):
    for what in ("study", "model"):
        text = printed(capsys, "schema", what)
        assert json.loads(text)["$schema"].startswith("https://json-schema.org/")
        for word in ("hidden_size", "half_life", "nonlinearity"):
            assert f'"{word}"' in text
    assert '"embedding"' in printed(capsys, "schema")
    assert "wrote s.json" in printed(capsys, "schema", "--out", "s.json")
    assert json.loads(Path("s.json").read_text())


def test_init_writes_a_study_and_overwrites_only_with_force(capsys):
    printed(capsys, "init", "mine.yaml")
    first = Path("mine.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=mine.schema.json"
    assert "hidden_size" in Path("mine.schema.json").read_text()
    assert "40 trials" in printed(capsys, "ablate", "mine.yaml", "--dry-run")
    Path("mine.yaml").write_text("mine")
    assert "mine.yaml and mine.schema.json: got an existing file; expected a new name" in error_of(
        capsys, "init", "mine.yaml"
    )
    assert Path("mine.yaml").read_text() == "mine"
    printed(capsys, "init", "mine.yaml", "--force")
    assert Path("mine.yaml").read_text().startswith(first)


def test_doctor_finds_everything_and_reports_faults(capsys, monkeypatch):
    main(["doctor", "--json"])
    checks = json.loads(capsys.readouterr().out)
    found = {check["subject"]: check["status"] for check in checks["checks"]}
    assert found["backend reference"] == found["plugin built-in"] == found["torch"] == "ok"
    assert checks["healthy"] == ("failed" not in found.values())

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lacking = printed(capsys, "doctor", code=0 if checks["healthy"] else 1)
    assert "pip install 'atn-norms[ablation]'" in lacking

    monkeypatch.setattr("atn_norms.layers.LSTM", lambda *_, **__: 1 / 0)
    broken = printed(capsys, "doctor", code=1)
    assert "ZeroDivisionError: division by zero" in broken
    assert "some checks failed" in broken


def test_a_dry_run_lists_the_trials_and_writes_nothing(capsys, folder):
    before = sorted(folder.rglob("*"))
    out = printed(capsys, "ablate", "study.yaml", "--dry-run")
    assert "study 'study': 3 trials" in out
    assert "3 trials, 2 at a time: about " in out
    listed = json.loads(printed(capsys, "ablate", "study.yaml", "--dry-run", "--json", "--set", "seeds=2"))
    assert len(listed["trials"]) == 6
    assert listed["estimated_seconds"] > 0
    assert sorted(folder.rglob("*")) == before


def test_a_study_from_start_to_report(capsys, folder):
    out = printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here")
    assert "training 3 of 3 trials in this process" in out
    assert "estimated duration: about" in out
    assert "[3/3] done     adding norm=layer window=3 seed=0" in out
    assert f"report: {Path('here/report/report.html')}" in out
    assert (folder / "here/report/report.html").stat().st_size > 1000

    again = printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here")
    assert "every trial is already done" in again
    table = out[out.index("\ntask ") :]
    assert "mean squared error" in table
    assert again.endswith(table)

    state = json.loads(printed(capsys, "status", "here", "--json"))
    assert state["counts"]["done"] == 3
    assert {trial["step"] for trial in state["trials"]} == {4}
    assert "3 done" in printed(capsys, "status", "here")

    small = json.loads(printed(capsys, "report", "here", "--out", "small", "--formats", "", "--json"))["report"]
    assert {Path(path).suffix for path in small} == {".html", ".csv", ".yaml", ".json"}
    small = json.loads(printed(capsys, "report", "small", "--formats", "svg, md", "--json"))["report"]
    assert {Path(path).suffix for path in small} == {".html", ".csv", ".yaml", ".json", ".svg", ".md"}
    printed(capsys, "report", "here", "--out", "small", "--formats", "")  # replaces a published report
    assert main(["report", "here", "--formats", "pgn"]) == 2
    expected = "formats: got unknown format 'pgn'; expected one of svg, png, md, tex; did you mean 'png'?"
    assert expected in capsys.readouterr().err
    results = json.loads(printed(capsys, "report", "here", "--json"))
    assert len(results["results"]) == 3
    assert all(Path(path).exists() for path in results["report"])
    assert json.loads(printed(capsys, "resume", "here", "--workers", "0", "--json"))["results"] == results["results"]


def test_status_reports_why_a_trial_ended_early(capsys, folder):
    early = ["train.patience=1", "train.eval_every=1", "train.optimizer={kind: sgd, lr: 0.0}", "axes={}"]
    printed(capsys, "ablate", "study.yaml", "--workers=0", "--out=here", *(f"--set={each}" for each in early))
    assert "2 of 4  adding seed=0  no improvement in 1 validation" in printed(capsys, "status", "here")
    (trial,) = json.loads(printed(capsys, "status", "here", "--json"))["trials"]
    assert (trial["status"], trial["reason"]) == ("done", "no improvement in 1 validation")


def test_a_missing_extra_is_reported_before_training(capsys, folder, monkeypatch):
    real = importlib.util.find_spec
    for absent, command, cure in [
        ("matplotlib", ["report", "here"], "atn-norms[ablation]'"),
        ("matplotlib", ["ablate", "study.yaml", "--workers", "0"], "atn-norms[ablation]'"),
        ("distributed", ["resume", "here"], "or use --workers 0"),
    ]:
        monkeypatch.setattr("importlib.util.find_spec", lambda name, gone=absent: None if name == gone else real(name))
        error = error_of(capsys, *command)
        assert f"got no package {absent}; expected an installed package. Run pip install" in error
        assert cure in error
    assert not (folder / "studies").exists()


def test_a_report_replaces_no_other_files(capsys, folder):
    create(StudySpec.model_validate(read(folder / "study.yaml")[0]), "here")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    expected = "expected an empty folder, or a published report. Choose another folder."
    for out, name in ((".", "here"), ("here", ".lock"), (str(folder / "here" / "trials"), None)):
        error = error_of(capsys, "report", "here", "--out", out)
        name = name or next((folder / "here" / "trials").iterdir()).name
        assert f"{out}: got a folder with {name!r}; {expected}" in error
    (folder / "here" / "results.csv").write_text("")
    (folder / "here" / "study.json").write_text("")
    assert expected in error_of(capsys, "report", "here", "--out", "here")
    assert before.items() <= {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}.items()


def test_a_study_file_is_never_overwritten_by_its_own_study(capsys, folder):
    (folder / "model.yaml").unlink()
    error = error_of(capsys, "ablate", "study.yaml", "--out", ".")
    assert "got a folder with 'study.yaml'; expected an empty folder, or the folder of a study" in error
    assert [path.name for path in folder.iterdir()] == ["study.yaml"]
    assert (folder / "study.yaml").read_text() == STUDY


PLUGIN = '''
from typing import Literal
from atn_norms.normalizers import LayerNorm, NormSpec
from atn_norms.plugins import hookimpl

class Fragile(LayerNorm):
    def normalize(self, x, pooled):
        raise ZeroDivisionError("the fragile one")

class FragileSpec(NormSpec):
    """Breaks."""
    kind: Literal["fragile"] = "fragile"
    when: Literal["build", "run"] = "run"

    def build(self, features):
        if self.when == "build":
            raise KeyError("no build")
        return Fragile(features)

@hookimpl
def atn_norms_register(registry):
    registry.normalizer(FragileSpec)
'''


@pytest.mark.deep
def test_a_plugin_that_raises_gives_one_message_or_a_failed_trial(folder):
    site = folder / "site"
    (site / "fragile-1.0.dist-info").mkdir(parents=True)
    (site / "fragile-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    (site / "fragile-1.0.dist-info" / "entry_points.txt").write_text("[atn_norms]\nfragile = fragile_plugin\n")
    (site / "fragile_plugin.py").write_text(PLUGIN)
    (folder / "model.yaml").write_text(MODEL.replace("layer", "{kind: fragile, when: build}"))
    path = os.pathsep.join([str(site), str(ROOT)])

    shown = program("show", "model.yaml", PYTHONPATH=path)
    _, error = shown.communicate(timeout=PATIENCE)
    assert shown.returncode == 2, error
    (line,) = error.splitlines()
    assert line.startswith("atn-norms: ")
    assert "no build" in line

    run = program("ablate", "study.yaml", "--set", "axes.norm=[none, fragile]", "--workers", "0", PYTHONPATH=path)
    out, error = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1, error
    assert "failed   adding norm=fragile window=1 seed=0" in out
    assert "ZeroDivisionError: the fragile one" in out
    assert "done     adding norm=none" in out
    assert "2 trials failed; see atn-norms status" in error
    assert "Traceback" not in error

    listed = program("list", "normalizers", PYTHONPATH=path)
    assert "Breaks." in listed.communicate(timeout=PATIENCE)[0]
    blocked = program("show", "model.yaml", PYTHONPATH=path, ATN_NORMS_DISABLE_PLUGINS="fragile")
    assert "unknown normalizer 'fragile'" in blocked.communicate(timeout=PATIENCE)[1]


def test_an_interrupted_run_prints_the_resume_command_that_works(capsys, folder):
    slow = ["--set", "train.steps=100000", "--set", "train.checkpoint_every=50", "--set", "train.eval_every=100000"]
    run = program("ablate", "study.yaml", *slow, "--workers", "0", "--out", "here")
    try:
        assert until(lambda: list(folder.glob("here/trials/*/checkpoint.pt")) or run.poll() is not None)
        assert run.poll() is None, run.communicate()
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.3)  # signals that are pending together are merged
        os.killpg(run.pid, signal.SIGINT)  # a second Ctrl-C
        _, error = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    assert run.returncode == 130
    assert error.strip() == "stopped; finished work is kept. To resume: atn-norms resume here --workers 0"
    state = json.loads(printed(capsys, "status", "here", "--json"))
    assert state["counts"] == {"done": 0, "diverged": 0, "failed": 0, "running": 0, "pending": 3}


@pytest.mark.parametrize(
    ("command", "stopped", "resume_command"),
    [
        (["ablate", "study.yaml", "--out", "here"], "atn_norms.ablation.run", "resume here --workers 0"),
        (
            ["ablate", "study.yaml", "--out", "here"],
            "atn_norms.ablation.execution.estimate.costs",
            "resume here --workers 0",
        ),
        (["ablate", "study.yaml", "--out", "here"], "atn_norms.ablation.report.write", "resume here --workers 0"),
        (["resume", "here"], "atn_norms.ablation.run", "resume here --workers 0"),
        (["report", "here"], "atn_norms.ablation.report.write", "report here"),
    ],
)
def test_a_run_interrupted_at_any_time_prints_the_resume_command(command, stopped, resume_command, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    workers = [] if command[0] == "report" else ["--workers", "0"]
    if command[0] != "ablate":
        printed(capsys, "ablate", "study.yaml", "--workers", "0", "--out", "here")
    monkeypatch.setattr(stopped, interrupted)
    assert main([*command, *workers]) == 130
    message = capsys.readouterr().err.strip()
    assert message == f"stopped; finished work is kept. To resume: atn-norms {resume_command}"


def test_a_closed_pipe_is_no_error():
    listing = program("schema")
    assert listing.stdout is not None
    assert listing.stderr is not None
    listing.stdout.close()
    error = listing.stderr.read()
    assert listing.wait(PATIENCE) == 0
    assert error == ""


def test_a_study_outlives_the_reader_of_its_output(folder):
    study = program("ablate", "study.yaml", "--workers", "0", "--out", "here")
    assert study.stdout is not None
    assert study.stderr is not None
    study.stdout.close()
    error = study.stderr.read()
    assert study.wait(PATIENCE) == 0
    assert error.count("standard output was closed; the run continues") == 1
    assert load("here").counts()["done"] == 3
    assert Path("here/report/report.html").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["list", "normalizers"], ["--help"]])
def test_a_full_standard_output_is_one_error(arguments):
    command = [sys.executable, "-m", "atn_norms", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
    assert done.stderr == "atn-norms: stdout: got No space left on device; expected a writable stream\n"
    assert done.returncode == 2


ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_no_control_character_reaches_the_terminal(capsys, folder, monkeypatch):
    """Check options, keys, labels, names and paths, on a terminal and in a pipe."""
    evil = f"e{ESCAPE}"
    Path(f"{evil}.yaml").write_text(f'"{evil.encode("unicode_escape").decode()}": 1\n', encoding="utf-8")
    Path("evil.json").write_text(json.dumps({evil: 1}), encoding="utf-8")
    Path("d").mkdir()
    monkeypatch.setattr("atn_norms.commands.console.on_terminal", lambda: True)
    for arguments in (
        [evil],
        ["show", f"{evil}.yaml"],
        ["show", "evil.json"],
        ["show", "evil.json", "--debug"],
        ["list", evil],
        ["check", evil],
        ["check", "layer", "--set", f"{evil}=1"],
        ["ablate", evil],
        ["ablate", "study.yaml", "--set", f"{evil}=1"],
        ["ablate", "study.yaml", "--set", f"axes.norm=[{json.dumps(evil)}]"],
        ["status", evil],
        ["new-plugin", evil],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert "owned" in captured.err
        assert not set(captured.err + captured.out) & set(ESCAPE) - set("]0;owned[2J31m"), arguments
    assert main(["init", f"d/{evil}.yaml"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "encoding",
    ["ascii", pytest.param("latin-1", marks=pytest.mark.deep), pytest.param("cp1252", marks=pytest.mark.deep)],
)
def test_a_terminal_that_cannot_show_every_character_gets_replacements(encoding, folder):
    small = ["--workers", "0", "--set", "axes={norm: [none, layer]}", "--set", "name=\N{GREEK SMALL LETTER ALPHA} x"]
    run = program("ablate", "study.yaml", *small, "--out", "here", PYTHONIOENCODING=encoding)
    out, error = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, error
    assert "\\u03b1 x" in out and "report: here/report/report.html" in out
    run = program("status", "here", "--json", PYTHONIOENCODING=encoding)
    out, error = run.communicate(timeout=PATIENCE)
    assert json.loads(out)["name"] == "\N{GREEK SMALL LETTER ALPHA} x", error


def test_a_minus_sign_that_cannot_be_shown_is_a_hyphen():
    code = "from atn_norms.commands import output; output.tolerate_encodings(); print('\N{MINUS SIGN}1 \N{BULLET}')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == "-1 \\u2022\n"


@pytest.mark.deep
def test_a_missing_matplotlib_backend_is_not_used(folder):
    small = ["--workers", "0", "--set", "axes={norm: [none, layer]}"]
    for arguments, backend in (
        (["ablate", "study.yaml", *small, "--out", "here"], "module://no_such_backend"),
        (["report", "here"], "unknown"),
    ):
        run = program(*arguments, MPLBACKEND=backend)
        _, error = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, error


WITHOUT_DOCSTRINGS = """
from atn_norms.cli import main
for words in ("list", "list studies", "schema", "init new.yaml", "ablate study.yaml --dry-run"):
    assert False, "asserts and docstrings are kept"
    if main(words.split()):
        raise SystemExit(f"{words} failed")
print("all done")
"""


def test_docstrings_are_never_needed(folder):
    run = subprocess.run(
        [sys.executable, "-OO", "-c", WITHOUT_DOCSTRINGS],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0 and run.stdout.endswith("all done\n"), run.stderr


NOISY = """
import os, subprocess, sys
from typing import Literal
import atn_norms as an
print("printed while imported")
os.write(1, b"written while imported\\n")
subprocess.run(["echo", "from a child"])

class NoisySpec(an.NormSpec):
    kind: Literal["noisy"] = "noisy"

    def build(self, features):
        print("printed while built")
        return an.RMSNorm(features)

@an.hookimpl
def atn_norms_register(registry):
    registry.normalizer(NoisySpec)
"""


def installed(module: str, source: str, folder: Path) -> str:
    """Return a PYTHONPATH that contains a plugin."""
    site = folder / "site"
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{module}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[atn_norms]\n{module} = {module}\n")
    return os.pathsep.join([str(site), str(ROOT)])


@pytest.mark.deep
@pytest.mark.parametrize("workers", ["0", "1"])
def test_output_of_plugins_goes_to_standard_error(workers, folder):
    path = installed("noisy", NOISY, folder)
    axes = ["--set", "axes={norm: [noisy]}", "--workers", workers]
    for arguments in (["list", "--json"], ["ablate", "study.yaml", *axes, "--out", "here", "--json"]):
        run = program(*arguments, PYTHONPATH=path)
        out, error = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, error
        json.loads(out)
        assert {"printed while imported", "written while imported", "from a child"} <= set(error.splitlines())
    assert "printed while built" in error


COMPILED = r"atn-norms: stopped by exit\(%d\) in compiled code while plugin 'ends' of .* was loaded"
ENDS = {
    "os._exit(0)": r"atn-norms: stopped by a call of os\._exit\(0\) \(.*ends\.py:3, in <module>\)",
    "ctypes.CDLL(None)._exit(0)": COMPILED % 0,
    "ctypes.CDLL(None).exit(0)": COMPILED % 0,
    "ctypes.CDLL(None).exit(7)": COMPILED % 7,
}


@pytest.mark.parametrize("call", ENDS)
def test_a_plugin_that_ends_the_process_is_reported(call, folder):
    run = program("list", PYTHONPATH=installed("ends", f"\nimport ctypes, os\n{call}\n", folder))
    out, error = run.communicate(timeout=PATIENCE)
    assert run.returncode == (7 if "7" in call else 2) and out == ""
    assert re.search(ENDS[call] + ".*; the command did not finish$", error, re.MULTILINE), error


LATE = """
import ctypes
from typing import Literal
import atn_norms as an

class Norm(an.RMSNorm):
    def measure(self, x):
        ctypes.CDLL(None)._exit(0)

class NormSpec(an.NormSpec):
    kind: Literal["late"] = "late"
    def build(self, features):
        return Norm(features)

@an.hookimpl
def atn_norms_register(registry):
    registry.normalizer(NormSpec)
"""


def test_a_plugin_that_ends_the_process_while_it_trains_is_reported(folder):
    path = installed("late", LATE, folder)
    run = program("ablate", "study.yaml", "--set", "axes={norm: [late]}", "--workers", "0", PYTHONPATH=path)
    _, error = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2
    assert error.endswith("atn-norms: stopped by exit(0) in compiled code; the command did not finish\n"), error


def test_a_command_that_is_killed_ends_the_program_by_the_same_signal(folder):
    path = installed("killed", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", folder)
    run = program("list", PYTHONPATH=path)
    run.communicate(timeout=PATIENCE)
    assert run.returncode == -signal.SIGSEGV


def test_a_command_ends_with_its_program(folder):
    path = installed("sleeps", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n", folder)
    with program("list", PYTHONPATH=path) as run:
        assert run.stderr is not None
        command = int(run.stderr.readline())
        run.kill()
    assert command != run.pid
    assert until(lambda: not Path(f"/proc/{command}").exists() or "State:\tZ" in status_of(command))


def status_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except OSError:
        return "State:\tZ"


def test_resume_with_a_setting_names_the_ablate_command(capsys):
    error = error_of(capsys, "resume", "a folder", "--set", "seeds=3", "--set", "train.steps=[1, 2]")
    command = "atn-norms ablate 'a folder/study.yaml' --out 'a folder' --set seeds=3 --set 'train.steps=[1, 2]'"
    assert error.endswith(f"To extend the study: {command}\n")


@pytest.mark.parametrize(("file", "name"), [("My first-study.yaml", "My first-study"), ("%.yaml", "study")])
def test_a_study_is_named_after_its_file(file, name, capsys):
    Path("study.yaml").rename(file)
    small = ["--set", "axes={}"]
    assert f"study {name!r}: 1 trials" in printed(capsys, "ablate", file, "--dry-run", *small)
    assert "study 'other': 1 trials" in printed(capsys, "ablate", file, "--dry-run", *small, "--set", "name=other")


def test_check_names_required_options_and_accepts_expected_failures(capsys):
    assert "steps: got nothing; expected an integer >= 1 and <= 1000000. Set it with --set steps=VALUE" in error_of(
        capsys, "check", "sliding"
    )
    law = "options_survive_a_dump"
    assert "--expect-failure: got 'x'; expected LAW=REASON" in error_of(capsys, "check", "rms", "--expect-failure", "x")
    assert "unknown law 'x'" in error_of(capsys, "check", "rms", "--expect-failure", "x=because")
    out = printed(capsys, "check", "adding", "--expect-failure", f"{law}=to see", code=1)
    assert re.search(rf"{law} +failed +expected to fail \(to see\)", out)


@pytest.mark.parametrize("error", [TimeoutError(), KeyError(), OSError(), ValueError()])
def test_an_error_without_text_is_named_with_its_place(error):
    with pytest.raises(type(error)) as caught:
        raise error
    place = rf"\(.*test_cli\.py:\d+, in {test_an_error_without_text_is_named_with_its_place.__name__}\)"
    assert re.fullmatch(rf"{type(error).__name__} {place}; --debug shows the traceback", _sentence(caught.value))
