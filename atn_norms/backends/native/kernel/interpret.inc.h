/* The interpreter of programs, for one instruction set: elementary functions of vectors, one loop per operation (operations.inc.h),
   and the choice of the loop.

   A program runs on a tile of rows at a time, few enough for its registers to stay in the nearest cache. A register of a row follows
   that of the row before it, so that an operation is one loop over all rows of the tile.

   A program that was found exact enough may run narrow: numbers of rows are float then, and those of statistics stay double. */

#define NUM(name) GLUE(name, _program_, LEVEL)
#define WIDTH ((long)(VECTOR_BYTES / sizeof(double)))
#define NUM_INLINE static inline __attribute__((always_inline))

typedef double NUM(vec) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(double)), may_alias));
typedef int64_t NUM(whole) __attribute__((vector_size(VECTOR_BYTES)));

NUM_INLINE NUM(vec) NUM(all)(double x) {
    NUM(vec) every = {0};
    return every + x;
}

/* The first n numbers, the rest 1, which every operation bears. */
NUM_INLINE NUM(vec) NUM(load)(const double *from, long n) {
    if (n >= WIDTH) return *(const NUM(vec) *)from;
    NUM(vec) part = NUM(all)(1.0);
#if VECTOR_BYTES == 64
    return (NUM(vec))_mm512_mask_loadu_pd((__m512d)part, (__mmask8)((1u << n) - 1u), from);
#else
    memcpy(&part, from, (size_t)n * sizeof(double));
    return part;
#endif
}

NUM_INLINE void NUM(store)(double *to, NUM(vec) value, long n) {
    if (n >= WIDTH) *(NUM(vec) *)to = value;
#if VECTOR_BYTES == 64
    else _mm512_mask_storeu_pd(to, (__mmask8)((1u << n) - 1u), (__m512d)value);
#else
    else memcpy(to, &value, (size_t)n * sizeof(double));
#endif
}

NUM_INLINE NUM(vec) NUM(choose)(NUM(whole) mask, NUM(vec) yes, NUM(vec) no) {
    return (NUM(vec))((mask & (NUM(whole))yes) | (~mask & (NUM(whole))no));
}

NUM_INLINE NUM(vec) NUM(truth)(NUM(whole) mask) { return (NUM(vec))(mask & (NUM(whole))NUM(all)(1.0)); }

NUM_INLINE NUM(vec) NUM(absolute)(NUM(vec) x) { return (NUM(vec))((NUM(whole))x & INT64_MAX); }

NUM_INLINE int NUM(any)(NUM(whole) mask) {
#if VECTOR_BYTES == 64
    return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif VECTOR_BYTES == 32
    return _mm256_movemask_pd((__m256d)mask) != 0;
#elif defined(__x86_64__)
    return _mm_movemask_pd((__m128d)mask) != 0;
#else
    int64_t either = 0;
    for (long i = 0; i < WIDTH; i++) either |= mask[i];
    return either != 0;
#endif
}

NUM_INLINE NUM(vec) NUM(root)(NUM(vec) x) {
#if VECTOR_BYTES == 64
    return (NUM(vec))_mm512_sqrt_pd((__m512d)x);
#elif VECTOR_BYTES == 32
    return (NUM(vec))_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
    return (NUM(vec))_mm_sqrt_pd((__m128d)x);
#else
    for (long i = 0; i < WIDTH; i++) x[i] = sqrt(x[i]);
    return x;
#endif
}

/* A function of libm, number by number: for what vectors do not cover. */
#define EACH_NUMBER(call)                          \
    do {                                           \
        for (long i = 0; i < WIDTH; i++) y[i] = call; \
    } while (0)

