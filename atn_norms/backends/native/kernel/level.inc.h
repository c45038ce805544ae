/* The kernels for one instruction set, in both types: define LEVEL, VECTOR_BYTES and TILE_ROWS before the inclusion. */

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"

#define GLUE3(a, b, c) a##b##c
#define GLUE(a, b, c) GLUE3(a, b, c)

/* Numbers in a vector, and columns of a packed panel, which has two vectors. */
#define VL ((long)(VECTOR_BYTES / sizeof(REAL)))
#define PANEL (2 * VL)
#define INLINE static inline __attribute__((always_inline))
#define F32(name) GLUE(name, _f32_, LEVEL)
#define F64(name) GLUE(name, _f64_, LEVEL)

#define REAL double
#define IS_DOUBLE 1
#define FN(name) F64(name)
#include "vectors.inc.h"
#include "elementary.inc.h"
#include "operations.inc.h"
#include "chains.inc.h"
#undef REAL
#undef IS_DOUBLE
#undef FN

#define REAL float
#define IS_DOUBLE 0
#define FN(name) F32(name)
#include "vectors.inc.h"
#include "elementary.inc.h"
#include "operations.inc.h"
#include "chains.inc.h"
#undef REAL
#undef IS_DOUBLE
#undef FN

#include "interpret.inc.h"

#define RUN_PROGRAM GLUE(interpret, _program_, LEVEL)

#define REAL float
#define IS_DOUBLE 0
#define FN(name) F32(name)
#include "recurrent.inc.h"
#undef REAL
#undef IS_DOUBLE
#undef FN

#define REAL double
#define IS_DOUBLE 1
#define FN(name) F64(name)
#include "recurrent.inc.h"
#undef REAL
#undef IS_DOUBLE
#undef FN

int GLUE(atn_norms_, run_, LEVEL)(const Work *work, int backward, int is_double) {
    return is_double ? F64(run)(work, backward) : F32(run)(work, backward);
}

void GLUE(atn_norms_, interpret_, LEVEL)(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output) {
    RUN_PROGRAM(ready, input, rows, room, output);
}
