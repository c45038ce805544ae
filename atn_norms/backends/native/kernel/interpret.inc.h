/* The interpreter of programs, for one instruction set: elementary functions of vectors of doubles, and one loop per operation.

   A program runs on a tile of rows at a time, few enough for its registers to stay in the nearest cache. Register r of a row of
   `length` numbers follows that of the row before it, so that most operations are one loop over all rows of the tile. */

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
    const NUM(vec) sign = NUM(truth)((NUM(whole))(x > 0.0)) - NUM(truth)((NUM(whole))(x < 0.0));
    return NUM(choose)((NUM(whole))(x == x), sign, x);
}

NUM_INLINE NUM(vec) NUM(rounded)(NUM(vec) x) {
    NUM(vec) y = x;
    EACH_NUMBER((double)(float)x[i]);
    return y;
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

/* Operands of one run of n numbers: contiguous, or one number for all (bit k of `same` for operand k). */
typedef struct { double *out; const double *a, *b, *c; long n; int same; } NUM(Run);

#define LOOP(A, B, expression)                                              \
    for (long i = 0; i < n; i += WIDTH) {                                    \
        const long left = n - i;                                             \
        const NUM(vec) a = A, b = B;                                         \
        (void)b;                                                             \
        NUM(store)(run.out + i, (expression), left);                         \
    }
#define VECTOR(p) NUM(load)(run.p + i, left)
#define NUMBER(p) NUM(all)(*run.p)
#define UNARY(op, expression)                                                \
    case op:                                                                 \
        if (run.same & 1) LOOP(NUMBER(a), a, expression)                     \
        else LOOP(VECTOR(a), a, expression)                                  \
        break;
#define BINARY(op, expression)                                               \
    case op:                                                                 \
        if ((run.same & 3) == 0) LOOP(VECTOR(a), VECTOR(b), expression)      \
        else if ((run.same & 3) == 1) LOOP(NUMBER(a), VECTOR(b), expression) \
        else if ((run.same & 3) == 2) LOOP(VECTOR(a), NUMBER(b), expression) \
        else LOOP(NUMBER(a), NUMBER(b), expression)                          \
        break;
#define TRUTH(comparison) NUM(truth)((NUM(whole))(comparison))

static void NUM(loop)(int32_t op, NUM(Run) run) {
    const long n = run.n;
    switch (op) {
        UNARY(OP_COPY, a)
        UNARY(OP_NEG, -a)
        UNARY(OP_ABS, NUM(absolute)(a))
        UNARY(OP_SIGN, NUM(signs)(a))
        UNARY(OP_RECIPROCAL, 1.0 / a)
        UNARY(OP_SQRT, NUM(root)(a))
        UNARY(OP_RSQRT, 1.0 / NUM(root)(a))
        UNARY(OP_EXP, NUM(exponential)(a))
        UNARY(OP_LOG, NUM(logarithm)(a))
        UNARY(OP_TANH, NUM(hyperbolic)(a))
        UNARY(OP_SIGMOID, NUM(logistic)(a))
        UNARY(OP_ROUND, NUM(rounded)(a))
        UNARY(OP_NOT, TRUTH(a == 0.0))
        UNARY(OP_LOG1P, NUM(libm_log1p)(a))
        UNARY(OP_EXPM1, NUM(libm_expm1)(a))
        UNARY(OP_ERF, NUM(libm_erf)(a))
        UNARY(OP_SIN, NUM(libm_sin)(a))
        UNARY(OP_COS, NUM(libm_cos)(a))
        BINARY(OP_ADD, a + b)
        BINARY(OP_SUB, a - b)
        BINARY(OP_MUL, a * b)
        BINARY(OP_DIV, a / b)
        BINARY(OP_POW, NUM(power)(a, b))
        BINARY(OP_MAX, NUM(larger)(a, b))
        BINARY(OP_MIN, NUM(smaller)(a, b))
        BINARY(OP_GT, TRUTH(a > b))
        BINARY(OP_GE, TRUTH(a >= b))
        BINARY(OP_LT, TRUTH(a < b))
        BINARY(OP_LE, TRUTH(a <= b))
        BINARY(OP_EQ, TRUTH(a == b))
        BINARY(OP_NE, TRUTH(a != b))
        BINARY(OP_AND, TRUTH(a != 0.0) * TRUTH(b != 0.0))
        BINARY(OP_OR, NUM(truth)((NUM(whole))(a != 0.0) | (NUM(whole))(b != 0.0)))
    case OP_WHERE:
        for (long i = 0; i < n; i += WIDTH) {
            const long left = n - i;
            const NUM(vec) a = run.same & 1 ? NUMBER(a) : VECTOR(a), b = run.same & 2 ? NUMBER(b) : VECTOR(b);
            const NUM(vec) c = run.same & 4 ? NUMBER(c) : VECTOR(c);
            NUM(store)(run.out + i, NUM(choose)((NUM(whole))(a != 0.0), b, c), left);
        }
        break;
    }
}

/* The sum of n numbers, always in the same order. */
static double NUM(sum)(const double *from, long n) {
    NUM(vec) first = {0}, second = {0};
    long i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        first += *(const NUM(vec) *)(from + i);
        second += *(const NUM(vec) *)(from + i + WIDTH);
    }
    first += second;
    double total = 0.0;
    for (long j = 0; j < WIDTH; j++) total += first[j];
    for (; i < n; i++) total += from[i];
    return total;
}

