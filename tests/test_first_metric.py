"""The first metric that a function returns: one for all trials of a task, whichever ends first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atn_norms import ablation
from atn_norms.ablation.execution.trial import run_trial
from atn_norms.ablation.store import failpoints
from atn_norms.ablation.store.files import Folder, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.errors import SpecError

BODY = """
def train(x, seed):
    return {"accuracy": 0.5 + 0.1 * seed, "loss": 0.1} if x == 0 else {"loss": 0.9}
"""
BOTH = "got 'loss' as its first metric; expected 'accuracy', as in trial"


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def no_hook():
    yield
    failpoints.install(None)


def created(folder: Path, body: str = BODY, **options: Any) -> StudyFolder:
    file = folder / "mine.py"
    file.write_text(body)
    task = {"kind": "python", "file": str(file), "goal": "max"} | options.pop("task", {})
    study = {"task": task, "axes": {"x": [0, 1]}, "seeds": 1} | options
    return StudyFolder(ablation.create(study, folder / "study"))


def by_x(store: StudyFolder) -> list[Any]:
    """Return the folders of the trials with x = 0 and x = 1 at the first seed."""
    first: dict[str, Any] = {}
    for entry in store.resolved()["trials"]:
        first.setdefault(entry["points"][0]["x"], store.trial(entry["id"]))
    return [first["0"], first["1"]]


def at(point: str, action: Any) -> None:
    """Call `action` once, when the store passes a failpoint."""

    def hook(name: str) -> None:
        if name == point:
            failpoints.install(None)
            action()

    failpoints.install(hook)


def kill() -> None:
    raise Killed


def test_two_trials_that_end_at_the_same_moment_do_not_both_finish(tmp_path):
    store = created(tmp_path)
    accuracy, loss = by_x(store)
    errors: list[str] = []

    def end_the_other() -> None:
        with pytest.raises(SpecError) as caught:
            run_trial(loss)
        errors.append(str(caught.value))

    at("result.json:begin", end_the_other)
    assert run_trial(accuracy) == "finished"
    assert errors and BOTH in errors[0] and accuracy.id in errors[0]
    with pytest.raises(SpecError, match=BOTH):  # also later
        run_trial(loss)


@pytest.mark.parametrize("point", ["first.json:begin", "first.json:renamed", "result.json:begin"])
def test_a_trial_that_was_killed_before_its_result_decides_nothing(point, tmp_path):
    store = created(tmp_path)
    accuracy, loss = by_x(store)
    at(point, kill)
    with pytest.raises(Killed):
        run_trial(accuracy)
    assert run_trial(loss) == "finished"
    with pytest.raises(SpecError, match="got 'accuracy' as its first metric; expected 'loss', as in trial"):
        run_trial(accuracy)


def test_finished_trials_decide_where_the_file_is_lost_or_damaged(tmp_path):
    store = created(tmp_path)
    accuracy, loss = by_x(store)
    run_trial(accuracy)
    (file,) = store.path.glob("metrics/first.json")
    for content in (None, "{", "[]", '{"train": 3}', '{"train": {"metric": "loss", "trial": "../../x"}}'):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(SpecError, match=BOTH):
            run_trial(loss)


@pytest.mark.parametrize("metric", [None, "loss"])
def test_a_trial_reads_the_results_of_at_most_one_other(metric, tmp_path, monkeypatch):
    body = "def train(x, seed): return {'loss': x + seed}"
    store = created(tmp_path, body, seeds=6, task={"metric": metric})
    folders = [store.trial(entry["id"]) for entry in store.resolved()["trials"]]
    for folder in folders[:-1]:
        run_trial(folder)
    read: list[str] = []
    original = Folder.read

    def counting(folder: Folder, name: str, *rest: Any) -> bytes:
        read.append(f"{folder.path.name}/{name}")
        return original(folder, name, *rest)

    monkeypatch.setattr(Folder, "read", counting)
    run_trial(folders[-1])
    others = [name for name in read if name.endswith("result.json") and folders[-1].id not in name]
    assert len(others) == (0 if metric else 1), others


@pytest.mark.parametrize("action", ["load", "status", "resume"])
def test_a_finished_trial_without_the_metric_is_an_error_and_not_diverged(action, tmp_path):
    body = "def train(x, seed): return {'accuracy': x}"
    store = created(tmp_path, body)
    ablation.run(store.path, workers=0)
    accuracy, other = by_x(store)
    result = json.loads((other.path / "result.json").read_text())
    result["metrics"]["test"] = {"loss": 0.9}
    (other.path / "result.json").write_text(json.dumps(result))
    with pytest.raises(StoreError) as caught:
        {"load": ablation.load, "status": ablation.status, "resume": ablation.resume}[action](store.path)
    message = str(caught.value)
    assert message.startswith(str(other.path / "result.json")) and f"as in trial {accuracy.id}" in message
    assert "got metrics 'loss'; expected 'accuracy'" in message and "remove it to train the trial again" in message


def test_two_finished_trials_of_unequal_metrics_are_an_error_at_the_end_of_a_run(tmp_path, monkeypatch):
    """Locks may fail between machines."""
    monkeypatch.setattr("atn_norms.ablation.execution.function.require_same_metric", lambda *arguments: None)
    store = created(tmp_path)
    with pytest.raises(StoreError, match=r"got metrics 'loss'; expected 'accuracy', as in trial"):
        ablation.run(store.path, workers=0)


def test_a_merge_of_two_first_metrics_is_an_error(tmp_path):
    """Functions of unequal names in two folders, such as of copied results."""
    records = []
    for seed, body in enumerate(("{'accuracy': x}", "{'loss': x}")):
        folder = tmp_path / str(seed)
        folder.mkdir()
        store = created(folder, f"def train(x, seed): return {body}", seeds=[seed])
        records.append(ablation.run(store.path, workers=0))
    first, second = records
    trials = tuple(replace(each, trial={**each.trial, "data": first.trials[0].trial["data"]}) for each in second.trials)
    second = replace(second, study=first.study | {"seeds": [1]}, trials=trials)
    with pytest.raises(StoreError, match=r"got metrics 'loss'; expected 'accuracy', as in trial"):
        ablation.merge({"a": first, "b": second})
