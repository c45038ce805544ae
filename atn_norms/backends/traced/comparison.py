"""Compare the programs of a normalizer with its Python code, on random rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atn_norms.backends.traced.normalizer import WRONG_SHAPE, TracedNorm, rebuilt, tensors_of, twin_of
from atn_norms.backends.traced.recorder import Untraceable
from atn_norms.normalizers import Normalizer


def differences(normalizer: Normalizer, traced: TracedNorm, rows: int = 5) -> dict[str, float]:
    """Return the largest differences between programs and the normalizer's Python code, relative to the largest value.

    The comparison runs in float64 on random rows and covers the statistic, the result, and their gradients.

    Errors: `Untraceable` for a statistic that does not have one row for each row of `x`.
    """
    twin = twin_of(normalizer, 0)
    source = torch.Generator().manual_seed(7)
    x = torch.randn(rows, traced.features, generator=source, dtype=torch.float64).requires_grad_()
    tensors = tensors_of(twin)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]) if tensors else x.new_zeros(0)
    own = flat.expand(rows, -1)

    statistic = twin.measure(x)
    if any(len(leaf) != rows for leaf in statistic):
        raise Untraceable(WRONG_SHAPE)
    leaves = [leaf.detach().abs().add(0.1).requires_grad_() for leaf in statistic]
    y = twin.normalize(x, rebuilt(statistic, leaves))
    packed = _flat(leaves, traced.centred)
    found = {}
    if traced.leaves:
        outputs = traced.measure.evaluate([x.detach(), own])
        found["statistic"] = _apart(outputs, _flat(statistic, traced.centred))
        weights = [torch.randn(leaf.shape, generator=source, dtype=torch.float64) for leaf in statistic]
        expected = _gradients(list(statistic), weights, [x, *tensors])
        outputs = traced.measure_back.evaluate([x.detach(), own, *_flat(weights, traced.centred)])
        found["gradient of the statistic"] = _apart(_summed(outputs, 1), _joined(expected, 1))
    found["result"] = _apart(traced.normalize.evaluate([x.detach(), *packed, own]), [y])
    dy = torch.randn(y.shape, generator=source, dtype=torch.float64)
    expected = _gradients([y], [dy], [x, *leaves, *tensors])
    outputs = traced.normalize_back.evaluate([x.detach(), *packed, own, dy])
    of_leaves = _flat(expected[1 : 1 + len(leaves)], traced.centred)
    wanted = [expected[0], *of_leaves, *_joined(expected[1 + len(leaves) :], 0)]
    found["gradient of the result"] = _apart(_summed(outputs, 1 + len(of_leaves)), wanted)
    return found


def difference_in_float32(normalizer: Normalizer, traced: TracedNorm, rows: int = 5) -> float:
    """Return the largest difference between programs and Python code on float32, relative to the largest of its row.

    The programs run in float64. Rows have several scales, so that constants that depend on the type are found.
    """
    twin = twin_of(normalizer, 0).float()
    source = torch.Generator().manual_seed(7)
    tensors = [tensor.detach().double().reshape(-1) for tensor in tensors_of(twin)]
    own = torch.cat([torch.zeros(0, dtype=torch.float64), *tensors]).expand(rows, -1)
    worst = 0.0
    for scale in (1.0, 1e-3, 1e-6):
        x = scale * torch.randn(rows, traced.features, generator=source)
        with torch.no_grad():
            y = twin.normalize(x, twin.measure(x)).double()
        leaves = traced.measure.evaluate([x.double(), own]) if traced.leaves else []
        (expected,) = traced.normalize.evaluate([x.double(), *leaves, own])
        worst = max(worst, float(((y - expected).abs().amax(1) / y.abs().amax(1)).max()))
    return worst


def _gradients(outputs: Sequence[Tensor], weights: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    able = [tensor for tensor in wanted if tensor.requires_grad]
    pairs = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    if not pairs or not able:
        return [torch.zeros_like(tensor) for tensor in wanted]
    found = iter(torch.autograd.grad([o for o, _ in pairs], able, [w for _, w in pairs], allow_unused=True))
    every = [next(found) if tensor.requires_grad else None for tensor in wanted]
    return [torch.zeros_like(t) if g is None else g for g, t in zip(every, wanted, strict=True)]


def _flat(leaves: Any, centred: bool) -> list[Tensor]:
    """Return leaves `[R, ...]` as inputs of programs."""
    flat = [leaf.detach().reshape(len(leaf), -1) for leaf in leaves]
    return flat if centred or len(flat) < 2 else [torch.cat(flat, 1)]


def _joined(gradients: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Return the first `rows` gradients, which belong to rows, and the concatenation of the others."""
    rest = [gradient.reshape(-1) for gradient in gradients[rows:]]
    return [*gradients[:rows], *([torch.cat(rest)] if rest else [])]


def _summed(outputs: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Return the first `rows` outputs, which belong to rows, and the sums of the others over all rows."""
    return [*outputs[:rows], *(output.sum(0) for output in outputs[rows:])]


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the magnitude of its tensor; infinity if only one side is NaN.

    The magnitude is at least a thousandth of the largest tensor's, so that rounding errors of a zero do not count.
    """
    magnitudes = [float(tensor.detach().nan_to_num().abs().max()) if tensor.numel() else 0.0 for tensor in expected]
    least = max(1e-3 * max(magnitudes, default=0.0), 1e-30)
    worst = 0.0
    for a, b, magnitude in zip(found, expected, magnitudes, strict=False):
        a, b = a.detach().reshape(b.shape), b.detach()
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        if b.numel():
            worst = max(worst, float((a - b).nan_to_num(0.0).abs().max()) / max(magnitude, least))
    return worst
