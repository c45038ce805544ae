/* A whole sequence of one recurrent layer and direction, forward and backward, for one REAL and one instruction set.

   Rows never meet under these norms, so a block of rows goes through all of time by itself: product, statements, windows
   and gates while they are in cache, and no barrier between steps. Blocks have a fixed size, so neither values nor sums
   depend on the number of threads. */

#include "real.inc.h"

#include "pooling.inc.h"

/* Work space of one block of rows; `gates` is N wide and `hidden` H wide for each row. */
typedef struct {
    REAL *h, *c, *gates, *hidden, *recurrent, *projected, *wide, *narrow;
    REAL *column; /* sums over the rows of one step, which are added to double after it: [2, N] */
} FN(Space);

/* One row of a normed site, ready to use: y = ((x - high) - low) * scale * gain + shift. The pooled mean is split so that
   subtracting it in REAL loses nothing. */
typedef struct { REAL high, low, scale; } FN(Affine);

static inline FN(Affine) FN(affine)(const Line *site, long lane) {
    FN(Affine) a = {0, 0, 1};
    if (site->norm != NORM_NONE) {
        const double mu = site->norm == NORM_MOMENTS ? site->mu[lane] : 0.0;
        a.high = (REAL)mu;
        a.low = (REAL)(mu - (double)a.high);
        a.scale = (REAL)site->scale[lane];
    }
    return a;
}

static inline long FN(lane)(const Line *site, const Work *work, long t, long row) {
    return site->norm == NORM_NONE ? 0 : (t * work->batch + row) * site->groups;
}

/* Normed row: out = N(x), or a copy where the site has no norm. */
static void FN(normed)(const Line *site, long lane, const REAL *restrict x, REAL *restrict out, long features) {
    if (site->norm == NORM_NONE) {
        memcpy(out, x, (size_t)features * sizeof(REAL));
        return;
    }
    const long width = site->features / site->groups;
    const REAL *restrict gain = site->gain, *restrict shift = site->shift;
    for (long g = 0; g < site->groups; g++) {
        const FN(Affine) a = FN(affine)(site, lane + g);
#pragma omp simd
        for (long i = g * width; i < (g + 1) * width; i++) out[i] = ((x[i] - a.high) - a.low) * a.scale * gain[i] + shift[i];
    }
}

/* Hidden units filled up to whole vectors: rows of work space have this length, so that the costly loops over gates leave no
   odd ones to be done one by one. What the filling computes is finite and never read. */
static inline long FN(padded)(long H) { return (H + VL - 1) / VL * VL; }

/* How far apart the gates of a row of combined pre-activations lie: side by side where one statement serves all of them, so
   that they are one stretch of numbers; what is computed for a gate's filling then comes from the next gate. */
static inline int FN(one_stretch)(const Work *work) {
    const Line *ih = work->site + SITE_IH, *hh = work->site + SITE_HH;
    return ih->norm != NORM_NONE && hh->norm != NORM_NONE && ih->groups == 1 && hh->groups == 1;
}

static inline long FN(stride)(const Work *work) { return FN(one_stretch)(work) ? work->hidden : FN(padded)(work->hidden); }

/* Pre-activations of `gates` gates of one row: N_ih(x) + N_hh(u), in one pass where each gate has one statement; gates lie
   `stride` apart in `out`. `spare` holds twice all gates. */
static void FN(combined)(const Work *work, long t, long row, long gates, const REAL *restrict x, const REAL *restrict u, REAL *restrict out,
                         REAL *restrict spare) {
    const Line *ih = work->site + SITE_IH, *hh = work->site + SITE_HH;
    const long H = work->hidden, P = FN(padded)(H), all = work->cell == CELL_LSTM ? 4 : work->cell == CELL_GRU ? 3 : 1;
    const long lane_x = FN(lane)(ih, work, t, row), lane_u = FN(lane)(hh, work, t, row);
    const int simple = ih->norm != NORM_NONE && hh->norm != NORM_NONE && (ih->groups == 1 || ih->groups == all) &&
                       (hh->groups == 1 || hh->groups == all);
    if (!simple) {
        FN(normed)(ih, lane_x, x, spare, all * H);
        FN(normed)(hh, lane_u, u, spare + all * H, all * H);
        for (long g = 0; g < gates; g++)
#pragma omp simd
            for (long j = 0; j < H; j++) out[g * P + j] = spare[g * H + j] + spare[(all + g) * H + j];
        return;
    }
    const REAL *restrict gx = ih->gain, *restrict gu = hh->gain, *restrict sx = ih->shift, *restrict su = hh->shift;
    if (FN(one_stretch)(work)) {
        const FN(Affine) a = FN(affine)(ih, lane_x), b = FN(affine)(hh, lane_u);
#pragma omp simd
        for (long j = 0; j < gates * H; j++)
            out[j] = (((x[j] - a.high) - a.low) * a.scale * gx[j] + sx[j]) + (((u[j] - b.high) - b.low) * b.scale * gu[j] + su[j]);
        return;
    }
    for (long g = 0; g < gates; g++) {
        const FN(Affine) a = FN(affine)(ih, lane_x + (ih->groups == 1 ? 0 : g)), b = FN(affine)(hh, lane_u + (hh->groups == 1 ? 0 : g));
#pragma omp simd
        for (long j = g * H; j < (g + 1) * H; j++)
            out[g * (P - H) + j] = (((x[j] - a.high) - a.low) * a.scale * gx[j] + sx[j]) + (((u[j] - b.high) - b.low) * b.scale * gu[j] + su[j]);
    }
}

