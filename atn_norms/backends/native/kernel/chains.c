/* Chains: consecutive steps over whole rows, which run together on a few vectors at a time. The result of a step stays in processor
   registers for the next one, and goes to memory only if another step reads it. */

#include <stddef.h>

#include "program.h"

static const Source *access_of(const Step *step, int k) { return k == TARGET ? &step->to : step->from + k; }

static int is_sum(const Step *step) { return step->kind == STEP_SUMS; }

static int is_vector(const Step *step, int k) { return is_sum(step) ? k != TARGET : k == TARGET || step->vectors >> k & 1; }

/* The first output may be computed over the last input. */
static int32_t memory(const Program *program, const Source *at) {
    const int32_t last = (int32_t)(BASE_INPUTS + program->inputs) - 1;
    return at->base == last + 1 ? last : at->base;
}

/* Return 0 if two accesses do not overlap, 1 if both are the same vector, and -1 if they overlap in another way. */
static int overlap(const Program *program, const Step *a, int i, const Step *b, int j) {
    const Source *one = access_of(a, i), *other = access_of(b, j);
    if (memory(program, one) != memory(program, other)) return 0;
    const int64_t long_one = is_vector(a, i) ? a->count : 1, long_other = is_vector(b, j) ? b->count : 1;
    const int64_t size = one->is_float ? sizeof(float) : sizeof(double);
    if (one->bytes + long_one * size <= other->bytes || other->bytes + long_other * size <= one->bytes) return 0;
    return one->bytes == other->bytes && is_vector(a, i) && is_vector(b, j) ? 1 : -1;
}

/* Return true if two accesses read or write the same vector, not only the same memory: an output may lie over an input. */
static int is_same(const Program *program, const Step *a, int i, const Step *b, int j) {
    return access_of(a, i)->base == access_of(b, j)->base && overlap(program, a, i, b, j) == 1;
}

static int type_of(const Step *step) { return is_sum(step) ? step->from[0].is_float : step->is_float; }

/* Return true for functions of many instructions, which run faster over whole tiles. */
static int is_long(int32_t op) {
    return (op >= OP_EXP && op <= OP_SIGMOID) || (op >= OP_LOG1P && op <= OP_COS) || op == OP_POW || op == OP_POW_LOG;
}

/* Return true if a step may be part of a chain. */
static int can_chain(const Step *step) {
    if (is_long(step->op)) return 0;
    if (is_sum(step)) return step->parts == 1 && step->repeat == step->count;
    const int one = step->count == 1 && !step->is_float && step->to.length == 1;
    return step->kind == STEP_ROWS && !one && (step->vectors || step->op == OP_COPY);
}

static int numbers(const Step *step) {
    int many = 0;
    for (int k = 0; k < step->operands; k++) many += !is_vector(step, k);
    return many;
}

/* Return true if `step` may follow the `many` steps of a chain. The elements of a row are computed a few at a time, so every step
   must write an element before or after the others read it, as in whole rows. */
static int joins(const Program *program, const Step *first, int many, const Step *step) {
    int sums = is_sum(step), singles = numbers(step);
    if (many == MOST_CHAIN || first->count != step->count || type_of(first) != type_of(step)) return 0;
    for (const Step *other = first; other < first + many; other++) {
        sums += is_sum(other);
        singles += numbers(other);
        if (overlap(program, other, TARGET, step, TARGET) < 0) return 0;
        for (int k = 0; k < step->operands; k++)
            if (overlap(program, other, TARGET, step, k) < 0) return 0;
        for (int k = 0; k < other->operands; k++)
            if (overlap(program, other, k, step, TARGET) < 0) return 0;
    }
    return sums <= MOST_CHAIN_SUMS && singles <= MOST_CHAIN_NUMBERS;
}

