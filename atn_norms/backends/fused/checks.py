"""Checks of every tensor passed to the kernels of a raw operator, which receive addresses only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atn_norms.backends.fused.inputs import Grads, Inputs
from atn_norms.backends.fused.plan import BATCH, DOUBLE, Plan

Shape = tuple[int, ...]
Kind = tuple[Shape, torch.dtype]


def check_tensor(name: str, tensor: Tensor, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `RuntimeError`, as torch does, for a tensor that kernels cannot read.

    | symbol | meaning |
    |---|---|
    | `shape`, `dtype`, `device` | the expected ones |
    """
    if tensor.layout != torch.strided or tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        other = "" if tensor.layout == torch.strided else f", {tensor.layout}"
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{other}"
        raise RuntimeError(f"{name}: got {got}; expected {dtype} {list(shape)} on {device}")
    last = tensor.storage_offset() + sum(
        step * (size - 1) for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    storage = tensor.untyped_storage().nbytes()
    if tensor.numel() and storage < (last + 1) * tensor.itemsize:
        raise RuntimeError(f"{name}: got a storage of {storage} bytes; expected {(last + 1) * tensor.itemsize}")


def check_inputs(plan: Plan, inputs: Inputs, device: torch.device) -> None:
    """Raise `ValueError` or `RuntimeError` where the inputs of an operator do not fit the plan or the device."""
    xs, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, affine, populations, states, lengths = inputs
    if xs.ndim != 3 or weight_hh.ndim != 2:
        raise RuntimeError(
            f"x: got shape {list(xs.shape)} and weight_hh {list(weight_hh.shape)}; expected 3 and 2 axes"
        )
    if (weight_hr is None) == plan.projected:
        raise RuntimeError(f"weight_hr: got {'none' if plan.projected else 'one'}; expected it with a projection only")
    if weight_hr is not None and weight_hr.ndim != 2:
        raise RuntimeError(f"weight_hr: got shape {list(weight_hr.shape)}; expected 2 axes")
    (steps, batch, features), output, dtype = xs.shape, weight_hh.shape[1], weight_hh.dtype
    hidden = inputs.hidden
    plan.check(hidden)
    if min(steps, batch, features, hidden, output) < 1 or dtype not in (torch.float32, DOUBLE):
        sizes = [steps, batch, features, hidden, output]
        raise ValueError(f"plan: got sizes {sizes} of {dtype}; expected positive sizes of float32 or float64")
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError("bias_hh: got one of two biases; expected both or none")
    wide, rows = plan.gates * hidden, (batch, hidden)
    expected = [
        ("x", xs, (steps, batch, features), dtype),
        ("weight_ih", weight_ih, (wide, features), dtype),
        ("weight_hh", weight_hh, (wide, output), dtype),
        *[("bias", bias, (wide,), dtype) for bias in (bias_ih, bias_hh) if bias is not None],
        ("h", h0, (batch, output), dtype),
        ("c", c0, rows if plan.is_lstm else (0,), dtype),
        *([] if weight_hr is None else [("weight_hr", weight_hr, (output, hidden), dtype)]),
        *([] if lengths is None else [("lengths", lengths, (batch,), torch.int64)]),
        *_matched("norm", affine, [((s.affine,), dtype) for s in plan.sites for there in (s.gain, s.shift) if there]),
        *_matched("population", populations, [
            ((site.populations(steps), 2 * site.features), DOUBLE) for site in plan.sites if site.coupled > BATCH
        ]),
        *_matched("state of a window", states, _states(plan, batch) if states else []),
    ]  # fmt: skip
    for name, tensor, shape, kind in expected:
        check_tensor(name, tensor, shape, kind, device)
    if lengths is not None:
        least, most = torch.aminmax(lengths)
        if int(least) < 0 or int(most) > steps:
            raise RuntimeError(f"lengths: got {lengths}; expected 0 to {steps} steps")


def check_gradients(
    plan: Plan, inputs: Inputs, grads: Grads, ys: Tensor, kept: Sequence[Tensor], like: Sequence[Kind]
) -> None:
    """Raise `RuntimeError` where an argument of a backward operator does not fit inputs that were checked.

    `like` holds the shape and type of each tensor that the forward operator keeps.
    """
    xs, dtype = inputs.xs, inputs.xs.dtype
    output = (*xs.shape[:2], inputs.weight_hh.shape[1])
    expected = [
        ("ys", ys, output, dtype),
        ("gradient of ys", grads.ys, output, dtype),
        ("gradient of h", grads.hn, tuple(inputs.h0.shape), dtype),
        ("gradient of c", grads.cn, tuple(inputs.c0.shape), dtype),
        *_matched("gradient of a state", grads.states, _states(plan, xs.shape[1])),
        *_matched("kept", kept, like),
    ]
    for name, tensor, shape, kind in expected:
        if tensor is not None:
            check_tensor(name, tensor, shape, kind, xs.device)
    if not all(tensor.is_contiguous() for tensor in kept):
        raise RuntimeError("kept: got a tensor that is not contiguous; expected what forward returned")


def _states(plan: Plan, batch: int) -> list[Kind]:
    return [(shape, DOUBLE) for site in plan.sites for shape in site.shapes(batch)]


def _matched(
    name: str, tensors: Sequence[Tensor | None], expected: Sequence[Kind]
) -> list[tuple[str, Tensor | None, Shape, torch.dtype]]:
    if len(tensors) != len(expected):
        raise RuntimeError(f"{name}: got {len(tensors)} tensors; expected {len(expected)}")
    return [(name, tensor, *each) for tensor, each in zip(tensors, expected, strict=True)]
