/* A whole sequence of one layer whose norms take every feature's statement over the rows of the batch; included by
   recurrent.inc.h.

   Rows meet here, but units do not, except in the products with W_hh. So a block of hidden units, with all its gates, goes
   through all of time with every row of the batch, and waits for the others once a step: forward for the whole of h, backward
   for the whole gradient of the recurrent product. Blocks have a fixed size and every sum a fixed order, so neither values nor
   sums depend on the number of threads.

   What belongs to a block lies together: of an array [T, B, N] first all of the first block, [T, B, gates * width], and so on;
   a row of it has the block's units of the first gate, then of the second. */

/* What norms a site's features in the step at hand: y = (x - high) * factor + level, with factor = gain * scale. */
typedef struct { REAL *gain, *shift, *high, *scale, *factor, *level; } FN(Columns);

typedef struct {
    long from, width, wide;        /* first unit, how many, and numbers in a row of its pre-activations */
    Line line[SITES];
    FN(Columns) columns[SITES];
    FN(Packed) ih, hh;             /* rows of W_ih and W_hh for these units */
    REAL *turned;                  /* backward: what of W_hh comes back from every gate to these units */
    REAL *projected, *recurrent, *cells; /* [T, B, ...] where they are kept, or room for one step */
    REAL *dz[2], *din, *drec;      /* backward: before and behind the norms; the latter for all steps of a chunk */
    REAL *c, *gate, *hidden[2], *dh, *dc[2], *back; /* [B, width] */
} FN(Units);

/* Everything the threads share. */
typedef struct {
    const Work *work;
    long gates, blocks, packed;    /* packed: steps of a chunk */
    FN(Units) *units;
} FN(Coupled);

/* Rows that are alive in a step. */
typedef struct { long count, *row; } FN(Rows);

static void FN(look)(const Work *work, long t, FN(Rows) *rows) {
    if (work->call->lengths == NULL && rows->count == work->batch) return;
    rows->count = 0;
    for (long r = 0; r < work->batch; r++)
        if (FN(alive)(work, t, r)) rows->row[rows->count++] = r;
}

/* Whether anything asks for a site's own statement of step t, and for its pooled one. */
INLINE int FN(asks_pooled)(const Line *site) { return site->norm == NORM_BATCH || site->window == WINDOW_DECAYING; }
INLINE int FN(asks_own)(const Work *work, const Line *site, long t) { return FN(asks_pooled)(site) || t + site->prefix >= work->live; }

/* A vector's numbers as double. */
#if IS_DOUBLE
typedef struct { FN(wide) part[1]; } FN(Doubles);
INLINE FN(Doubles) FN(doubles)(FN(vec) value) { return (FN(Doubles)){{(FN(wide))value}}; }
#else
typedef struct { FN(wide) part[2]; } FN(Doubles);
INLINE FN(Doubles) FN(doubles)(FN(vec) value) {
    typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
    half halves[2];
    memcpy(halves, &value, sizeof halves);
    return (FN(Doubles)){{__builtin_convertvector(halves[0], FN(wide)), __builtin_convertvector(halves[1], FN(wide))}};
}
#endif
#define PARTS for (size_t part = 0; part < sizeof(FN(Doubles)) / sizeof(FN(wide)); part++)

/* n features' statements over the rows, in double: deviations from the first row's value, which as one of the batch is never
   so far from the mean that their squares would drown the variance. */