/* exp of what lies within +-708: |r| <= ln(2) / 2, and Taylor's polynomial of degree 13 there. */
NUM_INLINE NUM(vec) NUM(near_exp)(NUM(vec) x) {
    const NUM(vec) shifted = x * 1.4426950408889634074 + 6755399441055744.0; /* + 1.5 * 2^52 leaves an integer in the low bits */
    const NUM(vec) n = shifted - 6755399441055744.0, r = x - n * 6.93147180369123816490e-1 - n * 1.90821492927058770002e-10;
    NUM(vec) p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r; /* added to 1 last, which keeps the digits of a small r */
    return (p + 1.0) * (NUM(vec))(((NUM(whole))shifted + 1023) << 52);
}

NUM_INLINE NUM(vec) NUM(exponential)(NUM(vec) x) {
    if (!NUM(any)(~(NUM(whole))(NUM(absolute)(x) <= 708.0))) return NUM(near_exp)(x);
    NUM(vec) y = x;
    EACH_NUMBER(exp(x[i]));
    return y;
}

/* log of positive normal numbers: x = 2^n m with m within a factor sqrt(2) of 1, s = (m - 1) / (m + 1), log m = 2 artanh s. */
NUM_INLINE NUM(vec) NUM(near_log)(NUM(vec) x) {
    const NUM(whole) bits = (NUM(whole))x, up = (bits & 0xfffffffffffffLL) - 0x6a09e667f3bcdLL; /* < 0 where m < sqrt(2) */
    const NUM(whole) half = (NUM(whole))(up >= 0) & 1, power = ((bits >> 52) & 0x7ff) - 1023 + half;
    const NUM(vec) m = (NUM(vec))((bits & 0xfffffffffffffLL) | ((1023 - half) << 52));
    const NUM(vec) n = (NUM(vec))(power + 0x4338000000000000LL) - 6755399441055744.0;
    const NUM(vec) d = m - 1.0, s = d / (m + 1.0), z = s * s;
    NUM(vec) p = z * (2.0 / 23.0) + 2.0 / 21.0;
    p = p * z + 2.0 / 19.0;
    p = p * z + 2.0 / 17.0;
    p = p * z + 2.0 / 15.0;
    p = p * z + 2.0 / 13.0;
    p = p * z + 2.0 / 11.0;
    p = p * z + 2.0 / 9.0;
    p = p * z + 2.0 / 7.0;
    p = p * z + 2.0 / 5.0;
    p = p * z + 2.0 / 3.0;
    /* 2 s = d - s d, exact enough where d is small; then the rest of the series and n ln 2 in two parts */
    return n * 6.93147180369123816490e-1 + (d + (n * 1.90821492927058770002e-10 - s * (d - z * p)));
}

NUM_INLINE NUM(vec) NUM(logarithm)(NUM(vec) x) {
    if (!NUM(any)(~((NUM(whole))(x >= 0x1p-1022) & (NUM(whole))(x <= 0x1.fffffffffffffp1023)))) return NUM(near_log)(x);
    NUM(vec) y = x;
    EACH_NUMBER(log(x[i]));
    return y;
}

NUM_INLINE NUM(vec) NUM(power)(NUM(vec) x, NUM(vec) e) {
    if (!NUM(any)(~((NUM(whole))(x >= 0x1p-1022) & (NUM(whole))(x <= 0x1.fffffffffffffp1023)))) {
        const NUM(vec) product = NUM(near_log)(x) * e;
        if (!NUM(any)(~(NUM(whole))(NUM(absolute)(product) <= 700.0))) return NUM(near_exp)(product);
    }
    NUM(vec) y = x;
    EACH_NUMBER(pow(x[i], e[i]));
    return y;
}

