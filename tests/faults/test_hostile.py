"""Damaged and hostile study folders: one clear message, no access outside, no hang, no wrong result."""

import json
import math
import os
import random
import shutil
import signal
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from atn_norms.ablation import create, load, resume, run, status
from atn_norms.ablation.execution import engine, events
from atn_norms.ablation.execution.trial import Trainer
from atn_norms.ablation.report import write
from atn_norms.ablation.store import checkpoints, locks
from atn_norms.ablation.store.files import Busy, Folder, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.errors import SpecError
from tests.faults import hostile
from tests.faults.hostile import STUDY
from tests.faults.registry import fault


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a finished and an unfinished study."""
    place = tmp_path_factory.mktemp("bases")
    hostile.finished(place / "finished")
    hostile.unfinished(place / "unfinished")
    assert status(place / "unfinished")["pending"] == 1
    return place


@pytest.fixture
def with_short_silence(monkeypatch):
    """Free a lock of another machine after half a second without a heartbeat, instead of two minutes."""
    monkeypatch.setattr(locks, "SILENCE", 0.5)
    monkeypatch.setattr(events, "RETRY", 0.1)
    monkeypatch.setattr(engine, "POLL", 0.05)


@pytest.fixture
def study(bases, tmp_path):
    return shutil.copytree(bases / "finished", tmp_path / "study")


@pytest.fixture
def interrupted(bases, tmp_path):
    """Return the unfinished trial of an interrupted study; its checkpoint is at step 3."""
    folder = shutil.copytree(bases / "unfinished", tmp_path / "study")
    (path,) = folder.glob("trials/*/checkpoint.pt")
    return StudyFolder(folder).trial(path.parent.name)


@pytest.fixture
def outside(tmp_path):
    """Folder with files that a study must not change."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "precious.txt").write_text("years of work")
    (folder / "result.json").write_text("{}")
    return folder


