"""Processor time of one frame by each route of deployment, interleaved: `python docs/figures/frames.py [ROUNDS]`."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atn_norms as an
from atn_norms.layers.export import FORMATS, SUFFIX, export

FRAMES = 100  # consecutive frames of a round
SIZES = (16, 64)  # inputs and units


def routes(window: int, folder: Path) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Return the routes for an LSTM with layer norm: each takes one frame and keeps its state."""
    layer = an.LSTM(*SIZES, norm="layer", window=window).eval()
    step = an.StreamingStep(layer)
    names = ["frame", *(f"state_{i}" for i in range(len(step.initial())))]
    found = {"unroll": _unrolled(layer), "StreamingStep": _stepped(step, step.initial())}
    for kind in FORMATS:
        path = folder / f"step-{window}{SUFFIX[kind]}"
        export(step, [torch.randn(1, SIZES[0]), *step.initial()], path, kind, names=names)
        found[kind] = _stepped(_loaded(kind, path), step.initial())
    return found


def _unrolled(layer: an.LSTM) -> Callable[[torch.Tensor], Any]:
    state = layer.initial(1)

    def run(frame: torch.Tensor) -> None:
        nonlocal state
        _, state = layer.unroll(frame.unsqueeze(0), state)

    return run


def _stepped(step: Callable[..., Any], state: list[torch.Tensor]) -> Callable[[torch.Tensor], Any]:
    def run(frame: torch.Tensor) -> None:
        nonlocal state
        _, *state = step(frame, *state)

    return run


def _loaded(kind: str, path: Path) -> Callable[..., Any]:
    if kind == "pt2":
        return torch.export.load(str(path)).module()
    if kind == "aoti":
        return torch._inductor.aoti_load_package(str(path))  # type: ignore[attr-defined]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    names = [each.name for each in session.get_inputs()]

    def run(*tensors: Any) -> Any:
        arrays = [each.numpy() if isinstance(each, torch.Tensor) else each for each in tensors]
        return session.run(None, dict(zip(names, arrays, strict=True)))

    return run


def _torchs() -> Callable[[torch.Tensor], Any]:
    layer, state = nn.LSTM(*SIZES).eval(), None

    def run(frame: torch.Tensor) -> None:
        nonlocal state
        _, state = layer(frame.unsqueeze(0), state)

    return run


def main(rounds: int = 15) -> None:
    """Print the best and the median round of each route, in microseconds of this thread per frame."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        timed = {(name, w): run for w in (1, 25) for name, run in routes(w, Path(folder)).items()}
        timed["torch.nn.LSTM", 1] = _torchs()
        frames = torch.randn(FRAMES, 1, SIZES[0])
        times: dict[tuple[str, int], list[float]] = {each: [] for each in timed}
        for _ in range(rounds + 1):  # the first round is not counted
            for each, run in timed.items():
                started = time.thread_time()
                for frame in frames:
                    run(frame)
                times[each].append((time.thread_time() - started) / FRAMES * 1e6)
    for (name, window), found in times.items():
        counted = sorted(found[1:])
        print(f"{name:14} window {window:2}: best {counted[0]:6.0f}, median {statistics.median(counted):6.0f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
