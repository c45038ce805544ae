"""Modes of torch around a call: transforms, compilers, tracers, profilers, and tensor subclasses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType  # type: ignore[attr-defined]
from torch.autograd import forward_ad

_ORDINARY = {Tensor, nn.Parameter}
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # type: ignore[attr-defined]


def in_transform() -> bool:
    """Return True inside a transform of torch.func."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0  # type: ignore[attr-defined]


def _has_rules() -> bool:
    """Return True where the operators have a rule for every active transform."""
    stack = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    return all(level.key() in (TransformType.Grad, TransformType.Vmap) for level in stack)


def observed() -> bool:
    """Return True if a compiler, a tracer, a profiler, a mode or a transform of torch.func observes calls."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]
        or torch._C._autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


def unsupported_transform() -> str | None:
    """Return the reason why no operator can run: an active transform has no rule; None if operators can run."""
    if forward_ad._current_level < 0 and not observed():
        return None
    if torch.onnx.is_in_onnx_export():
        return "ONNX has no form of its operator"
    if in_transform() and torch.compiler.is_compiling():
        return "it has no rule for compiled torch.func transforms (grad, vmap, jvp, ...), and one is active"
    if forward_ad._current_level >= 0:
        return "it has no rule for forward-mode AD (jvp, jacfwd, ...), and a dual level is active"
    if in_transform() and not _has_rules():
        return "it has rules for vmap and reverse-mode transforms of torch.func, and another one is active"
    return None


def check_no_tangents(name: str) -> None:
    """Raise `RuntimeError` under forward-mode AD, where a saved graph with the operator would drop the tangents."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"atn_norms::{name}: got a call under forward-mode AD; expected a call of the layer itself")


def batched(grads: Sequence[Tensor | None]) -> bool:
    """Return True if `is_grads_batched=True` or `vectorize=True` batches these gradients."""
    return True in [_is_batched(grad) for grad in grads if grad is not None]


def unobserved(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if kernels may read tensors directly: nothing observes the call, and all tensors are ordinary.

    Ordinary tensors are of torch's classes and hold plain numbers: no negation bit, no zero tensor.
    """
    if observed():
        return False
    there = [tensor for tensor in tensors if tensor is not None]
    return (
        _ORDINARY.issuperset(map(type, there))
        and not any(map(Tensor.is_neg, there))
        and not any(map(Tensor._is_zerotensor, there))
    )


def on_cpu() -> AbstractContextManager[Any]:
    """Return a context in which torch makes tensors on the CPU; torch's own one slows every call down."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def constant(tensor: Tensor) -> Tensor:
    """Return the tensor without a gradient; a trace always detaches, since torch.jit checks it without gradients."""
    return tensor.detach() if tensor.requires_grad or torch.jit.is_tracing() else tensor


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialized contiguous tensor of the same type and shape."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
