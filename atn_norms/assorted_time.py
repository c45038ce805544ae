"""A normalizer with statistics pooled over a time window; the state is passed in and returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from atn_norms.errors import Problem, message, mismatch, short_repr
from atn_norms.normalizers import Normalizer, scanning
from atn_norms.normalizers.base import apply_norm, has_population
from atn_norms.normalizers.batch import synchronized
from atn_norms.options import to_int
from atn_norms.pytree import Leaf, Tree, checked_state, expand_mask
from atn_norms.statistics import Statistic, statistics_dtype
from atn_norms.windows import Sliding, Window


class OverTime:
    """Shared code of `AssortedTime` and `SiteNorm`: a normalizer over a window."""

    normalizer: Normalizer
    window: Window[Any]

    def initial(self, x: Tensor) -> Tree:
        """Return the state before the first step; `x` `[B, ..., D]` has the shape of the pre-activations of a step."""
        with torch.no_grad():
            # The shape of a statistic does not depend on the number of rows.
            sample = x.new_zeros((2, *x.shape[1:]))
            now, _ = self._measured(sample, self._weights(x, sample.shape[:1], None), 0)
            rows = 1 if self.normalizer.uses_batch_statistics else x.shape[0]
            now = type(now)(*(leaf[:1].expand(rows, *leaf.shape[1:]) for leaf in now))
            return x.new_zeros(rows, dtype=torch.int64), self._pooling.initial(now)

    def step(self, x: Tensor, state: Tree | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tree]:
        """Normalize one step; return the result and the state for the next step."""
        self._check(x, "x", ("batch",))
        if mask is not None:
            x = _filled(x, check_mask(mask, x))
        now, weight = self._measured(x, self._weights(x, x.shape[:1], mask), 0, mask)
        index, memory = self.initial(x) if state is None else self._checked(state, now, weight)
        pooled, memory = self._pooling.push(now, weight, memory)
        if mask is not None:
            pooled = _pooled_or_now(pooled, now, weight > 0)
        if has_population(self.normalizer):
            pooled = self.normalizer.population(pooled, torch.where(self.normalizer.counted_steps(weight), index, -1))
        y = self._normalized(x, pooled)
        if mask is None and not self.normalizer.uses_batch_statistics:
            return y, (index + 1, memory)
        return y if mask is None else masked(y, mask), (index + (weight > 0), memory)

    def scan(
        self, xs: Tensor, state: Tree | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tree]:
        """Normalize T steps, time first, as T calls of `step`; return the results and the state for the next step."""
        self._check(xs, "xs", ("time", "batch"))
        if xs.shape[0] == 0:
            raise ValueError(mismatch("xs", f"shape {list(xs.shape)}", "at least one time step"))
        mask = None if lengths is None else steps_mask(lengths, xs)
        if mask is not None:
            xs = _filled(xs, mask)
        steps, weights = self._measured(xs, self._weights(xs, xs.shape[:2], mask), 1, mask)
        first = type(steps)(*(leaf[0] for leaf in steps))
        index, memory = self.initial(xs[0]) if state is None else self._checked(state, first, weights[0])
        with scanning([self.normalizer]):
            pooled, memory = self._pooling.scan(steps, weights, memory)
            count = (weights > 0).cumsum(0)
            if mask is not None:
                pooled = _pooled_or_now(pooled, steps, weights > 0)
            if has_population(self.normalizer):
                counted = self.normalizer.counted_steps(weights)
                pooled = self.normalizer.population(pooled, torch.where(counted, index + count - 1, -1))
        ys = self._normalized(xs, pooled)
        return ys if mask is None else masked(ys, mask), (index + count[-1], memory)

    def _weights(self, x: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
        dtype = statistics_dtype(x.device)
        return torch.ones(shape, dtype=dtype, device=x.device) if mask is None else mask.to(dtype)

    def _measured(self, x: Tensor, weights: Tensor, batch: int, mask: Tensor | None = None) -> tuple[Statistic, Tensor]:
        """Measure each row; pool batch statistics over the unmasked rows, or else over all rows, on axis `batch`."""
        statistic = self.normalizer.measure(x)
        self._check_statistic(statistic, x)
        if not self.normalizer.uses_batch_statistics:
            return statistic, weights
        total = weights.sum(batch, keepdim=True)
        shares = weights if mask is None else torch.where(total > 0, weights, 1.0)
        merged = type(statistic)(*(leaf.unsqueeze(batch) for leaf in statistic.pool(shares, batch)))
        return self.normalizer.merge_processes(merged, total, batch)

    def _check_statistic(self, statistic: Any, x: Tensor) -> None:
        leading = x.shape[:-1]
        if not callable(getattr(statistic, "pool", None)) or not all(
            isinstance(leaf, Tensor) and leaf.ndim > len(leading) and leaf.shape[: len(leading)] == leading
            for leaf in statistic
        ):
            expected = f"a Statistic (a named tuple with `pool`) whose leaves have shape {[*leading, '...']}"
            raise TypeError(self._wrong_result("measure", f"{_described(statistic)} for x {list(x.shape)}", expected))
        if self.normalizer.stateless != (not any(True for _ in statistic)):
            expected = "no leaves, as it is stateless" if self.normalizer.stateless else "leaves, or `stateless = True`"
            raise TypeError(self._wrong_result("measure", _described(statistic), expected))

    def _wrong_result(self, method: str, got: str, expected: str) -> str:
        return mismatch(f"{type(self.normalizer).__name__}.{method}", got, expected)

    def _normalized(self, x: Tensor, pooled: Any) -> Tensor:
        y = apply_norm(self.normalizer, x, pooled)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            expected = f"a tensor of the shape of x, {list(x.shape)}"
            raise TypeError(self._wrong_result("normalize", _described(y), expected))
        return y.to(x.dtype)

    def _check(self, x: Tensor, name: str, leading: tuple[str, ...]) -> None:
        features = getattr(self.normalizer, "features", "features")
        if not isinstance(x, Tensor):
            got = type(x).__name__
        elif x.ndim <= len(leading) or (isinstance(features, int) and x.shape[-1] != features):
            got = f"shape {list(x.shape)}"
        elif not x.is_floating_point():
            got = str(x.dtype)
        else:
            return
        expected = f"[{', '.join(leading)}, ..., {features}] of a floating-point type"
        raise ValueError(mismatch(name, got, expected))

    @property
    def _pooling(self) -> Any:
        """The window, or `_NoWindow` for a stateless normalizer."""
        return _NO_WINDOW if self.normalizer.stateless else self.window

    def _checked(self, state: Tree, now: Statistic, weight: Tensor) -> Tree:
        """Return `state` if it has the layout of this normalizer and window, for a statistic like `now`."""
        wanted = (Leaf((), floating=False), self._pooling.layout(now))
        return checked_state(state, wanted, weight.shape[0], weight.device, self.normalizer.uses_batch_statistics)


class _NoWindow:
    """Window of a stateless normalizer: no pooling and no state."""

    def initial(self, now: Statistic) -> Tree:
        return ()

    def layout(self, now: Statistic) -> Any:
        return ()

    def push(self, now: Statistic, weight: Tensor, state: Tree) -> tuple[Statistic, Tree]:
        return now, ()

    scan = push


_NO_WINDOW = _NoWindow()


@dataclass(eq=False)
class SiteNorm(OverTime):
    """A normalizer over a window as a plain value, for cells; the normalizer is registered in another module."""

    normalizer: Normalizer
    window: Window[Any]


class AssortedTime(OverTime, nn.Module):
    r"""Normalize each time step with the statistics of a window of steps that ends with it.

    $$s_t = \mathrm{measure}(a_t), \qquad \bar s_t = \mathrm{pool}_{s \in W_t}(s_s), \qquad
    y_t = \mathrm{normalize}(a_t, \bar s_t)$$

    Source: Pospisil, Zadorozhnyy, Ye, *Assorted-Time Normalization*, arXiv 2209.14439, for layer normalization and a
    sliding window. This class combines any normalizer with any window. The gradient flows through every step of the
    window. Training and evaluation have equal results, except with running statistics (`BatchNorm`).

    | symbol | meaning | shape |
    |---|---|---|
    | `window` | an integer k (the last k steps, the current step included), or a `Window` | |
    | `x`, `xs` | pre-activations of one step, or of T steps, time first | `[B, ..., D]`, `[T, B, ..., D]` |
    | `mask` | True for unmasked rows | `[B]`, bool |
    | `lengths` | number of steps of each row, 0 to T | `[B]`, int |
    | `state` | `(step_index [N], window state)`, N = B, or 1 with batch statistics; None: the initial state | |

    Padding may hold any value. It is never read, its outputs are 0, and it leaves the state of its row unchanged.

    Errors:

    - `ValueError` for a window that the normalizer does not support;
    - `ValueError` for `x`, `xs`, `mask` or `lengths` of another shape or type, and for T = 0;
    - `ValueError` for a state of another normalizer, window or batch size. States of `Cumulative` and `Exponential`
      have the same layout, so they cannot be distinguished;
    - `TypeError` for a normalizer whose `measure` or `normalize` returns a wrong type or shape.

    >>> import torch, atn_norms as an
    >>> norm = an.AssortedTime(an.LayerNorm(240), window=25)
    >>> xs = torch.randn(100, 8, 240)
    >>> ys, state = norm.scan(xs[:60])
    >>> more, state = norm.scan(xs[60:], state)
    >>> torch.allclose(torch.cat([ys, more]), norm.scan(xs)[0], atol=1e-6)
    True
    """

    def __init__(self, normalizer: Normalizer, window: int | Window[Any] = 1) -> None:
        super().__init__()
        if not isinstance(normalizer, Normalizer):
            expected = "a Normalizer, such as atn_norms.LayerNorm(features)"
            raise TypeError(mismatch("normalizer", type(normalizer).__name__, expected))
        window = window if isinstance(window, Window) else to_int(window)
        if not isinstance(window, (int, Window)):
            raise TypeError(mismatch("window", short_repr(window), "an integer of at least 1, or a Window"))
        self.normalizer = normalizer
        self.window = window if isinstance(window, Window) else Sliding(window)
        reason = normalizer.unsupported_reason(self.window)
        if reason is not None:
            got = f"{self.window!r} with {type(normalizer).__name__}"
            expected = "a window that the normalizer supports"
            raise ValueError(message(Problem(("window",), got, expected, detail=reason)))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Register a submodule; `nn.SyncBatchNorm.convert_sync_batchnorm` synchronizes the norm that it replaces."""
        super().add_module(name, synchronized(self._modules.get(name), module))

    def extra_repr(self) -> str:
        return f"window={self.window}"


