"""System errors: a full disk, missing permissions, any error at any point, truncated and corrupted files."""

import os
import re
import stat

import pytest

from atn_norms.ablation import create, load, run
from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.folder import StudyFolder
from tests.faults import children
from tests.faults.children import STUDY, ended
from tests.faults.registry import fault
from tests.faults.test_points import POINTS

SIZES = (0, 100, 400, 700, 1000, 3000, 6000)
REFUSED = ["metrics.jsonl:add", "checkpoint.pt:written", "checkpoint.pt:synced", "result.json:synced", "run.json:begin"]


@fault(
    "the disk full: no file may grow beyond 0, 100, ... 6000 bytes (RLIMIT_FSIZE)",
    "an error that names the file; identical once there is space",
)
@pytest.mark.parametrize("most", SIZES)
def test_a_full_disk(most, place, undisturbed):
    folder = place / "study"
    outcome = ended(children.starved, folder, most)
    assert re.fullmatch(rf"StoreError: cannot (write|lock) {folder}\S*: File too large", outcome.error), outcome
    if most == 0:
        assert not folder.exists(), "a folder that cannot be locked is not left behind"
    if folder.exists() and (folder / "study.resolved.json").exists():
        assert load(folder).count("failed") == 0, "no trial is recorded as failed"
    assert ended(children.whole, folder).error == ""
    assert children.truth(folder) == undisturbed


def check_system_error(point, error, place, truth):
    folder = place / "study"
    outcome = ended(children.whole, folder, fault=f"{error}@{point}")
    name = "Permission denied" if error == "EACCES" else "No space left on device"
    if outcome.error:
        assert re.fullmatch(rf"StoreError: cannot [a-z ]+ {folder}\S*: {name}", outcome.error), outcome
    else:
        assert point in (".lock:ended",), "the only point whose error may be ignored"
    assert ended(children.whole, folder).error == ""
    assert children.truth(folder) == truth


@fault(
    "a system error, no space or no permission, at any of the named points",
    "an error that names the file; then identical",
)
@pytest.mark.parametrize("point", REFUSED)
def test_a_system_error_at_a_point(point, place, undisturbed):
    check_system_error(point, "ENOSPC", place, undisturbed)


@pytest.mark.deep
@pytest.mark.parametrize("point", POINTS)
def test_a_system_error_at_any_point(point, place, undisturbed):
    check_system_error(point, "EACCES", place, undisturbed)


