"""Presets: they have the settings of the paper, run by name, and are written out unchanged."""

import json
from importlib import resources
from math import prod
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from atn_norms.ablation import StudySpec, make_plan
from atn_norms.ablation.grid import presets
from atn_norms.cli import main
from atn_norms.errors import SpecError

PAPER = {  # task, length, hidden_size, batch_size, steps, optimizer, k
    "paper-adding": ("adding", 100, 60, 50, 20_000, {"kind": "rmsprop", "lr": 1e-3, "momentum": 0.0}, 25),
    "paper-copying": ("copying", 100, 68, 128, 4000, {"kind": "rmsprop", "lr": 2e-4, "momentum": 0.9}, 45),
    "paper-denoise": ("denoise", 100, 68, 128, 4000, {"kind": "rmsprop", "lr": 2e-4, "momentum": 0.9}, 45),
    "paper-denoise-200": ("denoise", 200, 68, 128, 4000, {"kind": "rmsprop", "lr": 2e-4, "momentum": 0.9}, 45),
    "charlm": ("charlm", None, 200, 32, 1000, {"kind": "adam", "lr": 1e-2}, 20),
}


def planned(name):
    return make_plan(StudySpec.model_validate(YAML(typ="safe").load(presets.text(name))))


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_a_valid_study_of_its_name(name):
    plan = planned(name)
    assert plan.name == name
    if name != "plain-lstm":
        assert list(plan.axes) == ["norm", "window"] and plan.baseline == {"window": "1"}
        assert {trial.trial["model"]["init"] for trial in plan.trials} == {"paper"}
    if name != "quick":
        assert plan.study["endpoint"] == "final" and plan.study["margin"] > 0, "the endpoint is declared in advance"
    assert all(trial.trial["train"]["eval_every"] * 8 <= trial.trial["train"]["steps"] for trial in plan.trials)


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_study_has_the_setting_of_the_paper(name):
    kind, length, hidden, batch, steps, optimizer, k = PAPER[name]
    plan = planned(name)
    assert plan.axes == {"norm": ["none", "layer", "rms", "batch"], "window": ["1", str(k)]}
    assert plan.baseline == {"window": "1"} and len(plan.trials) == 7 * 5, "without a norm both windows are one trial"
    for trial in (each.trial for each in plan.trials):
        assert (trial["task"]["kind"], trial["task"].get("length")) == (kind, length)
        assert trial["model"]["hidden_size"] == hidden and trial["model"]["cell"]["kind"] == "lstm"
        assert (trial["train"]["batch_size"], trial["train"]["steps"]) == (batch, steps)
        assert trial["train"]["optimizer"].items() >= optimizer.items()


def test_paper_charlm_matches_the_authors_code():
    trials = [each.trial for each in planned("paper-charlm").trials]
    options = {"carry": "none", "segment": 220, "segment_deviation": 5.0, "segment_halved": 0.05, "embedding_init": 0.1}
    for trial in trials:
        assert trial["task"].items() >= {**options, "evaluation_streams": 10, "embedding": 200}.items()
        assert trial["train"].items() >= {"batch_size": 32, "clip_grad_norm": 3.0, "steps": 109_000}.items()
        assert trial["train"]["optimizer"].items() >= {"kind": "adam", "lr": 1e-2}.items()


def test_the_plain_lstm_has_every_initialization():
    starts = {(t.trial["model"]["init"], t.trial["model"]["forget_bias"]) for t in planned("plain-lstm").trials}
    assert starts == {("torch", None), ("torch", 1.0), ("paper", None), ("paper", 1.0)}


STUDIES = sorted((Path(__file__).parent.parent / "docs" / "results" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_study_of_the_results_declares_its_endpoint_before_it_runs(file, tmp_path):
    options = YAML(typ="safe").load(file)
    if "text" in options["task"]:
        options["task"]["text"] = str(tmp_path / "text.txt")
        (tmp_path / "text.txt").write_text("a text of its kind\n" * 500, encoding="utf-8")
    plan = make_plan(StudySpec.model_validate(options))
    assert plan.name == file.stem
    assert options["endpoint"] in ("final", {"measure": "tail", "validations": 25}) and plan.study["margin"] > 0
    assert len(options["baseline"]) and len({trial.trial["seed"] for trial in plan.trials}) >= 5
    axes = options["axes"].values()
    assert all(trial.trial["train"]["eval_every"] * 8 <= trial.trial["train"]["steps"] for trial in plan.trials)
    seeds = options["seeds"] if isinstance(options["seeds"], int) else len(options["seeds"])
    assert len(plan.trials) <= seeds * prod(map(len, axes))


def test_every_file_of_the_folder_is_a_study():
    files = resources.files("atn_norms.ablation.grid") / "studies"
    assert {file.name for file in files.iterdir() if not file.name.startswith("_")} == {
        f"{name}.yaml" for name in presets.names()
    }
    assert set(PAPER) | {"quick", "paper-charlm", "plain-lstm"} == set(presets.names())


def test_an_unknown_study_is_named_with_the_presets():
    with pytest.raises(SpecError, match=r"got unknown study 'paper-coping'; .* one of charlm, .*'paper-copying'"):
        presets.text("paper-coping")


def test_a_preset_runs_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["train.steps=2", "train.eval_every=1", "axes={norm: [none]}", "baseline={norm: none}", "seeds=1"]
    small = ["task.validation=2", "task.test=2", "train.batch_size=2", "model.hidden_size=3"]
    options = [word for setting in settings + small for word in ("--set", setting)]
    assert main(["ablate", "paper-copying", *options, "--workers", "0", "--out", "here", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["task"] == "copying"
    assert main(["ablate", "paper-coping"]) == 2
    assert "did you mean 'paper-copying'?" in capsys.readouterr().err


def test_a_preset_is_written_out_to_be_edited(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "paper-adding"]) == 0
    written = (tmp_path / "paper-adding.yaml").read_text()
    assert written.endswith(presets.text("paper-adding")) and written.startswith(
        "# yaml-language-server: $schema=paper-"
    )
    assert main(["init", "charlm", "mine.yaml"]) == 0
    assert (tmp_path / "mine.yaml").read_text().endswith(presets.text("charlm"))
    assert main(["init", "other.yaml"]) == 0
    assert (tmp_path / "other.yaml").read_text().endswith(presets.text("quick"))
    assert main(["init", "charlm", "other.yaml"]) == 2 and "got an existing file" in capsys.readouterr().err
    assert main(["init", "charml"]) == 2
    assert "got unknown study 'charml'" in capsys.readouterr().err
