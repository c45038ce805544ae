"""The compiled kernels: a shared object in this folder, called through ctypes and never imported."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from atn_norms.backends.traced.program import ROWS, Program

INTERFACE = 11
SITES = 3
MOST_THREADS = 256  # the work space of a kernel grows with the number of threads


class SiteArgs(ctypes.Structure):
    """The structure `Site` of recurrent.h, field by field."""

    _fields_ = [
        ("norm", c_int32),
        ("window", c_int32),
        *((name, c_int64) for name in ("features", "groups", "prefix")),
        ("decay", c_double),
        *((name, c_void_p) for name in ("eps", "gain", "shift")),
        *((name, c_void_p * 3) for name in ("state", "next", "dnext", "dstate")),
        *((name, c_void_p) for name in ("dgain", "dshift")),
        ("populations", c_int64),
        *((name, c_void_p) for name in ("population", "timeline", "programs")),
        *((name, c_int64) for name in ("parts", "parameters", "centred", "detached")),
        ("taps", c_void_p),
    ]


class CallArgs(ctypes.Structure):
    """The structure `Call` of recurrent.h, field by field."""

    _fields_ = [
        ("cell", c_int32),
        ("threads", c_int32),
        *((name, c_int64) for name in ("steps", "batch", "inputs", "hidden", "projection", "joint", "normed_carry")),
        *((name, c_void_p) for name in ("lengths", "xs", "weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")),
        *((name, c_void_p) for name in ("projected", "recurrent", "cells", "units", "output", "h0", "c0", "hn", "cn")),
        *((name, c_void_p) for name in ("doutput", "dh", "dc", "dxs")),
        *((name, c_void_p) for name in ("dweight_ih", "dweight_hh", "dweight_hr", "dbias_ih", "dbias_hh")),
        ("site", SiteArgs * SITES),
    ]


def word(name: str, site: int | None = None, leaf: int = 0) -> int:
    """Return the 8-byte word of a `CallArgs` for the address of a field, a site's field, or a leaf in that field."""
    if site is None:
        return getattr(CallArgs, name).offset // 8
    return (CallArgs.site.offset + site * ctypes.sizeof(SiteArgs) + getattr(SiteArgs, name).offset) // 8 + leaf


class Library:
    """The kernels of one shared object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._object = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("run", c_int32, [c_char_p, c_char_p, c_char_p, c_int64, c_int32, c_int32, c_int32]),
            ("timeline", c_int64, [c_int64] * 4),
            ("level", c_int32, [c_int32]),
            ("interface", c_int64, []),
            ("interpret", c_int32, [c_void_p, c_int32, c_void_p, c_int64, c_void_p]),
        ):
            function = getattr(self._object, f"atn_norms_{name}")
            function.restype, function.argtypes = result, arguments
        self._run = self._object.atn_norms_run
        expected = INTERFACE * 65536 + ctypes.sizeof(CallArgs)
        found = self._object.atn_norms_interface()
        if found != expected:
            raise OSError(f"{path}: kernels of another version ({found}, expected {expected}); install again")

    def run(self, call: bytes, words: bytes, addresses: Sequence[int], backward: bool, is_double: bool) -> None:
        """Run a call without Python's global lock; `MemoryError` if memory is exhausted.

        `call` is a `CallArgs` without addresses, and `words` has the word of each address, as an array of int64.
        """
        count = len(addresses)
        given = struct.pack(f"{count}q", *addresses)
        threads = min(torch.get_num_threads(), MOST_THREADS)
        if self._run(call, words, given, count, threads, backward, is_double):
            raise MemoryError("out of memory for workspace")

    def interpret(self, program: Program, inputs: Sequence[torch.Tensor], narrow: bool = False) -> list[torch.Tensor]:
        """Return the outputs of a program on inputs `[R, length]`; in a narrow program rows are float32."""
        rows = inputs[0].shape[0]
        types = [torch.float32 if narrow and slot.kind in ROWS else torch.float64 for slot in program.slots]
        given = [x.expand(rows, -1).to(kind).contiguous() for x, kind in zip(inputs, types, strict=False)]
        lengths = [(program.slots[place].length, types[place]) for place in program.outputs]
        outputs = [torch.empty(rows, length, dtype=kind, device="cpu") for length, kind in lengths]
        words = ctypes.create_string_buffer(program.words, len(program.words))
        addresses = [(c_void_p * len(many))(*(x.data_ptr() for x in many)) for many in (given, outputs)]
        if self._object.atn_norms_interpret(words, int(narrow), addresses[0], rows, addresses[1]):
            raise MemoryError("out of memory for workspace")
        return outputs

    @property
    def parallel(self) -> bool:
        """True if the kernels were compiled with OpenMP and use several threads."""
        return bool(self._object.atn_norms_openmp())

    def level(self, limit: int = -1) -> str:
        """Return the instruction set in use; a `limit` of 0, 1 or 2 caps it."""
        return ("baseline", "AVX2", "AVX-512")[self._object.atn_norms_level(limit)]


def found() -> Path | None:
    """Return the path of the shared object, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)


@lru_cache(maxsize=1)
def load() -> Library | str:
    """Return the kernels, or a sentence with the reason why there are none."""
    path = found()
    if path is None:
        return "its kernels were not compiled when the package was installed (a C compiler was missing or failed)"
    if path in _deadly:
        return f"its kernels end the process that uses them: {_deadly[path]}"
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        return f"its kernels cannot be loaded: {error}"


def survives() -> str | None:
    """Try the kernels in a separate process; return None if it survives, else a description of its end."""
    path = found()
    if path is None:
        return None
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "ATN_NORMS_LOAD_PLUGINS": ""}
    command = [sys.executable, "-c", TRIAL, str(path)]
    try:
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        fate = f"a trial of them did not come back in {PATIENCE} s"
    else:
        if done.stdout.endswith(ALIVE):
            return None
        fate = _named(done.returncode)
    _deadly[path] = fate
    load.cache_clear()
    return fate


def _named(code: int) -> str:
    try:
        return f"a trial of them died of {signal.Signals(-code).name}"
    except ValueError:
        return f"a trial of them ended with exit code {code}"


ALIVE = "alive\n"
PATIENCE = 120  # seconds; loading torch alone may take ten on a busy machine
TRIAL = """
import pathlib, sys
from atn_norms.backends.native import library
library.found = lambda: pathlib.Path(sys.argv[1])
try:
    import torch, atn_norms
    y, _ = atn_norms.LSTM(2, 3, norm="layer", backend="native")(torch.zeros(2, 1, 2))
    y.sum().backward()
finally:  # whatever was raised, the process lives, and the error will be met again
    print("alive", flush=True)
"""
_deadly: dict[Path, str] = {}


def constant_to_compilers(function: Any) -> Any:
    """Mark a function's result as a constant for compilers, as `torch.compiler.assume_constant_result` does.

    That function imports the compiler, which takes more than a second.
    """
    function._dynamo_marked_constant = True
    return function


@constant_to_compilers
def unavailable() -> str | None:
    """Return the reason why there are no kernels as a sentence, or None if there are kernels."""
    library = load()
    return library if isinstance(library, str) else None


@constant_to_compilers
def warn_once() -> None:
    """Warn once in a process that the reference runs a layer for which kernels exist."""
    if not _warned:
        _warned.append(True)
        warnings.warn(
            f"the native backend could run this layer, but {unavailable()}; the reference runs it, many times slower. "
            "`atn-norms doctor` prints the cure.",
            RuntimeWarning,
            stacklevel=2,
        )


_warned: list[bool] = []
