/* Statements of steps, and windows over them. Everything here is double and runs over the lanes of one block of rows
   (lane = row * groups + group), which lie side by side so that the compiler can take many at a time.

   A window is never updated by subtracting: it is summed afresh, or merged from parts that are. */

#define SUMS 16 /* running sums side by side, so that none waits for the one before it; always the same ones */

static inline double FN(total)(const double *sums) {
    double all = 0.0;
    for (int j = 0; j < SUMS; j++) all += sums[j];
    return all;
}

/* The pooled statement of step t from lane `from` on: v = sum of shares * (own variance + (own mean - pooled mean)^2). */
static void FN(pool_window)(const Line *site, long batch, long t, long from, long count) {
    const long lanes = batch * site->groups, groups = site->groups, prefix = site->prefix;
    double *restrict mu = site->mu + t * lanes + from, *restrict v = site->v + t * lanes + from;
    double *restrict share = site->share + t * lanes + from;
    const double *restrict now_mean = site->mean + (prefix + t) * lanes + from;
    const double *restrict now_var = site->var + (prefix + t) * lanes + from;
    if (site->window == WINDOW_DECAYING) {
        const double *restrict mean = t ? mu - lanes : site->mean + from, *restrict var = t ? v - lanes : site->var + from;
        for (long l = 0; l < count; l++) {
            const double before = t ? 1.0 / share[l - lanes] : site->weight[(from + l) / groups];
            const double total = before * site->decay + 1.0, now = 1.0 / total, past = before * site->decay / total;
            const double old_mean = past > 0.0 ? mean[l] : 0.0, old_var = past > 0.0 ? var[l] : 0.0;
            const double m = past * old_mean + now * now_mean[l];
            const double a = old_mean - m, b = now_mean[l] - m;
            mu[l] = m;
            v[l] = past * (old_var + a * a) + now * (now_var[l] + b * b);
            share[l] = now;
        }
        return;
    }
    if (prefix == 0) {
        for (long l = 0; l < count; l++) { mu[l] = now_mean[l]; v[l] = now_var[l]; share[l] = 1.0; }
        return;
    }
    double total[BLOCK_LANES], mean[BLOCK_LANES], spread[BLOCK_LANES], weight[BLOCK_LANES];
    for (long l = 0; l < count; l++) total[l] = mean[l] = spread[l] = 0.0;
    for (int second = 0; second < 2; second++) {
        for (long j = t > site->hidden ? t : site->hidden; j <= t + prefix; j++) {
            const double *restrict m = site->mean + j * lanes + from, *restrict var = site->var + j * lanes + from;
            if (j < prefix) { /* the state's own statements, which may be hidden by a weight of 0 */
                for (long l = 0; l < count; l++) weight[l] = site->weight[j * batch + (from + l) / groups];
                for (long l = 0; l < count; l++) {
                    const double w = weight[l], m_l = w > 0.0 ? m[l] : 0.0, v_l = w > 0.0 ? var[l] : 0.0;
                    if (second) spread[l] += w * (v_l + (m_l - mean[l]) * (m_l - mean[l]));
                    else { total[l] += w; mean[l] += w * m_l; }
                }
            } else if (second) {
                for (long l = 0; l < count; l++) spread[l] += var[l] + (m[l] - mean[l]) * (m[l] - mean[l]);
            } else {
                for (long l = 0; l < count; l++) { total[l] += 1.0; mean[l] += m[l]; }
            }
        }
        if (!second)
            for (long l = 0; l < count; l++) mean[l] /= total[l];
    }
    for (long l = 0; l < count; l++) { mu[l] = mean[l]; v[l] = spread[l] / total[l]; share[l] = 1.0 / total[l]; }
}

/* ... and what a deviation of it divides by. */
static void FN(pool)(const Line *site, long batch, long t, long from, long count) {
    FN(pool_window)(site, batch, t, from, count);
    const double eps = site->eps;
    const double *restrict v = site->v + t * batch * site->groups + from;
    double *restrict scale = site->scale + t * batch * site->groups + from;
#pragma omp simd
    for (long l = 0; l < count; l++) scale[l] = 1.0 / sqrt(v[l] + eps);
}

/* Gradient of step t's own statement, from those of every pooled statement it is in: dmean and dvar, added to what the
   final state asks of it. site->dmu and site->dv hold the local gradients of the pooled statements from t on. */
