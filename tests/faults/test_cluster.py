"""A scheduler and workers that simulate several machines; some are killed, stopped, or join later."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from atn_norms.ablation import create, load, run
from atn_norms.ablation.execution import cluster, events
from atn_norms.ablation.store import locks
from atn_norms.errors import SpecError
from tests.faults import children
from tests.faults.children import ended
from tests.faults.programs import Program
from tests.faults.registry import fault
from tests.waiting import PATIENCE, until

STUDY = {
    **children.STUDY,
    "model": {"cell": "rnn", "hidden_size": 3, "backend": "reference"},  # slow enough to be killed while training
    "train": {**children.STUDY["train"], "steps": 800, "log_every": 80, "eval_every": 400, "checkpoint_every": 80},
    "axes": {"norm": ["none", "layer"]},
    "seeds": 2,
}
QUIET = "6"  # seconds without a heartbeat after which a machine is considered lost
TRAINS = "atn_norms.ablation.execution.trial"  # imported before a worker starts: may take over `QUIET` seconds


class Machines:
    """Processes with separate folders that share only the study; leaving the context ends them."""

    def __init__(self, place):
        self.place, self.programs = place, {}
        (place / "work").mkdir()
        self.scheduler = self._start("scheduler", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard")
        assert until(lambda: self._file.exists())

    @property
    def _file(self):
        return self.place / "work" / "scheduler.json"

    @property
    def address(self):
        return json.loads(self._file.read_text())["address"]

    def worker(self, name):
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name, "--preload", TRAINS]
        return self._start(name, "distributed.cli.dask_worker", *options)

    def _start(self, name, *command):
        surroundings = {"ATN_NORMS_SILENCE": QUIET}
        program = Program([*command, "--scheduler-file", self._file], self.place / "work" / name, **surroundings)
        self.programs[name] = program
        return program

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for program in self.programs.values():
            program.__exit__()


@pytest.fixture
def machines(place):
    with Machines(place) as machines:
        yield machines


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "study"
    assert ended(children.whole, folder, STUDY).error == ""
    return children.truth(folder)


@pytest.fixture
def with_short_silence(monkeypatch):
    monkeypatch.setattr(locks, "SILENCE", float(QUIET))
    monkeypatch.setattr(cluster, "PING", 4.0)
    monkeypatch.setattr(events, "RETRY", 0.5)


def trained_by(folder):
    """Return the processes that have started a trial."""
    return {trial.run["process"] for trial in load(folder).trials if trial.run}


@fault(
    "a training cluster: one worker machine killed, one stopped (SIGSTOP) until the study is done, two added",
    "other workers continue both trials from checkpoints; the stopped one drops its trial when it wakes; identical",
)
@pytest.mark.deep
def test_machines_leave_and_join(machines, place, truth, with_short_silence):
    folder = create(STUDY, place / "study")
    dies, stops = machines.worker("dies"), machines.worker("stops")
    events = []
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(run, folder, scheduler=machines.address, on_event=events.append)
        assert until(lambda: {dies.process.pid, stops.process.pid} <= trained_by(folder) or done.done())
        dies.signal(signal.SIGKILL)
        stops.signal(signal.SIGSTOP)
        for name in ("new", "newer"):
            machines.worker(name)
        record = done.result(PATIENCE)
    stops.signal(signal.SIGCONT)
    assert record.count("done") == 4, [trial.error for trial in record.trials]
    assert len([event for event in events if event.kind == "done"]) == 4
    assert any((trial.run or {}).get("attempts", 0) > 1 for trial in record.trials)
    assert until(lambda: stops.process.poll() is not None), "a worker that its scheduler has dropped ends"
    run(folder, workers=0)
    assert children.truth(folder) == truth


@fault("all workers of a cluster lost", "waits up to 10 minutes for new workers, then raises; finished trials are kept")
@pytest.mark.deep
def test_a_cluster_without_workers(machines, place, truth, with_short_silence, monkeypatch):
    monkeypatch.setattr(cluster, "DESERTED", 5.0)
    folder = create(STUDY, place / "study")
    worker = machines.worker("one")
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(run, folder, scheduler=machines.address)
        assert until(lambda: worker.process.pid in trained_by(folder))
        worker.signal(signal.SIGKILL)
        with pytest.raises(SpecError, match="got no worker of the Dask scheduler for 5 s; .* Finished trials are kept"):
            done.result(PATIENCE)
    assert ended(children.whole, folder, STUDY).error == ""
    assert children.truth(folder) == truth


@fault("the scheduler killed, or stopped", "one error message; resumed, identical")
@pytest.mark.deep
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_scheduler(number, machines, place, truth, with_short_silence, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 3.0)
    folder = create(STUDY, place / "study")
    worker = machines.worker("one")
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(run, folder, scheduler=machines.address)
        assert until(lambda: worker.process.pid in trained_by(folder))
        machines.scheduler.signal(number)
        with pytest.raises(SpecError, match="what is finished is kept"):
            done.result(PATIENCE)
    machines.scheduler.signal(signal.SIGCONT)
    assert ended(children.with_short_silence, 3.0, children.whole, folder, STUDY).error == ""
    assert children.truth(folder) == truth


@fault(
    "the run killed while a cluster trains for it",
    "the workers finish their current trials; a resumed run waits for these results; identical",
)
@pytest.mark.deep
def test_a_run_killed_while_a_cluster_trains(machines, place, truth):
    folder = create(STUDY, place / "study")
    worker = machines.worker("one")
    driver = Program(["atn_norms", "resume", folder, "--scheduler", machines.address], place / "work" / "driver")
    machines.programs["driver"] = driver
    assert until(lambda: worker.process.pid in trained_by(folder) or driver.process.poll() is not None)
    driver.signal(signal.SIGKILL)
    driver.ends()
    events = []
    record = run(folder, scheduler=machines.address, on_event=events.append)
    assert record.count("done") == 4
    assert children.truth(folder) == truth


@fault(
    "Ctrl-C to a run while a cluster trains for it",
    "the workers stop within seconds and accept other work; resumed, identical",
)
@pytest.mark.deep
def test_a_run_interrupted_while_a_cluster_trains(machines, place, truth):
    folder = create(STUDY, place / "study")
    worker = machines.worker("one")
    driver = Program(["atn_norms", "resume", folder, "--scheduler", machines.address], place / "work" / "driver")
    machines.programs["driver"] = driver
    assert until(lambda: worker.process.pid in trained_by(folder) or driver.process.poll() is not None)
    driver.signal_group(signal.SIGINT)
    assert driver.ends() == 130, driver.output()
    assert f"To resume: atn-norms resume {folder}" in driver.output()
    assert until(lambda: load(folder).count("running") == 0, limit=15)
    assert worker.process.poll() is None and "Traceback" not in driver.output()
    assert ended(children.whole, folder, STUDY).error == ""
    assert children.truth(folder) == truth
