/* The work for one block of independent rows: its work space, its forward steps and its backward steps. Included by
   recurrent.inc.h. */

/* Work space of a group of blocks with R rows in all. */
typedef struct {
    REAL *h, *c[2], *carry, *gate, *hidden, *units; /* [R, H]; units: outputs before a projection, or their gradient */
    REAL *recurrent, *projected;    /* [R, N] */
    REAL *spare[SITES];             /* [N] each: rows normalized ahead of time */
    REAL *sums;                     /* [blocks, 4 N + 2 H] sums for the gradients of gains and shifts */
    REAL *normed[SITES];            /* [R, N], [R, N], [R, H] rows normalized by programs or with batch statistics */
    double *room;                   /* registers and inputs of programs */
    FN(Plain) plain;                /* [N] */
    FN(Features) features;
} FN(Space);

/* Return true if a site needs rows that are normalized before the work on single rows. */
INLINE int FN(any_ahead)(const Work *work) { return work->mixed || work->program_doubles; }

static size_t FN(space_size)(const Work *work, long blocks, long H, long N) {
    const long ahead = FN(any_ahead)(work) ? blocks * BLOCK_ROWS * (2 * N + H) : 0, programs = work->program_doubles * (long)(sizeof(double) / sizeof(REAL));
    return (size_t)(blocks * BLOCK_ROWS * (7 * H + 2 * N) + 3 * N + blocks * (4 * N + 2 * H) + 2 * N + ahead + programs + 128);
}

static FN(Space) FN(space_at)(const Work *work, REAL *at, long blocks, long H, long N) {
    const long rows = blocks * BLOCK_ROWS;
    FN(Space) space;
    REAL **narrow[] = {&space.h, &space.c[0], &space.c[1], &space.carry, &space.gate, &space.hidden, &space.units};
    for (size_t i = 0; i < sizeof narrow / sizeof *narrow; i++, at += rows * H) *narrow[i] = at;
    space.recurrent = at; at += rows * N;
    space.projected = at; at += rows * N;
    for (int s = 0; s < SITES; s++, at += N) space.spare[s] = at;
    space.sums = at; at += blocks * (4 * N + 2 * H);
    space.plain.ones = at;
    space.plain.zeros = at + N;
    at += 2 * N;
    space.room = NULL;
    for (int s = 0; s < SITES; s++) {
        space.normed[s] = at;
        if (FN(any_ahead)(work)) at += rows * (s == SITE_C ? H : N);
    }
    space.features = (FN(Features)){0};
    if (work->program_doubles) space.room = (double *)(((uintptr_t)at + 63) / 64 * 64);
    return space;
}

static FN(Space) FN(space)(const Work *work, REAL *at, long blocks, long H, long N) {
    const FN(Space) space = FN(space_at)(work, at, blocks, H, N);
    for (long i = 0; i < N; i++) { ((REAL *)space.plain.ones)[i] = (REAL)1; ((REAL *)space.plain.zeros)[i] = (REAL)0; }
    return space;
}

/* A group of blocks with its sites. */
typedef struct {
    long first, blocks, row, rows;     /* the first block and row of the group, and its number of blocks and rows */
    const SiteBuffers (*line)[SITES];
} FN(Group);

static FN(Group) FN(gather)(const Work *work, long first, long last) {
    const long row = atn_norms_block_start(work->batch, first);
    return (FN(Group)){first, last - first, row, atn_norms_block_start(work->batch, last) - row, (const SiteBuffers (*)[SITES])work->lines + first};
}

/* Return the first row of a block, relative to its group. */
INLINE long FN(start)(const Work *work, const FN(Group) *group, long block) {
    return atn_norms_block_start(work->batch, group->first + block) - group->row;
}

#include "traced.inc.h"

/* Return the address for the normalized row of a site: a row for each row of the group if rows are normalized ahead, otherwise
   a spare row. */
INLINE REAL *FN(spare)(const SiteBuffers *line, int site, FN(Space) space, long r, long features) {
    return FN(is_ahead)(line + site) ? space.normed[site] + r * features : space.spare[site];
}

/* Normalize the rows of a block at step t, if a program does it. */
static void FN(renormalize)(const Work *work, const SiteBuffers *line, int site, long t, long row, long start, long end, const REAL *x,
                            long features, FN(Space) space) {
    if (line[site].norm != NORM_TRACED) return;
    REAL *to = space.normed[site] + start * features;
    FN(traced_normalize)(work, line + site, t, row + start, end - start, x + start * features, features, to, features, space.room);
}