NUM_INLINE NUM(vec) NUM(hyperbolic)(NUM(vec) x) {
    const NUM(vec) size = NUM(absolute)(x);
    const NUM(whole) small = (NUM(whole))(size < 0.2);
    NUM(vec) y = x;
    if (NUM(any)(~(NUM(whole))(size <= 300.0))) { /* NaN included */
        EACH_NUMBER(tanh(x[i]));
        return y;
    }
    const NUM(vec) e = NUM(near_exp)(-2.0 * x);
    y = (1.0 - e) / (1.0 + e);
    if (!NUM(any)(small)) return y;
    const NUM(vec) z = x * x; /* Taylor's polynomial, to 1e-17 of x where |x| < 0.2 */
    NUM(vec) p = z * (-443861162.0 / 1856156927625.0) + 6404582.0 / 10854718875.0;
    p = p * z - 929569.0 / 638512875.0;
    p = p * z + 21844.0 / 6081075.0;
    p = p * z - 1382.0 / 155925.0;
    p = p * z + 62.0 / 2835.0;
    p = p * z - 17.0 / 315.0;
    p = p * z + 2.0 / 15.0;
    p = p * z - 1.0 / 3.0;
    return NUM(choose)(small, x + x * (z * p), y);
}

NUM_INLINE NUM(vec) NUM(logistic)(NUM(vec) x) { return 1.0 / (1.0 + NUM(exponential)(-x)); }

NUM_INLINE NUM(vec) NUM(signs)(NUM(vec) x) {
    return NUM(truth)((NUM(whole))(x > 0.0)) - NUM(truth)((NUM(whole))(x < 0.0)); /* of NaN: 0, as torch has it */
}

NUM_INLINE NUM(vec) NUM(rounded)(NUM(vec) x) {
    typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
    return __builtin_convertvector(__builtin_convertvector(x, half), NUM(vec));
}

/* The larger; NaN where one is NaN. */
NUM_INLINE NUM(vec) NUM(larger)(NUM(vec) a, NUM(vec) b) {
    return NUM(choose)((NUM(whole))(a > b) | (NUM(whole))(a != a), a, b);
}

NUM_INLINE NUM(vec) NUM(smaller)(NUM(vec) a, NUM(vec) b) {
    return NUM(choose)((NUM(whole))(a < b) | (NUM(whole))(a != a), a, b);
}

#define LIBM(name, function)                   \
    NUM_INLINE NUM(vec) NUM(name)(NUM(vec) x) { \
        NUM(vec) y = x;                        \
        EACH_NUMBER(function(x[i]));           \
        return y;                              \
    }
LIBM(libm_log1p, log1p)
LIBM(libm_expm1, expm1)
LIBM(libm_erf, erf)
LIBM(libm_sin, sin)
LIBM(libm_cos, cos)
#undef LIBM

#define ELEMENT double
#define IN_DOUBLE 1
#define OPS(name) NUM(name)
#include "operations.inc.h"
#undef ELEMENT
#undef IN_DOUBLE
#undef OPS

/* The same elementary functions of vectors of floats. */

#define FLT(name) GLUE(name, _narrow_, LEVEL)
#define FLT_WIDTH ((long)(VECTOR_BYTES / sizeof(float)))

typedef float FLT(vec) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(float)), may_alias));
typedef int32_t FLT(whole) __attribute__((vector_size(VECTOR_BYTES)));

NUM_INLINE FLT(vec) FLT(all)(float x) {
    FLT(vec) every = {0};
    return every + x;
}

NUM_INLINE FLT(vec) FLT(load)(const float *from, long n) {
    if (n >= FLT_WIDTH) return *(const FLT(vec) *)from;
    FLT(vec) part = FLT(all)(1.0f);
#if VECTOR_BYTES == 64
    return (FLT(vec))_mm512_mask_loadu_ps((__m512)part, (__mmask16)((1u << n) - 1u), from);
#else
    memcpy(&part, from, (size_t)n * sizeof(float));
    return part;
#endif
}

NUM_INLINE void FLT(store)(float *to, FLT(vec) value, long n) {
    if (n >= FLT_WIDTH) *(FLT(vec) *)to = value;
#if VECTOR_BYTES == 64
    else _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1u), (__m512)value);
#else
    else memcpy(to, &value, (size_t)n * sizeof(float));
