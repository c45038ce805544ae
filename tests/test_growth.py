"""Extend a study by seeds, axes or another baseline; finished trials are reused, also those of other studies."""

import json

import pytest

from atn_norms.ablation import Busy, StoreError, StudySpec, create, load, make_plan, run
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
    gru = {"seeds": 2, "model": {"hidden_size": 3}, "axes": {"cell": ["gru"]}}
    longer = {"seeds": 2, "task": None, "tasks": [{**STUDY["task"], "length": 5}]}
    for smaller, problem in [
        ({}, "seeds: got [0]; expected seed 1 among them"),
        ({"seeds": [1, 2, 3]}, "seeds: got [1, 2, 3]; expected seed 0 among them"),
        ({"seeds": 2, "train": {"steps": 4, "batch_size": 5}}, "train.steps: got 4; expected 3"),
        ({"seeds": 3, "axes": {"norm": ["none", "rms"]}}, "axes.norm: got ['none', 'rms']; expected 'layer' among"),
        (gru, "model.cell: got nothing; expected 'rnn'"),
        (longer, "tasks: got [{'kind': 'adding', 'length': 5"),
        ({"seeds": 2, "axes": {**STUDY["axes"], "window": [2, 3]}}, "axes.window: got [2, 3]; expected no such axis"),
    ]:
        with pytest.raises(SpecError) as error:
            create({**STUDY, **smaller}, folder)
        first = str(error.value).splitlines()[0]
        assert first.startswith(problem) and f", as in {folder}" in first
        cure = f"Choose another folder, such as {folder}-2."
        if smaller == {}:
            cure = f"To resume the study in it: atn-norms resume {folder}. {cure}"
        assert error.value.problems[-1].detail == cure
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_killed_extension_leaves_the_previous_study(tmp_path, monkeypatch):
    folder = create(STUDY, tmp_path / "study")
    run(folder, workers=0)
    writes = []
    write_json = Folder.write_json

    def killed(folder, name, *given, **options):
        writes.append(name)
        if name == "study.resolved.json":
            raise KeyboardInterrupt
        write_json(folder, name, *given, **options)

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
    """The folder of a finished study of two trials."""
    folder = create(STUDY, tmp_path / "finished")
    run(folder, workers=0)
    return folder


def content(folder, *names):
    return {path.relative_to(folder): path.read_bytes() for name in names for path in folder.rglob(name)}


def test_trials_that_another_study_finished_are_copied(tmp_path, finished):
    ours = {trial.id: trial for trial in load(finished).trials}
    folder = create(WIDER, tmp_path / "wider", reuse=[finished])
    copied = content(finished, "result.json", "metrics.jsonl", "model.safetensors", "run.json")
    assert content(folder, "result.json", "metrics.jsonl", "model.safetensors", "run.json") == copied
    assert len(copied) == 4 * len(ours)
    for trial in run(folder, workers=0).trials:
        log = (folder / "trials" / trial.id / "log.txt").read_text()
        assert trial.status == "done"
        assert (f"copied from {finished}" in log) == (trial.id in ours) != ("attempt" in log)
    fresh = create(WIDER, tmp_path / "fresh")
    run(fresh, workers=0)
    same = content(folder, "result.json", "metrics.jsonl", "model.safetensors")
    assert same == content(fresh, "result.json", "metrics.jsonl", "model.safetensors"), "training all gives the same"


def test_a_copy_replaces_a_half_trained_trial_and_no_finished_one(tmp_path, finished):
    folder = create(WIDER, tmp_path / "wider")
    half, done = (folder / "trials" / trial.id for trial in load(finished).trials)
    run(folder, workers=0)
    before = content(done, "*")
    (half / "result.json").unlink()
    (half / "metrics.jsonl").write_text('{"step":1,"train_loss":9.0,"validation":null}\n')
    (half / "checkpoint.pt").write_bytes(b"of an interrupted run")
    create(WIDER, folder, reuse=[finished, finished])
    assert content(done, "*") == before
    assert load(folder).count("done") == 6
    assert content(half, "metrics.jsonl") == content(finished / "trials" / half.name, "metrics.jsonl")
    assert not (half / "checkpoint.pt").exists()


def test_a_process_that_lost_its_trial_does_not_change_the_copy(tmp_path, finished):
    folder = create(WIDER, tmp_path / "wider")
    trial = load(finished).trials[0].id
    with (folder / "trials" / trial / "metrics.jsonl").open("a") as curve:
        create(WIDER, folder, reuse=[finished])
        curve.write('{"step":1,"train_loss":9.0,"validation":null}\n')
    assert load(folder).count("done") == 2


@pytest.mark.parametrize("file", ["metrics.jsonl", "result.json"])
def test_a_damaged_trial_is_an_error_before_anything_is_created(tmp_path, finished, file):
    damaged = sorted(finished.rglob(file))[0]
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2").replace(b"finished", b"ended"))
    with pytest.raises(StoreError, match=f"^{damaged}: "):
        create(WIDER, tmp_path / "wider", reuse=[finished])
    assert not (tmp_path / "wider").exists()


