"""Child processes that run a study and may be killed; forked from a server process that has imported torch."""

import contextlib
import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it, which takes seconds; imported once, in the server

from atn_norms.ablation import create, load, run
from atn_norms.ablation.execution import trial
from atn_norms.ablation.execution.environment import versions
from atn_norms.ablation.execution.worker import attempt
from atn_norms.ablation.store import locks
from atn_norms.ablation.store.files import Folder
from atn_norms.ablation.store.folder import StudyFolder
from tests.faults.failing import arm
from tests.waiting import PATIENCE, until

STUDY: dict[str, Any] = {
    "model": {"cell": "lstm", "norm": "layer", "hidden_size": 3, "dropout": 0.2, "num_layers": 2},
    "task": {"kind": "adding", "length": 4, "train": 20, "validation": 5, "test": 5},
    "train": {"steps": 6, "batch_size": 5, "log_every": 1, "eval_every": 3, "checkpoint_every": 2},
    "seeds": 1,
}
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Outcome:
    """Exit of a child: `code` is negative for a signal, `result` the return value, `error` the exception as text."""

    code: int | None
    result: Any
    error: str


class Child:
    """A process that runs `target(*arguments)` with a fault armed; always killed at the end of a `with`."""

    def __init__(self, target: Callable, *arguments: Any, fault: str | None = None) -> None:
        here, there = CONTEXT.Pipe(duplex=False)
        self._pipe = here
        self.process = CONTEXT.Process(target=_live, args=(there, fault, target, arguments))
        self.process.start()
        there.close()

    def outcome(self) -> Outcome:
        """Wait until the child ends, and return its outcome."""
        result: tuple[Any, str] = (None, "")
        with contextlib.suppress(EOFError):
            if self._pipe.poll(PATIENCE):
                result = self._pipe.recv()
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "hangs"
        return Outcome(self.process.exitcode, *result)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stopped(self) -> bool:
        """Return True once the process is stopped by SIGSTOP."""
        status = Path(f"/proc/{self.process.pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] == "T"

    def stands_still(self) -> None:
        assert until(lambda: self.stopped() or not self.process.is_alive()) and self.process.is_alive()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()


def ended(target: Callable, *arguments: Any, fault: str | None = None) -> Outcome:
    """Run a child to its end."""
    with Child(target, *arguments, fault=fault) as child:
        return child.outcome()


def _live(pipe: Any, fault: str | None, target: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    arm(fault)
    try:
        pipe.send((target(*arguments), ""))
    except BaseException as error:  # noqa: BLE001  the test inspects every exception
        pipe.send((None, f"{type(error).__name__}: {error}"))


def whole(folder: Path, study: dict[str, Any] = STUDY) -> dict[str, int]:
    """Create or open a study and train all its trials in one process, like `atn-norms ablate`."""
    record = run(create(study, folder), workers=0)
    return {status: record.count(status) for status in ("done", "failed", "running", "pending")}


def failing(folder: Path) -> dict[str, int]:
    """Run `whole`, where every trial raises in its third step."""
    advance = trial.Trainer.advance

    def fail_at_third_step(trainer: trial.Trainer) -> Any:
        if trainer.step == 2:
            raise ArithmeticError("no third step")
        return advance(trainer)

    trial.Trainer.advance = fail_at_third_step  # type: ignore[method-assign]  the process ends soon
    return whole(folder)


def dying_at(folder: Path, step: int) -> None:
    """Run a study, and kill the process after this step."""

    def die(event: Any) -> None:
        if event.kind == "step" and event.step >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, workers=0, on_event=die)


def starved(folder: Path, most: int) -> dict[str, int]:
    """Run `whole`, where no file may exceed `most` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return whole(folder)


def unprivileged(folder: Path) -> None:
    """Run `whole` as a user without permissions on the folder; root switches to uid 65534 first."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as other:
        whole(Path(other) / "study")  # import late-loaded modules while they are readable
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    run(folder, workers=0) if folder.exists() else whole(folder)


def with_short_silence(silence: float, target: Callable, *arguments: Any) -> Any:
    """Call `target` in a process that considers locks stale after `silence` seconds."""
    locks.SILENCE = silence
    return target(*arguments)


def one_trial(folder: Path, identity: str) -> dict[str, str]:
    """Train one trial like a worker process."""
    return attempt(StudyFolder(folder).trial(identity), versions(), lambda step: None)


def truth(folder: Path) -> dict[str, bytes]:
    """Return the files that a kill must not change: all but times, logs and the environment."""
    free = {"run.json", "log.txt", ".lock", "environment.json"}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in free)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def identities(folder: Path) -> list[str]:
    return [each.id for each in load(folder).trials]


@contextlib.contextmanager
def ready() -> Iterator[None]:
    """Start the fork server with all modules preloaded."""
    root = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, before]))
    try:
        CONTEXT.set_forkserver_preload(["pytest", "tests.faults.children"])
        forkserver.ensure_running()
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def hold_and_die(path: Path) -> None:
    """Kill this process while it holds a lock."""
    with locks.hold(Folder(path), "taken"):
        os.kill(os.getpid(), signal.SIGKILL)
