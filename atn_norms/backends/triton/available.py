"""Whether there is a Triton to compile the kernels, found without importing it."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from packaging.version import Version

OLDEST = "3.6"  # of Triton: tuples of pointers with named fields


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as `TRITON_INTERPRET=1` asks for; very slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "on", "yes", "y")


@torch.compiler.assume_constant_result  # a compiler need not follow how a package is found
def unavailable() -> str | None:
    """In one sentence why the kernels cannot be compiled, or None where they can."""
    return _unavailable()


def installed() -> str | None:
    """The version of Triton; None where it says none, as one built in place, or under another name."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _unavailable() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (torch's builds for CUDA bring it along)"
    found = installed()
    if found is not None and Version(found) < Version(OLDEST):
        return f"Triton {found} is installed, and it needs {OLDEST} or newer"
    return None
