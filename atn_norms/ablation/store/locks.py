"""Locks that end with their process, and the heartbeat of the holder, which also reports its progress.

A lock is a file held by `flock`, which the kernel releases when the process ends. `flock` may not work between
machines, and a machine may disappear or stop while it holds a lock. So the holder writes a line into the file every
second. A holder without a new line for `SILENCE` seconds counts as gone, and another process may replace the file by
a new one. If the old holder continues, it detects that its file is no longer in the folder, and stops. Two machines
that take a free lock in the same instant, without a common `flock`, read each other's lines, and one of them stops.
"""

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
from functools import cache
from pathlib import Path

from atn_norms.ablation.store.failpoints import failpoint
from atn_norms.ablation.store.files import Busy, Folder, StoreError, named, parse_json, temporary
from atn_norms.ablation.store.schema import Heartbeat, check
from atn_norms.errors import SpecError, short_repr

NAME = ".lock"
BEAT = 1.0  # seconds between two heartbeats
ROOM = 512  # bytes of a line, padded with spaces so that it overwrites a longer one completely


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    with suppress(ValueError):
        if not text or 0 < float(text) < float("inf"):
            return float(text or default)
    raise SpecError(variable, short_repr(text), "a number of seconds above 0")


SILENCE = _seconds("ATN_NORMS_SILENCE", 120.0)


class Lock:
    """A lock that this process holds; `step` and `loss` are written with the next heartbeat."""

    def __init__(self, folder: Folder, descriptor: int, orphaned: bool) -> None:
        self.folder, self.path, self.descriptor = folder, folder.path / NAME, descriptor
        self.orphaned = orphaned  # the previous holder did not release it, and may still run
        host = "".join(each for each in platform.node()[:64] if each.isprintable() and each != "/")
        self.holder = f"{host}/{os.getpid()}/{secrets.token_hex(4)}"
        self.beat = 0
        self.rival: Heartbeat | None = None  # of a process that holds the same file, and keeps it
        self.step: int | None = None
        self.loss: float | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat of {self.path}", daemon=True)

    @property
    def lost(self) -> bool:
        """True if the folder no longer contains the file of this lock, or another process holds it as well."""
        return self.rival is not None or not _is_same(self.folder, self.descriptor)

    def describe_loss(self) -> str:
        """Return the reason why the lock is lost, as a sentence."""
        folder = self.folder.path
        if self.rival is not None:
            return f"{folder}: {_process(self.rival)} has it too; expected `flock` to work between machines"
        try:
            os.getcwd()
        except FileNotFoundError:
            if not folder.is_absolute():
                return f"{folder}: the working directory was removed while the study ran"
        if not folder.is_dir():
            return f"{folder}: the folder was renamed or removed while the study ran; resume it where it is now"
        if not self.folder.has(NAME):
            return f"{self.path}: the lock was removed while the study ran"
        return f"{folder}: taken over by another process, since this one wrote no heartbeat for {SILENCE:.0f} s"

    def start(self) -> None:
        """Write the first heartbeat, and continue in a thread; if the write fails, remove the file."""
        try:
            failpoint(f"{NAME}:taken")
            self._write()
        except OSError:
            if os.fstat(self.descriptor).st_size == 0 and not self.lost:
                self.folder.remove(NAME)
            raise
        failpoint(f"{NAME}:written")
        self._thread.start()

    def end(self) -> None:
        """Empty the file, which marks a regular release: worker processes of this one may stop."""
        self._released.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):  # the empty file only saves others the wait for `SILENCE` seconds
            os.ftruncate(self.descriptor, 0)
            failpoint(f"{NAME}:ended")

    def release(self) -> None:
        """Release the lock."""
        try:
            self.end()
        finally:
            os.close(self.descriptor)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            self.beat += 1
            with suppress(OSError):  # such as a full disk, which costs one heartbeat only
                last = _heartbeat(self.descriptor)
                if last is not None and last.holder < self.holder:  # of two holders, the first by name keeps the lock
                    self.rival = last
                self._write()

    def _write(self) -> None:
        line = {"holder": self.holder, "machine": machine(), "beat": self.beat, "step": self.step, "loss": self.loss}
        os.pwrite(self.descriptor, json.dumps(line).encode().ljust(ROOM - 1) + b"\n", 0)


@cache
def machine() -> str:
    """Return the boot id of the running kernel, or the host name if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()[:256]


def heartbeat(folder: Folder) -> Heartbeat | None:
    """Return the last heartbeat of a folder's lock; None if it is released, damaged, or being written."""
    try:
        descriptor = folder.open(NAME)
    except OSError:
        return None
    try:
        return _heartbeat(descriptor)
    finally:
        os.close(descriptor)