#endif
}

NUM_INLINE FLT(vec) FLT(choose)(FLT(whole) mask, FLT(vec) yes, FLT(vec) no) {
    return (FLT(vec))((mask & (FLT(whole))yes) | (~mask & (FLT(whole))no));
}

NUM_INLINE FLT(vec) FLT(truth)(FLT(whole) mask) { return (FLT(vec))(mask & (FLT(whole))FLT(all)(1.0f)); }

NUM_INLINE FLT(vec) FLT(absolute)(FLT(vec) x) { return (FLT(vec))((FLT(whole))x & INT32_MAX); }

NUM_INLINE int FLT(any)(FLT(whole) mask) { return NUM(any)((NUM(whole))(mask & INT32_MIN) | ((NUM(whole))(mask & INT32_MIN) << 32)); }

NUM_INLINE FLT(vec) FLT(root)(FLT(vec) x) {
#if VECTOR_BYTES == 64
    return (FLT(vec))_mm512_sqrt_ps((__m512)x);
#elif VECTOR_BYTES == 32
    return (FLT(vec))_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (FLT(vec))_mm_sqrt_ps((__m128)x);
#else
    for (long i = 0; i < FLT_WIDTH; i++) x[i] = sqrtf(x[i]);
    return x;
#endif
}

#undef EACH_NUMBER
#define EACH_NUMBER(call)                                            \
    do {                                                             \
        for (long i = 0; i < FLT_WIDTH; i++) y[i] = (float)(call);    \
    } while (0)

NUM_INLINE FLT(vec) FLT(near_exp)(FLT(vec) x) {
    const FLT(vec) shifted = x * 1.44269504f + 12582912.0f; /* + 1.5 * 2^23 leaves an integer in the low bits */
    const FLT(vec) n = shifted - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    FLT(vec) p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r * r + r;
    return (p + 1.0f) * (FLT(vec))(((FLT(whole))shifted + 127) << 23);
}

NUM_INLINE FLT(vec) FLT(exponential)(FLT(vec) x) {
    if (!FLT(any)(~(FLT(whole))(FLT(absolute)(x) <= 87.0f))) return FLT(near_exp)(x);
    FLT(vec) y = x;
    EACH_NUMBER(exp((double)x[i]));
    return y;
}

NUM_INLINE FLT(vec) FLT(near_log)(FLT(vec) x) {
    const FLT(whole) bits = (FLT(whole))x, up = (bits & 0x7fffff) - 0x3504f3; /* < 0 where m < sqrt(2) */
    const FLT(whole) half = (FLT(whole))(up >= 0) & 1, power = (bits >> 23) - 127 + half;
    const FLT(vec) m = (FLT(vec))((bits & 0x7fffff) | ((127 - half) << 23)), n = __builtin_convertvector(power, FLT(vec));
    const FLT(vec) d = m - 1.0f, s = d / (m + 1.0f), z = s * s;
    FLT(vec) p = z * (2.0f / 11.0f) + 2.0f / 9.0f;
    p = p * z + 2.0f / 7.0f;
    p = p * z + 2.0f / 5.0f;
    p = p * z + 2.0f / 3.0f;
    return n * 0.693359375f + (d + (n * -2.12194440e-4f - s * (d - z * p)));
}

NUM_INLINE FLT(vec) FLT(logarithm)(FLT(vec) x) {
    if (!FLT(any)(~((FLT(whole))(x >= 0x1p-126f) & (FLT(whole))(x <= 0x1.fffffep127f)))) return FLT(near_log)(x);
    FLT(vec) y = x;
    EACH_NUMBER(log((double)x[i]));
    return y;
}