def tree(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


class Hangs(BaseException):
    pass


@contextmanager
def within(seconds):
    def stop(number, frame):
        raise Hangs(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def truth(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("trials/*/result.json")}


def outcome(action, folder):
    """Return the error message of an action, or an empty string; fail unless each of its lines names the folder."""
    try:
        with within(60):
            action()
    except (StoreError, SpecError) as error:
        text = str(error)
        assert all(str(folder) in line for line in text.split("\n")) and len(text) < 2000, text
        assert "Traceback" not in text and "'NoneType'" not in text, text
        return text
    return ""


def check_scores(folder):
    for trial in load(folder).trials:
        for scores in (trial.result or {"metrics": {}})["metrics"].values():
            assert all(type(each) in (int, float) and math.isfinite(each) for each in scores.values())


def campaign(bases, place, seeds):
    wanted = truth(bases / "finished")
    counts: Counter[str] = Counter()
    for seed in seeds:
        dice = random.Random(seed)
        here = place / str(seed)
        folder, outside = here / "study", here / "outside"
        shutil.copytree(bases / dice.choice(["finished", "unfinished"]), folder)
        (outside / "folder").mkdir(parents=True)
        (outside / "precious.txt").write_text("years of work")
        (outside / "result.json").write_text("{}")
        done = [hostile.damage(folder, outside, dice) for _ in range(dice.randint(1, 3))]
        before = tree(outside)
        try:
            actions = (lambda f=folder: status(f), lambda f=folder: load(f), lambda f=folder: resume(f, workers=0))
            messages = [outcome(action, folder) for action in actions]
            if not messages[-1]:
                check_scores(folder)
                same_results = truth(folder) == wanted
                assert same_results or any("result.json" in each or "swap" in each for each in done), "other results"
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {done}: {type(error).__name__}: {error}") from error
        assert tree(outside) == before and sorted(os.listdir(here)) == ["outside", "study"], (seed, done)
        counts["named" if messages[-1] else "continued"] += 1
        shutil.rmtree(here)
    return counts


@fault(
    "a damaged or malicious folder: links, pipes, devices, unusual values, swapped files; 40 generated folders",
    "a message whose every line names the file, or the same results; no change outside the folder, no hang",
)
def test_generated_folders(bases, tmp_path, with_short_silence):
    counts = campaign(bases, tmp_path, range(40))
    assert counts["named"] >= 10 and counts["continued"] >= 5, counts


@pytest.mark.deep
def test_many_generated_folders(bases, tmp_path, with_short_silence, record_property):
    counts = campaign(bases, tmp_path, range(1000, 1600))
    print(f"\n600 generated folders: {dict(counts)}")
    record_property("folders", dict(counts))
    assert sum(counts.values()) == 600 and counts["named"] >= 100 and counts["continued"] >= 100, counts


@fault("a checkpoint of another trial", "renamed and named in the log; the trial starts over; identical")
@pytest.mark.parametrize("with_curve", [False, True])
def test_a_checkpoint_of_another_trial(interrupted, bases, tmp_path, with_curve):
    other = create({**STUDY, "seeds": [7], "axes": {"norm": ["layer"]}}, tmp_path / "other")
    with pytest.raises(hostile.Interrupt):
        run(other, workers=0, on_event=interrupt_at(1 if not with_curve else 3))
    (theirs,) = other.glob("trials/*")
    for name in ("checkpoint.pt", *(["metrics.jsonl"] if with_curve else [])):
        shutil.copy(theirs / name, interrupted.path / name)
    run(interrupted.path.parents[1], workers=0)
    log = (interrupted.path / "log.txt").read_text()
    assert f"got a checkpoint of trial '{theirs.name}'; expected one of '{interrupted.id}'; starting over" in log
    assert truth(interrupted.path.parents[1]) == truth(bases / "finished")


def interrupt_at(step):
    def see(event):
        if event.kind == "step" and event.step == step:
            raise hostile.Interrupt

    return see


def test_a_checkpoint_of_another_trial_with_an_empty_curve(interrupted, tmp_path, bases):
    """An empty curve matches every trial; the id does not."""
    other = create({**STUDY, "seeds": [7], "axes": {"norm": ["layer"]}}, tmp_path / "other")
    theirs = StudyFolder(other).trial(load(other).trials[0].id)
    trainer = Trainer(theirs.trial())
    trainer.advance()
    theirs.save(trainer.state())
    shutil.copy(theirs.path / "checkpoint.pt", interrupted.path / "checkpoint.pt")
    run(interrupted.path.parents[1], workers=0)
    assert truth(interrupted.path.parents[1]) == truth(bases / "finished")


FOREIGN = {
    "a missing entry": lambda state: state.pop("since"),
    "an extra entry": lambda state: state.update(more=1),
    "other shapes": lambda state: state.update(model={k: torch.zeros(1) for k in state["model"]}),
    "a bad generator": lambda state: state.update(random=torch.zeros(3)),
    "far beyond the end": lambda state: state.update(step=10**9),
    "true for a step": lambda state: state.update(step=True),
    "no number": lambda state: state.update(summed=float("nan")),
    "other options": lambda state: state["optimizer"]["param_groups"][0].update(betas=(0.1, 0.1)),
    "best weights of another model": lambda state: state.update(kept={"x": torch.zeros(2)}),
    "the state of another optimizer": lambda state: [
        each.update(square_avg=torch.zeros(99)) for each in moments(state)
    ],
}


def moments(state):
    return list(state["optimizer"]["state"].values())


@fault("a checkpoint with a valid checksum and a foreign state", "renamed and named in the log; identical")
@pytest.mark.parametrize("change", FOREIGN)
def test_a_checkpoint_with_a_foreign_state(interrupted, bases, change):
    state, mark = checkpoints.unpack(interrupted.id, (interrupted.path / "checkpoint.pt").read_bytes())
    FOREIGN[change](state)
    (interrupted.path / "checkpoint.pt").write_bytes(checkpoints.pack(interrupted.id, state, mark))
    record = run(interrupted.path.parents[1], workers=0)
    assert record.count("done") == 2, [trial.error for trial in record.trials]
    assert (
        "checkpoint.pt cannot be used and is now checkpoint.rejected.pt" in (interrupted.path / "log.txt").read_text()
    )
    assert truth(interrupted.path.parents[1]) == truth(bases / "finished")
    assert not list(interrupted.path.glob("*.pt")), "a finished trial keeps no checkpoint"


@pytest.mark.parametrize("state", [[1, 2], {"state": [1]}, {"state": {}, "metrics": 0}, {"state": {}, "trial": "x"}])
def test_a_valid_archive_that_is_not_a_checkpoint(interrupted, state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    (interrupted.path / "checkpoint.pt").write_bytes(checkpoints.sign(buffer.getvalue()))
    assert run(interrupted.path.parents[1], workers=0).count("done") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda trial: trial["train"].update(steps=3), "got the content of trial "),
        (lambda trial: trial.update(seed=5), "got the content of trial "),
        (lambda trial: trial["train"].pop("steps"), "trial.json: damaged: train.steps: got nothing"),
        (lambda trial: trial["train"].update(steps=10**400), "trial.json: damaged: train.steps: "),
        (lambda trial: trial["train"].update(threads=100_000), "trial.json: damaged: train.threads: "),
    ],
)
def test_a_trial_whose_content_does_not_match_its_id(study, change, message):
    (path, *_) = sorted(study.glob("trials/*/trial.json"))
    trial = json.loads(path.read_text())
    change(trial)
    path.write_text(json.dumps(trial))
    for action in (lambda: status(study), lambda: load(study), lambda: run(study, workers=0)):
        text = outcome(action, study)
        assert str(path) in text and message in text, text


