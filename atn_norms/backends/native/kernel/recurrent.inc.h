/* A whole sequence of one recurrent layer and direction, forward and backward, for one REAL and one instruction set.

   Without batch statistics, rows are independent, and a block of rows passes through all time steps alone: product, statistics,
   windows and gates stay in the cache, and steps need no barrier. The blocks are divided into parts with separate sums for the
   gradients of the weights, which are added at the end. If the weights are too large for a near cache, threads pass through
   time as a team. Each thread computes some columns of the products of all rows, then the remaining work of some blocks of rows,
   with a barrier after each phase. Blocks and parts do not depend on the number of threads and each number is computed in one
   way, so results do not depend on it either.

   If some sites have batch statistics and others do not, or a layer with batch statistics has a projection, all rows pass
   through time together. Threads then also share the features of the sites with batch statistics. A layer with batch statistics
   alone has blocks of hidden units instead (coupled.inc.h), which need fewer barriers. */

#include "real.inc.h"

#include "pooling.inc.h"

#include "gates.inc.h"

#include "sites.inc.h"

#include "columns.inc.h"

#include "rows.inc.h"

/* Number of steps of `rows` rows in a chunk: enough rows for an efficient product in the gradients of the weights, and few enough for
   the cache. */
static long FN(chunk_steps)(const Work *work, long rows) {
    const long steps = (512 + rows - 1) / rows;
    return steps < work->steps ? steps : work->steps;
}

/* Return a distance for rows of n numbers that is an odd number of cache lines, so that equal columns of many rows do not share the
   sets of a cache. */
INLINE long FN(spread)(long n) {
    const long line = 64 / (long)sizeof(REAL);
    return ((n + line - 1) / line | 1) * line;
}

/* Round n up to a whole number of cache lines. */
INLINE size_t FN(whole_lines)(long n) { return ((size_t)n * sizeof(REAL) + 63) / 64 * 64 / sizeof(REAL); }

static size_t FN(packed_size)(long K, long M) { return (size_t)(FN(panels)(M) * PANEL * (K + 1)); }

/* Take room for a packed [K, M] matrix with its bias, and fill it; `turned`: the transposed matrix is given. */
static FN(Packed) FN(take)(REAL **room, const REAL *from, const void *bias, long K, long M, const int turned) {
    const long width = FN(panels)(M) * PANEL;
    FN(Packed) packed = {*room, *room + width * K, NULL};
    *room += width * (K + 1);
    for (long p = 0; p < M; p += PANEL) {
        const REAL *column[PANEL];
        for (long m = 0; m < PANEL && turned; m++) column[m] = p + m < M ? from + (p + m) * K : NULL;
        if (turned) FN(pack_columns)(packed.panels + p * K, column, K);
        else FN(pack_panel)(packed.panels + p * K, from, K, M, p, M);
    }
    memset(packed.bias, 0, (size_t)width * sizeof(REAL));
    if (bias) memcpy(packed.bias, bias, (size_t)M * sizeof(REAL));
    return packed;
}

/* Return true if threads pass through time as a team. */
INLINE int FN(teamed)(const Work *work) { return work->threads > 1 && (work->mixed || (FN(far)(work) && work->batch > 1)); }

/* Return the number of blocks that pass through time together: one, or more if every step loads all weights again, since more
   rows then share the load, or all if a site has batch statistics. */
static long FN(together)(const Work *work, long blocks) {
    if (work->mixed) return blocks;
    if (!FN(far)(work)) return 1;
    return blocks < MOST_TOGETHER ? blocks : MOST_TOGETHER;
}

/* Return the work space of a thread. A team shares the work space of its first thread, except the arrays of single rows. */
INLINE FN(Space) FN(own_space)(const Work *work, FN(Features) features, REAL *at, size_t each, long blocks, long H, long N) {
    FN(Space) mine = FN(space)(work, at + each * (size_t)atn_norms_thread(), blocks, H, N);
    mine.features = features;
    if (features.rows) mine.features.rows += atn_norms_thread() * work->batch;
    if (!FN(teamed)(work)) return mine;
    FN(Space) own = FN(space_at)(work, at, blocks, H, N);
    for (int s = 0; s < SITES; s++) own.spare[s] = mine.spare[s];
    own.plain = mine.plain;
    own.room = mine.room;
    own.features = mine.features;
    return own;
}