/* Backward through a site of any kind; dy is the gradient of its result, and may be its dx. */
static void FN(any_site_back)(const Work *work, FN(SiteGrads) grads, long t, long first, long rows, const REAL *dy, long ldd, double *room) {
    if (grads.line->norm == NORM_TRACED) FN(traced_back)(work, grads.line, t, first, rows, grads.x, grads.ldx, dy, grads.dx, ldd, room);
    else FN(site_back)(grads, work->steps, t, rows, dy, ldd);
}

/* Compute the statistics of a block's rows at step t; a program also normalizes the rows. */
static void FN(site_forward)(const Work *work, const SiteBuffers *line, int site, long t, long row, long start, long end, const REAL *x,
                             long features, FN(Space) space) {
    const SiteBuffers *own = line + site;
    if (FN(has_moments)(own)) FN(state)(own, t, end - start, x + start * features, features);
    if (own->norm != NORM_TRACED) return;
    FN(traced_measure)(work, own, t, row + start, end - start, x + start * features, features, space.room);
    if (own->groups) FN(pool)(own, t);
    FN(renormalize)(work, line, site, t, row, start, end, x, features, space);
}

INLINE long FN(gates)(const Work *work) { return work->cell == CELL_LSTM ? 4 : work->cell == CELL_GRU ? 3 : 1; }

/* Prefetch n numbers that the next step will read or write. */
INLINE void FN(fetch)(const REAL *from, long n, const int write) {
    for (long i = 0; i < n; i += 64 / (long)sizeof(REAL)) {
        if (write) __builtin_prefetch(from + i, 1, 2);
        else __builtin_prefetch(from + i, 0, 2);
    }
}

/* Return true if the weights are too large for a near cache. */
INLINE int FN(far)(const Work *work) {
    return (size_t)(FN(gates)(work) * work->hidden * (work->inputs + work->output)) * sizeof(REAL) >= NEAR_BYTES;
}

/* A thread of a team; it processes every `team`-th block. */
typedef struct { int id, team; } FN(Member);

INLINE void FN(wait)(FN(Member) member) {
    if (member.team > 1) atn_norms_wait();
}

/* For the features of a site with batch statistics: compute the statistics of step t, and normalize all rows. Threads share the
   features. */
static void FN(features_forward)(const Work *work, FN(Space) space, FN(Member) me, int site, long t, const REAL *x, long apart, FN(Rows) rows) {
    for (long i = me.id; i < space.features.many && rows.count; i += me.team) {
        FN(Columns) *columns = space.features.columns + i;
        if (columns->site != site) continue;
        FN(state_columns)(work, columns, t, x + columns->from, apart, rows);
        FN(normed_columns)(columns, x + columns->from, space.normed[site] + columns->from, apart, work->batch);
    }
}

/* Normalize all rows of such a site in the backward pass. */
static void FN(features_again)(const Work *work, FN(Space) space, FN(Member) me, int site, long t, const REAL *x, long apart, REAL *to) {
    for (long i = me.id; i < space.features.many; i += me.team) {
        FN(Columns) *columns = space.features.columns + i;
        if (columns->site != site) continue;
        FN(set_columns)(columns, t);
        FN(normed_columns)(columns, x + columns->from, to + columns->from, apart, work->batch);
    }
}

/* Backward through such a site; on entry dx holds the gradient of its result. */
static void FN(features_back)(const Work *work, FN(Space) space, FN(Member) me, int site, long t, const REAL *x, REAL *dx, long apart, FN(Rows) rows) {
    for (long i = me.id; i < space.features.many && rows.count; i += me.team) {
        const FN(Columns) *columns = space.features.columns + i;
        if (columns->site == site) FN(columns_back)(work, columns, t, x + columns->from, dx + columns->from, apart, rows, dx + columns->from);
    }
}

/* A packed matrix and a padded bias; without panels the unpacked matrix, and its bias or NULL. */
typedef struct { REAL *panels, *bias; const REAL *plain; } FN(Packed);

/* Compute the share of one thread in the product of rows and weights. */
static void FN(weigh)(FN(Member) me, FN(Packed) weight, long rows, long K, long M, const REAL *A, long lda, REAL *out) {
    if (weight.panels) FN(product)(me.id, me.team, rows, K, M, A, lda, weight.panels, weight.bias, out);
    else FN(dots)(me.id, me.team, rows, K, M, A, lda, weight.plain, weight.bias, out);
}

