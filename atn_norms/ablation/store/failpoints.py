"""Named points in the writing of files where a test can make the process die, stop or fail; otherwise nothing."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

VARIABLE = "ATN_NORMS_FAULT"

_reached: Callable[[str], None] | None = None


def failpoint(name: str) -> None:
    """Say that a point is reached; without a fault asked for this is one comparison."""
    if _reached is not None:
        _reached(name)


def arm(fault: str | None) -> None:
    """Ask for a fault in this process, `ACTION@POINT` or `ACTION@POINT#TIME`; None asks for none.

    | action | what happens the first time (or the `TIME`-th) that the point is reached |
    |---|---|
    | `kill` | the process is gone at once, as by `kill -9` or a loss of power |
    | `stop` | it stands still until somebody sends SIGCONT |
    | `ENOSPC`, `EACCES`, ... | the system refuses with this error |
    | `trace` | nothing, but every point is added to the file that `POINT` names |

    Errors: `ValueError` for anything else.

    >>> arm("EACCES@result.json:written")
    >>> point("result.json:written")
    Traceback (most recent call last):
      ...
    PermissionError: [Errno 13] Permission denied
    >>> point("result.json:written"), arm(None)
    (None, None)
    """
    global _reached
    _reached = _made(fault) if fault else None


def _made(fault: str) -> Callable[[str], None]:
    action, _, rest = fault.partition("@")
    wanted, _, time = rest.partition("#")
    if not rest or not (time or "1").isdigit() or not (action in ("kill", "stop", "trace") or hasattr(errno, action)):
        raise ValueError(
            f"{VARIABLE}: {fault!r} is no fault; allowed: kill, stop, trace or an errno's name, then @POINT"
        )
    if action == "trace":
        return lambda name: _note(rest, name)
    left = int(time or 1)

    def reached(name: str) -> None:
        nonlocal left
        left -= name == wanted
        if name == wanted and left == 0:
            _happen(action)

    return reached


def _note(path: str, name: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def _happen(action: str) -> None:
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        return
    number = getattr(errno, action)
    raise OSError(number, os.strerror(number))


arm(os.environ.get(VARIABLE))
