/* The interpreter of programs, for one instruction set: it runs the steps of program.c with the loops of operations.inc.h, and
   chains of steps with the moves of chains.inc.h.

   A program runs on one tile of rows at a time, small enough to keep its registers in the nearest cache. The rows of a register
   are contiguous, so an operation is one loop over all rows of the tile.

   A program whose rounding errors are small enough may run narrow: numbers of rows are then float, and numbers of statistics
   stay double. */

#define NUM(name) GLUE(name, _program_, LEVEL)

/* Position of the elements of one operand: numbers of rows, which are float in a narrow program, or doubles. */
typedef struct { const char *at; long apart, repeat, length; int is_float; } NUM(View);

INLINE long NUM(size)(int is_float) { return is_float ? (long)sizeof(float) : (long)sizeof(double); }

INLINE NUM(View) NUM(view)(const Source *from, const Input *base) {
    const Input start = base[from->base];
    return (NUM(View)){(const char *)start.at + from->bytes, from->base >= BASE_INPUTS ? start.apart : from->apart, from->repeat, from->length, from->is_float};
}

INLINE long NUM(place)(NUM(View) view, long row, long i) {
    return row * view.apart + (view.repeat == 1 && i < view.length ? i : i / view.repeat % view.length);
}

INLINE double NUM(number)(NUM(View) view, long row, long i) {
    const long at = NUM(place)(view, row, i);
    return view.is_float ? (double)((const float *)view.at)[at] : ((const double *)view.at)[at];
}

/* Return the number of contiguous elements from element i on. */
INLINE long NUM(stretch)(NUM(View) view, long i) {
    if (view.length == 1) return LONG_MAX;
    return view.repeat > 1 ? view.repeat - i % view.repeat : view.length - i % view.length;
}

/* Sum all elements of a row, or equal parts of them. */
static void NUM(sums)(const Step *step, NUM(View) to, const NUM(View) *view, long rows) {
    const int dot = step->op == OP_DOT;
    const long inner = step->repeat;
    for (long r = 0; r < rows; r++) {
        double *sums = (double *)to.at + r * to.apart;
        for (long k = 0; k < step->parts; k++) {
            const long a = r * view[0].apart + k * inner, b = r * view[dot].apart + k * inner;
            const float *fa = (const float *)view[0].at + a, *fb = (const float *)view[dot].at + b;
            const double *da = (const double *)view[0].at + a, *db = (const double *)view[dot].at + b;
            if (view[0].is_float) sums[k] = dot ? F32(sum)(1, fa, fb, inner) : F32(sum)(0, fa, fa, inner);
            else sums[k] = dot ? F64(sum)(1, da, db, inner) : F64(sum)(0, da, da, inner);
        }
    }
}

static void NUM(any_sums)(const Step *step, NUM(View) to, const NUM(View) *view, long rows) {
    for (long r = 0; r < rows; r++) {
        double *sums = (double *)to.at + r * to.apart;
        for (long k = 0; k < step->parts; k++) sums[k] = 0.0;
        for (long i = 0; i < step->count; i++)
            sums[i / step->repeat % step->parts] += NUM(number)(view[0], r, i) * (step->op == OP_DOT ? NUM(number)(view[1], r, i) : 1.0);
    }
}

INLINE void NUM(loop_of)(const Step *step, const Run *run) {
    if (step->is_float) F32(loop)(step->op, run);
    else F64(loop)(step->op, run);
}

/* Set operand k of a loop to a vector, or to one number for each block, at a distance of `apart` numbers. */
INLINE void NUM(operand)(Run *run, int k, NUM(View) view, int vector, long at, long apart) {
    const char *from = view.at + at * NUM(size)(view.is_float);
    run->vector[k] = vector ? from : NULL;
    run->number[k] = vector ? NULL : (const double *)from;
    run->apart[k] = apart;
    if (vector || !view.is_float) return;
    run->spare[k] = (double)*(const float *)from; /* a parameter, the same for all rows */
    run->number[k] = &run->spare[k];
    run->apart[k] = 0;
}

