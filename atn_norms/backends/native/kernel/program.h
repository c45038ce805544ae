/* A traced normalizer as the kernels read it: four programs, one after the other, each a header and instructions over rows.

   Python validates every program before it gets here (backends/traced/program.py): slots exist, elements stay within their
   slots, registers are written before they are read. Numbers are double, whatever REAL is. */

#ifndef ATN_NORMS_PROGRAM_H
#define ATN_NORMS_PROGRAM_H

#include <stdint.h>

enum {
    OP_COPY, OP_NEG, OP_ABS, OP_SIGN, OP_RECIPROCAL, OP_SQRT, OP_RSQRT, OP_EXP, OP_LOG, OP_TANH, OP_SIGMOID, OP_ROUND, OP_NOT,
    OP_LOG1P, OP_EXPM1, OP_ERF, OP_SIN, OP_COS,
    OP_ADD, OP_SUB, OP_MUL, OP_DIV, OP_POW, OP_MAX, OP_MIN, OP_GT, OP_GE, OP_LT, OP_LE, OP_EQ, OP_NE, OP_AND, OP_OR,
    OP_WHERE, OP_SUM, OP_DOT,
    OPERATIONS
};
/* Registers and inputs hold numbers of rows, or (small) of statistics, which are double in narrow programs too. */
enum { SLOT_REGISTER, SLOT_CONSTANT, SLOT_INPUT, SLOT_SMALL, SLOT_SMALL_INPUT };
enum { MEASURE, NORMALIZE, MEASURE_BACK, NORMALIZE_BACK, PROGRAMS };
#define MOST_SLOTS 512

/* Element i is element offset + (i / repeat) % length of a slot. */
typedef struct { int32_t slot, offset, repeat, length; } Operand;

/* Element i of the result goes to element offset + (i / repeat) % length of the target; OP_SUM adds there,
   OP_DOT products. */
typedef struct { int32_t op, target, offset, count, repeat, length; Operand from[3]; } Instruction;

/* at: numbers of a row's registers before it, or constants before it, or the number of the input. */
typedef struct { int64_t kind, at, length; } Slot;

/* The header, which the instructions, the slots, the outputs (int64) and the constants (double) follow. */
typedef struct { int64_t words, instructions, slots, outputs, constants, row_doubles, tile_rows, inputs, narrow; } Program;

/* Rows of one input or output, double, or float where a narrow program has rows: row r starts at r * apart. */
typedef struct { const void *at; int64_t apart; } Input;

/* The program after this one. */
static inline const Program *next_program(const Program *program) {
    return (const Program *)((const int64_t *)program + program->words);
}

static inline const Instruction *program_code(const Program *program) { return (const Instruction *)(program + 1); }
static inline const Slot *program_slots(const Program *program) { return (const Slot *)(program_code(program) + program->instructions); }
static inline const int64_t *program_outputs(const Program *program) { return (const int64_t *)(program_slots(program) + program->slots); }
static inline int is_row_slot(const Slot *slot) { return slot->kind == SLOT_REGISTER || slot->kind == SLOT_INPUT; }

static inline const double *program_constants(const Program *program) {
    return (const double *)(program_outputs(program) + program->outputs);
}

/* Whether an output of a program that runs narrow holds floats. */
static inline int is_float_output(const Program *program, int64_t output) {
    return is_row_slot(program_slots(program) + program_outputs(program)[output]);
}

#endif
