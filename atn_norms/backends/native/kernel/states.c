/* Conversion of states between the layout of the caller, rows first, and that of the timeline, time first. */

#include <stdlib.h>
#include <string.h>

#include "blocks.h"

/* Doubles of one block: its part of the timeline, and of the work space for either direction. */
static int64_t timeline_doubles(int64_t prefix, int64_t steps, int64_t lanes) { return lanes * (3 * prefix + 6 * steps + 4); }

static int64_t forward_doubles(const SiteBuffers *line) { return line->lanes * (3 * line->prefix + 4); }

static int is_coupled(int32_t norm) { return norm == NORM_BATCH || norm == NORM_POPULATION; }

/* Return the number of sums of gains in a block; it has as many sums of shifts. */
static int64_t sums(const SiteBuffers *line) {
    if (line->norm == NORM_TRACED) return line->parts * line->parameters;
    return is_coupled(line->norm) ? line->lanes : line->features;
}

static int64_t backward_doubles(const SiteBuffers *line, int64_t steps) { return line->lanes * (2 * line->prefix + 4 * steps + 4) + 2 * sums(line); }

static int64_t filled(int64_t lanes) { return (lanes + LANE_STEP - 1) / LANE_STEP * LANE_STEP; }

static int64_t lanes_of(int64_t batch, int64_t groups) {
    const int64_t blocks = atn_norms_blocks(batch), rows = (batch + blocks - 1) / blocks;
    return filled(rows * groups);
}

static int64_t lanes_of_units(int64_t hidden, int64_t groups) { return filled(groups * (hidden < BLOCK_UNITS ? hidden : BLOCK_UNITS)); }

int64_t atn_norms_timeline(int64_t prefix, int64_t steps, int64_t batch, int64_t groups) {
    return atn_norms_blocks(batch) * timeline_doubles(prefix, steps, lanes_of(batch, groups));
}

int64_t atn_norms_batch_timeline(int64_t prefix, int64_t steps, int64_t hidden, int64_t groups) {
    return atn_norms_unit_blocks(hidden) * timeline_doubles(prefix, steps, lanes_of_units(hidden, groups));
}

SiteBuffers atn_norms_site_buffers(const SiteBuffers *first, int64_t steps, int64_t block) {
    SiteBuffers line = *first;
    if (line.norm == NORM_NONE) return line;
    const int64_t ahead = block * timeline_doubles(line.prefix, steps, line.lanes);
    double **timeline[] = {&line.weight, &line.mean, &line.var, &line.mu, &line.v, &line.share, &line.scale};
    for (size_t i = 0; i < sizeof timeline / sizeof *timeline; i++) *timeline[i] += ahead;
    if (line.dmean == NULL) {
        double **forward[] = {&line.late, &line.run, &line.eps};
        for (size_t i = 0; i < sizeof forward / sizeof *forward; i++) *forward[i] += block * forward_doubles(first);
        return line;
    }
    const int64_t back = block * backward_doubles(first, steps);
    double **backward[] = {&line.dmean, &line.dvar, &line.dmu, &line.dv, &line.carry, &line.dgain, &line.dshift};
    for (size_t i = 0; i < sizeof backward / sizeof *backward; i++) *backward[i] += back;
    return line;
}

/* The lanes of a block: `many` parts of `each` lanes. Part i belongs to row (row + i * rows) of the state, where it starts at
   (place + i * places). */
typedef struct { int64_t many, each, row, rows, place, places; } Parts;

static Parts parts_of(const Work *work, const SiteBuffers *line, int64_t block) {
    if (!is_coupled(line->norm)) {
        const int64_t row = atn_norms_block_start(work->batch, block);
        return (Parts){atn_norms_block_start(work->batch, block + 1) - row, line->groups, row, 1, 0, 0};
    }
    const int64_t units = line->features / line->groups, from = block * BLOCK_UNITS, left = units - from;
    return (Parts){line->groups, left < BLOCK_UNITS ? left : BLOCK_UNITS, 0, 0, from, units};
}

/* Return the number of elements of a statistic in one row of the state. */
static int64_t wide(const SiteBuffers *line) { return is_coupled(line->norm) ? line->features : line->groups; }

/* Loop over all lanes of a site: for each `lane` of each block, `line` is the buffers of the block, b the row of the state, and
   g the place in that row. */
#define EACH_LANE(first)                                                                                                   \
    for (int64_t block_ = 0; block_ < (first)->blocks; block_++)                                                            \
        for (SiteBuffers line_ = atn_norms_site_buffers(first, work->steps, block_), *line = &line_; line; line = NULL)                     \
            for (Parts parts_ = parts_of(work, line, block_); parts_.many > 0; parts_.many = 0)                             \
                for (int64_t part_ = 0, lane = 0, b = parts_.row; part_ < parts_.many; part_++, b += parts_.rows)            \
                    for (int64_t g = parts_.place + part_ * parts_.places, end_ = g + parts_.each; g < end_; g++, lane++)

