/* One loop per operation, over vectors of ELEMENT: double or float, selected by IN_DOUBLE; OPS names what belongs to it. Included twice by
   interpret.inc.h. */

#define STRIDE ((long)(VECTOR_BYTES / sizeof(ELEMENT)))

/* `blocks` blocks of n elements; an operand is a vector, `apart` elements from block to block, or one double number for a block. */
typedef struct {
    ELEMENT *out;
    long out_apart;
    const ELEMENT *vector[3];
    const double *number[3];
    long apart[3], n, blocks;
} OPS(Run);

/* One number for a block, and what ELEMENT leaves out of it. */
typedef struct { OPS(vec) high, low; } OPS(Number);

NUM_INLINE OPS(Number) OPS(number_of)(const OPS(Run) *run, int k, long block) {
    const double x = run->number[k] ? run->number[k][block * run->apart[k]] : 0.0;
    const ELEMENT high = (ELEMENT)x;
    const OPS(Number) number = {OPS(all)(high), OPS(all)((ELEMENT)(x - (double)high == x - (double)high ? x - (double)high : 0.0))};
    return number;
}

#define LOOP(A, B, unused, expression)                                                             \
    for (long block = 0; block < run.blocks; block++) {                                          \
        const OPS(Number) na = OPS(number_of)(&run, 0, block), nb = OPS(number_of)(&run, 1, block); \
        const ELEMENT *va = run.vector[0] ? run.vector[0] + block * run.apart[0] : NULL;          \
        const ELEMENT *vb = run.vector[1] ? run.vector[1] + block * run.apart[1] : NULL;          \
        (void)na; (void)nb; (void)va; (void)vb;                                                   \
        for (long i = 0; i < run.n; i += STRIDE) {                                                \
            const long left = run.n - i;                                                          \
            const OPS(vec) a = A, b = B;                                                          \
            (void)b;                                                                              \
            OPS(store)(run.out + block * run.out_apart + i, (expression), left);                  \
        }                                                                                         \
    }
#define UNARY(op, expression)                                                                     \
    case op:                                                                                      \
        if (run.number[0]) LOOP(na.high, a, a, expression)                                        \
        else LOOP(OPS(load)(va + i, left), a, a, expression)                                      \
        break;
/* `result` is computed of the operands, and `correction` adds what numbers leave out of themselves. */
#define BINARY(op, result, correction)                                                                 \
    case op:                                                                                      \
        if (!run.number[0] && !run.number[1]) LOOP(OPS(load)(va + i, left), OPS(load)(vb + i, left), a, result)    \
        else if (run.number[0] && !run.number[1]) LOOP(na.high, OPS(load)(vb + i, left), a, (result) correction)          \
        else if (!run.number[0]) LOOP(OPS(load)(va + i, left), nb.high, a, (result) correction)            \
        else LOOP(na.high, nb.high, a, (result) correction)                                                \
        break;
#define TRUTH(comparison) OPS(truth)((OPS(whole))(comparison))
#if IN_DOUBLE
#define ADDED
#define SUBTRACTED
#else
#define ADDED + (na.low + nb.low)
#define SUBTRACTED + (na.low - nb.low)
#endif

