"""Extend a study by seeds, axes or another baseline; finished trials are reused, also those of other studies."""

import json

import pytest

from atn_norms.ablation import Busy, StoreError, StudySpec, create, load, make_plan, report, run
from atn_norms.ablation.store.files import Folder
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.cli import main
from atn_norms.errors import SpecError

STUDY = {
    "name": "growing",
    "model": {"cell": "rnn", "hidden_size": 3},
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 3, "batch_size": 5},
    "axes": {"norm": ["none", "layer"]},
    "seeds": 1,
}
GROWN = {
    "more seeds": {"seeds": 3},
    "another value on an axis": {"axes": {"norm": ["none", "rms", "layer"]}},
    "another axis": {"axes": {"norm": ["none", "layer"], "window": [1, 2]}},
    "an axis that was fixed": {"axes": {"norm": ["none", "layer"], "cell": ["gru", "rnn"]}},
    "another task": {"task": None, "tasks": [STUDY["task"], {**STUDY["task"], "length": 5}]},
    "another baseline": {"baseline": {"norm": "layer"}},
}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("result.json")}


@pytest.mark.parametrize("how", GROWN)
def test_finished_trials_are_reused(tmp_path, how):
    folder = create(STUDY, tmp_path / "study")
    run(folder, workers=0)
    done, created = files(folder), (folder / "environment.json").read_bytes()
    assert create({**STUDY, **GROWN[how]}, folder) == folder
    record = load(folder)
    wanted = make_plan(StudySpec.model_validate({**STUDY, **GROWN[how]}))
    assert [trial.id for trial in record.trials] == [trial.id for trial in wanted.trials]
    assert record.count("done") == 2 and record.count("pending") == len(wanted.trials) - 2
    assert record.baseline == wanted.baseline and (folder / "environment.json").read_bytes() == created
    attempts = {trial.id: trial.run["attempts"] for trial in run(folder, workers=0).trials if trial.run}
    assert set(attempts.values()) == {1} and len(attempts) == len(wanted.trials)
    assert files(folder).items() >= done.items()


