/* States in and out: from the caller's layout, rows first, to the timeline's, time first, and back. */

#include <stdlib.h>
#include <string.h>

#include "blocks.h"

int64_t atn_norms_timeline(int64_t prefix, int64_t steps, int64_t batch, int64_t groups) {
    return prefix * batch + 2 * (prefix + steps) * batch * groups + 4 * steps * batch * groups;
}

static int64_t live(const Work *work, int64_t row) { return work->call->lengths ? work->call->lengths[row] : work->steps; }

static void bring_in(const Work *work, Line *line, const Site *site) {
    const int64_t B = work->batch, G = line->groups, P = line->prefix;
    if (site->state[0] == NULL) {
        memset(line->weight, 0, (size_t)(P * B) * sizeof(double));
        memset(line->mean, 0, (size_t)(P * B * G) * sizeof(double));
        memset(line->var, 0, (size_t)(P * B * G) * sizeof(double));
        return;
    }
    double *own[3] = {line->weight, line->mean, line->var};
    for (int leaf = 0; leaf < 3; leaf++) {
        const int64_t width = leaf ? G : 1;
        for (int64_t b = 0; b < B; b++)
            for (int64_t j = 0; j < P; j++)
                for (int64_t g = 0; g < width; g++)
                    own[leaf][(j * B + b) * width + g] = site->state[leaf] ? site->state[leaf][(b * P + j) * width + g] : 0.0;
    }
}

/* How many statements of the prefix no row has seen, from the oldest on. */
static void hide(const Work *work, Line *line) {
    line->hidden = line->prefix;
    for (int64_t j = line->prefix - 1; j >= 0; j--)
        for (int64_t b = 0; b < work->batch; b++)
            if (line->weight[j * work->batch + b] > 0.0) line->hidden = j;
}

static void lay_out(Work *work, Line *line, const Site *site) {
    const int64_t own = (site->prefix + work->steps) * work->batch * site->groups, pooled = work->steps * work->batch * site->groups;
    line->norm = site->norm;
    line->window = site->window;
    line->features = site->features;
    line->groups = site->groups;
    line->prefix = site->prefix;
    line->decay = site->decay;
    line->eps = site->eps;
    line->gain = site->gain;
    line->shift = site->shift;
    line->weight = site->timeline;
    line->mean = line->weight + site->prefix * work->batch;
    line->var = line->mean + own;
    line->mu = line->var + own;
    line->v = line->mu + pooled;
    line->share = line->v + pooled;
    line->scale = line->share + pooled;
}

/* What is asked of the state that follows, put where the statements it is made of lie. */
static void ask(const Work *work, Line *line, const Site *site) {
    const int64_t B = work->batch, G = line->groups, P = line->prefix;
    double *own[3] = {NULL, line->dmean, line->dvar}, *pooled[3] = {NULL, line->dmu, line->dv};
    for (int leaf = 1; leaf < 3; leaf++) {
        if (site->dnext[leaf] == NULL) continue;
        for (int64_t b = 0; b < B; b++) {
            const int64_t last = live(work, b);
            for (int64_t j = 0; j < P; j++)
                for (int64_t g = 0; g < G; g++) {
                    const double d = site->dnext[leaf][(b * P + j) * G + g];
                    if (line->window == WINDOW_SLIDING) own[leaf][((last + j) * B + b) * G + g] = d;
                    else if (last > 0) pooled[leaf][((last - 1) * B + b) * G + g] = d;
                    else own[leaf][b * G + g] = d; /* no step happened: the given state is the one that follows */
                }
        }
    }
}