INLINE void FN(measure_columns)(const long n, long at, const REAL *x, long wide, FN(Rows) rows, double *mean, double *var) {
    const FN(Doubles) pivot = FN(doubles)(FN(load)(x + rows.row[0] * wide + at, n));
    FN(Doubles) ones[2] = {{{{0}}}}, squares[2] = {{{{0}}}};
    for (long i = 1; i < rows.count; i += 2)
        for (int second = 0; second < 2; second++) { /* every other row by itself: the sums wait less for one another */
            if (i + second >= rows.count) break;
            const FN(Doubles) value = FN(doubles)(FN(load)(x + rows.row[i + second] * wide + at, n));
            PARTS {
                const FN(wide) d = value.part[part] - pivot.part[part];
                ones[second].part[part] += d;
                squares[second].part[part] += d * d;
            }
        }
    const double share = 1.0 / (double)rows.count;
    PARTS {
        const FN(wide) offset = (ones[0].part[part] + ones[1].part[part]) * share;
        ones[0].part[part] = pivot.part[part] + offset;
        squares[0].part[part] = (squares[0].part[part] + squares[1].part[part]) * share - offset * offset;
    }
    double out[2][VL];
    memcpy(out[0], &ones[0], sizeof out[0]);
    memcpy(out[1], &squares[0], sizeof out[1]);
    for (long j = 0; j < n; j++) {
        mean[at + j] = out[0][j];
        var[at + j] = out[1][j] < 0.0 ? 0.0 : out[1][j]; /* keeps NaN */
    }
}

/* n features' sums over the rows of dy, and of dy times what (x - high) * scale is; in REAL over 16 rows each. */
INLINE void FN(sum_columns)(const long n, long at, const REAL *x, const REAL *dy, long wide, FN(Rows) rows, const FN(Columns) *columns,
                            double *plain, double *normed) {
    const FN(vec) high = FN(load)(columns->high + at, n), scale = FN(load)(columns->scale + at, n);
    FN(Doubles) first = {{{0}}}, second = {{{0}}};
    for (long from = 0; from < rows.count; from += 16) {
        FN(vec) ones = {0}, products = {0};
        const long end = from + 16 < rows.count ? from + 16 : rows.count;
        for (long i = from; i < end; i++) {
            const long row = rows.row[i] * wide + at;
            const FN(vec) d = FN(load)(dy + row, n);
            ones += d;
            products += d * ((FN(load)(x + row, n) - high) * scale);
        }
        const FN(Doubles) a = FN(doubles)(ones), b = FN(doubles)(products);
        PARTS { first.part[part] += a.part[part]; second.part[part] += b.part[part]; }
    }
    double out[2][VL];
    memcpy(out[0], &first, sizeof out[0]);
    memcpy(out[1], &second, sizeof out[1]);
    for (long j = 0; j < n; j++) { plain[at + j] = out[0][j]; normed[at + j] = out[1][j]; }
}

/* dx = dy * factor, and where the own statement's gradient says anything, (x - own) * slope + level on top. */
INLINE void FN(unnorm_columns)(const int asked, const long n, long at, const REAL *x, const REAL *dy, long wide, FN(Rows) rows,
                               const REAL *factors, const REAL *owns, const REAL *slopes, const REAL *levels, REAL *dx) {
    const FN(vec) factor = FN(load)(factors + at, n);
    FN(vec) own = {0}, slope = {0}, level = {0};
    if (asked) { own = FN(load)(owns + at, n); slope = FN(load)(slopes + at, n); level = FN(load)(levels + at, n); }
    for (long i = 0; i < rows.count; i++) {
        const long row = rows.row[i] * wide + at;
        FN(vec) d = FN(load)(dy + row, n) * factor;
        if (asked) d += (FN(load)(x + row, n) - own) * slope + level;
        FN(store)(dx + row, d, n);
    }
}
#undef PARTS

INLINE long FN(site_wide)(const FN(Units) *units, int s) { return s == SITE_C ? units->width : units->wide; }

/* Where in a row of the whole site a block's number i lies. */
INLINE long FN(feature)(const Work *work, const FN(Units) *units, long i) { return i / units->width * work->hidden + units->from + i % units->width; }