/* Run an operation on whole rows, in one loop over all of them if they are contiguous. */
static void NUM(whole_rows)(const Step *step, NUM(View) to, const NUM(View) *view, long rows) {
    Run run;
    run.out = (char *)to.at;
    run.out_apart = to.apart;
    run.n = step->count;
    run.blocks = rows;
    int flat = to.apart == step->count;
    for (int k = 0; k < step->operands; k++) {
        const int vector = step->vectors >> k & 1;
        flat &= vector ? view[k].apart == step->count : view[k].apart == 0;
        NUM(operand)(&run, k, view[k], vector, 0, view[k].apart);
    }
    if (flat) {
        run.n *= rows;
        run.blocks = 1;
    }
    NUM(loop_of)(step, &run);
}

/* Run an operation on equal parts of each row; an operand may have one number for each part. */
static void NUM(row_parts)(const Step *step, NUM(View) to, const NUM(View) *view, long rows) {
    const long n = step->count / step->parts;
    for (long r = 0; r < rows; r++) {
        Run run = {.out = (char *)to.at + r * to.apart * NUM(size)(step->is_float), .out_apart = n, .n = n, .blocks = step->parts};
        for (int k = 0; k < step->operands; k++) {
            const int vector = step->vectors >> k & 1;
            NUM(operand)(&run, k, view[k], vector, r * view[k].apart, vector ? n : step->spread >> k & 1);
        }
        NUM(loop_of)(step, &run);
    }
}

/* Run an operation on the contiguous pieces of its operands. */
static void NUM(pieces)(const Step *step, NUM(View) to, const NUM(View) *view, long rows) {
    for (long r = 0; r < rows; r++)
        for (long i = 0, n; i < step->count; i += n) {
            n = step->count - i;
            for (int k = 0; k < step->operands; k++) {
                const long stretch = NUM(stretch)(view[k], i);
                if (stretch < n) n = stretch;
            }
            Run run = {.out = (char *)to.at + (r * to.apart + i) * NUM(size)(step->is_float), .n = n, .blocks = 1};
            for (int k = 0; k < step->operands; k++) NUM(operand)(&run, k, view[k], view[k].repeat == 1 && view[k].length > 1, NUM(place)(view[k], r, i), 0);
            NUM(loop_of)(step, &run);
        }
}

/* Run a program on at most `tile_rows` rows. `room` holds tile_rows * row_doubles numbers. `output` returns the addresses of
   the outputs, row by row. If the first output has an address and `direct` allows it, it is computed there. */
static void NUM(interpret)(const Ready *ready, const Input *input, long rows, double *room, Input *output) {
    const Program *program = ready->program;
    const Slot *slot = program_slots(program);
    Input base[2 * MOST_SLOTS + BASE_INPUTS];
    base[BASE_REGISTERS] = (Input){room, 0};
    base[BASE_CONSTANTS] = (Input){program_constants(program), 0};
    Input *given = base + BASE_INPUTS, *found = given + program->inputs;
    for (int64_t i = 0; i < program->inputs; i++) given[i] = input[i];
    for (int64_t o = 0; o < program->outputs; o++) {
        const Slot *own = slot + program_outputs(program)[o];
        if (o == 0 && output[0].at) found[o] = output[0];
        else if (own->kind == SLOT_REGISTER || own->kind == SLOT_SMALL) found[o] = (Input){room + program->tile_rows * own->at, own->length};
        else if (own->kind == SLOT_CONSTANT) found[o] = (Input){program_constants(program) + own->at, 0};
        else found[o] = input[own->at];
    }
    for (const Step *step = ready->step; step < ready->step + ready->steps; step++) {
        if (step->chain) {
            if (step->kind == STEP_SUMS ? step->from[0].is_float : step->is_float) F32(chain)(step, base, rows);
            else F64(chain)(step, base, rows);
            step += step->chain - 1;
            continue;
        }
        NUM(View) view[3];
        const NUM(View) to = NUM(view)(&step->to, base);
        for (int k = 0; k < step->operands; k++) view[k] = NUM(view)(step->from + k, base);
        if (step->kind == STEP_ROWS) NUM(whole_rows)(step, to, view, rows);
        else if (step->kind == STEP_PARTS) NUM(row_parts)(step, to, view, rows);
        else if (step->kind == STEP_PIECES) NUM(pieces)(step, to, view, rows);
        else if (step->kind == STEP_SUMS) NUM(sums)(step, to, view, rows);
        else NUM(any_sums)(step, to, view, rows);
    }
    for (int64_t o = 0; o < program->outputs; o++) output[o] = found[o];
}
