"""Compile the kernels of some cases for a GPU, without a device: `python -m tests.triton.compiling NAME...`.

Print a line for every kernel and set of constants, with its name and the bytes of its program.
"""

import sys
import time
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from atn_norms.backends.description import describe
from atn_norms.backends.fused.fused_backend import plan_of
from atn_norms.backends.fused.inputs import Grads, Inputs
from atn_norms.backends.program import Unsupported
from atn_norms.backends.triton import call
from tests.native.strategies import Pair
from tests.triton.variants import VARIANTS

TARGET = GPUTarget("cuda", 90, 32)  # an H100


class Absent:
    """A driver for compilation only, without a device."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compiled(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Compile a kernel instead of launching it."""
    start = time.perf_counter()
    program = kernel.warmup(*arguments, grid=grid, **options).asm["cubin"]
    if program[:4] != b"\x7fELF":
        raise SystemExit(f"{kernel.fn.__name__}: {program[:4]!r} is the beginning of no program")
    print(kernel.fn.__name__, len(program), f"{time.perf_counter() - start:.1f}", flush=True)


def compile_all(pair: Pair, wanted: set[str]) -> None:
    """Compile all launches of a case, forward and backward, for the selected kernels."""
    layer = pair.layer("reference")
    weights = layer.cell_weights("_l0")
    description, moments = describe(layer.cell, weights)
    plan = plan_of(layer.cell, description)
    assert not isinstance(plan, Unsupported), plan
    like = weights["weight_hh"].detach()
    xs = like.new_zeros(pair.steps, pair.batch, pair.inputs)
    h0 = like.new_zeros(pair.batch, pair.hidden)
    c0 = h0.clone() if plan.is_lstm else h0.new_empty(0)
    affine = [tensor.detach() for each in moments for tensor in (each.gain, each.shift) if tensor is not None]
    states = []
    if pair.before is not None:
        states = [torch.zeros(shape, dtype=torch.float64) for site in plan.sites for shape in site.shapes(pair.batch)]
    lengths = torch.full((pair.batch,), pair.steps) if pair.ragged else None
    parameters = [weights[name].detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    inputs = Inputs._make([xs, *parameters, h0, c0, None, affine, [], states, lengths])

    def launch(kernel: Any, *rest: Any, **options: Any) -> None:
        if not wanted or kernel.fn.__name__ in wanted:
            compiled(kernel, *rest, **options)

    call.LAUNCH = launch
    kernels = call.Kernels()
    given = kernels.check(plan, inputs)
    results, kept = kernels.forward(given, True)
    grads = [torch.zeros_like(leaf) if pair.before is not None else None for leaf in results[3:]]
    kernels.backward(given, Grads(results[0], h0, c0, grads), results[0], kept, True)


if __name__ == "__main__":
    driver.set_active(Absent())  # pyright: ignore[reportArgumentType]  no driver, only the attributes that compiling reads
    for name in sys.argv[1:]:
        compile_all(*VARIANTS[name])
