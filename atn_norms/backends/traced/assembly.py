"""Operations that assemble tensors: concatenation, and the gradients of slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atn_norms.backends.traced.patterns import MOST_PIECES, Expression, runs_of
from atn_norms.backends.traced.program import Op
from atn_norms.backends.traced.recorder import Call
from atn_norms.backends.traced.rules import RULES

if TYPE_CHECKING:
    from atn_norms.backends.traced.lowering import Lowering

STRUCTURAL: dict[str, Callable[[Lowering, Call], None]] = {}


def _assemble(lowering: Lowering, call: Call, parts: list[tuple[Tensor, Tensor]]) -> None:
    """Set the result to zeros, with tensors copied to given indices of its logical order."""
    result = call.results[0]
    size = result.numel()
    target = lowering._register(size)
    owner = torch.full((size,), -1)
    table = torch.zeros(size, dtype=torch.int64)
    for part, (tensor, places) in enumerate(parts):
        _, elements = lowering._elements(tensor)
        owner[places.reshape(-1)] = part
        table[places.reshape(-1)] = elements
    runs = runs_of(owner)
    if len(runs) > MOST_PIECES:
        raise call.unsupported("writes elements in an order that no instruction has")
    for start, end in runs:
        if owner[start] < 0:
            lowering._fill(target, start, end - start)
            continue
        slot, _ = lowering._elements(parts[int(owner[start])][0])
        for operand, count, at in lowering._pieces((slot, table[start:end]), call):
            lowering._emit(Op.COPY, target, start + at, count, (operand,))
    lowering._store(result, Expression(target, torch.arange(size), tuple(result.shape)))


def _places_of(call: Call) -> Tensor:
    result = call.results[0]
    return torch.arange(result.numel()).reshape(result.shape)


def _cat(lowering: Lowering, call: Call) -> None:
    tensors, dim = (
        [t for t in call.args[0] if t.numel()],
        (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)),
    )
    parts = _places_of(call).split([t.shape[dim] for t in tensors], dim)
    _assemble(lowering, call, list(zip(tensors, parts, strict=True)))


def _stack(lowering: Lowering, call: Call) -> None:
    tensors, dim = call.args[0], (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0))
    _assemble(lowering, call, list(zip(tensors, _places_of(call).unbind(dim), strict=True)))


def _slice_back(lowering: Lowering, call: Call) -> None:
    gradient, _, dim, start, end, step = call.args
    index = [slice(None)] * call.results[0].ndim
    index[dim] = slice(start, end, step)
    _assemble(lowering, call, [(gradient, _places_of(call)[tuple(index)])])


def _select_back(lowering: Lowering, call: Call) -> None:
    gradient, _, dim, at = call.args
    _assemble(lowering, call, [(gradient, _places_of(call).select(dim, at))])


def _var_mean(lowering: Lowering, call: Call) -> None:
    for place, name in enumerate(("var", "mean")):
        single = replace(call, results=[call.results[place]])
        builder = lowering.builder(single)
        arguments = dict(zip(("dim",), call.args[1:], strict=False)) | call.kwargs
        if name == "mean":
            arguments.pop("correction", None)
        lowering._store(call.results[place], builder.wrap(RULES[name](builder, call.args[0], **arguments)))


STRUCTURAL.update(cat=_cat, stack=_stack, slice_backward=_slice_back, select_backward=_select_back, var_mean=_var_mean)
