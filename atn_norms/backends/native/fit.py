"""What fits a plan: the kernels know addresses only, so types and shapes are checked before they get them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atn_norms.backends.native.plan import Plan


def check_fit(
    plan: Plan,
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
) -> None:
    """`RuntimeError`, as torch raises it, where an argument of the operator has another type or shape than the rest."""
    (_, batch, inputs), hidden, dtype = xs.shape, weight_hh.shape[1], weight_hh.dtype
    wide = plan.gates * hidden
    _check("x", xs, xs.shape, dtype)
    _check("weight_ih", weight_ih, (wide, inputs), dtype)
    _check("weight_hh", weight_hh, (wide, hidden), dtype)
    _check("h", h0, (batch, hidden), dtype)
    _check("c", c0, (batch, hidden) if plan.is_lstm else (0,), dtype)
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None:
            _check(name, bias, (wide,), dtype)
    features = [site.features for site in plan.sites for there in (site.gain, site.shift) if there]
    for tensor, many in zip(affine, features, strict=True):
        _check("norm", tensor, (many,), dtype)
    if states:
        shapes = [shape for site in plan.sites for shape in site.shapes(batch)]
        for leaf, shape in zip(states, shapes, strict=True):
            _check("state of a window", leaf, shape, torch.float64)
    if lengths is not None:
        _check("lengths", lengths, (batch,), torch.int64)


def _check(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != tuple(shape) or not tensor.is_cpu:
        raise RuntimeError(
            f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; allowed: {dtype} {list(shape)} on cpu"
        )
