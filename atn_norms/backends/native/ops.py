"""The two operators of the native backend: a whole sequence forward, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.native import call
from atn_norms.backends.native.layout import Given, ordinary, unwatched
from atn_norms.backends.native.plan import Plan

# Arguments of both operators, N = gates * H. xs [T, B, D]; weight_ih [N, D], weight_hh [N, H]; biases [N] or None; h0,
# c0 [B, H] (c0 of a cell without one is empty); affine: gain and shift of every site that has them, in order;
# populations: means and variances [1 or T, 2 F] of every site where they stand in for the batch's; states: every site's
# leaves, in order, or none where all are fresh; lengths [B] or None; plan: `Plan.encode()`.


@torch.library.custom_op("atn_norms::recurrent", mutates_args=())
def recurrent(
    xs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    affine: Sequence[Tensor],
    populations: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    plan: str,
    keep: bool,
) -> list[Tensor]:
    """Outputs, last h and c, every site's new state; and, to `keep`, what the way back needs."""
    single = xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
    given = Given(Plan.decode(plan), *single, affine, populations, states, lengths)
    given.check()
    results, kept = call.forward(given, keep)
    return results + kept


@recurrent.register_fake
def _(
    xs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    affine: Sequence[Tensor],
    populations: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    plan: str,
    keep: bool,
) -> list[Tensor]:
    results, kept = call.room(Plan.decode(plan), xs, weight_hh, h0, c0, states, keep)
    return results + kept


@torch.library.custom_op("atn_norms::recurrent_backward", mutates_args=())
def recurrent_backward(
    dys: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    dstates: Sequence[Tensor | None],
    xs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    affine: Sequence[Tensor],
    populations: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    ys: Tensor,
    kept: Sequence[Tensor],
    plan: str,
    wants_xs: bool,
) -> list[Tensor]:
    """Gradients of xs, the weights, the biases, h0, c0, every affine tensor, and every state's leaves."""
    single = xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
    given = Given(Plan.decode(plan), *single, affine, populations, states, lengths)
    return call.backward(given, (dys, dhn, dcn, dstates), ys, kept, wants_xs)


@recurrent_backward.register_fake
def _(
    dys: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    dstates: Sequence[Tensor | None],
    xs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    affine: Sequence[Tensor],
    populations: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    ys: Tensor,
    kept: Sequence[Tensor],
    plan: str,
    wants_xs: bool,
) -> list[Tensor]:
    wide = weight_hh.shape[0] if bias_ih is not None else 0
    dxs = call.empty_like(xs) if wants_xs else xs.new_empty(0)
    rest = [call.empty_like(tensor) for tensor in (h0, c0, *affine, *states)]
    return [dxs, *map(call.empty_like, (weight_ih, weight_hh)), xs.new_empty(wide), xs.new_empty(wide), *rest]


def remember(ctx: Any, plan: Plan, arguments: Sequence[Any], results: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Leave with autograd what `gradients` needs; `arguments` are the operator's, from xs to lengths."""
    *single, affine, populations, states, lengths = arguments
    ctx.set_materialize_grads(False)  # or zeros are made for everything that is not asked
    ctx.plan, ctx.counts = plan, (len(affine), len(populations), len(states))
    ctx.save_for_backward(*single, lengths, results[0], *affine, *populations, *states, *kept)


def gradients(ctx: Any, grads: Sequence[Tensor | None], wants_xs: bool) -> tuple[Any, ...]:
    """Gradients of the operator's arguments from xs to `states`, but populations, the last two as lists."""
    saved = ctx.saved_tensors  # asked for once: a checkpoint computes them again
    *single, lengths, ys = saved[:9]
    rest = saved[9:]
    many, stand_ins, leaves = ctx.counts
    starts = many, many + stand_ins, many + stand_ins + leaves
    affine, populations, states, kept = (rest[a:b] for a, b in zip((0, *starts), (*starts, None), strict=True))
    inputs: tuple[Any, ...] = (*single, affine, populations, states, lengths)
    dys, dhn, dcn, *dstates = grads[: 3 + sum(1 + site.leaves for site in ctx.plan.sites)]
    if torch.is_grad_enabled():
        from atn_norms.backends.native.twice import differentiable_backward

        return differentiable_backward(ctx.plan, (dys, dhn, dcn, dstates), inputs)
    *_, bias, h0, c0 = single
    dys, dhn, dcn = (torch.zeros_like(a) if g is None else g for g, a in ((dys, ys), (dhn, h0), (dcn, c0)))
    asked = (dys, dhn, dcn, dstates)
    if unwatched() and ordinary([tensor for tensor in (dys, dhn, dcn, *dstates, *saved) if tensor is not None]):
        found = call.backward(Given(ctx.plan, *inputs), asked, ys, kept, wants_xs)
    else:
        found = recurrent_backward(*asked, *inputs, ys, kept, ctx.plan.encode(), wants_xs)
    dxs, dwi, dwh, dbi, dbh, dh0, dc0, *others = found
    biases = (None, None) if bias is None else (dbi, dbh)
    return dxs if wants_xs else None, dwi, dwh, *biases, dh0, dc0, others[:many], others[many:]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *arguments, text, keep = inputs
    if keep:
        plan = Plan.decode(text)
        results = 3 + sum(1 + site.leaves for site in plan.sites) + len(plan.measured)
        remember(ctx, plan, arguments, output[:results], output[results:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *found, daffine, dstates = gradients(ctx, grads, ctx.needs_input_grad[0])
    return *found, daffine, [None] * ctx.counts[1], dstates, None, None, None


recurrent.register_autograd(_backward, setup_context=_setup)
