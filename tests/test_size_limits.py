"""Sizes of files: what is written can be read, and a file that is too large damages one trial only."""

from pathlib import Path
from typing import Any

import pytest

from atn_norms import ablation
from atn_norms.ablation import report
from atn_norms.ablation.report import archive
from atn_norms.ablation.store import curve
from atn_norms.ablation.store.files import StoreError
from atn_norms.ablation.store.folder import RESOLVED
from tests.recorded import score
from tests.recorded import study as recorded

BODY = """
def train(x, trial):
    for step in range(1, 100 if x else 3):
        try:
            trial.report(step, 0.123456789 + 1e-9 * step)
        except Exception as error:
            if x == 2:
                raise
    return 1.0
"""
LIMIT = 2000


def created(folder: Path, values: list[int]) -> Path:
    (folder / "mine.py").write_text(BODY)
    task = {"kind": "python", "file": str(folder / "mine.py")}
    return ablation.create({"task": task, "axes": {"x": values}, "seeds": 1}, folder / "study")


@pytest.mark.parametrize("x", [1, 2], ids=["caught", "not caught"])
def test_a_report_beyond_the_limit_of_a_curve_fails_its_trial(x, tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "MOST_BYTES", LIMIT)
    folder = created(tmp_path, [0, x])
    done, failed = ablation.run(folder, workers=0).trials
    assert (done.status, failed.status) == ("done", "failed")
    error = (failed.error or {})["error"]
    assert "metrics.jsonl" in error and f"expected at most {LIMIT}" in error and "Report less often" in error
    again: Any = ablation.load(folder).trials[1]
    assert len(again.curve) > 10 and (again.folder / "metrics.jsonl").stat().st_size <= LIMIT


def test_a_curve_that_is_too_large_damages_its_trial_only(tmp_path, monkeypatch):
    folder = created(tmp_path, [0, 1])
    assert ablation.run(folder, workers=0).count("done") == 2
    monkeypatch.setattr(curve, "MOST_BYTES", LIMIT)
    for curves in (True, False):
        done, damaged = ablation.load(folder, curves=curves).trials
        assert (done.status, damaged.status) == ("done", "failed") and damaged.result is None
        error = (damaged.error or {})["error"]
        assert error.startswith(f"{damaged.folder}/metrics.jsonl: got a file of over {LIMIT} bytes")
        assert "remove it and result.json, and report less often" in error
    report.write(ablation.load(folder), tmp_path / "published")
    assert "metrics.jsonl" in (tmp_path / "published/results.csv").read_text()
    assert ablation.resume(folder, workers=0).count("failed") == 1
    assert damaged.folder is not None
    for name in ("metrics.jsonl", "result.json"):
        (damaged.folder / name).unlink()
    monkeypatch.undo()
    assert ablation.resume(folder, workers=0).count("done") == 2


def test_a_study_is_created_without_a_trial_whose_curve_is_too_large(tmp_path, monkeypatch):
    folder = created(tmp_path, [0, 1])
    ablation.run(folder, workers=0)
    monkeypatch.setattr(curve, "MOST_BYTES", LIMIT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.py").write_text(BODY)
    task = {"kind": "python", "file": str(tmp_path / "mine.py")}
    study = {"task": task, "axes": {"x": [0, 1, 3]}, "seeds": 1}
    other = ablation.create(study, tmp_path / "other/study", reuse=[folder])
    assert ablation.status(other) == {"done": 1, "diverged": 0, "failed": 0, "running": 0, "pending": 2}


@pytest.mark.parametrize("name", ["curves.csv", "results.csv", "study.json"])
def test_a_published_report_that_could_not_be_read_is_not_written(name, tmp_path, monkeypatch):
    small, large = recorded(score, seeds=2), recorded(score, seeds=6)
    report.write(small, tmp_path, formats=["md"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sizes = {path.name: path.stat().st_size for path in report.write(large, tmp_path / "whole", formats=[])}
    monkeypatch.setattr(archive, "MOST_BYTES", sizes[name] - 1)
    monkeypatch.setattr(archive, "READ", (name,))
    with pytest.raises(StoreError) as caught:
        report.write(large, tmp_path, formats=["md"])
    text = f"{tmp_path / name}: got {sizes[name]} bytes; expected at most {sizes[name] - 1}"
    assert str(caught.value).startswith(text)
    assert ("train.log_every" in str(caught.value)) == (name == "curves.csv")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_report_in_the_folder_of_a_study_may_have_any_size(tmp_path, monkeypatch):
    (tmp_path / RESOLVED).write_text("{}")
    monkeypatch.setattr(archive, "MOST_BYTES", 10)
    record = recorded(score, seeds=2)
    assert report.write(record, tmp_path / "report", formats=[])
