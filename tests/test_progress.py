"""Progress of a run: counts, times, the table on a terminal and the lines of a log."""

import io
import re

import pytest
from rich.console import Console

from atn_norms.ablation import Event, TrialRecord
from atn_norms.ablation.execution.remaining import RemainingTime
from atn_norms.commands import progress as module
from atn_norms.commands.progress import Progress, live_progress


@pytest.fixture
def clock(monkeypatch):
    """Fake clock that a test sets."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def event(kind, trial="a", step=0, finished=0, message="", loss=None, steps=100):
    return Event(kind, trial, {"task": "adding", "norm": trial, "seed": "0"}, step, steps, finished, 4, message, loss)


def remaining(*names, workers=2):
    """Return the remaining time of a run of trials of 100 steps."""
    content = {"task": {"kind": "adding"}, "model": {}, "train": {"steps": 100}}
    return RemainingTime([TrialRecord(name, content, ({},), 0, "pending") for name in names], workers)


def test_the_time_left_is_shown_once_it_is_known(clock):
    progress = Progress(remaining("a", "b", "c", "d"))
    for each in (event("started"), event("started", "b")):
        progress.see(each)
    for seconds, step in ((1, 1), (1, 2)):
        clock[0] += seconds
        progress.see(event("step", step=step))
        progress.see(event("step", "b", step=step))
    assert progress.left() == "", "the first seconds show nothing"
    clock[0] += 48
    progress.see(event("step", step=50))
    progress.see(event("step", "b", step=50))
    assert progress.left() == "about 2 min left", "50 s of a and b, then c and d: 150 s"
    progress.see(event("diverged", step=50, finished=1))
    progress.see(event("failed", "b", step=50, finished=2, message="no"))
    assert progress.summary() == "2 of 4 trials ended, 1 diverged, 1 failed, 0 running, 50 s so far, about 50 s left"


def test_the_table_shows_step_and_loss_of_running_trials(clock, monkeypatch):
    progress = Progress(remaining())
    progress.see(event("started"))
    progress.see(event("step", step=50, loss=0.16734))
    progress.see(event("busy", "b", step=20))
    text = on_screen(progress, 100, 20)
    assert "0 of 4 trials ended, 2 running, 0 s so far" in text
    assert re.search(r"adding norm=a seed=0 +50 of 100 +━{10}╌{10} +0\.1673", text)
    assert re.search(r"adding norm=b seed=0 \(elsewhere\) +20 of 100", text)
    progress.see(event("done", step=100, finished=1))
    assert len(progress.running) == 1
    for number in range(40):
        progress.see(event("started", f"t{number}"))
    assert "and 28 more" in on_screen(progress, 100, 20)


def on_screen(progress, width, height):
    """Return the output on a terminal of a size; fail if it does not fit."""
    out = io.StringIO()
    console = Console(file=out, width=width, height=height)
    console.print(module._drawn(progress, console))
    lines = out.getvalue().splitlines()
    assert len(lines) < height, "it would scroll"
    assert all(len(line) <= width for line in lines), "it would wrap"
    return out.getvalue()


@pytest.mark.parametrize("width", [30, 40, 80, 99, 100, 200])
@pytest.mark.parametrize("height", [17, 24, 50])
def test_the_table_fits_the_terminal_and_counts_the_omitted_rows(clock, width, height):
    progress = Progress(remaining(), 3, 44)
    for number in range(40):
        progress.see(event("started", f"normalizer-{number:02}(with=options)"))
        progress.see(event("step", f"normalizer-{number:02}(with=options)", 50, 3, loss=0.125))
    text = on_screen(progress, width, height)
    joined = re.sub(r"\s", "", text)
    listed = set(re.findall(r"normalizer-(\d\d)", joined))
    more = re.search(r"and (\d+) more", text)
    assert listed and len(listed) + (int(more[1]) if more else 0) == 40
    assert joined.count("50of100") == joined.count("0.125") == len(listed), "steps and loss are never truncated"
    assert ("━" in text) == (width >= 100)


def test_the_cost_of_400_trials_is_that_of_the_shown_rows(clock, monkeypatch):
    progress, drawn = Progress(remaining(), 0, 400), []
    for number in range(400):
        progress.see(event("started", f"t{number}"))
    monkeypatch.setattr(module, "called", lambda point: drawn.append(point) or "x")
    assert "and 3" in on_screen(progress, 100, 24)
    assert len(drawn) <= 24 + 24, "one attempt too many, and one that fits"


def test_the_summary_is_never_folded_to_the_width_of_a_narrow_table(clock):
    progress = Progress(remaining(), 1, 4)
    line = "1 of 4 trials ended, 0 running, 0 s so far"
    assert on_screen(progress, 80, 24) == f"{line}\n", "nothing runs yet: no empty table"
    progress.see(event("started", "x", finished=1))
    assert on_screen(progress, 80, 24).splitlines()[0] == line.replace("0 running", "1 running")


def test_a_stopping_run_shows_a_message_until_it_ends(clock, monkeypatch):
    progress = Progress(remaining(), 0, 4)
    progress.see(event("started"))
    monkeypatch.setattr(module, "stopping", lambda: True)
    assert on_screen(progress, 80, 24).startswith("stopping; finished work is kept\n")


def test_the_table_is_removed_at_the_end(clock):
    progress = Progress(remaining(), 3, 4)
    progress.see(event("started", finished=3))
    clock[0] += 40
    progress.see(event("done", step=100, finished=4))
    assert progress.summary() == "4 of 4 trials ended, 0 running, 40 s so far"


def test_a_log_has_a_line_for_each_end_and_one_per_minute(clock, monkeypatch, capsys):
    monkeypatch.setattr(module, "on_terminal", lambda: False)
    with live_progress(remaining("a", "b")) as see:
        see(event("started"))
        see(event("step", step=1, loss=0.5))
        assert capsys.readouterr().out == ""
        clock[0] += 61
        see(event("step", step=20, loss=0.25))
        line = capsys.readouterr().out
        assert line == (
            "0 of 4 trials ended, 1 running, 61 s so far, about 5 min left: "
            "adding norm=a seed=0 at step 20 of 100, loss 0.25\n"
        )
        see(event("step", step=21, loss=0.25))
        assert capsys.readouterr().out == "", "not again so soon"
        see(event("failed", step=21, finished=1, message="no"))
        assert capsys.readouterr().out.startswith("[1/4] failed   adding norm=a seed=0  61 s: no")


def test_a_table_on_a_terminal_leaves_the_failures_behind(monkeypatch, capsys):
    monkeypatch.setattr(module, "on_terminal", lambda: True)
    with live_progress(remaining("a", "b")) as see:
        see(event("started"))
        see(event("diverged", step=3, finished=1))
    out = capsys.readouterr().out
    assert "diverged" in out and "adding norm=a seed=0" in out