/* Return true if no step outside a chain uses a slot, which is a register and no output. Such a register needs one row. */
static int is_local(const Ready *ready, const Step *first, int many, int64_t slot) {
    const Program *program = ready->program;
    const int64_t kind = program_slots(program)[slot].kind;
    if ((kind != SLOT_REGISTER && kind != SLOT_SMALL) || atn_norms_output_of(program, slot) >= 0) return 0;
    const Instruction *code = program_code(program);
    for (int64_t i = 0; i < program->instructions; i++) {
        const Step *step = ready->step + i;
        if (step >= first && step < first + many) continue;
        int used = code[i].target == slot;
        for (int k = 0; k < step->operands; k++) used |= code[i].from[k].slot == slot;
        if (used) return 0;
    }
    return 1;
}

/* The operand that the accumulator holds before each step of a chain, and the one that must be loaded into it, or -1. */
typedef struct { int held, load; } Accumulator;

static int is_product(int32_t op) { return op == OP_MUL_ADD || op == OP_MUL_SUB || op == OP_SUB_MUL; }

static Accumulator accumulator(const Program *program, const Step *step, const Step *holder, int place) {
    Accumulator found = {-1, -1};
    for (int k = 0; k < step->operands && holder; k++)
        if (is_vector(step, k) && is_same(program, holder, place, step, k)) {
            found.held = k;
            return found;
        }
    for (int k = 0; k < step->operands; k++)
        if (found.load < 0 && is_vector(step, k)) found.load = k;
    if (found.load < 0) found.load = 0;
    return found;
}

static int is_square(const Program *program, const Step *step) {
    return (step->op == OP_MUL || step->op == OP_DOT) && is_vector(step, 0) && is_vector(step, 1) && is_same(program, step, 0, step, 1);
}

/* Return true if a step after `place` reads the result of that step from memory. */
static int is_read(const Program *program, const Step *first, int many, int place, const Accumulator *accumulator) {
    const Step *own = first + place;
    for (int i = place + 1; i < many; i++) {
        const Step *step = first + i;
        for (int k = 0; k < step->operands; k++) {
            const int in_accumulator = k == accumulator[i].held || (accumulator[i].held >= 0 && is_square(program, step));
            if (!in_accumulator && overlap(program, own, TARGET, step, k)) return 1;
        }
        if (overlap(program, own, TARGET, step, TARGET)) return 0;
    }
    return 0;
}

static void add_move(Step *step, int code, int one, int other) {
    step->move[step->moves++] = (Move){(int16_t)code, {(int8_t)one, (int8_t)other}};
}

static int is_commutative(int32_t op) {
    return op == OP_ADD || op == OP_MUL || op == OP_EQ || op == OP_NE || op == OP_AND || op == OP_OR;
}

/* Set the moves of a step; `k` is the operand in the accumulator. */
static void set_moves(const Program *program, Step *step, Accumulator from, int store) {
    int k = from.held >= 0 ? from.held : from.load;
    if (from.held < 0) add_move(step, is_vector(step, k) ? MOVE_LOAD : MOVE_LOAD_NUMBER, k, -1);
    if (step->op == OP_SUM) add_move(step, MOVE_SUM, TARGET, -1);
    else if (step->op == OP_DOT && is_square(program, step)) add_move(step, MOVE_DOT_SELF, TARGET, -1);
    else if (step->op == OP_DOT) add_move(step, MOVE_DOT, TARGET, 1 - k);
    else if (is_square(program, step)) add_move(step, MOVE_SQUARE, -1, -1);
    else if (step->operands == 1 && step->op != OP_COPY) add_move(step, step->op * MOVE_MODES, -1, -1);
    else if (step->operands == 2) {
        const int role = is_commutative(step->op) ? 0 : k;
        add_move(step, step->op * MOVE_MODES + 4 * role + !is_vector(step, 1 - k), 1 - k, -1);
    } else if (step->operands == 3) {
        int one = k == 0 ? 1 : 0, other = k == 2 ? 1 : 2;
        if (k == 1 && is_product(step->op)) k = 0; /* the factors commute */
        if (step->op == OP_MUL_MUL) k = 0;
        add_move(step, step->op * MOVE_MODES + 4 * k + !is_vector(step, one) + 2 * !is_vector(step, other), one, other);
    }
    if (store) add_move(step, store, TARGET, -1);
}

