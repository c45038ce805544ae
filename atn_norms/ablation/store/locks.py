"""Locks that die with their holder, and the holder's pulse: that it lives, and how far it is.

A lock is a file held by `flock`, which the kernel drops with the process. Where the holder is on another machine, the
kernel here may not know, and a machine may vanish or stand still while it holds one. So the holder writes a line into the
file every second, and one that has been silent for `SILENCE` seconds counts as gone: whoever wants the lock puts a new file
in its place. Should the old holder wake up, its own file is no longer the one at the path, and it lets go.
"""  # noqa: E501

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atn_norms.ablation.store.failpoints import failpoint
from atn_norms.ablation.store.files import Busy, named, temporary
from atn_norms.errors import SpecError, short_repr

BEAT = 1.0  # seconds between two lines
ROOM = 512  # bytes of a line, filled up with spaces so that a shorter one leaves nothing of a longer one


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    with suppress(ValueError):
        if not text or 0 < float(text) < float("inf"):
            return float(text or default)
    raise SpecError(f"{variable}: must be a number of seconds above 0, got {short_repr(text)}")


SILENCE = _seconds("ATN_NORMS_SILENCE", 120.0)


@dataclass(frozen=True)
class Heartbeat:
    """What the holder of a lock said last.

    | field | meaning |
    |---|---|
    | `holder` | host, process and a random word: another one for each time a lock is taken |
    | `machine` | which running kernel the holder is on; there its `flock` can be trusted |
    | `beat` | counts the seconds |
    | `step`, `loss` | training steps taken and the last training loss, None before the first |
    """

    holder: str
    machine: str
    beat: int
    step: int | None = None
    loss: float | None = None


class Lock:
    """A lock that this process holds; `step` and `loss` are told with the next beat."""

    def __init__(self, path: Path, descriptor: int, orphaned: bool) -> None:
        self.path, self.descriptor = path, descriptor
        self.orphaned = orphaned  # the holder before never said that it let go, and may still be about
        self.holder = f"{platform.node()[:64]}/{os.getpid()}/{secrets.token_hex(4)}"
        self.beat = 0
        self.step: int | None = None
        self.loss: float | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"pulse of {path}", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether another process has put its own lock in the place of this one."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return True

    def start(self) -> None:
        """Say for the first time who holds the lock, and go on in a thread; where it cannot, no empty file stays."""
        try:
            failpoint(f"{self.path.name}:taken")
            self._tell()
        except OSError:
            if os.fstat(self.descriptor).st_size == 0 and not self.lost:
                self.path.unlink()
            raise
        failpoint(f"{self.path.name}:told")
        self._thread.start()

    def end(self) -> None:
        """Say that the lock is about to be free: whoever works for its holder may stop."""
        self._released.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):  # an empty file only spares others the wait for silence
            os.ftruncate(self.descriptor, 0)
            failpoint(f"{self.path.name}:ended")

    def release(self) -> None:
        """Let go."""
        try:
            self.end()
        finally:
            os.close(self.descriptor)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            self.beat += 1
            with suppress(OSError):  # such as a full disk: a line that is not written is a beat missed, no more
                self._tell()

    def _tell(self) -> None:
        said = {"holder": self.holder, "machine": machine(), "beat": self.beat, "step": self.step, "loss": self.loss}
        os.pwrite(self.descriptor, json.dumps(said).encode().ljust(ROOM - 1) + b"\n", 0)


@cache
def machine() -> str:
    """The running kernel, by its own random name; the host's name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def heartbeat(path: Path) -> Heartbeat | None:
    """What the holder of a lock said last; None where it let go, or there never was one."""
    try:
        said = json.loads(path.read_bytes() or b"null")
        return None if said is None else Heartbeat(**said)
    except (OSError, ValueError, TypeError):  # not there, or just being written
        return None


def staleness(path: Path) -> float:
    """The seconds since the holder of a lock said something, by the clock of the file system, which all share."""
    said, probe = path.stat().st_mtime, temporary(path)
    try:
        probe.touch(exist_ok=False)
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # only looking, in a folder that cannot be written
        now = time.time()
    return now - said


@contextmanager
def hold(path: Path, busy: str, *, patience: float = 1.0, take_over: bool = True) -> Iterator[Lock]:
    """Hold a lock while inside.

    | symbol | meaning | unit |
    |---|---|---|
    | `busy` | what to say when another process holds it | |
    | `patience` | how long to try: a `held` that only asks may be in the way for an instant | seconds |
    | `take_over` | whether a silent holder on this machine loses it, too; one elsewhere always does | |

    Errors: `Busy` where a living process holds it; `StoreError` where the file cannot be written.
    """
    deadline = time.monotonic() + patience
    with named("lock", path):
        failpoint(f"{path.name}:begin")
        while (mine := _take(path, take_over)) is None:
            if time.monotonic() >= deadline:
                raise Busy(busy + whose(path, take_over))
            time.sleep(0.02)
    try:
        with named("write", path):
            mine.start()
        yield mine
    finally:
        mine.release()


def is_locked(path: Path) -> bool:
    """Whether some process holds a lock, as far as this machine and its pulse say."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        said = heartbeat(path)
        if said is not None and said.machine != machine():
            return staleness(path) < SILENCE
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _take(path: Path, take_over: bool) -> Lock | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        said = heartbeat(path)
        if _try(descriptor, fcntl.LOCK_EX):
            same = os.path.samestat(os.stat(path), os.fstat(descriptor))  # or it was replaced since it was opened
            if same and (said is None or said.machine == machine()):
                mine, descriptor = Lock(path, descriptor, orphaned=said is not None), -1
                return mine
            if not same:
                return None
        may = said is not None and (take_over or said.machine != machine())
        return _replace(path) if may and staleness(path) >= SILENCE else None
    except FileNotFoundError:  # somebody is just replacing it
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _replace(path: Path) -> Lock:
    """Put a new file, held from its first moment, where a silent holder's is."""
    new = temporary(path)
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _try(descriptor, fcntl.LOCK_EX)
        os.replace(new, path)
    except BaseException:
        os.close(descriptor)
        new.unlink(missing_ok=True)
        raise
    return Lock(path, descriptor, orphaned=True)


def whose(path: Path, take_over: bool) -> str:
    """Who holds a lock, in brackets, and when it counts as gone, where it ever does; empty where nobody says."""
    said = heartbeat(path)
    if said is None:
        return ""
    host, process, _ = said.holder.rsplit("/", 2)
    told = f"process {process} on {host}"
    with suppress(OSError):
        told += f", silent for {max(0.0, staleness(path)):.0f} s"
    if take_over or said.machine != machine():
        told += f"; gone after {SILENCE:.0f} s of silence"
    return f" ({told})"


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
