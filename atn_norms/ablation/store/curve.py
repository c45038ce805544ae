"""A trial's learning curve on disk: lines that are only ever added, cut back to what a checkpoint counted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from atn_norms.ablation.store.failpoints import failpoint
from atn_norms.ablation.store.files import StoreError, canonical, named, read_lines, write, write_all


class Curve:
    """The file `metrics.jsonl`, one line a point.

    An attempt keeps the file open that it began with. So a process that was taken for gone, and wakes up when another has
    taken its trial over, adds its lines to a file that nobody reads any more.
    """  # noqa: E501

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; `StoreError` names one that is damaged."""
        lines = read_lines(self.path)
        for number, line in enumerate(lines, 1):
            if not (isinstance(line.get("step"), int) and line.keys() >= {"train_loss", "validation"}):
                raise StoreError(f"{self.path}:{number}: damaged, a line needs step, train_loss and validation")
        return lines

    def add(self, line: dict[str, Any]) -> None:
        """Add a line; it is durable only after `mark`."""
        with named("write", self.path):
            failpoint(f"{self.path.name}:add")
            write_all(self._opened().fileno(), f"{canonical(line)}\n".encode())
            failpoint(f"{self.path.name}:added")

    def mark(self) -> dict[str, Any]:
        """Make what is there durable, and return its size in bytes and its SHA-256."""
        with named("write", self.path):
            file = self._opened()
            failpoint(f"{self.path.name}:sync")
            os.fsync(file.fileno())
            failpoint(f"{self.path.name}:marked")
            return _marked(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))

    def cut(self, mark: dict[str, Any] | None, elsewhere: bool) -> bool:
        """Go back to a mark, or to nothing; False (and nothing kept) where the file no longer holds what was marked.

        With `elsewhere` in a new file, since somebody may still write to the one that is there.
        """
        self.close()
        with named("read", self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        kept = content[: mark["bytes"]] if mark else b""
        whole = mark is None or _marked(kept) == mark
        kept = kept if whole else b""
        if elsewhere:
            write(self.path, kept)
        with named("write", self.path):
            file = self._opened()
            failpoint(f"{self.path.name}:cut")
            file.truncate(len(kept))
            failpoint(f"{self.path.name}:shortened")
        return whole

    def check(self, mark: Any) -> None:
        """Refuse a file that is not, byte for byte, what was marked."""
        with named("read", self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        if _marked(content) != mark:
            there = f"{len(content)} bytes" if self.path.exists() else "missing"
            wanted = f"{mark['bytes']} bytes" if isinstance(mark, dict) and "bytes" in mark else "something else"
            raise StoreError(
                f"{self.path}: damaged, not the curve of the result beside it ({there}, {wanted} expected); "
                "remove result.json to train the trial again"
            )

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> Any:
        if self._file is None:
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  held for the whole attempt
        return self._file


def _marked(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