@fault("a folder without permission to write, or to read", "an error that names the file; with permission, identical")
@pytest.mark.parametrize(
    ("where", "mode", "message"),
    [
        ("", 0o555, "cannot lock {study}/.lock: Permission denied"),
        ("trials/*", 0o555, "cannot lock {trial}/.lock: Permission denied"),
        ("trials/*/trial.json", 0o000, "cannot read {trial}/trial.json: Permission denied"),
        ("study.resolved.json", 0o000, "cannot read {study}/study.resolved.json: Permission denied"),
        ("..", 0o555, "cannot create the folder {study}: Permission denied"),
    ],
)
def test_a_folder_without_permission(where, mode, message, place, undisturbed):
    folder = place / "above" / "study"
    folder.parent.mkdir()
    if where == "..":
        target, trial = folder.parent, ""
    else:
        create(STUDY, folder)
        (folder / ".lock").unlink()
        (target,) = folder.glob(where) if where else [folder]
        (trial,) = folder.glob("trials/*")
    for path in [place, *place.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    before = stat.S_IMODE(target.stat().st_mode)
    target.chmod(mode)
    outcome = ended(children.unprivileged, folder)
    target.chmod(before)
    assert outcome.error == "StoreError: " + message.format(study=folder, trial=trial)
    assert ended(children.whole, folder).error == ""
    assert children.truth(folder) == undisturbed


def cut_everywhere(path, step):
    """Truncate a file to every shorter length, then restore it."""
    content = path.read_bytes()
    lengths = sorted({*range(0, len(content), step), *range(max(0, len(content) - 20), len(content))})
    assert lengths
    for length in lengths:
        path.write_bytes(content[:length])
        yield length
    path.write_bytes(content)


FILES = ["trial.json", "result.json", "metrics.jsonl", "run.json", "study.resolved.json", "environment.json"]


def read(folder, path, before):
    """Read and run a study with a damaged file: both give the same error."""
    try:
        trials = load(folder).trials
    except StoreError as error:
        message = str(error)
    else:
        assert [(each.result, each.curve) for each in trials] == [(each.result, each.curve) for each in before]
        run(folder, workers=0)
        return "the same"
    assert str(path) in message and ("damaged" in message or "another" in message), message
    with pytest.raises(StoreError, match=re.escape(str(path))):
        run(folder, workers=0)
    return "named"


def truncated(name, folder, step):
    """Truncate a file of a finished study at every byte: the study reads as before, or the error names the file."""
    ended(children.whole, folder)
    (path,) = folder.rglob(name)
    before, truth = load(folder).trials, children.truth(folder)
    outcomes = set()
    for _ in cut_everywhere(path, step):
        outcomes.add(read(folder, path, before))
    assert children.truth(folder) == truth
    return outcomes


@fault(
    "any file of a finished study truncated at any byte",
    "reads as before where only a line break or times are lost, else an error that names the file",
)
@pytest.mark.parametrize("name", FILES)
def test_a_finished_study_with_a_truncated_file(name, place):
    outcomes = truncated(name, place / "study", step=1 if name == "metrics.jsonl" else 23)
    assert outcomes == {"run.json": {"the same"}, "metrics.jsonl": {"named"}}.get(name, {"named", "the same"})


@pytest.mark.deep
@pytest.mark.parametrize("name", FILES)
def test_a_finished_study_with_a_file_truncated_at_every_byte(name, place):
    truncated(name, place / "study", step=1)


def unfinished(folder, step=5):
    create(STUDY, folder)
    ended(children.dying_at, folder, step)
    (identity,) = children.identities(folder)
    return StudyFolder(folder).trial(identity)


def check_truncated_and_resumed(folder, trial, name, step, truth):
    """Truncate a file of an unfinished trial at every byte: the resumed trial is identical."""
    files = {path: path.read_bytes() for path in trial.path.iterdir()}
    starts = set()
    for length in cut_everywhere(trial.path / name, step):
        steps = []
        assert run(folder, workers=0, on_event=lambda e, s=steps: s.append(e.step)).count("done") == 1
        starts.add(next(filter(None, steps)))
        assert children.truth(folder) == truth, length
        for path in trial.path.iterdir():
            path.unlink()
        for path, content in files.items():
            path.write_bytes(content)
    return starts


@fault(
    "any file of an unfinished trial truncated at any byte",
    "identical: from the checkpoint where it and the curve are complete, else from the start",
)
@pytest.mark.parametrize(("name", "step"), [("checkpoint.pt", 5003), ("metrics.jsonl", 83), ("run.json", 151)])
def test_an_unfinished_trial_with_a_truncated_file(name, step, place, undisturbed):
    trial = unfinished(place / "study")
    starts = check_truncated_and_resumed(place / "study", trial, name, step, undisturbed)
    assert starts == {"checkpoint.pt": {1}, "metrics.jsonl": {1, 5}, "run.json": {5}}[name]


@fault("a checkpoint with a byte changed", "the trial starts over")
def test_a_checkpoint_truncated_or_changed_at_any_byte_is_rejected(place):
    check_checkpoint(unfinished(place / "study"), 151)


@pytest.mark.deep
def test_a_checkpoint_truncated_or_changed_at_every_byte_is_rejected(place):
    check_checkpoint(unfinished(place / "study"), 1)


def check_checkpoint(trial, step):
    path, curve = trial.path / "checkpoint.pt", trial.path / "metrics.jsonl"
    content, lines = path.read_bytes(), curve.read_bytes()
    assert trial.restore() is not None
    for _ in cut_everywhere(path, step):
        curve.write_bytes(lines)
        assert trial.restore() is None
        assert trial.curve() == []
    for place in range(0, len(content), step):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        curve.write_bytes(lines)
        assert trial.restore() is None, place
    assert "starting over" in (trial.path / "log.txt").read_text()


@fault("a folder of the study removed while it is not running", "created and trained again; identical")
def test_a_lost_trial(place, undisturbed):
    folder = place / "study"
    ended(children.whole, folder)
    (trial,) = folder.glob("trials/*")
    for path in trial.iterdir():
        os.unlink(path)
    trial.rmdir()
    assert ended(children.whole, folder).error == ""
    assert children.truth(folder) == undisturbed