static void OPS(loop)(int32_t op, OPS(Run) run) {
    switch (op) {
        UNARY(OP_COPY, a)
        UNARY(OP_NEG, -a)
        UNARY(OP_ABS, OPS(absolute)(a))
        UNARY(OP_SIGN, OPS(signs)(a))
        UNARY(OP_RECIPROCAL, (ELEMENT)1 / a)
        UNARY(OP_SQRT, OPS(root)(a))
        UNARY(OP_RSQRT, (ELEMENT)1 / OPS(root)(a))
        UNARY(OP_EXP, OPS(exponential)(a))
        UNARY(OP_LOG, OPS(logarithm)(a))
        UNARY(OP_TANH, OPS(hyperbolic)(a))
        UNARY(OP_SIGMOID, OPS(logistic)(a))
        UNARY(OP_ROUND, OPS(rounded)(a))
        UNARY(OP_NOT, TRUTH(a == (ELEMENT)0))
        UNARY(OP_LOG1P, OPS(libm_log1p)(a))
        UNARY(OP_EXPM1, OPS(libm_expm1)(a))
        UNARY(OP_ERF, OPS(libm_erf)(a))
        UNARY(OP_SIN, OPS(libm_sin)(a))
        UNARY(OP_COS, OPS(libm_cos)(a))
        BINARY(OP_ADD, a + b, ADDED)
        BINARY(OP_SUB, a - b, SUBTRACTED)
        BINARY(OP_MUL, a * b, )
        BINARY(OP_DIV, a / b, )
        BINARY(OP_POW, OPS(power)(a, b), )
        BINARY(OP_MAX, OPS(larger)(a, b), )
        BINARY(OP_MIN, OPS(smaller)(a, b), )
        BINARY(OP_GT, TRUTH(a > b), )
        BINARY(OP_GE, TRUTH(a >= b), )
        BINARY(OP_LT, TRUTH(a < b), )
        BINARY(OP_LE, TRUTH(a <= b), )
        BINARY(OP_EQ, TRUTH(a == b), )
        BINARY(OP_NE, TRUTH(a != b), )
        BINARY(OP_AND, TRUTH(a != (ELEMENT)0) * TRUTH(b != (ELEMENT)0), )
        BINARY(OP_OR, OPS(truth)((OPS(whole))(a != (ELEMENT)0) | (OPS(whole))(b != (ELEMENT)0)), )
    case OP_WHERE:
        for (long block = 0; block < run.blocks; block++)
            for (long i = 0; i < run.n; i += STRIDE) {
                const long left = run.n - i;
                OPS(vec) from[3];
                for (int k = 0; k < 3; k++) {
                    if (run.number[k]) from[k] = OPS(all)((ELEMENT)run.number[k][block * run.apart[k]]);
                    else from[k] = OPS(load)(run.vector[k] + block * run.apart[k] + i, left);
                }
                OPS(store)(run.out + block * run.out_apart + i, OPS(choose)((OPS(whole))(from[0] != (ELEMENT)0), from[1], from[2]), left);
            }
        break;
    }
}

/* A vector as doubles, added to sums. */
NUM_INLINE void OPS(gather)(OPS(vec) x, NUM(vec) *sums) {
#if IN_DOUBLE
    sums[0] += (NUM(vec))x;
#else
    typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
    half halves[2];
    memcpy(halves, &x, sizeof halves);
    sums[0] += __builtin_convertvector(halves[0], NUM(vec));
    sums[1] += __builtin_convertvector(halves[1], NUM(vec));
#endif
}

/* The sum of n numbers, in double; or of the products of two times n, in double but for stretches of 8 vectors. Always in the same
   order. */
static double OPS(sum)(int dot, const ELEMENT *a, const ELEMENT *b, long n) {
    NUM(vec) sums[2] = {{0}};
    long i = 0;
    if (dot)
        while (i + STRIDE <= n) {
            OPS(vec) products = {0};
            for (const long until = i + 8 * STRIDE; i + STRIDE <= n && i < until; i += STRIDE)
                products += *(const OPS(vec) *)(a + i) * *(const OPS(vec) *)(b + i);
            OPS(gather)(products, sums);
        }
    else
        for (; i + STRIDE <= n; i += STRIDE) OPS(gather)(*(const OPS(vec) *)(a + i), sums);
    sums[0] += sums[1];
    double total = 0.0;
    for (long j = 0; j < WIDTH; j++) total += sums[0][j];
    for (; i < n; i++) total += dot ? (double)a[i] * (double)b[i] : (double)a[i];
    return total;
}

#undef STRIDE
#undef LOOP
#undef UNARY
#undef BINARY
#undef TRUTH
#undef ADDED
#undef SUBTRACTED