@pytest.mark.parametrize(
    "metrics",
    ['{"mean squared error": NaN}', '{"mean squared error": 1e999}',
     '{"mean squared error": true}', '{"mean squared error": "1"}', '{"other": 1.0}',
     '{"mean squared error": 1' + "0" * 400 + "}", '{"mean squared error": Infinity}', "{}", "[]",
     '{"mean squared error": ' + "1" * 5001 + "}"],
)  # fmt: skip
def test_a_score_that_is_not_a_number_is_rejected(study, metrics):
    (path, *_) = sorted(study.glob("trials/*/result.json"))
    result = json.loads(path.read_text())
    result["metrics"]["test"] = "HERE"
    path.write_text(json.dumps(result).replace('"HERE"', metrics))
    for action in (lambda: status(study), lambda: load(study), lambda: run(study, workers=0)):
        text = outcome(action, study)
        assert f"{path}: damaged" in text, text
        assert "digits" in text or "not a number" in text or "remove it to train the trial again" in text, text


@pytest.mark.parametrize("step", ["5", "true", "-1", "1e3", "1" + "0" * 400])
def test_a_step_beyond_the_trial_is_rejected(study, step):
    (path, *_) = sorted(study.glob("trials/*/result.json"))
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "step": "HERE"}).replace('"HERE"', step))
    assert f"{path}: damaged: step: " in outcome(lambda: status(study), study)


LINKED = [".lock", "study.yaml", "environment.json", "trials/*/metrics.jsonl", "trials/*/log.txt", "trials/*/.lock",
          "trials/*/run.json", "trials/*/checkpoint.pt"]  # fmt: skip


@pytest.mark.parametrize("pattern", LINKED)
def test_a_link_inside_a_study_is_not_followed(interrupted, outside, pattern):
    folder = interrupted.path.parents[1]
    path = (interrupted.path if "*" in pattern else folder) / pattern.rpartition("/")[2]
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "precious.txt")
    before = tree(outside)
    text = outcome(lambda: resume(folder, workers=0), folder)
    assert f"{path}: got a symbolic link; expected a regular file" in text or path.name in ("run.json", "checkpoint.pt")
    assert tree(outside) == before


@pytest.mark.parametrize("name", ["trials", "trials/*", "report"])
def test_a_linked_folder_inside_a_study_is_not_followed(study, outside, name):
    (path,) = sorted(study.glob(name))[:1] or [study / name]
    record = load(study)
    if path.exists():
        shutil.move(path, outside / "moved")
        path.symlink_to(outside / "moved")
    else:
        path.symlink_to(outside / "folder")
    before = tree(outside)
    action = (lambda: write(record, StudyFolder(study).report)) if name == "report" else (lambda: run(study, workers=0))
    assert f"{path}: got a symbolic link; expected a folder" in outcome(action, study)
    assert tree(outside) == before


