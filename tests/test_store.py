"""The store: atomic files, locks that end with their holder, and errors that name damaged files."""

import errno
import json
import multiprocessing
import os
import re
import shutil

import pytest
import torch

from atn_norms.ablation import create, load, run, status
from atn_norms.ablation.grid.plan import make_plan
from atn_norms.ablation.grid.study import StudySpec
from atn_norms.ablation.store import files
from atn_norms.ablation.store.files import Busy, Folder, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.errors import SpecError
from tests.waiting import until

STUDY = {
    "model": {"cell": "lstm", "hidden_size": 3},
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 4, "batch_size": 5},
    "axes": {"norm": ["none", "layer"]},
    "seeds": 1,
}
LINE = {"step": 1, "train_loss": 0.5, "validation": None}


@pytest.fixture
def study(tmp_path):
    return create(STUDY, tmp_path / "study")


@pytest.fixture
def trial(study):
    return StudyFolder(study).trial(load(study).trials[0].id)


def test_a_folder_holds_the_study_and_its_trials(study):
    assert {path.name for path in study.iterdir()} == {
        "study.yaml", "study.resolved.json", "environment.json", "trials", ".lock"
    }  # fmt: skip
    record = load(study)
    assert record.axes == {"norm": ["none", "layer"]} and record.baseline == {"norm": "none"}
    assert record.tasks["adding"].metric == "mean squared error"
    assert [trial.points for trial in record.trials] == [
        ({"task": "adding", "norm": "none"},),
        ({"task": "adding", "norm": "layer"},),
    ]
    assert {"versions", "python", "platform", "cores"} <= set(record.environment)
    assert status(study) == {"done": 0, "diverged": 0, "failed": 0, "running": 0, "pending": 2}


def test_the_written_study_file_reads_as_the_same_study(study):
    from ruamel.yaml import YAML

    again = StudySpec.model_validate(YAML(typ="safe").load((study / "study.yaml").read_text()))
    assert make_plan(again).key == make_plan(StudySpec.model_validate(STUDY)).key


def test_the_same_study_reopens_its_folder_and_another_is_rejected(study):
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    assert create(STUDY, study) == study
    steps = STUDY["train"]["steps"]
    with pytest.raises(
        SpecError,
        match=rf"^train\.steps: got 7; expected {steps}, as in {study}\. Choose another folder, such as {study}-2\.$",
    ):
        create({**STUDY, "train": {**STUDY["train"], "steps": 7}}, study)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_a_foreign_folder_is_rejected_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        SpecError, match=r"got a folder with 'thesis.tex'; expected an empty folder, or the folder of a study"
    ):
        create(STUDY, tmp_path)
    assert not (tmp_path / "trials").exists() and not (tmp_path / "study.resolved.json").exists()
    with pytest.raises(SpecError, match="got a file; expected a folder"):
        create(STUDY, tmp_path / "thesis.tex")


class Killed(BaseException):
    pass


def test_a_start_killed_at_any_write_starts_again(tmp_path, monkeypatch):
    writes = _writes_until_done(monkeypatch, lambda: create(STUDY, tmp_path / "counted"))
    assert writes >= 5
    for fatal in range(writes):
        folder = tmp_path / f"killed{fatal}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            _kill_at(patch, fatal)
            create(STUDY, folder)
        create(STUDY, folder)
        assert [trial.status for trial in load(folder).trials] == ["pending", "pending"]


def _writes_until_done(monkeypatch, action):
    with monkeypatch.context() as patch:
        count = _kill_at(patch, -1)
        action()
    return count[0]


def _kill_at(patch, fatal):
    replace, count = os.replace, [0]

    def replace_or_die(source, target, **folders):
        if count[0] == fatal:
            raise Killed
        count[0] += 1
        replace(source, target, **folders)

    patch.setattr(files.os, "replace", replace_or_die)
    return count


def test_a_write_is_atomic(tmp_path, monkeypatch):
    folder, path = Folder(tmp_path), tmp_path / "result.json"
    folder.write_json(path.name, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match=re.escape(f"cannot write {path}: No space left on device")):
        folder.write_json(path.name, {"new": 2})
    assert folder.read_json(path.name) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


def test_a_write_is_made_durable_before_and_after_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda d: (order.append(os.path.isdir(f"/proc/self/fd/{d}")), fsync(d)))
    monkeypatch.setattr(files.os, "replace", lambda a, b, **c: (order.append("rename"), replace(a, b, **c)))
    Folder(tmp_path).write("file", b"content")
    assert order == [False, "rename", True], "file, rename, folder"


