/* Both REALs for one instruction set: define LEVEL, VECTOR_BYTES and TILE_ROWS, then include. */

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"

#define GLUE3(a, b, c) a##b##c
#define GLUE(a, b, c) GLUE3(a, b, c)

#include "interpret.inc.h"

#define RUN_PROGRAM GLUE(interpret, _program_, LEVEL)

#define REAL float
#define IS_DOUBLE 0
#define FN(name) GLUE(name, _f32_, LEVEL)
#include "recurrent.inc.h"
#undef REAL
#undef IS_DOUBLE
#undef FN

#define REAL double
#define IS_DOUBLE 1
#define FN(name) GLUE(name, _f64_, LEVEL)
#include "recurrent.inc.h"
#undef REAL
#undef IS_DOUBLE
#undef FN

int GLUE(atn_norms_, run_, LEVEL)(const Work *work, int backward, int is_double) {
    return is_double ? GLUE(run, _f64_, LEVEL)(work, backward) : GLUE(run, _f32_, LEVEL)(work, backward);
}

void GLUE(atn_norms_, interpret_, LEVEL)(const Program *program, int narrow, const Input *input, int64_t rows, double *room, Input *output) {
    RUN_PROGRAM(program, narrow, input, rows, room, output);
}
