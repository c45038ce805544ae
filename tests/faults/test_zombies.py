"""Processes that stand still, are taken for gone, and wake up when others have done their work."""

import signal

import pytest

from atn_norms.ablation import create
from atn_norms.ablation.store import locks
from atn_norms.ablation.store.files import Busy, Folder
from tests.faults import children
from tests.faults.children import STUDY, Child, ended
from tests.faults.registry import fault
from tests.faults.test_points import WRITES
from tests.waiting import until

MOMENTS = [
    ".lock:told",
    *(f"{name}:{stage}" for name in ("run.json", "checkpoint.pt", "result.json") for stage in WRITES),
    *(f"metrics.jsonl:{stage}" for stage in ("cut", "shortened", "add", "added", "sync", "marked")),
    *("log.txt:add", "checkpoint.pt:remove", "checkpoint.pt:removed"),
]
SOME = ["run.json:synced", "metrics.jsonl:cut", "metrics.jsonl:add", "checkpoint.pt:synced", "result.json:synced"]


def wake_after_another_finished(place, moment, truth):
    folder = place / "study"
    create(STUDY, folder)
    (identity,) = children.identities(folder)
    with Child(children.one_trial, folder, identity, fault=f"stop@{moment}") as zombie:
        zombie.stands_still()
        busy = ended(children.one_trial, folder, identity).said["busy"]
        assert "is being trained by another process" in busy and f"(process {zombie.process.pid} on " in busy
        assert until(lambda: ended(children.impatient, 0.3, children.one_trial, folder, identity).said == {})
        zombie.signal(signal.SIGCONT)
        told = zombie.outcome()
    assert told.error == "" and (told.said == {} or "taken over" in told.said["busy"]), told
    ended(children.whole, folder)
    assert children.truth(folder) == truth
    return told.said


@fault("a stopped process (SIGSTOP) that wakes up when another has finished its trial", "it lets go; identical")
@pytest.mark.parametrize("moment", SOME)
def test_a_zombie_wakes(moment, place, undisturbed):
    told = wake_after_another_finished(place, moment, undisturbed)
    assert "busy" in told or moment.startswith("result.json")


@pytest.mark.deep
@pytest.mark.parametrize("moment", sorted(set(MOMENTS) - set(SOME)))
def test_a_zombie_wakes_anywhere(moment, place, undisturbed):
    wake_after_another_finished(place, moment, undisturbed)


@fault("a stopped run, and another one started on its folder", "refused at once; the first goes on when it wakes")
def test_a_run_that_stands_still_keeps_its_study(place, undisturbed):
    folder = place / "study"
    with Child(children.whole, folder, fault="stop@metrics.jsonl:added#2") as run:
        run.stands_still()
        assert "another run is at work on this study" in ended(children.whole, folder).error
        run.signal(signal.SIGCONT)
        assert run.outcome().said["done"] == 1
    assert children.truth(folder) == undisturbed


@fault("a machine that vanishes with a lock", "the lock is held until 2 minutes of silence, then it is free")
def test_the_lock_of_a_vanished_machine(tmp_path, monkeypatch):
    path, folder = tmp_path / ".lock", Folder(tmp_path)
    assert ended(children.hold_and_die, tmp_path).code == -signal.SIGKILL
    assert not locks.is_locked(folder), "the kernel here knows that this one is gone"
    path.write_text(path.read_text().replace(locks.machine(), "elsewhere"))
    assert locks.is_locked(folder)
    with pytest.raises(Busy, match=r"taken \(.*silent for \d s; gone after 120 s of silence\)"):
        locks.hold(folder, "taken", patience=0.0).__enter__()
    monkeypatch.setattr(locks, "SILENCE", 0.1)
    assert until(lambda: not locks.is_locked(folder))
    with locks.hold(folder, "taken", patience=0.0, take_over=False) as hold:
        assert hold.orphaned and not hold.lost and locks.is_locked(folder)
    assert not locks.is_locked(folder) and path.read_bytes() == b""


def test_a_lock_that_is_replaced_or_removed_is_lost(tmp_path, monkeypatch):
    path, folder = tmp_path / ".lock", Folder(tmp_path)
    monkeypatch.setattr(locks, "BEAT", 60.0)
    with locks.hold(folder, "taken") as first:
        monkeypatch.setattr(locks, "SILENCE", 0.0)
        with locks.hold(folder, "taken") as second:
            assert first.lost and not second.lost and second.orphaned
            path.unlink()
            assert second.lost


def test_a_holder_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    folder = Folder(tmp_path)
    with locks.hold(folder, "taken") as hold:
        first = locks.heartbeat(folder)
        hold.step, hold.loss = 17, 0.25
        assert until(lambda: (said := locks.heartbeat(folder)) is not None and said.step == 17)
        said = locks.heartbeat(folder)
    assert first is not None and said is not None
    assert (first.holder, first.step) == (said.holder, None) and said.loss == 0.25 and said.beat > first.beat
    assert said.machine == locks.machine()
