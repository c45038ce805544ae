/* Constants, structures and functions that all instruction sets share. */

#ifndef ATN_NORMS_BLOCKS_H
#define ATN_NORMS_BLOCKS_H

#include <stddef.h>

#include "program.h"
#include "recurrent.h"

#define BLOCK_ROWS 16
#define BLOCK_UNITS 32 /* features of each group in a block, for batch statistics */
#define LANE_STEP 8 /* the number of lanes of a block is a multiple of this */
#define MOST_TOGETHER 4               /* blocks of rows that pass through time together */
#define MOST_SUMS 32                  /* parts of the rows with separate sums for the gradients of small weights */
#define ROWS_SUMMED 128               /* rows times steps of such a part, at least */
#define NEAR_BYTES ((size_t)1 << 20)  /* bytes of weights that fit into a near cache */
#define DEPTH 128                     /* rows of a packed panel that are used together, 16 KiB at most */
#define FETCH_BYTES 8192              /* distance at which a panel is prefetched */
#define UNPACKED 8                    /* up to this number of rows times steps, weights are not packed */
#define THIN 4                        /* input features up to which weight gradients are summed without a matrix product */

/* A site during a call: the fields of a Site, and the addresses of one block in its timeline and in the work space. The part of
   a block in the timeline is contiguous. A lane without a row holds a mean and a variance of 0. With batch statistics, blocks
   consist of features of each group, and lane = group * width of the block + feature. */
typedef struct {
    int32_t norm, window;
    int64_t features, groups, prefix, lanes, blocks;
    int64_t hidden; /* number of the oldest statistics of the prefix that have weight 0 in every row */
    double decay;
    const void *gain, *shift;
    const double *counts;    /* [T] weight of each step; NULL: 1 */
    const double *taps;      /* [prefix + 1] weights by age of a weighted window */
    double *weight;          /* [prefix, L] weights of the prefix */
    double *mean, *var;      /* [prefix + T, L] statistics of single steps, the prefix first; a mean square is in `var` */
    /* [T + 1, L] pooled statistics, and 1 / total weight of the window. Of a window over the past: its total weight, and until
       step T the statistic pooled before step t. */
    double *mu, *v, *share;
    double *scale;           /* [T + 1, L] 1 / sqrt(v + eps) */
    /* forward: parts of windows before a boundary [3, prefix, L]: weight, mean, variance; and after it [2, L]: mean and
       variance, followed by their weight */
    double *late, *run;
    double *eps;             /* forward: [L] */
    double *dmean, *dvar;    /* [prefix + T, L] gradient of the statistics of single steps */
    double *dmu, *dv;        /* [T + 1, L] gradient of the pooled statistics */
    double *carry;           /* [2, L] gradient passed from later to earlier steps */
    double *dgain, *dshift;  /* sums: [F], or [L] with batch statistics */
    double *room;            /* work space: all arrays outside the timeline */
    const Ready *ready;      /* of NORM_TRACED: its four programs; other fields as in Site, but parameters are double */
    int64_t parts, parameters;
    int centred, detached;
    double *parameter;       /* [parts, parameters] */
} SiteBuffers;

/* A call with its sites and their buffers. */
typedef struct {
    int32_t cell, threads;
    int64_t steps, batch, inputs, hidden, output; /* output: features of h */
    int coupled;       /* true with batch statistics at every normed site and no projection: blocks are of hidden units */
    int mixed;         /* true with other batch statistics: all rows pass through time together */
    int64_t live;      /* with batch statistics: number of steps with an unmasked row */
    double *counts;    /* with batch statistics: [T] unmasked rows of each step */
    int64_t program_doubles; /* doubles that a thread needs to run any program; 0: there is no program */
    const Call *call;
    SiteBuffers site[SITES]; /* sites of the first block */
    SiteBuffers (*lines)[SITES]; /* sites of every block of rows */
} Work;

/* Allocate the buffers of every site and load its initial state. For the backward pass, also allocate and clear gradients.
   Return 0 on success. */
int atn_norms_begin(Work *work, const Call *call, int backward, int is_double);
/* Store the results, which are the next states or all gradients of the sites, and free the buffers. */
void atn_norms_end(Work *work, int backward, int is_double);

/* Return the buffers of a site for another block. */
SiteBuffers atn_norms_site_buffers(const SiteBuffers *first, int64_t steps, int64_t block);

void *atn_norms_memory(size_t bytes); /* aligned to a cache line; NULL if out of memory */
int64_t atn_norms_block_start(int64_t batch, int64_t block); /* first row of a block */
int64_t atn_norms_blocks(int64_t batch);                        /* number of blocks of rows in a batch */
int64_t atn_norms_unit_blocks(int64_t hidden);                  /* number of blocks of hidden units */
int atn_norms_thread(void);           /* index of the calling thread in its team */
int atn_norms_team(void);             /* number of threads in the team */
void atn_norms_wait(void);            /* wait for all threads of the team */

int atn_norms_run_base(const Work *work, int backward, int is_double);
int atn_norms_run_avx2(const Work *work, int backward, int is_double);
int atn_norms_run_avx512(const Work *work, int backward, int is_double);

/* Run a program on at most one tile of rows. */
void atn_norms_interpret_base(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output);
void atn_norms_interpret_avx2(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output);
void atn_norms_interpret_avx512(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output);

#endif
