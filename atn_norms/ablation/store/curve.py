"""The learning curve of a trial on disk: lines are appended; a resumed trial cuts it back to its checkpoint."""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

from atn_norms.ablation.store.failpoints import failpoint
from atn_norms.ablation.store.files import (
    Folder,
    StoreError,
    canonical,
    chunks,
    named,
    parse_object,
    refuse_size,
    write_all,
)
from atn_norms.ablation.store.schema import MOST_STEPS, Mark, check
from atn_norms.errors import SpecError

NAME = "metrics.jsonl"
MOST_BYTES = 2**28  # bytes of the largest curve that is read: 256 MiB
TAIL = 2**16  # bytes at the end of a curve that are searched for its last line


class Curve:
    """The file `metrics.jsonl`, with one line for each point.

    A process keeps the file open from its start. If another process has taken over the trial, the first process
    appends to a file that is no longer in the folder.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder, self.path = folder, folder.path / NAME
        self._descriptor: int | None = None
        self._size, self._hash = 0, hashlib.sha256()  # of the open file, as far as this process read or wrote it

    def read(self) -> list[dict[str, Any]]:
        """Read every complete line; an incomplete last line, which is being written or was interrupted, is ignored.

        Errors: `StoreError` naming a line that is damaged, or a file of over 256 MiB.
        """
        if not self.folder.has(NAME):
            return []
        lines = self.folder.read(NAME, MOST_BYTES).split(b"\n")[:-1]
        points: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            before = points[-1]["step"] if points else 0
            points.append(_parse_point(line, f"{self.path}:{number}", before))
        return points

    def refuse_size(self) -> None:
        """Raise `StoreError` for a file that is too large to be read."""
        if self.folder.has(NAME):
            try:
                refuse_size(self.path, self.folder.stat(NAME).st_size, MOST_BYTES)
            except StoreError as error:
                cure = "remove it and result.json, and report less often (train.log_every)"
                raise StoreError(f"{error}; {cure}") from error

    def last(self) -> dict[str, Any] | None:
        """Read the last complete line from the end of the file; None if there is no line."""
        if not self.folder.has(NAME):
            return None
        with named("read", self.path):
            descriptor = self.folder.open(NAME)
            try:
                size = os.fstat(descriptor).st_size
                tail = os.pread(descriptor, min(TAIL, size), max(0, size - TAIL))
            finally:
                os.close(descriptor)
        lines = tail.split(b"\n")[:-1]
        if size > TAIL and len(lines) < 2:
            raise StoreError(
                f"{self.path}: damaged: the last line has over {TAIL} bytes; expected a point of the curve"
            )
        return _parse_point(lines[-1], f"{self.path}: last line", 0) if lines else None

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; it is durable only after `mark`.

        Errors: `SpecError`, before the line is written, where the file would become too large to be read.
        """
        with named("write", self.path):
            failpoint(f"{NAME}:add")
            content, descriptor = f"{canonical(line)}\n".encode(), self._opened()
            if (size := self._size + len(content)) > MOST_BYTES:
                detail = "Report less often, such as with a larger train.log_every."
                raise SpecError(
                    position=str(self.path), got=f"{size} bytes", expected=f"at most {MOST_BYTES}", detail=detail
                )
            write_all(descriptor, content)
            self._size += len(content)
            self._hash.update(content)
            failpoint(f"{NAME}:added")

    def replace(self, content: bytes) -> None:
        """Replace the file atomically; a process that has the old file open does not change the new one."""
        self.close()
        self.folder.write(NAME, content)

    def mark(self) -> dict[str, Any]:
        """Make the file durable, and return its size in bytes and its SHA-256."""
        with named("write", self.path):
            descriptor = self._opened()
            failpoint(f"{NAME}:sync")
            os.fsync(descriptor)
            failpoint(f"{NAME}:marked")
            if (size := os.fstat(descriptor).st_size) != self._size:  # a line was written in part
                self._count(descriptor, size)
            return {"bytes": self._size, "sha256": self._hash.hexdigest()}

    def cut(self, mark: dict[str, Any] | None, elsewhere: bool) -> bool:
        """Cut the file back to a mark; without a mark, empty it.

        Return False, with an empty file, if the file does not begin with the content of the mark.

        With `elsewhere` the result is a new file, since another process may still write to the current one.
        """
        self.close()
        with named("read", self.path):
            descriptor = self._opened()
            size = mark["bytes"] if mark else 0
            self._count(descriptor, size)
            is_whole = mark is None or mark == {"bytes": self._size, "sha256": self._hash.hexdigest()}
            kept = size if is_whole else 0
        if elsewhere:
            refuse_size(self.path, kept, MOST_BYTES)
            os.lseek(descriptor, 0, os.SEEK_SET)
            content = b"".join(chunks(descriptor, kept))
            self.close()
            self.folder.write(NAME, content)
        with named("write", self.path):
            descriptor = self._opened()
            failpoint(f"{NAME}:cut")
            os.ftruncate(descriptor, kept)
            failpoint(f"{NAME}:shortened")
            self._count(descriptor, kept)
        return is_whole

    def check(self, mark: dict[str, Any], whole: bool = True) -> None:
        """Raise `StoreError` unless the file has the size of a mark and, with `whole`, its content."""
        there = self.folder.has(NAME)
        size, digest = 0, hashlib.sha256()
        if there:
            with named("read", self.path):
                descriptor = self.folder.open(NAME)
                try:
                    size = os.fstat(descriptor).st_size
                    if whole and size == mark["bytes"]:
                        for chunk in chunks(descriptor, size):
                            digest.update(chunk)
                finally:
                    os.close(descriptor)
        if size != mark["bytes"] or (whole and digest.hexdigest() != mark["sha256"]):
            raise self._unmarked(f"{size} bytes" if there else "no file", mark)

    def content(self, mark: dict[str, Any]) -> bytes:
        """Return the content of the file; `StoreError` unless it is that of the mark."""
        content = self.folder.read(NAME, MOST_BYTES) if self.folder.has(NAME) else b""
        if {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} != mark:
            raise self._unmarked(f"{len(content)} bytes", mark)
        return content

    def _unmarked(self, got: str, mark: dict[str, Any]) -> StoreError:
        return StoreError(
            f"{self.path}: damaged: got {got}; expected the {mark['bytes']} bytes that result.json counted; remove "
            "result.json to train the trial again"
        )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = self.folder.open(NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            self._count(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._descriptor

    def _count(self, descriptor: int, size: int) -> None:
        """Compute size and hash of the first bytes of the open file."""
        self._size, self._hash = 0, hashlib.sha256()
        os.lseek(descriptor, 0, os.SEEK_SET)
        for chunk in chunks(descriptor, size):
            self._size += len(chunk)
            self._hash.update(chunk)


def is_mark(value: Any) -> bool:
    """Check whether a value has the form of `Curve.mark`."""
    try:
        check(Mark, value, "")
    except StoreError:
        return False
    return True


def _parse_point(line: bytes, place: str, before: int) -> dict[str, Any]:
    """Parse one line: a step after the one before, and two numbers, each None where it was not measured."""
    point = parse_object(line, place)
    step = point.get("step")
    if type(step) is not int or not before < step <= MOST_STEPS:
        raise StoreError(f"{place}: damaged: step: expected a number of steps above {before}")
    for name in ("train_loss", "validation"):
        if name not in point or not (point[name] is None or _is_finite(point[name])):
            raise StoreError(f"{place}: damaged: {name}: expected a finite number or null")
    return point


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer larger than every float
        return False