def _pooled_or_now(pooled: Any, now: Any, mask: Tensor) -> Any:
    """Return the pooled statistics of unmasked rows, and the own statistics of masked rows, whose window may be empty.

    An empty pool may be 0. A normalizer without `eps` has NaN gradients for such a pool, even behind a mask.
    """
    pairs = zip(pooled, now, strict=True)
    return type(now)(*(torch.where(expand_mask(mask, new), old, new) for old, new in pairs))


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    """Replace all elements outside `mask` by fixed numbers, even NaN; their gradient is 0.

    The numbers differ between features and between rows of a step. So the statistics of a masked row are those of an
    ordinary row, with which no gradient is NaN.
    """
    shape = x.shape[mask.ndim - 1 :]
    numbers = torch.arange(math.prod(shape), dtype=torch.float32, device=x.device).cos().reshape(shape)
    return torch.where(expand_mask(mask, x), x, numbers.to(x.dtype))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Replace all elements outside `mask` (over the leading axes) by 0, even NaN; their gradient is 0."""
    return torch.where(expand_mask(mask, x), x, torch.zeros((), dtype=x.dtype, device=x.device))


def steps_mask(lengths: Tensor | Sequence[int], xs: Tensor) -> Tensor:
    """Return the mask `[T, B]` for `lengths` `[B]` of time-first `xs` `[T, B, ...]`.

    Errors: `ValueError` for lengths that are no integers, that are outside 0 to T, or whose number is not B.
    """
    steps, batch = xs.shape[:2]
    counts = checked_lengths(lengths, steps, batch).to(xs.device)
    return torch.arange(steps, device=xs.device).unsqueeze(1) < counts


def check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return `mask` if it has one bool for each row of `x` `[B, ...]`; `ValueError` if not."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:1]:
        expected = f"a bool tensor of shape [{x.shape[0]}], one element for each row"
        raise ValueError(mismatch("mask", _described(mask), expected))
    return mask


def checked_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """Return a copy of `lengths` as int64 `[batch]`; `ValueError` unless they fit `batch` rows of `steps` steps.

    The caller may change its own tensor before the backward pass.
    """

    def error(got: str) -> str:
        return mismatch("lengths", got, f"{batch} integer(s) from 0 to {steps}")

    if not isinstance(lengths, Tensor) and hasattr(lengths, "tolist"):
        lengths = cast(Any, lengths).tolist()  # numpy's unsigned types have no equivalent in old versions of torch
    try:
        counts = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(error(short_repr(lengths))) from None
    if counts.is_meta:
        raise ValueError(error("a tensor on the meta device, which has no values"))
    if counts.dtype == torch.bool or counts.is_floating_point() or counts.is_complex():
        raise ValueError(error(str(counts.dtype)))
    # torch cannot compare unsigned types; values above int64 become negative.
    counts = counts.to(torch.int64, copy=True)
    if counts.shape != (batch,):
        raise ValueError(error(f"shape {list(counts.shape)}"))
    outside = (counts < 0) | (counts > steps)
    if torch.compiler.is_compiling():  # a graph cannot read values; it checks them when it runs
        torch._assert_async(~outside.any(), error("a number outside the sequence"))
        return counts
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(error(f"{int(counts[row])} in row {row}"))
    return counts


def _described(value: Any) -> str:
    """Describe a value for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of type {value.dtype} and shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    return type(value).__name__
