/* The interface of the kernels: plain structures of sizes and pointers.

   Notation: T time steps, B rows of the batch, H hidden units, R features of the output (H without a projection), D inputs,
   N = gates * H pre-activations, F features of a site, G groups of a site (each group of F / G features has its own statistics),
   L = B * G lanes of a site. REAL is float or double, chosen by the call. Time is the first axis of every array; rows are
   contiguous. */

#ifndef ATN_NORMS_RECURRENT_H
#define ATN_NORMS_RECURRENT_H

#include <stdint.h>

enum { CELL_LSTM = 0, CELL_GRU = 1, CELL_RNN_TANH = 2, CELL_RNN_RELU = 3 };
/* NORM_MOMENTS, NORM_MEAN_SQUARE: statistics over the features of each row. NORM_BATCH: moments of each feature over the
   unmasked rows of a step. NORM_POPULATION: normalize with a population instead.
   NORM_TRACED: programs compute statistic and result of each row (program.h). */
enum { NORM_NONE = 0, NORM_MOMENTS = 1, NORM_MEAN_SQUARE = 2, NORM_BATCH = 3, NORM_POPULATION = 4, NORM_TRACED = 5 };
/* WINDOW_PAST: a decaying window over the steps before the current step; without any, over the current step. */
enum { WINDOW_SLIDING = 0, WINDOW_DECAYING = 1, WINDOW_WEIGHTED = 2, WINDOW_PAST = 3 };
enum { SITE_IH = 0, SITE_HH = 1, SITE_C = 2, SITES = 3 };

typedef struct {
    int32_t norm;    /* NORM_* */
    int32_t window;  /* WINDOW_* */
    int64_t features, groups; /* with batch statistics, groups are the gates of the site if the layer is uniform (below), otherwise 1 */
    int64_t prefix;  /* number of statistics in the state: k - 1 for a sliding or weighted window of k steps, otherwise 1 */
    double decay;    /* factor of a step's weight for each later step; 1 for a cumulative window */
    const double *eps;  /* added to each variance before the root: [G], or [F] with batch statistics */
    const void *gain, *shift; /* REAL [F] */
    /* The initial state and the final state: weights [B, prefix], then mean and variance [B, prefix, G] each (a mean square is
       the second of the three). NULL in the first place: an empty window. Batch statistics have one state: [1, prefix] and [1,
       prefix, F]. */
    const double *state[3];
    double *next[3];        /* NULL: not required */
    const double *dnext[3]; /* backward: gradient of the final state; NULL: none */
    double *dstate[3];      /* backward: gradient of the initial state; NULL: not required */
    void *dgain, *dshift;   /* backward: REAL [F] */
    int64_t populations;    /* of NORM_POPULATION: T, or 1 for all steps */
    /* Of NORM_POPULATION [populations, 2 F]: means, then variances. Of NORM_BATCH [T, 2 F + 1]: the pooled moments and the weight
       of the window, written by the forward pass. */
    double *population;
    double *timeline;       /* [atn_norms_timeline(...)] every statistic of the sequence; forward writes it, backward reads it;
                               NULL: not kept (forward only) */
    /* Of NORM_TRACED: its four programs; the number of equal parts of the features, on which they run in turn; the number of
       parameters of a part (gain holds those of all parts, dgain their gradients); true if the statistic is a mean and a
       variance. groups is the number of elements of a row's statistic, 0 without a statistic. */
    const void *programs;
    int64_t parts, parameters, centred;
    int64_t detached;       /* true if the past of the window has no gradient: neither the initial state nor the final one */
    const double *taps;     /* of WINDOW_WEIGHTED [prefix + 1]: the weight of a step by its age */
} Site;

/* Return the number of doubles in the timeline of a site. */
int64_t atn_norms_timeline(int64_t prefix, int64_t steps, int64_t batch, int64_t groups);
/* Return it for batch statistics. */
int64_t atn_norms_batch_timeline(int64_t prefix, int64_t steps, int64_t hidden, int64_t groups);

typedef struct {
    int32_t cell; /* CELL_* */
    int32_t threads;
    int64_t steps, batch, inputs, hidden;
    int64_t projection;        /* R of an LSTM with a projection; else 0 */
    int64_t joint;             /* true if one norm, that of SITE_HH, normalizes the sum of both products; SITE_IH then has none */
    int64_t normed_carry;      /* true if an LSTM carries its normalized cell state */
    const int64_t *lengths;    /* [B] unmasked steps of each row; NULL: all */
    const void *xs;            /* REAL [T, B, D] inputs */
    const void *weight_ih;     /* REAL [N, D] */
    const void *weight_hh;     /* REAL [N, R] */
    const void *weight_hr;     /* REAL [R, H] of a projection */
    const void *bias_ih, *bias_hh; /* REAL [N], or NULL */
    /* In a uniform layer, which has batch statistics at every normed site and no projection, these three are stored one block of
       units after the other, as in coupled.inc.h. */
    void *projected;           /* REAL [T, B, N] input products before their norm; NULL: not kept, but computed again; NULL if joint */
    void *recurrent;           /* REAL [T, B, N] recurrent products, or sums, before their norm; NULL: not kept (forward only) */
    void *cells;               /* REAL [T, B, H] cell states of an LSTM before their norm; NULL: not kept (forward only) */
    void *units;               /* REAL [T, B, H] outputs before a projection; NULL: not kept (forward only) */
    void *output;              /* REAL [T, B, R] */
    const void *h0, *c0;       /* REAL [B, R], [B, H] */
    void *hn, *cn;             /* REAL [B, R], [B, H] */
    /* backward only */
    const void *doutput;       /* REAL [T, B, R] */
    void *dh, *dc;             /* REAL [B, R], [B, H] on entry: gradient of hn, cn; on return: of h0, c0 */
    void *dxs;                 /* REAL [T, B, D], or NULL: not required */
    void *dweight_ih, *dweight_hh, *dweight_hr; /* REAL [N, D], [N, R], [R, H], zeros on entry */
    void *dbias_ih, *dbias_hh; /* REAL [N], zeros on entry, or NULL */
    Site site[SITES];
} Call;

/* Run a call that is prepared except for its number of threads and its addresses: address i belongs in the 8-byte word words[i] of
   the structure. Return 0, or 1 if out of memory. */
int32_t atn_norms_run(const Call *prepared, const int64_t *words, const int64_t *addresses, int64_t count, int32_t threads,
                      int32_t backward, int32_t is_double);
/* Return the instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512; `limit` caps it (a negative one leaves the cap unchanged). */
int32_t atn_norms_level(int32_t limit);
/* Return the version of this interface and the size of a Call, which must match those of the caller. */
int64_t atn_norms_interface(void);

#endif
