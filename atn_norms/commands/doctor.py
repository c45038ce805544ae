"""Check the environment, and print how to fix it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import typer

from atn_norms.commands.console import Json, Strict, print_json, print_table
from atn_norms.commands.output import emit

EXTRAS = {
    "ablation": {
        "distributed": "studies on several processes or a cluster",
        "cryptography": "encrypted connections between local processes",
        "jinja2": "the page of a report",
        "matplotlib": "pictures in a report",
        "safetensors": "saved models",
    },
    "data": {"pyarrow": "tasks that read CSV and Parquet files", "numpy": "sequences in .npy files"},
    "export": {
        "onnx": "export to ONNX",
        "onnxscript": "export to ONNX",
        "onnxruntime": "a check of exported ONNX files",
    },
    "testing": {"hypothesis": "conformance tests"},
}


@dataclass(frozen=True)
class Check:
    """One part of the environment: `status` is `"ok"`, `"missing"` (optional) or `"failed"`; `advice` is the fix."""

    subject: str
    status: str
    finding: str
    advice: str = ""


def doctor(as_json: Json = False, strict: Strict = False) -> None:
    """Check environment, backends, plugins and optional libraries; exit code 1 if a check fails."""
    checks = [_python(), *_core(), *_backends(), *_extras(), *_plugins(strict)]
    failed = any(check.status == "failed" for check in checks)
    if as_json:
        print_json({"healthy": not failed, "checks": [asdict(check) for check in checks]})
    else:
        rows = [(c.status, c.subject, c.finding, c.advice) for c in checks]
        print_table("atn-norms doctor", ("", "what", "found", "what to do"), rows)
        emit("\nsome checks failed: see `failed` above" if failed else "\neverything required works")
    if failed:
        raise typer.Exit(1)


def _python() -> Check:
    finding = (
        f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()} {platform.system()}"
    )
    return Check("python", "ok", f"{finding}, {os.cpu_count()} cores")


def _core() -> list[Check]:
    checks = []
    for name in ("atn-norms", "torch", "pydantic", "pluggy", "packaging", "regex", "typer", "rich", "ruamel.yaml"):
        try:
            checks.append(Check(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            advice = "pip install ." if name == "atn-norms" else f"pip install {name}"
            checks.append(Check(name, "failed", "not installed", advice))
    return checks


def _backends() -> list[Check]:
    import torch

    from atn_norms.backends import known
    from atn_norms.backends.native.library import unavailable
    from atn_norms.layers import LSTM

    accelerator = "CUDA is available" if torch.cuda.is_available() else "no CUDA device"
    checks = [Check("devices", "ok", f"CPU with {torch.get_num_threads()} threads; {accelerator}")]
    kernels = _kernels()  # before a layer loads them
    for name in known():
        if name == "native":
            checks.append(kernels)
            if unavailable():
                continue  # an optional part; the check above has reported it
        if name == "triton":
            checks.append(_gpu())
            if checks[-1].status != "ok":
                continue
        norm, device = None if name == "torch" else "layer", "cuda" if name == "triton" else "cpu"
        checks.append(
            _run_backend(f"backend {name}", partial(LSTM, 2, 3, norm=norm, backend=name, device=device), device)
        )
    return checks


def _kernels() -> Check:
    """Check the compiled kernels of the native backend."""
    from atn_norms.backends.native.library import found, load, survives

    again = "and reinstall atn-norms: `pip install --force-reinstall --no-deps --no-cache-dir .` in its folder"
    path, fate = found(), survives()
    if fate is not None:
        finding = f"{path}: they crash the process; {fate}"
        return Check("native kernels", "failed", finding, f"delete that file (the reference then runs), {again}")
    library = load()
    if isinstance(library, str):
        finding = f"none: {library}; the reference backend runs instead, many times slower"
        return Check("native kernels", "missing", finding, f"install a C compiler (gcc, or clang with libomp), {again}")
    finding = f"{library.path.name}, {library.level()}"
    if library.parallel:
        return Check("native kernels", "ok", f"{finding}, OpenMP")
    return Check("native kernels", "ok", f"{finding}, one thread", f"for threads, get a compiler with OpenMP {again}")


def _gpu() -> Check:
    """Check the requirements of the Triton backend."""
    import torch

    from atn_norms.backends.triton.available import installed, unavailable

    subject, reason = "triton kernels", unavailable()
    if reason is not None:
        return Check(subject, "missing", f"none: {reason}", "only for a GPU: install torch's build for CUDA")
    if not torch.cuda.is_available():
        return Check(subject, "missing", "none: torch finds no GPU here", "nothing, unless this machine has a GPU")
    finding = f"Triton {installed() or 'of some version'}, {torch.cuda.get_device_name()}"
    return Check(subject, "ok", f"{finding}; experimental, used only with backend='triton'")


def _run_backend(subject: str, make: Callable[[], Any], device: str) -> Check:
    import torch

    try:
        y, _ = make()(torch.zeros(2, 1, 2, device=device))
        y.sum().backward()
    except Exception as error:  # noqa: BLE001  any exception is the finding
        return Check(subject, "failed", f"{type(error).__name__}: {error}", "reinstall atn-norms and torch")
    return Check(subject, "ok", "runs, forward and backward")


def _extras() -> list[Check]:
    checks = []
    for extra, modules in EXTRAS.items():
        for module, purpose in modules.items():
            if importlib.util.find_spec(module):
                checks.append(Check(module, "ok", f"{importlib.metadata.version(module)}, for {purpose}"))
            else:
                advice = f"pip install 'atn-norms[{extra}]'"
                checks.append(Check(module, "missing", f"not installed; it is for {purpose}", advice))
    return checks


def _plugins(strict: bool) -> list[Check]:
    from atn_norms.plugins import DISABLE, report

    checks = []
    for record in report():
        subject = f"plugin {record.name}"
        source = " ".join(part for part in (record.distribution, record.version) if part)
        reason = f"of {source}: {record.reason}" if source else record.reason
        if record.status == "failed":
            checks.append(Check(subject, "failed", reason, f"fix or uninstall it, or block it with {DISABLE}"))
        elif record.disputed:
            checks.append(Check(subject, "failed", reason, f"fix or uninstall one, or block one with {DISABLE}"))
        elif record.faulty:
            finding = f"loaded from {source}, but {record.reason}"
            cure = "move its slow imports into functions" if record.kinds else "register its kinds in its hook"
            advice = f"{cure}, or block it with {DISABLE}"
            checks.append(Check(subject, "failed" if strict else "ok", finding, advice))
        else:
            details = record.reason or f"{len(record.kinds)} kinds from {source} in {record.seconds:.1f} s"
            checks.append(Check(subject, "ok", f"{record.status}: {details}"))
    return checks