/* The two sides of a GRU's candidate, which its reset gate keeps apart: the last gate of each site. */
static void FN(candidate)(const Work *work, long t, long row, const REAL *x, const REAL *u, REAL *xn, REAL *un) {
    const long H = work->hidden;
    const REAL *sides[2] = {x + 2 * H, u + 2 * H};
    REAL *outs[2] = {xn, un};
    for (int side = 0; side < 2; side++) {
        const Line *site = work->site + (side ? SITE_HH : SITE_IH);
        const REAL *restrict a = sides[side];
        REAL *restrict out = outs[side];
        if (site->norm == NORM_NONE) {
            memcpy(out, a, (size_t)H * sizeof(REAL));
            continue;
        }
        const long width = site->features / site->groups, lane = FN(lane)(site, work, t, row);
        const REAL *restrict gain = (const REAL *)site->gain + 2 * H, *restrict shift = (const REAL *)site->shift + 2 * H;
        for (long j = 0; j < H;) { /* group by group */
            const long group = (2 * H + j) / width, end = (group + 1) * width - 2 * H < H ? (group + 1) * width - 2 * H : H;
            const FN(Affine) by = FN(affine)(site, lane + group);
            const long start = j;
#pragma omp simd
            for (long k = start; k < end; k++) out[k] = ((a[k] - by.high) - by.low) * by.scale * gain[k] + shift[k];
            j = end;
        }
    }
}

/* Own statements of a site's rows at step t, and the pooled ones. */
static void FN(state)(const Line *site, const Work *work, long t, long row, long rows, const REAL *x, long ldx) {
    if (site->norm == NORM_NONE) return;
    const long groups = site->groups, at = (site->prefix + t) * work->batch * groups + row * groups;
    for (long r = 0; r < rows; r++) FN(measure)(site, x + r * ldx, site->mean + at + r * groups, site->var + at + r * groups);
    for (long r = 0; r < rows; r += BLOCK_ROWS)
        FN(pool)(site, work->batch, t, (row + r) * groups, (rows - r < BLOCK_ROWS ? rows - r : BLOCK_ROWS) * groups);
}

/* A packed matrix and a padded bias. */
typedef struct { REAL *panels, *bias; } FN(Packed);

/* One step of one row, from its pre-activations: the new h, or for an LSTM the new c and, in the place of the output gate, one
   over it. Rows of work space throughout. */
static void FN(step_row)(int cell, long P, long S, REAL *restrict z, const REAL *restrict xn, const REAL *restrict un, const REAL *restrict old,
                         REAL *restrict out) {
    if (cell == CELL_LSTM)
#pragma omp simd
        for (long j = 0; j < P; j++) {
            const REAL i = (REAL)1 + FN(exp)(-z[j]), f = (REAL)1 + FN(exp)(-z[S + j]), g = FN(small_exp)(z[2 * S + j]);
            out[j] = old[j] / f + ((REAL)1 - g) / (i * ((REAL)1 + g));
            z[3 * S + j] = (REAL)1 + FN(exp)(-z[3 * S + j]);
        }
    else if (cell == CELL_GRU)
#pragma omp simd
        for (long j = 0; j < P; j++) {
            const REAL reset = FN(sigmoid)(z[j]), keep = FN(sigmoid)(z[S + j]), n = FN(tanh)(xn[j] + reset * un[j]);
            out[j] = ((REAL)1 - keep) * n + keep * old[j];
        }
    else if (cell == CELL_RNN_TANH)
#pragma omp simd
        for (long j = 0; j < P; j++) out[j] = FN(tanh)(z[j]);
    else
#pragma omp simd
        for (long j = 0; j < P; j++) out[j] = z[j] < 0 ? (REAL)0 : z[j];
}

