/* Norm sites: forward from a row and its pooled statistic to the normalized row, and backward. */

/* Rows of ones and zeros, for sites without a gain or a shift. */
typedef struct { const REAL *ones, *zeros; } FN(Plain);

/* Return the factors for a mean and 1 / deviation. */
INLINE FN(Affine) FN(split)(double mean, double scale) {
    const FN(Affine) a = {(REAL)mean, (REAL)scale, (REAL)(((double)(REAL)mean - mean) * scale)};
    return a;
}

INLINE FN(Affine) FN(affine)(const SiteBuffers *site, long lane) {
    return FN(split)(site->norm == NORM_MOMENTS ? site->mu[lane] : 0.0, site->scale[lane]);
}

/* Return true if a site has statistics over the rows; if every row has declared moments; and if rows are normalized before the
   work on single rows: with batch statistics or by a program. */
INLINE int FN(over_rows)(const SiteBuffers *site) { return site->norm == NORM_BATCH || site->norm == NORM_POPULATION; }
INLINE int FN(has_moments)(const SiteBuffers *site) { return site->norm == NORM_MOMENTS || site->norm == NORM_MEAN_SQUARE; }
INLINE int FN(is_ahead)(const SiteBuffers *site) { return FN(over_rows)(site) || site->norm == NORM_TRACED; }

/* Normalize a whole row: out = N(x). */
static void FN(normed_row)(const SiteBuffers *site, long lane, const REAL *x, REAL *out) {
    const long width = site->features / site->groups;
    for (long g = 0; g < site->groups; g++) {
        const FN(Side) side = {.x = x, .gain = site->gain, .shift = site->shift, .by = {FN(affine)(site, lane + g)}};
        for (long i = g * width; i < (g + 1) * width; i += VL) {
            const long n = (g + 1) * width - i;
            FN(store)(out + i, FN(normed)(&side, 0, i, n), n);
        }
    }
}

/* Return the normalization of row r for a site with `gates` gates. If groups are not gates, the row is first normalized into
   `spare`. */
INLINE FN(Side) FN(side)(const SiteBuffers *site, long t, long r, long gates, const REAL *x, FN(Plain) plain, REAL *spare) {
    FN(Side) side = {.x = x, .gain = site->gain, .shift = site->shift, .by = {{0, 1, 0}, {0, 1, 0}, {0, 1, 0}, {0, 1, 0}}};
    const long lane = t * site->lanes + r * site->groups;
    const int affine = FN(has_moments)(site);
    if (affine && site->groups == 1) {
        side.by[0] = side.by[1] = side.by[2] = side.by[3] = FN(affine)(site, lane);
    } else if (affine && site->groups == gates) {
        for (long g = 0; g < gates; g++) side.by[g] = FN(affine)(site, lane + g);
    } else {
        side.gain = plain.ones;
        side.shift = plain.zeros;
        if (FN(is_ahead)(site)) side.x = spare;
        else if (affine) {
            FN(normed_row)(site, lane, x, spare);
            side.x = spare;
        }
    }
    return side;
}

/* Compute the statistics of a block's rows at step t, and pool them. */
static void FN(state)(const SiteBuffers *site, long t, long rows, const REAL *x, long ldx) {
    const long at = (site->prefix + t) * site->lanes;
    for (long r = 0; r < rows; r++) FN(measure)(site, x + r * ldx, site->mean + at + r * site->groups, site->var + at + r * site->groups);
    for (long l = rows * site->groups; l < site->lanes; l++) site->mean[at + l] = site->var[at + l] = 0.0;
    FN(pool)(site, t);
}

/* For one or two sites with the same gradient dy, and one group of one row: compute the gradient of each pooled statistic, and
   add to the sums of gain and shift. Both sites share one sum of shifts. */
INLINE void FN(denormalize)(const int sides, const SiteBuffers *const *site, const long *lane, long start, long end, const REAL *const *x, const REAL *dy,
                            REAL *const *dgain, REAL *dshift) {
    FN(Affine) by[2];
    double first[2] = {0}, second[2] = {0};
    for (int s = 0; s < sides; s++) by[s] = FN(affine)(site[s], lane[s]);
    for (long from = start; from < end; from += 16 * VL) {
        const long until = from + 16 * VL < end ? from + 16 * VL : end;
        FN(vec) ones[2] = {{0}}, products[2] = {{0}};
        for (long i = from; i < until; i += VL) {
            const long n = until - i;
            const FN(vec) d = FN(load)(dy + i, n);
            FN(store)(dshift + i, FN(load)(dshift + i, n) + d, n);
            for (int s = 0; s < sides; s++) {
                const FN(vec) normal = (FN(load)(x[s] + i, n) - by[s].high) * by[s].scale + by[s].rest;
                const FN(vec) w = d * FN(load)((const REAL *)site[s]->gain + i, n);
                FN(store)(dgain[s] + i, FN(load)(dgain[s] + i, n) + d * normal, n);
                ones[s] += w; /* beyond the end d is 0 */
                products[s] += w * normal;
            }
        }
        for (int s = 0; s < sides; s++) FN(totals)(ones[s], products[s], &first[s], &second[s]);
    }
    for (int s = 0; s < sides; s++) {
        const double scale = site[s]->scale[lane[s]];
        site[s]->dmu[lane[s]] += site[s]->norm == NORM_MOMENTS ? -scale * first[s] : 0.0;
        site[s]->dv[lane[s]] += -0.5 * scale * scale * second[s];
    }
}

