"""Check and time the backends of one device: `atn-norms bench --device cuda --check`.

The script is prepared for a device that is at hand for a few minutes. Every result is written as soon as it is known,
so an interrupted run loses nothing. A failed check stops only the timing of its case.
"""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atn_norms.bench.spec import Size
from atn_norms.errors import SpecError
from atn_norms.layers import LayerSpec, Recurrent

VALUES, GRADIENTS = (
    1e-5,
    1e-4,
)  # largest difference of float32 from the float64 reference, relative to the largest entry
REPEATS = 20  # runs that must agree bit by bit
SAMPLES, WARM_UP = 11, 3  # timed runs, of which the median counts, and untimed runs before them
CELLS, NORMS = ("lstm", "gru", "rnn"), ("layer", "rms")
WINDOWS: tuple[Any, ...] = (1, 25, 100, "cumulative", {"kind": "exponential", "half_life": 10.0})
CHECKED = (Size(3, 17, 5, 7), Size(2, 60, 50, 100))
TIMED = (
    Size(2, 60, 50, 100),
    Size(10, 68, 128, 120),
    Size(200, 200, 32, 220),
    Size(256, 512, 64, 200),
    Size(512, 1000, 64, 200),
)
TIMED_WINDOWS = (1, 25, 100)
TORCH, REFERENCE, GRAPHED = "torch.nn", "reference", "reference, CUDA graph"
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Finding:
    """One line of the results.

    | field | meaning | unit |
    |---|---|---|
    | `stage` | `check`, `repeat` or `time` | |
    | `status` | `passed`, `failed`, `measured`, `unsupported` | |
    | `value` | `check`: largest difference over its limit; `repeat`: runs that differ; `time`: median | 1, runs, ms |
    | `ratio` | time over the time of `torch.nn` without a norm, in the same run | 1 |
    | `memory` | peak of allocated device memory during the timed step | MB |
    | `note` | the reason of a failure | |
    """

    stage: str
    runner: str
    cell: str
    norm: str
    window: str
    size: str
    status: str
    value: float | None = None
    ratio: float | None = None
    memory: float | None = None
    note: str = ""


class Plan(NamedTuple):
    """Cases of a run; `limit` is the time in seconds after which no new case starts."""

    device: str
    checked: Sequence[Size] = CHECKED
    timed: Sequence[Size] = TIMED
    cells: Sequence[str] = CELLS
    norms: Sequence[str] = NORMS
    windows: Sequence[Any] = WINDOWS
    timed_windows: Sequence[int] = TIMED_WINDOWS
    repeats: int = REPEATS
    samples: int = SAMPLES
    limit: float = 360.0


TINY = {"checked": (Size(2, 5, 3, 4),), "timed": (Size(2, 5, 3, 4),), "timed_windows": (2,), "repeats": 2, "samples": 3}


class Results:
    """The files of a run: `device.csv` with a line for each finding, and `device.md` with tables."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.facts, self.findings = folder, device_facts(device), list[Finding]()
        folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "device.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([field.name for field in fields(Finding)])

    def add(self, finding: Finding) -> Finding:
        """Write a finding to both files."""
        self.findings.append(finding)
        with open(self.folder / "device.csv", "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(asdict(finding).values())
        (self.folder / "device.md").write_text(self.page(), encoding="utf-8")
        return finding

    @property
    def failed(self) -> list[Finding]:
        """Checks that did not pass."""
        return [finding for finding in self.findings if finding.status == "failed"]

    def page(self) -> str:
        """Render the Markdown page."""
        checks = [finding for finding in self.findings if finding.stage != "time"]
        passed = sum(finding.status == "passed" for finding in checks)
        lines = ["# Device check", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", f"{passed} of {len(checks)} checks passed.", ""]
        for finding in self.failed:
            lines.append(f"- **{label(finding)}**: {finding.note}")
        timed = [finding for finding in self.findings if finding.stage == "time"]
        if timed:
            lines += ["", "| size | cell | norm | window | runner | ms | of torch.nn | MB | note |"]
            lines += ["|---|---|---|---|---|---:|---:|---:|---|"]
            lines += [f"| {' | '.join(_cells(finding))} |" for finding in timed]
        return "\n".join(lines) + "\n"


def _cells(finding: Finding) -> list[str]:
    numbers = [(finding.value, ".3f"), (finding.ratio, ".2f"), (finding.memory, ".1f")]
    shown = ["" if value is None else format(value, style) for value, style in numbers]
    note = finding.note if finding.status == "measured" else f"{finding.status}: {finding.note}"
    return [finding.size, finding.cell, finding.norm, finding.window, finding.runner, *shown, note]


def label(finding: Finding) -> str:
    """Name a finding in one phrase."""
    return f"{finding.stage} {finding.runner}: {finding.cell}, {finding.norm}, window {finding.window}, {finding.size}"


def run(plan: Plan, folder: Path, on_finding: Callable[[Finding], None] = lambda finding: None) -> Results:
    """Check, repeat and time every case of a plan, and write each finding when it is known.

    Checks of all sizes come first, then times from the smallest size to the largest. A case whose check failed is not
    timed. No new case starts after `plan.limit` seconds.

    Errors: `SpecError` where the device is not there.
    """
    if plan.device not in DEVICES or (plan.device == "cuda" and not torch.cuda.is_available()):
        raise SpecError("--device", repr(plan.device), f"a device of this machine: {', '.join(present())}")
    results, begin = Results(folder, plan.device), perf_counter()
    broken: set[tuple[str, str]] = set()
    for stage in (_checks(plan), _times(plan, broken)):
        for make in stage:
            if perf_counter() - begin > plan.limit:
                return results
            finding = results.add(make())
            on_finding(finding)
            if finding.status == "failed":
                broken.add((finding.cell, finding.norm))
    return results


def present() -> list[str]:
    """Devices of this machine that can be checked."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def fast_backend(device: str) -> str:
    """Return the backend to check: Triton on a GPU and in Triton's interpreter, else the native one."""
    from atn_norms.backends.triton.available import interpreted

    return "triton" if device == "cuda" or interpreted() else "native"