NUM_INLINE FLT(vec) FLT(power)(FLT(vec) x, FLT(vec) e) {
    if (!FLT(any)(~((FLT(whole))(x >= 0x1p-126f) & (FLT(whole))(x <= 0x1.fffffep127f)))) {
        const FLT(vec) product = FLT(near_log)(x) * e;
        if (!FLT(any)(~(FLT(whole))(FLT(absolute)(product) <= 86.0f))) return FLT(near_exp)(product);
    }
    FLT(vec) y = x;
    EACH_NUMBER(pow((double)x[i], (double)e[i]));
    return y;
}

NUM_INLINE FLT(vec) FLT(hyperbolic)(FLT(vec) x) {
    const FLT(vec) size = FLT(absolute)(x);
    const FLT(whole) small = (FLT(whole))(size < 0.3f);
    FLT(vec) y = x;
    if (FLT(any)(~(FLT(whole))(size <= 40.0f))) { /* NaN included */
        EACH_NUMBER(tanh((double)x[i]));
        return y;
    }
    const FLT(vec) e = FLT(near_exp)(-2.0f * x), z = x * x;
    FLT(vec) p = z * (62.0f / 2835.0f) - 17.0f / 315.0f;
    p = p * z + 2.0f / 15.0f;
    p = p * z - 1.0f / 3.0f;
    return FLT(choose)(small, x + x * (z * p), (1.0f - e) / (1.0f + e));
}

NUM_INLINE FLT(vec) FLT(logistic)(FLT(vec) x) { return 1.0f / (1.0f + FLT(exponential)(-x)); }

NUM_INLINE FLT(vec) FLT(signs)(FLT(vec) x) {
    return FLT(truth)((FLT(whole))(x > 0.0f)) - FLT(truth)((FLT(whole))(x < 0.0f)); /* of NaN: 0, as torch has it */
}

NUM_INLINE FLT(vec) FLT(rounded)(FLT(vec) x) { return x; }

NUM_INLINE FLT(vec) FLT(larger)(FLT(vec) a, FLT(vec) b) {
    return FLT(choose)((FLT(whole))(a > b) | (FLT(whole))(a != a), a, b);
}

NUM_INLINE FLT(vec) FLT(smaller)(FLT(vec) a, FLT(vec) b) {
    return FLT(choose)((FLT(whole))(a < b) | (FLT(whole))(a != a), a, b);
}

#define LIBM(name, function)                    \
    NUM_INLINE FLT(vec) FLT(name)(FLT(vec) x) { \
        FLT(vec) y = x;                         \
        EACH_NUMBER(function((double)x[i]));    \
        return y;                               \
    }
LIBM(libm_log1p, log1p)
LIBM(libm_expm1, expm1)
LIBM(libm_erf, erf)
LIBM(libm_sin, sin)
LIBM(libm_cos, cos)
#undef LIBM
#undef EACH_NUMBER

#define ELEMENT float
#define IN_DOUBLE 0
#define OPS(name) FLT(name)
#include "operations.inc.h"
#undef ELEMENT
#undef IN_DOUBLE
#undef OPS

/* Where the elements of one operand of one instruction are: numbers of rows, which are float in a narrow program, or doubles. */
typedef struct { const void *at; long apart, repeat, length; int is_float; } NUM(View);

NUM_INLINE long NUM(place)(NUM(View) view, long row, long i) {
    return row * view.apart + (view.repeat == 1 && i < view.length ? i : i / view.repeat % view.length);
}

NUM_INLINE double NUM(number)(NUM(View) view, long row, long i) {
    const long at = NUM(place)(view, row, i);
    return view.is_float ? (double)((const float *)view.at)[at] : ((const double *)view.at)[at];
}

/* Elements that can be taken at a time from element i on. */
NUM_INLINE long NUM(stretch)(NUM(View) view, long i) {
    if (view.length == 1) return LONG_MAX;
    return view.repeat > 1 ? view.repeat - i % view.repeat : view.length - i % view.length;
}

