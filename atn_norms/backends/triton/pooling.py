"""Statistics in the kernels: computed from rows, pooled over windows, and their gradients.

Statistics are in float64, with one lane for each row. A statistic has a mean and a variance; for RMS norms the mean is
0 and the variance the mean square. A step takes the same time for every window. Chunks as long as the window split a
sliding window into the end of one chunk and the beginning of the next. The ends are merged once for every position,
when the chunk is complete. The beginning is merged step by step. No window is updated by subtraction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

NONE, LAYER, RMS = (tl.constexpr(value) for value in range(3))  # norms of a site
SINGLE, SLIDING, DECAYING = (tl.constexpr(value) for value in range(3))  # windows of a site
UNIT = tl.constexpr(2.0**-44)  # unit of the deviations before they are squared

Pointer = Any  # a tensor for the launcher, a pointer in the kernel


class Site(NamedTuple):
    """The tensors of one norm site. F features, P statistics in the state, T steps, B rows.

    | field | meaning | shape |
    |---|---|---|
    | `gain`, `shift` | gain and shift of the norm | `[F]` |
    | `weight` | weights of the statistics in the state | `[P, B]` |
    | `mean`, `var` | statistics of single steps, those of the state first | `[P + T, B]` |
    | `total`, `pooled_mean`, `pooled_var` | weight, mean and variance of the window that ends at a step | `[T, B]` |
    | `ends` | weight, mean and variance from a position to the end of its chunk | `[3, P + T, B]` |
    | `running` | weight, mean and variance from the beginning of the chunk, or of all steps | `[3, B]` |
    | `slopes` | gradients of a window's statistics, as three sums | `[3, T, B]` |
    | `later` | these sums from a position to the end of its chunk | `[3, T, B]` |
    | `carried` | these sums of the current chunk | `[3, B]` |
    | `extra` | gradients of the statistics, or of the pooled statistic at a row's last step | `[2, T, B]` |
    | `steps`, `past` | k of a sliding window, and P | |
    """

    gain: Pointer
    shift: Pointer
    weight: Pointer
    mean: Pointer
    var: Pointer
    total: Pointer
    pooled_mean: Pointer
    pooled_var: Pointer
    ends: Pointer
    running: Pointer
    slopes: Pointer
    later: Pointer
    carried: Pointer
    extra: Pointer
    steps: int
    past: int


@triton.jit
def moments_of(u0, u1, u2, u3, mask, features, GATES: tl.constexpr, NORM: tl.constexpr):
    """Return mean and variance of every row over its gates, in float64; or 0 and the mean square."""
    # In this unit the squares of numbers from 1e-6 to 1e30 are exact and finite in float32.
    if NORM == RMS:
        u0 = u0 * UNIT
        squares = u0 * u0
        if GATES > 1:
            u1 = u1 * UNIT
            u2 = u2 * UNIT
            squares += u1 * u1 + u2 * u2
        if GATES > 3:
            u3 = u3 * UNIT
            squares += u3 * u3
        var = tl.sum(squares, 1).to(tl.float64) / features / UNIT / UNIT
        return tl.zeros_like(var), var
    else:
        # Around a first mean, which is close to the mean relative to the deviation.
        sums = u0
        if GATES > 1:
            sums = sums + u1 + u2
        if GATES > 3:
            sums = sums + u3
        near = tl.sum(sums, 1) / features
        d0 = tl.where(mask, (u0 - near[:, None]) * UNIT, 0.0)
        sums = d0
        squares = d0 * d0
        if GATES > 1:
            d1 = tl.where(mask, (u1 - near[:, None]) * UNIT, 0.0)
            d2 = tl.where(mask, (u2 - near[:, None]) * UNIT, 0.0)
            sums += d1 + d2
            squares += d1 * d1 + d2 * d2
        if GATES > 3:
            d3 = tl.where(mask, (u3 - near[:, None]) * UNIT, 0.0)
            sums += d3
            squares += d3 * d3
        off = tl.sum(sums, 1).to(tl.float64) / features
        var = (tl.sum(squares, 1).to(tl.float64) / features - off * off) / UNIT / UNIT
        # `maximum` would replace NaN by a number.
        return near.to(tl.float64) + off / UNIT, tl.where(var < 0, 0.0, var)


@triton.jit
def scales(mean, var, EPS: tl.constexpr, NORM: tl.constexpr, like):
    """Return the mean in two parts of the type of `like`, with an exact difference to the first; and 1 / deviation."""
    if NORM == NONE:
        zero = tl.zeros_like(mean).to(like.dtype)
        return zero, zero, zero
    else:
        high = mean.to(like.dtype)
        low = (mean - high.to(tl.float64)).to(like.dtype)
        # An infinite mean gives a row of NaN, as in every backend.
        return high, low, (1.0 / tl.sqrt(var + EPS)).to(like.dtype)


@triton.jit
def normal(a, high, low, rate, NORM: tl.constexpr):
    """Normalize `a`, without gain and shift."""
    if NORM == LAYER:
        a = ((a - high[:, None]) - low[:, None]) * rate[:, None]
    if NORM == RMS:
        a = a * rate[:, None]
    return a


@triton.jit
def scaled(a, site, offsets, inside, NORM: tl.constexpr):
    """Multiply by the gain, and add the shift."""
    if NORM != NONE:
        gain = tl.load(site.gain + offsets, mask=inside, other=0.0).to(a.dtype)
        shift = tl.load(site.shift + offsets, mask=inside, other=0.0).to(a.dtype)
        a = a * gain[None, :] + shift[None, :]
    return a


@triton.jit
def merged(wa, ma, va, wb, mb, vb):
    """Merge two statistics; a statistic of weight 0 is masked, even if it is NaN."""
    total = wa + wb
    share = tl.where(total > 0, wb / tl.where(total > 0, total, 1.0), 0.0)
    m0 = tl.where(wa > 0, ma, mb)
    v0 = tl.where(wa > 0, va, vb)
    m1 = tl.where(wb > 0, mb, m0)
    v1 = tl.where(wb > 0, vb, v0)
    away = m1 - m0
    return total, m0 + away * share, v0 + (v1 - v0) * share + share * (1.0 - share) * away * away


@triton.jit
def opened(lines, rows, there, batch, WINDOW: tl.constexpr):
    """Load the three sums that steps carry."""
    if WINDOW == SINGLE:
        nothing = tl.zeros(rows.shape, tl.float64)
        return nothing, nothing, nothing
    else:
        a = tl.load(lines + rows, mask=there, other=0.0)
        b = tl.load(lines + batch + rows, mask=there, other=0.0)
        c = tl.load(lines + 2 * batch + rows, mask=there, other=0.0)
        return a, b, c


@triton.jit
def closed(lines, rows, there, batch, a, b, c, WINDOW: tl.constexpr):
    """Store the three sums for the next launch."""
    if WINDOW != SINGLE:
        tl.store(lines + rows, a, mask=there)
        tl.store(lines + batch + rows, b, mask=there)
        tl.store(lines + 2 * batch + rows, c, mask=there)


@triton.jit
def pooled(site, t, steps, rows, there, alive, batch, mean, var, rw, rm, rv, WINDOW: tl.constexpr, DECAY: tl.constexpr):
    """Store a step's statistic, and pool the window that ends with it; return mean, variance and the carried sums."""
    own = (site.past + t) * batch + rows
    tl.store(site.mean + own, mean, mask=there)
    tl.store(site.var + own, var, mask=there)
    one = tl.full(mean.shape, 1.0, tl.float64)
    total = one
    if WINDOW == DECAYING:
        w = rw * DECAY
        total, mean, var = merged(w, rm, rv, one, mean, var)
        rw = tl.where(alive, total, rw)
        rm = tl.where(alive, mean, rm)
        rv = tl.where(alive, var, rv)
    if WINDOW == SLIDING:
        size = (site.past + steps) * batch
        phase = (site.steps - 1 + t) % site.steps
        if phase == 0:
            # A chunk begins. Positions count from the first statistic of a full window before the first step.
            rw = tl.zeros_like(rw)
            last = site.past + t - 1
            many = tl.minimum(site.steps - 1, last + 1)
            sw = tl.zeros_like(rw)
            sm = tl.zeros_like(rw)
            sv = tl.zeros_like(rw)
            for back in tl.range(0, many, num_stages=1):
                place = last - back
                at = place * batch + rows
                w = tl.load(site.weight + at, mask=there & (place < site.past), other=1.0)
                m = tl.load(site.mean + at, mask=there, other=0.0)
                v = tl.load(site.var + at, mask=there, other=0.0)
                sw, sm, sv = merged(w, m, v, sw, sm, sv)
                tl.store(site.ends + at, sw, mask=there)
                tl.store(site.ends + size + at, sm, mask=there)
                tl.store(site.ends + 2 * size + at, sv, mask=there)
            tl.debug_barrier()
        rw, rm, rv = merged(rw, rm, rv, one, mean, var)
        first = tl.maximum(t - (site.steps - 1) + site.past, 0)
        at = first * batch + rows
        split = there & (phase != site.steps - 1)  # otherwise the window is exactly one chunk
        w = tl.load(site.ends + at, mask=split, other=0.0)
        m = tl.load(site.ends + size + at, mask=split, other=0.0)
        v = tl.load(site.ends + 2 * size + at, mask=split, other=0.0)
        total, mean, var = merged(w, m, v, rw, rm, rv)
    here = t * batch + rows
    tl.store(site.total + here, total, mask=there)
    tl.store(site.pooled_mean + here, mean, mask=there)
    tl.store(site.pooled_var + here, var, mask=there)
    return mean, var, rw, rm, rv


