/* Preparation of programs: the addresses of every instruction, and the loop that runs it. */

#include "program.h"

static int operands_of(int32_t op) {
    if (op == OP_WHERE || op >= OP_MUL_ADD) return 3;
    return (op >= OP_ADD && op <= OP_OR) || op == OP_DOT ? 2 : 1;
}

int64_t atn_norms_output_of(const Program *program, int64_t slot) {
    const int64_t kind = program_slots(program)[slot].kind;
    for (int64_t o = 0; o < program->outputs && (kind == SLOT_REGISTER || kind == SLOT_SMALL); o++)
        if (program_outputs(program)[o] == slot) return o;
    return -1;
}

static Source source(const Program *program, int narrow, int64_t at, const Operand *from) {
    const Slot *slot = program_slots(program) + at;
    const int is_float = narrow && is_row_slot(slot);
    const int64_t size = is_float ? sizeof(float) : sizeof(double), output = atn_norms_output_of(program, at);
    Source found = {BASE_REGISTERS, is_float, from->offset * size, slot->length, from->repeat, from->length};
    if (output >= 0) found.base = (int32_t)(BASE_INPUTS + program->inputs + output);
    else if (slot->kind == SLOT_CONSTANT) {
        found.base = BASE_CONSTANTS;
        found.bytes += slot->at * (int64_t)sizeof(double);
        found.apart = 0;
    } else if (slot->kind == SLOT_INPUT || slot->kind == SLOT_SMALL_INPUT) found.base = (int32_t)(BASE_INPUTS + slot->at);
    else found.bytes += program->tile_rows * slot->at * (int64_t)sizeof(double);
    return found;
}

static void ready_sum(const Instruction *code, Step *step) {
    int whole = code->repeat == code->count / code->length;
    for (int k = 0; k < step->operands; k++)
        whole &= step->from[k].repeat == 1 && step->from[k].length == code->count && step->from[k].is_float == step->from[0].is_float;
    step->kind = whole ? STEP_SUMS : STEP_ANY_SUMS;
    step->parts = code->length;
    step->repeat = code->repeat;
}

/* Choose the loop of an instruction. Regular operands are vectors as long as the result, or have one number for each row or for
   each part of a row. Other operands are processed piece by piece. */
static void ready_loop(const Program *program, const Instruction *code, Step *step) {
    const int64_t count = code->count;
    int regular = 1;
    step->parts = 1;
    for (int k = 0; k < step->operands; k++) {
        const Source *from = step->from + k;
        const int vector = from->repeat == 1 && from->length == count && from->is_float == step->is_float && (count > 1 || !from->is_float);
        const int each = from->repeat > 1 && from->length > 1 && from->repeat * from->length == count;
        if (vector) step->vectors |= 1 << k;
        else if (each) {
            regular &= step->parts == 1 || step->parts == from->length;
            step->parts = from->length;
            step->spread |= 1 << k;
        }
        const int shared = from->base >= BASE_INPUTS && from->base < BASE_INPUTS + program->inputs; /* parameters, the same in all rows */
        regular &= vector || each || from->length == 1;
        regular &= vector || !from->is_float || (from->length == 1 && shared);
    }
    step->kind = !regular ? STEP_PIECES : step->parts > 1 ? STEP_PARTS : STEP_ROWS;
}

/* Return where the first output may be computed directly. If another output uses the same slot: nowhere else. If no instruction
   reads the last input after the first write, except the elements that are being computed: also over the last input. */
static int direct(const Program *program, const Ready *ready) {
    const int32_t output = (int32_t)(BASE_INPUTS + program->inputs), last = output - 1;
    int written = 0;
    if (program->outputs == 0 || atn_norms_output_of(program, program_outputs(program)[0]) != 0) return 0;
    for (int64_t o = 1; o < program->outputs; o++)
        if (program_outputs(program)[o] == program_outputs(program)[0]) return 0;
    for (const Step *step = ready->step; step < ready->step + ready->steps; step++) {
        const int writes = step->to.base == output, whole = step->kind == STEP_ROWS && step->count == step->to.length;
        for (int k = 0; k < step->operands; k++) {
            const Source *from = step->from + k;
            const int same = whole && (step->vectors >> k & 1) && from->bytes == 0;
            if (from->base == last && (written || (writes && !same))) return DIRECT_APART;
        }
        written |= writes;
    }
    return DIRECT_APART | DIRECT_OVER;
}

Ready atn_norms_ready(const Program *program, int narrow, Step *step, int add) {
    const Instruction *code = program_code(program);
    Ready ready = {program, narrow, 0, 0, program->instructions, step};
    for (int64_t i = 0; i < program->instructions; i++, code++, step++) {
        const Operand to = {code->target, code->offset, 1, (int32_t)program_slots(program)[code->target].length};
        *step = (Step){.op = code->op, .operands = operands_of(code->op), .count = code->count, .to = source(program, narrow, code->target, &to)};
        step->is_float = step->to.is_float;
        for (int k = 0; k < step->operands; k++) step->from[k] = source(program, narrow, code->from[k].slot, code->from + k);
        if (code->op == OP_SUM || code->op == OP_DOT) ready_sum(code, step);
        else ready_loop(program, code, step);
    }
    ready.direct = direct(program, &ready);
    atn_norms_chains(&ready, add);
    return ready;
}