def _heartbeat(descriptor: int) -> Heartbeat | None:
    try:
        value = parse_json(os.pread(descriptor, ROOM, 0) or b"null", NAME)
        return None if value is None else check(Heartbeat, value, NAME)
    except OSError:
        return None


def staleness(folder: Folder) -> float:
    """Return the seconds since the last heartbeat, by the clock of the file system, which all machines share.

    A time in the future, after the clock was set back, is replaced by the present. The heartbeat of a running holder
    does so within a second; the lock of a dead holder is free `SILENCE` seconds later.
    """
    descriptor = folder.open(NAME)
    try:
        written, now = os.fstat(descriptor).st_mtime, _file_system_time(folder)
        if written > now + BEAT:
            with suppress(OSError):  # only looking, in a folder that cannot be written
                os.utime(descriptor)
        return max(0.0, now - written)
    finally:
        os.close(descriptor)


def _file_system_time(folder: Folder) -> float:
    probe = temporary(NAME)
    try:
        with folder.opened() as opened:
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=opened)
            try:
                return os.fstat(descriptor).st_mtime
            finally:
                os.close(descriptor)
                os.unlink(probe, dir_fd=opened)
    except OSError:  # only looking, in a folder that cannot be written
        return time.time()


@contextmanager
def hold(folder: Folder, busy: str, *, patience: float = 1.0, take_over: bool = True) -> Iterator[Lock]:
    """Hold the lock of a folder inside the block.

    | symbol | meaning | unit |
    |---|---|---|
    | `busy` | the error's text when another process holds it | |
    | `patience` | time to retry, since a call of `is_locked` holds the lock for an instant | seconds |
    | `take_over` | True: replace a silent holder on this machine too; on another machine it is always replaced | |

    Errors: `Busy` while a running process holds the lock; `StoreError` if the file cannot be written.
    """
    path = folder.path / NAME
    deadline = time.monotonic() + patience
    with named("lock", path):
        failpoint(f"{NAME}:begin")
        while (mine := _take(folder, take_over)) is None:
            if time.monotonic() >= deadline:
                raise Busy(busy + describe_holder(folder, take_over))
            time.sleep(0.02)
    try:
        with named("write", path):
            mine.start()
        yield mine
    finally:
        mine.release()


def is_locked(folder: Folder) -> bool:
    """Return True if a process holds a folder's lock, as far as this machine and the heartbeat show.

    Errors: `StoreError` if the lock is not a regular file.
    """
    try:
        descriptor = folder.open(NAME)
    except StoreError:
        raise
    except OSError:
        return False
    try:
        last = _heartbeat(descriptor)
        if last is not None and last.machine != machine():
            return staleness(folder) < SILENCE
        return not _try(descriptor, fcntl.LOCK_SH)
    except FileNotFoundError:  # removed after it was opened
        return False
    finally:
        os.close(descriptor)


def _take(folder: Folder, take_over: bool) -> Lock | None:
    descriptor = folder.open(NAME, os.O_RDWR | os.O_CREAT)
    try:
        last = _heartbeat(descriptor)
        if _try(descriptor, fcntl.LOCK_EX):
            if not _is_same(folder, descriptor):  # replaced after it was opened
                return None
            if last is None or last.machine == machine():
                mine, descriptor = Lock(folder, descriptor, orphaned=last is not None), -1
                return mine
        may = last is not None and (take_over or last.machine != machine())
        return _replace(folder) if may and staleness(folder) >= SILENCE else None
    except FileNotFoundError:  # another process is replacing it
        return None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _is_same(folder: Folder, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(NAME), os.fstat(descriptor))
    except OSError:
        return False


def _replace(folder: Folder) -> Lock:
    """Replace the file of a silent holder by a new file, which is locked before it is visible."""
    new = temporary(NAME)
    with folder.opened() as opened:
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=opened)
        try:
            _try(descriptor, fcntl.LOCK_EX)
            os.replace(new, NAME, src_dir_fd=opened, dst_dir_fd=opened)
        except BaseException:
            os.close(descriptor)
            with suppress(FileNotFoundError):
                os.unlink(new, dir_fd=opened)
            raise
    return Lock(folder, descriptor, orphaned=True)


def describe_holder(folder: Folder, take_over: bool) -> str:
    """Return the holder of a lock in brackets, with its silence or its time limit; empty if unknown."""
    last = heartbeat(folder)
    if last is None:
        return ""
    text = _process(last)
    with suppress(OSError):
        text += f", silent for {staleness(folder):.0f} s"
    if take_over or last.machine != machine():
        text += f"; gone after {SILENCE:.0f} s of silence"
    return f" ({text})"


def _process(last: Heartbeat) -> str:
    host, process, _ = last.holder.rsplit("/", 2)
    return f"process {process} on {host}"


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