/* The means and 1 / deviations that a site's features are normed with at step t. */
static void FN(statement)(const Work *work, const FN(Units) *units, int s, long t, double *mean, double *scale) {
    const Line *site = units->line + s;
    const Site *given = work->call->site + s;
    const long wide = FN(site_wide)(units, s);
    if (site->norm == NORM_BATCH) {
        memcpy(mean, site->mu + t * site->lanes, (size_t)wide * sizeof(double));
        memcpy(scale, site->scale + t * site->lanes, (size_t)wide * sizeof(double));
        return;
    }
    const double *means = given->population + (given->populations > 1 ? t : 0) * 2 * site->features, *vars = means + site->features;
    for (long i = 0; i < wide; i++) {
        const long feature = FN(feature)(work, units, i);
        mean[i] = means[feature];
        scale[i] = 1.0 / sqrt(vars[feature] + site->eps);
    }
}

static void FN(set_columns)(const Work *work, FN(Units) *units, int s, long t) {
    const FN(Columns) *columns = units->columns + s;
    double mean[4 * BLOCK_UNITS], scale[4 * BLOCK_UNITS];
    if (units->line[s].norm == NORM_NONE) return;
    FN(statement)(work, units, s, t, mean, scale);
    const long wide = FN(site_wide)(units, s);
    for (long i = 0; i < wide; i++) {
        const double factor = scale[i] * (double)columns->gain[i];
        columns->high[i] = (REAL)mean[i];
        columns->scale[i] = (REAL)scale[i];
        columns->factor[i] = (REAL)factor;
        columns->level[i] = (REAL)(((double)(REAL)mean[i] - mean[i]) * factor + (double)columns->shift[i]);
    }
}

/* A site's statements at step t, and with them its columns. */
static void FN(state_columns)(const Work *work, FN(Units) *units, int s, long t, const REAL *x, FN(Rows) rows) {
    const Line *site = units->line + s;
    const long wide = FN(site_wide)(units, s), at = (site->prefix + t) * site->lanes;
    if (site->norm == NORM_NONE) return;
    if (FN(asks_own)(work, site, t)) {
        double *mean = site->mean + at, *var = site->var + at;
        EVERY_UNIT(wide, FN(measure_columns)(n, at, x, wide, rows, mean, var));
        for (long l = wide; l < site->lanes; l++) mean[l] = var[l] = 0.0;
    }
    if (FN(asks_pooled)(site)) FN(pool)(site, t);
    FN(set_columns)(work, units, s, t);
    if (site->norm != NORM_BATCH) return;
    double *mean = work->call->site[s].population + t * (2 * site->features + 1), *var = mean + site->features;
    if (units->from == 0) var[site->features] = 1.0 / site->share[t * site->lanes];
    for (long i = 0; i < wide; i++) {
        const long feature = FN(feature)(work, units, i);
        mean[feature] = site->mu[t * site->lanes + i];
        var[feature] = site->v[t * site->lanes + i];
    }
}

