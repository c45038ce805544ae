"""The norm of the input product, for all steps at once; and the gradients of gains and shifts."""

from __future__ import annotations

import triton
import triton.language as tl

from atn_norms.backends.triton.pooling import LAYER, closed, moments_of, normal, opened, pooled, scales, spread_grads


@triton.jit
def measure_rows(
    a, site, many, batch, features, ROWS: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr, COMPUTE: tl.constexpr
):
    """Compute the statistic of every row of `a` `[many, features]`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    there = rows < many
    mask = there[:, None] & (columns < features)[None, :]
    x = tl.load(a + rows[:, None] * features + columns[None, :], mask=mask, other=0.0).to(COMPUTE)
    mean, var = moments_of(x, x, x, x, mask, features, 1, NORM)
    at = site.past * batch + rows
    tl.store(site.mean + at, mean, mask=there)
    tl.store(site.var + at, var, mask=there)


@triton.jit
def pool_steps(
    site, lengths, steps, batch, LANES: tl.constexpr, RAGGED: tl.constexpr, WINDOW: tl.constexpr, DECAY: tl.constexpr
):
    """Pool every window of a block of rows."""
    rows = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = rows < batch
    length = tl.full([LANES], 0, tl.int64) + steps
    if RAGGED:
        length = tl.load(lengths + rows, mask=there, other=0)
    rw, rm, rv = opened(site.running, rows, there, batch, WINDOW)
    for t in tl.range(0, steps, num_stages=1):
        at = (site.past + t) * batch + rows
        mean = tl.load(site.mean + at, mask=there, other=0.0)
        var = tl.load(site.var + at, mask=there, other=0.0)
        _, _, rw, rm, rv = pooled(site, t, steps, rows, there, t < length, batch, mean, var, rw, rm, rv, WINDOW, DECAY)
    closed(site.running, rows, there, batch, rw, rm, rv, WINDOW)


@triton.jit
def pooled_grads(
    d, a, site, grads, many, features,
    ROWS: tl.constexpr, WIDE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients `grads` `[2, many]` of the pooled mean and variance of every row from the gradients `d`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    there = rows < many
    inside = columns < features
    mask = there[:, None] & inside[None, :]
    at = rows[:, None] * features + columns[None, :]
    mean = tl.load(site.pooled_mean + rows, mask=there, other=0.0)
    var = tl.load(site.pooled_var + rows, mask=there, other=1.0)
    x = tl.load(a + at, mask=mask, other=0.0).to(COMPUTE)
    high, low, small = scales(mean, var, EPS, NORM, x)
    w = tl.load(d + at, mask=mask, other=0.0).to(COMPUTE)
    w = w * tl.load(site.gain + columns, mask=inside, other=0.0).to(COMPUTE)[None, :]
    rate = 1.0 / tl.sqrt(var + EPS)
    inner = tl.sum(tl.where(mask, w * normal(x, high, low, small, NORM), 0.0), 1).to(tl.float64)
    tl.store(grads + many + rows, -0.5 * rate * rate * inner, mask=there)
    if NORM == LAYER:
        tl.store(grads + rows, -rate * tl.sum(w, 1).to(tl.float64), mask=there)
    else:
        tl.store(grads + rows, tl.zeros_like(rate), mask=there)


@triton.jit
def sum_steps(
    site, grads, lengths, steps, batch,
    LANES: tl.constexpr, RAGGED: tl.constexpr, WINDOW: tl.constexpr, DECAY: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the statistics of a block of rows over all windows: slope and constant, in `grads`."""
    rows = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = rows < batch
    length = tl.full([LANES], 0, tl.int64) + steps
    if RAGGED:
        length = tl.load(lengths + rows, mask=there, other=0)
    ra, rb, rc = opened(site.carried, rows, there, batch, WINDOW)
    size = steps * batch
    for turn in tl.range(0, steps, num_stages=1):
        t = steps - 1 - turn
        here = t * batch + rows
        alive = t < length
        dmean = tl.load(grads + here, mask=there, other=0.0)
        dvar = tl.load(grads + size + here, mask=there, other=0.0)
        slope, constant, _, ra, rb, rc = spread_grads(
            site, t, steps, rows, there, alive, alive & (t == length - 1), batch, dmean, dvar, ra, rb, rc,
            WINDOW, DECAY, EXTRA,
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(grads + here, constant, mask=there)
        tl.store(grads + size + here, slope, mask=there)
    closed(site.carried, rows, there, batch, ra, rb, rc, WINDOW)


@triton.jit
def row_grads(
    d, a, site, grads, lengths, many, batch, features,
    ROWS: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Replace `d` by the gradients of every row of `a`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    there = rows < many
    inside = columns < features
    mask = there[:, None] & inside[None, :]
    at = rows[:, None] * features + columns[None, :]
    constant = tl.load(grads + rows, mask=there, other=0.0)
    slope = tl.load(grads + many + rows, mask=there, other=0.0)
    mean = tl.load(site.mean + site.past * batch + rows, mask=there, other=0.0)
    var = tl.load(site.pooled_var + rows, mask=there, other=1.0)
    x = tl.load(a + at, mask=mask, other=0.0).to(COMPUTE)
    high = mean.to(COMPUTE)
    low = (mean - high.to(tl.float64)).to(COMPUTE)
    rate = (1.0 / tl.sqrt(var + EPS)).to(COMPUTE)
    w = tl.load(d + at, mask=mask, other=0.0).to(COMPUTE)
    w = w * tl.load(site.gain + columns, mask=inside, other=0.0).to(COMPUTE)[None, :]
    slope = (slope / features).to(COMPUTE)
    constant = (constant / features).to(COMPUTE)
    given = w * rate[:, None] + ((x - high[:, None]) - low[:, None]) * slope[:, None] + constant[:, None]
    if RAGGED:
        length = tl.load(lengths + rows % batch, mask=there, other=0)
        given = tl.where((rows // batch < length)[:, None], given, 0.0)
    tl.store(d + at, given, mask=mask)


@triton.jit
def sum_affine(
    d, a, site, sums, lengths, many, batch, features, each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of gain and shift over `each` rows: `sums` `[2, blocks, features]`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(1)
    inside = columns < features
    gain = tl.zeros([ROWS, COLUMNS], COMPUTE)
    shift = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for start in tl.range(0, each, ROWS, num_stages=1):
        rows = block.to(tl.int64) * each + start + tl.arange(0, ROWS)
        there = rows < many
        if RAGGED:
            there = there & (rows // batch < tl.load(lengths + rows % batch, mask=there, other=0))
        mask = there[:, None] & inside[None, :]
        at = rows[:, None] * features + columns[None, :]
        mean = tl.load(site.pooled_mean + rows, mask=there, other=0.0)
        var = tl.load(site.pooled_var + rows, mask=there, other=1.0)
        x = tl.load(a + at, mask=mask, other=0.0).to(COMPUTE)
        y = tl.load(d + at, mask=mask, other=0.0).to(COMPUTE)
        high, low, rate = scales(mean, var, EPS, NORM, x)
        gain += tl.where(mask, y * normal(x, high, low, rate, NORM), 0.0)
        shift += y
    at = block * features + columns
    tl.store(sums + at, tl.sum(gain, 0), mask=inside)
    tl.store(sums + tl.num_programs(1) * features + at, tl.sum(shift, 0), mask=inside)
