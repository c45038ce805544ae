/* A whole sequence of one recurrent layer and direction, forward and backward, for one REAL and one instruction set.

   Without batch statistics, rows are independent, and a block of rows passes through all time steps alone: product, statistics,
   windows and gates stay in the cache, and steps need no barrier. If the recurrent weights are too large for a near cache,
   threads pass through time as a team. Each thread computes some columns of the products of all rows, then the remaining work
   of some blocks of rows, with a barrier after each phase. Blocks have a fixed size and each number is computed in one way, so
   results do not depend on the number of threads.

   If some sites have batch statistics and others do not, or the layer has a projection, all rows pass through time together.
   Threads then also share the features of the sites with batch statistics. A layer with batch statistics alone has blocks of
   hidden units instead (coupled.inc.h), which need fewer barriers. */

#include "real.inc.h"

#include "pooling.inc.h"

#include "gates.inc.h"

#include "sites.inc.h"

#include "columns.inc.h"

#include "rows.inc.h"

/* Number of steps in a chunk: enough rows for an efficient product in the gradients of the weights, and few enough for the
   cache. */
static long FN(chunk_steps)(const Work *work) {
    const long steps = (512 + work->batch - 1) / work->batch;
    return steps < work->steps ? steps : work->steps;
}

/* Return a distance for rows of n numbers that is an odd number of cache lines, so that equal columns of many rows do not share the
   sets of a cache. */
INLINE long FN(spread)(long n) {
    const long line = 64 / (long)sizeof(REAL);
    return ((n + line - 1) / line | 1) * line;
}

static size_t FN(packed_size)(long K, long M) { return (size_t)(FN(panels)(M) * PANEL * (K + 1)); }

