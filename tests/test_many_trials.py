"""Count the work of studies with many trials: reads, writes and computations that their number multiplies."""

from collections import Counter

import pytest

from atn_norms.ablation import create, load, report, run
from atn_norms.ablation.analysis import student


@pytest.fixture
def study(tmp_path):
    """A study of a function with twelve trials."""
    (tmp_path / "mine.py").write_text(
        "def train(x, seed, trial):\n"
        "    for step in range(1, 4):\n        trial.report(step, x / step + seed % 3)\n"
        "    return {'loss': x + 0.1 * (seed * x % 3)}\n"
    )
    task = {"kind": "python", "file": str(tmp_path / "mine.py"), "reports": "metric"}
    return {"name": "many", "task": task, "axes": {"x": [1, 2, 3]}, "seeds": 4}


def counted(monkeypatch, owner, name, key=lambda *arguments: None):
    """Count the calls of a function by a key of its arguments."""
    calls, function = Counter(), getattr(owner, name)

    def count(*arguments, **options):
        calls[key(*arguments)] += 1
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_a_report_computes_each_power_once(tmp_path, monkeypatch, study):
    folder = create(study, tmp_path / "study")
    run(folder, workers=0)
    calls = counted(monkeypatch, student, "needed")
    found = report.findings(load(folder))
    report.write(found, tmp_path / "report")
    assert report.table(found).records[1]["decision"]["seeds_needed"]
    assert sum(calls.values()) == 2, "one for each comparison with the baseline"