def test_every_byte_is_written_where_the_system_takes_a_few_at_a_time(trial, monkeypatch):
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", lambda descriptor, content: write(descriptor, content[:3]))
        trial.measure(LINE)
    assert trial.curve() == [LINE]


def test_a_file_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(StoreError, match="result.json: got a folder; expected a regular file"):
        Folder(tmp_path).read_json("result.json")
    with pytest.raises(StoreError, match="cannot write .*result.json: Is a directory"):
        Folder(tmp_path).write_json("result.json", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        create(STUDY, tmp_path / "study")


def test_a_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create the folder .*file/study: Not a directory"):
        create(STUDY, tmp_path / "file" / "study")


NAMES = ["result.json", "trial.json", "study.resolved.json", "error.json"]
CONTENTS = [b"", b'{"trial": "x"', b"\xff\xfe\x00", b"[1]"]


@pytest.mark.parametrize(
    ("name", "content"),
    [*((name, each) for name in NAMES for each in CONTENTS), *((name, b"{}") for name in NAMES[:3])],
)
def test_damaged_json_is_named(study, trial, name, content):
    path = study / name if name.startswith("study") else trial.path / name
    path.write_bytes(content)
    with pytest.raises(StoreError, match=re.escape(str(path))):
        load(study)


@pytest.mark.parametrize("content", [*CONTENTS, b"{}"])
@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("result.json", "; remove it to train the trial again"),
        ("trial.json", "; remove it and run the study again, which restores it"),
        ("error.json", "; remove it"),
        ("study.resolved.json", "; remove it, and atn-norms ablate STUDY --out {} restores it"),
    ],
)
def test_the_cure_of_damaged_json_works(study, trial, name, cure, content):
    before = load(study).trials
    path = study / name if name.startswith("study") else trial.path / name
    path.write_bytes(content)
    for read in (status, load):
        with pytest.raises(StoreError) as caught:
            read(study)
        assert str(caught.value).startswith(str(path)) and str(caught.value).endswith(cure.format(study))
    path.unlink()
    create(STUDY, study)
    assert load(study).trials == before


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(StoreError, match="nowhere: got no such folder; expected a study's folder$"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("lost", ["folder", "content"])
@pytest.mark.parametrize("again", ["create", "run"])
def test_a_lost_trial_is_pending_and_comes_back(study, trial, lost, again):
    before = load(study)
    shutil.rmtree(trial.path)
    if lost == "content":
        trial.path.mkdir()
    assert load(study) == before and before.trials[0].status == "pending"
    if again == "create":
        create(STUDY, study)
        assert load(study) == before and (trial.path / "trial.json").exists()
    else:
        assert run(study, workers=0).count("done") == 2


@pytest.mark.parametrize("content", [*CONTENTS, b'{"seconds": "x", "attempts": 3}'])
def test_damaged_times_are_reset_and_logged(study, trial, content):
    (trial.path / "run.json").write_bytes(content)
    assert load(study).trials[0].run is None
    assert run(study, workers=0).count("done") == 2
    assert "run.json is damaged; attempts and seconds are counted from 0" in (trial.path / "log.txt").read_text()
    assert load(study).trials[0].run["attempts"] == 1  # type: ignore[index]


@pytest.mark.parametrize("lacking", ["step", "metrics", "metrics.test", "metrics.test.mean squared error"])
def test_an_incomplete_result_is_named(study, trial, lacking):
    run(study, workers=0)
    result = trial.folder.read_json("result.json")
    place = result
    *parents, last = lacking.split(".")
    for key in parents:
        place = place[key]
    del place[last]
    trial.folder.write_json("result.json", result)
    path = lacking.removesuffix(".mean squared error")
    with pytest.raises(StoreError, match=re.escape(f"result.json: damaged: {path}: got nothing; expected a value")):
        load(study)


@pytest.mark.parametrize("line", ['{"a":1}', '{"step":"1","train_loss":1.0,"validation":null}', "[]"])
def test_a_damaged_line_of_the_curve_is_named(study, trial, line):
    trial.measure(LINE)
    with open(trial.path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreError, match=re.escape(f"{trial.path / 'metrics.jsonl'}:2: damaged")):
        load(study)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_a_study_that_cannot_be_created_leaves_nothing(tmp_path, monkeypatch, error, there):
    folder = tmp_path / "studies" / "mine"
    if there:
        folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for writes in range(5):

        def full(source, target, left=[writes], **folders):  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise error
            os.rename(source, target, **folders)

        with monkeypatch.context() as patch, pytest.raises((StoreError, KeyboardInterrupt)):
            patch.setattr(files.os, "replace", full)
            create(STUDY, folder)
        assert sorted(tmp_path.rglob("*")) == before
    create(STUDY, folder)


def test_an_unfinished_last_line_of_the_curve_does_not_count_and_a_damaged_one_is_named(trial):
    trial.measure(LINE)
    with open(trial.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tra')
    assert [line["step"] for line in trial.curve()] == [1]
    with open(trial.path / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(StoreError, match=r"metrics.jsonl:2: damaged"):
        trial.curve()


def test_the_curve_is_cut_back_to_the_checkpoint(trial):
    trial.measure(LINE)
    trial.save({"step": 1, "weights": torch.arange(3.0), "carry": ((torch.ones(1),), ())})
    trial.measure(LINE | {"step": 2})
    state = trial.restore()
    assert (
        state is not None
        and state["carry"] == ((torch.ones(1),), ())
        and torch.equal(state["weights"], torch.arange(3.0))
    )
    assert [line["step"] for line in trial.curve()] == [1]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "pickled code", "curve shorter", "curve lost"])
def test_an_unusable_checkpoint_restarts_the_trial_and_is_logged(trial, damage):
    trial.measure(LINE)
    trial.save({"step": 1})
    path, metrics = trial.path / "checkpoint.pt", trial.path / "metrics.jsonl"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save([1, 2], path)
    elif damage == "pickled code":
        torch.save({"state": print, "metrics": 0}, path)
    elif damage == "curve shorter":
        metrics.write_bytes(b"")
    else:
        metrics.unlink()
    assert trial.restore() is None
    assert trial.curve() == []
    assert "starting over" in (trial.path / "log.txt").read_text()


def test_the_result_is_written_last(trial, monkeypatch):
    trial.save({"step": 1})
    seen = []
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda f, *given: (seen.append(f.names()), write(f, *given)))
    trial.finish({"trial": trial.id, "outcome": "finished", "step": 4, "metrics": {"test": {"score": 1.0}}})
    assert [set(names) - {".lock"} for names in seen] == [{"checkpoint.pt", "metrics.jsonl", "trial.json"}]
    there = {path.name for path in trial.path.iterdir()} - {".lock"}
    assert there == {"metrics.jsonl", "result.json", "trial.json"}
    assert trial.record(({},)).status == "done"