def test_two_results_of_a_trial_are_an_error(tmp_path, finished):
    other = create({**STUDY, "name": "other"}, tmp_path / "other")
    run(other, workers=0)
    changed = sorted(other.rglob("result.json"))[0]
    result = json.loads(changed.read_text())
    result["metrics"]["test"]["mean squared error"] += 1.0
    changed.write_text(json.dumps(result))
    with pytest.raises(
        StoreError, match=f"two results of trial {changed.parent.name}, seed 0: {finished} has .*{other} has"
    ):
        create(WIDER, tmp_path / "wider", reuse=[finished, other])


@pytest.mark.parametrize(
    ("theirs", "ours", "copied", "models"),
    [
        ("last", "last", 2, 2),
        ("best", "last", 0, 0),
        ("none", "last", 0, 0),
        ("last", "none", 2, 0),
        ("none", "none", 2, 0),
    ],
)
def test_a_copied_model_is_the_one_that_training_would_save(tmp_path, theirs, ours, copied, models):
    def keeping(which):
        return {**STUDY, "train": {**STUDY["train"], "keep_model": which}}

    source = create(keeping(theirs), tmp_path / "source")
    run(source, workers=0)
    folder = create(keeping(ours), tmp_path / "target")
    for trial in load(folder).trials:
        (folder / "trials" / trial.id / "model.safetensors").write_bytes(b"of an interrupted attempt")
    create(keeping(ours), folder, reuse=[source])
    assert load(folder).count("done") == copied
    done = [folder / "trials" / trial.id for trial in load(folder).trials if trial.status == "done"]
    assert sum((path / "model.safetensors").exists() for path in done) == models
    run(folder, workers=0)
    fresh = create(keeping(ours), tmp_path / "fresh")
    run(fresh, workers=0)
    assert content(folder, "model.safetensors") == content(fresh, "model.safetensors") or ours == "none"


def test_a_diverged_trial_is_copied_and_needs_no_model(tmp_path):
    train = {**STUDY["train"], "optimizer": {"kind": "sgd", "lr": 1e30}}
    source = create({**STUDY, "train": train}, tmp_path / "source")
    assert run(source, workers=0).count("diverged") == 2
    assert (
        load(create({**STUDY, "train": train, "seeds": 2}, tmp_path / "target", reuse=[source])).count("diverged") == 2
    )


def test_a_damaged_model_is_not_copied(tmp_path):
    source = create(STUDY, tmp_path / "source")
    run(source, workers=0)
    for path in source.glob("trials/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StoreError, match=r"source/trials/\w+/model\.safetensors: got a damaged"):
        create(WIDER, tmp_path / "target", reuse=[source])


@pytest.mark.parametrize("saved", ["none", "last"])
def test_finished_trials_keep_the_model_that_the_study_selects(saved, tmp_path):
    def keeping(which):
        return {**STUDY, "train": {**STUDY["train"], "keep_model": which}}

    folder = create(keeping(saved), tmp_path / "study")
    run(folder, workers=0)
    before = (folder / "study.yaml").read_bytes()
    message = rf"study: got train\.keep_model best, and finished trials that saved {saved}; expected keep_model {saved}"
    with pytest.raises(SpecError, match=message):
        create({**keeping("best"), "seeds": 2}, folder)
    assert (folder / "study.yaml").read_bytes() == before
    create({**keeping("none"), "seeds": 2}, folder)
    assert run(folder, workers=0).count("done") == 4


def test_a_trial_that_is_being_trained_is_not_replaced(tmp_path, finished):
    folder = create(WIDER, tmp_path / "wider")
    trial = StudyFolder(folder).trial(load(finished).trials[0].id)
    with trial.lock(), pytest.raises(Busy, match="is being trained by another process"):
        create(WIDER, folder, reuse=[finished])
    assert load(folder).count("done") == 0


def test_a_trial_of_a_function_that_wrote_files_is_trained(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def train(norm, seed, trial):\n"
        "    if norm == 'layer':\n        (trial.folder / 'table.csv').write_text('1')\n"
        "    return {'accuracy': 0.5}\n"
    )
    task = {"kind": "python", "file": str(tmp_path / "mine.py"), "goal": "max"}
    study = {"task": task, "axes": {"norm": ["none", "layer"]}, "seeds": 1}
    other = create(study, tmp_path / "a")
    run(other, workers=0)
    folder = create({**study, "seeds": 2}, tmp_path / "b", reuse=[other])
    assert [trial.points[0]["norm"] for trial in load(folder).trials if trial.status == "done"] == ["none"]


def test_the_command_copies_and_a_dry_run_lists_the_others(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wider.yaml").write_text(json.dumps(WIDER))
    command = ["ablate", "wider.yaml", "--workers", "0", "--out", "wider", "--reuse", "finished"]
    assert main((*command, "--dry-run", "--json")) == 0
    left = json.loads(capsys.readouterr().out)["trials"]
    assert len(left) == 4 and not {each["id"] for each in left} & {trial.id for trial in load(finished).trials}
    assert main(command) == 0
    assert "training 4 of 6 trials" in capsys.readouterr().out
    assert main((*command, "--reuse", "wider", "--dry-run")) == 0
    assert "0 trials" in capsys.readouterr().out
    assert main((*command, "--reuse", "wider/report")) == 2
    assert "wider/report: got the folder of a report; expected a study's folder" in capsys.readouterr().err
    with pytest.raises(SpecError, match="reuse: got 'finished'; expected a list of folders"):
        create(WIDER, "elsewhere", reuse="finished")