int atn_norms_begin(Work *work, const Call *call, int backward) {
    const int64_t blocks = atn_norms_blocks(call->batch);
    memset(work, 0, sizeof *work);
    work->cell = call->cell;
    work->threads = call->threads;
    work->steps = call->steps;
    work->batch = call->batch;
    work->inputs = call->inputs;
    work->hidden = call->hidden;
    work->call = call;
    for (int s = 0; s < SITES; s++) {
        const Site *site = call->site + s;
        Line *line = work->site + s;
        if (site->norm == NORM_NONE) continue;
        lay_out(work, line, site);
        if (!backward) {
            bring_in(work, line, site);
            hide(work, line);
            continue;
        }
        hide(work, line);
        const size_t lanes = (size_t)(call->batch * line->groups), own = (size_t)(line->prefix + call->steps) * lanes;
        const size_t pooled = (size_t)call->steps * lanes, sums = (size_t)(blocks * line->features);
        double *room = calloc(2 * own + 2 * pooled + 2 * lanes + 2 * sums, sizeof(double));
        if (!room) {
            atn_norms_end(work, -1, 0);
            return 1;
        }
        line->dmean = room;
        line->dvar = line->dmean + own;
        line->dmu = line->dvar + own;
        line->dv = line->dmu + pooled;
        line->carry = line->dv + pooled;
        line->dgain = line->carry + 2 * lanes;
        line->dshift = line->dgain + sums;
        ask(work, line, site);
    }
    return 0;
}

static void hand_on(const Work *work, const Line *line, const Site *site) {
    const int64_t B = work->batch, G = line->groups, P = line->prefix;
    for (int64_t b = 0; b < B; b++) {
        const int64_t last = live(work, b);
        for (int64_t j = 0; j < P; j++) {
            const int64_t at = last + j;
            if (line->window == WINDOW_SLIDING) site->next[0][b * P + j] = at < P ? line->weight[at * B + b] : 1.0;
            else site->next[0][b] = last > 0 ? 1.0 / line->share[((last - 1) * B + b) * G] : line->weight[b];
            for (int64_t g = 0; g < G; g++) {
                const int64_t to = (b * P + j) * G + g;
                const int64_t from = line->window == WINDOW_SLIDING ? (at * B + b) * G + g : ((last - 1) * B + b) * G + g;
                const int stay = line->window == WINDOW_DECAYING && last == 0;
                const double *mean = line->window == WINDOW_SLIDING || stay ? line->mean : line->mu;
                const double *var = line->window == WINDOW_SLIDING || stay ? line->var : line->v;
                if (site->next[1]) site->next[1][to] = mean[stay ? b * G + g : from];
                site->next[2][to] = var[stay ? b * G + g : from];
            }
        }
    }
}

static void hand_back(const Work *work, const Line *line, const Site *site, int is_double) {
    const int64_t B = work->batch, G = line->groups, P = line->prefix, blocks = atn_norms_blocks(B);
    const double *own[3] = {NULL, line->dmean, line->dvar};
    for (int leaf = 1; leaf < 3; leaf++)
        for (int64_t b = 0; b < B && site->dstate[leaf]; b++)
            for (int64_t j = 0; j < P; j++)
                for (int64_t g = 0; g < G; g++) site->dstate[leaf][(b * P + j) * G + g] = own[leaf][(j * B + b) * G + g];
    for (int64_t i = 0; i < line->features; i++) {
        double gain = 0.0, shift = 0.0;
        for (int64_t block = 0; block < blocks; block++) {
            gain += line->dgain[block * line->features + i];
            shift += line->dshift[block * line->features + i];
        }
        if (is_double) {
            ((double *)site->dgain)[i] = gain;
            ((double *)site->dshift)[i] = shift;
        } else {
            ((float *)site->dgain)[i] = (float)gain;
            ((float *)site->dshift)[i] = (float)shift;
        }
    }
}

void atn_norms_end(Work *work, int backward, int is_double) {
    for (int s = 0; s < SITES; s++) {
        Line *line = work->site + s;
        if (line->norm == NORM_NONE) continue;
        if (backward == 0) hand_on(work, line, work->call->site + s);
        else if (backward == 1) hand_back(work, line, work->call->site + s, is_double);
        free(line->dmean);
    }
}
