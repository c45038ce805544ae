/* States in and out: from the caller's layout, rows first, to the timeline's, time first, and back. */

#include <stdlib.h>
#include <string.h>

#include "blocks.h"

/* Doubles of one block: its share of the timeline, and of what either way needs beside it. */
static int64_t timeline_doubles(int64_t prefix, int64_t steps, int64_t lanes) { return lanes * (3 * prefix + 6 * steps); }

static int64_t forward_doubles(const Line *line) { return line->lanes * (3 * line->prefix + 3); }

static int64_t backward_doubles(const Line *line, int64_t steps) { return line->lanes * (2 * line->prefix + 4 * steps + 2) + 2 * line->features; }

static int64_t lanes_of(int64_t batch, int64_t groups) {
    const int64_t blocks = atn_norms_blocks(batch), rows = (batch + blocks - 1) / blocks;
    return (rows * groups + LANE_STEP - 1) / LANE_STEP * LANE_STEP;
}

int64_t atn_norms_timeline(int64_t prefix, int64_t steps, int64_t batch, int64_t groups) {
    return atn_norms_blocks(batch) * timeline_doubles(prefix, steps, lanes_of(batch, groups));
}

Line atn_norms_line(const Line *first, int64_t steps, int64_t block) {
    Line line = *first;
    if (line.norm == NORM_NONE) return line;
    const int64_t ahead = block * timeline_doubles(line.prefix, steps, line.lanes);
    double **timeline[] = {&line.weight, &line.mean, &line.var, &line.mu, &line.v, &line.share, &line.scale};
    for (size_t i = 0; i < sizeof timeline / sizeof *timeline; i++) *timeline[i] += ahead;
    if (line.dmean == NULL) {
        line.late += block * forward_doubles(first);
        line.run += block * forward_doubles(first);
        return line;
    }
    const int64_t back = block * backward_doubles(first, steps);
    double **backward[] = {&line.dmean, &line.dvar, &line.dmu, &line.dv, &line.carry, &line.dgain, &line.dshift};
    for (size_t i = 0; i < sizeof backward / sizeof *backward; i++) *backward[i] += back;
    return line;
}

/* Everything of a site and block, row by row: `EACH_ROW(line, lane)` runs for each row b of the batch with the line of its block
   and the lane of its first group. */
#define EACH_ROW(first)                                                                                    \
    for (int64_t block_ = 0, b = 0; block_ < atn_norms_blocks(work->batch); block_++)                       \
        for (Line line_ = atn_norms_line(first, work->steps, block_), *line = &line_; line; line = NULL)      \
            for (int64_t lane = 0; b < atn_norms_block_start(work->batch, block_ + 1); b++, lane += line->groups)

static int64_t live(const Work *work, int64_t row) { return work->call->lengths ? work->call->lengths[row] : work->steps; }

static void bring_in(const Work *work, const Line *first, const Site *site) {
    const int64_t G = first->groups, P = first->prefix, L = first->lanes;
    for (int64_t block = 0; block < atn_norms_blocks(work->batch); block++) {
        const Line line = atn_norms_line(first, work->steps, block);
        memset(line.weight, 0, (size_t)(P * L) * sizeof(double));
        memset(line.mean, 0, (size_t)(P * L) * sizeof(double));
        memset(line.var, 0, (size_t)(P * L) * sizeof(double));
    }
    if (site->state[0] == NULL) return;
    EACH_ROW(first) {
        double *own[3] = {line->weight, line->mean, line->var};
        for (int leaf = 0; leaf < 3; leaf++)
            for (int64_t j = 0; j < P && site->state[leaf]; j++)
                for (int64_t g = 0; g < G; g++)
                    own[leaf][j * L + lane + g] = leaf ? site->state[leaf][(b * P + j) * G + g] : site->state[0][b * P + j];
    }
}

/* How many statements of the prefix no row has seen, from the oldest on. */
static int64_t hidden(const Work *work, const Line *first) {
    int64_t seen = first->prefix;
    for (int64_t block = 0; block < atn_norms_blocks(work->batch); block++) {
        const Line line = atn_norms_line(first, work->steps, block);
        for (int64_t j = 0; j < seen; j++)
            for (int64_t l = 0; l < line.lanes && j < seen; l++)
                if (line.weight[j * line.lanes + l] > 0.0) seen = j;
    }
    return seen;
}