static void FN(unpool)(const Line *site, long batch, long steps, long t, long from, long count) {
    const long lanes = batch * site->groups, groups = site->groups, prefix = site->prefix;
    double *restrict dmean = site->dmean + (prefix + t) * lanes + from, *restrict dvar = site->dvar + (prefix + t) * lanes + from;
    const double *restrict own = site->mean + (prefix + t) * lanes + from;
    if (site->window == WINDOW_DECAYING) {
        double *restrict cmu = site->carry + from, *restrict cv = site->carry + lanes + from;
        const double *restrict dmu = site->dmu + t * lanes + from, *restrict dv = site->dv + t * lanes + from;
        const double *restrict mu = site->mu + t * lanes + from, *restrict share = site->share + t * lanes + from;
        const double *restrict before = t ? mu - lanes : site->mean + from;
        for (long l = 0; l < count; l++) {
            const double gm = dmu[l] + cmu[l], gv = dv[l] + cv[l], now = share[l], past = 1.0 - now;
            const int any = t || site->weight[(from + l) / groups] > 0.0;
            dmean[l] += now * (gm + 2.0 * gv * (own[l] - mu[l]));
            dvar[l] += now * gv;
            cmu[l] = any ? past * (gm + 2.0 * gv * (before[l] - mu[l])) : 0.0;
            cv[l] = any ? past * gv : 0.0;
        }
        return;
    }
    const long last = t + prefix < steps - 1 ? t + prefix : steps - 1;
    double sum_mean[BLOCK_LANES], sum_var[BLOCK_LANES];
    for (long l = 0; l < count; l++) sum_mean[l] = sum_var[l] = 0.0;
    for (long s = t; s <= last; s++) {
        const double *restrict dmu = site->dmu + s * lanes + from, *restrict dv = site->dv + s * lanes + from;
        const double *restrict mu = site->mu + s * lanes + from, *restrict share = site->share + s * lanes + from;
        for (long l = 0; l < count; l++) {
            sum_mean[l] += share[l] * (dmu[l] + 2.0 * dv[l] * (own[l] - mu[l]));
            sum_var[l] += share[l] * dv[l];
        }
    }
    for (long l = 0; l < count; l++) { dmean[l] += sum_mean[l]; dvar[l] += sum_var[l]; }
}

/* The gradient of the statements the given state brought, after step 0 has been worked back. */
static void FN(unpool_prefix)(const Line *site, long batch, long steps, long from, long count) {
    const long lanes = batch * site->groups, groups = site->groups, prefix = site->prefix;
    if (site->window == WINDOW_DECAYING) {
        for (long l = from; l < from + count; l++) { site->dmean[l] += site->carry[l]; site->dvar[l] += site->carry[lanes + l]; }
        return;
    }
    for (long j = site->hidden; j < prefix; j++)
        for (long l = from; l < from + count; l++) {
            const double w = site->weight[j * batch + l / groups];
            double sum_mean = 0.0, sum_var = 0.0;
            if (w > 0.0)
                for (long s = 0; s <= j && s < steps; s++) {
                    const long at = s * lanes + l;
                    sum_mean += site->share[at] * (site->dmu[at] + 2.0 * site->dv[at] * (site->mean[j * lanes + l] - site->mu[at]));
                    sum_var += site->share[at] * site->dv[at];
                }
            site->dmean[j * lanes + l] += w * sum_mean;
            site->dvar[j * lanes + l] += w * sum_var;
        }
}

/* Own statement of every group of one row of pre-activations: mean and biased variance, or mean square. Sums are double,
   taken from a value of the row itself, which loses nothing: its distance to the mean is at most F deviations. */
static void FN(measure)(const Line *site, const REAL *restrict x, double *restrict mean, double *restrict var) {
    const long width = site->features / site->groups;
    for (long g = 0; g < site->groups; g++, x += width) {
        const double pivot = site->norm == NORM_MOMENTS ? (double)x[0] : 0.0;
        double first[SUMS] = {0}, second[SUMS] = {0};
        long i = 0;
        for (; i + SUMS <= width; i += SUMS)
#pragma omp simd
            for (long j = 0; j < SUMS; j++) {
                const double d = (double)x[i + j] - pivot;
                first[j] += d;
                second[j] += d * d;
            }
#pragma omp simd
        for (long j = 0; j < width - i; j++) {
            const double d = (double)x[i + j] - pivot;
            first[j] += d;
            second[j] += d * d;
        }
        const double offset = FN(total)(first) / (double)width, square = FN(total)(second) / (double)width;
        const double spread = square - (site->norm == NORM_MOMENTS ? offset * offset : 0.0);
        mean[g] = site->norm == NORM_MOMENTS ? pivot + offset : 0.0;
        var[g] = spread < 0.0 ? 0.0 : spread; /* keeps NaN */
    }
}
