/* What the instruction sets share. */

#ifndef ATN_NORMS_BLOCKS_H
#define ATN_NORMS_BLOCKS_H

#include <stddef.h>

#include "program.h"
#include "recurrent.h"

#define BLOCK_ROWS 16
#define BLOCK_UNITS 32 /* hidden units, where norms couple the rows */
#define LANE_STEP 8 /* lanes of a block are filled up to a multiple of this */
#define MOST_TOGETHER 4               /* blocks */
#define NEAR_BYTES ((size_t)1 << 20)  /* of recurrent weights */
#define UNPACKED 8                    /* rows and steps in all for which no weights are packed */
#define THIN 4                        /* input features whose weight gradients are summed without a product */

/* A site while it is worked on: the fields of a Site, and the places of one block in its timeline and in work space.
   A block's part of the timeline is one piece. A lane that no row fills holds a mean and a variance of 0.
   Where norms couple the batch, blocks are of hidden units, and lane = gate * width of the block + unit. */
typedef struct {
    int32_t norm, window;
    int64_t features, groups, prefix, lanes, blocks;
    int64_t hidden; /* how many statements of the prefix, from the oldest on, have weight 0 in every row */
    double decay, eps;
    const void *gain, *shift;
    const double *counts;    /* [T] what each step weighs; NULL: 1 */
    const double *taps;      /* [prefix + 1] of a weighted window */
    double *weight;          /* [prefix, L] weights of the prefix */
    double *mean, *var;      /* [prefix + T, L] own statements, the prefix first; a mean square is `var` */
    double *mu, *v, *share;  /* [T + 1, L] pooled statements, and 1 / total weight of the window; of a window over the past the weight
                                itself, and what is pooled before step t, until step T */
    double *scale;           /* [T + 1, L] 1 / sqrt(v + eps) */
    double *late, *run;      /* forward: [3, prefix, L] and [2, L] and one more, parts of windows: weight, mean, variance */
    double *dmean, *dvar;    /* [prefix + T, L] gradient of own statements */
    double *dmu, *dv;        /* [T + 1, L] gradient of pooled statements */
    double *carry;           /* [2, L] what comes back in time */
    double *dgain, *dshift;  /* sums: [F], or [L] where norms couple the batch */
    double *room;            /* where all that is not in the timeline lies */
    const Ready *ready;      /* of NORM_TRACED: its four programs; the rest as in Site, but for the parameters, which are all double here */
    int64_t parts, parameters;
    int centred, detached;
    double *parameter;       /* [parts, parameters] */
} SiteBuffers;

/* A call with its sites laid out. */
typedef struct {
    int32_t cell, threads;
    int64_t steps, batch, inputs, hidden;
    int coupled;       /* whether norms couple the batch */
    int64_t live;      /* then: steps in which any row is alive */
    double *counts;    /* and [T] live rows of each step */
    int64_t program_doubles; /* that a thread needs to run any program; 0: there is none */
    const Call *call;
    SiteBuffers site[SITES]; /* of the first block */
} Work;

/* Lay out every site and bring in its given state; for the way back, also take and prepare room for gradients. 0 if well. */
int atn_norms_begin(Work *work, const Call *call, int backward, int is_double);
/* Hand out what follows: the next states, or all gradients of the sites; then give the room back. */
void atn_norms_end(Work *work, int backward, int is_double);

/* A site of another block. */
SiteBuffers atn_norms_site_buffers(const SiteBuffers *first, int64_t steps, int64_t block);

void *atn_norms_memory(size_t bytes); /* aligned to a cache line; NULL where there is none */
int64_t atn_norms_block_start(int64_t batch, int64_t block); /* first row of a block */
int64_t atn_norms_blocks(int64_t batch);                        /* into how many blocks of rows a batch is cut */
int64_t atn_norms_unit_blocks(int64_t hidden);                  /* and hidden units */
int atn_norms_thread(void);           /* index of the calling thread in its team */
int atn_norms_team(void);             /* how many the team has */
void atn_norms_wait(void);            /* until all of the team are there */

int atn_norms_run_base(const Work *work, int backward, int is_double);
int atn_norms_run_avx2(const Work *work, int backward, int is_double);
int atn_norms_run_avx512(const Work *work, int backward, int is_double);

/* Run a program on at most a tile of rows. */
void atn_norms_interpret_base(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output);
void atn_norms_interpret_avx2(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output);
void atn_norms_interpret_avx512(const Ready *ready, const Input *input, int64_t rows, double *room, Input *output);

#endif
