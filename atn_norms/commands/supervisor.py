"""Run the command line in a child process, so that its end without a result is reported.

A plugin, or a library that it loads, may call `exit` or `_exit` in compiled code. No code inside the process can report
such an end: the exit code would be 0, without output. The parent of the command waits, passes signals on, and ends with
the exit code or signal of the child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from atn_norms.commands.output import emit

FINISHED = b"\0"  # written to the pipe once the command has returned or raised
PAUSE = 0.1  # seconds before a signal is passed on: a signal to the whole process group ends the child without it
PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
WATCHED = (*PASSED_ON, signal.SIGCHLD)
PR_SET_PDEATHSIG = 1
LOG = logging.getLogger("atn_norms.plugins")  # names each plugin before it is loaded


def supervised(command: Callable[[], int]) -> int:
    """Run `command` in a forked child and return its exit code there; this process ends with the code or signal.

    An end of the child before `command` returned is reported on standard error; its exit code is at least 2. Where a
    process cannot be forked safely (other systems than Linux, several threads), `command` runs in this process.
    """
    if sys.platform != "linux" or len(os.listdir("/proc/self/task")) > 1:
        with _reported_exit(lambda: None):
            return command()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()  # or the child would write it again
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask, parent = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED), os.getpid()
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        _end_like(_wait(child), reader)
    os.close(reader)
    _end_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def finish() -> None:
        with contextlib.suppress(OSError):
            os.write(writer, FINISHED)

    try:
        with _reported_exit(finish), _named_plugins(writer):
            return command()
    finally:
        finish()


def _wait(child: int) -> int:
    """Pass signals on to the child until it ends; return its exit code, negative for a signal."""
    while True:
        received = signal.sigwaitinfo(WATCHED)
        number = received.si_signo
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        elif received.si_code <= 0:  # by a process; the terminal signals the child too
            time.sleep(PAUSE)
            os.kill(child, number)


def _end_like(code: int, reader: int) -> None:
    """End this process with the exit code or the signal of its child; report an end before the command finished."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child has written one
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os.set_blocking(reader, False)
    notes = b""
    with contextlib.suppress(BlockingIOError):
        notes = os.read(reader, 1 << 16)
    if not notes.endswith(FINISHED):
        plugin = notes.decode(errors="replace").removesuffix("\n").rpartition("\n")[2]
        during = f" while plugin {plugin} was loaded" if plugin else ""
        emit(f"atn-norms: stopped by exit({code}) in compiled code{during}; the command did not finish", error=True)
        code = code or 2
    os._exit(code)


def _end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


@contextlib.contextmanager
def _named_plugins(writer: int) -> Iterator[None]:
    """Write a line to the pipe before each plugin is loaded, and an empty one after it; print warnings as usual."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            loading = getattr(record, "loading", None)
            if loading is not None:
                with contextlib.suppress(OSError):
                    os.write(writer, f"{loading}\n".encode())
            elif record.levelno >= logging.WARNING:  # Python prints warnings of loggers without a handler only
                emit(f"atn-norms: {record.getMessage()}", error=True)

    notes, level = Notes(logging.DEBUG), LOG.level
    LOG.addHandler(notes)
    LOG.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOG.removeHandler(notes)
        LOG.setLevel(level)


@contextlib.contextmanager
def _reported_exit(finish: Callable[[], None]) -> Iterator[None]:
    """Report a call of `os._exit` in this process with its file and line; the exit code is at least 2.

    Processes forked from this one exit as usual.
    """
    exit_now, process = os._exit, os.getpid()

    def report_and_exit(status: int) -> None:
        if os.getpid() != process:
            exit_now(status)
        caller = traceback.extract_stack()[-2]
        place = f"{caller.filename}:{caller.lineno}, in {caller.name}"
        with contextlib.suppress(Exception):
            emit(
                f"atn-norms: stopped by a call of os._exit({status}) ({place}); the command did not finish", error=True
            )
        finish()
        exit_now(status or 2)

    os._exit = report_and_exit  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = exit_now