/* Back through a site: sums of gain and shift, the gradient of its statements, and dx, which is 0 in rows that are not alive. */
static void FN(columns_back)(const Work *work, FN(Units) *units, int s, long t, const REAL *x, const REAL *dy, FN(Rows) rows, REAL *dx) {
    const Line *site = units->line + s;
    const FN(Columns) *columns = units->columns + s;
    const long wide = FN(site_wide)(units, s), at_pooled = t * site->lanes, at_own = at_pooled + site->prefix * site->lanes;
    if (rows.count < work->batch)
        for (long r = 0; r < work->batch; r++)
            if (!FN(alive)(work, t, r)) memset(dx + r * wide, 0, (size_t)wide * sizeof(REAL));
    if (site->norm == NORM_NONE) {
        for (long i = 0; i < rows.count; i++) FN(copy)(dx + rows.row[i] * wide, dy + rows.row[i] * wide, wide);
        return;
    }
    double mean[4 * BLOCK_UNITS], scale[4 * BLOCK_UNITS], plain[4 * BLOCK_UNITS], normed[4 * BLOCK_UNITS];
    FN(statement)(work, units, s, t, mean, scale);
    EVERY_UNIT(wide, FN(sum_columns)(n, at, x, dy, wide, rows, columns, plain, normed));
    for (long i = 0; i < wide; i++) {
        const double with = normed[i] + ((double)(REAL)mean[i] - mean[i]) * scale[i] * plain[i], gain = (double)columns->gain[i];
        site->dshift[i] += plain[i];
        site->dgain[i] += with;
        if (site->norm != NORM_BATCH) continue;
        site->dmu[at_pooled + i] -= scale[i] * gain * plain[i];
        site->dv[at_pooled + i] -= 0.5 * scale[i] * scale[i] * gain * with;
    }
    const Site *given = work->call->site + s;
    const int asked = site->norm == NORM_BATCH || given->dnext[1] || given->dnext[2]; /* of the statements */
    if (asked && FN(asks_pooled)(site)) FN(unpool)(site, work->steps, t);
    if (!asked || !FN(asks_own)(work, site, t)) {
        EVERY_UNIT(wide, FN(unnorm_columns)(0, n, at, x, dy, wide, rows, columns->factor, NULL, NULL, NULL, dx));
        return;
    }
    REAL own[4 * BLOCK_UNITS], slope[4 * BLOCK_UNITS], level[4 * BLOCK_UNITS];
    for (long i = 0; i < wide; i++) {
        const double about = site->mean[at_own + i], steep = 2.0 * site->dvar[at_own + i] / site->counts[t];
        own[i] = steep != 0.0 ? (REAL)about : (REAL)0; /* of which nothing is asked may be NaN */
        slope[i] = (REAL)steep;
        level[i] = (REAL)((steep != 0.0 ? ((double)(REAL)about - about) * steep : 0.0) + site->dmean[at_own + i] / site->counts[t]);
    }
    EVERY_UNIT(wide, FN(unnorm_columns)(1, n, at, x, dy, wide, rows, columns->factor, own, slope, level, dx));
}

INLINE FN(Side) FN(by_columns)(const REAL *x, const FN(Columns) *columns) {
    return (FN(Side)){.x = x, .gain = columns->factor, .shift = columns->level, .high = columns->high, .each = 1};
}

/* A step of a block. h: of every unit, before it; `after`: where rows end, h once it is over. */
static void FN(units_forward)(const Work *work, FN(Units) *units, long t, const REAL *h, REAL *after, FN(Rows) rows) {
    const Call *call = work->call;
    const long B = work->batch, D = work->inputs, H = work->hidden, from = units->from, width = units->width, wide = units->wide;
    const int lstm = work->cell == CELL_LSTM;
    REAL *in = units->projected + (call->projected ? t * B * wide : 0), *recurrent = units->recurrent + (call->recurrent ? t * B * wide : 0);
    REAL *cells = units->cells, *now = cells + (call->cells ? t * B * width : 0), *out = (REAL *)call->output + t * B * H + from;
    const REAL *c = t == 0 || !call->cells ? units->c : now - B * width;
    FN(product)(0, 1, B, D, wide, (const REAL *)call->xs + t * B * D, D, units->ih.panels, units->ih.bias, in);
    FN(product)(0, 1, B, H, wide, h, H, units->hh.panels, units->hh.bias, recurrent);
    FN(state_columns)(work, units, SITE_IH, t, in, rows);
    FN(state_columns)(work, units, SITE_HH, t, recurrent, rows);
    for (long i = 0; i < rows.count; i++) {
        const long r = rows.row[i];
        const FN(Side) x = FN(by_columns)(in + r * wide, units->columns + SITE_IH), u = FN(by_columns)(recurrent + r * wide, units->columns + SITE_HH);
        const REAL *old = lstm ? c + r * width : h + r * H + from;
        FN(row_forward)(work->cell, 1, width, x, u, old, lstm ? now + r * width : out + r * H, units->gate + r * width);
    }
    if (lstm) {
        FN(state_columns)(work, units, SITE_C, t, now, rows);
        for (long i = 0; i < rows.count; i++) {
            const long r = rows.row[i];
            FN(row_output)(1, width, FN(by_columns)(now + r * width, units->columns + SITE_C), units->gate + r * width, out + r * H);
        }
    }
    for (long r = 0; r < B && call->lengths; r++) { /* the output of a row past its length is 0, and its state stays */
        const int alive = FN(alive)(work, t, r);
        FN(copy)(after + r * H + from, alive ? out + r * H : h + r * H + from, width);
        if (!alive) memset(out + r * H, 0, (size_t)width * sizeof(REAL));
        if (!alive && lstm) FN(copy)(now + r * width, c + r * width, width);
    }
    if (lstm && !call->cells) { /* two takes turns */
        units->cells = units->c;
        units->c = now;
    }
}

