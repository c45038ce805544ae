/* Statistics of steps, and windows over them. Statistics are double. They are stored by lanes (lane = row * groups + group) of
   one block of rows, which are contiguous and fill whole vectors.

   No window is updated by subtraction. A sliding window of k steps is split at a boundary, and boundaries are k steps apart.
   The part before the boundary was merged backwards from it when the boundary was reached. The part after it is merged step by
   step. A window is the merge of both parts. So a step costs three merges for any k, and every merge covers exactly the steps
   of the window. */

#define LANES _Pragma("omp simd") for (long l = 0; l < lanes; l++)

/* Merge the statistics a (weight wa) and b (weight wb > 0) into a; a statistic of weight 0 is masked, even if it is NaN. */
#define MERGE(wa, mean_a, var_a, wb, mean_b, var_b)                                                      \
    do {                                                                                                 \
        const double all_ = (wa) + (wb), pb_ = (wb) / all_, pa_ = (wa) / all_;                             \
        const double old_mean_ = (wa) > 0.0 ? (mean_a) : (mean_b), old_var_ = (wa) > 0.0 ? (var_a) : 0.0;    \
        const double apart_ = (mean_b) - old_mean_;                                                      \
        (mean_a) = old_mean_ + pb_ * apart_;                                                             \
        (var_a) = pa_ * (old_var_ + pb_ * apart_ * apart_) + pb_ * (var_b);                                \
    } while (0)

/* Before the first step of a stretch of k steps: set entry i of `late` to the merge of the statistics i to prefix - 1 of the k
   - 1 steps before the stretch. */
static void FN(merge_late)(const SiteBuffers *site, long t) {
    const long lanes = site->lanes, prefix = site->prefix, size = prefix * lanes;
    for (long i = prefix - 1; i >= (t ? 0 : site->hidden); i--) {
        const long at = t + i;
        const double *restrict mean = site->mean + at * lanes, *restrict var = site->var + at * lanes;
        double *restrict w = site->late + i * lanes, *restrict m = w + size, *restrict v = m + size;
        const double *restrict past_w = w + lanes, *restrict past_m = m + lanes, *restrict past_v = v + lanes;
        if (at < prefix) { /* statistics of the state, which a weight of 0 may mask */
            const double *restrict given = site->weight + at * lanes;
            const int last = i == prefix - 1;
            LANES {
                const double own = given[l];
                double past = last ? 0.0 : past_w[l], pm = last ? 0.0 : past_m[l], pv = last ? 0.0 : past_v[l];
                if (own > 0.0) MERGE(past, pm, pv, own, mean[l], var[l]);
                w[l] = past + own; m[l] = pm; v[l] = pv;
            }
            continue;
        }
        const double own = site->counts ? site->counts[at - prefix] : 1.0;
        if (i == prefix - 1) {
            LANES { w[l] = own; m[l] = mean[l]; v[l] = var[l]; }
        } else {
            LANES {
                double past = past_w[l], pm = past_m[l], pv = past_v[l];
                MERGE(past, pm, pv, own, mean[l], var[l]);
                w[l] = past + own; m[l] = pm; v[l] = pv;
            }
        }
    }
}

/* The weight of the statistic `place` in every lane: from the state before the first step, otherwise that of the step. */
#define WEIGHT_AT(site, place, lanes) \
    ((place) < (site)->prefix ? (site)->weight[(place) * (lanes) + l] : (site)->counts ? (site)->counts[(place) - (site)->prefix] : 1.0)

/* Pool step t in a window with weights by age: two sums over the steps with a weight, around the mean. If every weight is 0,
   the result is 0, as in the reference. */
