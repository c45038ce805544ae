/* Sites whose normalizer is a program: rows are measured and normalized tile by tile, forward and backward. Rows beyond their
   length are skipped, so padding is never read. Included by recurrent.inc.h. */

/* Return the next stretch of unmasked rows of a block at one step, from `row` on; it ends at `end`. Return `rows` if there is
   none. */
INLINE long FN(next_live)(const Work *work, long t, long first, long row, long rows, long *end) {
    while (row < rows && !FN(alive)(work, t, first + row)) row++;
    *end = row;
    while (*end < rows && FN(alive)(work, t, first + *end)) ++*end;
    return row;
}

/* Return rows of REAL as an input: the rows themselves, or converted into a buffer. */
INLINE Input FN(as_input)(const Ready *ready, const REAL *rows, long apart, long count, long width, double **room) {
    if (IS_DOUBLE || ready->narrow) return (Input){rows, apart};
    double *to = *room;
    for (long r = 0; r < count; r++)
        for (long i = 0; i < width; i++) to[r * width + i] = (double)rows[r * apart + i];
    *room += count * width;
    return (Input){to, width};
}

/* The arguments of a program of a site at step t, for one part of `count` rows from row r of the block on. */
typedef struct {
    const SiteBuffers *site;
    long t, part, r, count;
    double *room;
} FN(Tile);

INLINE Input FN(parameters)(const FN(Tile) *tile, const Ready *ready) {
    const long before = tile->part * tile->site->parameters;
    if (ready->narrow) return (Input){(const REAL *)tile->site->gain + before, 0};
    return (Input){tile->site->parameter + before, 0};
}

/* Return the numbers of one part in an array over lanes, at lane `ahead` of the tile's step. */
INLINE double *FN(lanes)(const FN(Tile) *tile, double *of, long ahead) {
    const SiteBuffers *site = tile->site;
    return of + (ahead + tile->t) * site->lanes + tile->r * site->groups + tile->part * (site->groups / site->parts);
}

/* Set the pooled statistic, or the gradients of the step's own one, as inputs from `input` on; return their number. */
INLINE long FN(lane_inputs)(const FN(Tile) *tile, Input *input, double *mean, double *var, long ahead) {
    const SiteBuffers *site = tile->site;
    if (site->groups == 0) return 0;
    if (!site->centred) {
        input[0] = (Input){FN(lanes)(tile, var, ahead), site->groups};
        return 1;
    }
    input[0] = (Input){FN(lanes)(tile, mean, ahead), site->groups};
    input[1] = (Input){FN(lanes)(tile, var, ahead), site->groups};
    return 2;
}

/* Element i of row r of an output, which may be float. */
#define OUTPUT(type) ((const type *)output.at)[r * output.apart + i]

/* Store an output as numbers of one part over lanes, or add it. */
INLINE void FN(into_lanes)(const FN(Tile) *tile, Input output, int is_float, double *of, long ahead, const int add) {
    const SiteBuffers *site = tile->site;
    double *to = FN(lanes)(tile, of, ahead);
    const long width = site->groups / site->parts;
    for (long r = 0; r < tile->count; r++)
        for (long i = 0; i < width; i++) {
            const double value = is_float ? (double)OUTPUT(float) : OUTPUT(double);
            to[r * site->groups + i] = add ? to[r * site->groups + i] + value : value;
        }
}

INLINE void FN(into_rows)(const FN(Tile) *tile, Input output, int is_float, REAL *to, long apart, long width, const int add) {
    for (long r = 0; r < tile->count; r++, to += apart) {
        if (is_float && add)
            for (long i = 0; i < width; i++) to[i] += (REAL)OUTPUT(float);
        else if (is_float)
            for (long i = 0; i < width; i++) to[i] = (REAL)OUTPUT(float);
        else if (add)
            for (long i = 0; i < width; i++) to[i] += (REAL)OUTPUT(double);
        else
            for (long i = 0; i < width; i++) to[i] = (REAL)OUTPUT(double);
    }
}

/* Add gradients of the parameters, over the rows of a tile. */
INLINE void FN(into_parameters)(const FN(Tile) *tile, const Ready *ready, int64_t which, Input output) {
    const long many = tile->site->parameters;
    double *to = tile->site->dgain + tile->part * many;
    if (is_float_output(ready, which)) F32(add_rows)(output.at, output.apart, tile->count, many, to);
    else F64(add_rows)(output.at, output.apart, tile->count, many, to);
}

#undef OUTPUT

/* Return the address where a program may compute its first output directly: rows of REAL, over the last input or apart from
   every input. */
INLINE Input FN(wanted)(const Ready *ready, REAL *to, long apart, int over) {
    const int fits = (IS_DOUBLE ? !is_float_output(ready, 0) : is_float_output(ready, 0)) && ready->direct & (over ? DIRECT_OVER : DIRECT_APART);
    return fits ? (Input){to, apart} : (Input){NULL, 0};
}

#define EACH_TILE(ready, rows)                                                                                                        \
    for (long r_ = 0, most_ = (ready)->program->tile_rows, end_; (r_ = FN(next_live)(work, t, first, r_, rows, &end_)) < (rows); r_ = end_) \
        for (long part_ = 0; part_ < site->parts; part_++)                                                                            \
            for (long at_ = r_, tiles_ = (end_ - r_ + most_ - 1) / most_, n_; tiles_ > 0; tiles_--, at_ += n_)                            \
                for (FN(Tile) tile = {site, t, part_, at_, n_ = (end_ - at_ + tiles_ - 1) / tiles_, room}; tile.count; tile.count = 0)