/* One step of H units of a row: of an LSTM the new c and the reciprocal of the output gate, of other cells the new h. `each`:
   every feature has its own statistic. */
INLINE void FN(row_forward)(int cell, const int each, long H, FN(Side) x, FN(Side) u, const REAL *old, REAL *now, REAL *gate) {
    x.each = u.each = each;
    if (cell == CELL_LSTM) EVERY_UNIT(H, FN(lstm)(n, at, H, x, u, old, now, gate));
    else if (cell == CELL_GRU) EVERY_UNIT(H, FN(gru)(n, at, H, x, u, old, now));
    else if (cell == CELL_RNN_TANH) EVERY_UNIT(H, FN(rnn)(0, n, at, H, x, u, now));
    else EVERY_UNIT(H, FN(rnn)(1, n, at, H, x, u, now));
}

INLINE void FN(row_output)(const int each, long H, FN(Side) y, const REAL *gate, REAL *out) {
    y.each = each;
    EVERY_UNIT(H, FN(lstm_output)(n, at, y, gate, out));
}

/* Add the input products to the recurrent ones, and set the input products to zero. */
INLINE void FN(join)(REAL *restrict recurrent, REAL *restrict in, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        recurrent[i] += in[i];
        in[i] = (REAL)0;
    }
}

/* Add the gradient from the next step, which carries the normalized cell state, to the gradient of that state. */
INLINE void FN(add_carried)(REAL *restrict hidden, REAL *restrict dc, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        hidden[i] += dc[i];
        dc[i] = (REAL)0;
    }
}

/* Normalize a row of units. */
INLINE void FN(row_normed)(const int each, long H, FN(Side) y, REAL *out) {
    y.each = each;
    EVERY_UNIT(H, FN(store)(out + at, FN(normed)(&y, 0, at, n), n));
}

/* The output of a row past its length is 0, and its state stays. */
INLINE void FN(end_rows)(const Work *work, long t, long row, long start, long end, const REAL *h, REAL *units, REAL *out, FN(Space) space) {
    const long R = work->output, H = work->hidden;
    for (long r = start; r < end && work->call->lengths; r++) {
        const int alive = FN(alive)(work, t, row + r);
        if (alive || t == 0) FN(copy)(space.h + r * R, alive ? out + r * R : h + r * R, R);
        if (!alive) memset(out + r * R, 0, (size_t)R * sizeof(REAL));
        if (!alive && units != out) memset(units + r * H, 0, (size_t)H * sizeof(REAL));
    }
}

/* The arrays of one forward step of a group. */
typedef struct {
    long t;
    REAL *in, *recurrent, *now, *units, *out;
    const REAL *h, *c;             /* before the step */
} FN(Forward);

/* The step of a block up to the new c of an LSTM, or the new h of other cells. */
static void FN(forward_gates)(const Work *work, const FN(Group) *group, long block, const FN(Forward) *step, FN(Space) space) {
    const Call *call = work->call;
    const long t = step->t, row = group->row, B = work->batch, H = work->hidden, gates = FN(gates)(work), N = gates * H;
    const long start = FN(start)(work, group, block), end = FN(start)(work, group, block + 1);
    const int lstm = work->cell == CELL_LSTM;
    const SiteBuffers *line = group->line[block];
    REAL *in = step->in, *recurrent = step->recurrent;
    FN(site_forward)(work, line, SITE_IH, t, row, start, end, in, N, space);
    FN(site_forward)(work, line, SITE_HH, t, row, start, end, recurrent, N, space);
    for (long r = start; r < end; r++) {
        const FN(Side) x = FN(side)(line + SITE_IH, t, r - start, gates, in + r * N, space.plain, FN(spare)(line, SITE_IH, space, r, N));
        const FN(Side) u = FN(side)(line + SITE_HH, t, r - start, gates, recurrent + r * N, space.plain, FN(spare)(line, SITE_HH, space, r, N));
        if (call->recurrent && t + 1 < work->steps) FN(fetch)(recurrent + (r + B) * N, N, 1);
        FN(row_forward)(work->cell, 0, H, x, u, (lstm ? step->c : step->h) + r * H, step->now + r * H, space.gate + r * H);
        if (lstm && !FN(alive)(work, t, row + r)) FN(copy)(step->now + r * H, step->c + r * H, H);
    }
}

