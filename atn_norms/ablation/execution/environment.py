"""Describe the machine of a run, and compare the versions of its processes."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import metadata
from typing import Any


def versions() -> dict[str, str]:
    """Return the versions that results depend on: this package, torch, and every loaded plugin's distribution."""
    import torch

    from atn_norms.plugins import report

    plugins = {each.distribution: each.version for each in report() if each.status == "loaded" and each.distribution}
    return dict(sorted({"atn-norms": _own_version(), **plugins, "torch": str(torch.__version__)}.items()))


def environment() -> dict[str, Any]:
    """Return the content of `environment.json`: date, versions and machine."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _model_name(),
        "cores": os.cpu_count(),
        "host": platform.node(),
    }


def differences(wanted: dict[str, str], here: dict[str, str]) -> str:
    """Describe which of the `wanted` versions differ here; empty where none does.

    Other distributions, such as a plugin that was installed while a study ran, change no result and are not compared.

    >>> differences({"torch": "2.13.0"}, {"torch": "2.12.1", "extra": "1"})
    'torch 2.12.1 instead of 2.13.0'
    """
    return ", ".join(
        f"{name} {here.get(name, 'missing')} instead of {version}"
        for name, version in wanted.items()
        if here.get(name) != version
    )


def _own_version() -> str:
    try:
        return metadata.version("atn-norms")
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the processor's name and the instruction set that torch uses, on which rounding depends."""
    import torch

    return f"{_model_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _model_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