/* Then through their statistics: dx = w / deviation + the gradient through the statistic of the step. dy may be the first dx. */
INLINE void FN(unmeasure)(const int sides, const SiteBuffers *const *site, const long *lane, const long *own, long start, long end, const REAL *const *x,
                          const REAL *dy, REAL *const *dx) {
    FN(Affine) by[2]; /* added term: slope * (x - mean) + level */
    REAL scale[2];
    for (int s = 0; s < sides; s++) {
        const int centred = site[s]->norm == NORM_MOMENTS;
        const double width = (double)(end - start);
        by[s] = FN(split)(centred ? site[s]->mean[own[s]] : 0.0, 2.0 * site[s]->dvar[own[s]] / width);
        if (centred) by[s].rest += (REAL)(site[s]->dmean[own[s]] / width);
        scale[s] = (REAL)site[s]->scale[lane[s]];
    }
    for (long i = start; i < end; i += VL) {
        const long n = end - i;
        const FN(vec) d = FN(load)(dy + i, n);
        for (int s = 0; s < sides; s++) {
            const FN(vec) w = d * FN(load)((const REAL *)site[s]->gain + i, n);
            FN(store)(dx[s] + i, w * scale[s] + ((FN(load)(x[s] + i, n) - by[s].high) * by[s].scale + by[s].rest), n);
        }
    }
}

/* Sums for gain and shift over the rows of one block and chunk of steps, and the rows of one site at one step. */
typedef struct { REAL *dgain, *dshift; } FN(Sums);
typedef struct { const SiteBuffers *line; const REAL *x; long ldx; REAL *dx; FN(Sums) sums; } FN(SiteGrads);

/* Backward through `sides` sites of a block that share dy [rows, F] and have equal numbers of groups; rows of dy and dx are ldd
   apart. */
INLINE void FN(sites_back)(const int sides, const FN(SiteGrads) *grads, long steps, long t, long rows, const REAL *dy, long ldd) {
    const SiteBuffers *line[2] = {grads[0].line, grads[sides - 1].line};
    REAL *dgain[2] = {grads[0].sums.dgain, grads[sides - 1].sums.dgain};
    const long F = line[0]->features, G = line[0]->groups, width = F / G;
    for (long r = 0; r < rows; r++)
        for (long g = 0; g < G; g++) {
            const REAL *x[2] = {grads[0].x + r * grads[0].ldx, grads[sides - 1].x + r * grads[sides - 1].ldx};
            const long lane[2] = {t * line[0]->lanes + r * G + g, t * line[1]->lanes + r * G + g};
            FN(denormalize)(sides, line, lane, g * width, (g + 1) * width, x, dy + r * ldd, dgain, grads[0].sums.dshift);
        }
    for (int s = 0; s < sides; s++) FN(unpool)(line[s], steps, t);
    for (long r = 0; r < rows; r++)
        for (long g = 0; g < G; g++) {
            const REAL *x[2] = {grads[0].x + r * grads[0].ldx, grads[sides - 1].x + r * grads[sides - 1].ldx};
            REAL *dx[2] = {grads[0].dx + r * ldd, grads[sides - 1].dx + r * ldd};
            const long lane[2] = {t * line[0]->lanes + r * G + g, t * line[1]->lanes + r * G + g};
            const long own[2] = {lane[0] + line[0]->prefix * line[0]->lanes, lane[1] + line[1]->prefix * line[1]->lanes};
            FN(unmeasure)(sides, line, lane, own, g * width, (g + 1) * width, x, dy + r * ldd, dx);
        }
}

static void FN(pair_back)(const FN(SiteGrads) *grads, long steps, long t, long rows, const REAL *dy, long ldd) {
    FN(sites_back)(2, grads, steps, t, rows, dy, ldd);
}

/* Backward through one site; without a norm of single rows dy is passed on. Rows of x are contiguous. */
static void FN(site_back)(FN(SiteGrads) grads, long steps, long t, long rows, const REAL *dy, long ldd) {
    if (FN(has_moments)(grads.line)) FN(sites_back)(1, &grads, steps, t, rows, dy, ldd);
    else
        for (long r = 0; r < rows && grads.dx != dy; r++) FN(copy)(grads.dx + r * ldd, dy + r * ldd, grads.ldx);
}

/* Return true if both products of a cell have the same gradient and both sites can share one backward pass. */
INLINE int FN(paired)(const Work *work) {
    const SiteBuffers *ih = work->site + SITE_IH, *hh = work->site + SITE_HH;
    return work->cell != CELL_GRU && FN(has_moments)(ih) && FN(has_moments)(hh) && ih->groups == hh->groups;
}
