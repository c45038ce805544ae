"""One call of the kernels: room for the results, and a structure full of addresses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.fused.operators import Operators, empty_like
from atn_norms.backends.fused.plan import DOUBLE, Plan
from atn_norms.backends.native.layout import Inputs, kept_shapes
from atn_norms.backends.native.library import CallArgs, load, word

MOST_THREADS = 256  # a kernel's work space grows with its threads
_WRITTEN = [word(name) for name in ("output", "hn", "cn")]
_KEPT = [word(name) for name in ("projected", "recurrent", "cells")]
_ASKED = [word(name) for name in ("output", "doutput", "dh", "dc")]
_FOUND = [word(name) for name in ("dxs", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh")]

# Everything here trusts what is `Given`: it was found to fit before.


class _Call:
    """The structure, filled in with what both directions read, and what must stay alive until the kernels return."""

    def __init__(self, given: Inputs, timelines: Tensor) -> None:
        layout = given.layout
        self._args = CallArgs.from_buffer_copy(layout.structure)
        self._args.threads = min(torch.get_num_threads(), MOST_THREADS)
        self._words = memoryview(self._args).cast("B").cast("q")
        self._is_double = given.xs.dtype == DOUBLE
        self._alive: list[Tensor | None] = [timelines]
        start = timelines.data_ptr()
        for place, before in layout.timelines:
            self._words[place] = start + before
        self.point(layout.given, [tensor.contiguous() for tensor in given.tensors])
        if layout.absent:
            self.point(layout.absent, [given.xs.new_full((features,), value) for features, value in layout.constants])

    def point(self, places: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
        """Let words of the structure point at tensors, row by row in memory; None and what is empty become NULL."""
        words = self._words
        self._alive += tensors
        for place, tensor in zip(places, tensors, strict=True):
            if tensor is not None:
                words[place] = tensor.data_ptr()

    def run(self, direction: str) -> None:
        """Run the kernel."""
        library = load()
        if isinstance(library, str):
            raise RuntimeError(f"the native backend cannot run: {library}")
        library.run(direction, self._args, self._is_double)


def forward(given: Inputs, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, last h and c, every site's new state and what it pooled; and, to `keep`, what the way back needs."""
    results, kept = room(given.plan, given.xs, given.weight_hh, given.h0, given.c0, given.states, keep)
    timelines = kept[-1] if keep else given.xs.new_empty(given.layout.doubles, dtype=DOUBLE)
    call = _Call(given, timelines)
    call.point(_WRITTEN + given.layout.next + given.layout.pooled, results)
    if keep:
        call.point(_KEPT, kept[:-1])
    call.run("forward")
    return results, kept


def backward(
    given: Inputs,
    grad_outputs: tuple[Tensor, Tensor, Tensor, Sequence[Tensor | None]],
    ys: Tensor,
    kept: Sequence[Tensor],
    wants_xs: bool,
) -> list[Tensor]:
    """Gradients of xs, the weights, the biases, h0, c0, every affine tensor, and every state's leaves.

    `grad_outputs` are the gradients of ys, hn, cn and, where there are any, of the new states.
    """
    dys, dhn, dcn, dnext = grad_outputs
    layout, xs = given.layout, given.xs
    dh, dc = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (dhn, dcn))
    dxs = empty_like(xs) if wants_xs else xs.new_empty(0)
    found = [dxs, *zeros_like((given.weight_ih, given.weight_hh)), xs.new_zeros(given.wide), xs.new_zeros(given.wide)]
    daffine, dbefore = [empty_like(tensor) for tensor in given.affine], zeros_like(given.states)
    call = _Call(given, kept[-1])
    call.point(_KEPT, kept[:-1])
    call.point(_ASKED, [tensor.contiguous() for tensor in (ys, dys, dh, dc)])
    call.point(_FOUND, found)
    call.point(layout.daffine, daffine)
    call.point(layout.dabsent, [xs.new_empty(features) for features, _ in layout.constants])
    call.point(layout.dnext, [None if leaf is None else leaf.contiguous() for leaf in dnext])
    if dbefore:
        call.point(layout.dstate, dbefore)
    call.run("backward")
    return [*found, dh, dc, *daffine, *dbefore]


def room(
    plan: Plan, xs: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, states: Sequence[Tensor], keep: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Unwritten tensors: the results of `forward`, and what it is to keep.

    Kept is what `kept_shapes` lists.
    """
    (steps, batch, inputs), hidden = xs.shape, weight_hh.shape[1]
    results = [xs.new_empty(steps, batch, hidden)]
    results += [torch.empty_like(tensor.contiguous()) for tensor in (h0, c0, *states)]
    if not states:
        results += [xs.new_empty(shape, dtype=DOUBLE) for site in plan.sites for shape in site.shapes(batch)]
    results += [xs.new_empty(steps, 2 * site.features + 1, dtype=DOUBLE) for site in plan.measured]
    if not keep:
        return results, []
    *values, timelines = kept_shapes(plan, steps, batch, inputs, hidden)
    return results, [*map(xs.new_empty, values), xs.new_empty(timelines, dtype=DOUBLE)]


def zeros_like(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Zeros of these types and shapes, row by row."""
    return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


class Kernels:
    """The kernels, as the operators call them."""

    room = staticmethod(room)

    @staticmethod
    def forward(plan: Plan, arguments: Sequence[Any], keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        given = Inputs(plan, *arguments)
        given.check()
        return forward(given, keep)

    @staticmethod
    def backward(
        plan: Plan,
        arguments: Sequence[Any],
        grad_outputs: tuple[Any, ...],
        ys: Tensor,
        kept: Sequence[Tensor],
        wants_xs: bool,
    ) -> list[Tensor]:
        given = Inputs(plan, *arguments)
        given.check_backward(grad_outputs, ys, kept)  # type: ignore[arg-type]
        return backward(given, grad_outputs, ys, kept, wants_xs)


OPERATORS = Operators("recurrent", Kernels())