static void NUM(add_up)(const Instruction *code, double *target, long length, const NUM(View) *view, long rows) {
    const long count = code->count, inner = code->repeat, outer = count / code->length;
    const int dot = code->op == OP_DOT;
    int whole = inner == outer;
    for (int k = 0; k <= dot; k++) whole &= view[k].repeat == 1 && view[k].length == count && view[k].is_float == view[0].is_float;
    for (long r = 0; r < rows; r++) {
        double *to = target + r * length + code->offset;
        if (whole) {
            for (long k = 0; k < code->length; k++) {
                const long a = r * view[0].apart + k * inner, b = r * view[dot].apart + k * inner;
                if (view[0].is_float) to[k] = FLT(sum)(dot, (const float *)view[0].at + a, (const float *)view[dot].at + b, inner);
                else to[k] = NUM(sum)(dot, (const double *)view[0].at + a, (const double *)view[dot].at + b, inner);
            }
            continue;
        }
        for (long k = 0; k < code->length; k++) to[k] = 0.0;
        for (long i = 0; i < count; i++) to[i / inner % code->length] += NUM(number)(view[0], r, i) * (dot ? NUM(number)(view[1], r, i) : 1.0);
    }
}

/* One loop of an operation on blocks of n elements. */
typedef struct {
    void *out;
    long out_apart;
    const void *vector[3];
    const double *number[3];
    long apart[3], n, blocks;
    double spare[3];
} NUM(Blocks);

NUM_INLINE void NUM(loop_of)(int is_float, int32_t op, const NUM(Blocks) *blocks) {
    if (is_float) {
        FLT(Run) run = {.out = blocks->out, .out_apart = blocks->out_apart, .n = blocks->n, .blocks = blocks->blocks};
        for (int k = 0; k < 3; k++) { run.vector[k] = blocks->vector[k]; run.number[k] = blocks->number[k]; run.apart[k] = blocks->apart[k]; }
        FLT(loop)(op, run);
    } else {
        NUM(Run) run = {.out = blocks->out, .out_apart = blocks->out_apart, .n = blocks->n, .blocks = blocks->blocks};
        for (int k = 0; k < 3; k++) { run.vector[k] = blocks->vector[k]; run.number[k] = blocks->number[k]; run.apart[k] = blocks->apart[k]; }
        NUM(loop)(op, run);
    }
}

/* Let operand k of a loop be one number for each block, `apart` doubles from one to the next. */
NUM_INLINE void NUM(one_number)(NUM(Blocks) *blocks, int k, NUM(View) view, long at, long apart) {
    blocks->vector[k] = NULL;
    blocks->apart[k] = apart;
    if (!view.is_float) {
        blocks->number[k] = (const double *)view.at + at;
        return;
    }
    blocks->spare[k] = (double)((const float *)view.at)[at]; /* a parameter, the same for all rows */
    blocks->number[k] = &blocks->spare[k];
    blocks->apart[k] = 0;
}

