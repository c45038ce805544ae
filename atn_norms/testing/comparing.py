"""The one comparison of the laws: it raises with the worst element and its position, and returns nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def demand(holds: bool, message: str) -> None:
    """Raise `AssertionError` unless a condition holds; unlike `assert`, also under `python -O`."""
    if not holds:
        raise AssertionError(message)


def compare(actual: Any, expected: Any, *, tolerance: float, scale: float | None = None, what: str = "value") -> None:
    """Raise unless two tensors, or two trees of tensors, agree element by element.

    The error of an element is |actual - expected| / max(1, |expected|), or / `scale` if it is given. `tolerance=0`
    requires the same bits up to the sign of zero. Shape, dtype and structure must agree. NaN differs from every number.

    Errors: `AssertionError` with the position, both values and the error.

    >>> import torch
    >>> compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), tolerance=1e-6)
    Traceback (most recent call last):
    ...
    AssertionError: value: 1 of 2 elements differ, worst at [1]: 2.0, expected 3.0, error 0.333 exceeds 1e-06
    """
    if isinstance(expected, Tensor):
        _tensors(actual, expected, tolerance, scale, what)
    elif isinstance(expected, Mapping):
        demand(
            isinstance(actual, Mapping) and list(actual) == list(expected),
            f"{what}: keys {list(actual)} where {list(expected)} are expected",
        )
        for key in expected:
            compare(actual[key], expected[key], tolerance=tolerance, scale=scale, what=f"{what}[{key!r}]")
    elif isinstance(expected, tuple | list):
        demand(isinstance(actual, tuple | list), f"{what}: {type(actual).__name__} where a sequence is expected")
        demand(len(actual) == len(expected), f"{what}: {len(actual)} entries where {len(expected)} are expected")
        for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            compare(mine, theirs, tolerance=tolerance, scale=scale, what=f"{what}[{index}]")
    else:
        demand(type(actual) is type(expected) and actual == expected, f"{what}: {actual!r}, expected {expected!r}")


def _tensors(actual: Any, expected: Tensor, tolerance: float, scale: float | None, what: str) -> None:
    demand(isinstance(actual, Tensor), f"{what}: {type(actual).__name__} where a tensor is expected")
    demand(actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    demand(actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}")
    if actual.numel() == 0:
        return
    mine, theirs = actual.detach().double(), expected.detach().double()
    size = theirs.abs().clamp(min=1.0) if scale is None else torch.full_like(theirs, scale)
    error = ((mine - theirs).abs() / size).masked_fill(mine == theirs, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(error.argmax())
    if float(error.flatten()[worst]) > tolerance:
        place = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
        raise AssertionError(
            f"{what}: {int((error > tolerance).sum())} of {error.numel()} elements differ, worst at {place}: "
            f"{mine.flatten()[worst].item()!r}, expected {theirs.flatten()[worst].item()!r}, "
            f"error {error.flatten()[worst].item():.3g} exceeds {tolerance:.3g}"
        )
