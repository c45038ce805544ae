"""A whole sequence of a cell with separate statistics for each row.

One program computes all steps of a block of rows: product, statistics, pooling and gates, independently of other
programs. Without `PRODUCT`, another kernel computes the product, and one launch computes one step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from atn_norms.backends.triton.gates import (
    GRU,
    LSTM,
    RNN_TANH,
    keep_four,
    load_four,
    normal_four,
    scaled_four,
    sigmoid,
    tanh,
)
from atn_norms.backends.triton.pooling import NONE, closed, moments_of, normal, opened, pooled, scaled, scales


@triton.jit
def recurrent_forward(
    x,
    ih,
    hh,
    cc,
    first,
    last,
    steps,
    batch,
    hidden,
    CELL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    RAGGED: tl.constexpr,
    IH_NORM: tl.constexpr,
    IH_EPS: tl.constexpr,
    HH_NORM: tl.constexpr,
    HH_EPS: tl.constexpr,
    HH_WINDOW: tl.constexpr,
    HH_DECAY: tl.constexpr,
    C_NORM: tl.constexpr,
    C_EPS: tl.constexpr,
    C_WINDOW: tl.constexpr,
    C_DECAY: tl.constexpr,
):
    """Compute steps `first` to `last - 1`."""
    GATES: tl.constexpr = 4 if CELL == LSTM else (3 if CELL == GRU else 1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    units = tl.arange(0, WIDE)
    long = tl.program_id(1).to(tl.int64)  # 0 in a type that holds every index
    there = rows < batch
    inside = units < hidden
    mask = there[:, None] & inside[None, :]
    many = GATES * hidden
    slim = rows[:, None] * hidden + units[None, :]
    wide = rows[:, None] * many + units[None, :]
    length = tl.full([ROWS], 0, tl.int64) + steps
    if RAGGED:
        length = tl.load(x.lengths + rows, mask=there, other=0)
    before = (first > 0) & mask
    h = tl.load(x.h0 + slim, mask=mask & (first == 0), other=0.0).to(COMPUTE)
    if CELL == GRU:
        earlier = (long + tl.maximum(first - 1, 0)) * batch * hidden
        h += tl.load(x.output + earlier + slim, mask=before, other=0.0).to(COMPUTE)
    c = h
    if CELL == LSTM:
        earlier = (long + tl.maximum(first - 1, 0)) * batch * hidden
        c = tl.load(x.c0 + slim, mask=mask & (first == 0), other=0.0).to(COMPUTE)
        c += tl.load(x.cells + earlier + slim, mask=before, other=0.0).to(COMPUTE)
    hw, hm, hv = opened(hh.running, rows, there, batch, HH_WINDOW)
    cw, cm, cv = opened(cc.running, rows, there, batch, C_WINDOW)
    for t in tl.range(first, last, num_stages=1):
        alive = t < length
        step = (long + t) * batch
        if PRODUCT:
            u0 = tl.zeros([ROWS, WIDE], COMPUTE)
            u0 += tl.load(x.bias + units, mask=inside, other=0.0).to(COMPUTE)[None, :]
            u1 = u0
            u2 = u0
            u3 = u0
            if GATES > 1:
                u1 = tl.zeros([ROWS, WIDE], COMPUTE)
                u1 += tl.load(x.bias + hidden + units, mask=inside, other=0.0).to(COMPUTE)[None, :]
                u2 = tl.zeros([ROWS, WIDE], COMPUTE)
                u2 += tl.load(x.bias + 2 * hidden + units, mask=inside, other=0.0).to(COMPUTE)[None, :]
            if GATES > 3:
                u3 = tl.zeros([ROWS, WIDE], COMPUTE)
                u3 += tl.load(x.bias + 3 * hidden + units, mask=inside, other=0.0).to(COMPUTE)[None, :]
            for start in tl.range(0, hidden, CHUNK, num_stages=1):
                inner = start + tl.arange(0, CHUNK)
                some = there[:, None] & (inner < hidden)[None, :]
                at = rows[:, None] * hidden + inner[None, :]
                if t == 0:
                    part = tl.load(x.h0 + at, mask=some, other=0.0)
                else:
                    part = tl.load(x.output + (step - batch) * hidden + at, mask=some, other=0.0)
                block = x.turned + inner[:, None] * many + units[None, :]
                whole = (inner < hidden)[:, None] & inside[None, :]
                u0 = tl.dot(part, tl.load(block, mask=whole, other=0.0), u0, PRECISION, out_dtype=COMPUTE)
                if GATES > 1:
                    u1 = tl.dot(part, tl.load(block + hidden, mask=whole, other=0.0), u1, PRECISION, out_dtype=COMPUTE)
                    u2 = tl.dot(
                        part, tl.load(block + 2 * hidden, mask=whole, other=0.0), u2, PRECISION, out_dtype=COMPUTE
                    )
                if GATES > 3:
                    u3 = tl.dot(
                        part, tl.load(block + 3 * hidden, mask=whole, other=0.0), u3, PRECISION, out_dtype=COMPUTE
                    )
            keep_four(x.product, step * many + wide, mask, hidden, u0, u1, u2, u3, GATES)
        else:
            u0, u1, u2, u3 = load_four(x.product, step * many + wide, mask, hidden, GATES, COMPUTE)
        mean, var = moments_of(u0, u1, u2, u3, mask, many, GATES, HH_NORM)
        if HH_NORM != NONE:
            mean, var, hw, hm, hv = pooled(
                hh, t, steps, rows, there, alive, batch, mean, var, hw, hm, hv, HH_WINDOW, HH_DECAY
            )
        u0, u1, u2, u3 = normal_four(u0, u1, u2, u3, mean, var, HH_EPS, GATES, HH_NORM)
        u0, u1, u2, u3 = scaled_four(u0, u1, u2, u3, hh, units, inside, hidden, GATES, HH_NORM)
        if IH_NORM != NONE:
            mean = tl.load(ih.pooled_mean + t * batch + rows, mask=there, other=0.0)
            var = tl.load(ih.pooled_var + t * batch + rows, mask=there, other=0.0)
        p0, p1, p2, p3 = load_four(x.projected, step * many + wide, mask, hidden, GATES, COMPUTE)
        p0, p1, p2, p3 = normal_four(p0, p1, p2, p3, mean, var, IH_EPS, GATES, IH_NORM)
        p0, p1, p2, p3 = scaled_four(p0, p1, p2, p3, ih, units, inside, hidden, GATES, IH_NORM)
        if CELL == LSTM:
            c = tl.where(
                alive[:, None],
                sigmoid(p1 + u1) * c + sigmoid(p0 + u0) * tanh(p2 + u2),
                c,
            )
            tl.store(x.cells + step * hidden + slim, c, mask=mask)
            shown = c
            if C_NORM != NONE:
                mean, var = moments_of(c, c, c, c, mask, hidden, 1, C_NORM)
                mean, var, cw, cm, cv = pooled(
                    cc, t, steps, rows, there, alive, batch, mean, var, cw, cm, cv, C_WINDOW, C_DECAY
                )
                high, low, rate = scales(mean, var, C_EPS, C_NORM, c)
                shown = scaled(normal(c, high, low, rate, C_NORM), cc, units, inside, C_NORM)
            h = sigmoid(p3 + u3) * tanh(shown)
        elif CELL == GRU:
            z = sigmoid(p1 + u1)
            n = tanh(p2 + sigmoid(p0 + u0) * u2)
            h = (1.0 - z) * n + z * h
        elif CELL == RNN_TANH:
            h = tanh(p0 + u0)
        else:
            h = p0 + u0
            h = tl.where(h < 0, 0.0, h)
        tl.store(x.output + step * hidden + slim, tl.where(alive[:, None], h, 0.0), mask=mask)
        tl.debug_barrier()
    closed(hh.running, rows, there, batch, hw, hm, hv, HH_WINDOW)
    closed(cc.running, rows, there, batch, cw, cm, cv, C_WINDOW)
