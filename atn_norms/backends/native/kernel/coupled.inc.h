/* A whole sequence of one layer with batch statistics at every normed site, without a projection: every feature has its statistics over the rows of the batch. Included by
   recurrent.inc.h.

   Rows depend on each other, but units do not, except in the products with W_hh. A block of hidden units, with all its gates,
   passes through all time steps with every row of the batch. It waits for the other blocks once for each step: forward for the
   complete h, backward for the complete gradient of the recurrent product. Blocks have a fixed size and every sum has a fixed
   order, so results do not depend on the number of threads.

   The data of a block are contiguous. An array [T, B, N] stores the first block, [T, B, gates * width], then the second, and so
   on. A row of a block has its units of the first gate, then of the second. */

typedef struct {
    long from, width, wide;        /* first unit, number of units, and numbers in a row of its pre-activations */
    FN(Columns) columns[SITES];
    FN(Packed) ih, hh;             /* rows of W_ih and W_hh for these units */
    REAL *turned;                  /* backward: W_hh from every gate to these units, transposed */
    REAL *projected, *recurrent, *cells; /* [T, B, ...] if they are kept, otherwise one step */
    REAL *dz[2], *din, *drec;      /* backward: gradients of the results of the norms, and of their inputs; the latter for all steps of a chunk */
    REAL *c, *gate, *hidden[2], *dh, *dc[2], *back; /* [B, width] */
} FN(Units);

/* Data that all threads share. */
typedef struct {
    const Work *work;
    long gates, blocks, packed;    /* packed: number of steps in a chunk */
    FN(Units) *units;
} FN(Coupled);

#include "units.inc.h"

/* The blocks of a thread, and its list of rows. */
#define MINE                                                                                                          \
    const long team = atn_norms_team(), me = atn_norms_thread(), low = all.blocks * me / team, high = all.blocks * (me + 1) / team; \
    FN(Rows) rows = {0, lists + me * B}

static int FN(coupled_forward)(const Work *work) {
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, H = work->hidden, live = work->live;
    FN(Coupled) all = {0};
    long *lists;
    REAL *room = FN(coupled_room)(&all, work, 0, (size_t)(2 * B * H), &lists), *held[2] = {room, room + B * H};
    if (!room) return 1;
    const long threads = work->threads < all.blocks ? work->threads : all.blocks;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        MINE;
        for (long b = low; b < high; b++) FN(units_begin)(&all, all.units + b, 0);
        for (long t = 0; t < live; t++) {
            const REAL *h = t == 0 ? call->h0 : call->lengths ? held[(t - 1) % 2] : (const REAL *)call->output + (t - 1) * B * H;
            FN(look)(work, t, &rows);
            for (long b = low; b < high; b++) FN(units_forward)(work, all.units + b, t, h, held[t % 2], rows);
            atn_norms_wait();
        }
        for (long b = low; b < high && work->cell == CELL_LSTM; b++) {
            const FN(Units) *units = all.units + b;
            const REAL *c = call->normed_carry ? units->back : live == 0 || !call->cells ? units->c : units->cells + (live - 1) * B * units->width;
            FN(units_copy)(work, units, (REAL *)call->cn + units->from, H, c, units->width);
        }
        for (long b = low; b < high; b++) { /* steps without an unmasked row */
            const FN(Units) *units = all.units + b;
            const size_t wide = (size_t)((T - live) * B * units->wide) * sizeof(REAL), narrow = (size_t)((T - live) * B * units->width) * sizeof(REAL);
            if (call->projected) memset(units->projected + live * B * units->wide, 0, wide);
            if (call->recurrent) memset(units->recurrent + live * B * units->wide, 0, wide);
            if (call->cells) memset(units->cells + live * B * units->width, 0, narrow);
        }
    }
    const REAL *h = live == 0 ? call->h0 : call->lengths ? held[(live - 1) % 2] : (const REAL *)call->output + (live - 1) * B * H;
    memcpy(call->hn, h, (size_t)(B * H) * sizeof(REAL));
    memset((REAL *)call->output + live * B * H, 0, (size_t)((T - live) * B * H) * sizeof(REAL));
    FN(end_moments)(work);
    free(all.units);
    return 0;
}