static int FN(forward)(const Work *work, long N) {
    const Call *call = work->call;
    const long D = work->inputs, H = work->hidden, R = work->output, blocks = atn_norms_blocks(work->batch);
    const long group = FN(together)(work, blocks), items = (blocks + group - 1) / group;
    const int teamed = FN(teamed)(work);
    const long threads = teamed || work->threads < items ? work->threads : items;
    const int plain = work->steps * work->batch <= UNPACKED;
    const size_t each = FN(space_size)(work, group, H, N), packed = plain ? 0 : FN(packed_size)(D, N) + FN(packed_size)(R, N) + (call->projection ? FN(packed_size)(H, R) : 0);
    FN(Features) features;
    if (FN(take_features)(work, &features)) return 1;
    REAL *room = atn_norms_memory((packed + each * (size_t)threads) * sizeof(REAL)), *at = room;
    if (!room) { free(features.columns); return 1; }
    FN(Weights) weights = {{NULL, (REAL *)call->bias_ih, call->weight_ih}, {NULL, (REAL *)call->bias_hh, call->weight_hh}, {NULL, NULL, call->weight_hr}};
    if (!plain) {
        weights.ih = FN(take)(&at, call->weight_ih, call->bias_ih, D, N, 1);
        weights.hh = FN(take)(&at, call->weight_hh, call->bias_hh, R, N, 1);
        if (call->projection) weights.hr = FN(take)(&at, call->weight_hr, NULL, H, R, 1);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const FN(Space) space = FN(own_space)(work, features, at, each, group, H, N);
        if (teamed) {
            const FN(Member) me = {atn_norms_thread(), atn_norms_team()};
            for (long i = 0; i < items; i++)
                FN(forward_block)(work, &weights, i * group, (i + 1) * group < blocks ? (i + 1) * group : blocks, space, me);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < items; i++)
                FN(forward_block)(work, &weights, i * group, (i + 1) * group < blocks ? (i + 1) * group : blocks, space, (FN(Member)){0, 1});
        }
    }
    if (work->mixed) FN(end_moments)(work);
    free(features.columns);
    free(room);
    return 0;
}

/* Sums for the gradients of weights and biases; a bias may be NULL. */
typedef struct { REAL *weight_ih, *weight_hh, *weight_hr, *bias_ih, *bias_hh; } FN(WeightGrads);

/* Pack a panel of an array [T, B, M], from column p on, for `rows` rows from `from` on of `steps` steps. */
static void FN(pack_steps)(REAL *to, const REAL *from, long steps, long batch, long rows, long M, long p) {
    for (long t = 0; t < steps; t++) FN(pack_panel)(to + t * rows * PANEL, from + t * batch * M, rows, M, p, M);
}

/* Pack the factors of the gradients of weights for the steps of a chunk; the members of a team share the panels. */
static void FN(pack_factors)(const Work *work, const FN(Chunk) *chunk, const FN(Group) *group, FN(Member) me) {
    const Call *call = work->call;
    const long B = work->batch, D = work->inputs, H = work->hidden, R = work->output, rows = group->rows, row = group->row;
    const long steps = chunk->last - chunk->first, K = steps * rows, started = chunk->first == 0;
    const REAL *xs = (const REAL *)call->xs + (chunk->first * B + row) * D, *output = (const REAL *)call->output + row * R;
    if (D <= THIN && me.id == 0)
        for (long t = 0; t < steps; t++) memcpy(chunk->xs + t * rows * D, xs + t * B * D, (size_t)(rows * D) * sizeof(REAL));
    for (long p = me.id * PANEL; p < D && D > THIN; p += me.team * PANEL) FN(pack_steps)(chunk->xs + p * K, xs, steps, B, rows, D, p);
    for (long p = me.id * PANEL; p < R; p += me.team * PANEL) {
        REAL *hs = chunk->hs + p * K;
        if (started) FN(pack_steps)(hs, (const REAL *)call->h0 + row * R, 1, B, rows, R, p);
        FN(pack_steps)(hs + started * rows * PANEL, output + (chunk->first - 1 + started) * B * R, steps - started, B, rows, R, p);
    }
    for (long p = me.id * PANEL; p < H && call->projection; p += me.team * PANEL)
        FN(pack_steps)(chunk->units + p * K, (const REAL *)call->units + (chunk->first * B + row) * H, steps, B, rows, H, p);
}

