"""The backward pass of `forward`, for the same blocks of rows."""

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
from atn_norms.backends.triton.pooling import LAYER, NONE, closed, normal, opened, scaled, scales, spread_grads


@triton.jit
def _times_gain(a, site, offsets, inside):
    return a * tl.load(site.gain + offsets, mask=inside, other=0.0).to(a.dtype)[None, :]


@triton.jit
def back_through(
    d0, d1, d2, d3, n0, n1, n2, n3, a0, a1, a2, a3, mask, site, units, inside, hidden, features,
    t, steps, rows, there, alive, length, batch, ra, rb, rc,
    GATES: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, WINDOW: tl.constexpr, DECAY: tl.constexpr,
    EXTRA: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a norm's input `a` from that of its result, `d`; `n` is `a` normalized."""
    w0 = _times_gain(d0, site, units, inside)
    sums = w0
    inner = w0 * n0
    w1 = w0
    w2 = w0
    w3 = w0
    if GATES > 1:
        w1 = _times_gain(d1, site, units + hidden, inside)
        w2 = _times_gain(d2, site, units + 2 * hidden, inside)
        sums = sums + w1 + w2
        inner += w1 * n1 + w2 * n2
    if GATES > 3:
        w3 = _times_gain(d3, site, units + 3 * hidden, inside)
        sums += w3
        inner += w3 * n3
    var = tl.load(site.pooled_var + t * batch + rows, mask=there, other=1.0)
    rate = 1.0 / tl.sqrt(var + EPS)
    dvar = -0.5 * rate * rate * tl.sum(inner, 1).to(tl.float64)
    dmean = tl.zeros_like(dvar)
    if NORM == LAYER:
        dmean = -rate * tl.sum(sums, 1).to(tl.float64)
    slope, constant, mean, ra, rb, rc = spread_grads(
        site, t, steps, rows, there, alive, alive & (t == length - 1), batch, dmean, dvar, ra, rb, rc,
        WINDOW, DECAY, EXTRA,
    )  # fmt: skip
    high = mean.to(d0.dtype)[:, None]
    low = (mean - mean.to(d0.dtype).to(tl.float64)).to(d0.dtype)[:, None]
    rate = rate.to(d0.dtype)[:, None]
    slope = (slope / features).to(d0.dtype)[:, None]
    constant = (constant / features).to(d0.dtype)[:, None]
    living = alive[:, None] & mask
    b0 = tl.where(living, w0 * rate + ((a0 - high) - low) * slope + constant, 0.0)
    b1 = b0
    b2 = b0
    b3 = b0
    if GATES > 1:
        b1 = tl.where(living, w1 * rate + ((a1 - high) - low) * slope + constant, 0.0)
        b2 = tl.where(living, w2 * rate + ((a2 - high) - low) * slope + constant, 0.0)
    if GATES > 3:
        b3 = tl.where(living, w3 * rate + ((a3 - high) - low) * slope + constant, 0.0)
    return b0, b1, b2, b3, ra, rb, rc


@triton.jit
def recurrent_backward(
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
    EXTRA: tl.constexpr,
):
    """Backward through steps `last - 1` to `first`; `dh` and `dc` carry the gradients of h and c.

    Without `PRODUCT` a launch stores in `dh` the direct gradient, and the caller adds the gradient through the product.
    """
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
    dh = tl.load(x.dh + slim, mask=mask, other=0.0).to(COMPUTE)
    dc = dh
    if CELL == LSTM:
        dc = tl.load(x.dc + slim, mask=mask, other=0.0).to(COMPUTE)
    ha, hb, hg = opened(hh.carried, rows, there, batch, HH_WINDOW)
    ca, cb, cg = opened(cc.carried, rows, there, batch, C_WINDOW)
    mean = tl.zeros([ROWS], tl.float64)
    var = tl.zeros([ROWS], tl.float64)
    for turn in tl.range(0, last - first, num_stages=1):
        t = last - 1 - turn
        alive = t < length
        living = alive[:, None] & mask
        step = (long + t) * batch
        if IH_NORM != NONE:
            mean = tl.load(ih.pooled_mean + t * batch + rows, mask=there, other=0.0)
            var = tl.load(ih.pooled_var + t * batch + rows, mask=there, other=0.0)
        p0, p1, p2, p3 = load_four(x.projected, step * many + wide, mask, hidden, GATES, COMPUTE)
        p0, p1, p2, p3 = normal_four(p0, p1, p2, p3, mean, var, IH_EPS, GATES, IH_NORM)
        p0, p1, p2, p3 = scaled_four(p0, p1, p2, p3, ih, units, inside, hidden, GATES, IH_NORM)
        u0, u1, u2, u3 = load_four(x.product, step * many + wide, mask, hidden, GATES, COMPUTE)
        if HH_NORM != NONE:
            mean = tl.load(hh.pooled_mean + t * batch + rows, mask=there, other=0.0)
            var = tl.load(hh.pooled_var + t * batch + rows, mask=there, other=0.0)
        n0, n1, n2, n3 = normal_four(u0, u1, u2, u3, mean, var, HH_EPS, GATES, HH_NORM)
        s0, s1, s2, s3 = scaled_four(n0, n1, n2, n3, hh, units, inside, hidden, GATES, HH_NORM)
        dy = tl.where(living, dh + tl.load(x.doutput + step * hidden + slim, mask=mask, other=0.0).to(COMPUTE), 0.0)
        past = tl.where(living, 0.0, dh)  # direct gradient of h before the step
        g0 = dy
        g1 = dy
        g2 = dy
        g3 = dy
        r0 = dy
        r2 = dy
        if CELL == LSTM:
            i = sigmoid(p0 + s0)
            f = sigmoid(p1 + s1)
            g = tanh(p2 + s2)
            o = sigmoid(p3 + s3)
            c = tl.load(x.cells + step * hidden + slim, mask=mask, other=0.0).to(COMPUTE)
            if t == 0:
                earlier = tl.load(x.c0 + slim, mask=mask, other=0.0).to(COMPUTE)
            else:
                earlier = tl.load(x.cells + (step - batch) * hidden + slim, mask=mask, other=0.0).to(COMPUTE)
            normed = c
            shown = c
            if C_NORM != NONE:
                mean = tl.load(cc.pooled_mean + t * batch + rows, mask=there, other=0.0)
                var = tl.load(cc.pooled_var + t * batch + rows, mask=there, other=0.0)
                high, low, rate = scales(mean, var, C_EPS, C_NORM, c)
                normed = normal(c, high, low, rate, C_NORM)
                shown = scaled(normed, cc, units, inside, C_NORM)
            shown = tanh(shown)
            dshown = tl.where(living, dy * o * (1.0 - shown * shown), 0.0)
            g3 = tl.where(living, dy * shown * o * (1.0 - o), 0.0)
            if C_NORM != NONE:
                tl.store(x.dcell + step * hidden + slim, dshown, mask=mask)
                dshown, _, _, _, ca, cb, cg = back_through(
                    dshown, dshown, dshown, dshown, normed, normed, normed, normed, c, c, c, c, mask,
                    cc, units, inside, hidden, hidden, t, steps, rows, there, alive, length, batch, ca, cb, cg,
                    1, C_NORM, C_EPS, C_WINDOW, C_DECAY, EXTRA,
                )  # fmt: skip
            de = dshown + dc
            g0 = tl.where(living, de * g * i * (1.0 - i), 0.0)
            g1 = tl.where(living, de * earlier * f * (1.0 - f), 0.0)
            g2 = tl.where(living, de * i * (1.0 - g * g), 0.0)
            dc = tl.where(living, de * f, dc)
            r0 = g0
            r2 = g2
        elif CELL == GRU:
            if t == 0:
                earlier = tl.load(x.h0 + slim, mask=mask, other=0.0).to(COMPUTE)
            else:
                earlier = tl.load(x.output + (step - batch) * hidden + slim, mask=mask, other=0.0).to(COMPUTE)
            r = sigmoid(p0 + s0)
            z = sigmoid(p1 + s1)
            n = tanh(p2 + r * s2)
            g2 = tl.where(living, dy * (1.0 - z) * (1.0 - n * n), 0.0)
            g0 = tl.where(living, g2 * s2 * r * (1.0 - r), 0.0)
            g1 = tl.where(living, dy * (earlier - n) * z * (1.0 - z), 0.0)
            past += tl.where(living, dy * z, 0.0)
            r0 = g0
            r2 = tl.where(living, g2 * r, 0.0)
        elif CELL == RNN_TANH:
            h = tanh(p0 + s0)
            g0 = tl.where(living, dy * (1.0 - h * h), 0.0)
            r0 = g0
        else:
            g0 = tl.where(living & (p0 + s0 > 0), dy, 0.0)
            r0 = g0
        keep_four(x.dprojected, step * many + wide, mask, hidden, g0, g1, g2, g3, GATES)
        if CELL == GRU and HH_NORM != NONE:
            keep_four(x.drecurrent, step * many + wide, mask, hidden, r0, g1, r2, g3, GATES)
        if HH_NORM != NONE:
            r0, g1, r2, g3, ha, hb, hg = back_through(
                r0, g1, r2, g3, n0, n1, n2, n3, u0, u1, u2, u3, mask,
                hh, units, inside, hidden, many, t, steps, rows, there, alive, length, batch, ha, hb, hg,
                GATES, HH_NORM, HH_EPS, HH_WINDOW, HH_DECAY, EXTRA,
            )  # fmt: skip
        keep_four(x.dproduct, step * many + wide, mask, hidden, r0, g1, r2, g3, GATES)
        tl.debug_barrier()
        dh = past
        if PRODUCT:
            for start in tl.range(0, hidden, CHUNK, num_stages=1):
                inner = start + tl.arange(0, CHUNK)
                some = there[:, None] & (inner < hidden)[None, :]
                whole = (inner < hidden)[:, None] & inside[None, :]
                at = x.dproduct + step * many + rows[:, None] * many + inner[None, :]
                block = x.weight + inner[:, None] * hidden + units[None, :]
                for gate in tl.static_range(GATES):
                    part = tl.load(at + gate * hidden, mask=some, other=0.0)
                    weights = tl.load(block + gate * hidden * hidden, mask=whole, other=0.0)
                    dh = tl.dot(part, weights, dh, PRECISION, out_dtype=COMPUTE)
    tl.store(x.dh + slim, dh, mask=mask)
    if CELL == LSTM:
        tl.store(x.dc + slim, dc, mask=mask)
    closed(hh.carried, rows, there, batch, ha, hb, hg, HH_WINDOW)
    closed(cc.carried, rows, there, batch, ca, cb, cg, C_WINDOW)
