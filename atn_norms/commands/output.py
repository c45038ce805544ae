"""Standard output reserved for the results of a command, in any encoding, without terminal control sequences."""

from __future__ import annotations

import codecs
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar

from atn_norms.text import ENCODING_ERRORS, escape_controls

Command = TypeVar("Command", bound=Callable[..., Any])


class _Results:
    """Stream of the results; None outside a command, which selects `sys.stdout`."""

    stream: TextIO | None = None
    outlives: bool = False  # set by `outliving_readers`


def results() -> TextIO:
    """Return the stream for the results of a command."""
    return _Results.stream or sys.stdout or sys.stderr


def emit(text: str = "", *, end: str = "\n", error: bool = False) -> None:
    """Print a text to the results, or to standard error, and flush it."""
    stream = sys.stderr if error else results()
    if stream is None:
        return
    try:
        print(escape_controls(text), end=end, file=stream, flush=True)
    except BrokenPipeError:
        if error or not _Results.outlives:
            raise
        discard_results()
        emit("standard output was closed; the run continues", error=True)


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Continue, with a message, where the reader of the results ends early, such as `head` or `less`."""
    before, _Results.outlives = _Results.outlives, True
    try:
        yield
    finally:
        _Results.outlives = before


def discard_results() -> None:
    """Redirect standard output to nowhere: what its buffer still holds would raise again when Python closes it."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results().fileno())


def unwritable_results() -> Exception | None:
    """Return an error if standard output cannot be written, as on a full disk, and discard its buffer."""
    from atn_norms.errors import SpecError

    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        discard_results()
        return SpecError(position="stdout", got=str(error.strerror), expected="a writable stream")
    return None


def encodes_unicode() -> bool:
    """Return whether the results may contain any character."""
    encoding = getattr(results(), "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name.startswith("utf")


def reserved(command: Command) -> Command:
    """Reserve standard output for the command: other output, such as a plugin's, goes to standard error."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        before = _Results.stream
        _Results.stream = sys.stdout
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return command(*arguments, **options)
        finally:
            _Results.stream = before

    return run  # type: ignore[return-value]


def tolerate_encodings() -> None:
    """Replace characters that a stream cannot encode: signs by their ASCII form, all others by escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ENCODING_ERRORS)  # type: ignore[union-attr]


def separate_stdout() -> None:
    """Move standard output to another file descriptor, and redirect descriptor 1 to standard error.

    Compiled code and child processes, such as workers of a study, write to descriptor 1 regardless of `sys.stdout`.
    """
    try:
        descriptor = os.dup(1)
    except OSError:  # it is closed
        return
    encoding, errors, line_buffering = sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering
    sys.stdout.flush()
    try:
        os.dup2(2, 1)
    except OSError:  # standard error is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = open(  # noqa: SIM115  open until the process ends
        descriptor, "w", encoding=encoding, errors=errors, buffering=1 if line_buffering else -1
    )


@contextlib.contextmanager
def escaped_logging() -> Iterator[None]:
    """Escape control characters in warnings where the application has no logging handler."""
    handler = logging.lastResort
    if handler is None:
        yield
        return
    before = handler.formatter
    handler.setFormatter(_Escaped())
    try:
        yield
    finally:
        handler.setFormatter(before)


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))
