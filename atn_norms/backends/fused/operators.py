"""The two operators of a backend that runs whole sequences: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from atn_norms.backends.fused import transforms
from atn_norms.backends.fused.double_backward import differentiable_backward
from atn_norms.backends.fused.flops import register_flops
from atn_norms.backends.fused.inputs import SINGLE, Fitted, Grads, Inputs, schema_of
from atn_norms.backends.fused.plan import Plan
from atn_norms.modes import batched, check_no_tangents, empty_like, in_transform, unobserved


class Kernels(Protocol):
    """Kernels behind the operators."""

    def allocate(self, plan: Plan, inputs: Inputs, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return uninitialized tensors in the form of the results of `forward`."""
        ...

    def fit(self, plan: Plan, inputs: Inputs) -> Fitted | None:
        """Return fitted inputs if all tensors are plain, or None if the operator must be called."""
        ...

    def check(self, plan: Plan, inputs: Inputs) -> Fitted:
        """Return fitted inputs; `RuntimeError` if a tensor does not fit."""
        ...

    def fit_backward(
        self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor]
    ) -> Fitted | None:
        """Return fitted inputs, or None if `check_backward` must be called."""
        ...

    def check_backward(self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor]) -> Fitted:
        """Return fitted inputs; `RuntimeError` if an input, a gradient or a kept tensor does not fit."""
        ...

    def forward(self, fitted: Fitted, keep: bool, states: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        """Return the results, and the tensors to `keep` for backward.

        Results are the outputs, last h and c, every site's new state, and the pooled statistics of `Plan.measured`;
        without `states`, only the outputs and last h and c.
        """
        ...

    def backward(
        self, fitted: Fitted, grads: Grads, ys: Tensor, kept: Sequence[Tensor], wants_xs: bool
    ) -> list[Tensor]:
        """Return gradients of xs, the weights, the biases, h0, c0, weight_hr, every affine tensor and state leaf."""
        ...


class Operators:
    """The operators `atn_norms::NAME` and `atn_norms::NAME_backward` of some kernels, registered with torch.

    Schemas, fakes and autograd follow from `Inputs`. `eager` bypasses the dispatcher, which takes longer than a short
    sequence; its autograd is the same.
    """

    def __init__(self, name: str, kernels: Kernels) -> None:
        self._name, self._kernels = name, kernels
        tensors = ", ".join(schema_of(Inputs))
        back = ", ".join([*schema_of(Grads, "d"), tensors, "Tensor ys", "Tensor[] kept", "str plan", "bool wants_xs"])
        self.forward = self._register(name, f"({tensors}, str plan, bool keep) -> Tensor[]", self._run, self._fake)
        self.backward = self._register(f"{name}_backward", f"({back}) -> Tensor[]", self._run_back, self._fake_back)
        self.forward.register_autograd(self._backward, setup_context=self._setup)
        register_flops(name)

    @staticmethod
    def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        operator: Any = torch.library.custom_op(f"atn_norms::{name}", run, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return operator

    def __call__(self, plan: Plan, inputs: Inputs, keep: bool) -> list[Tensor]:
        """Call the forward operator with the rules of the active transforms."""
        if torch.compiler.is_compiling() or not in_transform():
            return self.forward(*inputs.arguments, plan.encode(), keep)
        return transforms.forward(self, plan, inputs)

    def eager(self, plan: Plan, inputs: Inputs, states: bool) -> list[Tensor] | None:
        """Return the results of `Kernels.forward` without the operator; None if the operator must be called."""
        flat = inputs.flatten()
        fitted = self._kernels.fit(plan, inputs) if unobserved(flat) else None
        if fitted is None:
            return None
        if torch.is_grad_enabled() and True in [tensor.requires_grad for tensor in fitted.tensors]:
            return list(RecurrentLayer.apply(self, plan, fitted, states, *flat))
        return self._kernels.forward(fitted, False, states)[0]

    def compute(self, plan: Plan, inputs: Inputs, keep: bool) -> list[Tensor]:
        """Return the results of the forward operator; bypass the dispatcher if nothing observes the call."""
        if not unobserved(inputs.flatten()):
            return self.forward(*inputs.arguments, plan.encode(), keep)
        results, kept = self._kernels.forward(self._kernels.check(plan, inputs), keep)
        return results + kept

    def compute_backward(
        self, plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor], wants_xs: bool
    ) -> list[Tensor]:
        """Return the results of the backward operator; bypass the dispatcher if nothing observes the call."""
        if not unobserved([*inputs.flatten(), *grads[:3], *grads.states, ys, *kept]):
            return self.backward(*grads, *inputs.arguments, ys, kept, plan.encode(), wants_xs)
        fitted = self._kernels.fit_backward(plan, inputs, grads, ys, kept)
        if fitted is None:
            fitted = self._kernels.check_backward(plan, inputs, grads, ys, kept)
        return self._kernels.backward(fitted, grads, ys, kept, wants_xs)

    def _run(self, *arguments: Any) -> list[Tensor]:
        *fields, text, keep = arguments
        check_no_tangents(self._name)
        plan, inputs = Plan.decode(text), Inputs.of(fields)
        results, kept = self._kernels.forward(self._kernels.check(plan, inputs), keep)
        return results + kept

    def _fake(self, *arguments: Any) -> list[Tensor]:
        *fields, text, keep = arguments
        results, kept = self._kernels.allocate(Plan.decode(text), Inputs.of(fields), keep)
        return results + kept

    def _run_back(self, *arguments: Any) -> list[Tensor]:
        grads, inputs, (ys, kept, text, wants_xs) = _parts(arguments)
        fitted = self._kernels.check_backward(Plan.decode(text), inputs, grads, ys, kept)
        return self._kernels.backward(fitted, grads, ys, kept, wants_xs)

    def _fake_back(self, *arguments: Any) -> list[Tensor]:
        _, inputs, (*_, wants_xs) = _parts(arguments)
        xs, wide = inputs.xs, inputs.weight_hh.shape[0] if inputs.bias_ih is not None else 0
        weights = [empty_like(xs) if wants_xs else xs.new_empty(0), *map(empty_like, inputs[1:3])]
        states = [empty_like(inputs.h0), empty_like(inputs.c0)]
        states.append(xs.new_empty(0) if inputs.weight_hr is None else empty_like(inputs.weight_hr))
        rest = [empty_like(tensor) for tensor in (*inputs.affine, *inputs.states)]
        return [*weights, xs.new_empty(wide), xs.new_empty(wide), *states, *rest]

    def remember(
        self,
        ctx: Any,
        plan: Plan,
        flat: Sequence[Tensor | None],
        counts: Sequence[int],
        results: Sequence[Tensor],
        kept: Sequence[Tensor],
    ) -> None:
        """Save the tensors that `gradients` reads for autograd."""
        ctx.set_materialize_grads(False)  # otherwise torch makes zeros for absent gradients
        ctx.operators, ctx.plan, ctx.counts = self, plan, counts
        ctx.save_for_backward(results[0], *flat, *kept)

    def gradients(self, ctx: Any, grads: Sequence[Tensor | None], wants_xs: bool) -> Inputs:
        """Return the gradients of the inputs."""
        ys, *saved = ctx.saved_tensors  # read once, since a checkpoint recomputes them at every access
        inputs, kept = Inputs.unflatten(saved, ctx.counts), saved[len(SINGLE) + sum(ctx.counts) :]
        dys, dhn, dcn, *dstates = grads[: 3 + ctx.plan.tensors]
        dstates += [None] * (ctx.plan.tensors - len(dstates))  # states that were not required
        if torch.is_grad_enabled() or in_transform() or batched([dys, dhn, dcn, *dstates]):
            return differentiable_backward(ctx.plan, (dys, dhn, dcn, dstates), inputs)
        if not kept:  # a program exported without gradients keeps nothing
            kept = self.compute(ctx.plan, inputs, True)[ctx.plan.results :]
        given = Grads.of((dys, dhn, dcn), dstates, (ys, inputs.h0, inputs.c0))
        return inputs.gradients(self.compute_backward(ctx.plan, inputs, given, ys, kept, wants_xs), wants_xs)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        *fields, text, _ = inputs
        plan = Plan.decode(text)
        inputs, many = Inputs.of(fields), plan.results
        self.remember(ctx, plan, inputs.flatten(), inputs.counts, output[:many], output[many:])

    def _backward(self, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        return *self.gradients(ctx, grads, ctx.needs_input_grad[0]).arguments, None, None


class RecurrentLayer(torch.autograd.Function):
    """The operator's node in a graph; the tensors are passed as `inputs`, and as a flat list for autograd.

    Autograd's errors name the class, such as for a result that was changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, operators: Operators, plan: Plan, fitted: Fitted, states: bool, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        results, kept = operators._kernels.forward(fitted, True, states)
        operators.remember(ctx, plan, flat, fitted.inputs.counts, results, kept)
        ctx.mark_non_differentiable(*results[3 + plan.tensors :])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *[None] * 4, *ctx.operators.gradients(ctx, grads, ctx.needs_input_grad[4]).flatten()


def _parts(arguments: Sequence[Any]) -> tuple[Grads, Inputs, Sequence[Any]]:
    """Return the parts of the backward operator's arguments."""
    start, end = len(Grads._fields), len(Grads._fields) + len(Inputs._fields)
    return Grads._make(arguments[:start]), Inputs.of(arguments[start:end]), arguments[end:]