/* Return true if every write of the first output is part of a chain, and no step reads it, so that each element may be added to. */
static int can_add(const Ready *ready) {
    const Program *program = ready->program;
    const int64_t *outputs = program_outputs(program), slot = outputs[0];
    for (int64_t o = 1; o < program->outputs; o++)
        if (outputs[o] == slot) return 0;
    const Instruction *code = program_code(program);
    for (int64_t i = 0; i < program->instructions; i++) {
        const Step *step = ready->step + i;
        for (int k = 0; k < step->operands; k++)
            if (code[i].from[k].slot == slot) return 0;
        if (code[i].target != slot) continue;
        if (!step->chain || is_sum(step)) return 0;
        for (int64_t j = 0; j < i; j++)
            if (code[j].target == slot && overlap(program, step, TARGET, ready->step + j, TARGET)) return 0;
    }
    return 1;
}

/* Return true if a step only sets zeros. */
static int is_zero(const Program *program, const Step *step) {
    return step->op == OP_COPY && !is_vector(step, 0) && step->from[0].base == BASE_CONSTANTS &&
           *(const double *)((const char *)program_constants(program) + step->from[0].bytes) == 0.0;
}

static int is_added(const Ready *ready, const Step *step) { return ready->added && step->to.base == BASE_INPUTS + ready->program->inputs; }

void atn_norms_chains(Ready *ready, int add) {
    const Program *program = ready->program;
    const Instruction *code = program_code(program);
    for (int64_t i = 0, many; i < ready->steps; i += many) {
        Step *first = ready->step + i;
        for (many = 0; i + many < ready->steps && can_chain(first + many) && (many == 0 || joins(program, first, (int)many, first + many)); many++)
            first[many].chain = 1; /* part of a chain, until the chain is complete */
        if (many == 0) many = 1;
    }
    ready->added = add >= 0 && program->outputs > 0 && is_float_output(ready, 0) == add && can_add(ready);
    for (int64_t i = 0, many; i < ready->steps; i += many) {
        Step *first = ready->step + i;
        Accumulator from[MOST_CHAIN];
        const Step *holder = NULL;
        int place = TARGET;
        many = 1;
        if (!first->chain) continue;
        while (i + many < ready->steps && first[many].chain && joins(program, first, (int)many, first + many)) many++;
        for (int j = 0; j < many; j++) {
            from[j] = accumulator(program, first + j, holder, place);
            if (!is_sum(first + j)) {
                holder = first + j;
                place = TARGET;
            } else if (from[j].held < 0) {
                holder = first + j;
                place = from[j].load;
            }
        }
        for (int j = 0; j < many; j++) {
            Step *step = first + j;
            const int64_t slot = code[i + j].target;
            const int adds = is_added(ready, step);
            const int needed = !is_sum(step) && (!is_local(ready, first, (int)many, slot) || is_read(program, first, (int)many, j, from));
            step->moves = 0;
            if (adds && is_zero(program, step)) continue;
            set_moves(program, step, from[j], !needed ? 0 : adds ? MOVE_STORE_SUM : MOVE_STORE);
        }
        for (int j = 0; j < many; j++) {
            if (is_local(ready, first, (int)many, code[i + j].target)) first[j].to.apart = 0;
            for (int k = 0; k < first[j].operands; k++)
                if (is_local(ready, first, (int)many, code[i + j].from[k].slot)) first[j].from[k].apart = 0;
        }
        first->chain = many == 1 && !is_added(ready, first) ? 0 : (int32_t)many; /* a single step runs faster over a whole tile */
    }
}