/* Return the number of unmasked steps for a row of a site's state. */
static int64_t live(const Work *work, const SiteBuffers *line, int64_t row) {
    if (is_coupled(line->norm)) return work->live;
    return work->call->lengths ? work->call->lengths[row] : work->steps;
}

/* Return true if the state keeps the statistics of single steps, false if it keeps a pooled one. */
static int is_kept(int32_t window) { return window == WINDOW_SLIDING || window == WINDOW_WEIGHTED; }

/* Return the index of the statistic that was pooled after the last of a row's `last` steps. */
static int64_t after(const SiteBuffers *line, int64_t last) { return line->window == WINDOW_PAST ? last : last - 1; }

static void load_state(const Work *work, const SiteBuffers *first, const Site *site) {
    const int64_t G = wide(first), P = first->prefix, L = first->lanes;
    for (int64_t block = 0; block < first->blocks; block++) {
        const SiteBuffers line = atn_norms_site_buffers(first, work->steps, block);
        memset(line.weight, 0, (size_t)(P * L) * sizeof(double));
        memset(line.mean, 0, (size_t)(P * L) * sizeof(double));
        memset(line.var, 0, (size_t)(P * L) * sizeof(double));
        memset(line.eps, 0, (size_t)L * sizeof(double));
        double *pooled[] = {line.mu, line.v, line.share, line.scale}; /* few windows write the last rows; saved numbers must not depend on old memory */
        for (int i = 0; i < 4 && work->call->recurrent; i++) memset(pooled[i] + work->steps * L, 0, (size_t)L * sizeof(double));
    }
    EACH_LANE(first) line->eps[lane] = site->eps[g];
    if (site->state[0] == NULL) return;
    EACH_LANE(first) {
        double *own[3] = {line->weight, line->mean, line->var};
        for (int leaf = 0; leaf < 3; leaf++)
            for (int64_t j = 0; j < P && site->state[leaf]; j++)
                own[leaf][j * L + lane] = leaf ? site->state[leaf][(b * P + j) * G + g] : site->state[0][b * P + j];
    }
}

/* Return the number of the oldest statistics of the prefix that are empty in every row. */
static int64_t hidden(const Work *work, const SiteBuffers *first) {
    int64_t seen = first->prefix;
    for (int64_t block = 0; block < first->blocks; block++) {
        const SiteBuffers line = atn_norms_site_buffers(first, work->steps, block);
        for (int64_t j = 0; j < seen; j++)
            for (int64_t l = 0; l < line.lanes && j < seen; l++)
                if (line.weight[j * line.lanes + l] > 0.0) seen = j;
    }
    return seen;
}

static void set_sizes(const Work *work, SiteBuffers *line, const Site *site) {
    line->norm = site->norm;
    line->window = site->window;
    line->features = site->features;
    line->groups = site->groups;
    line->prefix = site->prefix;
    const int64_t units = site->features / (site->groups ? site->groups : 1);
    line->lanes = is_coupled(site->norm) ? lanes_of_units(units, site->groups) : lanes_of(work->batch, site->groups);
    line->blocks = is_coupled(site->norm) ? atn_norms_unit_blocks(units) : atn_norms_blocks(work->batch);
    line->counts = is_coupled(site->norm) ? work->counts : NULL;
    line->taps = site->taps;
    line->decay = site->decay;
    line->detached = site->detached != 0;
    line->gain = site->gain;
    line->shift = site->shift;
}

/* Set the addresses of the first block in a timeline. */
static void lay_out(SiteBuffers *line, double *timeline, int64_t steps) {
    const int64_t own = (line->prefix + steps) * line->lanes, pooled = (steps + 1) * line->lanes;
    line->weight = timeline;
    line->mean = line->weight + line->prefix * line->lanes;
    line->var = line->mean + own;
    line->mu = line->var + own;
    line->v = line->mu + pooled;
    line->share = line->v + pooled;
    line->scale = line->share + pooled;
}

/* Store the gradients of the final state with the statistics that it consists of. */
static void load_state_grads(const Work *work, const SiteBuffers *first, const Site *site) {
    const int64_t G = wide(first), P = first->prefix, L = first->lanes;
    if (first->detached || (site->dnext[1] == NULL && site->dnext[2] == NULL)) return;
    EACH_LANE(first) {
        double *own[3] = {NULL, line->dmean, line->dvar}, *pooled[3] = {NULL, line->dmu, line->dv};
        const int64_t last = live(work, line, b);
        for (int leaf = 1; leaf < 3; leaf++)
            for (int64_t j = 0; j < P && site->dnext[leaf]; j++) {
                const double d = site->dnext[leaf][(b * P + j) * G + g];
                if (is_kept(line->window)) own[leaf][(last + j) * L + lane] = d;
                else if (last > 0) pooled[leaf][after(line, last) * L + lane] = d;
                else own[leaf][lane] = d; /* without an unmasked step the final state is the initial one */
            }
    }
}