static int FN(coupled_backward)(const Work *work) {
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, D = work->inputs, H = work->hidden, N = FN(gates)(work) * H;
    const long rows_wide = D <= THIN ? 0 : FN(panels)(D) * PANEL, rows_deep = FN(panels)(H) * PANEL, back_wide = call->dxs ? FN(panels)(D) * PANEL : 0;
    FN(Coupled) all = {.packed = FN(chunk_steps)(work, work->batch)};
    const size_t many = (size_t)(all.packed * B);
    long *lists;
    REAL *turned = FN(coupled_room)(&all, work, 1, many * (size_t)(rows_wide + rows_deep) + (size_t)(back_wide * N), &lists);
    if (!turned) return 1;
    REAL *xs = turned + back_wide * N, *hs = xs + many * (size_t)rows_wide;
    if (call->dxs) memset((REAL *)call->dxs + work->live * B * D, 0, (size_t)((T - work->live) * B * D) * sizeof(REAL));
    const long threads = work->threads < all.blocks ? work->threads : all.blocks;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        MINE;
        for (long b = low; b < high; b++) FN(units_begin)(&all, all.units + b, 1);
#pragma omp for schedule(static)
        for (long p = 0; p < back_wide; p += PANEL) FN(pack_back)(&all, call->weight_ih, D, p, D - p, turned + p * N);
        for (long last = work->live, first; last > 0; last = first) {
            first = last > all.packed ? last - all.packed : 0;
            const long K = (last - first) * B;
            for (long t = last - 1; t >= first; t--) {
                FN(look)(work, t, &rows);
                for (long b = low; b < high; b++) FN(units_backward)(work, all.units + b, t, first, rows);
                atn_norms_wait();
                for (long b = low; b < high; b++) FN(units_return)(&all, all.units + b, t, first, rows);
            }
#pragma omp for schedule(static)
            for (long p = 0; p < rows_wide + rows_deep; p += PANEL) { /* pack the factors of the weights */
                if (p < rows_wide) {
                    FN(pack_panel)(xs + p * K, (const REAL *)call->xs + first * B * D, K, D, p, D);
                    continue;
                }
                const long q = p - rows_wide, started = first == 0 ? B : 0;
                if (started) FN(pack_panel)(hs + q * K, call->h0, B, H, q, H);
                FN(pack_panel)(hs + q * K + started * PANEL, (const REAL *)call->output + (first - 1 + (started ? 1 : 0)) * B * H, K - started, H, q, H);
            }
            const long at_once = 64;
#pragma omp for schedule(static)
            for (long r = 0; r < (call->dxs ? K : 0); r += at_once)
                FN(through_weights)(&all, 1, r, r + at_once < K ? at_once : K - r, turned, D, (REAL *)call->dxs + (first * B + r) * D);
            for (long b = low; b < high; b++) FN(units_gradients)(work, all.units + b, first, K, xs, hs);
        }
        for (long b = low; b < high; b++) {
            FN(Units) *units = all.units + b;
            FN(units_copy)(work, units, (REAL *)call->dh + units->from, H, units->dh, units->width);
            if (work->cell == CELL_LSTM) FN(units_copy)(work, units, (REAL *)call->dc + units->from, H, units->dc[0], units->width);
            for (int s = 0; s < SITES; s++) {
                const SiteBuffers *line = &units->columns[s].line;
                if (line->norm != NORM_NONE && FN(needs_pooled)(line)) FN(unpool_prefix)(line, T);
            }
        }
    }
    free(all.units);
    return 0;
}

#undef MINE
