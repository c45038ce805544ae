"""Files that are whole or absent: durable atomic writes, locks that die with their holder, errors that say where."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class StoreError(OSError):
    """A study's folder cannot be used: one sentence that names the file and what to do."""


class Busy(StoreError):
    """Another process holds a lock."""


@contextmanager
def _named(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot {doing} {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents; one that exists is fine."""
    with _named("create the folder", path):
        path.mkdir(parents=True, exist_ok=True)


def write(path: Path, content: bytes) -> None:
    """Put `content` at `path`, durably, so that a kill at any moment leaves the old file or the new one whole.

    Errors: `StoreError` naming the file; the old content stays and no temporary file remains.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _named("write", path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file that may be absent."""
    with _named("remove", path):
        path.unlink(missing_ok=True)


def append(path: Path, line: str) -> None:
    """Add a line to a text file; it is durable only after `sync`."""
    with _named("write", path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def sync(path: Path) -> int:
    """Make what was appended to a file durable; return its size in bytes (0 when it is absent)."""
    if not path.exists():
        return 0
    with _named("write", path), open(path, "rb+") as file:
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, finite numbers only.

    >>> canonical({"b": 1.0, "a": [None, True]})
    '{"a":[null,true],"b":1.0}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write(path, (text + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `StoreError` names the file and the line where it is damaged."""
    with _named("read", path):
        content = path.read_bytes()
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise StoreError(f"{path}{where}: damaged or truncated, not JSON ({error})") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path}: damaged, a JSON object was expected, got {type(value).__name__}")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; an unfinished last line (its writer was stopped, or is at it) does not count."""
    if not path.exists():
        return []
    with _named("read", path):
        lines = path.read_bytes().split(b"\n")[:-1]
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StoreError(f"{path}:{number}: damaged, not JSON ({error})") from error
        if not isinstance(value, dict):
            raise StoreError(f"{path}:{number}: damaged, a JSON object was expected")
        values.append(value)
    return values


@contextmanager
def locked(path: Path, busy: str, patience: float = 1.0) -> Iterator[None]:
    """Hold an exclusive lock on a file while inside; the kernel drops it with the process, however that ends.

    | symbol | meaning | unit |
    |---|---|---|
    | `busy` | what to say when another process holds it | |
    | `patience` | how long to try: a `held` that only asks may be in the way for an instant | seconds |
    """
    with _named("lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + patience
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise Busy(busy)
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def held(path: Path) -> bool:
    """Whether some process holds the lock on a file."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return not _try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)
    return False


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