/* Where the elements of one operand of one instruction are. */
typedef struct { const double *at; long apart, repeat, length; } NUM(View);

/* Elements that can be taken at a time from element i on, and where they start. */
NUM_INLINE const double *NUM(element)(NUM(View) view, long row, long i) {
    return view.at + row * view.apart + (view.repeat == 1 && i < view.length ? i : i / view.repeat % view.length);
}

NUM_INLINE long NUM(stretch)(NUM(View) view, long i) {
    if (view.length == 1) return LONG_MAX;
    return view.repeat > 1 ? view.repeat - i % view.repeat : view.length - i % view.length;
}

static void NUM(add_up)(const Instruction *code, double *target, long length, NUM(View) view, long rows) {
    const long count = code->count, inner = code->repeat, outer = count / code->length;
    for (long r = 0; r < rows; r++) {
        double *to = target + r * length + code->offset;
        if (view.repeat == 1 && view.length == count && inner == outer) {
            for (long k = 0; k < code->length; k++) to[k] = NUM(sum)(view.at + r * view.apart + k * inner, inner);
            continue;
        }
        for (long k = 0; k < code->length; k++) to[k] = 0.0;
        for (long i = 0; i < count; i++) to[i / inner % code->length] += *NUM(element)(view, r, i);
    }
}

static void NUM(execute)(const Instruction *code, double *target, long length, const NUM(View) *view, int operands, long rows) {
    const long count = code->count;
    if (code->op == OP_SUM) {
        NUM(add_up)(code, target, length, view[0], rows);
        return;
    }
    NUM(Run) run = {target + code->offset, view[0].at, view[1].at, view[2].at, rows * count, 0};
    /* One run over all rows, where every operand is one number or lies as the result does. */
    int joined = rows == 1 || (length == count && code->offset == 0);
    for (int k = 0; k < operands; k++) {
        const int same = view[k].length == 1 && (view[k].apart == 0 || rows == 1);
        const int whole = view[k].repeat == 1 && view[k].length == count && (view[k].apart == count || rows == 1);
        joined &= same || whole;
        run.same |= same && !(whole && count == 1 && rows == 1) ? 1 << k : 0;
    }
    if (joined) {
        NUM(loop)(code->op, run);
        return;
    }
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < count; i += run.n) {
            const double *at[3] = {NULL, NULL, NULL};
            run.n = count - i;
            run.same = 0;
            for (int k = 0; k < operands; k++) {
                const long stretch = NUM(stretch)(view[k], i);
                at[k] = NUM(element)(view[k], r, i);
                if (stretch < run.n) run.n = stretch;
                run.same |= view[k].length == 1 || view[k].repeat > 1 ? 1 << k : 0;
            }
            run.out = target + r * length + code->offset + i;
            run.a = at[0];
            run.b = at[1];
            run.c = at[2];
            NUM(loop)(code->op, run);
        }
}

/* Run a program on at most `tile_rows` rows. `room` holds tile_rows * row_doubles numbers; `output` becomes where the outputs
   are, row after row. */
static void NUM(interpret)(const Program *program, const Input *input, long rows, double *room, Input *output) {
    const Instruction *code = program_code(program);
    const Slot *slot = program_slots(program);
    Input place[MOST_SLOTS];
    for (int64_t s = 0; s < program->slots; s++) {
        if (slot[s].kind == SLOT_INPUT) place[s] = input[slot[s].at];
        else if (slot[s].kind == SLOT_CONSTANT) place[s] = (Input){program_constants(program) + slot[s].at, 0};
        else place[s] = (Input){room + program->tile_rows * slot[s].at, slot[s].length};
    }
    for (int64_t i = 0; i < program->instructions; i++, code++) {
        const int operands = code->op == OP_WHERE ? 3 : code->op >= OP_ADD && code->op <= OP_OR ? 2 : 1;
        NUM(View) view[3] = {{0}};
        for (int k = 0; k < operands; k++) {
            const Operand *from = code->from + k;
            view[k] = (NUM(View)){place[from->slot].at + from->offset, place[from->slot].apart, from->repeat, from->length};
        }
        NUM(execute)(code, (double *)place[code->target].at, slot[code->target].length, view, operands, rows);
    }
    for (int64_t o = 0; o < program->outputs; o++) output[o] = place[program_outputs(program)[o]];
}

#undef EACH_NUMBER
#undef LOOP
#undef VECTOR
#undef NUMBER
#undef UNARY
#undef BINARY
#undef TRUTH