/* dW += dA^T times the factors of the weights, and db += column sums; the members of a team share the rows of dW. */
static void FN(weight_gradients)(const Work *work, const FN(Chunk) *chunk, long K, long N, FN(WeightGrads) to, FN(Member) me) {
    const long D = work->inputs, H = work->hidden, few = D <= THIN, apart = chunk->apart, out = work->call->projection, at_once = 64;
    for (long from = me.id * at_once; from < N; from += me.team * at_once) {
        const long end = from + at_once < N ? from + at_once : N;
        FN(thin)(from, end, apart, K, few ? D : 0, chunk->dinput, chunk->xs, to.weight_ih, to.bias_ih);
        if (!few) FN(accumulate)(from, end, apart, K, D, chunk->dinput, chunk->xs, to.weight_ih);
        if (to.bias_hh) FN(thin)(from, end, apart, K, 0, chunk->drecurrent, NULL, NULL, to.bias_hh);
        FN(accumulate)(from, end, apart, K, work->output, chunk->drecurrent, chunk->hs, to.weight_hh);
    }
    for (long from = me.id * at_once; from < out; from += me.team * at_once)
        FN(accumulate)(from, from + at_once < out ? from + at_once : out, out, K, H, chunk->dprojected, chunk->units, to.weight_hr);
}

/* The whole backward pass of a group of blocks. `alone`: only the first member of the team passes through time, and all share the
   gradients of the weights. */
static void FN(backward_group)(const Work *work, FN(Chunk) chunk, long steps, long first, long last, long N, FN(Space) space, FN(WeightGrads) to,
                               FN(Member) me, int alone) {
    const FN(Group) group = FN(gather)(work, first, last);
    for (chunk.last = work->steps; chunk.last > 0; chunk.last = chunk.first) {
        chunk.first = chunk.last > steps ? chunk.last - steps : 0;
        if (!alone) FN(backward_block)(work, &chunk, first, last, space, me);
        else if (me.id == 0) FN(backward_block)(work, &chunk, first, last, space, (FN(Member)){0, 1});
        if (alone) FN(wait)(me);
        FN(pack_factors)(work, &chunk, &group, me);
        FN(wait)(me);
        FN(weight_gradients)(work, &chunk, (chunk.last - chunk.first) * group.rows, N, to, me);
        FN(wait)(me);
    }
}

/* Return the number of parts of the rows with separate sums: one, or several where the weights are small and the rows many. */
static long FN(parts)(const Work *work, long items) {
    const long least = work->steps * work->batch / ROWS_SUMMED, most = items < MOST_SUMS ? items : MOST_SUMS;
    if (work->mixed || FN(far)(work) || least < 1) return 1;
    return least < most ? least : most;
}

/* The number of elements of all weights and biases. */
static size_t FN(sums_size)(const Work *work, long N) {
    return (size_t)(N * (work->inputs + work->output + 2) + work->call->projection * work->hidden);
}

static FN(WeightGrads) FN(sums_at)(const Work *work, REAL *at, long N) {
    const Call *call = work->call;
    REAL *weight_hh = at + N * work->inputs, *bias = weight_hh + N * work->output, *weight_hr = bias + 2 * N;
    return (FN(WeightGrads)){at, weight_hh, weight_hr, call->dbias_ih ? bias : NULL, call->dbias_hh ? bias + N : NULL};
}

/* Add n numbers. */
INLINE void FN(add)(REAL *restrict to, const REAL *restrict from, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) to[i] += from[i];
}

/* Add the sums of one part of the rows; the threads share the rows of each matrix, in the same way for every part. */
static void FN(add_sums)(const Work *work, FN(WeightGrads) to, FN(WeightGrads) from, long N) {
    const long D = work->inputs, R = work->output, H = work->hidden, out = work->call->projection;
#pragma omp for schedule(static) nowait
    for (long n = 0; n < N; n++) {
        FN(add)(to.weight_ih + n * D, from.weight_ih + n * D, D);
        FN(add)(to.weight_hh + n * R, from.weight_hh + n * R, R);
        if (to.bias_ih) to.bias_ih[n] += from.bias_ih[n];
        if (to.bias_hh) to.bias_hh[n] += from.bias_hh[n];
    }
#pragma omp for schedule(static) nowait
    for (long n = 0; n < out; n++) FN(add)(to.weight_hr + n * H, from.weight_hr + n * H, H);
}

/* most: rows of the largest group; many: rows of a chunk; members: threads at work; chunks: work spaces for a chunk, of `own` numbers
   each; wide and deep: columns of its packed inputs and outputs; further: the sums of all parts but the first. */
