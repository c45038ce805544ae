"""A published report is the same when it is read and written again, and merges with the folder of its study."""

from pathlib import Path
from typing import Any

import pytest

from atn_norms import ablation
from atn_norms.ablation import report

BODY = """
def train(x, seed, trial):
    for step in range(1, 6):
        trial.report(step, float("nan") if (x == 1 and seed == 1 and step == 4) else 1.0 / step)
    if x == 1 and seed == 2:
        raise ValueError("no, sir")
    if x == 1 and seed == 3:
        return {"score": 1e31}
    return {"score": x + seed * 0.1, "other": float("inf") if seed == 0 else 1.0}
"""


@pytest.fixture(params=["", "goal: max", "steps: 5"])
def record(request, tmp_path) -> Any:
    (tmp_path / "mine.py").write_text(BODY)
    task = {"kind": "python", "file": str(tmp_path / "mine.py")}
    train = {"steps": 5} if request.param == "steps: 5" else {}
    task |= {"goal": "max"} if request.param == "goal: max" else {}
    study = {"task": task, "train": train, "axes": {"x": [0, 1]}, "seeds": 4}
    return ablation.run(ablation.create(study, tmp_path / "study"), workers=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_report_with_scores_beyond_1e30_is_written_again_byte_for_byte(record, tmp_path):
    report.write(record, tmp_path / "once")
    again = report.read(tmp_path / "once")
    report.write(again, tmp_path / "again")
    assert contents(tmp_path / "once") == contents(tmp_path / "again")
    assert [trial.status for trial in again.trials] == [trial.status for trial in record.trials]
    assert [trial.result and trial.result["metrics"] for trial in again.trials if trial.status != "failed"] == [
        trial.result and trial.result["metrics"] for trial in record.trials if trial.status != "failed"
    ]


def test_a_report_with_scores_beyond_1e30_is_merged_with_its_study(record, tmp_path):
    report.write(record, tmp_path / "published")
    merged = ablation.merge({"published": report.read(tmp_path / "published"), "study": record})
    assert merged.counts() == record.counts()
    report.write(ablation.merge({"a": record, "b": report.read(tmp_path / "published")}), tmp_path / "merged")
    for name in ("results.csv", "points.csv"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "published" / name).read_bytes()