/* Compute the statistics of a block's unmasked rows at step t. */
static void FN(traced_measure)(const Work *work, const SiteBuffers *site, long t, long first, long rows, const REAL *x, long ldx, double *room) {
    const Ready *ready = site->ready + MEASURE;
    const long width = site->features / site->parts, ahead = site->prefix, at = (ahead + t) * site->lanes;
    if (site->groups == 0) return;
    memset(site->mean + at, 0, (size_t)site->lanes * sizeof(double));
    memset(site->var + at, 0, (size_t)site->lanes * sizeof(double));
    EACH_TILE(ready, rows) {
        Input output[2] = {{NULL, 0}};
        const Input input[2] = {FN(as_input)(ready, x + tile.r * ldx + tile.part * width, ldx, tile.count, width, &tile.room), FN(parameters)(&tile, ready)};
        RUN_PROGRAM(ready, input, tile.count, tile.room, output);
        if (site->centred) FN(into_lanes)(&tile, output[0], is_float_output(ready, 0), site->mean, ahead, 0);
        FN(into_lanes)(&tile, output[site->centred], is_float_output(ready, site->centred), site->var, ahead, 0);
    }
}

/* Normalize a block's unmasked rows at step t, into rows `ldo` apart; other rows stay unchanged. */
static void FN(traced_normalize)(const Work *work, const SiteBuffers *site, long t, long first, long rows, const REAL *x, long ldx, REAL *out,
                                 long ldo, double *room) {
    const Ready *ready = site->ready + NORMALIZE;
    const long width = site->features / site->parts;
    for (long r = 0; r < rows && work->call->lengths; r++)
        if (!FN(alive)(work, t, first + r)) FN(copy)(out + r * ldo, x + r * ldx, site->features);
    EACH_TILE(ready, rows) {
        REAL *to = out + tile.r * ldo + tile.part * width;
        Input output[1] = {FN(wanted)(ready, to, ldo, 0)}, input[4] = {FN(as_input)(ready, x + tile.r * ldx + tile.part * width, ldx, tile.count, width, &tile.room)};
        input[1 + FN(lane_inputs)(&tile, input + 1, site->mu, site->v, 0)] = FN(parameters)(&tile, ready);
        RUN_PROGRAM(ready, input, tile.count, tile.room, output);
        if (output[0].at != to) FN(into_rows)(&tile, output[0], is_float_output(ready, 0), to, ldo, width, 0);
    }
}

/* Backward through a site, from the gradient dy of its result to the gradient dx of its input; rows are ldd apart. dy may be dx. */
static void FN(traced_back)(const Work *work, const SiteBuffers *site, long t, long first, long rows, const REAL *x, long ldx, const REAL *dy,
                            REAL *dx, long ldd, double *room) {
    const long width = site->features / site->parts;
    const Ready *ready = site->ready + NORMALIZE_BACK;
    EACH_TILE(ready, rows) {
        REAL *to = dx + tile.r * ldd + tile.part * width;
        Input output[4] = {FN(wanted)(ready, to, ldd, dy == dx)}, input[5] = {FN(as_input)(ready, x + tile.r * ldx + tile.part * width, ldx, tile.count, width, &tile.room)};
        const long leaves = FN(lane_inputs)(&tile, input + 1, site->mu, site->v, 0);
        input[1 + leaves] = FN(parameters)(&tile, ready);
        input[2 + leaves] = FN(as_input)(ready, dy + (to - dx), ldd, tile.count, width, &tile.room);
        RUN_PROGRAM(ready, input, tile.count, tile.room, output);
        if (output[0].at != to) FN(into_rows)(&tile, output[0], is_float_output(ready, 0), to, ldd, width, 0);
        if (leaves == 2) FN(into_lanes)(&tile, output[1], is_float_output(ready, 1), site->dmu, 0, 1);
        if (leaves) FN(into_lanes)(&tile, output[leaves], is_float_output(ready, leaves), site->dv, 0, 1);
        if (ready->program->outputs > 1 + leaves) FN(into_parameters)(&tile, ready, 1 + leaves, output[1 + leaves]);
    }
    if (site->groups == 0) return;
    FN(unpool)(site, work->steps, t);
    ready = site->ready + MEASURE_BACK;
    EACH_TILE(ready, rows) {
        REAL *to = dx + tile.r * ldd + tile.part * width;
        Input output[2] = {ready->added ? FN(wanted)(ready, to, ldd, 0) : (Input){NULL, 0}};
        Input input[4] = {FN(as_input)(ready, x + tile.r * ldx + tile.part * width, ldx, tile.count, width, &tile.room), FN(parameters)(&tile, ready)};
        FN(lane_inputs)(&tile, input + 2, site->dmean, site->dvar, site->prefix);
        RUN_PROGRAM(ready, input, tile.count, tile.room, output);
        if (output[0].at != to) FN(into_rows)(&tile, output[0], is_float_output(ready, 0), to, ldd, width, 1);
        if (ready->program->outputs > 1) FN(into_parameters)(&tile, ready, 1, output[1]);
    }
}

#undef EACH_TILE
