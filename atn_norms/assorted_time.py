"""A normalizer with statistics pooled over a time window; the state is passed in and returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from atn_norms.normalizers import Normalizer, scanning
from atn_norms.normalizers.base import apply_norm
from atn_norms.normalizers.batch import synchronized
from atn_norms.pytree import Leaf, Tree, checked_state, expand_mask
from atn_norms.statistics import Statistic, statistics_dtype
from atn_norms.windows import Sliding, Window


class OverTime:
    """Shared code of `AssortedTime` and `SiteNorm`: a normalizer over a window."""

    normalizer: Normalizer
    window: Window[Any]

    def initial(self, x: Tensor) -> Tree:
        """Return the state before the first step, for pre-activations of one step shaped like `x` `[B, ..., D]`."""
        with torch.no_grad():
            # The shape of a statistic does not depend on the number of rows.
            sample = x.new_zeros((2, *x.shape[1:]))
            now, _ = self._stated(sample, self._weights(x, sample.shape[:1], None), 0)
            rows = 1 if self.normalizer.uses_batch_statistics else x.shape[0]
            now = type(now)(*(leaf[:1].expand(rows, *leaf.shape[1:]) for leaf in now))
            return x.new_zeros(rows, dtype=torch.int64), self._pooling.initial(now)

    def step(self, x: Tensor, state: Tree | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tree]:
        """Normalize one step; return the result and the state for the next step."""
        self._check(x, "x", ("batch",))
        if mask is not None:
            x = masked(x, check_mask(mask, x))
        now, weight = self._stated(x, self._weights(x, x.shape[:1], mask), 0)
        index, memory = self.initial(x) if state is None else self._fitting(state, now, weight)
        pooled, memory = self._pooling.push(now, weight, memory)
        live = weight > 0
        pooled = self.normalizer.population(pooled, torch.where(self.normalizer.counted_steps(weight), index, -1))
        y = self._normalized(x, pooled)
        return y if mask is None else masked(y, mask), (index + live, memory)

    def scan(
        self, xs: Tensor, state: Tree | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tree]:
        """Normalize T steps, time first, as `step` T times; return the results and the state after the last step."""
        self._check(xs, "xs", ("time", "batch"))
        if xs.shape[0] == 0:
            raise ValueError(f"xs: shape {list(xs.shape)}; allowed: at least one time step")
        mask = None if lengths is None else steps_mask(lengths, xs)
        if mask is not None:
            xs = masked(xs, mask)
        steps, weights = self._stated(xs, self._weights(xs, xs.shape[:2], mask), 1)
        first = type(steps)(*(leaf[0] for leaf in steps))
        index, memory = self.initial(xs[0]) if state is None else self._fitting(state, first, weights[0])
        with scanning([self.normalizer]):
            pooled, memory = self._pooling.scan(steps, weights, memory)
            live = weights > 0
            count = live.cumsum(0)
            counted = self.normalizer.counted_steps(weights)
            pooled = self.normalizer.population(pooled, torch.where(counted, index + count - 1, -1))
        ys = self._normalized(xs, pooled)
        return ys if mask is None else masked(ys, mask), (index + count[-1], memory)

    def _weights(self, x: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
        dtype = statistics_dtype(x.device)
        return torch.ones(shape, dtype=dtype, device=x.device) if mask is None else mask.to(dtype)

    def _stated(self, x: Tensor, weights: Tensor, batch: int) -> tuple[Statistic, Tensor]:
        """Measure each row; batch statistics are pooled over the unmasked rows of axis `batch`."""
        statistic = self.normalizer.measure(x)
        leading = x.shape[:-1]
        if not callable(getattr(statistic, "pool", None)) or not all(
            isinstance(leaf, Tensor) and leaf.ndim > len(leading) and leaf.shape[: len(leading)] == leading
            for leaf in statistic
        ):
            raise TypeError(
                f"{type(self.normalizer).__name__}.measure: returned {_described(statistic)} for x {list(x.shape)}; "
                f"allowed: a Statistic (a named tuple with pool) whose leaves have shape {[*leading, '...']}"
            )
        if self.normalizer.stateless != (not any(True for _ in statistic)):
            wanted = "no leaves, as it is stateless" if self.normalizer.stateless else "leaves, or `stateless = True`"
            name = type(self.normalizer).__name__
            raise TypeError(f"{name}.measure: got {_described(statistic)}; expected {wanted}")
        if not self.normalizer.uses_batch_statistics:
            return statistic, weights
        together = type(statistic)(*(leaf.unsqueeze(batch) for leaf in statistic.pool(weights, batch)))
        return self.normalizer.merge_processes(together, weights.sum(batch, keepdim=True), batch)

    def _normalized(self, x: Tensor, pooled: Any) -> Tensor:
        y = apply_norm(self.normalizer, x, pooled)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise TypeError(
                f"{type(self.normalizer).__name__}.normalize: returned {_described(y)}; "
                f"allowed: a tensor of the shape of x, {list(x.shape)}"
            )
        return y.to(x.dtype)

    def _check(self, x: Tensor, name: str, leading: tuple[str, ...]) -> None:
        features = getattr(self.normalizer, "features", "features")
        allowed = f"allowed: [{', '.join(leading)}, ..., {features}] of a floating-point type"
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: {type(x).__name__}; {allowed}")
        if x.ndim <= len(leading) or (isinstance(features, int) and x.shape[-1] != features):
            raise ValueError(f"{name}: shape {list(x.shape)}; {allowed}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: of type {x.dtype}; {allowed}")

    @property
    def _pooling(self) -> Any:
        """The window, or `_NoWindow` for a stateless normalizer."""
        return _NO_WINDOW if self.normalizer.stateless else self.window

    def _fitting(self, state: Tree, now: Statistic, weight: Tensor) -> Tree:
        """`state` if this normalizer and window could have returned it where a step's statistic is `now`."""
        wanted = (Leaf((), floating=False), self._pooling.layout(now))
        return checked_state(state, wanted, weight.shape[0], weight.device, self.normalizer.uses_batch_statistics)