/* The rest of the step of a block. */
static void FN(forward_output)(const Work *work, const FN(Group) *group, long block, const FN(Forward) *step, FN(Space) space) {
    const Call *call = work->call;
    const long t = step->t, row = group->row, H = work->hidden;
    const long start = FN(start)(work, group, block), end = FN(start)(work, group, block + 1);
    const int lstm = work->cell == CELL_LSTM;
    const SiteBuffers *line = group->line[block];
    if (lstm) FN(site_forward)(work, line, SITE_C, t, row, start, end, step->now, H, space);
    for (long r = start; r < end && lstm; r++) {
        const FN(Side) y = FN(side)(line + SITE_C, t, r - start, 1, step->now + r * H, space.plain, FN(spare)(line, SITE_C, space, r, H));
        FN(row_output)(0, H, y, space.gate + r * H, step->units + r * H);
        if (call->normed_carry && FN(alive)(work, t, row + r)) FN(row_normed)(0, H, y, space.carry + r * H);
    }
    if (!call->projection) FN(end_rows)(work, t, row, start, end, step->h, step->units, step->out, space);
}

/* Packed weights of the products of a forward pass; hr only with a projection. */
typedef struct { FN(Packed) ih, hh, hr; } FN(Weights);

static void FN(forward_block)(const Work *work, const FN(Weights) *weight, long first, long last, FN(Space) space, FN(Member) me) {
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, D = work->inputs, H = work->hidden, R = work->output, N = FN(gates)(work) * H;
    const int lstm = work->cell == CELL_LSTM, over_rows = FN(over_rows)(work->site + SITE_C);
    const FN(Group) group = FN(gather)(work, first, last);
    const long row = group.row, rows = group.rows;
    FN(Rows) unmasked = {0, space.features.rows};
    const REAL *h = (const REAL *)call->h0 + row * R, *c = lstm ? (const REAL *)call->c0 + row * H : NULL;
    if (call->normed_carry) {
        if (me.id == 0) memcpy(space.carry, c, (size_t)(rows * H) * sizeof(REAL));
        c = space.carry;
    }
    for (long t = 0; t < T; t++) {
        REAL *in = call->projected ? (REAL *)call->projected + (t * B + row) * N : space.projected;
        REAL *recurrent = call->recurrent ? (REAL *)call->recurrent + (t * B + row) * N : space.recurrent;
        REAL *out = (REAL *)call->output + (t * B + row) * R;
        REAL *units = !call->projection ? out : call->units ? (REAL *)call->units + (t * B + row) * H : space.units;
        REAL *now = !lstm ? out : call->cells ? (REAL *)call->cells + (t * B + row) * H : space.c[t % 2];
        const FN(Forward) step = {t, in, recurrent, now, units, out, h, c};
        FN(weigh)(me, weight->ih, rows, D, N, (const REAL *)call->xs + (t * B + row) * D, D, in);
        FN(weigh)(me, weight->hh, rows, R, N, h, R, recurrent);
        FN(wait)(me);
        for (long b = me.id; b < group.blocks && call->joint; b += me.team) {
            const long start = FN(start)(work, &group, b), end = FN(start)(work, &group, b + 1);
            FN(join)(recurrent + start * N, in + start * N, (end - start) * N);
        }
        if (work->mixed) {
            FN(look)(work, t, &unmasked);
            if (call->joint) FN(wait)(me);
            FN(features_forward)(work, space, me, SITE_IH, t, in, N, unmasked);
            FN(features_forward)(work, space, me, SITE_HH, t, recurrent, N, unmasked);
            FN(wait)(me);
        }
        for (long b = me.id; b < group.blocks; b += me.team) {
            FN(forward_gates)(work, &group, b, &step, space);
            if (!over_rows) FN(forward_output)(work, &group, b, &step, space);
        }
        if (over_rows) {
            FN(wait)(me);
            FN(features_forward)(work, space, me, SITE_C, t, now, H, unmasked);
            FN(wait)(me);
            for (long b = me.id; b < group.blocks; b += me.team) FN(forward_output)(work, &group, b, &step, space);
        }
        if (call->projection) {
            FN(wait)(me);
            FN(weigh)(me, weight->hr, rows, H, R, units, H, out);
            FN(wait)(me);
            for (long b = me.id; b < group.blocks; b += me.team)
                FN(end_rows)(work, t, row, FN(start)(work, &group, b), FN(start)(work, &group, b + 1), h, units, out, space);
        }
        if (lstm && !call->normed_carry) c = now;
        h = call->lengths ? space.h : out;
        FN(wait)(me);
    }
    if (me.id > 0) return;
    memcpy((REAL *)call->hn + row * R, h, (size_t)(rows * R) * sizeof(REAL));
    if (lstm) memcpy((REAL *)call->cn + row * H, c, (size_t)(rows * H) * sizeof(REAL));
}

