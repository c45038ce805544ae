"""The two operators of a backend that runs whole sequences: forward, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from atn_norms.backends.fused import transforms
from atn_norms.backends.fused.plan import Plan

_ORDINARY = {Tensor, nn.Parameter}
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]


class Kernels(Protocol):
    """Kernels behind the operators; `arguments` are those of the operators, in their order.

    | argument | meaning | shape |
    |---|---|---|
    | `xs` | inputs, time first | `[T, B, D]` |
    | `weight_ih`, `weight_hh` | N = gates * H | `[N, D]`, `[N, H]` |
    | `bias_ih`, `bias_hh` | or None | `[N]` |
    | `h0`, `c0` | initial state; c0 of a cell without one is empty | `[B, H]` |
    | `affine` | gain and shift of every site that has them, in order | `[F]` each |
    | `populations` | population means and variances of every site that uses them | `[1 or T, 2 F]` each |
    | `states` | every site's leaves, in order, or none where all are fresh | |
    | `lengths` | live steps of each row, or None | `[B]` |
    """

    def room(
        self, plan: Plan, xs: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, states: Sequence[Tensor], keep: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Unwritten tensors as `forward` returns them."""
        ...

    def forward(self, plan: Plan, arguments: Sequence[Any], keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, last h and c, every site's new state and what it pooled; and, to `keep`, what the way back needs."""
        ...

    def backward(
        self,
        plan: Plan,
        arguments: Sequence[Any],
        grad_outputs: tuple[Any, ...],
        ys: Tensor,
        kept: Sequence[Tensor],
        wants_xs: bool,
    ) -> list[Tensor]:
        """Gradients of xs, the weights, the biases, h0, c0, every affine tensor, and every state's leaves.

        `grad_outputs` are the gradients of ys, hn, cn and, where there are any, of the new states.
        """
        ...


class Operators:
    """The operators `atn_norms::NAME` and `atn_norms::NAME_backward` of some kernels, registered with torch."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        self._kernels = kernels

        @torch.library.custom_op(f"atn_norms::{name}", mutates_args=())
        def forward(
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
            single = xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
            _check_no_tangents(name)
            results, kept = kernels.forward(Plan.decode(plan), (*single, affine, populations, states, lengths), keep)
            return results + kept

        @torch.library.custom_op(f"atn_norms::{name}_backward", mutates_args=())
        def backward(
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
            single = xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
            arguments = *single, affine, populations, states, lengths
            return kernels.backward(Plan.decode(plan), arguments, (dys, dhn, dcn, dstates), ys, kept, wants_xs)

        @forward.register_fake
        def _(*inputs: Any) -> list[Tensor]:
            xs, _, weight_hh, _, _, h0, c0, _, _, states, _, plan, keep = inputs
            results, kept = kernels.room(Plan.decode(plan), xs, weight_hh, h0, c0, states, keep)
            return results + kept

        @backward.register_fake
        def _(*inputs: Any) -> list[Tensor]:
            xs, weight_ih, weight_hh, bias_ih, _, h0, c0, affine, _, states = inputs[4:14]
            wide = weight_hh.shape[0] if bias_ih is not None else 0
            dxs = empty_like(xs) if inputs[-1] else xs.new_empty(0)
            rest = [empty_like(tensor) for tensor in (h0, c0, *affine, *states)]
            return [dxs, *map(empty_like, (weight_ih, weight_hh)), xs.new_empty(wide), xs.new_empty(wide), *rest]

        _register_flops(name)
        forward.register_autograd(self._backward, setup_context=self._setup)
        self.forward, self.backward = forward, backward

    def __call__(self, *arguments: Any) -> list[Tensor]:
        """Call the forward operator, by the rules of the active transforms."""
        if torch.compiler.is_compiling() or not transforms.active():
            return self.forward(*arguments)
        *inputs, plan, _ = arguments
        return transforms.forward(self, Plan.decode(plan), inputs)

    def compute(self, plan: Plan, arguments: Sequence[Any], keep: bool) -> list[Tensor]:
        """Return the results of the forward operator, without the dispatcher where nothing observes the call."""
        if _unobserved(arguments):
            results, kept = self._kernels.forward(plan, arguments, keep)
            return results + kept
        return self.forward(*arguments, plan.encode(), keep)

    def compute_backward(
        self,
        plan: Plan,
        arguments: Sequence[Any],
        grad_outputs: tuple[Any, ...],
        ys: Tensor,
        kept: Sequence[Tensor],
        wants_xs: bool,
    ) -> list[Tensor]:
        """Return the results of the backward operator in the same way."""
        if _unobserved((*arguments, *grad_outputs, ys, kept)):
            return self._kernels.backward(plan, arguments, grad_outputs, ys, kept, wants_xs)
        return self.backward(*grad_outputs, *arguments, ys, kept, plan.encode(), wants_xs)

    @staticmethod
    def remember(
        ctx: Any, plan: Plan, arguments: Sequence[Any], results: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> None:
        """Leave with autograd what `gradients` needs; `arguments` are the operator's, from xs to lengths."""
        *single, affine, populations, states, lengths = arguments
        ctx.set_materialize_grads(False)  # or torch makes zeros for absent gradients
        ctx.plan, ctx.counts = plan, (len(affine), len(populations), len(states))
        ctx.save_for_backward(*single, lengths, results[0], *affine, *populations, *states, *kept)

    def gradients(self, ctx: Any, grads: Sequence[Tensor | None], wants_xs: bool) -> tuple[Any, ...]:
        """Gradients of the operator's arguments from xs to `states`, but populations, the last two as lists."""
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them
        *single, lengths, ys = saved[:9]
        rest = saved[9:]
        many, stand_ins, leaves = ctx.counts
        starts = many, many + stand_ins, many + stand_ins + leaves
        affine, populations, states, kept = (rest[a:b] for a, b in zip((0, *starts), (*starts, None), strict=True))
        inputs: tuple[Any, ...] = (*single, affine, populations, states, lengths)
        dys, dhn, dcn, *dstates = grads[: 3 + sum(site.tensors for site in ctx.plan.sites)]
        if torch.is_grad_enabled() or transforms.active() or batched([dys, dhn, dcn, *dstates]):
            from atn_norms.backends.fused.double_backward import differentiable_backward

            return differentiable_backward(ctx.plan, (dys, dhn, dcn, dstates), inputs)
        *_, bias, h0, c0 = single
        dys, dhn, dcn = (torch.zeros_like(a) if g is None else g for g, a in ((dys, ys), (dhn, h0), (dcn, c0)))
        grad_outputs = (dys, dhn, dcn, dstates)
        found = self.compute_backward(ctx.plan, inputs, grad_outputs, ys, kept, wants_xs)
        dxs, dwi, dwh, dbi, dbh, dh0, dc0, *others = found
        biases = (None, None) if bias is None else (dbi, dbh)
        return dxs if wants_xs else None, dwi, dwh, *biases, dh0, dc0, others[:many], others[many:]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        *arguments, text, keep = inputs
        if keep:
            plan = Plan.decode(text)
            self.remember(ctx, plan, arguments, output[: plan.results], output[plan.results :])

    def _backward(self, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        *found, daffine, dstates = self.gradients(ctx, grads, ctx.needs_input_grad[0])
        return *found, daffine, [None] * ctx.counts[1], dstates, None, None, None


def _register_flops(name: str) -> None:
    """Count the products of the operators, for `FlopCounterMode` and what builds on it; other work is not counted."""

    def count(xs: Sequence[int], weight_ih: Sequence[int], weight_hh: Sequence[int]) -> tuple[int, int]:
        rows = 2 * xs[0] * xs[1]
        return rows * weight_ih[0] * weight_ih[1], rows * weight_hh[0] * weight_hh[1]

    @register_flop_formula(getattr(torch.ops.atn_norms, name))
    def _(xs: Any, weight_ih: Any, weight_hh: Any, *_: Any, **__: Any) -> int:
        return sum(count(xs, weight_ih, weight_hh))

    @register_flop_formula(getattr(torch.ops.atn_norms, f"{name}_backward"))
    def _(dys: Any, dhn: Any, dcn: Any, dstates: Any, xs: Any, weight_ih: Any, weight_hh: Any, *rest: Any, **_: Any):
        inputs, recurrent = count(xs, weight_ih, weight_hh)
        return (2 if rest[-1] else 1) * inputs + 2 * recurrent


def transformed() -> str | None:
    """Return why no operator can run: a transform that it has no rule for is active; None if it can run."""
    if torch.onnx.is_in_onnx_export():
        return "ONNX has no form of its operator"
    if transforms.active() and torch.compiler.is_compiling():
        return "it has no rule for compiled torch.func transforms (grad, vmap, jvp, ...), and one is active"
    if forward_ad._current_level >= 0:
        return "it has no rule for forward-mode AD (jvp, jacfwd, ...), and a dual level is active"
    if transforms.active() and not transforms.has_rules():
        return "it has rules for vmap and reverse-mode transforms of torch.func, and another one is active"
    return None


def _check_no_tangents(name: str) -> None:
    """Raise `RuntimeError` under forward-mode AD: a saved graph that holds the operator would drop the tangents."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"atn_norms::{name}: got a call under forward-mode AD; expected a call of the layer itself")


def batched(grads: Sequence[Tensor | None]) -> bool:
    """Return whether `is_grads_batched=True` or `vectorize=True` batches these gradients."""
    return any(grad is not None and _is_batched(grad) for grad in grads)


def unwatched() -> bool:
    """Return True where no compiler, tracer, profiler, mode or function transform observes a call."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None  # type: ignore[attr-defined]
        and not torch._C._autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def ordinary(tensors: Sequence[Tensor]) -> bool:
    """Return True where all tensors are of torch's classes and hold plain numbers: no negation bit, no zero tensor."""
    return (
        {type(tensor) for tensor in tensors} <= _ORDINARY
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor._is_zerotensor, tensors))
    )


def _unobserved(arguments: Sequence[Any]) -> bool:
    """Return True where kernels may read the tensors among the arguments, and those of their lists, directly."""
    nested = [each if isinstance(each, (list, tuple)) else [each] for each in arguments]
    return unwatched() and ordinary([tensor for tensors in nested for tensor in tensors if tensor is not None])


def empty_like(tensor: Tensor) -> Tensor:
    """Room for another tensor of this type and shape, row by row however this one lies."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