/* Rows of length H into rows of padded length, or back. */
static void FN(spread)(long rows, long H, long from, long to, const REAL *x, REAL *out) {
    for (long r = 0; r < rows; r++) memcpy(out + r * to, x + r * from, (size_t)H * sizeof(REAL));
}

static inline int FN(alive)(const Work *work, long t, long row) { return work->call->lengths == NULL || t < work->call->lengths[row]; }

static void FN(forward_block)(const Work *work, FN(Packed) ih_weight, FN(Packed) hh_weight, long row, long rows, FN(Space) space) {
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, D = work->inputs, H = work->hidden, P = FN(padded)(H), S = FN(stride)(work);
    const int cell = work->cell;
    const long N = (cell == CELL_LSTM ? 4 : cell == CELL_GRU ? 3 : 1) * H;
    const size_t row_bytes = (size_t)H * sizeof(REAL);
    const Line *ih = work->site + SITE_IH, *hh = work->site + SITE_HH, *sc = work->site + SITE_C;
    REAL *restrict h = space.h, *restrict c = space.c;
    FN(spread)(rows, H, H, P, (const REAL *)call->h0 + row * H, h);
    if (cell == CELL_LSTM) FN(spread)(rows, H, H, P, (const REAL *)call->c0 + row * H, c);
    for (long t = 0; t < T; t++) {
        REAL *in = call->projected ? (REAL *)call->projected + (t * B + row) * N : space.projected;
        REAL *recurrent = call->recurrent ? (REAL *)call->recurrent + (t * B + row) * N : space.recurrent;
        REAL *out = (REAL *)call->output + (t * B + row) * H;
        FN(product)(rows, D, N, (const REAL *)call->xs + (t * B + row) * D, D, ih_weight.panels, ih_weight.bias, in);
        FN(product)(rows, H, N, h, P, hh_weight.panels, hh_weight.bias, recurrent);
        FN(state)(ih, work, t, row, rows, in, N);
        FN(state)(hh, work, t, row, rows, recurrent, N);
        for (long r = 0; r < rows; r++) {
            const REAL *x = in + r * N, *u = recurrent + r * N;
            REAL *z = space.gates + r * 4 * P, *next = space.hidden + r * P;
            FN(combined)(work, t, row + r, cell == CELL_GRU ? 2 : N / H, x, u, z, space.wide);
            if (cell == CELL_GRU) FN(candidate)(work, t, row + r, x, u, space.narrow, space.narrow + P);
            FN(step_row)(cell, P, S, z, space.narrow, space.narrow + P, (cell == CELL_LSTM ? c : h) + r * P, next);
            if (cell == CELL_LSTM) continue;
            if (FN(alive)(work, t, row + r)) {
                memcpy(h + r * P, next, row_bytes);
                memcpy(out + r * H, next, row_bytes);
            } else
                memset(out + r * H, 0, row_bytes);
        }
        if (cell != CELL_LSTM) continue;
        FN(state)(sc, work, t, row, rows, space.hidden, P);
        for (long r = 0; r < rows; r++) {
            const REAL *restrict gate = space.gates + r * 4 * P + 3 * S;
            REAL *restrict y = space.narrow, *restrict cr = c + r * P, *restrict hr = h + r * P;
            const int alive = FN(alive)(work, t, row + r);
            if (alive) memcpy(cr, space.hidden + r * P, row_bytes);
            if (call->cells) memcpy((REAL *)call->cells + (t * B + row + r) * H, cr, row_bytes);
            if (!alive) {
                memset(out + r * H, 0, row_bytes);
                continue;
            }
            FN(normed)(sc, FN(lane)(sc, work, t, row + r), cr, y, H);
#pragma omp simd
            for (long j = 0; j < P; j++) {
                const REAL e = FN(small_exp)(y[j]);
                hr[j] = ((REAL)1 - e) / (gate[j] * ((REAL)1 + e));
            }
            memcpy(out + r * H, hr, row_bytes);
        }
    }
    FN(spread)(rows, H, P, H, h, (REAL *)call->hn + row * H);
    if (cell == CELL_LSTM) FN(spread)(rows, H, P, H, c, (REAL *)call->cn + row * H);
}

/* Back through the affine part of one row of a site: dy becomes w = gain * dy, and the pooled statement's gradient is left in
   dmu and dv. Adds to the sums of gain and shift. */
