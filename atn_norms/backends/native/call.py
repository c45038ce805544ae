"""One call of the kernels: tensors for the results, and a structure of addresses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from atn_norms.backends.fused.checks import check_gradients, check_inputs
from atn_norms.backends.fused.inputs import Fitted, Grads, Inputs
from atn_norms.backends.fused.operators import Operators
from atn_norms.backends.fused.plan import DOUBLE, Plan
from atn_norms.backends.modes import empty_like
from atn_norms.backends.native.layout import fits, kept_shapes, with_layout
from atn_norms.backends.native.library import CallArgs, load, word

MOST_THREADS = 256  # the work space of a kernel grows with the number of threads
CPU = torch.device("cpu")
_WRITTEN = [word(name) for name in ("output", "hn", "cn")]
_KEPT = [word(name) for name in ("projected", "recurrent", "cells", "units")]
_GRADS = [word(name) for name in ("output", "doutput", "dh", "dc")]
_FOUND = [word(name) for name in ("dxs", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dweight_hr")]

# The functions below check nothing: layout and inputs were checked before.


class _Call:
    """The structure with the addresses that both directions read, and references that keep the tensors alive."""

    def __init__(self, given: Fitted, timelines: Tensor) -> None:
        layout, inputs, tensors = given
        self._args = CallArgs.from_buffer_copy(layout.structure)
        self._args.threads = min(torch.get_num_threads(), MOST_THREADS)
        self._words = memoryview(self._args).cast("B").cast("q")
        self._is_double = inputs.xs.dtype == DOUBLE
        self._alive: list[Tensor | None] = [timelines]
        start = timelines.data_ptr()
        for place, before in layout.timelines:
            self._words[place] = start + before
        self.point(layout.given, [tensor.contiguous() for tensor in tensors])
        if layout.absent:
            self.point(layout.absent, [inputs.xs.new_full((features,), value) for features, value in layout.constants])

    def point(self, places: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
        """Store the addresses of contiguous tensors in the structure; None and empty tensors become NULL."""
        words = self._words
        self._alive += tensors
        for place, tensor in zip(places, tensors, strict=True):
            if tensor is not None:
                words[place] = address = tensor.data_ptr()
                if not address and tensor.numel():
                    raise RuntimeError("tensor: got a storage that was freed; expected one with memory")

    def run(self, direction: str) -> None:
        """Run the kernel."""
        library = load()
        if isinstance(library, str):
            raise RuntimeError(f"the native backend cannot run: {library}")
        library.run(direction, self._args, self._is_double)


class Kernels:
    """The kernels in the form that the operators call."""

    def allocate(self, plan: Plan, inputs: Inputs, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        steps, batch, features = inputs.xs.shape
        states = [shape for site in plan.sites for shape in site.shapes(batch)]
        pooled = [(steps, 2 * site.features + 1) for site in plan.measured]
        return _allocate(
            inputs, states, pooled, kept_shapes(plan, (steps, batch, features, inputs.hidden)) if keep else []
        )

    def fit(self, plan: Plan, inputs: Inputs) -> Fitted | None:
        given = with_layout(plan, inputs)
        return given if fits(given) else None

    def check(self, plan: Plan, inputs: Inputs) -> Fitted:
        check_inputs(plan, inputs, CPU)
        return with_layout(plan, inputs)

    def check_backward(self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor]) -> Fitted:
        fitted, dtype = self.check(plan, inputs), inputs.xs.dtype
        like = [(shape, DOUBLE if len(shape) == 1 else dtype) for shape in fitted.layout.kept]
        check_gradients(plan, inputs, grads, ys, kept, like)
        return fitted

    def forward(self, fitted: Fitted, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        layout, inputs, _ = fitted
        results, kept = _allocate(inputs, layout.dstates, layout.pooled_shapes, layout.kept if keep else [])
        timelines = kept[-1] if keep else inputs.xs.new_empty(layout.doubles, dtype=DOUBLE)
        call = _Call(fitted, timelines)
        call.point(_WRITTEN + layout.next + layout.pooled, results)
        if keep:
            call.point(_KEPT, kept[:-1])
        call.run("forward")
        return results, kept

    def backward(
        self, fitted: Fitted, grads: Grads, ys: Tensor, kept: Sequence[Tensor], wants_xs: bool
    ) -> list[Tensor]:
        layout, inputs, _ = fitted
        xs, weights = inputs.xs, (inputs.weight_ih, inputs.weight_hh)
        wide = 0 if inputs.bias_ih is None else inputs.bias_ih.shape[0]
        dh, dc = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (grads.hn, grads.cn))
        dxs = empty_like(xs) if wants_xs else xs.new_empty(0)
        found = [dxs, *zeros_like(weights), xs.new_zeros(wide), xs.new_zeros(wide)]
        weight_hr = xs.new_zeros(0 if inputs.weight_hr is None else inputs.weight_hr.shape)
        daffine, dbefore = [empty_like(tensor) for tensor in inputs.affine], zeros_like(inputs.states)
        call = _Call(fitted, kept[-1])
        call.point(_KEPT, kept[:-1])
        call.point(_GRADS, [tensor.contiguous() for tensor in (ys, grads.ys, dh, dc)])
        call.point(_FOUND, [*found, weight_hr])
        call.point(layout.daffine, daffine)
        call.point(layout.dabsent, [xs.new_empty(features) for features, _ in layout.constants])
        call.point(layout.dnext, [None if leaf is None else leaf.contiguous() for leaf in grads.states])
        if dbefore:
            call.point(layout.dstate, dbefore)
        call.run("backward")
        return [*found, dh, dc, weight_hr, *daffine, *dbefore]


def _allocate(
    inputs: Inputs,
    states: Sequence[tuple[int, ...]],
    pooled: Sequence[tuple[int, ...]],
    kept: Sequence[tuple[int, ...]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return uninitialized tensors for the results of `forward` with these shapes, and for its kept tensors."""
    xs, old = inputs.xs, inputs.states
    results = [xs.new_empty(*xs.shape[:2], inputs.weight_hh.shape[1])]
    results += [torch.empty_like(tensor.contiguous()) for tensor in (inputs.h0, inputs.c0, *old)]
    results += [xs.new_empty(shape, dtype=DOUBLE) for shape in (*(() if old else states), *pooled)]
    if not kept:
        return results, []
    *values, timelines = kept
    return results, [*map(xs.new_empty, values), xs.new_empty(timelines, dtype=DOUBLE)]


def zeros_like(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return contiguous zeros of these types and shapes."""
    return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


OPERATORS = Operators("recurrent", Kernels())