/* A step of a block on the way back, up to the gradient of its recurrent product. */
static void FN(units_backward)(const Work *work, FN(Units) *units, long t, long first, FN(Rows) rows) {
    const Call *call = work->call;
    const long B = work->batch, D = work->inputs, H = work->hidden, from = units->from, width = units->width, wide = units->wide;
    const int lstm = work->cell == CELL_LSTM, gru = work->cell == CELL_GRU;
    const REAL *in = units->projected + (call->projected ? t * B * wide : 0), *recurrent = units->recurrent + t * B * wide;
    const REAL *cells = units->cells + t * B * width, *dout = (const REAL *)call->doutput + t * B * H + from;
    const REAL *old = lstm ? t ? cells - B * width : (const REAL *)call->c0 + from : t ? (const REAL *)call->output + (t - 1) * B * H + from : (const REAL *)call->h0 + from;
    const long apart = lstm && t ? width : H; /* between rows of `old` */
    REAL *din = units->din + (t - first) * B * wide, *drec = units->drec + (t - first) * B * wide, *dc = units->dc[0], *dold = units->dc[1];
    if (!call->projected) FN(product)(0, 1, B, D, wide, (const REAL *)call->xs + t * B * D, D, units->ih.panels, units->ih.bias, units->projected);
    for (int s = 0; s < SITES; s++) FN(set_columns)(work, units, s, t);
    for (int part = 0; part < 1 + lstm; part++) {
        for (long i = 0; i < rows.count; i++) {
            const long r = rows.row[i];
            const FN(Back) each = {
                FN(by_columns)(in + r * wide, units->columns + SITE_IH), FN(by_columns)(recurrent + r * wide, units->columns + SITE_HH),
                old + r * apart, dout + r * H, units->dh + r * width, units->dz[0] + r * wide, units->dz[1] + r * wide,
                units->hidden[part] + r * width,
            };
            if (!lstm) FN(row_back)(work->cell, 1, width, each);
            else if (part) FN(row_cell_back)(1, width, each, dc + r * width, dold + r * width);
            else FN(row_output_back)(1, width, each, FN(by_columns)(cells + r * width, units->columns + SITE_C));
        }
        if (lstm && part == 0) FN(columns_back)(work, units, SITE_C, t, cells, units->hidden[0], rows, units->hidden[1]);
    }
    FN(columns_back)(work, units, SITE_IH, t, in, units->dz[0], rows, din);
    FN(columns_back)(work, units, SITE_HH, t, recurrent, units->dz[gru], rows, drec);
    if (!lstm) return;
    for (long r = 0; r < B && rows.count < B; r++)
        if (!FN(alive)(work, t, r)) FN(copy)(dold + r * width, dc + r * width, width);
    units->dc[0] = dold;
    units->dc[1] = dc;
}

/* out [R, M] = rows `row` to row + R of the gradient of the recurrent (or the input) product, of every block, times packed
   panels of the weights turned round. */
static void FN(through_weights)(const FN(Coupled) *all, int inputs, long row, long R, const REAL *panels, long M, REAL *out) {
    const long N = all->gates * all->work->hidden;
    memset(out, 0, (size_t)(R * M) * sizeof(REAL));
    for (long p = 0; p < M; p += PANEL)
        for (long b = 0; b < all->blocks; b++) {
            const FN(Units) *units = all->units + b;
            const REAL *from = (inputs ? units->din : units->drec) + row * units->wide;
            FN(strip)(1, 0, R, units->wide, from, units->wide, 1, panels + p * N + all->gates * units->from * PANEL, NULL, out + p, M, M - p);
        }
}