static void FN(pool_weighted)(const SiteBuffers *site, long t) {
    const long lanes = site->lanes, prefix = site->prefix, at = t * lanes;
    double *restrict mu = site->mu + at, *restrict v = site->v + at, *restrict share = site->share + at, *restrict scale = site->scale + at;
    LANES { mu[l] = v[l] = share[l] = 0.0; }
    for (int pass = 0; pass < 3; pass++) {
        for (long age = prefix; age >= 0; age--) {
            const double tap = site->taps[age];
            const long place = prefix + t - age;
            const double *restrict mean = site->mean + place * lanes, *restrict var = site->var + place * lanes;
            if (tap == 0.0) continue;
            LANES {
                const double weight = tap * WEIGHT_AT(site, place, lanes), apart = mean[l] - mu[l];
                if (pass == 0) share[l] += weight;
                else if (pass == 1) mu[l] += weight > 0.0 ? weight * share[l] * mean[l] : 0.0;
                else v[l] += weight > 0.0 ? weight * share[l] * (var[l] + apart * apart) : 0.0;
            }
        }
        if (pass == 0) LANES { share[l] = share[l] > 0.0 ? 1.0 / share[l] : 1.0; }
    }
    LANES { scale[l] = 1.0 / sqrt(v[l] + site->eps[l]); }
}

/* Pool the steps before step t, or step t alone if there are none; and keep the statistic of the steps up to step t for the
   next step. */
static void FN(pool_past)(const SiteBuffers *site, long t) {
    const long lanes = site->lanes, at = t * lanes;
    const double decay = site->decay, *restrict eps = site->eps;
    const double *restrict own_mean = site->mean + lanes + at, *restrict own_var = site->var + lanes + at;
    double *restrict mu = site->mu + at, *restrict v = site->v + at, *restrict total = site->share + at, *restrict scale = site->scale + at;
    if (t == 0) LANES { mu[l] = site->mean[l]; v[l] = site->var[l]; total[l] = site->weight[l]; }
    LANES {
        const double past = total[l] * decay;
        double mean = mu[l], var = v[l];
        MERGE(past, mean, var, 1.0, own_mean[l], own_var[l]);
        mu[lanes + l] = mean;
        v[lanes + l] = var;
        total[lanes + l] = past + 1.0;
        mu[l] = total[l] > 0.0 ? mu[l] : own_mean[l];
        v[l] = total[l] > 0.0 ? v[l] : own_var[l];
        scale[l] = 1.0 / sqrt(v[l] + eps[l]);
    }
}

/* Backward through step t of such a window. On entry `carry` holds the gradient of the statistic of all steps up to t, on
   return that of the steps before t. */
static void FN(unpool_past)(const SiteBuffers *site, long steps, long t) {
    const long lanes = site->lanes, at = t * lanes;
    const double *restrict own = site->mean + lanes + at, *restrict mu = site->mu + at, *restrict after = mu + lanes, *restrict total = site->share + at;
    const double *restrict dmu = site->dmu + at, *restrict dv = site->dv + at;
    double *restrict dmean = site->dmean + lanes + at, *restrict dvar = site->dvar + lanes + at, *restrict sum_mean = site->carry, *restrict sum_var = site->carry + lanes;
    if (t == steps - 1) LANES { sum_mean[l] = dmu[lanes + l]; sum_var[l] = dv[lanes + l]; }
    LANES {
        const double before = total[l] * site->decay, now = 1.0 / (before + 1.0), past = before * now, gm = sum_mean[l], gv = sum_var[l];
        const int any = total[l] > 0.0;
        dmean[l] += now * (gm + (gv != 0.0 ? 2.0 * gv * (own[l] - after[l]) : 0.0)) + (any ? 0.0 : dmu[l]);
        dvar[l] += now * gv + (any ? 0.0 : dv[l]);
        sum_mean[l] = any ? past * (gm + (gv != 0.0 ? 2.0 * gv * (mu[l] - after[l]) : 0.0)) + dmu[l] : 0.0;
        sum_var[l] = any ? past * gv + dv[l] : 0.0;
        if (site->detached) sum_mean[l] = sum_var[l] = 0.0;
    }
}

/* Add the gradient of the statistic pooled at step t to the gradients of all statistics in its window. */
static void FN(unpool_weighted)(const SiteBuffers *site, long t) {
    const long lanes = site->lanes, prefix = site->prefix, at = t * lanes;
    const double *restrict mu = site->mu + at, *restrict share = site->share + at, *restrict dmu = site->dmu + at, *restrict dv = site->dv + at;
    for (long age = site->detached ? 0 : prefix; age >= 0; age--) {
        const double tap = site->taps[age];
        const long place = prefix + t - age;
        const double *restrict mean = site->mean + place * lanes;
        double *restrict dmean = site->dmean + place * lanes, *restrict dvar = site->dvar + place * lanes;
        if (tap == 0.0) continue;
        LANES {
            const double part = tap * WEIGHT_AT(site, place, lanes) * share[l];
            if (part > 0.0) {
                dmean[l] += part * (dmu[l] + (dv[l] != 0.0 ? 2.0 * dv[l] * (mean[l] - mu[l]) : 0.0));
                dvar[l] += part * dv[l];
            }
        }
    }
}