class _NoWindow:
    """The window of a stateless normalizer: it pools nothing and keeps no state."""

    def initial(self, now: Statistic) -> Tree:
        return ()

    def layout(self, now: Statistic) -> Any:
        return ()

    def push(self, now: Statistic, weight: Tensor, state: Tree) -> tuple[Statistic, Tree]:
        return now, ()

    scan = push


_NO_WINDOW = _NoWindow()


@dataclass(frozen=True)
class SiteNorm(OverTime):
    """A normalizer over a window as a plain value, for cells; the normalizer belongs to a module elsewhere."""

    normalizer: Normalizer
    window: Window[Any]


class AssortedTime(OverTime, nn.Module):
    r"""Normalize each time step with the statistics of a window of steps that ends with it.

    $$s_t = \mathrm{measure}(a_t), \qquad \bar s_t = \mathrm{pool}_{s \in W_t}(s_s), \qquad
    y_t = \mathrm{normalize}(a_t, \bar s_t)$$

    Source: Pospisil, Zadorozhnyy, Ye, *Assorted-Time Normalization*, arXiv 2209.14439, for layer normalization and a
    sliding window; any normalizer and any window here. The gradient flows through every step of the window. Training
    and evaluation compute the same, except for normalizers with running statistics (`BatchNorm`).

    | symbol | meaning | shape |
    |---|---|---|
    | `window` | an integer k (the last k steps, the current one included), or a `Window` | |
    | `x`, `xs` | pre-activations of one step, or of T steps, time first | `[B, ..., D]`, `[T, B, ..., D]` |
    | `mask` | True for unmasked rows | `[B]`, bool |
    | `lengths` | steps of each row, 0 to T | `[B]`, int |
    | `state` | `(step_index [N], window state)`, N = B, or 1 with batch statistics; None: the initial state | |

    Padding may hold any value: it is never read, its outputs are 0, and it leaves the state of its row unchanged.

    Errors: `ValueError` for a window that the normalizer does not support, for T = 0, for missing axes, for features
    that are not the normalizer's, for a type that is not floating point, for lengths or `mask` that do not fit, and for
    a state that this normalizer and window cannot have returned for this batch (`Cumulative` and `Exponential` states
    have the same layout and cannot be distinguished); `TypeError` for a normalizer whose `measure` or `normalize`
    returns a wrong type or shape.

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
            raise TypeError(
                f"normalizer: {type(normalizer).__name__}; allowed: a Normalizer, such as atn_norms.LayerNorm(features)"
            )
        if not isinstance(window, (int, Window)):
            raise TypeError(f"window: {window!r}; allowed: an integer of at least 1, or a Window")
        self.normalizer = normalizer
        self.window = window if isinstance(window, Window) else Sliding(window)
        reason = normalizer.unsupported_reason(self.window)
        if reason is not None:
            raise ValueError(f"window: {self.window!r} with {type(normalizer).__name__}: {reason}")

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Register a submodule; `nn.SyncBatchNorm.convert_sync_batchnorm` synchronizes the norm that it replaces."""
        super().add_module(name, synchronized(self._modules.get(name), module))

    def extra_repr(self) -> str:
        return f"window={self.window}"


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Replace everything outside `mask` (over the leading axes) by 0, NaN and gradient included."""
    return torch.where(expand_mask(mask, x), x, torch.zeros((), dtype=x.dtype, device=x.device))


def steps_mask(lengths: Tensor | Sequence[int], xs: Tensor) -> Tensor:
    """Return the mask `[T, B]` for `lengths` `[B]` of time-first `xs` `[T, B, ...]`.

    Errors: `ValueError` where lengths are no integers, are not one per row, or lie outside 0 to T.
    """
    steps, batch = xs.shape[:2]
    counts = checked_lengths(lengths, steps, batch).to(xs.device)
    return torch.arange(steps, device=xs.device).unsqueeze(1) < counts


def check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return `mask` if it has one bool for each row of `x` `[B, ...]`; `ValueError` if not."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:1]:
        raise ValueError(f"mask: {_described(mask)}; allowed: a bool tensor of shape [{x.shape[0]}], one for each row")
    return mask


def checked_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """Return `lengths` as int64 `[batch]`; `ValueError` where they do not fit `batch` rows of `steps` steps."""
    allowed = f"allowed: {batch} integer(s) from 0 to {steps}"
    if not isinstance(lengths, Tensor) and hasattr(lengths, "tolist"):
        lengths = cast(Any, lengths).tolist()  # numpy's unsigned types have no equivalent in old versions of torch
    try:
        counts = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"lengths: {lengths!r:.80}; {allowed}") from None
    if counts.is_meta:
        raise ValueError(f"lengths: on the meta device, which holds no numbers; {allowed}")
    if counts.dtype == torch.bool or counts.is_floating_point() or counts.is_complex():
        raise ValueError(f"lengths: of type {counts.dtype}; {allowed}")
    counts = counts.to(torch.int64)  # torch compares no unsigned types; what does not fit becomes negative
    if counts.shape != (batch,):
        raise ValueError(f"lengths: shape {list(counts.shape)}; {allowed}")
    outside = (counts < 0) | (counts > steps)
    if torch.compiler.is_compiling():  # a graph cannot read a number; it asserts when it runs
        torch._assert_async(~outside.any(), f"lengths: got a number outside the sequence; {allowed}")
        return counts
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(f"lengths: row {row} has {int(counts[row])}; {allowed}")
    return counts


def _described(value: Any) -> str:
    """Describe a value for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of type {value.dtype} and shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    return type(value).__name__
