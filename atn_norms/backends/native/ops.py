"""The two operators of the native backend: a whole sequence forward, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.native.fit import check_fit
from atn_norms.backends.native.library import CallArgs, Library, load
from atn_norms.backends.native.plan import Plan, SitePlan

DOUBLE = torch.float64
CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
PLACES = {"ih": 0, "hh": 1, "c": 2}
CHEAP_INPUTS = 64  # input features up to which the projected input is computed twice rather than kept

# Arguments of both operators, N = gates * H. xs [T, B, D]; weight_ih [N, D], weight_hh [N, H]; biases [N] or None; h0,
# c0 [B, H] (c0 of a cell without one is empty); affine: gain and shift of every site that has them, in order; states:
# every site's leaves, in order, or none where all are fresh; lengths [B] or None; plan: `Plan.encode()`.


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
    states: Sequence[Tensor],
    lengths: Tensor | None,
    plan: str,
    keep: bool,
) -> list[Tensor]:
    """Outputs, last h and c, every site's new state; and, to `keep`, what the way back needs."""
    what = Plan.decode(plan)
    check_fit(what, xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, affine, states, lengths)
    (steps, batch, inputs), hidden = xs.shape, weight_hh.shape[1]
    call = _call(what, xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, lengths)
    ys, hn, cn = xs.new_empty(steps, batch, hidden), torch.empty_like(h0), torch.empty_like(c0)
    projected, products, cells = _kept(xs, what, hidden, inputs, keep)
    call.set(output=ys, hn=hn, cn=cn, projected=projected, recurrent=products, cells=cells)
    after, timelines = [], []
    for site, state, (gain, shift) in zip(what.sites, _by_site(what, states), _affine(what, affine, xs), strict=True):
        following = [xs.new_empty(shape, dtype=DOUBLE) for shape in site.shapes(batch)]
        timeline = xs.new_empty(site.doubles(steps, batch), dtype=DOUBLE)
        call.site(site, gain=gain, shift=shift, timeline=timeline, state=state, next=following)
        after += following
        timelines.append(timeline)
    call.run("forward")
    return [ys, hn, cn, *after, *([projected, products, cells, *timelines] if keep else [])]


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
    states: Sequence[Tensor],
    lengths: Tensor | None,
    plan: str,
    keep: bool,
) -> list[Tensor]:
    what = Plan.decode(plan)
    (steps, batch, _), hidden = xs.shape, weight_hh.shape[1]
    results = [xs.new_empty(steps, batch, hidden), torch.empty_like(h0), torch.empty_like(c0)]
    for site in what.sites:
        results += [xs.new_empty(shape, dtype=DOUBLE) for shape in site.shapes(batch)]
    if keep:
        results += _kept(xs, what, hidden, xs.shape[2], keep)
        results += [xs.new_empty(site.doubles(steps, batch), dtype=DOUBLE) for site in what.sites]
    return results


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
    h0: Tensor,
    c0: Tensor,
    affine: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    ys: Tensor,
    kept: Sequence[Tensor],
    plan: str,
    wants_xs: bool,
) -> list[Tensor]:
    """Gradients of xs, the weights, the biases, h0, c0, every affine tensor, and every state's leaves."""
    what = Plan.decode(plan)
    call = _call(what, xs, weight_ih, weight_hh, bias_ih, None, h0, c0, lengths)
    projected, products, cells, *timelines = kept
    dh, dc = dhn.clone(memory_format=torch.contiguous_format), dcn.clone(memory_format=torch.contiguous_format)
    dxs = torch.empty_like(xs, memory_format=torch.contiguous_format) if wants_xs else xs.new_empty(0)
    dweight_ih, dweight_hh = (
        torch.zeros_like(w, memory_format=torch.contiguous_format) for w in (weight_ih, weight_hh)
    )
    dbias = xs.new_zeros(2, 0 if bias_ih is None else len(bias_ih))
    call.set(projected=projected, recurrent=products, cells=cells, output=ys.contiguous(), doutput=dys.contiguous())
    call.set(dh=dh, dc=dc, dxs=dxs, dweight_ih=dweight_ih, dweight_hh=dweight_hh, dbias_ih=dbias[0], dbias_hh=dbias[1])
    daffine, dstates_before = [], []
    for site, timeline, state, asked, (gain, shift) in zip(
        what.sites, timelines, _by_site(what, states), _by_site(what, dstates), _affine(what, affine, xs), strict=True
    ):
        dgain, dshift = torch.empty_like(gain), torch.empty_like(shift)
        back = [torch.zeros_like(leaf, memory_format=torch.contiguous_format) for leaf in state]
        call.site(site, gain=gain, shift=shift, timeline=timeline, dnext=asked, dstate=back, dgain=dgain, dshift=dshift)
        daffine += ([dgain] if site.gain else []) + ([dshift] if site.shift else [])
        dstates_before += back
    call.run("backward")
    return [dxs, dweight_ih, dweight_hh, dbias[0].clone(), dbias[1].clone(), dh, dc, *daffine, *dstates_before]


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
    h0: Tensor,
    c0: Tensor,
    affine: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    ys: Tensor,
    kept: Sequence[Tensor],
    plan: str,
    wants_xs: bool,
) -> list[Tensor]:
    wide = weight_hh.shape[0] if bias_ih is not None else 0
    dxs = torch.empty_like(xs, memory_format=torch.contiguous_format) if wants_xs else xs.new_empty(0)
    shaped = [torch.empty_like(tensor) for tensor in (weight_ih, weight_hh)]
    rest = [torch.empty_like(tensor) for tensor in (h0, c0, *affine, *states)]
    return [dxs, *shaped, xs.new_empty(wide), xs.new_empty(wide), *rest]