/* Data for the backward steps of one chunk of steps of a group. */
typedef struct {
    FN(Packed) ih, hh;   /* W_ih as in the forward pass (to project again), and W_hh transposed */
    FN(Packed) back;     /* W_ih transposed, if dxs is required */
    FN(Packed) hr;       /* W_hr transposed, of a projection */
    REAL *dinput, *drecurrent; /* [steps of the chunk, rows of the group, N], with rows `apart` */
    long apart;
    REAL *dprojected;    /* [steps of the chunk, rows of the group, R] gradient of projected outputs */
    REAL *xs, *hs, *units; /* packed factors of the gradients of weights; few inputs are not packed */
    long first, last;
} FN(Chunk);

/* Pointers to the data of one row in the backward pass; `old` is its c or h before the step. */
typedef struct {
    FN(Side) x, u;
    const REAL *old, *dout, *dh;
    REAL *din, *drec, *hidden; /* gradient of an LSTM's normalized c, or the direct gradient of a GRU's old h */
} FN(Back);

INLINE void FN(row_back)(int cell, const int each, long H, FN(Back) row) {
    row.x.each = row.u.each = each;
    if (cell == CELL_GRU) EVERY_UNIT(H, FN(gru_back)(n, at, H, row.x, row.u, row.old, row.dout, row.dh, row.din, row.drec, row.hidden));
    else if (cell == CELL_RNN_TANH) EVERY_UNIT(H, FN(rnn_back)(0, n, at, H, row.x, row.u, row.dout, row.dh, row.din));
    else EVERY_UNIT(H, FN(rnn_back)(1, n, at, H, row.x, row.u, row.dout, row.dh, row.din));
}

INLINE void FN(row_output_back)(const int each, long H, FN(Back) row, FN(Side) y) {
    row.x.each = row.u.each = y.each = each;
    EVERY_UNIT(H, FN(lstm_output_back)(n, at, H, row.x, row.u, y, row.dout, row.dh, row.din + 3 * H, row.hidden));
}

INLINE void FN(row_cell_back)(const int each, long H, FN(Back) row, const REAL *dc, REAL *dold) {
    row.x.each = row.u.each = each;
    EVERY_UNIT(H, FN(lstm_back)(n, at, H, row.x, row.u, row.old, dc, row.hidden, row.din, dold));
}

/* Return the sums of a block's site. */
INLINE FN(Sums) FN(sums)(FN(Space) space, long block, int site, long H, long N) {
    REAL *at = space.sums + block * (4 * N + 2 * H);
    const long features = site == SITE_C ? H : N;
    at += site == SITE_IH ? 0 : site == SITE_HH ? 2 * N : 4 * N;
    return (FN(Sums)){at, at + features};
}

/* Add the sums of a chunk to those of the call, in double. */
static void FN(add_up)(const Work *work, const FN(Group) *group, FN(Space) space, long H, long N) {
    for (long b = 0; b < group->blocks; b++)
        for (int s = 0; s < SITES; s++) {
            const SiteBuffers *line = &group->line[b][s];
            if (!FN(has_moments)(line)) continue;
            const FN(Sums) sums = FN(sums)(space, b, s, H, N);
            const REAL *dshift = s == SITE_HH && FN(paired)(work) ? FN(sums)(space, b, SITE_IH, H, N).dshift : sums.dshift;
#pragma omp simd
            for (long i = 0; i < line->features; i++) {
                line->dgain[i] += (double)sums.dgain[i];
                line->dshift[i] += (double)dshift[i];
            }
        }
}

