/* The statistics of every feature over the rows of a step, and the norms that use them; included by coupled.inc.h. The features
   of a block are the columns of its pre-activations, processed one vector at a time. */

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

/* Compute the statistics of n features over the rows, in double, from deviations from the value of the first row. The first row
   belongs to the batch, so its value is close enough to the mean for exact squares. */
INLINE void FN(measure_columns)(const long n, long at, const REAL *x, long wide, FN(Rows) rows, double *mean, double *var) {
    const FN(Doubles) pivot = FN(doubles)(FN(load)(x + rows.row[0] * wide + at, n));
    FN(Doubles) ones[2] = {{{{0}}}}, squares[2] = {{{{0}}}};
    for (long i = 1; i < rows.count; i += 2)
        for (int second = 0; second < 2; second++) { /* two independent sums for every second row are faster */
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

/* Sum dy, and dy * (x - high) * scale, over the rows for n features; in REAL over stretches of 16 rows. */
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

/* dx = dy * factor, plus (x - own) * slope + level if the statistic of the step has a gradient. */
INLINE void FN(unnorm_columns)(const int has_grad, const long n, long at, const REAL *x, const REAL *dy, long wide, FN(Rows) rows,
                               const REAL *factors, const REAL *owns, const REAL *slopes, const REAL *levels, REAL *dx) {
    const FN(vec) factor = FN(load)(factors + at, n);
    FN(vec) own = {0}, slope = {0}, level = {0};
    if (has_grad) { own = FN(load)(owns + at, n); slope = FN(load)(slopes + at, n); level = FN(load)(levels + at, n); }
    for (long i = 0; i < rows.count; i++) {
        const long row = rows.row[i] * wide + at;
        FN(vec) d = FN(load)(dy + row, n) * factor;
        if (has_grad) d += (FN(load)(x + row, n) - own) * slope + level;
        FN(store)(dx + row, d, n);
    }
}
#undef PARTS

INLINE long FN(site_wide)(const FN(Units) *units, int s) { return s == SITE_C ? units->width : units->wide; }

/* Return the index in a full row of the site for element i of a block. */
INLINE long FN(feature)(const Work *work, const FN(Units) *units, long i) { return i / units->width * work->hidden + units->from + i % units->width; }

/* Compute the means and 1 / deviations that normalize the features of a site at step t. */
static void FN(pooled_factors)(const Work *work, const FN(Units) *units, int s, long t, double *mean, double *scale) {
    const SiteBuffers *site = units->line + s;
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
    FN(pooled_factors)(work, units, s, t, mean, scale);
    const long wide = FN(site_wide)(units, s);
    for (long i = 0; i < wide; i++) {
        const double factor = scale[i] * (double)columns->gain[i];
        columns->high[i] = (REAL)mean[i];
        columns->scale[i] = (REAL)scale[i];
        columns->factor[i] = (REAL)factor;
        columns->level[i] = (REAL)(((double)(REAL)mean[i] - mean[i]) * factor + (double)columns->shift[i]);
    }
}

/* Compute the statistics of a site at step t, and its columns. */
static void FN(state_columns)(const Work *work, FN(Units) *units, int s, long t, const REAL *x, FN(Rows) rows) {
    const SiteBuffers *site = units->line + s;
    const long wide = FN(site_wide)(units, s), at = (site->prefix + t) * site->lanes;
    if (site->norm == NORM_NONE) return;
    if (FN(needs_own)(work, site, t)) {
        double *mean = site->mean + at, *var = site->var + at;
        EVERY_UNIT(wide, FN(measure_columns)(n, at, x, wide, rows, mean, var));
        for (long l = wide; l < site->lanes; l++) mean[l] = var[l] = 0.0;
    }
    if (FN(needs_pooled)(site)) FN(pool)(site, t);
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

/* Backward through a site: add to the sums of gain and shift, compute the gradient of its statistics, and dx, which is 0 in
   masked rows. */
static void FN(columns_back)(const Work *work, FN(Units) *units, int s, long t, const REAL *x, const REAL *dy, FN(Rows) rows, REAL *dx) {
    const SiteBuffers *site = units->line + s;
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
    FN(pooled_factors)(work, units, s, t, mean, scale);
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
    const int has_grad = site->norm == NORM_BATCH || given->dnext[1] || given->dnext[2]; /* the statistics have a gradient */
    if (has_grad && FN(needs_pooled)(site)) FN(unpool)(site, work->steps, t);
    if (!has_grad || !FN(needs_own)(work, site, t)) {
        EVERY_UNIT(wide, FN(unnorm_columns)(0, n, at, x, dy, wide, rows, columns->factor, NULL, NULL, NULL, dx));
        return;
    }
    REAL own[4 * BLOCK_UNITS], slope[4 * BLOCK_UNITS], level[4 * BLOCK_UNITS];
    for (long i = 0; i < wide; i++) {
        const double about = site->mean[at_own + i], steep = 2.0 * site->dvar[at_own + i] / site->counts[t];
        own[i] = steep != 0.0 ? (REAL)about : (REAL)0; /* a statistic without a gradient may be NaN */
        slope[i] = (REAL)steep;
        level[i] = (REAL)((steep != 0.0 ? ((double)(REAL)about - about) * steep : 0.0) + site->dmean[at_own + i] / site->counts[t]);
    }
    EVERY_UNIT(wide, FN(unnorm_columns)(1, n, at, x, dy, wide, rows, columns->factor, own, slope, level, dx));
}

INLINE FN(Side) FN(by_columns)(const REAL *x, const FN(Columns) *columns) {
    return (FN(Side)){.x = x, .gain = columns->factor, .shift = columns->level, .high = columns->high, .each = 1};
}
