"""Checkpoints as bytes: a zip archive as torch writes it, signed with its SHA-256 and bound to one trial."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from typing import Any

from atn_norms.ablation.store.curve import is_mark
from atn_norms.ablation.store.files import StoreError

_DIGEST = 64  # characters of a signature


def pack(trial: str, state: dict[str, Any], mark: dict[str, Any]) -> bytes:
    """Write a state, the id of its trial, and the mark of the learning curve that belongs to it."""
    import torch

    buffer = io.BytesIO()
    torch.save({"trial": trial, "state": state, "metrics": mark}, buffer)
    return sign(buffer.getvalue())


def unpack(trial: str, content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a state and the mark of its learning curve; no code in the file is run.

    Errors: `StoreError` with the reason: damaged, of another trial, or not a checkpoint; an error of the machine, such
    as `MemoryError`.
    """
    import torch

    end = _DIGEST + 2
    if sign(content[:-end] + b"\0\0") != content:
        raise StoreError("damaged: its SHA-256 does not match its content")
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types for a foreign archive
        if is_of_the_machine(error):
            raise
        raise StoreError(f"damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state"), dict):
        raise StoreError("got no state; expected one")
    if checkpoint.get("trial") != trial:
        raise StoreError(f"got a checkpoint of trial {str(checkpoint.get('trial'))[:40]!r}; expected one of {trial!r}")
    if not is_mark(checkpoint.get("metrics")):
        raise StoreError("got no mark of a learning curve; expected one")
    return checkpoint["state"], checkpoint["metrics"]


def is_of_the_machine(error: BaseException) -> bool:
    """Return True for an error that may not repeat, such as no memory: it is no property of a checkpoint.

    torch raises a `RuntimeError` where the CPU has no memory.

    >>> is_of_the_machine(MemoryError()), is_of_the_machine(ValueError("odd"))
    (True, False)
    """
    return isinstance(error, (MemoryError, OSError)) or (
        isinstance(error, RuntimeError)
        and any(text in str(error).lower() for text in ("out of memory", "allocate memory", "not enough memory"))
    )


def first_unloadable(value: Any, path: str) -> tuple[str, Any] | None:
    """Return the path and the value of the first part that torch saves but does not load; None if it loads all."""
    import torch

    kind = type(value)
    if kind in (torch.Tensor, torch.nn.Parameter, str, bytes, bool, int, float, type(None)):
        return None
    if kind in (dict, OrderedDict):
        parts = [(path, key) for key in value] + [(f"{path}[{key!r}]", part) for key, part in value.items()]
    elif kind in (list, tuple):
        parts = [(f"{path}[{i}]", part) for i, part in enumerate(value)]
    else:
        return None if _loads(value) else (path, value)
    return next(filter(None, (first_unloadable(part, place) for place, part in parts)), None)


def _loads(value: Any) -> bool:
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  pickling a foreign value may raise any error
        return False
    return True


def sign(archive: bytes) -> bytes:
    """Put the SHA-256 of a zip archive into its comment: torch checks no sums when it reads an archive."""
    digest = hashlib.sha256(archive[:-2]).hexdigest().encode()
    return archive[:-2] + len(digest).to_bytes(2, "little") + digest