static void lay_out(const Work *work, Line *line, const Site *site) {
    line->norm = site->norm;
    line->window = site->window;
    line->features = site->features;
    line->groups = site->groups;
    line->prefix = site->prefix;
    line->lanes = lanes_of(work->batch, site->groups);
    line->decay = site->decay;
    line->eps = site->eps;
    line->gain = site->gain;
    line->shift = site->shift;
    const int64_t own = (site->prefix + work->steps) * line->lanes, pooled = work->steps * line->lanes;
    line->weight = site->timeline;
    line->mean = line->weight + site->prefix * line->lanes;
    line->var = line->mean + own;
    line->mu = line->var + own;
    line->v = line->mu + pooled;
    line->share = line->v + pooled;
    line->scale = line->share + pooled;
}

/* What is asked of the state that follows, put where the statements it is made of lie. */
static void ask(const Work *work, const Line *first, const Site *site) {
    const int64_t G = first->groups, P = first->prefix, L = first->lanes;
    if (site->dnext[1] == NULL && site->dnext[2] == NULL) return;
    EACH_ROW(first) {
        double *own[3] = {NULL, line->dmean, line->dvar}, *pooled[3] = {NULL, line->dmu, line->dv};
        const int64_t last = live(work, b);
        for (int leaf = 1; leaf < 3; leaf++)
            for (int64_t j = 0; j < P && site->dnext[leaf]; j++)
                for (int64_t g = 0; g < G; g++) {
                    const double d = site->dnext[leaf][(b * P + j) * G + g];
                    if (line->window == WINDOW_SLIDING) own[leaf][(last + j) * L + lane + g] = d;
                    else if (last > 0) pooled[leaf][(last - 1) * L + lane + g] = d;
                    else own[leaf][lane + g] = d; /* no step happened: the given state is the one that follows */
                }
    }
}

int atn_norms_begin(Work *work, const Call *call, int backward) {
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
        const int64_t blocks = atn_norms_blocks(call->batch), own = (line->prefix + call->steps) * line->lanes, pooled = call->steps * line->lanes;
        double *room = backward ? calloc((size_t)(blocks * backward_doubles(line, call->steps)), sizeof(double))
                                : malloc((size_t)(blocks * forward_doubles(line)) * sizeof(double));
        line->room = room;
        if (!room) {
            atn_norms_end(work, -1, 0);
            return 1;
        }
        if (!backward) {
            line->late = room;
            line->run = room + 3 * line->prefix * line->lanes;
            bring_in(work, line, site);
        } else
            line->dmean = room;
        line->hidden = hidden(work, line);
        if (!backward) continue;
        line->dvar = line->dmean + own;
        line->dmu = line->dvar + own;
        line->dv = line->dmu + pooled;
        line->carry = line->dv + pooled;
        line->dgain = line->carry + 2 * line->lanes;
        line->dshift = line->dgain + line->features;
        ask(work, line, site);
    }
    return 0;
}

static void hand_on(const Work *work, const Line *first, const Site *site) {
    const int64_t G = first->groups, P = first->prefix, L = first->lanes;
    EACH_ROW(first) {
        const int64_t last = live(work, b);
        const int sliding = line->window == WINDOW_SLIDING, stay = sliding || last == 0; /* statements, or a pooled one */
        const double *mean = stay ? line->mean : line->mu, *var = stay ? line->var : line->v;
        for (int64_t j = 0; j < P; j++) {
            const int64_t at = sliding ? last + j : 0, from = stay ? at : last - 1;
            if (stay) site->next[0][b * P + j] = at < P ? line->weight[at * L + lane] : 1.0;
            else site->next[0][b] = 1.0 / line->share[from * L + lane];
            for (int64_t g = 0; g < G; g++) {
                const int64_t to = (b * P + j) * G + g;
                if (site->next[1]) site->next[1][to] = mean[from * L + lane + g];
                site->next[2][to] = var[from * L + lane + g];
            }
        }
    }
}

static void hand_back(const Work *work, const Line *first, const Site *site, int is_double) {
    const int64_t G = first->groups, P = first->prefix, L = first->lanes, F = first->features, blocks = atn_norms_blocks(work->batch);
    if (site->dstate[1] || site->dstate[2])
        EACH_ROW(first) {
            const double *own[3] = {NULL, line->dmean, line->dvar};
            for (int leaf = 1; leaf < 3; leaf++)
                for (int64_t j = 0; j < P && site->dstate[leaf]; j++)
                    for (int64_t g = 0; g < G; g++) site->dstate[leaf][(b * P + j) * G + g] = own[leaf][j * L + lane + g];
        }
    const int64_t apart = backward_doubles(first, work->steps);
    for (int64_t i = 0; i < F; i++) {
        double gain = 0.0, shift = 0.0;
        for (int64_t block = 0; block < blocks; block++) {
            gain += first->dgain[block * apart + i];
            shift += first->dshift[block * apart + i];
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
        free(line->room);
    }
}
