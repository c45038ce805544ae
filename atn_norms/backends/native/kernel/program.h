/* A traced normalizer as the kernels read it: four programs in sequence, each a header and instructions over rows.

   Python validates every program before it is passed on (backends/traced/program.py): slots exist, elements stay within their
   slots, registers are written before they are read. Numbers are double, whatever REAL is. */

#ifndef ATN_NORMS_PROGRAM_H
#define ATN_NORMS_PROGRAM_H

#include <stdint.h>

enum {
    OP_COPY, OP_NEG, OP_ABS, OP_SIGN, OP_RECIPROCAL, OP_SQRT, OP_RSQRT, OP_EXP, OP_LOG, OP_TANH, OP_SIGMOID, OP_ROUND, OP_NOT,
    OP_LOG1P, OP_EXPM1, OP_ERF, OP_SIN, OP_COS,
    OP_ADD, OP_SUB, OP_MUL, OP_DIV, OP_POW, OP_MAX, OP_MIN, OP_GT, OP_GE, OP_LT, OP_LE, OP_EQ, OP_NE, OP_AND, OP_OR,
    OP_WHERE, OP_SUM, OP_DOT,
    OP_MUL_ADD, OP_MUL_SUB, OP_SUB_MUL, OP_MUL_MUL, OP_POW_LOG,
    OPERATIONS
};
/* Registers and inputs hold numbers of rows, or (small) numbers of statistics, which are double in narrow programs too. */
enum { SLOT_REGISTER, SLOT_CONSTANT, SLOT_INPUT, SLOT_SMALL, SLOT_SMALL_INPUT };
enum { MEASURE, NORMALIZE, MEASURE_BACK, NORMALIZE_BACK, PROGRAMS };
#define MOST_SLOTS 512

/* Element i is element offset + (i / repeat) % length of a slot. */
typedef struct { int32_t slot, offset, repeat, length; } Operand;

/* Element i of the result is stored in element offset + (i / repeat) % length of the target; OP_SUM adds to this element, and
   OP_DOT adds products. */
typedef struct { int32_t op, target, offset, count, repeat, length; Operand from[3]; } Instruction;

/* at: for a register or a constant, the sum of the lengths of the ones before it; for an input, its number. */
typedef struct { int64_t kind, at, length; } Slot;

/* The header of a program. The instructions, the slots, the outputs (int64) and the constants (double) follow it. */
typedef struct { int64_t words, instructions, slots, outputs, constants, row_doubles, tile_rows, inputs, narrow; } Program;

/* Rows of one input or output: row r starts at r * apart. Numbers are double; numbers of rows are float in a narrow program. */
typedef struct { const void *at; int64_t apart; } Input;

/* Base addresses of a step: registers that are no output, constants, then every input, then every output. */
enum { BASE_REGISTERS, BASE_CONSTANTS, BASE_INPUTS };
/* An operand of a step: bytes from its base, distance between rows (except of inputs and outputs), and the pattern as in
   Operand. */
typedef struct { int32_t base, is_float; int64_t bytes, apart, repeat, length; } Source;

/* A part of a step in a chain. It works on vectors of the accumulator, which stay in processor registers from one move to the next.
   An arithmetic move has code = operation * MOVE_MODES + mode. mode / 4 is the operand that the accumulator holds; bit 0 of the mode:
   the first of the other operands is a number; bit 1: the second one is a number. */
enum { MOVE_MODES = 12 };
enum { MOVE_LOAD = OPERATIONS * MOVE_MODES, MOVE_LOAD_NUMBER, MOVE_STORE, MOVE_STORE_SUM, MOVE_SUM, MOVE_DOT, MOVE_DOT_SELF, MOVE_SQUARE, MOVE_END };
enum { TARGET = 3 }; /* the place of the target among the operands of a step */
typedef struct { int16_t code; int8_t of[2]; } Move; /* of: operands of the step, or -1 */
enum { MOST_CHAIN = 32, MOST_CHAIN_NUMBERS = 24, MOST_CHAIN_SUMS = 8 }; /* steps, operands that are numbers, and sums of a chain */

/* An instruction, prepared once for all tiles. */
enum { STEP_ROWS, STEP_PARTS, STEP_PIECES, STEP_SUMS, STEP_ANY_SUMS };
typedef struct {
    int32_t op, kind, operands, is_float;
    int32_t vectors;       /* bit k: operand k is as long as the result; otherwise it has one number for each row or part of a row */
    int32_t spread;        /* bit k: operand k has one number for each part of a row */
    int64_t count, parts;  /* of a sum: number of terms, and number of sums */
    int64_t repeat;        /* of a sum */
    Source to, from[3];
    int32_t chain;         /* number of steps of the chain that starts here; 0: the step runs alone */
    int32_t moves;         /* of a step of a chain */
    Move move[3];
} Step;

/* One loop of an operation over `blocks` blocks of n elements, float or double. An operand is a vector, `apart` elements from
   block to block, or one double number for each block. */
typedef struct {
    void *out;
    long out_apart;
    const void *vector[3];
    const double *number[3];
    long apart[3], n, blocks;
    double spare[3]; /* numbers converted from float */
} Run;

/* A program that is prepared to run. direct: the places where it may compute its first output directly, apart from all inputs,
   or also over the last input. added: it adds its first output to the numbers at the place that it gets. */
enum { DIRECT_APART = 1, DIRECT_OVER = 2 };
typedef struct {
    const Program *program;
    int32_t narrow, direct, added;
    int64_t steps;
    Step *step;
} Ready;

/* Return the next program. */
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


/* Prepare a program; `step` has room for all of its instructions. If possible, add the first output to numbers, double (`add` = 0)
   or float (1); -1: never. */
Ready atn_norms_ready(const Program *program, int narrow, Step *step, int add);

/* Group the steps of a program into chains. */
void atn_norms_chains(Ready *ready, int add);

/* Return the first output that uses a slot, or -1. */
int64_t atn_norms_output_of(const Program *program, int64_t slot);

/* Return true if an output holds floats. */
static inline int is_float_output(const Ready *ready, int64_t output) {
    return ready->narrow && is_row_slot(program_slots(ready->program) + program_outputs(ready->program)[output]);
}

#endif
