"""Gates: up to four, contiguous in a row of memory; and the tensors of a call except those of its sites."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from atn_norms.backends.fused.plan import CELLS
from atn_norms.backends.triton.pooling import Pointer, normal, scaled, scales

LSTM, GRU, RNN_TANH, RNN_RELU = (tl.constexpr(CELLS[name]) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


class Tensors(NamedTuple):
    """All tensors except those of the sites. T steps, B rows, H hidden units, N = gates * H.

    | field | meaning | shape |
    |---|---|---|
    | `projected`, `product` | W_ih x + b_ih; W_hh h + b_hh | `[T, B, N]` |
    | `weight`, `turned` | W_hh; its transpose | `[N, H]`, `[H, N]` |
    | `bias` | b_hh | `[N]` |
    | `h0`, `c0` | initial state | `[B, H]` |
    | `output`, `cells` | h and c after each step | `[T, B, H]` |
    | `lengths` | unmasked steps of each row | `[B]` |
    | `doutput`, `dh`, `dc` | gradients of the output, and of h and c at the current step | `[T, B, H]`, `[B, H]` |
    | `dprojected`, `drecurrent` | gradients of the results of the norms at both products | `[T, B, N]` |
    | `dproduct`, `dcell` | gradients of the product, and of the result of the norm of c | `[T, B, N]`, `[T, B, H]` |
    """

    projected: Pointer
    product: Pointer
    weight: Pointer
    turned: Pointer
    bias: Pointer
    h0: Pointer
    c0: Pointer
    output: Pointer
    cells: Pointer
    lengths: Pointer
    doutput: Pointer
    dh: Pointer
    dc: Pointer
    dprojected: Pointer
    drecurrent: Pointer
    dproduct: Pointer
    dcell: Pointer


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Compute tanh(x); in float32 it keeps its digits near 0."""
    if x.dtype == tl.float64:
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    else:
        # Near 0 the difference would lose digits.
        s = x * x
        near = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925))))))
        return tl.where(tl.abs(x) < 0.25, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def load_four(pointer, at, mask, hidden, GATES: tl.constexpr, COMPUTE: tl.constexpr):
    """Load the gates of a row, which are contiguous; gates that the cell does not have repeat the first."""
    a0 = tl.load(pointer + at, mask=mask, other=0.0).to(COMPUTE)
    a1 = a0
    a2 = a0
    a3 = a0
    if GATES > 1:
        a1 = tl.load(pointer + at + hidden, mask=mask, other=0.0).to(COMPUTE)
        a2 = tl.load(pointer + at + 2 * hidden, mask=mask, other=0.0).to(COMPUTE)
    if GATES > 3:
        a3 = tl.load(pointer + at + 3 * hidden, mask=mask, other=0.0).to(COMPUTE)
    return a0, a1, a2, a3


@triton.jit
def keep_four(pointer, at, mask, hidden, a0, a1, a2, a3, GATES: tl.constexpr):
    """Store the gates that the cell has."""
    tl.store(pointer + at, a0, mask=mask)
    if GATES > 1:
        tl.store(pointer + at + hidden, a1, mask=mask)
        tl.store(pointer + at + 2 * hidden, a2, mask=mask)
    if GATES > 3:
        tl.store(pointer + at + 3 * hidden, a3, mask=mask)


@triton.jit
def normal_four(a0, a1, a2, a3, mean, var, EPS: tl.constexpr, GATES: tl.constexpr, NORM: tl.constexpr):
    """Normalize four gates with the same statistic, without gain and shift."""
    high, low, rate = scales(mean, var, EPS, NORM, a0)
    n0 = normal(a0, high, low, rate, NORM)
    n1 = n0
    n2 = n0
    n3 = n0
    if GATES > 1:
        n1 = normal(a1, high, low, rate, NORM)
        n2 = normal(a2, high, low, rate, NORM)
    if GATES > 3:
        n3 = normal(a3, high, low, rate, NORM)
    return n0, n1, n2, n3


@triton.jit
def scaled_four(a0, a1, a2, a3, site, units, inside, hidden, GATES: tl.constexpr, NORM: tl.constexpr):
    """Multiply by the gain, and add the shift."""
    s0 = scaled(a0, site, units, inside, NORM)
    s1 = s0
    s2 = s0
    s3 = s0
    if GATES > 1:
        s1 = scaled(a1, site, units + hidden, inside, NORM)
        s2 = scaled(a2, site, units + 2 * hidden, inside, NORM)
    if GATES > 3:
        s3 = scaled(a3, site, units + 3 * hidden, inside, NORM)
    return s0, s1, s2, s3
