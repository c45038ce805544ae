"""The operators under transforms of torch.func: reverse mode at any depth, and vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType  # type: ignore[attr-defined]

from atn_norms.backends.fused.double_backward import vector_jacobian
from atn_norms.backends.fused.inputs import SINGLE, Grads, Inputs
from atn_norms.backends.fused.plan import Plan

if TYPE_CHECKING:
    from atn_norms.backends.fused.operators import Operators

_GRADS = 3  # single gradients of a call: of ys, hn, cn
WEIGHT_HR = SINGLE.index(Inputs._fields.index("weight_hr"))


def forward(operators: Operators, plan: Plan, inputs: Inputs) -> list[Tensor]:
    """Return the results of the forward operator.

    Only the innermost transform is handled here; its rule calls the next one.
    """
    tensors = inputs.flatten()
    level = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    if level is None and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return operators.compute(plan, inputs, False)
    keep = level is None or level.key() == TransformType.Grad
    return list(_Forward.apply(operators, plan, inputs.counts, keep, *tensors)[: plan.results])


class _Forward(torch.autograd.Function):
    """The forward operator; with `keep`, the tensors for the backward operator follow the results."""

    @staticmethod
    def forward(operators: Any, plan: Plan, counts: Any, keep: bool, *tensors: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(operators.compute(plan, Inputs.unflatten(tensors, counts), keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, ctx.plan, ctx.counts, ctx.keep, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[ctx.plan.results - len(ctx.plan.measured) :])
        ctx.save_for_backward(*tensors, output[0], *output[ctx.plan.results :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved, many = ctx.saved_tensors, len(SINGLE) + sum(ctx.counts)
        inputs, ys, kept = Inputs.unflatten(saved, ctx.counts), saved[many], saved[many + 1 :]
        dys, dhn, dcn, *dstates = grads[: _GRADS + ctx.plan.tensors]
        given = Grads.of((dys, dhn, dcn), dstates, (ys, inputs.h0, inputs.c0))
        wants_xs, flat = ctx.needs_input_grad[4], (*given[:_GRADS], *dstates)
        if ctx.keep:
            options = ctx.operators, ctx.plan, ctx.counts, wants_xs
            found = _Backward.apply(*options, *saved[:many], *flat, ys, *kept)
        else:  # inside a vmap that maps none of the tensors
            found = vector_jacobian(ctx.plan, inputs, flat)
        return None, None, None, None, *inputs.gradients(found, wants_xs).flatten()

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], operators: Any, plan: Plan, counts: Any, keep: bool, *tensors: Any
    ) -> Any:  # type: ignore[override]
        dims = in_dims[4:]
        if not keep and info.batch_size and _rows_alone(plan, counts, dims):
            return _as_rows(info.batch_size, dims, operators, plan, counts, tensors)

        def one(each: Sequence[Any]) -> Sequence[Tensor]:
            if keep:
                return _Forward.apply(operators, plan, counts, keep, *each)
            return forward(operators, plan, Inputs.unflatten(each, counts))

        return _one_by_one(info.batch_size, dims, tensors, one)


class _Backward(torch.autograd.Function):
    """The backward operator; the reference computes its gradients."""

    @staticmethod
    def forward(operators: Any, plan: Plan, counts: Any, wants_xs: bool, *tensors: Any) -> Any:  # type: ignore[override]
        dys, dhn, dcn, *rest = tensors[len(SINGLE) + sum(counts) :]
        inputs, grads = Inputs.unflatten(tensors, counts), Grads(dys, dhn, dcn, rest[: plan.tensors])
        ys, *kept = rest[plan.tensors :]
        return tuple(operators.compute_backward(plan, inputs, grads, ys, kept, wants_xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.plan, ctx.counts, ctx.wants_xs, *tensors = inputs
        ctx.many = len(tensors)
        ctx.save_for_backward(*tensors[: len(SINGLE) + sum(ctx.counts) + _GRADS + ctx.plan.tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan, counts, saved = ctx.plan, ctx.counts, list(ctx.saved_tensors)
        places = [place for place, tensor in enumerate(saved) if tensor is not None and tensor.is_floating_point()]

        def first(*floats: Tensor) -> list[Tensor]:
            tensors = list(saved)
            for place, tensor in zip(places, floats, strict=True):
                tensors[place] = tensor
            dxs, *others = vector_jacobian(
                plan, Inputs.unflatten(tensors, counts), tensors[len(SINGLE) + sum(counts) :]
            )
            return [dxs if ctx.wants_xs else dxs.new_zeros(0), *others]

        pull: Any = torch.func.vjp(first, *(saved[place] for place in places))[1]
        found: list[Tensor | None] = [None] * ctx.many
        for place, gradient in zip(places, pull(list(grads)), strict=True):
            found[place] = gradient
        return None, None, None, None, *found

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], operators: Any, plan: Plan, counts: Any, wants_xs: bool, *tensors: Any
    ) -> Any:  # type: ignore[override]
        def one(each: Sequence[Any]) -> Sequence[Tensor]:
            return _Backward.apply(operators, plan, counts, wants_xs, *each)

        return _one_by_one(info.batch_size, in_dims[4:], tensors, one)


def _one_by_one(size: int, dims: Sequence[int | None], tensors: Sequence[Any], function: Any) -> tuple[Any, Any]:
    """Return the stacked results of a function for each element of the mapped dimension."""
    columns = []
    for tensor, dim in zip(tensors, dims, strict=True):
        if dim is None:
            columns.append([tensor] * max(size, 1))
        else:  # without elements, one element of zeros gives the shapes
            columns.append(tensor.unbind(dim) or [torch.zeros_like(tensor).sum(dim).to(tensor.dtype)])
    results = [function(each) for each in zip(*columns, strict=True)]
    stacked = tuple(torch.stack(column)[:size] for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _rows_alone(plan: Plan, counts: Sequence[int], dims: Sequence[int | None]) -> bool:
    """Return True if only tensors with rows are mapped; the operator then treats all rows as one batch."""
    shared = [*dims[1:5], dims[WEIGHT_HR], *dims[len(SINGLE) : len(SINGLE) + counts[0]]]
    return not plan.coupled and all(dim is None for dim in shared)


def _as_rows(
    size: int, dims: Sequence[int | None], operators: Any, plan: Plan, counts: Sequence[int], tensors: Sequence[Any]
) -> tuple[Any, Any]:
    """Return the results of one call for a batch of all rows."""
    shared = {*range(1, 5), WEIGHT_HR, *range(len(SINGLE), len(SINGLE) + counts[0])}
    folded = list(tensors)
    for place, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        if place not in shared and tensor is not None:
            rows = 0 if place else 1  # time is the first axis of xs
            whole = tensor.unsqueeze(rows) if dim is None else tensor.movedim(dim, rows)
            sizes = list(whole.shape)
            sizes[rows] = size
            folded[place] = whole.expand(sizes).flatten(rows, rows + 1)
    ys, *others = forward(operators, plan, Inputs.unflatten(folded, counts))
    results = [ys.unflatten(1, (size, ys.shape[1] // size))]
    results += [other.unflatten(0, (size, other.shape[0] // size)) for other in others]
    return tuple(results), (1, *[0] * len(others))