static void FN(denormalize)(const Line *site, long lane, const REAL *restrict x, REAL *restrict dy, REAL *restrict dgain,
                            REAL *restrict dshift) {
    const long width = site->features / site->groups;
    const REAL *restrict gain = site->gain;
    for (long g = 0; g < site->groups; g++) {
        const FN(Affine) a = FN(affine)(site, lane + g);
        const double scale = site->scale[lane + g];
        double first[SUMS] = {0}, second[SUMS] = {0};
        const long start = g * width, end = start + width, whole = start + width / SUMS * SUMS;
#define EACH(i)                                                                         \
    const REAL normal = ((x[i] - a.high) - a.low) * a.scale, d = dy[i], w = d * gain[i]; \
    dgain[i] += d * normal;                                                             \
    dshift[i] += d;                                                                     \
    dy[i] = w;                                                                          \
    first[j] += (double)w;                                                              \
    second[j] += (double)w * (double)normal;
        for (long from = start; from < whole; from += SUMS)
#pragma omp simd
            for (long j = 0; j < SUMS; j++) { EACH(from + j) }
        for (long j = 0; whole + j < end; j++) { EACH(whole + j) }
#undef EACH
        site->dmu[lane + g] += site->norm == NORM_MOMENTS ? -scale * FN(total)(first) : 0.0;
        site->dv[lane + g] += -0.5 * scale * scale * FN(total)(second);
    }
}

/* ... and through its statements: dx = w / deviation + what the own statement's gradient says. */
static void FN(unmeasure)(const Line *site, long lane, long own, const REAL *restrict x, const REAL *restrict w, REAL *restrict dx) {
    const long width = site->features / site->groups;
    for (long g = 0; g < site->groups; g++) {
        const double mean = site->norm == NORM_MOMENTS ? site->mean[own + g] : 0.0;
        const REAL high = (REAL)mean, low = (REAL)(mean - (double)high);
        const REAL scale = (REAL)site->scale[lane + g];
        const REAL slope = (REAL)(2.0 * site->dvar[own + g] / (double)width);
        const REAL level = site->norm == NORM_MOMENTS ? (REAL)(site->dmean[own + g] / (double)width) : (REAL)0;
#pragma omp simd
        for (long i = g * width; i < (g + 1) * width; i++) dx[i] = w[i] * scale + (slope * ((x[i] - high) - low) + level);
    }
}

/* Back through one site of a block: dy [rows, F] in, dx [rows, F] out (they may be the same array). */
static void FN(site_block_backward)(const Line *site, const Work *work, long block, long t, long row, long rows, const REAL *x, long ldx, REAL *dy,
                              REAL *dx, long ldd, REAL *sums) {
    const long F = site->features, G = site->groups, lanes = work->batch * G;
    if (site->norm == NORM_NONE) {
        for (long r = 0; r < rows && dx != dy; r++) memcpy(dx + r * ldd, dy + r * ldd, (size_t)F * sizeof(REAL));
        return;
    }
    memset(sums, 0, (size_t)(2 * F) * sizeof(REAL));
    for (long r = 0; r < rows; r++) FN(denormalize)(site, t * lanes + (row + r) * G, x + r * ldx, dy + r * ldd, sums, sums + F);
    double *restrict dgain = site->dgain + block * F, *restrict dshift = site->dshift + block * F;
    for (long i = 0; i < F; i++) { dgain[i] += (double)sums[i]; dshift[i] += (double)sums[F + i]; }
    FN(unpool)(site, work->batch, work->steps, t, row * G, rows * G);
    for (long r = 0; r < rows; r++)
        FN(unmeasure)(site, t * lanes + (row + r) * G, (site->prefix + t) * lanes + (row + r) * G, x + r * ldx, dy + r * ldd, dx + r * ldd);
}

/* What the backward blocks of one chunk of steps share. */
typedef struct {
    FN(Packed) ih, hh;   /* W_ih as the forward pass has it (to project again), and W_hh the other way round */
    FN(Packed) back;     /* W_ih the other way round, where dxs is wanted */
    REAL *dinput, *drecurrent; /* [steps of the chunk, B, N] */
    long first, last;
} FN(Chunk);

