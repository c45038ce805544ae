"""One call of the kernels: tensors for the results, and the addresses of all tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from atn_norms.backends.fused.checks import check_gradients, check_inputs
from atn_norms.backends.fused.inputs import Fitted, Grads, Inputs
from atn_norms.backends.fused.operators import Operators
from atn_norms.backends.fused.plan import DOUBLE, Plan
from atn_norms.backends.native.layout import fits, fits_backward, kept_shapes, with_layout
from atn_norms.backends.native.library import load
from atn_norms.modes import empty_like

CPU = torch.device("cpu")

# The functions below check nothing: layout and inputs were checked before.


class Kernels:
    """The kernels in the form that the operators call."""

    def allocate(self, plan: Plan, inputs: Inputs, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        steps, batch, features = inputs.xs.shape
        states = [shape for site in plan.sites for shape in site.shapes(batch)]
        pooled = [(steps, 2 * site.features + 1) for site in plan.measured]
        kept = kept_shapes(plan, (steps, batch, features, inputs.hidden)) if keep else []
        return _results(inputs, inputs.states, [*([] if inputs.states else states), *pooled]), _kept(inputs, kept)

    def fit(self, plan: Plan, inputs: Inputs) -> Fitted | None:
        given = with_layout(plan, inputs)
        return given if fits(given) else None

    def check(self, plan: Plan, inputs: Inputs) -> Fitted:
        check_inputs(plan, inputs, CPU)
        return with_layout(plan, inputs)

    def fit_backward(
        self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor]
    ) -> Fitted | None:
        given = with_layout(plan, inputs)
        return given if fits(given) and fits_backward(given.layout, grads, ys, kept) else None

    def check_backward(self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor]) -> Fitted:
        fitted, dtype = self.check(plan, inputs), inputs.xs.dtype
        like = [(shape, DOUBLE if len(shape) == 1 else dtype) for shape in fitted.layout.kept]
        check_gradients(plan, inputs, grads, ys, kept, like)
        return fitted

    def forward(self, fitted: Fitted, keep: bool, states: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        layout, inputs, _ = fitted
        old, new = inputs.states if states else [], layout.dstates if states and not inputs.states else []
        results = _results(inputs, old, [*new, *layout.pooled_shapes])
        kept = _kept(inputs, layout.kept) if keep else []
        skipped = [] if states else [None] * len(layout.dstates)
        *values, timelines = kept or [None]
        _run(fitted, layout.forward, [*results[:3], *skipped, *results[3:], *values], timelines, False)
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
        weight_hr = xs.new_empty(0) if inputs.weight_hr is None else xs.new_zeros(inputs.weight_hr.shape)
        daffine, dbefore = [empty_like(tensor) for tensor in inputs.affine], zeros_like(inputs.states)
        absent = [xs.new_empty(features) for features in layout.absent]
        after = [None if leaf is None else leaf.contiguous() for leaf in grads.states]
        read = [*kept[:-1], ys.contiguous(), grads.ys.contiguous(), *after]
        _run(fitted, layout.backward, [*read, dh, dc, *found, weight_hr, *daffine, *absent, *dbefore], kept[-1], True)
        return [*found, dh, dc, weight_hr, *daffine, *dbefore]


def _run(
    fitted: Fitted, words: bytes, tensors: Sequence[Tensor | None], timelines: Tensor | None, backward: bool
) -> None:
    """Run a call; `words` are those of the timelines, of the inputs and of these contiguous tensors.

    The address of None and of an empty tensor is NULL. Without timelines the kernels have their own.
    """
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"the native backend cannot run: {library}")
    layout, inputs, own = fitted
    given = [*own, *tensors]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in given]
    if 0 in addresses:
        absent = [tensor for tensor, address in zip(given, addresses, strict=True) if not address]
        if [tensor for tensor in absent if tensor is not None and tensor.numel()]:
            raise RuntimeError("tensor: got a storage that was freed; expected one with memory")
    start = 0 if timelines is None else timelines.data_ptr()
    lines = [start + offset for offset in layout.offsets] if start else [0] * len(layout.offsets)
    library.run(layout.structure, words, [*lines, *addresses], backward, inputs.xs.dtype == DOUBLE)


def _results(inputs: Inputs, states: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return uninitialized tensors for the results of `forward`: like these states, then of these shapes."""
    xs = inputs.xs
    results = [xs.new_empty(*xs.shape[:2], inputs.weight_hh.shape[1])]
    results += [torch.empty_like(tensor.contiguous()) for tensor in (inputs.h0, inputs.c0, *states)]
    return results + [xs.new_empty(shape, dtype=DOUBLE) for shape in shapes]


def _kept(inputs: Inputs, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return uninitialized tensors for backward with these shapes; the last is the timelines."""
    if not shapes:
        return []
    xs, (*values, timelines) = inputs.xs, shapes
    return [*map(xs.new_empty, values), xs.new_empty(timelines, dtype=DOUBLE)]


def zeros_like(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return contiguous zeros of these types and shapes."""
    return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


OPERATORS = Operators("recurrent", Kernels())