/* The whole gradient of projected outputs, and with it that of the outputs before the projection. */
static void FN(unproject)(const Work *work, const FN(Chunk) *chunk, const FN(Group) *group, long t, const REAL *dout, const REAL *dh, FN(Space) space,
                          FN(Member) me) {
    const long R = work->output;
    REAL *sum = chunk->dprojected + (t - chunk->first) * group->rows * R;
    FN(wait)(me);
    for (long b = me.id; b < group->blocks; b += me.team)
        for (long r = FN(start)(work, group, b), end = FN(start)(work, group, b + 1); r < end; r++) {
            if (!FN(alive)(work, t, group->row + r)) memset(sum + r * R, 0, (size_t)R * sizeof(REAL));
            else
#pragma omp simd
                for (long j = r * R; j < (r + 1) * R; j++) sum[j] = dout[j] + dh[j];
        }
    FN(wait)(me);
    FN(weigh)(me, chunk->hr, group->rows, R, work->hidden, sum, R, space.units);
}

/* The arrays of one backward step of a group. */
typedef struct {
    long t;
    int first;                     /* true at the first step of a chunk */
    const REAL *in, *recurrent, *cells, *old, *dout, *dunits, *dh;
    REAL *din, *drec, *dc, *dold;  /* rows of din and drec are `apart` */
    long apart;
} FN(Backward);

/* Normalize the rows of a block as in the forward pass, if programs do it, and those of a carried state. */
static void FN(normalize_again)(const Work *work, const FN(Group) *group, long block, const FN(Backward) *step, FN(Space) space) {
    const long t = step->t, row = group->row, B = work->batch, H = work->hidden, N = FN(gates)(work) * H;
    const long start = FN(start)(work, group, block), end = FN(start)(work, group, block + 1);
    const SiteBuffers *line = group->line[block];
    if (work->call->normed_carry && t && !FN(over_rows)(line + SITE_C)) { /* the state carried from the previous step */
        FN(renormalize)(work, line, SITE_C, t - 1, row, start, end, step->cells - B * H, H, space);
        for (long r = start; r < end; r++)
            FN(row_normed)(0, H, FN(side)(line + SITE_C, t - 1, r - start, 1, step->cells + (r - B) * H, space.plain, FN(spare)(line, SITE_C, space, r, H)),
                           space.carry + r * H);
    }
    for (int s = 0; s < SITES; s++) {
        const REAL *x = s == SITE_IH ? step->in : s == SITE_HH ? step->recurrent : step->cells;
        FN(renormalize)(work, line, s, t, row, start, end, x, s == SITE_C ? H : N, space);
    }
}

/* Backward through the gates of a block: of an LSTM first (part 0) up to the gradient of its normalized c, then the rest. */
static void FN(backward_gates)(const Work *work, const FN(Group) *group, long block, const FN(Backward) *step, int part, FN(Space) space) {
    const Call *call = work->call;
    const long t = step->t, row = group->row, B = work->batch, H = work->hidden, R = work->output, gates = FN(gates)(work), N = gates * H;
    const long start = FN(start)(work, group, block), end = FN(start)(work, group, block + 1);
    const int lstm = work->cell == CELL_LSTM;
    const SiteBuffers *line = group->line[block];
    for (long r = start; r < end; r++) {
        REAL *hidden = space.hidden + r * H;
        if (!FN(alive)(work, t, row + r)) { /* a masked step passes the gradient of the state on, and has no gradient of its inputs */
            memset(step->din + r * step->apart, 0, (size_t)N * sizeof(REAL));
            memset(step->drec + r * step->apart, 0, (size_t)N * sizeof(REAL));
            memset(hidden, 0, (size_t)H * sizeof(REAL));
            if (lstm) FN(copy)(step->dold + r * H, step->dc + r * H, H);
            continue;
        }
        const FN(Side) x = FN(side)(line + SITE_IH, t, r - start, gates, step->in + r * N, space.plain, FN(spare)(line, SITE_IH, space, r, N));
        const FN(Side) u = FN(side)(line + SITE_HH, t, r - start, gates, step->recurrent + r * N, space.plain, FN(spare)(line, SITE_HH, space, r, N));
        if (!step->first && part == 0) {
            FN(fetch)(step->recurrent + (r - B) * N, N, 0);
            FN(fetch)(step->dout + (r - B) * R, R, 0);
            if (call->projected) FN(fetch)(step->in + (r - B) * N, N, 0);
            if (t > 1 && !call->normed_carry) FN(fetch)(step->old + (r - B) * H, H, 0);
        }
        const FN(Back) each = {x, u, step->old + r * H, step->dunits + r * H, call->projection ? space.plain.zeros : step->dh + r * H, step->din + r * step->apart, step->drec + r * step->apart, hidden};
        if (!lstm) FN(row_back)(work->cell, 0, H, each);
        else if (part) FN(row_cell_back)(0, H, each, step->dc + r * H, step->dold + r * H);
        else FN(row_output_back)(0, H, each, FN(side)(line + SITE_C, t, r - start, 1, step->cells + r * H, space.plain, FN(spare)(line, SITE_C, space, r, H)));
        if (lstm && part == 0 && call->normed_carry) FN(add_carried)(hidden, step->dc + r * H, H);
    }
}