/* Blocks first to last - 1, each with sums of its own, so that these do not depend on how blocks are grouped. */
static void FN(site_backward)(const Line *site, const Work *work, long first, long last, long t, const REAL *x, long ldx, REAL *dy, REAL *dx,
                              long ldd, REAL *sums) {
    const long start = atn_norms_block_start(work->batch, first);
    for (long b = first; b < last; b++) {
        const long row = atn_norms_block_start(work->batch, b), at = row - start, rows = atn_norms_block_start(work->batch, b + 1) - row;
        FN(site_block_backward)(site, work, b, t, row, rows, x + at * ldx, ldx, dy + at * ldd, dx + at * ldd, ldd, sums);
    }
}

/* Back through the gates of one row of a GRU or an RNN: what reaches the two products (d of the input's, e of the recurrent
   one's; apart in a GRU's candidate only), and in `back` what reaches the old h past them. Rows of work space throughout. */
static void FN(step_row_back)(int cell, long P, long S, const REAL *restrict z, const REAL *restrict xn, const REAL *restrict un,
                              const REAL *restrict old, const REAL *restrict g, REAL *restrict d, REAL *restrict e, REAL *restrict back) {
    if (cell == CELL_GRU)
#pragma omp simd
        for (long j = 0; j < P; j++) {
            const REAL reset = FN(sigmoid)(z[j]), keep = FN(sigmoid)(z[S + j]), n = FN(tanh)(xn[j] + reset * un[j]);
            const REAL dn = g[j] * ((REAL)1 - keep) * ((REAL)1 - n * n), dr = dn * un[j] * reset * ((REAL)1 - reset);
            const REAL dz = g[j] * (old[j] - n) * keep * ((REAL)1 - keep);
            d[j] = e[j] = dr;
            d[P + j] = e[P + j] = dz;
            d[2 * P + j] = dn;
            e[2 * P + j] = dn * reset;
            back[j] = g[j] * keep;
        }
    else if (cell == CELL_RNN_TANH)
#pragma omp simd
        for (long j = 0; j < P; j++) {
            const REAL y = FN(tanh)(z[j]);
            d[j] = e[j] = g[j] * ((REAL)1 - y * y);
        }
    else
#pragma omp simd
        for (long j = 0; j < P; j++) d[j] = e[j] = z[j] > 0 ? g[j] : (REAL)0;
}