def test_a_result_of_another_trial_is_an_error(study, trial):
    run(study, workers=0)
    result = trial.folder.read_json("result.json")
    trial.folder.write_json("result.json", {**result, "trial": "0" * 16})
    with pytest.raises(StoreError, match=f"got the result of trial {'0' * 16}; expected that of {trial.id}"):
        load(study)


def _hold(study, trial, ready, release):
    with StudyFolder(study).trial(trial).lock():
        ready.set()
        release.wait(30)


def test_a_trial_is_locked_by_one_process_and_freed_by_its_end(study, trial):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(study, trial.id, ready, release))
    other.start()
    assert ready.wait(60)
    with pytest.raises(Busy, match=f"trial {trial.id} .* another process"), trial.lock():
        pass
    assert load(study).trials[0].status == "running"
    other.kill()
    other.join()
    assert load(study).trials[0].status == "pending"
    with trial.lock():
        pass


def test_the_step_of_a_running_trial_is_that_of_its_heartbeat(study, trial):
    assert load(study).trials[0].step == 0
    with trial.lock():
        trial.measure({"step": 3, "train_loss": 0.5, "validation": None})
        assert load(study).trials[0].step == 3
        trial.set_step(4)
        assert until(lambda: load(study).trials[0].step == 4), "written with the next heartbeat"
    assert load(study).trials[0].step == 3, "no process trains it: the last step of the curve"


def test_checking_a_lock_does_not_stop_a_trial_from_starting(trial):
    with trial.lock():
        pass
    lock = trial.path / ".lock"
    descriptor = os.open(lock, os.O_RDONLY)
    import fcntl
    import threading

    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as `is_locked` does for a moment
    threading.Timer(0.2, lambda: os.close(descriptor)).start()
    with trial.lock():
        pass


def test_leftovers_of_a_killed_write_are_removed_by_the_next_holder(trial):
    (trial.path / ".result.json.1.tmp").write_bytes(b"{")
    trial.fail("RuntimeError: of the last attempt", "")
    trial.tidy()
    assert {path.name for path in trial.path.iterdir()} <= {"trial.json", "log.txt", ".lock"}


def test_canonical_json_rejects_other_values():
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical(float("nan"))
    assert json.loads(files.canonical({"é": [1.5, None]})) == {"é": [1.5, None]}