/* What comes back from every block through W_hh to the units of one. */
static void FN(units_return)(const FN(Coupled) *all, FN(Units) *units, long t, long first, FN(Rows) rows) {
    const long B = all->work->batch, width = units->width, partly = rows.count < B;
    REAL *to = partly ? units->back : units->dh;
    FN(through_weights)(all, 0, (t - first) * B, B, units->turned, width, to);
    for (long i = 0; i < rows.count && partly; i++) FN(copy)(units->dh + rows.row[i] * width, to + rows.row[i] * width, width);
    for (long i = 0; i < rows.count && all->work->cell == CELL_GRU; i++)
#pragma omp simd
        for (long j = 0; j < width; j++) units->dh[rows.row[i] * width + j] += units->hidden[0][rows.row[i] * width + j];
}

/* The rows of a weight matrix [N, K] and of a bias that make a block's pre-activations, packed. */
static void FN(pack_units)(const Work *work, const FN(Units) *units, const REAL *weight, const REAL *bias, long K, FN(Packed) to) {
    memset(to.bias, 0, (size_t)(FN(panels)(units->wide) * PANEL) * sizeof(REAL));
    for (long i = 0; i < units->wide && bias; i++) to.bias[i] = bias[FN(feature)(work, units, i)];
    for (long p = 0; p < units->wide; p += PANEL) {
        const REAL *row[PANEL];
        for (long m = 0; m < PANEL; m++) row[m] = p + m < units->wide ? weight + FN(feature)(work, units, p + m) * K : NULL;
        for (long k = 0; k < K; k++, to.panels += PANEL)
            for (long m = 0; m < PANEL; m++) to.panels[m] = row[m] ? row[m][k] : (REAL)0;
    }
}

/* Columns p to p + columns of a weight matrix whose rows lie `row` apart, as one panel with rows block by block. */
static void FN(pack_back)(const FN(Coupled) *all, const REAL *weight, long row, long p, long columns, REAL *to) {
    for (long b = 0; b < all->blocks; b++)
        for (long i = 0; i < all->units[b].wide; i++, to += PANEL) {
            const REAL *from = weight + FN(feature)(all->work, all->units + b, i) * row + p;
            FN(store)(to, FN(load)(from, columns), VL);
            FN(store)(to + VL, columns > VL ? FN(load)(from + VL, columns - VL) : (FN(vec)){0}, VL);
        }
}

/* Gradients of the weights and biases of a block's units, for K rows of a chunk that starts with `first`. */
static void FN(units_gradients)(const Work *work, const FN(Units) *units, long first, long K, const REAL *xs, const REAL *hs) {
    const Call *call = work->call;
    const long D = work->inputs, H = work->hidden, few = D <= THIN, width = units->width, wide = units->wide;
    const REAL *inputs = (const REAL *)call->xs + first * work->batch * D;
    for (long at = 0; at < wide; at += width) {
        const long row = FN(feature)(work, units, at);
        REAL *dih = (REAL *)call->dweight_ih + row * D, *dhh = (REAL *)call->dweight_hh + row * H;
        FN(thin)(0, width, wide, K, few ? D : 0, units->din + at, inputs, dih, call->dbias_ih ? (REAL *)call->dbias_ih + row : NULL);
        if (!few) FN(accumulate)(0, width, wide, K, D, units->din + at, xs, dih);
        if (call->dbias_hh) FN(thin)(0, width, wide, K, 0, units->drec + at, NULL, NULL, (REAL *)call->dbias_hh + row);
        FN(accumulate)(0, width, wide, K, H, units->drec + at, hs, dhh);
    }
}

/* Numbers of REAL up to a whole number of cache lines. */
INLINE size_t FN(whole_lines)(long n) { return ((size_t)n * sizeof(REAL) + 63) / 64 * 64 / sizeof(REAL); }

/* The next n numbers of a room; without one, only count them. */
static REAL *FN(next)(REAL *room, size_t *at, long n) {
    REAL *here = room ? room + *at : NULL;
    *at += FN(whole_lines)(n);
    return here;
}

