"""The compiled kernels: found beside this file, called through ctypes, never imported."""

from __future__ import annotations

import ctypes
import warnings
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

INTERFACE = 3
SITES = 3


class SiteArgs(ctypes.Structure):
    """`Site` of recurrent.h, field by field."""

    _fields_ = [
        ("norm", c_int32),
        ("window", c_int32),
        *((name, c_int64) for name in ("features", "groups", "prefix")),
        *((name, c_double) for name in ("decay", "eps")),
        *((name, c_void_p) for name in ("gain", "shift")),
        *((name, c_void_p * 3) for name in ("state", "next", "dnext", "dstate")),
        *((name, c_void_p) for name in ("dgain", "dshift")),
        ("populations", c_int64),
        *((name, c_void_p) for name in ("population", "timeline")),
    ]


class CallArgs(ctypes.Structure):
    """`Call` of recurrent.h, field by field."""

    _fields_ = [
        ("cell", c_int32),
        ("threads", c_int32),
        *((name, c_int64) for name in ("steps", "batch", "inputs", "hidden")),
        *((name, c_void_p) for name in ("lengths", "xs", "weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *((name, c_void_p) for name in ("projected", "recurrent", "cells", "output", "h0", "c0", "hn", "cn")),
        *((name, c_void_p) for name in ("doutput", "dh", "dc", "dxs")),
        *((name, c_void_p) for name in ("dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh")),
        ("site", SiteArgs * SITES),
    ]


def word(name: str, site: int | None = None, leaf: int = 0) -> int:
    """Which 8-byte word of a `CallArgs` holds an address: that of a field, or of a field of a site, or of its leaf."""
    if site is None:
        return getattr(CallArgs, name).offset // 8
    return (CallArgs.site.offset + site * ctypes.sizeof(SiteArgs) + getattr(SiteArgs, name).offset) // 8 + leaf


class Library:
    """The kernels of one shared object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._object = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("forward", c_int32, [ctypes.POINTER(CallArgs), c_int32]),
            ("backward", c_int32, [ctypes.POINTER(CallArgs), c_int32]),
            ("timeline", c_int64, [c_int64] * 4),
            ("level", c_int32, [c_int32]),
            ("interface", c_int64, []),
        ):
            function = getattr(self._object, f"atn_norms_{name}")
            function.restype, function.argtypes = result, arguments
        expected = INTERFACE * 65536 + ctypes.sizeof(CallArgs)
        found = self._object.atn_norms_interface()
        if found != expected:
            raise OSError(f"{path}: kernels of another version ({found}, expected {expected}); install again")

    def run(self, direction: str, call: CallArgs, is_double: bool) -> None:
        """`forward` or `backward`; the interpreter lock is free meanwhile. `MemoryError` where there was none."""
        if getattr(self._object, f"atn_norms_{direction}")(ctypes.byref(call), int(is_double)):
            raise MemoryError("the native backend could not have its work space")

    @property
    def parallel(self) -> bool:
        """Whether they were compiled with OpenMP and so use several threads."""
        return bool(self._object.atn_norms_openmp())

    def level(self, limit: int = -1) -> str:
        """The instruction set in use; a `limit` of 0, 1 or 2 caps it."""
        return ("baseline", "AVX2", "AVX-512")[self._object.atn_norms_level(limit)]


@lru_cache(maxsize=1)
def load() -> Library | str:
    """The kernels, or in one sentence why there are none."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return "its kernels were not compiled when the package was installed (a C compiler was missing or failed)"
    try:
        return Library(found[0])
    except (OSError, AttributeError) as error:
        return f"its kernels cannot be loaded: {error}"


@torch.compiler.assume_constant_result  # a compiler need not follow how a shared object is found
def unavailable() -> str | None:
    """In one sentence why there are no kernels, or None where there are."""
    library = load()
    return library if isinstance(library, str) else None


@torch.compiler.assume_constant_result
def warn_once() -> None:
    """Say, once in a process, that the reference runs what the kernels could: slowness has a reason, and a cure."""
    if not _warned:
        _warned.append(True)
        warnings.warn(
            f"the native backend could run this layer, but {unavailable()}; the reference runs it, many times slower. "
            "`atn-norms doctor` says what to do.",
            RuntimeWarning,
            stacklevel=2,
        )


_warned: list[bool] = []