#undef WEIGHT_AT

/* Pool step t, and compute 1 / sqrt(v + eps). */
static void FN(pool)(const SiteBuffers *site, long t) {
    const long lanes = site->lanes, prefix = site->prefix, at = t * lanes;
    const double count = site->counts ? site->counts[t] : 1.0, *restrict eps = site->eps;
    double *restrict mu = site->mu + at, *restrict v = site->v + at, *restrict share = site->share + at, *restrict scale = site->scale + at;
    const double *restrict now_mean = site->mean + prefix * lanes + at, *restrict now_var = site->var + prefix * lanes + at;
    if (site->window == WINDOW_WEIGHTED || site->window == WINDOW_PAST) {
        if (site->window == WINDOW_PAST) FN(pool_past)(site, t);
        else FN(pool_weighted)(site, t);
        return;
    }
    if (site->window == WINDOW_DECAYING) {
        const double decay = site->decay;
        const double *restrict mean = t ? mu - lanes : site->mean, *restrict var = t ? v - lanes : site->var;
        const double *restrict before = t ? share - lanes : site->weight;
        LANES {
            const double past = (t ? 1.0 / before[l] : before[l]) * decay;
            double m = mean[l], s = var[l];
            MERGE(past, m, s, count, now_mean[l], now_var[l]);
            mu[l] = m; v[l] = s;
            share[l] = 1.0 / (past + count);
            scale[l] = 1.0 / sqrt(s + eps[l]);
        }
        return;
    }
    if (prefix == 0) {
        const double only = 1.0 / count;
        LANES { mu[l] = now_mean[l]; v[l] = now_var[l]; share[l] = only; scale[l] = 1.0 / sqrt(now_var[l] + eps[l]); }
        return;
    }
    const long since = t % (prefix + 1), i = t <= prefix && since < site->hidden ? site->hidden : since;
    double *restrict run_mean = site->run, *restrict run_var = site->run + lanes, weight = count;
    if (since == 0) {
        FN(merge_late)(site, t);
        LANES { run_mean[l] = now_mean[l]; run_var[l] = now_var[l]; }
    } else {
        const double past = site->run[2 * lanes];
        weight += past;
        LANES MERGE(past, run_mean[l], run_var[l], count, now_mean[l], now_var[l]);
    }
    site->run[2 * lanes] = weight;
    if (i >= prefix) {
        const double only = 1.0 / weight;
        LANES { mu[l] = run_mean[l]; v[l] = run_var[l]; share[l] = only; scale[l] = 1.0 / sqrt(run_var[l] + eps[l]); }
        return;
    }
    const double *restrict w = site->late + i * lanes, *restrict late_mean = w + prefix * lanes, *restrict late_var = late_mean + prefix * lanes;
    LANES {
        double m = late_mean[l], s = late_var[l];
        MERGE(w[l], m, s, weight, run_mean[l], run_var[l]);
        mu[l] = m; v[l] = s;
        share[l] = 1.0 / (w[l] + weight);
        scale[l] = 1.0 / sqrt(s + eps[l]);
    }
}

/* The reference point for the gradients of the windows of one stretch: a mean of the stretch, or 0 if that mean is not finite. */
INLINE double FN(around)(double mu) { return mu - mu == 0.0 ? mu : 0.0; }

INLINE long FN(last_of_stretch)(const SiteBuffers *site, long steps, long t) {
    const long k = site->prefix + 1, last = t - t % k + k - 1;
    return last < steps ? last : steps - 1;
}

/* Compute the gradient of the statistic of step t from the gradients of every pooled statistic that contains it: dmean and
   dvar, added to the gradient of the final state. site->dmu and site->dv hold the gradients of the statistics pooled at step t
   and before. For later steps of the current stretch of a sliding window they hold G and Q. Then dL/dmean_s is the sum over the
   windows of s of G + 2 Q (mean_s - around), and dL/dvar_s the sum of Q. For later stretches they hold the sums of G and Q from
   the start of the stretch on. */