static void NUM(execute)(const Instruction *code, void *target, int is_float, long length, const NUM(View) *view, int operands, long rows) {
    const long count = code->count, size = is_float ? (long)sizeof(float) : (long)sizeof(double);
    if (code->op == OP_SUM || code->op == OP_DOT) {
        NUM(add_up)(code, target, length, view, rows);
        return;
    }
    NUM(Blocks) blocks = {.out = (char *)target + code->offset * size};
    /* Operands are vectors as long as the result, or one number for each row, or for each of so many parts of a row. */
    int regular = 1, flat = rows == 1 || (length == count && code->offset == 0);
    long parts = 1;
    for (int k = 0; k < operands; k++) {
        const int vector = view[k].repeat == 1 && view[k].length == count && (count > 1 || (!view[k].is_float && !is_float));
        const int single = view[k].length == 1, each = view[k].repeat > 1 && view[k].repeat * view[k].length == count;
        if (!vector && each && view[k].length > 1) {
            regular &= parts == 1 || parts == view[k].length;
            parts = view[k].length;
        }
        regular &= vector || single || each;
        regular &= !(single || each) || vector || !view[k].is_float || view[k].apart == 0 || rows == 1;
        flat &= vector ? view[k].apart == count || rows == 1 : single && (view[k].apart == 0 || rows == 1);
    }
    if (regular && (flat || parts == 1)) {
        blocks.n = flat ? rows * count : count;
        blocks.blocks = flat ? 1 : rows;
        blocks.out_apart = length;
        for (int k = 0; k < operands; k++) {
            if (view[k].repeat == 1 && view[k].length == count && (count > 1 || (!view[k].is_float && !is_float))) {
                blocks.vector[k] = view[k].at;
                blocks.apart[k] = view[k].apart;
            } else NUM(one_number)(&blocks, k, view[k], 0, view[k].apart);
        }
        NUM(loop_of)(is_float, code->op, &blocks);
        return;
    }
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < count; i += blocks.n) {
            blocks.n = count - i;
            blocks.blocks = 1;
            for (int k = 0; k < operands; k++) {
                const long stretch = NUM(stretch)(view[k], i);
                if (stretch < blocks.n) blocks.n = stretch;
            }
            if (regular && i == 0) { /* all parts of a row at once */
                blocks.n = count / parts;
                blocks.blocks = parts;
            }
            for (int k = 0; k < operands; k++) {
                const long at = NUM(place)(view[k], r, i);
                const int vector = view[k].repeat == 1 && view[k].length > 1;
                blocks.apart[k] = vector ? blocks.n : view[k].length > 1;
                if (vector) {
                    blocks.number[k] = NULL;
                    blocks.vector[k] = (const char *)view[k].at + at * (view[k].is_float ? (long)sizeof(float) : (long)sizeof(double));
                } else NUM(one_number)(&blocks, k, view[k], at, blocks.apart[k]);
            }
            blocks.out = (char *)target + (r * length + code->offset + i) * size;
            blocks.out_apart = blocks.n;
            NUM(loop_of)(is_float, code->op, &blocks);
            if (blocks.blocks > 1) break;
        }
}

/* Run a program on at most `tile_rows` rows, narrow or not. `room` holds tile_rows * row_doubles numbers; `output` becomes where
   the outputs are, row after row. */
static void NUM(interpret)(const Program *program, int narrow, const Input *input, long rows, double *room, Input *output) {
    const Instruction *code = program_code(program);
    const Slot *slot = program_slots(program);
    Input place[MOST_SLOTS];
    for (int64_t s = 0; s < program->slots; s++) {
        if (slot[s].kind == SLOT_INPUT || slot[s].kind == SLOT_SMALL_INPUT) place[s] = input[slot[s].at];
        else if (slot[s].kind == SLOT_CONSTANT) place[s] = (Input){program_constants(program) + slot[s].at, 0};
        else place[s] = (Input){room + program->tile_rows * slot[s].at, slot[s].length};
    }
    for (int64_t i = 0; i < program->instructions; i++, code++) {
        const int operands = code->op == OP_WHERE ? 3 : (code->op >= OP_ADD && code->op <= OP_OR) || code->op == OP_DOT ? 2 : 1;
        NUM(View) view[3] = {{0}};
        for (int k = 0; k < operands; k++) {
            const Operand *from = code->from + k;
            const int is_float = narrow && is_row_slot(slot + from->slot);
            const char *at = (const char *)place[from->slot].at + from->offset * (is_float ? (long)sizeof(float) : (long)sizeof(double));
            view[k] = (NUM(View)){at, place[from->slot].apart, from->repeat, from->length, is_float};
        }
        const int is_float = narrow && is_row_slot(slot + code->target);
        NUM(execute)(code, (void *)place[code->target].at, is_float, slot[code->target].length, view, operands, rows);
    }
    for (int64_t o = 0; o < program->outputs; o++) output[o] = place[program_outputs(program)[o]];
}
