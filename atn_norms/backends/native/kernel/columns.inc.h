/* The statistics of every feature over the rows of a step, and the norms that use them; included by recurrent.inc.h. The
   features of a block are columns of pre-activations, processed one vector at a time. */

/* The features of a block at one site: `width` of each gate, from `from` on. Their factors normalize at the current step:
   y = (x - high) * factor + level, with factor = gain * scale. */
typedef struct {
    int site;
    const Site *given;
    SiteBuffers line;
    long from, width, wide;        /* wide: number of features */
    REAL *gain, *shift, *high, *scale, *factor, *level;
} FN(Columns);

INLINE int FN(alive)(const Work *work, long t, long row) { return work->call->lengths == NULL || t < work->call->lengths[row]; }

/* The unmasked rows of a step. */
typedef struct { long count, *row; } FN(Rows);

static void FN(look)(const Work *work, long t, FN(Rows) *rows) {
    if (work->call->lengths == NULL && rows->count == work->batch) return;
    rows->count = 0;
    for (long r = 0; r < work->batch; r++)
        if (FN(alive)(work, t, r)) rows->row[rows->count++] = r;
}

/* Return true if the pooled statistic of a step is used, by the norm or by the state; and if that of step t alone is. */
INLINE int FN(needs_pooled)(const SiteBuffers *site) { return site->norm == NORM_BATCH || site->window == WINDOW_DECAYING; }
INLINE int FN(needs_own)(const Work *work, const SiteBuffers *site, long t) { return FN(needs_pooled)(site) || t + site->prefix >= work->live; }

/* The numbers of a vector as doubles. */
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

/* Compute the statistics of n features over the rows, which are `apart`, in double, from deviations from the value of the first row. The first row
   belongs to the batch, so its value is close enough to the mean for exact squares. */
