"""Subprocesses that run during a test, each in a separate session that is killed at the end."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


class Program:
    """Subprocess `python -m ...` with its output in a file; leaving the context kills its session."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "output.txt"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, arguments)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # background jobs of a shell ignore Ctrl-C
            )

    def output(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal to the whole process group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def ends(self) -> int:
        return self.process.wait(PATIENCE)

    def members(self) -> list[int]:
        """Return the running processes of the session."""
        return [pid for pid, session, state in _processes() if session == self.process.pid and state != "Z"]

    def states(self) -> str:
        """Return the state letters of the session's processes, as in /proc: T is stopped."""
        return "".join(state for _, session, state in _processes() if session == self.process.pid)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _processes() -> Iterator[tuple[int, int, str]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, _group, session = path.read_text().rpartition(")")[2].split()[:4]
            yield int(path.parent.name), int(session), state