@pytest.mark.parametrize(
    "identity", ["/abs/x", "../../x", "..", ".", "", "0" * 15, "0" * 17, "A" * 16, "g" * 16, "a\n"]
)
def test_an_id_must_be_hexadecimal_digits(study, identity):
    with pytest.raises(StoreError, match="expected 16 hexadecimal digits"):
        StudyFolder(study).trial(identity)
    path = study / "study.resolved.json"
    resolved = json.loads(path.read_text())
    resolved["trials"][0]["id"] = identity
    path.write_text(json.dumps(resolved))
    before = sorted(study.parent.rglob("*"))
    for action in (lambda: status(study), lambda: run(study, workers=0), lambda: create(STUDY, study)):
        assert str(path) in outcome(action, study)
    assert sorted(study.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", ".lock", "trial.json", "error.json"])
@pytest.mark.parametrize("make", [hostile.make_pipe, hostile.make_socket, hostile.make_folder])
def test_only_regular_files_are_read(interrupted, outside, name, make):
    make(interrupted.path, name, outside, random.Random(1))
    folder = interrupted.path.parents[1]
    text = outcome(lambda: status(folder), folder)
    assert text or name == "error.json"
    assert not text or f"{interrupted.path / name}: got a" in text


@pytest.mark.parametrize("name", ["study.resolved.json", "environment.json", "trial.json", "result.json"])
def test_a_file_that_is_too_large_is_not_read(study, name):
    (path,) = sorted(study.rglob(name))[:1]
    with open(path, "r+b") as file:
        file.truncate(2**33)
    assert f"{path}: got a file of over" in outcome(lambda: load(study), study)


def test_only_the_end_of_a_long_curve_is_read(interrupted, monkeypatch):
    """Read only the end of a curve of 1 GB: its first line is not JSON and must not be parsed."""
    line = b'{"step":3,"train_loss":0.5,"validation":null}\n'
    with open(interrupted.path / "metrics.jsonl", "wb") as file:
        file.truncate(10**9)
        file.seek(10**9)
        file.write(b"\n" + line)
    folder = interrupted.path.parents[1]
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: read.append(a[1]) or pread(*a))
    assert status(folder)["pending"] == 1
    assert load(folder, curves=False).trials[1].step == 3
    assert sum(read) < 10**6
    other, damaged = load(folder).trials
    assert (other.status, damaged.status) == ("done", "failed"), "a curve that is too large damages its trial only"
    assert f"{interrupted.path / 'metrics.jsonl'}: got a file of over" in (damaged.error or {})["error"]


def test_a_folder_that_is_renamed_while_a_study_runs(study, tmp_path):
    create({**STUDY, "seeds": 2}, study)

    def rename(event):
        if event.kind == "step" and study.exists():
            study.rename(tmp_path / "elsewhere")

    with pytest.raises(StoreError, match=r"study: the folder was renamed or removed while the study ran; resume it"):
        run(study, workers=0, on_event=rename)
    assert resume(tmp_path / "elsewhere", workers=0).count("done") == 4


def test_a_working_directory_that_is_removed_while_a_study_runs(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    create(STUDY, "study")

    def remove(event):
        if event.kind == "step" and here.exists():
            shutil.rmtree(here)

    with pytest.raises(StoreError, match="study: the working directory was removed while the study ran"):
        run("study", workers=0, on_event=remove)
    monkeypatch.chdir(tmp_path)


def test_a_lock_with_a_future_heartbeat_becomes_stale_as_usual(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    hostile.from_the_future(tmp_path, "", tmp_path, random.Random(2))
    monkeypatch.setattr(locks, "SILENCE", 0.3)
    with pytest.raises(Busy, match="taken"):
        locks.hold(folder, "taken", patience=0.0).__enter__()
    with locks.hold(folder, "taken", patience=5.0):
        pass


@pytest.mark.parametrize(
    "text", ['{"holder": "x", "machine": "m", "beat": 1}', '{"holder": 3}', "x", '{"beat": 1' + "0" * 400 + "}"]
)
def test_an_invalid_holder_of_a_lock_is_ignored(study, text):
    (study / ".lock").write_text(text)
    assert run(study, workers=0).count("done") == 2


def test_a_temporary_file_of_a_report_that_was_killed_is_removed(study):
    (study / "report").mkdir()
    (study / "report" / ".report.html.0123456789ab.tmp").write_text("half")
    write(load(study), StudyFolder(study).report)
    assert not list((study / "report").glob(".*"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a\0b", "got a path with a NUL character"),
        ("x" * 300, "File name too long"),
        ("dangling", "a symbolic link to"),
    ],
)
def test_a_path_that_cannot_be_a_folder(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for action in (create, lambda study, folder: status(folder)):
        with pytest.raises((StoreError, SpecError)) as caught:
            action(STUDY, path)
        assert message in str(caught.value) or "got no such folder" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", hostile.TEXTS)
def test_an_error_names_the_damaged_file(study, text):
    for path in [study / "study.resolved.json", *list(study.glob("trials/*/trial.json"))[:1]]:
        content = path.read_bytes()
        path.write_bytes(text)
        assert str(path) in outcome(lambda: load(study), study)
        path.write_bytes(content)