/* Count the unmasked rows of each step; return 1 if out of memory. */
static int count(Work *work) {
    work->counts = calloc((size_t)work->steps, sizeof(double));
    if (!work->counts) return 1;
    for (int64_t b = 0; b < work->batch; b++) {
        const int64_t end = work->call->lengths ? work->call->lengths[b] : work->steps;
        for (int64_t t = 0; t < end; t++) work->counts[t] += 1.0;
        if (end > work->live) work->live = end;
    }
    return 0;
}

/* Return the doubles that a thread needs to run the programs of a site: registers of a tile, and rows of the input and its
   gradient. */
static int64_t program_doubles(const SiteBuffers *line) {
    int64_t most = 0;
    for (int i = 0; i < PROGRAMS; i++) {
        const Program *program = line->ready[i].program;
        const int64_t own = program->tile_rows * (program->row_doubles + 2 * (line->features / line->parts));
        if (own > most) most = own;
    }
    return most;
}

/* Prepare the programs of a site, and convert their parameters to double. Return 0 on success. */
static int load_programs(SiteBuffers *line, const Site *site, int is_double) {
    const int64_t many = site->parts * site->parameters;
    int64_t steps = 0;
    const Program *program = site->programs;
    for (int i = 0; i < PROGRAMS; i++, program = next_program(program)) steps += program->instructions;
    line->parts = site->parts;
    line->parameters = site->parameters;
    line->centred = site->centred != 0;
    line->parameter = malloc((size_t)(many + 1) * sizeof(double));
    Ready *ready = malloc(PROGRAMS * sizeof(Ready) + (size_t)steps * sizeof(Step));
    line->ready = ready;
    if (!line->parameter || !ready) return 1;
    Step *step = (Step *)(ready + PROGRAMS);
    program = site->programs;
    for (int i = 0; i < PROGRAMS; i++, program = next_program(program)) {
        ready[i] = atn_norms_ready(program, program->narrow && !is_double, step, i == MEASURE_BACK ? !is_double : -1);
        step += program->instructions;
    }
    for (int64_t i = 0; i < many; i++) line->parameter[i] = is_double ? ((const double *)site->gain)[i] : (double)((const float *)site->gain)[i];
    return 0;
}

/* Store the buffers of every block of rows. With batch statistics a site has other blocks, and only its kind of norm is stored.
   Return 0 on success. */
static int load_lines(Work *work) {
    const int64_t blocks = atn_norms_blocks(work->batch);
    work->lines = malloc((size_t)blocks * sizeof *work->lines);
    if (!work->lines) return 1;
    for (int64_t block = 0; block < blocks; block++)
        for (int s = 0; s < SITES; s++)
            work->lines[block][s] = atn_norms_site_buffers(work->site + s, work->steps, is_coupled(work->site[s].norm) ? 0 : block);
    return 0;
}

int atn_norms_begin(Work *work, const Call *call, int backward, int is_double) {
    memset(work, 0, sizeof *work);
    work->cell = call->cell;
    work->threads = call->threads;
    work->steps = call->steps;
    work->batch = call->batch;
    work->inputs = call->inputs;
    work->hidden = call->hidden;
    work->output = call->projection ? call->projection : call->hidden;
    work->call = call;
    work->coupled = !call->projection;
    for (int s = 0; s < SITES; s++) {
        work->mixed |= is_coupled(call->site[s].norm);
        work->coupled &= call->site[s].norm == NORM_NONE || is_coupled(call->site[s].norm);
    }
    work->coupled &= work->mixed;
    work->mixed &= !work->coupled;
    if ((work->coupled || work->mixed) && count(work)) return 1;
    for (int s = 0; s < SITES; s++) {
        const Site *site = call->site + s;
        SiteBuffers *line = work->site + s;
        if (site->norm == NORM_NONE) continue;
        set_sizes(work, line, site);
        if (site->norm == NORM_TRACED) {
            if (load_programs(line, site, is_double)) {
                atn_norms_end(work, -1, 0);
                return 1;
            }
            const int64_t room = program_doubles(line);
            if (room > work->program_doubles) work->program_doubles = room;
        }
        const int64_t blocks = line->blocks, own = (line->prefix + call->steps) * line->lanes, pooled = (call->steps + 1) * line->lanes;
        const int64_t statistics = blocks * timeline_doubles(line->prefix, call->steps, line->lanes);
        const int64_t around = site->timeline ? 0 : statistics; /* at the start of the room */
        double *room = backward ? calloc((size_t)(blocks * backward_doubles(line, call->steps) + 1), sizeof(double))
                                : malloc((size_t)(around + blocks * forward_doubles(line) + 1) * sizeof(double));
        line->room = room;
        if (!room) {
            atn_norms_end(work, -1, 0);
            return 1;
        }
        lay_out(line, site->timeline ? site->timeline : room, call->steps);
        room += around;
        if (!backward) {
            line->late = room;
            line->run = room + 3 * line->prefix * line->lanes;
            line->eps = line->run + 3 * line->lanes;
            /* Saved numbers are deterministic, even unused ones. */
            if (call->recurrent && (site->norm == NORM_POPULATION || (is_coupled(site->norm) && work->live < call->steps)))
                memset(line->weight, 0, (size_t)statistics * sizeof(double));
            load_state(work, line, site);
        } else
            line->dmean = room;
        line->hidden = hidden(work, line);
        if (!backward) continue;
        line->dvar = line->dmean + own;
        line->dmu = line->dvar + own;
        line->dv = line->dmu + pooled;
        line->carry = line->dv + pooled;
        line->dgain = line->carry + 2 * line->lanes;
        line->dshift = line->dgain + sums(line);
        load_state_grads(work, line, site);
    }
    if (!work->coupled && load_lines(work)) {
        atn_norms_end(work, -1, 0);
        return 1;
    }
    return 0;
}

