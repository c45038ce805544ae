"""Stopped processes: they count as lost, and wake after other processes have finished their trials."""

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
    ".lock:written",
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
        busy = ended(children.one_trial, folder, identity).result["busy"]
        assert "is being trained by another process" in busy and f"(process {zombie.process.pid} on " in busy
        assert until(lambda: ended(children.with_short_silence, 0.3, children.one_trial, folder, identity).result == {})
        zombie.signal(signal.SIGCONT)
        outcome = zombie.outcome()
    assert outcome.error == "" and (outcome.result == {} or "taken over" in outcome.result["busy"]), outcome
    ended(children.whole, folder)
    assert children.truth(folder) == truth
    return outcome.result


@fault("a stopped process (SIGSTOP) that wakes after another finished its trial", "it drops the trial; identical")
@pytest.mark.parametrize("moment", SOME)
def test_a_stopped_process_wakes(moment, place, undisturbed):
    result = wake_after_another_finished(place, moment, undisturbed)
    assert "busy" in result or moment.startswith("result.json")


@pytest.mark.deep
@pytest.mark.parametrize("moment", sorted(set(MOMENTS) - set(SOME)))
def test_a_process_stopped_at_any_point_wakes(moment, place, undisturbed):
    wake_after_another_finished(place, moment, undisturbed)


@fault("a stopped run, and a second run on its folder", "the second is rejected; the first continues when it wakes")
def test_a_stopped_run_keeps_its_study(place, undisturbed):
    folder = place / "study"
    with Child(children.whole, folder, fault="stop@metrics.jsonl:added#2") as run:
        run.stands_still()
        assert "another run is at work on this study" in ended(children.whole, folder).error
        run.signal(signal.SIGCONT)
        assert run.outcome().result["done"] == 1
    assert children.truth(folder) == undisturbed


@fault("a machine that vanishes with a lock", "the lock is free after 2 minutes without a heartbeat")
def test_the_lock_of_a_vanished_machine(tmp_path, monkeypatch):
    path, folder = tmp_path / ".lock", Folder(tmp_path)
    assert ended(children.hold_and_die, tmp_path).code == -signal.SIGKILL
    assert not locks.is_locked(folder), "the local kernel reports that this process has ended"
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


@fault("two machines without a common `flock` that take a lock at once", "one of them stops within seconds")
def test_two_holders_of_one_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_try", lambda descriptor, kind: True)
    monkeypatch.setattr(locks, "BEAT", 0.01)
    folder = Folder(tmp_path)
    with locks.hold(folder, "taken") as one, locks.hold(folder, "taken") as other:
        winner, loser = sorted([one, other], key=lambda hold: hold.holder)
        assert until(lambda: loser.lost) and not winner.lost
        assert "has it too; expected `flock` to work between machines" in loser.describe_loss()


def test_a_heartbeat_records_the_step_and_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    folder = Folder(tmp_path)
    with locks.hold(folder, "taken") as hold:
        first = locks.heartbeat(folder)
        hold.step, hold.loss = 17, 0.25
        assert until(lambda: (heartbeat := locks.heartbeat(folder)) is not None and heartbeat.step == 17)
        heartbeat = locks.heartbeat(folder)
    assert first is not None and heartbeat is not None
    assert (first.holder, first.step) == (heartbeat.holder, None)
    assert heartbeat.loss == 0.25 and heartbeat.beat > first.beat
    assert heartbeat.machine == locks.machine()