def test_a_study_that_lacks_a_trial_does_not_replace_another(tmp_path):
    folder = create({**STUDY, "seeds": 2}, tmp_path / "study")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for smaller, lacking in [({}, 2), ({"seeds": [1, 2, 3]}, 2), ({"train": {"steps": 4, "batch_size": 5}}, 4)]:
        message = f"got study .* with {lacking} trials that this study lacks; .*Choose another folder"
        if smaller == {}:
            message = f"got a study with all 2 trials of this study and 2 more; .*: atn-norms resume {folder}"
        with pytest.raises(SpecError, match=message):
            create({**STUDY, **smaller}, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_killed_extension_leaves_the_previous_study(tmp_path, monkeypatch):
    folder = create(STUDY, tmp_path / "study")
    run(folder, workers=0)
    writes = []
    write_json = Folder.write_json

    def killed(folder, name, value):
        writes.append(name)
        if name == "study.resolved.json":
            raise KeyboardInterrupt
        write_json(folder, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            create({**STUDY, "seeds": 2}, folder)
    assert writes, "it had begun"
    assert len(load(folder).trials) == 2 and load(folder).count("done") == 2
    create({**STUDY, "seeds": 2}, folder)
    assert load(folder).count("done") == 2 and load(folder).count("pending") == 2


def test_an_extended_study_keeps_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, other = create(STUDY), create({**STUDY, "train": {"steps": 5, "batch_size": 5}})
    assert small != other and small.name.startswith("growing-")
    assert create({**STUDY, "seeds": 2}) == small
    assert create({**STUDY, "seeds": 2}) == small, "and finds itself there"
    assert create({**STUDY, "seeds": 3, "name": "elsewhere"}).name.startswith("elsewhere-")
    (tmp_path / "studies" / "growing-00000000").mkdir()
    (tmp_path / "studies" / "growing-11111111").mkdir()
    (tmp_path / "studies" / "growing-11111111" / "study.resolved.json").write_text(json.dumps({"key": 3}))
    assert create({**STUDY, "seeds": 3}) == small, "what is damaged is passed by"


WIDER = {**STUDY, "name": "wider", "axes": {"norm": ["none", "layer", "rms"]}, "seeds": 2}


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished study, its published report, and the records of both."""
    folder = create(STUDY, tmp_path / "finished")
    report.write(run(folder, workers=0), tmp_path / "published", formats=())
    return {"folder": load(folder), "report": report.read(tmp_path / "published")}


@pytest.mark.parametrize("source", ["folder", "report"])
def test_trials_that_another_study_finished_are_copied(tmp_path, finished, source):
    ours = {trial.id: trial for trial in finished["folder"].trials}
    folder = create(WIDER, tmp_path / "wider", reuse=[finished[source]])
    before = {trial.id: trial for trial in load(folder).trials}
    assert {identity for identity, trial in before.items() if trial.status == "done"} == set(ours)
    for trial in run(folder, workers=0).trials:
        log = (folder / "trials" / trial.id / "log.txt").read_text()
        assert trial.status == "done"
        assert ("copied from study 'growing'" in log) == (trial.id in ours) != ("attempt" in log)
        if trial.id in ours:
            same = ours[trial.id]
            assert trial.result == same.result and trial.curve == same.curve and trial.curve
            assert {"seconds", "host", "attempts"} <= set(trial.run or {}) <= set(same.run)
            model = folder / "trials" / trial.id / "model.safetensors"
            assert model.exists() == (source == "folder")
            assert source == "report" or model.read_bytes() == (same.folder / "model.safetensors").read_bytes()
    fresh = run(create(WIDER, tmp_path / "fresh"), workers=0)
    wider = {trial.id: trial.result for trial in load(folder).trials}
    assert wider == {trial.id: trial.result for trial in fresh.trials}, "training all of it gives the same"


def test_a_copy_replaces_a_half_trained_trial_and_no_finished_one(tmp_path, finished):
    folder = create(WIDER, tmp_path / "wider")
    half, done = (folder / "trials" / trial.id for trial in finished["folder"].trials)
    (half / "metrics.jsonl").write_text('{"step":1,"train_loss":9.0,"validation":null}\n')
    (half / "checkpoint.pt").write_bytes(b"of an interrupted run")
    run(folder, workers=0)
    content = {path: path.read_bytes() for path in done.iterdir()}
    (half / "result.json").unlink()
    create(WIDER, folder, reuse=[finished["report"], finished["folder"]])
    assert {path: path.read_bytes() for path in done.iterdir()} == content
    assert load(folder).count("done") == len(load(folder).trials)
    assert (half / "metrics.jsonl").read_bytes() == (finished["folder"].trials[0].folder / "metrics.jsonl").read_bytes()
    assert not (half / "checkpoint.pt").exists()


def unordered(published):
    path = published / "curves.csv"
    path.write_text(path.read_text().replace(",3,", ",1,"))


def unscored(published):
    path = published / "results.csv"
    header, first, *rest = path.read_text().splitlines()
    fields = first.split(",")
    fields[header.split(",").index("test")] = ""
    path.write_text("\n".join([header, ",".join(fields), *rest, ""]))


DAMAGED = [
    (unordered, r"point \d: damaged: step: expected .* above \d"),
    (unscored, "damaged: metrics.test: got nothing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_damaged_report_gives_no_result(tmp_path, finished, damage, message):
    damage(tmp_path / "published")
    with pytest.raises(StoreError, match=rf"study 'growing': trial \w{{16}}: {message}"):
        create(WIDER, tmp_path / "wider", reuse=[report.read(tmp_path / "published")])
    assert load(tmp_path / "wider").count("done") < 2
    assert run(tmp_path / "wider", workers=0).count("done") == 6


def test_a_trial_that_is_being_trained_is_not_replaced(tmp_path, finished):
    folder = create(WIDER, tmp_path / "wider")
    trial = StudyFolder(folder).trial(finished["folder"].trials[0].id)
    with trial.lock(), pytest.raises(Busy, match="is being trained by another process"):
        create(WIDER, folder, reuse=[finished["folder"]])
    assert load(folder).count("done") == 0


def test_the_files_of_a_function_are_not_lost_by_a_copy(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def train(norm, seed, trial):\n"
        "    if norm == 'layer':\n        (trial.folder / 'table.csv').write_text('1')\n"
        "    return {'accuracy': 0.5}\n"
    )
    task = {"kind": "python", "file": str(tmp_path / "mine.py"), "goal": "max"}
    study = {"task": task, "axes": {"norm": ["none", "layer"]}, "seeds": 1}
    other = run(create(study, tmp_path / "a"), workers=0)
    folder = create({**study, "seeds": 2}, tmp_path / "b", reuse=[other])
    assert [trial.points[0]["norm"] for trial in load(folder).trials if trial.status == "done"] == ["none"]


def test_the_command_copies_and_a_dry_run_lists_the_others(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wider.yaml").write_text(json.dumps(WIDER))
    command = ["ablate", "wider.yaml", "--workers", "0", "--out", "wider"]
    assert main((*command, "--reuse", "finished", "--reuse", "published", "--dry-run", "--json")) == 0
    left = json.loads(capsys.readouterr().out)["trials"]
    assert len(left) == 4 and not {each["id"] for each in left} & {trial.id for trial in finished["folder"].trials}
    assert main((*command, "--reuse", "published")) == 0
    assert "training 4 of 6 trials" in capsys.readouterr().out
    assert main((*command, "--reuse", "wider", "--dry-run")) == 0
    assert "0 trials" in capsys.readouterr().out
    assert main((*command, "--reuse", "publishd")) == 2
    assert "publishd: no such folder" in capsys.readouterr().err