@triton.jit
def spread_grads(
    site,
    t,
    steps,
    rows,
    there,
    alive,
    ends,
    batch,
    dmean,
    dvar,
    ra,
    rb,
    rc,
    WINDOW: tl.constexpr,
    DECAY: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Record the gradient of a step's window, and sum the gradients of the windows that contain the step.

    Let m be the total weight of a window, alpha = 2 dL/dv / m and beta = dL/dmu / m. The sums over these windows are
    those of alpha, of beta and of alpha mu. They give the slope A and the constant C in
    dL/da = ... + (A (a - mean) + C) / F. `ends`: rows for which this is the last step.
    """
    here = t * batch + rows
    extra_mean = tl.zeros_like(dmean)
    extra_var = tl.zeros_like(dmean)
    if EXTRA:
        extra_mean = tl.load(site.extra + here, mask=there, other=0.0)
        extra_var = tl.load(site.extra + steps * batch + here, mask=there, other=0.0)
        if WINDOW == DECAYING:
            dmean += tl.where(ends, extra_mean, 0.0)
            dvar += tl.where(ends, extra_var, 0.0)
    total = tl.load(site.total + here, mask=there, other=1.0)
    level = tl.load(site.pooled_mean + here, mask=there, other=0.0)
    mean = tl.load(site.mean + (site.past + t) * batch + rows, mask=there, other=0.0)
    size = steps * batch
    a = tl.where(alive, 2.0 * dvar / total, 0.0)
    b = tl.where(alive, dmean / total, 0.0)
    c = tl.where(alive, a * level, 0.0)
    tl.store(site.slopes + here, a, mask=there)
    tl.store(site.slopes + size + here, b, mask=there)
    tl.store(site.slopes + 2 * size + here, c, mask=there)
    if WINDOW == DECAYING:
        ra = tl.where(alive, a + DECAY * ra, ra)
        rb = tl.where(alive, b + DECAY * rb, rb)
        rc = tl.where(alive, c + DECAY * rc, rc)
        a = ra
        b = rb
        c = rc
    if WINDOW == SLIDING:
        turn = steps - 1 - t
        phase = turn % site.steps
        if (phase == 0) & (turn > 0):
            ra = tl.zeros_like(ra)
            rb = tl.zeros_like(ra)
            rc = tl.zeros_like(ra)
            sa = tl.zeros_like(ra)
            sb = tl.zeros_like(ra)
            sc = tl.zeros_like(ra)
            for forth in tl.range(1, site.steps, num_stages=1):
                at = (t + forth) * batch + rows
                sa += tl.load(site.slopes + at, mask=there, other=0.0)
                sb += tl.load(site.slopes + size + at, mask=there, other=0.0)
                sc += tl.load(site.slopes + 2 * size + at, mask=there, other=0.0)
                tl.store(site.later + at, sa, mask=there)
                tl.store(site.later + size + at, sb, mask=there)
                tl.store(site.later + 2 * size + at, sc, mask=there)
            tl.debug_barrier()
        ra += a
        rb += b
        rc += c
        last = t + site.steps - 1
        split = there & (phase != site.steps - 1) & (last < steps)
        at = last * batch + rows
        a = ra + tl.load(site.later + at, mask=split, other=0.0)
        b = rb + tl.load(site.later + size + at, mask=split, other=0.0)
        c = rc + tl.load(site.later + 2 * size + at, mask=split, other=0.0)
    constant = b + (mean * a - c)
    if EXTRA and WINDOW != DECAYING:
        a += tl.where(alive, 2.0 * extra_var, 0.0)
        constant += tl.where(alive, extra_mean, 0.0)
    return a, constant, mean, ra, rb, rc
