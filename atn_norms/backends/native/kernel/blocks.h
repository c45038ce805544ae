/* What the instruction sets share. */

#ifndef ATN_NORMS_BLOCKS_H
#define ATN_NORMS_BLOCKS_H

#include <stddef.h>

#include "recurrent.h"

#define BLOCK_ROWS 16
#define BLOCK_LANES (BLOCK_ROWS * 64) /* rows times groups */

void *atn_norms_memory(size_t bytes); /* aligned to a cache line; NULL where there is none */
int64_t atn_norms_block_start(int64_t batch, int64_t block); /* first row of a block */
int atn_norms_thread(void);           /* index of the calling thread in its team */

int atn_norms_run_base(const Call *call, int backward, int is_double);
int atn_norms_run_avx2(const Call *call, int backward, int is_double);
int atn_norms_run_avx512(const Call *call, int backward, int is_double);

#endif
