"""Inject a failure at a named point of the store. Usage: `python -m tests.faults.failing FAULT MODULE ...`."""

import errno
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable

from atn_norms.ablation.store import failpoints


def arm(fault: str | None) -> None:
    """Install a fault in this process, `ACTION@POINT` or `ACTION@POINT#TIME`; None removes it.

    | action | effect at the first (or `TIME`-th) pass of the point |
    |---|---|
    | `kill` | the process ends at once, as by `kill -9` or a power failure |
    | `stop` | the process stops until it receives SIGCONT |
    | `ENOSPC`, `EACCES`, ... | the system call fails with this error |
    | `trace` | append every point to the file that `POINT` names |
    """
    failpoints.install(_hook(fault) if fault else None)


def _hook(fault: str) -> Callable[[str], None]:
    action, _, target = fault.partition("@")
    if action == "trace":
        return lambda name: _append(target, name)
    match = re.fullmatch(r"([^#]+?)(?:#(\d+))?", target)
    assert match and (action in ("kill", "stop") or hasattr(errno, action)), fault
    wanted, left = match[1], int(match[2] or 1)

    def pass_point(name: str) -> None:
        nonlocal left
        left -= name == wanted
        if name == wanted and left == 0:
            _happen(action)

    return pass_point


def _append(path: str, name: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def _happen(action: str) -> None:
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        return
    number = getattr(errno, action)
    raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    _, fault, module, *sys.argv[1:] = sys.argv
    arm(fault)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