/* Lay a block out in its part of a room, or, without one, say how large that must be. */
static size_t FN(units_room)(const FN(Coupled) *all, FN(Units) *units, long block, int backward, REAL *room) {
    const Work *work = all->work;
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, D = work->inputs, H = work->hidden, from = block * BLOCK_UNITS;
    const long width = H - from < BLOCK_UNITS ? H - from : BLOCK_UNITS, wide = all->gates * width, N = all->gates * H, columns = FN(panels)(wide) * PANEL;
    size_t at = 0;
    units->from = from;
    units->width = width;
    units->wide = wide;
    for (int s = 0; s < SITES; s++) {
        units->line[s] = atn_norms_line(work->site + s, T, block);
        REAL **each[] = {&units->columns[s].gain, &units->columns[s].shift, &units->columns[s].high, &units->columns[s].scale, &units->columns[s].factor, &units->columns[s].level};
        for (size_t i = 0; i < sizeof each / sizeof *each; i++) *each[i] = FN(next)(room, &at, wide);
    }
    REAL **narrow[] = {&units->c, &units->gate, &units->hidden[0], &units->hidden[1], &units->dh, &units->dc[0], &units->dc[1], &units->back};
    for (size_t i = 0; i < sizeof narrow / sizeof *narrow; i++) *narrow[i] = FN(next)(room, &at, B * width);
    if (!backward || !call->projected) {
        units->ih.panels = FN(next)(room, &at, columns * D);
        units->ih.bias = FN(next)(room, &at, columns);
    }
    if (call->projected) units->projected = (REAL *)call->projected + T * B * all->gates * from;
    else units->projected = FN(next)(room, &at, B * wide);
    if (call->recurrent) units->recurrent = (REAL *)call->recurrent + T * B * all->gates * from;
    else units->recurrent = FN(next)(room, &at, B * wide);
    if (call->cells) units->cells = (REAL *)call->cells + T * B * from;
    else units->cells = FN(next)(room, &at, B * width);
    if (backward) {
        units->turned = FN(next)(room, &at, FN(panels)(width) * PANEL * N);
        REAL **before[] = {&units->dz[0], &units->dz[1]}, **behind[] = {&units->din, &units->drec};
        for (int i = 0; i < 2; i++) *before[i] = FN(next)(room, &at, B * wide);
        for (int i = 0; i < 2; i++) *behind[i] = FN(next)(room, &at, all->packed * B * wide);
    } else {
        units->hh.panels = FN(next)(room, &at, columns * H);
        units->hh.bias = FN(next)(room, &at, columns);
    }
    return at;
}

/* Copy a block's units of rows [B, H] from or to rows of its own. */
INLINE void FN(units_copy)(const Work *work, const FN(Units) *units, REAL *to, long to_apart, const REAL *from, long from_apart) {
    for (long r = 0; r < work->batch; r++) FN(copy)(to + r * to_apart, from + r * from_apart, units->width);
}

/* What a thread does for a block before the first step. */
static void FN(units_begin)(const FN(Coupled) *all, FN(Units) *units, int backward) {
    const Work *work = all->work;
    const Call *call = work->call;
    const long H = work->hidden;
    for (int s = 0; s < SITES; s++) {
        const FN(Columns) *columns = units->columns + s;
        const Line *site = units->line + s;
        for (long i = 0; i < FN(site_wide)(units, s); i++) {
            const long feature = FN(feature)(work, units, i);
            columns->gain[i] = columns->factor[i] = site->norm == NORM_NONE ? (REAL)1 : ((const REAL *)site->gain)[feature];
            columns->shift[i] = columns->level[i] = site->norm == NORM_NONE ? (REAL)0 : ((const REAL *)site->shift)[feature];
            columns->high[i] = (REAL)0;
        }
    }
    if (!backward || !call->projected) FN(pack_units)(work, units, call->weight_ih, call->bias_ih, work->inputs, units->ih);
    if (!backward) {
        FN(pack_units)(work, units, call->weight_hh, call->bias_hh, H, units->hh);
        if (work->cell == CELL_LSTM) FN(units_copy)(work, units, units->c, units->width, (const REAL *)call->c0 + units->from, H);
        return;
    }
    const long N = all->gates * H;
    for (long p = 0; p < units->width; p += PANEL) FN(pack_back)(all, call->weight_hh, H, units->from + p, units->width - p, units->turned + p * N);
    FN(units_copy)(work, units, units->dh, units->width, (const REAL *)call->dh + units->from, H);
    if (work->cell == CELL_LSTM) FN(units_copy)(work, units, units->dc[0], units->width, (const REAL *)call->dc + units->from, H);
}

