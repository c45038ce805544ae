"""The kernels without the dispatcher, which costs more than a short sequence: in unobserved eager calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.fused.operators import ordinary, unwatched
from atn_norms.backends.fused.plan import Plan
from atn_norms.backends.native import call
from atn_norms.backends.native.call import OPERATORS
from atn_norms.backends.native.layout import Inputs


def attempt(plan: Plan, *arguments: Any) -> list[Tensor] | None:
    """Outputs, last h and c, every site's new state and what it pooled, of the operator's arguments from xs to lengths.

    None where the operator must do it: it checks, it is watched, and it can be compiled.
    """
    if not unwatched():
        return None
    given = Inputs(plan, *arguments)
    if not ordinary(given.tensors) or not given.fits():
        return None
    if torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in given.tensors]:
        return list(_Recurrent.apply(given, arguments, *given.tensors))
    return call.forward(given, False)[0]


class _Recurrent(torch.autograd.Function):
    """The operator's place in a graph; the tensors come once as what is given, and once for autograd to see."""

    @staticmethod
    def forward(ctx: Any, given: Inputs, arguments: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        results, kept = call.forward(given, True)
        ctx.biased = arguments[3] is not None
        OPERATORS.remember(ctx, given.plan, arguments, results, kept)
        ctx.mark_non_differentiable(*results[len(results) - len(given.plan.measured) :])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dxs, dwi, dwh, dbi, dbh, dh0, dc0, daffine, dstates = OPERATORS.gradients(ctx, grads, ctx.needs_input_grad[2])
        biases, stand_ins = ((dbi, dbh) if ctx.biased else ()), [None] * ctx.counts[1]
        found = (dxs, dwi, dwh, *biases, dh0, dc0, *daffine, *stand_ins, *dstates)
        return None, None, *found, *([None] * (len(ctx.needs_input_grad) - 2 - len(found)))  # the last may be lengths
