"""Run studies in this process and in worker processes: failures, crashes and interrupts, as recorded in the store."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from atn_norms.ablation import create, load, resume, run, status
from atn_norms.ablation.execution import cluster, engine, events, trial, worker
from atn_norms.ablation.execution.environment import differences, versions
from atn_norms.ablation.store import locks
from atn_norms.ablation.store.files import Busy, StoreError
from atn_norms.ablation.store.folder import StudyFolder
from atn_norms.errors import SpecError
from tests.waiting import PATIENCE, until

STUDY = {
    "model": {"cell": "gru", "hidden_size": 3},
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 4, "batch_size": 5, "log_every": 1},
    "axes": {"norm": ["none", "layer", "rms"]},
    "seeds": 1,
}


@pytest.fixture
def study(tmp_path):
    return create(STUDY, tmp_path / "study")


def results(folder):
    return {trial.id: (folder / "trials" / trial.id / "result.json").read_bytes() for trial in load(folder).trials}


def test_a_study_runs_in_this_process_without_dask(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    events = []
    record = run(study, workers=0, on_event=events.append)
    assert record.count("done") == 3 and record == load(study)
    assert status(study) == {"done": 3, "diverged": 0, "failed": 0, "running": 0, "pending": 0}
    first = [event for event in events if event.trial == record.trials[0].id]
    assert [(event.kind, event.step) for event in first] == [
        ("started", 0), ("step", 1), ("step", 2), ("step", 3), ("step", 4), ("done", 4),
    ]  # fmt: skip
    assert first[0].point == {"task": "adding", "norm": "none", "seed": "0"}
    assert [(event.finished, event.total) for event in events if event.kind == "done"] == [(1, 3), (2, 3), (3, 3)]


def test_finished_trials_are_not_run_again(study):
    run(study, workers=0)
    before, events = results(study), []
    resume(study, workers=0, on_event=events.append)
    assert events == [] and results(study) == before


def dask_cluster(workers) -> Any:
    """Start a Dask scheduler with its workers in this process."""
    from distributed import LocalCluster

    return LocalCluster(n_workers=workers, processes=False, dashboard_address=None)  # type: ignore[arg-type]


def test_a_running_scheduler_is_used(study):
    with dask_cluster(1) as running:
        record = run(study, scheduler=running.scheduler_address)
    assert record.count("done") == 3


@pytest.mark.parametrize(("protocol", "warned"), [("tcp://", True), ("tls://", False)])
def test_a_scheduler_without_encryption_is_warned_about(protocol, warned, study, caplog):
    from dask import config
    from distributed import LocalCluster
    from distributed.security import Security

    security = Security.temporary()
    tls = "distributed.comm.tls."
    certificate = {f"{tls}client.key": security.tls_client_key, f"{tls}client.cert": security.tls_client_cert}
    certificate |= {f"{tls}ca-file": security.tls_ca_file}
    cluster: Any = LocalCluster(
        n_workers=1,
        processes=False,
        protocol=protocol,
        security=security if protocol == "tls://" else None,
        dashboard_address=None,  # type: ignore[arg-type]
    )
    with cluster as running, config.set(certificate):
        assert run(study, scheduler=running.scheduler_address).count("done") == 3
    assert ("is not encrypted; anyone who can reach its port can run code as you" in caplog.text) == warned


def test_steps_and_losses_are_read_from_the_store(study, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    monkeypatch.setattr(cluster, "POLL", 0.02)
    advance = trial.Trainer.advance
    monkeypatch.setattr(trial.Trainer, "advance", lambda trainer: time.sleep(0.1) or advance(trainer))
    seen = []
    with dask_cluster(1) as running:
        run(study, scheduler=running.scheduler_address, on_event=seen.append)
    steps = [event for event in seen if event.kind == "step"]
    curves = {each.id: {line["step"]: line["train_loss"] for line in each.curve} for each in load(study).trials}
    assert {event.trial for event in steps} == set(curves)
    assert all(event.loss in curves[event.trial].values() for event in steps), "the last loss that was measured"


def test_a_scheduler_out_of_reach_is_named(study, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT", 1)
    with pytest.raises(SpecError, match=r"scheduler: got tcp://127.0.0.1:9, which cannot be reached"):
        run(study, scheduler="tcp://127.0.0.1:9")


@pytest.mark.parametrize("address", ["", "nonsense", "nonsense://x", "tcp://x", "tcp://:1", "tcp://x:y", "x y:1"])
def test_an_invalid_address_is_rejected_at_once(study, address):
    with pytest.raises(SpecError, match="expected an address such as tcp://host:port"):
        run(study, scheduler=address)


@pytest.mark.parametrize(
    "address", [None, "host:1", "tcp://10.0.0.1:8786", "tls://a.b:1", "tcp://[::1]:1", "inproc://1/2"]
)
def test_a_possible_address_is_tried(address):
    engine.check_scheduler(address)


def test_waiting_for_a_cluster_without_workers_has_a_limit(study, monkeypatch):
    monkeypatch.setattr(cluster, "WORKERLESS", 0.2)
    with dask_cluster(0) as empty, pytest.raises(SpecError, match="got no worker of the Dask scheduler for 0 s"):
        run(study, scheduler=empty.scheduler_address)
    assert status(study)["pending"] == 3


def test_local_workers_print_no_warnings(study, capfd):
    with contextlib.ExitStack() as stack:
        dashboards = stack.enter_context(socket.socket())
        with contextlib.suppress(OSError):  # another process may use the port
            dashboards.bind(("", 8787))
            dashboards.listen()
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        assert run(study, workers=1).count("done") == 3
    assert [str(each.message) for each in caught] == []
    assert capfd.readouterr() == ("", "")


def test_without_dask_one_line_names_the_extra(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SpecError, match=r"pip install 'atn-norms\[ablation\]'") as caught:
        run(study)
    assert "\n" not in str(caught.value)


def test_invalid_arguments_are_rejected(study, tmp_path):
    wrong: Any
    for wrong in (1.5, "2", True, None):
        with pytest.raises(SpecError, match="workers: got .*; expected a whole number"):
            run(study, workers=wrong)
    with pytest.raises(SpecError, match="workers: got -1; expected at least 0"):
        run(study, workers=-1)
    with pytest.raises(StoreError, match="nowhere: got no such folder; expected a study's folder"):
        run(tmp_path / "nowhere")


def test_two_runs_in_one_folder(study):
    def intrude(event):
        if intruded:
            return
        with pytest.raises(Busy, match="another run is at work on this study"):
            run(study, workers=0)
        intruded.append(event)

    intruded = []
    assert run(study, workers=0, on_event=intrude).count("done") == 3
    assert intruded


def test_an_interrupt_stops_at_once_and_a_resume_gives_the_same_bytes(study, tmp_path):
    run(study, workers=0)

    def interrupt(event):
        if event.finished == 1 and event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    other = create(STUDY, tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        run(other, workers=0, on_event=interrupt)
    assert [trial.status for trial in load(other).trials] == ["done", "pending", "pending"]
    resume(other, workers=0)
    assert results(other) == results(study)


def test_a_failing_trial_is_shown_and_the_others_continue(study, monkeypatch):
    train = worker.run_trial
    second = load(study).trials[1]

    def fail_once(folder, *rest):
        if folder.id == second.id:
            raise RuntimeError("the norm's own\nfault")
        return train(folder, *rest)

    events = []
    monkeypatch.setattr(worker, "run_trial", fail_once)
    record = run(study, workers=0, on_event=events.append)
    assert [trial.status for trial in record.trials] == ["done", "failed", "done"]
    error = record.trials[1].error
    assert error is not None and error["error"] == "RuntimeError: the norm's own fault"
    assert "in fail_once" in error["traceback"]
    assert [event.message for event in events if event.kind == "failed"] == ["RuntimeError: the norm's own fault"]
    monkeypatch.undo()
    record = resume(study, workers=0)
    assert record.count("done") == 3 and record.trials[1].error is None
    assert not (study / "trials" / second.id / "error.json").exists()


def test_a_store_that_cannot_be_written_ends_the_run(study, monkeypatch):
    def full(folder, *rest):
        raise StoreError("cannot write x: No space left on device")

    monkeypatch.setattr(worker, "run_trial", full)
    with pytest.raises(StoreError, match="No space left on device"):
        run(study, workers=0)
    assert status(study)["pending"] == 3, "no trial is recorded as failed"


def test_a_run_waits_for_a_trial_of_another_process(study, monkeypatch):
    monkeypatch.setattr(events, "RETRY", 0.1)
    first, seen, other = StudyFolder(study).trial(load(study).trials[0].id), [], contextlib.ExitStack()
    other.enter_context(first.lock())

    def see(event):
        seen.append((event.kind, event.trial))
        if event.finished == 2 and event.kind == "done":
            assert sorted(path.name for path in first.path.iterdir()) == [".lock", "trial.json"], "nothing is written"
            other.close()

    assert run(study, workers=0, on_event=see).count("done") == 3
    assert [kind for kind, trial in seen if trial == first.id and kind != "step"] == ["started", "busy", "done"]


def test_versions_that_differ_are_named(study):
    folder = StudyFolder(study).trial(load(study).trials[0].id)
    result = worker.attempt(folder, {**versions(), "torch": "1.0"}, print)
    assert result == {}
    error = load(study).trials[0].error
    assert error is not None and "instead of 1.0; expected the versions of the computer" in error["error"]
    assert differences({"a": "1"}, {"a": "1"}) == ""


@pytest.mark.parametrize("code", [0, 3])
def test_a_trial_that_calls_sys_exit_fails_and_the_others_continue(study, monkeypatch, code):
    train, exiting = worker.run_trial, load(study).trials[0].id

    def exits(folder, *arguments):
        if folder.id == exiting:
            sys.exit(code)
        train(folder, *arguments)

    monkeypatch.setattr(worker, "run_trial", exits)
    record = run(study, workers=0)
    assert record.count("failed") == 1 and record.count("done") == 2
    error = record.trials[0].error
    assert error is not None
    assert error["error"] == f"SystemExit: the trial called sys.exit({code}); expected a return or an exception"
    assert "in exits" in error["traceback"]


def test_sys_exit_in_a_callback_ends_the_run(study):
    def stop(event):
        if event.kind == "step":
            sys.exit(7)

    with pytest.raises(SystemExit, match="7"):
        run(study, workers=0, on_event=stop)
    assert load(study).count("failed") == 0


PLUGIN = """
import os, signal
from typing import Literal
from atn_norms import LayerNorm, NormSpec, hookimpl

