/* One loop for each operation over vectors of REAL, and sums. Included by level.inc.h for each REAL. */

/* One operand of one block: its address, and the distance between its vectors, which is 0 for a single number. */
typedef struct {
    const REAL *at;
    long step;
    REAL same[VECTOR_BYTES / sizeof(REAL)];
} FN(Source);

/* Prepare an operand, and return the rounding error of a single number in REAL. */
INLINE REAL FN(source)(FN(Source) *source, const Run *run, int k, long block) {
    if (run->vector[k]) {
        source->at = (const REAL *)run->vector[k] + block * run->apart[k];
        source->step = VL;
        return (REAL)-0.0; /* adding -0 changes nothing */
    }
    const double x = run->number[k][block * run->apart[k]];
    const REAL high = (REAL)x;
    FN(store)(source->same, FN(all)(high), VL);
    source->at = source->same;
    source->step = 0;
    return x - (double)high == 0.0 || x - (double)high != x - (double)high ? (REAL)-0.0 : (REAL)(x - (double)high);
}

/* For `arity` operands a, b and c; `la`, `lb` and `lc` are the rounding errors of those that are single numbers. */
#define LOOP(op, arity, expression)                                                                                    \
    case op:                                                                                                           \
        for (long block = 0; block < run->blocks; block++) {                                                            \
            FN(Source) from[3];                                                                                        \
            REAL low[3] = {0};                                                                                         \
            for (int k = 0; k < arity; k++) low[k] = FN(source)(from + k, run, k, block);                               \
            const REAL *pa = from[0].at, *pb = from[arity > 1].at, *pc = from[arity > 2 ? 2 : 0].at;                      \
            const long sa = from[0].step, sb = from[arity > 1].step, sc = from[arity > 2 ? 2 : 0].step;                   \
            const REAL la = low[0], lb = low[1], lc = low[2];                                                          \
            REAL *to = (REAL *)run->out + block * run->out_apart;                                                              \
            (void)la; (void)lb; (void)lc;                                                                              \
            for (long left = run->n; left > 0; left -= VL, to += VL, pa += sa, pb += sb, pc += sc) {                     \
                const FN(vec) a = FN(load_or)(pa, sa ? left : VL, 1), b = arity > 1 ? FN(load_or)(pb, sb ? left : VL, 1) : a; \
                const FN(vec) c = arity > 2 ? FN(load_or)(pc, sc ? left : VL, 1) : a;                                    \
                (void)b; (void)c;                                                                                      \
                FN(store)(to, (expression), left);                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        break;
#define TRUTH(comparison) FN(truth)((FN(whole))(comparison))
/* The number in REAL and its rounding error, which is 0 in double. */
#if IS_DOUBLE
#define LESS(low)
#define MORE(low)
#else
#define LESS(low) - (low)
#define MORE(low) + (low)
#endif

static void FN(loop)(int32_t op, const Run *run) {
    switch (op) {
        LOOP(OP_COPY, 1, a)
        LOOP(OP_NEG, 1, -a)
        LOOP(OP_ABS, 1, FN(absolute)(a))
        LOOP(OP_SIGN, 1, FN(signs)(a))
        LOOP(OP_RECIPROCAL, 1, (REAL)1 / a)
        LOOP(OP_SQRT, 1, FN(root)(a))
        LOOP(OP_RSQRT, 1, (REAL)1 / FN(root)(a))
        LOOP(OP_EXP, 1, FN(exponential)(a))
        LOOP(OP_LOG, 1, FN(logarithm)(a))
        LOOP(OP_TANH, 1, FN(hyperbolic)(a))
        LOOP(OP_SIGMOID, 1, FN(logistic)(a))
        LOOP(OP_ROUND, 1, FN(rounded)(a))
        LOOP(OP_NOT, 1, TRUTH(a == (REAL)0))
        LOOP(OP_LOG1P, 1, FN(libm_log1p)(a))
        LOOP(OP_EXPM1, 1, FN(libm_expm1)(a))
        LOOP(OP_ERF, 1, FN(libm_erf)(a))
        LOOP(OP_SIN, 1, FN(libm_sin)(a))
        LOOP(OP_COS, 1, FN(libm_cos)(a))
        LOOP(OP_ADD, 2, a + b MORE(la + lb))
        LOOP(OP_SUB, 2, a - b MORE(la - lb))
        LOOP(OP_MUL, 2, a * b)
        LOOP(OP_DIV, 2, a / b)
        LOOP(OP_POW, 2, FN(power)(a, b))
        LOOP(OP_MAX, 2, FN(larger)(a, b))
        LOOP(OP_MIN, 2, FN(smaller)(a, b))
        LOOP(OP_GT, 2, TRUTH(a > b))
        LOOP(OP_GE, 2, TRUTH(a >= b))
        LOOP(OP_LT, 2, TRUTH(a < b))
        LOOP(OP_LE, 2, TRUTH(a <= b))
        LOOP(OP_EQ, 2, TRUTH(a == b))
        LOOP(OP_NE, 2, TRUTH(a != b))
        LOOP(OP_AND, 2, TRUTH(a != (REAL)0) * TRUTH(b != (REAL)0))
        LOOP(OP_OR, 2, FN(truth)((FN(whole))(a != (REAL)0) | (FN(whole))(b != (REAL)0)))
        LOOP(OP_WHERE, 3, FN(choose)((FN(whole))(a != (REAL)0), b, c))
        LOOP(OP_MUL_ADD, 3, a * b + c MORE(lc))
        LOOP(OP_MUL_SUB, 3, a * b - c LESS(lc))
        LOOP(OP_SUB_MUL, 3, c - a * b MORE(lc))
        LOOP(OP_MUL_MUL, 3, a * b * c)
        LOOP(OP_POW_LOG, 3, FN(power_of)(a, b, c))
    }
}

/* Add a vector to sums, as doubles. */
INLINE void FN(onto_doubles)(FN(vec) x, F64(vec) *sums) {
#if IS_DOUBLE
    sums[0] += x;
#elif VECTOR_BYTES == 64
    sums[0] += (F64(vec))_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
    sums[1] += (F64(vec))_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#else
    typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
    half halves[2];
    memcpy(halves, &x, sizeof halves);
    sums[0] += __builtin_convertvector(halves[0], F64(vec));
    sums[1] += __builtin_convertvector(halves[1], F64(vec));
#endif
}

#if IS_DOUBLE
/* Sum the numbers of a vector. */
INLINE double FN(reduce)(FN(vec) x) {
#if VECTOR_BYTES == 64
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
#elif VECTOR_BYTES == 32
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
#endif
    return x[0] + x[1];
}
#endif

/* Sum n numbers in double, or the products of n pairs, which are summed in REAL over stretches of 4 vectors. The order is
   always the same. */
INLINE double FN(sum)(const int dot, const REAL *a, const REAL *b, long n) {
    F64(vec) sums[2] = {{0}};
    long i = 0;
    for (; dot && i + 4 * VL <= n; i += 4 * VL) {
        FN(vec) products = {0};
        for (long j = i; j < i + 4 * VL; j += VL) products += *(const FN(vec) *)(a + j) * *(const FN(vec) *)(b + j);
        FN(onto_doubles)(products, sums);
    }
    if (dot && i < n) {
        FN(vec) products = {0};
        for (; i + VL <= n; i += VL) products += *(const FN(vec) *)(a + i) * *(const FN(vec) *)(b + i);
        if (i < n) products += FN(load)(a + i, n - i) * FN(load)(b + i, n - i);
        FN(onto_doubles)(products, sums);
    } else if (!dot) {
        for (; i + VL <= n; i += VL) FN(onto_doubles)(*(const FN(vec) *)(a + i), sums);
        if (i < n) FN(onto_doubles)(FN(load)(a + i, n - i), sums);
    }
    return F64(reduce)(sums[0] + sums[1]);
}

/* Add `rows` rows of n numbers, at a distance of `apart`, to n doubles; the sums over the few rows are in REAL. */
static void FN(add_rows)(const REAL *from, long apart, long rows, long n, double *to) {
    for (long i = 0; i < n; i += VL) {
        const long left = n - i < VL ? n - i : VL;
        FN(vec) total = FN(load)(from + i, left);
        for (long r = 1; r < rows; r++) total += FN(load)(from + r * apart + i, left);
        F64(vec) halves[2] = {{0}};
        FN(onto_doubles)(total, halves);
        for (long j = 0, wide = VECTOR_BYTES / (long)sizeof(double); j < left; j += wide) {
            const long part = left - j < wide ? left - j : wide;
            F64(store)(to + i + j, F64(load)(to + i + j, part) + halves[j / wide], part);
        }
    }
}

#undef LOOP
#undef TRUTH
#undef LESS
#undef MORE
