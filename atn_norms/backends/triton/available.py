"""Detection of Triton, without importing it."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

from atn_norms.backends.native.library import constant_to_compilers

OLDEST = "3.6"  # oldest version of Triton with named tuples of pointers


def interpreted() -> bool:
    """Return True where `TRITON_INTERPRET=1` selects Triton's interpreter instead of a GPU; very slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "on", "yes", "y")


@constant_to_compilers
def unavailable() -> str | None:
    """Return the reason why the kernels cannot be compiled, or None."""
    return _unavailable()


def installed() -> str | None:
    """Return the version of Triton; None if it has no version, such as a build in place."""
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