class Raising(LayerNorm):
    def measure(self, x):
        raise ArithmeticError("no statistic today")

class Killing(LayerNorm):
    def measure(self, x):
        os.kill(os.getpid(), signal.SIGKILL)

class RaisingSpec(NormSpec):
    kind: Literal["raising"] = "raising"
    def build(self, features):
        return Raising(features)

class KillingSpec(NormSpec):
    kind: Literal["killing"] = "killing"
    def build(self, features):
        return Killing(features)

@hookimpl
def atn_norms_register(registry):
    registry.normalizer(RaisingSpec)
    registry.normalizer(KillingSpec)
"""

PROGRAM = """
import sys
from atn_norms.ablation import create, run

def show(event):
    print(event.kind, event.trial, event.step, flush=True)

if __name__ == "__main__":
    study = eval(sys.argv[2])
    folder = create(study, sys.argv[1]) if study else sys.argv[1]
    try:
        run(folder, workers=2, on_event=show)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.fixture
def program(tmp_path):
    """Start a program that runs a study with two processes and an installed plugin with two faulty norms."""
    site = tmp_path / "site"
    info = site / "bad_norms-1.5.dist-info"
    info.mkdir(parents=True)
    (site / "bad_norms.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-norms\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[atn_norms]\nbad = bad_norms\n")
    path = os.pathsep.join(filter(None, [str(site), os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))

    def start(folder, study=None):
        return subprocess.Popen(
            [sys.executable, script, folder, repr(study)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # separate process group: an interrupt reaches its workers, as from a terminal
        )

    return start


@pytest.mark.deep
def test_faulty_norms_fail_without_affecting_other_trials(program, tmp_path, study):
    folder = tmp_path / "bad"
    process = program(folder, {**STUDY, "axes": {"norm": ["killing", "raising", "none", "layer", "rms"]}})
    output, _ = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, output
    record = load(folder)
    assert [trial.status for trial in record.trials] == ["failed", "failed", "done", "done", "done"], output
    killing, raising, *_ = record.trials
    assert "worker process died twice" in killing.error["error"]  # type: ignore[index]
    assert raising.error["error"] == "ArithmeticError: no statistic today"  # type: ignore[index]
    assert "bad_norms.py" in raising.error["traceback"]  # type: ignore[index]
    assert all(trial.run["versions"]["bad-norms"] == "1.5" for trial in record.trials)  # type: ignore[index]
    run(study, workers=0)
    mine = results(study)
    here = {trial.id: (folder / "trials" / trial.id / "result.json").read_bytes() for trial in record.trials[2:]}
    assert here == mine, "a worker process writes the same bytes as this process"


@pytest.mark.deep
def test_an_interrupt_stops_all_processes(program, tmp_path):
    folder = tmp_path / "study"
    process = program(folder, {**STUDY, "train": {"steps": 100_000, "batch_size": 5, "log_every": 1}})
    for line in process.stdout:
        if line.startswith("step"):
            break
    assert until(lambda: any(trial.run for trial in load(folder).trials))
    workers = {trial.run["process"] for trial in load(folder).trials if trial.run}
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert "interrupted" in output and "Traceback" not in output, output
    stopped = {"done": 0, "diverged": 0, "failed": 0, "running": 0, "pending": 3}
    assert until(lambda: status(folder) == stopped), status(folder)
    assert until(lambda: not any(map(mask, workers)))


def mask(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def listening_ports(processes):
    """Return the TCP ports on which these processes listen, from /proc."""
    inodes = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(words[1].partition(":")[2], 16) for words in lines if words[3] == "0A" and words[9] in inodes}


def test_no_port_of_a_local_cluster_answers_without_its_certificate():
    from distributed import Client
    from distributed.security import Security

    from atn_norms.ablation.execution.local_cluster import local_cluster

    before = listening_ports([os.getpid()])
    running: Any = local_cluster(1)
    with running, Client(running) as client:
        workers: Any = client.run(os.getpid)
        (worker,) = workers.values()
        ports = listening_ports([os.getpid(), worker]) - before
        assert len(ports) == 3, "the scheduler, its worker, and the process that watches over the worker"
        for port in ports:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
                connection.sendall(b"GET /info/main/workers.html HTTP/1.0\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    assert b"HTTP" not in connection.recv(100)
        for scheme, security in (("tcp", Security()), ("tls", Security.temporary())):
            address = f"{scheme}://127.0.0.1:{running.scheduler.port}"
            with pytest.raises((OSError, TimeoutError)):
                Client(address, security=security, timeout=2)


KILLED_WHILE_STARTING = """
import os, signal
try:
    os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_killed_while_it_starts_is_started_again(study, tmp_path):
    from dask import config

    preload = KILLED_WHILE_STARTING.format(marker=str(tmp_path / "killed"))
    with config.set({"distributed.worker.preload": [preload]}):
        assert run(study, workers=1).count("done") == 3
    assert (tmp_path / "killed").exists()


def test_workers_that_never_start_give_one_message(study):
    from dask import config

    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    expected = r"^workers: got a local process that ended while starting, 3 times .* Finished trials are kept. To"
    with config.set({"distributed.worker.preload": [kill]}), pytest.raises(SpecError, match=expected):
        run(study, workers=1)
    assert status(study)["pending"] == 3
