"""The operators under transforms of torch.func: reverse mode at any depth, and vmap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType  # type: ignore[attr-defined]

from atn_norms.backends.fused.double_backward import vector_jacobian
from atn_norms.backends.fused.plan import Plan

if TYPE_CHECKING:
    from atn_norms.backends.fused.operators import Operators

_INPUTS = 8  # single tensors of a call: xs, the weights, the biases, h0, c0, lengths
_GRADS = 3  # single gradients of a call: of ys, hn, cn


def active() -> bool:
    """Return True inside a transform."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0  # type: ignore[attr-defined]


def has_rules() -> bool:
    """Return True where the operators have a rule for every active transform."""
    stack = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    return all(level.key() in (TransformType.Grad, TransformType.Vmap) for level in stack)


def forward(operators: Operators, plan: Plan, arguments: Sequence[Any]) -> list[Tensor]:
    """Return the results of the forward operator; `arguments` are the operator's, from xs to lengths.

    The innermost transform matters alone: its rule continues with the next one.
    """
    *single, affine, populations, states, lengths = arguments
    counts = len(affine), len(populations), len(states)
    tensors = *single, lengths, *affine, *populations, *states
    level = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    if level is None and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return operators.compute(plan, arguments, False)
    keep = level is None or level.key() == TransformType.Grad
    return list(_Forward.apply(operators, plan, counts, keep, *tensors)[: plan.results])


def _arguments(counts: Sequence[int], tensors: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[Any]]:
    """Return the operator's arguments from a flat list of them, and the tensors that follow."""
    *single, lengths = tensors[:_INPUTS]
    rest = iter(tensors[_INPUTS:])
    many = [list(islice(rest, count)) for count in counts]
    return (*single, *many, lengths), list(rest)


class _Forward(torch.autograd.Function):
    """The forward operator; to `keep`, what the backward operator reads follows the results."""

    @staticmethod
    def forward(operators: Any, plan: Plan, counts: Any, keep: bool, *tensors: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(operators.compute(plan, _arguments(counts, tensors)[0], keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, ctx.plan, ctx.counts, ctx.keep, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[ctx.plan.results - len(ctx.plan.measured) :])
        ctx.save_for_backward(*tensors, output[0], *output[ctx.plan.results :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs = _INPUTS + sum(ctx.counts)
        tensors, ys, kept = ctx.saved_tensors[:inputs], ctx.saved_tensors[inputs], ctx.saved_tensors[inputs + 1 :]
        dys, dhn, dcn, *dstates = grads[: ctx.plan.results - len(ctx.plan.measured)]
        h0, c0 = tensors[5:7]
        dys, dhn, dcn = (torch.zeros_like(a) if g is None else g for g, a in ((dys, ys), (dhn, h0), (dcn, c0)))
        wants_xs, grads = ctx.needs_input_grad[4], (dys, dhn, dcn, *dstates)
        if ctx.keep:
            found = _Backward.apply(ctx.operators, ctx.plan, ctx.counts, wants_xs, *tensors, *grads, ys, *kept)
        else:  # under a vmap that maps none of the tensors
            found = vector_jacobian(ctx.plan, _arguments(ctx.counts, tensors)[0], grads)
        dxs, *others = _as_gradients(ctx.counts, tensors, found)
        return None, None, None, None, dxs if wants_xs else None, *others

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
            return forward(operators, plan, _arguments(counts, each)[0])

        return _one_by_one(info.batch_size, dims, tensors, one)


def _as_gradients(counts: Sequence[int], tensors: Sequence[Any], found: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the backward operator's results as gradients of the flat list of the forward operator's tensors."""
    dxs, dwi, dwh, dbi, dbh, dh0, dc0, *rest = found
    affine, populations, _ = counts
    biases = (None, None) if tensors[3] is None else (dbi, dbh)
    return [dxs, dwi, dwh, *biases, dh0, dc0, None, *rest[:affine], *[None] * populations, *rest[affine:]]


class _Backward(torch.autograd.Function):
    """The backward operator; the reference computes its gradients."""

    @staticmethod
    def forward(operators: Any, plan: Plan, counts: Any, wants_xs: bool, *tensors: Any) -> Any:  # type: ignore[override]
        arguments, (dys, dhn, dcn, *rest) = _arguments(counts, tensors)
        states = plan.results - len(plan.measured) - _GRADS
        grads = dys, dhn, dcn, rest[:states]
        return tuple(operators.compute_backward(plan, arguments, grads, rest[states], rest[states + 1 :], wants_xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.plan, ctx.counts, ctx.wants_xs, *tensors = inputs
        ctx.many = len(tensors)
        ctx.save_for_backward(*tensors[: _INPUTS + sum(ctx.counts) + ctx.plan.results - len(ctx.plan.measured)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan, counts, saved = ctx.plan, ctx.counts, list(ctx.saved_tensors)
        places = [place for place, tensor in enumerate(saved) if tensor is not None and tensor.is_floating_point()]

        def first(*floats: Tensor) -> list[Tensor]:
            tensors = list(saved)
            for place, tensor in zip(places, floats, strict=True):
                tensors[place] = tensor
            arguments, gradients = _arguments(counts, tensors)
            dxs, *others = vector_jacobian(plan, arguments, gradients)
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
        else:  # of no elements, one of zeros has the shapes
            columns.append(tensor.unbind(dim) or [torch.zeros_like(tensor).sum(dim).to(tensor.dtype)])
    results = [function(each) for each in zip(*columns, strict=True)]
    stacked = tuple(torch.stack(column)[:size] for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _rows_alone(plan: Plan, counts: Sequence[int], dims: Sequence[int | None]) -> bool:
    """Return True where only rows are mapped, which the operator then takes as one batch."""
    shared = [*dims[1:5], *dims[_INPUTS : _INPUTS + counts[0]]]
    return not plan.coupled and all(dim is None for dim in shared)


def _as_rows(
    size: int, dims: Sequence[int | None], operators: Any, plan: Plan, counts: Sequence[int], tensors: Sequence[Any]
) -> tuple[Any, Any]:
    """Return the results of one call for a batch of all rows."""
    shared = {*range(1, 5), *range(_INPUTS, _INPUTS + counts[0])}
    folded = list(tensors)
    for place, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        if place not in shared and tensor is not None:
            rows = 0 if place else 1  # xs has time first
            whole = tensor.unsqueeze(rows) if dim is None else tensor.movedim(dim, rows)
            sizes = list(whole.shape)
            sizes[rows] = size
            folded[place] = whole.expand(sizes).flatten(rows, rows + 1)
    ys, *others = forward(operators, plan, _arguments(counts, folded)[0])
    results = [ys.unflatten(1, (size, ys.shape[1] // size))]
    results += [other.unflatten(0, (size, other.shape[0] // size)) for other in others]
    return tuple(results), (1, *[0] * len(others))