/* Backward through a block's norm of the cell state. */
static void FN(backward_cell)(const Work *work, const FN(Group) *group, long block, const FN(Backward) *step, FN(Space) space) {
    const long H = work->hidden, N = FN(gates)(work) * H, start = FN(start)(work, group, block), end = FN(start)(work, group, block + 1);
    REAL *hidden = space.hidden + start * H;
    const FN(SiteGrads) grads = {group->line[block] + SITE_C, step->cells + start * H, H, hidden, FN(sums)(space, block, SITE_C, H, N)};
    FN(any_site_back)(work, grads, step->t, group->row + start, end - start, hidden, H, space.room);
}

/* Backward through a block's norms of the products. */
static void FN(backward_products)(const Work *work, const FN(Group) *group, long block, const FN(Backward) *step, FN(Space) space) {
    const long t = step->t, H = work->hidden, N = FN(gates)(work) * H, start = FN(start)(work, group, block), end = FN(start)(work, group, block + 1);
    const long apart = step->apart;
    const SiteBuffers *line = group->line[block];
    const FN(SiteGrads) grads[2] = {
        {line + SITE_IH, step->in + start * N, N, step->din + start * apart, FN(sums)(space, block, SITE_IH, H, N)},
        {line + SITE_HH, step->recurrent + start * N, N, step->drec + start * apart, FN(sums)(space, block, SITE_HH, H, N)},
    };
    if (FN(paired)(work)) {
        FN(pair_back)(grads, work->steps, t, end - start, grads[0].dx, apart);
        return;
    }
    const REAL *dy = work->cell == CELL_GRU ? grads[1].dx : grads[0].dx;
    FN(any_site_back)(work, grads[1], t, group->row + start, end - start, dy, apart, space.room);
    FN(any_site_back)(work, grads[0], t, group->row + start, end - start, grads[0].dx, apart, space.room);
}