def device_facts(device: str) -> dict[str, Any]:
    """Versions, and the name, memory and driver of the device."""
    from atn_norms import __version__

    facts: dict[str, Any] = {"atn-norms": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        facts |= {"compute capability": f"{properties.major}.{properties.minor}", "CUDA": torch.version.cuda}
        facts |= {"cuDNN": torch.backends.cudnn.version(), "driver": _driver()}
    return facts | {"triton": _triton()}


def _driver() -> str:
    """Return the version of the driver as `nvidia-smi` prints it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _triton() -> str:
    from atn_norms.backends.triton.available import installed

    return installed() or "not installed"


def _spec(cell: str, norm: str, window: Any, size: Size, backend: str) -> LayerSpec:
    sizes = {"input_size": size.input, "hidden_size": size.hidden}
    return LayerSpec.model_validate({"cell": cell, "norm": norm, "window": window, "backend": backend, **sizes})


def _name(window: Any) -> str:
    return window["kind"] if isinstance(window, Mapping) else str(window)


def _base(stage: str, runner: str, cell: str, norm: str, window: Any, size: Size) -> Finding:
    return Finding(stage, runner, cell, norm, _name(window), str(size), "passed")


def _checks(plan: Plan) -> Iterator[Callable[[], Finding]]:
    backends = (fast_backend(plan.device), REFERENCE)
    for size, backend, cell, norm, window in product(plan.checked, backends, plan.cells, plan.norms, plan.windows):
        yield partial(check, plan.device, backend, cell, norm, window, size)
    for cell, norm, window in product(plan.cells, plan.norms, plan.windows):
        yield partial(
            repeat, plan.device, fast_backend(plan.device), cell, norm, window, plan.checked[-1], plan.repeats
        )


def check(device: str, backend: str, cell: str, norm: str, window: Any, size: Size) -> Finding:
    """Compare values, states and every gradient in float32 with the float64 reference on the CPU."""
    finding = _base("check", backend, cell, norm, window, size)
    truth = _layer(cell, norm, window, size, REFERENCE, torch.float64, "cpu")
    try:
        layer = _layer(cell, norm, window, size, backend, torch.float32, device)
    except ValueError as error:
        return replace(finding, status="unsupported", note=str(error))
    layer.load_state_dict(truth.state_dict())
    xs, upstream = _inputs(size, torch.float64)
    try:
        pairs = zip(_outcome(layer, xs, upstream), _outcome(truth, xs, upstream), strict=True)
        worst, name = max((_excess(actual, wanted, limit), name) for (name, limit, actual), (_, _, wanted) in pairs)
    except Exception as error:  # noqa: BLE001  a backend that raises has failed, and the others are still checked
        return replace(finding, status="failed", note=f"{type(error).__name__}: {error}"[:300])
    if worst <= 1:
        return replace(finding, value=worst)
    return replace(finding, status="failed", value=worst, note=f"{name}: {worst:.3g} times the allowed difference")


def repeat(device: str, backend: str, cell: str, norm: str, window: Any, size: Size, runs: int) -> Finding:
    """Run a step again and again; every result must be the same bit by bit."""
    finding = _base("repeat", backend, cell, norm, window, size)
    try:
        layer = _layer(cell, norm, window, size, backend, torch.float32, device)
    except ValueError as error:
        return replace(finding, status="unsupported", note=str(error))
    inputs = _inputs(size, torch.float64)
    try:
        first = [tensor for _, _, tensor in _outcome(layer, *inputs)]
        differing = 0
        for _ in range(runs - 1):
            again = [tensor for _, _, tensor in _outcome(layer, *inputs)]
            differing += any(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
    except Exception as error:  # noqa: BLE001  as in `check`
        return replace(finding, status="failed", note=f"{type(error).__name__}: {error}"[:300])
    note = f"{differing} of {runs - 1} runs differ from the first" if differing else ""
    return replace(finding, status="failed" if differing else "passed", value=float(differing), note=note)


def _layer(cell: str, norm: str, window: Any, size: Size, backend: str, dtype: torch.dtype, device: str) -> Recurrent:
    torch.manual_seed(0)
    layer = _spec(cell, norm, window, size, backend).build(dtype=dtype, device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm_" in name:  # gains and shifts away from 1 and 0, the same on every device
                parameter += torch.linspace(-0.3, 0.3, parameter.numel(), dtype=dtype, device=device)
    return layer


def _inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(size.steps, size.batch, size.input, generator=generator, dtype=dtype)
    return xs, torch.randn(size.steps, size.batch, size.hidden, generator=generator, dtype=dtype)


def _outcome(layer: Recurrent, xs: Tensor, upstream: Tensor) -> list[tuple[str, float, Tensor]]:
    """Every result of a training step on the CPU: its name, its limit and its value."""
    like = next(layer.parameters())
    xs = xs.to(like).requires_grad_()
    ys, state = layer.unroll(xs)
    hidden = layer.hidden(state)
    states = [hidden] if isinstance(hidden, Tensor) else list(hidden)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(ys, [xs, *parameters], upstream.to(like))
    values = [("outputs", VALUES, ys)] + [(f"state {i}", VALUES, each) for i, each in enumerate(states)]
    slopes = zip(["input", *names], gradients, strict=True)
    values += [(f"gradient of {name}", GRADIENTS, gradient) for name, gradient in slopes]
    return [(name, limit, tensor.detach().cpu()) for name, limit, tensor in values]


def _excess(actual: Tensor, expected: Tensor, limit: float) -> float:
    """Return the largest difference, relative to the largest expected entry (at least 1), over its limit."""
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = max(1.0, float(expected.abs().max()))
    return float((actual.double() - expected.double()).abs().max()) / scale / limit


def _times(plan: Plan, broken: set[tuple[str, str]]) -> Iterator[Callable[[], Finding]]:
    for size, cell in product(plan.timed, plan.cells):
        base = _step(plan.device, getattr(nn, cell.upper())(size.input, size.hidden, device=plan.device), size)
        torch_ms = _milliseconds(plan.device, base, plan.samples)
        plain = replace(_base("time", TORCH, cell, "none", "any", size), status="measured", value=torch_ms, ratio=1.0)
        yield partial(replace, plain, memory=_peak(plan.device, base))
        for norm, window in product(plan.norms, plan.timed_windows):
            if (cell, norm) not in broken:
                for runner in (fast_backend(plan.device), *_slow_runners(plan, cell, norm, window)):
                    yield partial(timed, plan, runner, cell, norm, window, size, torch_ms)


def _slow_runners(plan: Plan, cell: str, norm: str, window: Any) -> tuple[str, ...]:
    """The reference is timed once a size, for scale."""
    if (cell, norm, window) != (plan.cells[0], plan.norms[0], plan.timed_windows[0]):
        return ()
    return (REFERENCE, GRAPHED) if plan.device == "cuda" else (REFERENCE,)


def timed(plan: Plan, runner: str, cell: str, norm: str, window: Any, size: Size, torch_ms: float) -> Finding:
    """Time a training step of one runner; the ratio is to `torch_ms`, torch.nn's time in the same run."""
    finding = replace(_base("time", runner, cell, norm, window, size), status="measured")
    backend = REFERENCE if runner == GRAPHED else runner
    try:
        step = _step(plan.device, _layer(cell, norm, window, size, backend, torch.float32, plan.device), size)
        if runner == GRAPHED:
            step = _graphed(step)
        milliseconds = _milliseconds(plan.device, step, plan.samples)
        memory = _peak(plan.device, step)
    except ValueError as error:
        return replace(finding, status="unsupported", note=str(error))
    except Exception as error:  # noqa: BLE001  one runner that breaks does not end the run
        return replace(finding, status="failed", note=f"{type(error).__name__}: {error}"[:300])
    return replace(finding, value=milliseconds, ratio=milliseconds / torch_ms, memory=memory)


def _step(device: str, module: nn.Module, size: Size) -> Callable[[], None]:
    """Forward and backward of a module on fixed inputs."""
    xs, upstream = (tensor.to(device, torch.float32) for tensor in _inputs(size, torch.float32))
    parameters = list(module.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        module(xs)[0].backward(upstream)

    return step


def _graphed(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph, after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _milliseconds(device: str, step: Callable[[], None], samples: int) -> float:
    """Return the median time of a step; the device is synchronized before and after each."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(samples):
        _synchronize(device)
        begin = perf_counter()
        step()
        _synchronize(device)
        times.append(1e3 * (perf_counter() - begin))
    return median(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str, step: Callable[[], None]) -> float | None:
    """Return the peak of allocated device memory during a step in MB; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6