static void FN(backward_block)(const Work *work, const FN(Chunk) *chunk, long first, long last, FN(Space) space) {
    const Call *call = work->call;
    const long row = atn_norms_block_start(work->batch, first), rows = atn_norms_block_start(work->batch, last) - row;
    const long B = work->batch, D = work->inputs, H = work->hidden, P = FN(padded)(H), S = FN(stride)(work);
    const int cell = work->cell;
    const long gates = cell == CELL_LSTM ? 4 : cell == CELL_GRU ? 3 : 1, N = gates * H;
    const size_t row_bytes = (size_t)H * sizeof(REAL);
    const Line *ih = work->site + SITE_IH, *hh = work->site + SITE_HH, *sc = work->site + SITE_C;
    REAL *restrict dh = space.h, *restrict dc = space.c; /* gradient of the state after the step at hand */
    FN(spread)(rows, H, H, P, (REAL *)call->dh + row * H, dh);
    if (cell == CELL_LSTM) FN(spread)(rows, H, H, P, (REAL *)call->dc + row * H, dc);
    for (long t = chunk->last - 1; t >= chunk->first; t--) {
        const REAL *in = call->projected ? (const REAL *)call->projected + (t * B + row) * N : space.projected;
        const REAL *recurrent = (const REAL *)call->recurrent + (t * B + row) * N, *dout = (const REAL *)call->doutput + (t * B + row) * H;
        const REAL *cells = cell == CELL_LSTM ? (const REAL *)call->cells + (t * B + row) * H : NULL;
        const REAL *before = cell == CELL_LSTM ? (t ? cells - B * H : (const REAL *)call->c0 + row * H)
                                               : (t ? (const REAL *)call->output + ((t - 1) * B + row) * H : (const REAL *)call->h0 + row * H);
        REAL *din = chunk->dinput + ((t - chunk->first) * B + row) * N, *drec = chunk->drecurrent + ((t - chunk->first) * B + row) * N;
        if (!call->projected)
            FN(product)(rows, D, N, (const REAL *)call->xs + (t * B + row) * D, D, chunk->ih.panels, chunk->ih.bias, space.projected);
        for (long r = 0; r < rows; r++) {
            REAL *restrict z = space.gates + r * 4 * P, *restrict back = space.hidden + r * P, *restrict y = space.narrow;
            REAL *restrict g = space.narrow + P;
            if (!FN(alive)(work, t, row + r)) { /* nothing came of this step: no gradient into it, and the state's goes by */
                memset(din + r * N, 0, (size_t)N * sizeof(REAL));
                memset(drec + r * N, 0, (size_t)N * sizeof(REAL));
                memset(back, 0, row_bytes);
                continue;
            }
            FN(combined)(work, t, row + r, cell == CELL_GRU ? 2 : gates, in + r * N, recurrent + r * N, z, space.wide);
            memcpy(g, dout + r * H, row_bytes);
            for (long j = 0; j < P; j++) g[j] += dh[r * P + j];
            if (cell == CELL_LSTM) { /* back: gradient of the normed cell state; z's last gate: of the output gate */
                FN(normed)(sc, FN(lane)(sc, work, t, row + r), cells + r * H, y, H);
#pragma omp simd
                for (long j = 0; j < P; j++) {
                    const REAL o = FN(sigmoid)(z[3 * S + j]), s = FN(tanh)(y[j]);
                    z[3 * S + j] = g[j] * s * o * ((REAL)1 - o);
                    back[j] = g[j] * o * ((REAL)1 - s * s);
                }
                continue;
            }
            REAL *old = space.narrow + 4 * P, *d = space.wide, *e = space.wide + 4 * P;
            if (cell == CELL_GRU) FN(candidate)(work, t, row + r, in + r * N, recurrent + r * N, y, space.narrow + 2 * P);
            memcpy(old, before + r * H, row_bytes);
            FN(step_row_back)(cell, P, S, z, y, space.narrow + 2 * P, old, g, d, e, back);
            FN(spread)(gates, H, P, H, d, din + r * N);
            FN(spread)(gates, H, P, H, e, drec + r * N);
        }
        if (cell == CELL_LSTM) {
            FN(site_backward)(sc, work, first, last, t, cells, H, space.hidden, space.hidden, P, space.column);
            for (long r = 0; r < rows; r++) {
                if (!FN(alive)(work, t, row + r)) continue;
                const REAL *restrict z = space.gates + r * 4 * P;
                REAL *restrict dz = space.wide, *restrict dcr = dc + r * P, *restrict old = space.narrow;
                const REAL *restrict back = space.hidden + r * P;
                memcpy(old, before + r * H, row_bytes);
#pragma omp simd
                for (long j = 0; j < P; j++) {
                    const REAL i = FN(sigmoid)(z[j]), f = FN(sigmoid)(z[S + j]), g = FN(tanh)(z[2 * S + j]), dcell = dcr[j] + back[j];
                    dz[j] = dcell * g * i * ((REAL)1 - i);
                    dz[P + j] = dcell * old[j] * f * ((REAL)1 - f);
                    dz[2 * P + j] = dcell * i * ((REAL)1 - g * g);
                    dcr[j] = dcell * f;
                }
                FN(spread)(3, H, P, H, dz, din + r * N);
                memcpy(din + r * N + 3 * H, z + 3 * S, row_bytes);
                memcpy(drec + r * N, din + r * N, (size_t)N * sizeof(REAL));
            }
        }
        FN(site_backward)(ih, work, first, last, t, in, N, din, din, N, space.column);
        FN(site_backward)(hh, work, first, last, t, recurrent, N, drec, drec, N, space.column);
        FN(product)(rows, N, H, drec, N, chunk->hh.panels, chunk->hh.bias, space.recurrent);
        if (call->dxs) FN(product)(rows, N, D, din, N, chunk->back.panels, chunk->back.bias, (REAL *)call->dxs + (t * B + row) * D);
        for (long r = 0; r < rows; r++) {
            if (!FN(alive)(work, t, row + r)) continue;
            memcpy(dh + r * P, space.recurrent + r * H, row_bytes);
            if (cell == CELL_GRU)
                for (long j = 0; j < P; j++) dh[r * P + j] += space.hidden[r * P + j];
        }
    }
    FN(spread)(rows, H, P, H, dh, (REAL *)call->dh + row * H);
    if (cell == CELL_LSTM) FN(spread)(rows, H, P, H, dc, (REAL *)call->dc + row * H);
    if (chunk->first > 0) return;
    for (int s = 0; s < SITES; s++)
        if (work->site[s].norm != NORM_NONE) FN(unpool_prefix)(work->site + s, B, work->steps, row * work->site[s].groups, rows * work->site[s].groups);
}

/* Steps of one chunk: enough rows for a good product of the weights' gradients, few enough to stay near. */
static long FN(chunk_steps)(const Work *work) {
    const long steps = (512 + work->batch - 1) / work->batch;
    return steps < work->steps ? steps : work->steps;
}