static void FN(unpool)(const SiteBuffers *site, long steps, long t) {
    const long lanes = site->lanes, prefix = site->prefix, at = t * lanes;
    const double count = site->counts ? site->counts[t] : 1.0;
    double *restrict dmean = site->dmean + prefix * lanes + at, *restrict dvar = site->dvar + prefix * lanes + at;
    const double *restrict own = site->mean + prefix * lanes + at, *restrict mu = site->mu + at, *restrict share = site->share + at;
    double *restrict dmu = site->dmu + at, *restrict dv = site->dv + at;
    double *restrict sum_mean = site->carry, *restrict sum_var = site->carry + lanes;
    if (site->window == WINDOW_WEIGHTED || site->window == WINDOW_PAST) {
        if (site->window == WINDOW_PAST) FN(unpool_past)(site, steps, t);
        else FN(unpool_weighted)(site, t);
        return;
    }
    if (site->detached) {
        LANES {
            const double now = count * share[l], gm = dmu[l], gv = dv[l];
            dmean[l] += now * (gm + (gv != 0.0 ? 2.0 * gv * (own[l] - mu[l]) : 0.0));
            dvar[l] += now * gv;
        }
        return;
    }
    if (site->window == WINDOW_DECAYING) {
        const double *restrict before = t ? mu - lanes : site->mean, *restrict given = site->weight;
        LANES {
            const double gm = dmu[l] + sum_mean[l], gv = dv[l] + sum_var[l], now = count * share[l], past = 1.0 - now;
            const int any = t || given[l] > 0.0;
            dmean[l] += now * (gm + 2.0 * gv * (own[l] - mu[l]));
            dvar[l] += now * gv;
            sum_mean[l] = any ? past * (gm + 2.0 * gv * (before[l] - mu[l])) : 0.0;
            sum_var[l] = any ? past * gv : 0.0;
        }
        return;
    }
    if (prefix == 0) {
        LANES { dmean[l] += dmu[l] + (dv[l] != 0.0 ? 2.0 * dv[l] * (own[l] - mu[l]) : 0.0); dvar[l] += dv[l]; }
        return;
    }
    const long last = FN(last_of_stretch)(site, steps, t), start = t - t % (prefix + 1);
    const double *restrict centre = site->mu + last * lanes;
    const int fresh = t == last, beyond = last + 1 < steps && t > start;
    LANES {
        const double q = share[l] * dv[l], g = share[l] * dmu[l] - (q != 0.0 ? 2.0 * q * (mu[l] - FN(around)(centre[l])) : 0.0);
        dmu[l] = g;
        dv[l] = q;
        const double all_g = fresh ? g : sum_mean[l] + g, all_q = fresh ? q : sum_var[l] + q;
        sum_mean[l] = all_g;
        sum_var[l] = all_q;
        dmean[l] += count * (all_g + (all_q != 0.0 ? 2.0 * all_q * (own[l] - FN(around)(centre[l])) : 0.0));
        dvar[l] += count * all_q;
    }
    if (beyond) { /* windows that end in the next stretch */
        const long end = t + prefix < steps ? t + prefix : steps - 1;
        const double *restrict next_g = site->dmu + end * lanes, *restrict next_q = site->dv + end * lanes;
        const double *restrict next_centre = site->mu + FN(last_of_stretch)(site, steps, last + 1) * lanes;
        LANES {
            const double q = next_q[l];
            dmean[l] += count * (next_g[l] + (q != 0.0 ? 2.0 * q * (own[l] - FN(around)(next_centre[l])) : 0.0));
            dvar[l] += count * q;
        }
    }
    if (t == start)
        for (long j = start + 1; j <= last; j++) {
            double *restrict g = site->dmu + j * lanes, *restrict q = site->dv + j * lanes;
            LANES { g[l] += g[l - lanes]; q[l] += q[l - lanes]; }
        }
}