/* Take room for a packed [K, M] matrix with its bias, and fill it; element (k, m) is from[k * row + m * column]. */
static FN(Packed) FN(take)(REAL **room, const void *from, const void *bias, long K, long M, long row, long column) {
    const long width = FN(panels)(M) * PANEL;
    FN(Packed) packed = {*room, *room + width * K, NULL};
    *room += width * (K + 1);
    FN(pack)(packed.panels, from, K, M, row, column);
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
        weights.ih = FN(take)(&at, call->weight_ih, call->bias_ih, D, N, 1, D);
        weights.hh = FN(take)(&at, call->weight_hh, call->bias_hh, R, N, 1, R);
        if (call->projection) weights.hr = FN(take)(&at, call->weight_hr, NULL, H, R, 1, H);
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

/* dW += dA^T times the factors of the weights, and db += column sums, for rows `from` to `to` of the gates. */
static void FN(weight_gradients)(const Work *work, const FN(Chunk) *chunk, const REAL *xs, const REAL *hs, long from, long to) {
    const Call *call = work->call;
    const long K = (chunk->last - chunk->first) * work->batch, D = work->inputs, few = D <= THIN, apart = chunk->apart;
    const REAL *inputs = (const REAL *)call->xs + chunk->first * work->batch * D;
    FN(thin)(from, to, apart, K, few ? D : 0, chunk->dinput, inputs, call->dweight_ih, call->dbias_ih);
    if (!few) FN(accumulate)(from, to, apart, K, D, chunk->dinput, xs, call->dweight_ih);
    if (call->dbias_hh) FN(thin)(from, to, apart, K, 0, chunk->drecurrent, NULL, NULL, call->dbias_hh);
    FN(accumulate)(from, to, apart, K, work->output, chunk->drecurrent, hs, call->dweight_hh);
}

static int FN(backward)(const Work *work, long N) {
    const Call *call = work->call;
    const long B = work->batch, D = work->inputs, H = work->hidden, R = work->output, blocks = atn_norms_blocks(B), steps = FN(chunk_steps)(work);
    const long threads = work->threads, rows_wide = D <= THIN ? 0 : FN(panels)(D) * PANEL, rows_deep = FN(panels)(R) * PANEL;
    const long rows_out = call->projection ? FN(panels)(H) * PANEL : 0, out = call->projection;
    const long group = FN(together)(work, blocks), items = (blocks + group - 1) / group;
    const int teamed = FN(teamed)(work);
    const long apart = work->mixed ? N : FN(spread)(N);
    const size_t each = FN(space_size)(work, group, H, N), many = (size_t)(steps * B);
    const size_t weights = (call->projected ? 0 : FN(packed_size)(D, N)) + FN(packed_size)(N, R) + (call->dxs ? FN(packed_size)(N, D) : 0) + (out ? FN(packed_size)(R, H) : 0);
    const size_t all = weights + each * (size_t)threads + many * (size_t)((call->joint ? 1 : 2) * apart + rows_wide + rows_deep + rows_out + out);
    FN(Features) features;
    if (FN(take_features)(work, &features)) return 1;
    REAL *room = atn_norms_memory(all * sizeof(REAL)), *at = room;
    if (!room) { free(features.columns); return 1; }
    FN(Chunk) chunk;
    if (!call->projected) chunk.ih = FN(take)(&at, call->weight_ih, call->bias_ih, D, N, 1, D);
    chunk.hh = FN(take)(&at, call->weight_hh, NULL, N, R, R, 1);
    if (call->dxs) chunk.back = FN(take)(&at, call->weight_ih, NULL, N, D, D, 1);
    if (out) chunk.hr = FN(take)(&at, call->weight_hr, NULL, R, H, H, 1);
    chunk.apart = apart;
    chunk.dinput = at; at += many * (size_t)apart;
    chunk.drecurrent = call->joint ? chunk.dinput : at; at += call->joint ? 0 : many * (size_t)apart;
    REAL *xs = at; at += many * (size_t)rows_wide;
    REAL *hs = at; at += many * (size_t)rows_deep;
    REAL *units = at; at += many * (size_t)rows_out;
    chunk.dprojected = at; at += many * (size_t)out;
    for (chunk.last = work->steps; chunk.last > 0; chunk.last = chunk.first) {
        chunk.first = chunk.last > steps ? chunk.last - steps : 0;
        const long K = (chunk.last - chunk.first) * B;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const FN(Space) space = FN(own_space)(work, features, at, each, group, H, N);
            if (teamed) {
                const FN(Member) me = {atn_norms_thread(), atn_norms_team()};
                for (long i = 0; i < items; i++)
                    FN(backward_block)(work, &chunk, i * group, (i + 1) * group < blocks ? (i + 1) * group : blocks, space, me);
                atn_norms_wait();
            } else {
#pragma omp for schedule(dynamic, 1)
                for (long i = 0; i < items; i++)
                    FN(backward_block)(work, &chunk, i * group, (i + 1) * group < blocks ? (i + 1) * group : blocks, space, (FN(Member)){0, 1});
            }
#pragma omp for schedule(dynamic, 1)
            for (long p = 0; p < rows_wide + rows_deep + rows_out; p += PANEL) { /* pack the factors of the weights */
                if (p < rows_wide) {
                    FN(pack_panel)(xs + p * K, (const REAL *)call->xs + chunk.first * B * D, K, D, p, D);
                    continue;
                }
                if (p >= rows_wide + rows_deep) {
                    const long q = p - rows_wide - rows_deep;
                    FN(pack_panel)(units + q * K, (const REAL *)call->units + chunk.first * B * H, K, H, q, H);
                    continue;
                }
                const long q = p - rows_wide, started = chunk.first == 0 ? B : 0;
                if (started) FN(pack_panel)(hs + q * K, call->h0, B, R, q, R);
                FN(pack_panel)(hs + q * K + started * PANEL, (const REAL *)call->output + (chunk.first - 1 + (started ? 1 : 0)) * B * R,
                               K - started, R, q, R);
            }
#pragma omp for schedule(dynamic, 1)
            for (long n = 0; n < N; n += 64)
                FN(weight_gradients)(work, &chunk, xs, hs, n, n + 64 < N ? n + 64 : N);
#pragma omp for schedule(dynamic, 1)
            for (long n = 0; n < out; n += 64)
                FN(accumulate)(n, n + 64 < out ? n + 64 : out, out, K, H, chunk.dprojected, units, call->dweight_hr);
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