static void FN(backward_block)(const Work *work, const FN(Chunk) *chunk, long first, long last, FN(Space) space, FN(Member) me) {
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, D = work->inputs, H = work->hidden, R = work->output, N = FN(gates)(work) * H;
    const int lstm = work->cell == CELL_LSTM, over_rows = FN(over_rows)(work->site + SITE_C);
    const FN(Group) group = FN(gather)(work, first, last);
    const long row = group.row, rows = group.rows, apart = chunk->apart;
    FN(Rows) unmasked = {0, space.features.rows};
    REAL *dh = space.h, *dc = space.c[0], *dold = space.c[1];
    if (me.id == 0) {
        memset(space.sums, 0, (size_t)(group.blocks * (4 * N + 2 * H)) * sizeof(REAL));
        memcpy(dh, (REAL *)call->dh + row * R, (size_t)(rows * R) * sizeof(REAL)); /* gradient of the state after the current step */
        if (lstm) memcpy(dc, (REAL *)call->dc + row * H, (size_t)(rows * H) * sizeof(REAL));
    }
    for (long t = chunk->last - 1; t >= chunk->first; t--) {
        const long now = (t * B + row) * H, before = now - B * H;
        const REAL *in = call->projected ? (const REAL *)call->projected + (t * B + row) * N : space.projected;
        const REAL *recurrent = (const REAL *)call->recurrent + (t * B + row) * N, *dout = (const REAL *)call->doutput + (t * B + row) * R;
        const REAL *cells = lstm ? (const REAL *)call->cells + now : NULL;
        const REAL *start_at = (const REAL *)(lstm ? call->c0 : call->h0) + row * H;
        const REAL *old = t == 0 ? start_at : call->normed_carry ? space.carry : (const REAL *)(lstm ? call->cells : call->output) + before;
        const long place = (t - chunk->first) * rows * apart;
        REAL *din = chunk->dinput + place, *drec = chunk->drecurrent + place;
        const FN(Backward) step = {t, t == chunk->first, in, recurrent, cells, old, dout, call->projection ? space.units : dout, dh, din, drec, dc, dold, apart};
        if (call->projection) FN(unproject)(work, chunk, &group, t, dout, dh, space, me);
        if (call->joint) {
            if (me.id == 0) memset(space.projected, 0, (size_t)(rows * N) * sizeof(REAL));
        } else if (!call->projected)
            FN(weigh)(me, chunk->ih, rows, D, N, (const REAL *)call->xs + (t * B + row) * D, D, space.projected);
        FN(wait)(me);
        if (work->mixed) {
            FN(look)(work, t, &unmasked);
            if (call->normed_carry && t) FN(features_again)(work, space, me, SITE_C, t - 1, cells - B * H, H, space.carry);
            FN(features_again)(work, space, me, SITE_IH, t, in, N, space.normed[SITE_IH]);
            FN(features_again)(work, space, me, SITE_HH, t, recurrent, N, space.normed[SITE_HH]);
            FN(features_again)(work, space, me, SITE_C, t, cells, H, space.normed[SITE_C]);
            FN(wait)(me);
        }
        for (long b = me.id; b < group.blocks; b += me.team) {
            FN(normalize_again)(work, &group, b, &step, space);
            FN(backward_gates)(work, &group, b, &step, 0, space);
            if (over_rows) continue;
            if (lstm) FN(backward_cell)(work, &group, b, &step, space);
            if (lstm) FN(backward_gates)(work, &group, b, &step, 1, space);
            FN(backward_products)(work, &group, b, &step, space);
        }
        if (over_rows) {
            FN(wait)(me);
            FN(features_back)(work, space, me, SITE_C, t, cells, space.hidden, H, unmasked);
            FN(wait)(me);
            for (long b = me.id; b < group.blocks; b += me.team) {
                FN(backward_gates)(work, &group, b, &step, 1, space);
                FN(backward_products)(work, &group, b, &step, space);
            }
        }
        if (lstm) { REAL *swap = dc; dc = dold; dold = swap; }
        FN(wait)(me);
        if (work->mixed) {
            FN(features_back)(work, space, me, SITE_IH, t, in, din, apart, unmasked);
            FN(features_back)(work, space, me, SITE_HH, t, recurrent, drec, apart, unmasked);
            FN(wait)(me);
        }
        REAL *to = call->lengths ? space.recurrent : dh;
        FN(weigh)(me, chunk->hh, rows, N, R, drec, apart, to);
        if (call->dxs)
            FN(weigh)(me, chunk->back, rows, N, D, din, apart, (REAL *)call->dxs + (t * B + row) * D);
        if (work->cell != CELL_GRU && call->lengths == NULL) continue; /* the next step has a barrier before it reads */
        FN(wait)(me);
        for (long b = me.id; b < group.blocks; b += me.team)
            for (long r = FN(start)(work, &group, b), end = FN(start)(work, &group, b + 1); r < end; r++) {
                if (call->lengths && FN(alive)(work, t, row + r)) FN(copy)(dh + r * R, to + r * R, R);
                if (work->cell == CELL_GRU)
#pragma omp simd
                    for (long j = r * H; j < (r + 1) * H; j++) dh[j] += space.hidden[j];
            }
    }
    FN(wait)(me);
    for (long i = me.id; i < space.features.many && chunk->first == 0; i += me.team) {
        const SiteBuffers *line = &space.features.columns[i].line;
        if (FN(needs_pooled)(line)) FN(unpool_prefix)(line, T);
    }
    if (me.id > 0) return;
    FN(add_up)(work, &group, space, H, N);
    memcpy((REAL *)call->dh + row * R, dh, (size_t)(rows * R) * sizeof(REAL));
    if (lstm) memcpy((REAL *)call->dc + row * H, dc, (size_t)(rows * H) * sizeof(REAL));
    for (long b = 0; b < group.blocks && chunk->first == 0; b++)
        for (int s = 0; s < SITES; s++) {
            const SiteBuffers *line = &group.line[b][s];
            if (FN(has_moments)(line) || line->norm == NORM_TRACED) FN(unpool_prefix)(line, T);
        }
}