static void store_state(const Work *work, const SiteBuffers *first, const Site *site) {
    const int64_t G = wide(first), P = first->prefix, L = first->lanes;
    EACH_LANE(first) {
        const int64_t last = live(work, line, b);
        const int sliding = is_kept(line->window), stay = sliding || last == 0; /* statistics of single steps, or a pooled one */
        const double *mean = stay ? line->mean : line->mu, *var = stay ? line->var : line->v;
        for (int64_t j = 0; j < P; j++) {
            const int64_t at = sliding ? last + j : 0, from = stay ? at : after(line, last), to = (b * P + j) * G + g;
            if (!stay) site->next[0][b] = line->window == WINDOW_PAST ? line->share[from * L + lane] : 1.0 / line->share[from * L + lane];
            else if (at < P) site->next[0][b * P + j] = line->weight[at * L + lane];
            else site->next[0][b * P + j] = line->counts ? line->counts[at - P] : 1.0;
            if (site->next[1]) site->next[1][to] = mean[from * L + lane];
            site->next[2][to] = var[from * L + lane];
        }
    }
}

static void put(void *to, int64_t i, double value, int is_double) {
    if (is_double) ((double *)to)[i] = value;
    else ((float *)to)[i] = (float)value;
}

static void store_grads(const Work *work, const SiteBuffers *first, const Site *site, int is_double) {
    const int64_t G = wide(first), P = first->prefix, L = first->lanes;
    if (site->dstate[1] || site->dstate[2])
        EACH_LANE(first) {
            const double *own[3] = {NULL, line->dmean, line->dvar};
            for (int leaf = 1; leaf < 3; leaf++)
                for (int64_t j = 0; j < P && site->dstate[leaf]; j++) site->dstate[leaf][(b * P + j) * G + g] = own[leaf][j * L + lane];
        }
    if (is_coupled(first->norm)) {
        EACH_LANE(first) {
            put(site->dgain, g, line->dgain[lane], is_double);
            put(site->dshift, g, line->dshift[lane], is_double);
        }
        return;
    }
    const int64_t apart = backward_doubles(first, work->steps);
    if (first->norm == NORM_TRACED) {
        for (int64_t i = 0; i < sums(first); i++) {
            double gradient = 0.0;
            for (int64_t block = 0; block < first->blocks; block++) gradient += first->dgain[block * apart + i];
            put(site->dgain, i, gradient, is_double);
        }
        return;
    }
    for (int64_t i = 0; i < first->features; i++) {
        double gain = 0.0, shift = 0.0;
        for (int64_t block = 0; block < first->blocks; block++) {
            gain += first->dgain[block * apart + i];
            shift += first->dshift[block * apart + i];
        }
        put(site->dgain, i, gain, is_double);
        put(site->dshift, i, shift, is_double);
    }
}

void atn_norms_end(Work *work, int backward, int is_double) {
    for (int s = 0; s < SITES; s++) {
        SiteBuffers *line = work->site + s;
        if (line->norm == NORM_NONE) continue;
        if (backward == 0 && work->call->site[s].next[2]) store_state(work, line, work->call->site + s);
        else if (backward == 1) store_grads(work, line, work->call->site + s, is_double);
        free(line->parameter);
        free((void *)line->ready);
        free(line->room);
    }
    free(work->lines);
    free(work->counts);
}
