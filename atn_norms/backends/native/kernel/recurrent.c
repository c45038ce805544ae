/* Choice of the instruction set, memory and threads; recurrent.inc.h runs the sequence. */

#define _POSIX_C_SOURCE 200809L

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "blocks.h"

#define INTERFACE 11

static int32_t cap = 2;
static volatile int forked = 0;

static void after_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

void *atn_norms_memory(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes ? bytes : 64) == 0 ? memory : NULL;
}

int atn_norms_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

int atn_norms_team(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

void atn_norms_wait(void) {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

int32_t atn_norms_level(int32_t limit) {
    if (limit >= 0) cap = limit;
    int32_t level = 0;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
    if (level && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        level = 2;
#endif
    return level < cap ? level : cap;
}

static int run_level(const Work *work, int backward, int32_t is_double) {
#if defined(__x86_64__) && defined(__GNUC__)
    const int32_t level = atn_norms_level(-1);
    if (level == 2) return atn_norms_run_avx512(work, backward, is_double);
    if (level == 1) return atn_norms_run_avx2(work, backward, is_double);
#endif
    return atn_norms_run_base(work, backward, is_double);
}

static void interpret_level(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output) {
#if defined(__x86_64__) && defined(__GNUC__)
    const int32_t level = atn_norms_level(-1);
    if (level == 2) { atn_norms_interpret_avx512(ready, input, rows, room, output); return; }
    if (level == 1) { atn_norms_interpret_avx2(ready, input, rows, room, output); return; }
#endif
    atn_norms_interpret_base(ready, input, rows, room, output);
}

int32_t atn_norms_run(const Call *prepared, const int64_t *words, const int64_t *addresses, int64_t count, int32_t threads,
                      int32_t backward, int32_t is_double) {
    Work work;
    Call call = *prepared;
    call.threads = threads;
    for (int64_t i = 0; i < count; i++) memcpy((char *)&call + 8 * words[i], addresses + i, 8);
    if (atn_norms_begin(&work, &call, backward, is_double)) return 1;
#ifdef _OPENMP
    /* After a fork the threads of the parent do not exist in the child, and OpenMP would wait for them forever. */
    if (forked) work.threads = 1;
#else
    work.threads = 1;
#endif
    const int failed = run_level(&work, backward, is_double);
    atn_norms_end(&work, failed ? -1 : backward, is_double);
    return failed;
}

/* Run one program on contiguous rows of its inputs, with contiguous outputs. In a narrow program rows are float and statistics
   double. Return 1 if out of memory. */
int32_t atn_norms_interpret(const int64_t *words, int32_t narrow, const void *const *inputs, int64_t rows, void *const *outputs) {
    const Program *program = (const Program *)words;
    const Slot *slot = program_slots(program);
    const size_t steps = (size_t)program->instructions * sizeof(Step);
    char *memory = atn_norms_memory(steps + (size_t)(program->tile_rows * program->row_doubles) * sizeof(double));
    Input input[MOST_SLOTS], output[MOST_SLOTS];
    if (!memory) return 1;
    const Ready ready = atn_norms_ready(program, narrow, (Step *)memory, -1);
    double *room = (double *)(memory + steps);
    for (int64_t row = 0; row < rows; row += program->tile_rows) {
        const int64_t count = rows - row < program->tile_rows ? rows - row : program->tile_rows;
        for (int64_t i = 0; i < program->inputs; i++) {
            const int64_t size = narrow && is_row_slot(slot + i) ? sizeof(float) : sizeof(double);
            input[i] = (Input){(const char *)inputs[i] + row * slot[i].length * size, slot[i].length};
        }
        output[0].at = NULL;
        interpret_level(&ready, input, count, room, output);
        for (int64_t o = 0; o < program->outputs; o++) {
            const int64_t length = slot[program_outputs(program)[o]].length;
            const int64_t size = is_float_output(&ready, o) ? sizeof(float) : sizeof(double);
            for (int64_t r = 0; r < count; r++)
                memcpy((char *)outputs[o] + (row + r) * length * size, (const char *)output[o].at + r * output[o].apart * size, (size_t)(length * size));
        }
    }
    free(memory);
    return 0;
}

int64_t atn_norms_blocks(int64_t batch) { return (batch + BLOCK_ROWS - 1) / BLOCK_ROWS; }

int64_t atn_norms_unit_blocks(int64_t hidden) { return (hidden + BLOCK_UNITS - 1) / BLOCK_UNITS; }

/* Blocks of about equal size, independent of the number of threads. */
int64_t atn_norms_block_start(int64_t batch, int64_t block) { return batch * block / atn_norms_blocks(batch); }

/* Return true if several threads can share a batch. */
int32_t atn_norms_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int64_t atn_norms_interface(void) { return INTERFACE * 65536 + (int64_t)sizeof(Call); }