/* Room for every block, and what else is needed beside it; NULL if there is none. */
static REAL *FN(coupled_room)(FN(Coupled) *all, const Work *work, int backward, size_t more, long **rows) {
    all->work = work;
    all->gates = FN(gates)(work);
    all->blocks = atn_norms_unit_blocks(work->hidden);
    FN(Units) first;
    const size_t each = FN(units_room)(all, &first, 0, backward, NULL), blocks = (size_t)all->blocks; /* the first is the largest */
    const size_t units = (blocks * sizeof(FN(Units)) + 63) / 64 * 64, lists = (size_t)(work->threads * work->batch) * sizeof(long);
    char *room = atn_norms_memory((each * blocks + more) * sizeof(REAL) + units + lists);
    if (!room) return NULL;
    all->units = (FN(Units) *)room;
    REAL *at = (REAL *)(room + units);
    for (long b = 0; b < all->blocks; b++) FN(units_room)(all, all->units + b, b, backward, at + each * (size_t)b);
    *rows = (long *)(at + each * blocks + more);
    return at + each * blocks;
}

/* A thread's blocks, and its list of rows. */
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
    (void)threads; /* without OpenMP nobody asks */
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
            const REAL *c = live == 0 || !call->cells ? units->c : units->cells + (live - 1) * B * units->width;
            FN(units_copy)(work, units, (REAL *)call->cn + units->from, H, c, units->width);
        }
        for (long b = low; b < high; b++) { /* steps that did not happen */
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
    for (int s = 0; s < SITES; s++)
        if (work->site[s].norm == NORM_BATCH)
            memset(call->site[s].population + live * (2 * work->site[s].features + 1), 0,
                   (size_t)((T - live) * (2 * work->site[s].features + 1)) * sizeof(double));
    free(all.units);
    return 0;
}

static int FN(coupled_backward)(const Work *work) {
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, D = work->inputs, H = work->hidden, N = FN(gates)(work) * H;
    const long rows_wide = D <= THIN ? 0 : FN(panels)(D) * PANEL, rows_deep = FN(panels)(H) * PANEL, back_wide = call->dxs ? FN(panels)(D) * PANEL : 0;
    FN(Coupled) all = {.packed = FN(chunk_steps)(work)};
    const size_t many = (size_t)(all.packed * B);
    long *lists;
    REAL *turned = FN(coupled_room)(&all, work, 1, many * (size_t)(rows_wide + rows_deep) + (size_t)(back_wide * N), &lists);
    if (!turned) return 1;
    REAL *xs = turned + back_wide * N, *hs = xs + many * (size_t)rows_wide;
    if (call->dxs) memset((REAL *)call->dxs + work->live * B * D, 0, (size_t)((T - work->live) * B * D) * sizeof(REAL));
    const long threads = work->threads < all.blocks ? work->threads : all.blocks;
    (void)threads; /* without OpenMP nobody asks */
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
            for (long p = 0; p < rows_wide + rows_deep; p += PANEL) { /* pack what the weights were multiplied with */
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
            for (int s = 0; s < SITES; s++)
                if (units->line[s].norm != NORM_NONE && FN(asks_pooled)(units->line + s)) FN(unpool_prefix)(units->line + s, T);
        }
    }
    free(all.units);
    return 0;
}

#undef MINE
