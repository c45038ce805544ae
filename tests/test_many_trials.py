"""Count the work of studies with many trials: reads, writes and computations that their number multiplies."""

import os
import struct
import time
from collections import Counter

import pytest
from matplotlib.figure import Figure

from atn_norms.ablation import Event, create, function_study, load, report, run
from atn_norms.ablation.analysis import student
from atn_norms.ablation.execution.remaining import RemainingTime
from atn_norms.ablation.report import canvas, curves
from atn_norms.ablation.store import folder as folders
from atn_norms.commands import progress
from tests import recorded


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


def test_a_new_study_synchronizes_once_for_each_trial(tmp_path, monkeypatch, study):
    few, many = {**study, "seeds": 1}, {**study, "seeds": 11}
    calls = counted(monkeypatch, os, "fsync")
    create(few, tmp_path / "few")
    before = sum(calls.values())
    create(many, tmp_path / "many")
    assert sum(calls.values()) - 2 * before == 30, "the files of 33 trials instead of 3, and no folder of a trial"


def test_a_lost_entry_of_a_new_study_is_written_again(tmp_path, study):
    folder = create(study, tmp_path / "study")
    lost = sorted((folder / "trials").iterdir())[0] / "trial.json"
    content = lost.read_bytes()
    lost.unlink()
    run(folder, workers=0)
    assert lost.read_bytes() == content and load(folder).count("done") == 12


def test_a_study_is_read_twice_when_it_is_created_again(tmp_path, monkeypatch, study):
    folder = create(study, tmp_path / "study")
    calls = counted(monkeypatch, folders, "check_study")
    create(study, folder)
    assert sum(calls.values()) == 2, "before and after the lock is taken"


def test_the_page_of_many_trials_shows_means_instead_of_seeds(tmp_path, monkeypatch):
    record = recorded.study(lambda norm, window, seed: 1.0 + 0.1 * seed)
    pages = {}
    for most in (30, 29):  # the study has 5 points with 6 seeds
        monkeypatch.setattr(curves, "_MOST_SEEDS", most)
        files = report.write(record, tmp_path / str(most), formats=("svg",))
        pages[most] = files[0].read_text(), (tmp_path / str(most) / "curves-adding.svg").read_text()
    thin = "opacity: 0.32"
    assert pages[30][1].count(thin) == 36 and pages[29][1].count(thin) == 0, (
        "30 trials, and the baseline behind a panel"
    )
    assert "Thin lines: single seeds." in pages[30][0]
    assert "Thin lines: seeds that did not finish." in pages[29][0]


def test_the_picture_of_many_points_has_at_most_65000_pixels_at_a_side():
    saved = [canvas.save(Figure(figsize=(0.2, height)), "tall", "tall", "tall") for height in (10, 500)]
    sizes = [struct.unpack(">II", picture.png[16:24]) for picture in saved]
    assert sizes == [(32, 1600), (26, 65_000)]


@pytest.mark.parametrize("log", ["script", "command"])
def test_the_remaining_time_is_estimated_once_a_second(tmp_path, monkeypatch, study, capsys, log):
    monkeypatch.setattr(time, "monotonic", lambda: 10.0)
    trials = load(create(study, tmp_path / "study")).trials
    calls = counted(monkeypatch, RemainingTime, "seconds")
    remaining = RemainingTime(trials, 1)
    see = function_study._Log(tmp_path, 1).see if log == "script" else progress._Lines(progress.Progress(remaining))
    monkeypatch.setattr(progress, "FEW", 0.0)
    for number, trial in enumerate(trials[:-1], 1):
        see(Event("done", trial.id, trial.points[0], 1, 1, number, len(trials)))
    assert sum(calls.values()) == 1 and capsys.readouterr().out.count("done") == 11