static int FN(backward)(const Work *work, long N) {
    const Call *call = work->call;
    const long B = work->batch, D = work->inputs, H = work->hidden, R = work->output, blocks = atn_norms_blocks(B);
    const long group = FN(together)(work, blocks), items = (blocks + group - 1) / group, most = group * ((B + blocks - 1) / blocks);
    const long steps = FN(chunk_steps)(work, most), threads = work->threads, out = call->projection;
    const int teamed = FN(teamed)(work);
    const long parts = FN(parts)(work, items);
    const int alone = !teamed && parts == 1 && threads > 1; /* one thread passes through time; all share the gradients of the weights */
    const long members = teamed || alone ? threads : threads < parts ? threads : parts, chunks = teamed || alone ? 1 : members;
    const long apart = work->mixed ? N : FN(spread)(N); /* features_back uses one distance for the rows of x and dx */
    const size_t many = (size_t)(steps * most), sums = FN(sums_size)(work, N), each = FN(space_size)(work, group, H, N);
    const size_t wide = D <= THIN ? (size_t)D : (size_t)(FN(panels)(D) * PANEL), deep = (size_t)(FN(panels)(R) * PANEL);
    const size_t own = FN(whole_lines)((long)(many * ((size_t)((call->joint ? 1 : 2) * apart + out) + wide + deep + (out ? (size_t)(FN(panels)(H) * PANEL) : 0))));
    const size_t weights = (call->projected ? 0 : FN(packed_size)(D, N)) + FN(packed_size)(N, R) + (call->dxs ? FN(packed_size)(N, D) : 0) + (out ? FN(packed_size)(R, H) : 0);
    FN(Features) features;
    if (FN(take_features)(work, &features)) return 1;
    REAL *room = atn_norms_memory((weights + each * (size_t)members + own * (size_t)chunks + sums * (size_t)(parts - 1)) * sizeof(REAL)), *at = room;
    if (!room) { free(features.columns); return 1; }
    FN(Chunk) shared = {.apart = apart};
    if (!call->projected) shared.ih = FN(take)(&at, call->weight_ih, call->bias_ih, D, N, 1);
    shared.hh = FN(take)(&at, call->weight_hh, NULL, N, R, 0);
    if (call->dxs) shared.back = FN(take)(&at, call->weight_ih, NULL, N, D, 0);
    if (out) shared.hr = FN(take)(&at, call->weight_hr, NULL, R, H, 0);
    REAL *arrays = at, *spaces = arrays + own * (size_t)chunks, *further = spaces + each * (size_t)members;
    const FN(WeightGrads) total = {call->dweight_ih, call->dweight_hh, call->dweight_hr, call->dbias_ih, call->dbias_hh};
#pragma omp parallel num_threads(members) if (members > 1)
    {
        const FN(Space) space = FN(own_space)(work, features, spaces, each, group, H, N);
        const FN(Member) me = chunks == 1 ? (FN(Member)){atn_norms_thread(), atn_norms_team()} : (FN(Member)){0, 1};
        FN(Chunk) chunk = shared;
        REAL *here = arrays + (chunks == 1 ? 0 : own * (size_t)atn_norms_thread());
        chunk.dinput = here; here += many * (size_t)apart;
        chunk.drecurrent = call->joint ? chunk.dinput : here; here += call->joint ? 0 : many * (size_t)apart;
        chunk.xs = here; here += many * wide;
        chunk.hs = here; here += many * deep;
        chunk.dprojected = here; here += many * (size_t)out;
        chunk.units = here;
        if (teamed || alone) {
            for (long i = 0; i < items; i++)
                FN(backward_group)(work, chunk, steps, i * group, (i + 1) * group < blocks ? (i + 1) * group : blocks, N, space, total, me, alone);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (long part = 0; part < parts; part++) {
                REAL *numbers = part ? further + sums * (size_t)(part - 1) : NULL;
                if (part) memset(numbers, 0, sums * sizeof(REAL));
                const FN(WeightGrads) to = part ? FN(sums_at)(work, numbers, N) : total;
                for (long i = items * part / parts; i < items * (part + 1) / parts; i++)
                    FN(backward_group)(work, chunk, steps, i * group, (i + 1) * group < blocks ? (i + 1) * group : blocks, N, space, to, me, 0);
            }
            for (long part = 1; part < parts; part++) FN(add_sums)(work, total, FN(sums_at)(work, further + sums * (size_t)(part - 1), N), N);
        }
    }
    free(features.columns);
    free(room);
    return 0;
}

#include "coupled.inc.h"

static int FN(run)(const Work *work, int backward) {
    if (work->coupled) return backward ? FN(coupled_backward)(work) : FN(coupled_forward)(work);
    const long N = FN(gates)(work) * work->hidden;
    return backward ? FN(backward)(work, N) : FN(forward)(work, N);
}

#undef LANES
#undef MERGE
#undef EVERY_UNIT
#undef EVERY_COLUMN
