/* The interface of the kernels: plain structures of sizes and pointers.

   Notation: T time steps, B rows of the batch, H hidden units, D inputs, N = gates * H pre-activations, F features of a site,
   G groups of a site (each group of F / G features has its statistics), L = B * G lanes of a site.
   REAL is float or double, by the call. Time comes first in every array; rows are contiguous. */

#ifndef ATN_NORMS_RECURRENT_H
#define ATN_NORMS_RECURRENT_H

#include <stdint.h>

enum { CELL_LSTM = 0, CELL_GRU = 1, CELL_RNN_TANH = 2, CELL_RNN_RELU = 3 };
/* Moments or a mean square over features, of every row by itself; or each feature's moments over the live rows of a step
   (then every site that has a norm is of that kind), with which it is normed, or else with a population's; or what programs
   compute of every row by itself (program.h). */
enum { NORM_NONE = 0, NORM_MOMENTS = 1, NORM_MEAN_SQUARE = 2, NORM_BATCH = 3, NORM_POPULATION = 4, NORM_TRACED = 5 };
/* WINDOW_PAST: a decaying window over the steps before the one at hand, or over that one where there are none. */
enum { WINDOW_SLIDING = 0, WINDOW_DECAYING = 1, WINDOW_WEIGHTED = 2, WINDOW_PAST = 3 };
enum { SITE_IH = 0, SITE_HH = 1, SITE_C = 2, SITES = 3 };

typedef struct {
    int32_t norm;    /* NORM_* */
    int32_t window;  /* WINDOW_* */
    int64_t features, groups; /* where norms couple the batch, groups are the gates of the site */
    int64_t prefix;  /* statements the state brings: k - 1 for a sliding or weighted window of k steps, 1 for another */
    double decay;    /* what remains of a step's weight one step later; 1 for a cumulative window */
    double eps;
    const void *gain, *shift; /* REAL [F] */
    /* The state, and the state that follows: weights [B, prefix], then mean and variance [B, prefix, G] each (of a mean
       square, itself in the second place). A first that is NULL: a fresh window. Of a batch there is one state:
       [1, prefix] and [1, prefix, F]. */
    const double *state[3];
    double *next[3];
    const double *dnext[3]; /* backward: gradient of the state that follows; NULL: none */
    double *dstate[3];      /* backward: of the given state; NULL: not wanted */
    void *dgain, *dshift;   /* backward: REAL [F] */
    int64_t populations;    /* of NORM_POPULATION: T, or 1 for all steps */
    double *population;     /* of NORM_POPULATION [populations, 2 F]: means, then variances; of NORM_BATCH [T, 2 F + 1]: the
                               pooled ones and the window's weight, written by the forward pass */
    double *timeline;       /* [atn_norms_timeline(...)] every statement of the sequence; forward fills it, backward reads it */
    /* Of NORM_TRACED: its four programs; how many equal parts of the features they run on, one after the other; how many
       parameters a part has (gain holds those of all parts, and dgain their gradients); whether the statistic is a mean and a
       variance; groups are the elements of a row's statistic, 0 where there is none. */
    const void *programs;
    int64_t parts, parameters, centred;
    int64_t detached;       /* whether no gradient flows through the past of the window: not into the given state, not out of the next */
    const double *taps;     /* of WINDOW_WEIGHTED [prefix + 1]: the weight of a step by its age */
} Site;

/* Doubles in the timeline of a site. */
int64_t atn_norms_timeline(int64_t prefix, int64_t steps, int64_t batch, int64_t groups);
/* ... whose statements are taken over the rows of a batch. */
int64_t atn_norms_batch_timeline(int64_t prefix, int64_t steps, int64_t hidden, int64_t groups);

typedef struct {
    int32_t cell; /* CELL_* */
    int32_t threads;
    int64_t steps, batch, inputs, hidden;
    int64_t joint;             /* whether one norm, that of SITE_HH, takes the sum of both products; SITE_IH has none then */
    int64_t normed_carry;      /* whether an LSTM carries its normalized cell state */
    const int64_t *lengths;    /* [B] live steps of each row, or NULL: all */
    const void *xs;            /* REAL [T, B, D] inputs */
    const void *weight_ih;     /* REAL [N, D] */
    const void *weight_hh;     /* REAL [N, H] */
    const void *bias_ih, *bias_hh; /* REAL [N], or NULL */
    /* Where norms couple the batch, these three lie block of units by block, as in coupled.inc.h. */
    void *projected;           /* REAL [T, B, N] input products before their norm; NULL: not kept, and computed again; NULL if joint */
    void *recurrent;           /* REAL [T, B, N] recurrent products, or sums, before their norm; NULL: not kept (forward only) */
    void *cells;               /* REAL [T, B, H] cell states of an LSTM before their norm; NULL: not kept (forward only) */
    void *output;              /* REAL [T, B, H] */
    const void *h0, *c0;       /* REAL [B, H] */
    void *hn, *cn;             /* REAL [B, H] */
    /* backward only */
    const void *doutput;       /* REAL [T, B, H] */
    void *dh, *dc;             /* REAL [B, H] in: gradient of hn, cn; out: of h0, c0 */
    void *dxs;                 /* REAL [T, B, D], or NULL: not wanted */
    void *dweight_ih, *dweight_hh; /* REAL [N, D], [N, H], zeros at first */
    void *dbias_ih, *dbias_hh; /* REAL [N], zeros at first, or NULL */
    Site site[SITES];
} Call;

/* Both return 0, or 1 where memory could not be had. */
int atn_norms_forward(const Call *call, int32_t is_double);
int atn_norms_backward(const Call *call, int32_t is_double);
/* The instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512; `limit` caps it (a negative one leaves the cap alone). */
int32_t atn_norms_level(int32_t limit);
/* The version of this interface, and the size of a Call, which the caller's own must match. */
int64_t atn_norms_interface(void);

#endif
