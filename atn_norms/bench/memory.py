"""Growth of the peak resident size over one training step, measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from atn_norms.bench.spec import Case, Size

_CODE = "from atn_norms.bench.memory import main; main()"
_WARM = Size(2, 3, 2, 2)


def can_measure() -> bool:
    """Return True where the system reports the peak and can reset it."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def growth(case: Case, name: str, window: int | str | None, timeout: float) -> int | str:
    """Growth of a fresh process's peak over its first step of that size in bytes, or the reason why it is unknown.

    The libraries are loaded and one step of a tiny layer is done before; the gradients are made in the step.
    """
    request = json.dumps({"case": asdict(case), "name": name, "window": window})
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE, request],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"memory not measured in {timeout:.0f} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"memory not measured: exit code {done.returncode}: {last}"
    return int(done.stdout.split()[-1])


def main() -> None:
    """Print the growth in bytes; runs in the fresh process."""
    import torch

    from atn_norms.bench.contest import Runner
    from atn_norms.bench.machine import set_malloc

    request = json.loads(sys.argv[1])
    size = Size(*request["case"].pop("size"))
    case = Case(**request["case"], size=size)
    set_malloc(case.malloc)
    torch.set_num_threads(case.threads)
    Runner(replace(case, size=_WARM), request["name"], request["window"]).call(_WARM.steps)()
    step = Runner(case, request["name"], request["window"]).call(size.steps)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak to the present size
    before = _resident("VmRSS")
    step()
    print(max(0, _resident("VmHWM") - before))


def _resident(field: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{field}:"))