/* Compute the gradient of the statistics in the initial state, after the backward pass of step 0. */
static void FN(unpool_prefix)(const SiteBuffers *site, long steps) {
    const long lanes = site->lanes, prefix = site->prefix;
    if (site->detached || site->window == WINDOW_WEIGHTED) return; /* no gradient reaches the initial state, or it is computed already */
    if (site->window == WINDOW_DECAYING || site->window == WINDOW_PAST) {
        LANES { site->dmean[l] += site->carry[l]; site->dvar[l] += site->carry[lanes + l]; }
        return;
    }
    for (long j = site->hidden; j < prefix; j++) {
        const long at = j * lanes, end = (j < steps ? j : steps - 1) * lanes;
        const double *restrict weight = site->weight + at, *restrict mean = site->mean + at, *restrict g = site->dmu + end, *restrict q = site->dv + end;
        const double *restrict centre = site->mu + FN(last_of_stretch)(site, steps, 0) * lanes;
        double *restrict dmean = site->dmean + at, *restrict dvar = site->dvar + at;
        for (long l = 0; l < lanes; l++) {
            if (!(weight[l] > 0.0)) continue;
            dmean[l] += weight[l] * (g[l] + (q[l] != 0.0 ? 2.0 * q[l] * (mean[l] - FN(around)(centre[l])) : 0.0));
            dvar[l] += weight[l] * q[l];
        }
    }
}

/* Sum x - pivot and its square, in double. */
static void FN(sums_in_double)(long width, const REAL *restrict x, double pivot, double *first, double *second) {
    double ones[16] = {0}, squares[16] = {0};
    long i = 0;
    for (; i + 16 <= width; i += 16)
#pragma omp simd
        for (long j = 0; j < 16; j++) {
            const double d = (double)x[i + j] - pivot;
            ones[j] += d;
            squares[j] += d * d;
        }
    for (long j = 0; j < width - i; j++) {
        const double d = (double)x[i + j] - pivot;
        ones[j] += d;
        squares[j] += d * d;
    }
    *first = *second = 0.0;
    for (int j = 0; j < 16; j++) { *first += ones[j]; *second += squares[j]; }
}

#if !IS_DOUBLE
/* Sum x - pivot and its square, in REAL over stretches of 16 vectors, and in double over the stretches. */
INLINE void FN(sums_in_real)(long width, const REAL *x, REAL pivot, double *first, double *second) {
    *first = *second = 0.0;
    for (long from = 0; from < width; from += 16 * VL) {
        const long end = from + 16 * VL < width ? from + 16 * VL : width;
        FN(vec) ones = {0}, squares = {0};
        for (long i = from; i < end; i += VL) {
            const FN(vec) d = FN(load_or)(x + i, end - i, pivot) - pivot;
            ones += d;
            squares += d * d;
        }
        FN(totals)(ones, squares, first, second);
    }
}
#endif

/* Compute the statistics of every group in one row of pre-activations: mean and biased variance, or mean square. Deviations are
   taken from a value near the mean. In float this is exact enough if the value is within one deviation of the mean and the
   squares are within the range of float. Other rows are summed in double, around one of their values. */
static void FN(measure)(const SiteBuffers *site, const REAL *restrict x, double *restrict mean, double *restrict var) {
    const long width = site->features / site->groups;
    const int centred = site->norm == NORM_MOMENTS;
    for (long g = 0; g < site->groups; g++, x += width) {
        double first = 0.0, second = 0.0, pivot = 0.0, offset = 0.0, spread = -1.0;
#if !IS_DOUBLE
        if (width >= 2 * VL) {
            REAL near = 0;
            if (centred) { /* the mean of eight elements */
                const REAL *middle = x + width / 2;
                near = (((x[0] + x[1]) + (middle[0] + middle[1])) + ((x[2] + x[3]) + (middle[2] + middle[3]))) * (REAL)0.125;
            }
            FN(sums_in_real)(width, x, near, &first, &second);
            if (!centred) first = 0.0;
            pivot = (double)near;
            offset = first / (double)width;
            spread = second / (double)width - offset * offset;
        }
#endif
        if (!(spread > 1e-30 && spread < 1e30 && offset * offset <= spread)) {
            pivot = centred ? (double)x[0] : 0.0;
            FN(sums_in_double)(width, x, pivot, &first, &second);
            offset = centred ? first / (double)width : 0.0;
            spread = second / (double)width - offset * offset;
        }
        mean[g] = pivot + offset;
        var[g] = spread < 0.0 ? 0.0 : spread; /* keeps NaN */
    }
}
