"""Facts about the machine, and the settings of malloc."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

import torch

from atn_norms.backends.native.library import load
from atn_norms.errors import SpecError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
KEPT = "mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1): freed memory stays in the process, for every runner"


def facts() -> dict[str, Any]:
    """Processor, cores, versions, instruction set of the kernels, and how busy the machine is."""
    from atn_norms import __version__

    library = load()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "atn_norms": __version__,
        "native_kernels": "none" if isinstance(library, str) else library.level(),
        "native_kernels_missing": library if isinstance(library, str) else None,
        "load": load_average(),
    }


def usable_cores() -> int | None:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(named, platform.processor() or platform.machine())
    except OSError:  # not Linux
        return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Number of runnable processes, averaged over the last minute; None where the system does not report it."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def available_memory() -> int | None:
    """Available memory in bytes, without swapping; None where the system does not report it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")), None)
    except OSError:
        return None


def set_malloc(mode: str) -> None:
    """`keep`: let glibc keep freed memory until the process ends; `default`: change nothing.

    Errors: `SpecError` where the C library has no mallopt.
    """
    if mode == "default":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        raise SpecError("malloc", "'keep' without the mallopt of glibc", "'default' on this system")