INLINE void FN(measure_columns)(const long n, long at, const REAL *x, long apart, FN(Rows) rows, double *mean, double *var) {
    const FN(Doubles) pivot = FN(doubles)(FN(load)(x + rows.row[0] * apart + at, n));
    FN(Doubles) ones[2] = {{{{0}}}}, squares[2] = {{{{0}}}};
    for (long i = 1; i < rows.count; i += 2)
        for (int second = 0; second < 2; second++) { /* two independent sums for every second row are faster */
            if (i + second >= rows.count) break;
            const FN(Doubles) value = FN(doubles)(FN(load)(x + rows.row[i + second] * apart + at, n));
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

/* Sum dy, and dy * (x - high) * scale, over the rows for n features; in REAL over stretches of 16 rows. */
INLINE void FN(sum_columns)(const long n, long at, const REAL *x, const REAL *dy, long apart, FN(Rows) rows, const FN(Columns) *columns,
                            double *plain, double *normed) {
    const FN(vec) high = FN(load)(columns->high + at, n), scale = FN(load)(columns->scale + at, n);
    FN(Doubles) first = {{{0}}}, second = {{{0}}};
    for (long from = 0; from < rows.count; from += 16) {
        FN(vec) ones = {0}, products = {0};
        const long end = from + 16 < rows.count ? from + 16 : rows.count;
        for (long i = from; i < end; i++) {
            const long row = rows.row[i] * apart + at;
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

/* dx = dy * factor, plus (x - own) * slope + level if the statistic of the step has a gradient. */
INLINE void FN(unnorm_columns)(const int has_grad, const long n, long at, const REAL *x, const REAL *dy, long apart, FN(Rows) rows,
                               const REAL *factors, const REAL *owns, const REAL *slopes, const REAL *levels, REAL *dx) {
    const FN(vec) factor = FN(load)(factors + at, n);
    FN(vec) own = {0}, slope = {0}, level = {0};
    if (has_grad) { own = FN(load)(owns + at, n); slope = FN(load)(slopes + at, n); level = FN(load)(levels + at, n); }
    for (long i = 0; i < rows.count; i++) {
        const long row = rows.row[i] * apart + at;
        FN(vec) d = FN(load)(dy + row, n) * factor;
        if (has_grad) d += (FN(load)(x + row, n) - own) * slope + level;
        FN(store)(dx + row, d, n);
    }
}
#undef PARTS

/* Run `call` as EVERY_UNIT does, but for each column once, so that results may replace inputs. */
#define EVERY_COLUMN(wide, call)                                                       \
    do {                                                                               \
        long at = 0;                                                                   \
        for (; at + VL <= (wide); at += VL) { const long n = VL; call; }                \
        if (at < (wide)) { const long n = (wide) - at; call; }                         \
    } while (0)

/* out = the normalized features of all rows. */
static void FN(normed_columns)(const FN(Columns) *columns, const REAL *x, REAL *out, long apart, long rows) {
    for (long r = 0; r < rows; r++) EVERY_COLUMN(columns->wide, FN(store)(out + r * apart + at, (FN(load)(x + r * apart + at, n) - FN(load)(columns->high + at, n)) * FN(load)(columns->factor + at, n) + FN(load)(columns->level + at, n), n));
}

/* Return the index in a full row of the site for element i of a block. */
INLINE long FN(column)(const FN(Columns) *columns, long i) {
    const SiteBuffers *site = &columns->line;
    return i / columns->width * (site->features / site->groups) + columns->from + i % columns->width;
}

/* Set the gains and shifts of the features, and factors that do not normalize. */
static void FN(begin_columns)(FN(Columns) *columns) {
    const SiteBuffers *site = &columns->line;
    for (long i = 0; i < columns->wide; i++) {
        columns->gain[i] = columns->factor[i] = site->norm == NORM_NONE ? (REAL)1 : ((const REAL *)site->gain)[FN(column)(columns, i)];
        columns->shift[i] = columns->level[i] = site->norm == NORM_NONE ? (REAL)0 : ((const REAL *)site->shift)[FN(column)(columns, i)];
        columns->high[i] = (REAL)0;
    }
}

/* Compute the means and 1 / deviations that normalize the features at step t. */
static void FN(pooled_factors)(const FN(Columns) *columns, long t, double *mean, double *scale) {
    const SiteBuffers *site = &columns->line;
    const Site *given = columns->given;
    const long wide = columns->wide;
    if (site->norm == NORM_BATCH) {
        memcpy(mean, site->mu + t * site->lanes, (size_t)wide * sizeof(double));
        memcpy(scale, site->scale + t * site->lanes, (size_t)wide * sizeof(double));
        return;
    }
    const double *means = given->population + (given->populations > 1 ? t : 0) * 2 * site->features, *vars = means + site->features;
    for (long i = 0; i < wide; i++) {
        const long feature = FN(column)(columns, i);
        mean[i] = means[feature];
        scale[i] = 1.0 / sqrt(vars[feature] + given->eps[feature]);
    }
}

static void FN(set_columns)(FN(Columns) *columns, long t) {
    double mean[4 * BLOCK_UNITS], scale[4 * BLOCK_UNITS];
    if (columns->line.norm == NORM_NONE) return;
    FN(pooled_factors)(columns, t, mean, scale);
    for (long i = 0; i < columns->wide; i++) {
        const double factor = scale[i] * (double)columns->gain[i];
        columns->high[i] = (REAL)mean[i];
        columns->scale[i] = (REAL)scale[i];
        columns->factor[i] = (REAL)factor;
        columns->level[i] = (REAL)(((double)(REAL)mean[i] - mean[i]) * factor + (double)columns->shift[i]);
    }
}

/* Compute the statistics of the features at step t, and their factors; rows are `apart`. */
static void FN(state_columns)(const Work *work, FN(Columns) *columns, long t, const REAL *x, long apart, FN(Rows) rows) {
    const SiteBuffers *site = &columns->line;
    const long wide = columns->wide, at = (site->prefix + t) * site->lanes;
    if (site->norm == NORM_NONE) return;
    if (FN(needs_own)(work, site, t)) {
        double *mean = site->mean + at, *var = site->var + at;
        EVERY_UNIT(wide, FN(measure_columns)(n, at, x, apart, rows, mean, var));
        for (long l = wide; l < site->lanes; l++) mean[l] = var[l] = 0.0;
    }
    if (FN(needs_pooled)(site)) FN(pool)(site, t);
    FN(set_columns)(columns, t);
    if (site->norm != NORM_BATCH) return;
    double *mean = columns->given->population + t * (2 * site->features + 1), *var = mean + site->features;
    if (columns->from == 0) var[site->features] = 1.0 / site->share[t * site->lanes];
    for (long i = 0; i < wide; i++) {
        const long feature = FN(column)(columns, i);
        mean[feature] = site->mu[t * site->lanes + i];
        var[feature] = site->v[t * site->lanes + i];
    }
}

/* Set the pooled moments of steps without an unmasked row to 0. */
static void FN(end_moments)(const Work *work) {
    for (int s = 0; s < SITES; s++) {
        const long each = 2 * work->site[s].features + 1;
        if (work->site[s].norm == NORM_BATCH)
            memset(work->call->site[s].population + work->live * each, 0, (size_t)((work->steps - work->live) * each) * sizeof(double));
    }
}

/* Backward through a site: add to the sums of gain and shift, compute the gradient of its statistics, and dx, which is 0 in
   masked rows. dx may be dy. */
static void FN(columns_back)(const Work *work, const FN(Columns) *columns, long t, const REAL *x, const REAL *dy, long apart, FN(Rows) rows, REAL *dx) {
    const SiteBuffers *site = &columns->line;
    const long wide = columns->wide, at_pooled = t * site->lanes, at_own = at_pooled + site->prefix * site->lanes;
    if (rows.count < work->batch)
        for (long r = 0; r < work->batch; r++)
            if (!FN(alive)(work, t, r)) memset(dx + r * apart, 0, (size_t)wide * sizeof(REAL));
    if (site->norm == NORM_NONE) {
        for (long i = 0; i < rows.count; i++) FN(copy)(dx + rows.row[i] * apart, dy + rows.row[i] * apart, wide);
        return;
    }
    double mean[4 * BLOCK_UNITS], scale[4 * BLOCK_UNITS], plain[4 * BLOCK_UNITS], normed[4 * BLOCK_UNITS];
    FN(pooled_factors)(columns, t, mean, scale);
    EVERY_UNIT(wide, FN(sum_columns)(n, at, x, dy, apart, rows, columns, plain, normed));
    for (long i = 0; i < wide; i++) {
        const double with = normed[i] + ((double)(REAL)mean[i] - mean[i]) * scale[i] * plain[i], gain = (double)columns->gain[i];
        site->dshift[i] += plain[i];
        site->dgain[i] += with;
        if (site->norm != NORM_BATCH) continue;
        site->dmu[at_pooled + i] -= scale[i] * gain * plain[i];
        site->dv[at_pooled + i] -= 0.5 * scale[i] * scale[i] * gain * with;
    }
    const int has_grad = site->norm == NORM_BATCH || columns->given->dnext[1] || columns->given->dnext[2]; /* the statistics have a gradient */
    if (has_grad && FN(needs_pooled)(site)) FN(unpool)(site, work->steps, t);
    if (!has_grad || !FN(needs_own)(work, site, t)) {
        EVERY_COLUMN(wide, FN(unnorm_columns)(0, n, at, x, dy, apart, rows, columns->factor, NULL, NULL, NULL, dx));
        return;
    }
    REAL own[4 * BLOCK_UNITS], slope[4 * BLOCK_UNITS], level[4 * BLOCK_UNITS];
    for (long i = 0; i < wide; i++) {
        const double about = site->mean[at_own + i], steep = 2.0 * site->dvar[at_own + i] / site->counts[t];
        own[i] = steep != 0.0 ? (REAL)about : (REAL)0; /* a statistic without a gradient may be NaN */
        slope[i] = (REAL)steep;
        level[i] = (REAL)((steep != 0.0 ? ((double)(REAL)about - about) * steep : 0.0) + site->dmean[at_own + i] / site->counts[t]);
    }
    EVERY_COLUMN(wide, FN(unnorm_columns)(1, n, at, x, dy, apart, rows, columns->factor, own, slope, level, dx));
}

INLINE FN(Side) FN(by_columns)(const REAL *x, const FN(Columns) *columns) {
    return (FN(Side)){.x = x, .gain = columns->factor, .shift = columns->level, .high = columns->high, .each = 1};
}

/* The blocks of features of all sites with batch statistics in a layer whose rows pass through time together; the unmasked
   rows of a step, a list for each thread. */
typedef struct {
    long many;
    FN(Columns) *columns;
    long *rows;
} FN(Features);

/* Allocate the features of such a layer, and set their gains and shifts; other layers have none. Return 0 on success. */
static int FN(take_features)(const Work *work, FN(Features) *features) {
    *features = (FN(Features)){0};
    for (int s = 0; s < SITES && work->mixed; s++)
        if (FN(over_rows)(work->site + s)) features->many += work->site[s].blocks;
    if (features->many == 0) return 0;
    const size_t factors = 6 * BLOCK_UNITS, each = sizeof(FN(Columns)) + factors * sizeof(REAL), rows = (size_t)(work->threads * work->batch);
    features->columns = atn_norms_memory((size_t)features->many * each + rows * sizeof(long));
    if (!features->columns) return 1;
    features->rows = (long *)(features->columns + features->many);
    REAL *at = (REAL *)(features->rows + rows);
    FN(Columns) *columns = features->columns;
    for (int s = 0; s < SITES; s++)
        for (long block = 0; FN(over_rows)(work->site + s) && block < work->site[s].blocks; block++, columns++) {
            const long from = block * BLOCK_UNITS, left = work->site[s].features - from, width = left < BLOCK_UNITS ? left : BLOCK_UNITS;
            *columns = (FN(Columns)){.site = s, .given = work->call->site + s, .line = atn_norms_site_buffers(work->site + s, work->steps, block), .from = from, .width = width, .wide = width};
            REAL **each_factor[] = {&columns->gain, &columns->shift, &columns->high, &columns->scale, &columns->factor, &columns->level};
            for (int i = 0; i < 6; i++, at += BLOCK_UNITS) *each_factor[i] = at;
            FN(begin_columns)(columns);
        }
    return 0;
}