static size_t FN(packed_size)(long K, long M) { return (size_t)(FN(panels)(M) * PANEL * (K + 1)); }

/* Room for a packed [K, M] matrix with its bias, filled from `from` (element (k, m) at k * row + m * column). */
static FN(Packed) FN(take)(REAL **room, const void *from, const void *bias, long K, long M, long row, long column) {
    const long width = FN(panels)(M) * PANEL;
    FN(Packed) packed = {*room, *room + width * K};
    *room += width * (K + 1);
    FN(pack)(packed.panels, from, K, M, row, column);
    memset(packed.bias, 0, (size_t)width * sizeof(REAL));
    if (bias) memcpy(packed.bias, bias, (size_t)M * sizeof(REAL));
    return packed;
}

static FN(Space) FN(space)(REAL *at, long rows, long H, long N) {
    const long P = FN(padded)(H);
    FN(Space) space;
    space.h = at; at += rows * P;
    space.c = at; at += rows * P;
    space.hidden = at; at += rows * P;
    space.gates = at; at += rows * 4 * P;
    space.recurrent = at; at += rows * N;
    space.projected = at; at += rows * N;
    space.wide = at; at += 8 * P;
    space.column = at; at += 2 * N;
    space.narrow = at;
    return space;
}

static size_t FN(space_size)(long rows, long H, long N) { return (size_t)((rows * 7 + 13) * FN(padded)(H) + (rows * 2 + 2) * N + 64); }

/* How many blocks go through time together: one, unless the recurrent weights are too large to stay near a processor, so that
   every step brings them in again and is better shared by more rows. */
static long FN(together)(const Work *work, long N, long blocks) {
    const long threads = work->threads < blocks ? work->threads : blocks, each = (blocks + threads - 1) / threads;
    if ((size_t)(N * work->hidden) * sizeof(REAL) < NEAR_BYTES) return 1;
    return each < MOST_TOGETHER ? each : MOST_TOGETHER;
}

static int FN(forward)(const Work *work, long N) {
    const long D = work->inputs, H = work->hidden, blocks = atn_norms_blocks(work->batch);
    const long group = FN(together)(work, N, blocks), items = (blocks + group - 1) / group;
    const long threads = work->threads < items ? work->threads : items;
    const size_t each = FN(space_size)(group * BLOCK_ROWS, H, N);
    REAL *room = atn_norms_memory((FN(packed_size)(D, N) + FN(packed_size)(H, N) + each * (size_t)threads) * sizeof(REAL)), *at = room;
    if (!room) return 1;
    const FN(Packed) ih = FN(take)(&at, work->call->weight_ih, work->call->bias_ih, D, N, 1, D);
    const FN(Packed) hh = FN(take)(&at, work->call->weight_hh, work->call->bias_hh, H, N, 1, H);
    memset(at, 0, each * (size_t)threads * sizeof(REAL)); /* the filling of padded rows */
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (long i = 0; i < items; i++) {
        const long last = (i + 1) * group < blocks ? (i + 1) * group : blocks;
        const long row = atn_norms_block_start(work->batch, i * group), rows = atn_norms_block_start(work->batch, last) - row;
        FN(forward_block)(work, ih, hh, row, rows, FN(space)(at + each * (size_t)atn_norms_thread(), group * BLOCK_ROWS, H, N));
    }
    free(room);
    return 0;
}

/* Columns from to to of the N of A [K, N]: sums over K onto `total` (where it is given), and products with the few columns of
   xs [K, D] onto dweight [N, D]; one vector of columns at a time, its sums in registers. */
static void FN(thin)(long from, long to, long N, long K, long D, const REAL *A, const REAL *xs, REAL *dweight, REAL *total) {
    for (long n = from; n < to; n += VL) {
        const long columns = to - n < VL ? to - n : VL;
        REAL sums[THIN + 1][64] = {{0}};
        for (long k = 0; k < K; k++) {
            REAL row[64] = {0};
            const REAL *a = A + k * N + n;
            if (columns < VL) {
                memcpy(row, a, (size_t)columns * sizeof(REAL));
                a = row;
            }
            const FN(vec) left = *(const FN(vec) *)a;
            *(FN(vec) *)sums[THIN] += left;
            for (long d = 0; d < D; d++) *(FN(vec) *)sums[d] += left * xs[k * D + d];
        }
        for (long j = 0; j < columns; j++) {
            if (total) total[n + j] += sums[THIN][j];
            for (long d = 0; d < D; d++) dweight[(n + j) * D + d] += sums[d][j];
        }
    }
}