class _Call:
    """One call of the kernels: the structure, and what must stay alive until it has returned."""

    def __init__(self, library: Library, is_double: bool) -> None:
        self.library, self.args = library, CallArgs()
        self._is_double, self._alive = is_double, []

    def set(self, **tensors: Tensor | None) -> None:
        """Point fields at tensors, which must be contiguous; None and what is empty become NULL."""
        for name, tensor in tensors.items():
            if tensor is not None and tensor.numel():
                self._alive.append(tensor)
                setattr(self.args, name, tensor.data_ptr())

    def site(self, plan: SitePlan, **tensors: Any) -> None:
        """Fill in one norm site; a list is a state's leaves: weights, then mean and variance, or a mean square."""
        site = self.args.site[PLACES[plan.site]]
        site.norm, site.window = (1 if plan.centred else 2), (0 if plan.steps else 1)
        site.features, site.groups, site.prefix = plan.features, plan.groups, plan.prefix
        site.decay, site.eps = plan.decay, plan.eps
        for name, given in tensors.items():
            if isinstance(given, Tensor):
                self._alive.append(given)
                setattr(site, name, given.data_ptr())
                continue
            places = getattr(site, name)
            for place, leaf in zip((0, 1, 2) if plan.centred else (0, 2), given, strict=False):
                if leaf is not None:
                    leaf = leaf.contiguous()
                    self._alive.append(leaf)
                    places[place] = leaf.data_ptr()

    def run(self, direction: str) -> None:
        """Run the kernel."""
        self.library.run(direction, self.args, self._is_double)


def _call(
    plan: Plan,
    xs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
) -> _Call:
    """A call with everything that both directions read."""
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"the native backend cannot run: {library}")
    call = _Call(library, xs.dtype == DOUBLE)
    args = call.args
    args.cell, args.threads = CELLS[plan.cell], torch.get_num_threads()
    args.steps, args.batch, args.inputs, args.hidden = *xs.shape, weight_hh.shape[1]
    named = {"xs": xs, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    named |= {"h0": h0, "c0": c0, "lengths": lengths}
    call.set(**{name: None if tensor is None else tensor.contiguous() for name, tensor in named.items()})
    return call


def _kept(xs: Tensor, plan: Plan, hidden: int, inputs: int, keep: bool) -> list[Tensor]:
    """Room for what the way back reads: projected inputs, recurrent products, cell states; empty for what is not kept.

    Few inputs are projected again on the way back, which costs less than keeping what became of them.
    """
    rows = xs.shape[0] if keep else 0
    wide = (xs.shape[1], plan.gates * hidden)
    return [
        xs.new_empty(rows if inputs > CHEAP_INPUTS else 0, *wide),
        xs.new_empty(rows, *wide),
        xs.new_empty(rows if plan.is_lstm else 0, xs.shape[1], hidden),
    ]


def _by_site(plan: Plan, leaves: Sequence[Any]) -> list[list[Any]]:
    """The leaves of every site's state: weights, then those of its statistic; none where every window is fresh."""
    rest = iter(leaves)
    return [[next(rest) for _ in range(1 + site.leaves)] if leaves else [] for site in plan.sites]


def _affine(plan: Plan, tensors: Sequence[Tensor], like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Gain and shift of every site; 1 and 0 where it has none."""
    rest = iter(tensors)
    return [
        (
            next(rest).contiguous() if site.gain else like.new_ones(site.features),
            next(rest).contiguous() if site.shift else like.new_zeros(site.features),
        )
        for site in plan.sites
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, affine, states, lengths, plan, keep = inputs
    ctx.set_materialize_grads(False)  # or zeros are made for everything that is kept
    if not keep:
        return
    following = sum(1 + site.leaves for site in Plan.decode(plan).sites)
    kept = output[3 + following :]
    ctx.counts, ctx.plan = (len(affine), len(states), following), plan
    ctx.save_for_backward(
        xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, lengths, output[0], *affine, *states, *kept
    )


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, lengths, ys, *rest = ctx.saved_tensors
    many, leaves, following = ctx.counts
    affine, states, kept = rest[:many], rest[many : many + leaves], rest[many + leaves :]
    dys, dhn, dcn, *dstates = grads[: 3 + following]
    if torch.is_grad_enabled():
        from atn_norms.backends.native.twice import differentiable_backward

        return differentiable_backward(
            ctx.plan,
            (dys, dhn, dcn, dstates),
            (xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, affine, states, lengths),
        )
    dys, dhn, dcn = (torch.zeros_like(a) if g is None else g for g, a in ((dys, ys), (dhn, h0), (dcn, c0)))
    dxs, dwi, dwh, dbi, dbh, dh0, dc0, *others = recurrent_backward(
        dys,
        dhn,
        dcn,
        dstates,
        xs,
        weight_ih,
        weight_hh,
        bias_ih,
        h0,
        c0,
        affine,
        states,
        lengths,
        ys,
        kept,
        ctx.plan,
        ctx.needs_input_grad[0],
    )
    biases = (dbi, dbh) if bias_ih is not None else (None, None)
    dx = dxs if ctx.needs_input_grad[0] else None
    return dx, dwi, dwh, *biases, dh0, dc0, others[:many], others[many:], None, None, None


recurrent.register_autograd(_backward, setup_context=_setup)
