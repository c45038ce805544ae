"""Programs that run beside the test, each in a session of its own, and what is left of them."""

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
    """`python -m ...`, with all its output in a file; what is left of it is killed at the end of a `with`."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path, **surroundings: str) -> None:
        folder.mkdir(exist_ok=True)
        self.said = folder / "said.txt"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(self.said, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, arguments)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **surroundings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # jobs in the background of a shell would ignore Ctrl-C
            )

    def output(self) -> str:
        return self.said.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def everybody(self, number: int) -> None:
        """Send a signal to the program and all it started, as a terminal does."""
        os.killpg(self.process.pid, number)

    def ends(self) -> int:
        return self.process.wait(PATIENCE)

    def members(self) -> list[int]:
        """The processes of its session that are still there."""
        return [pid for pid, session, state in _processes() if session == self.process.pid and state != "Z"]

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