/* dW += dA^T times what the weights were multiplied with, and db += column sums, for rows from to to of the gates. */
static void FN(weight_gradients)(const Work *work, const FN(Chunk) *chunk, const REAL *xs, const REAL *hs, long N, long from, long to) {
    const Call *call = work->call;
    const long K = (chunk->last - chunk->first) * work->batch, D = work->inputs, few = D <= THIN;
    const REAL *inputs = (const REAL *)call->xs + chunk->first * work->batch * D;
    FN(thin)(from, to, N, K, few ? D : 0, chunk->dinput, inputs, call->dweight_ih, call->dbias_ih);
    if (!few) FN(accumulate)(from, to, N, K, D, chunk->dinput, xs, call->dweight_ih);
    if (call->dbias_hh) FN(thin)(from, to, N, K, 0, chunk->drecurrent, NULL, NULL, call->dbias_hh);
    FN(accumulate)(from, to, N, K, work->hidden, chunk->drecurrent, hs, call->dweight_hh);
}

static int FN(backward)(const Work *work, long N) {
    const long B = work->batch, D = work->inputs, H = work->hidden, blocks = atn_norms_blocks(B), steps = FN(chunk_steps)(work);
    const long threads = work->threads, rows_wide = D <= THIN ? 0 : FN(panels)(D) * PANEL, rows_deep = FN(panels)(H) * PANEL;
    const long group = FN(together)(work, N, blocks), items = (blocks + group - 1) / group;
    const size_t each = FN(space_size)(group * BLOCK_ROWS, H, N), many = (size_t)(steps * B);
    const size_t weights = (work->call->projected ? 0 : FN(packed_size)(D, N)) + FN(packed_size)(N, H) + (work->call->dxs ? FN(packed_size)(N, D) : 0);
    const size_t all = weights + each * (size_t)threads + many * (size_t)(2 * N + rows_wide + rows_deep);
    REAL *room = atn_norms_memory(all * sizeof(REAL)), *at = room;
    if (!room) return 1;
    FN(Chunk) chunk;
    if (!work->call->projected) chunk.ih = FN(take)(&at, work->call->weight_ih, work->call->bias_ih, D, N, 1, D);
    chunk.hh = FN(take)(&at, work->call->weight_hh, NULL, N, H, H, 1);
    if (work->call->dxs) chunk.back = FN(take)(&at, work->call->weight_ih, NULL, N, D, D, 1);
    chunk.dinput = at; at += many * (size_t)N;
    chunk.drecurrent = at; at += many * (size_t)N;
    REAL *xs = at; at += many * (size_t)rows_wide;
    REAL *hs = at; at += many * (size_t)rows_deep;
    memset(at, 0, each * (size_t)threads * sizeof(REAL)); /* the filling of padded rows */
    for (chunk.last = work->steps; chunk.last > 0; chunk.last = chunk.first) {
        chunk.first = chunk.last > steps ? chunk.last - steps : 0;
        const long K = (chunk.last - chunk.first) * B;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < items; i++)
                FN(backward_block)(work, &chunk, i * group, (i + 1) * group < blocks ? (i + 1) * group : blocks,
                                   FN(space)(at + each * (size_t)atn_norms_thread(), group * BLOCK_ROWS, H, N));
#pragma omp for schedule(dynamic, 1)
            for (long p = 0; p < rows_wide + rows_deep; p += PANEL) { /* pack what the weights were multiplied with */
                if (p < rows_wide) {
                    FN(pack_panel)(xs + p * K, (const REAL *)work->call->xs + chunk.first * B * D, K, D, p, D);
                    continue;
                }
                const long q = p - rows_wide, started = chunk.first == 0 ? B : 0;
                if (started) FN(pack_panel)(hs + q * K, work->call->h0, B, H, q, H);
                FN(pack_panel)(hs + q * K + started * PANEL, (const REAL *)work->call->output + (chunk.first - 1 + (started ? 1 : 0)) * B * H,
                               K - started, H, q, H);
            }
#pragma omp for schedule(dynamic, 1)
            for (long n = 0; n < N; n += 64)
                FN(weight_gradients)(work, &chunk, xs, hs, N, n, n + 64 < N ? n + 64 : N);
        }
    }
    free(room);
    return 0;
}

static int FN(run)(const Work *work, int backward) {
    const long N = (work->cell == CELL_LSTM ? 4 : work->cell == CELL_GRU ? 3 : 1) * work->hidden;
    return backward ? FN(backward)(work, N) : FN(forward)(work, N);
}

#undef VL
#undef PANEL
