"""Files that are whole or absent: durable atomic writes, errors that say where.

Every change of a file passes named points (`result.json:renamed`), where the tests let a process die; see `faults`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atn_norms.ablation.store.failpoints import failpoint


class StoreError(OSError):
    """A study's folder cannot be used: one sentence that names the file and what to do."""


class Busy(StoreError):
    """Another process holds a lock."""


@contextmanager
def named(doing: str, path: Path) -> Iterator[None]:
    """Turn an error of the system into one that says what could not be done, and to which file."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot {doing} {path}: {error.strerror or error}") from error


def make_folder(path: Path, made: list[Path] | None = None) -> None:
    """Create a folder and its parents, durably, and add those made to a list; one that exists is fine."""
    with named("create the folder", path):
        for each in (*(each for each in reversed(path.parents) if not each.exists()), path):
            try:
                if each.is_dir():
                    continue
                each.mkdir()
            except FileExistsError:
                if each.is_dir():  # another process was just making the same
                    continue
                raise
            if made is not None:
                made.append(each)
            failpoint("folder:made")
            sync_folder(each.parent)


def temporary(path: Path) -> Path:
    """A name beside a file that no other process takes, on no machine that shares the folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write(path: Path, content: bytes) -> None:
    """Put `content` at `path`, durably, so that a kill at any moment leaves the old file or the new one whole.

    Errors: `StoreError` naming the file; the old content stays and no temporary file remains.
    """
    new = temporary(path)
    with named("write", path):
        failpoint(f"{path.name}:begin")
        try:
            with open(new, "xb") as file:
                file.write(content)
                file.flush()
                failpoint(f"{path.name}:written")
                os.fsync(file.fileno())
            failpoint(f"{path.name}:synced")
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        failpoint(f"{path.name}:renamed")
        sync_folder(path.parent)
        failpoint(f"{path.name}:durable")


def write_all(descriptor: int, content: bytes) -> None:
    """Write every byte: where there is room for some only, the system takes those first and refuses then."""
    while content:
        content = content[os.write(descriptor, content) :]


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file that may be absent."""
    with named("remove", path):
        failpoint(f"{path.name}:remove")
        path.unlink(missing_ok=True)
        failpoint(f"{path.name}:removed")


def append(path: Path, line: str) -> None:
    """Add a line to a text file, for people to read; nothing makes it durable."""
    with named("write", path):
        failpoint(f"{path.name}:add")
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        failpoint(f"{path.name}:added")


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
    with named("read", path):
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
    with named("read", path):
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
