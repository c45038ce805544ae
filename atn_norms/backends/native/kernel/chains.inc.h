/* The moves of chains (chains.c) over vectors of REAL. Included by level.inc.h for each REAL. */

#define STRIPE 4 /* vectors of the accumulator */
#define CHAIN_ROWS 16

/* A number of a row in REAL, and its rounding error. */
typedef struct { REAL high, low; } FN(Pair);

/* Clear the numbers of a vector from number `left` on. */
INLINE FN(vec) FN(before_end)(FN(vec) x, int left) {
    if (left >= VL) return x;
#if VECTOR_BYTES == 64 && IS_DOUBLE
    return (FN(vec))_mm512_maskz_mov_pd((__mmask8)((1u << left) - 1u), (__m512d)x);
#elif VECTOR_BYTES == 64
    return (FN(vec))_mm512_maskz_mov_ps((__mmask16)((1u << left) - 1u), (__m512)x);
#else
    FN(vec) part = {0};
    memcpy(&part, &x, (size_t)left * sizeof(REAL));
    return part;
#endif
}

/* Load the numbers of a vector that are before the end; the others are 1. GCC 12 fails to compile comparisons of doubles with the
   result for the baseline processor, if this function is inline. */
#if VECTOR_BYTES == 16
static __attribute__((noinline))
#else
INLINE
#endif
FN(vec) FN(fetch_part)(const REAL *from, int left) {
    if (left <= 0) return FN(all)(1);
    return FN(load_or)(from, left, 1);
}

#define EACH(expression)                       \
    do {                                       \
        _Pragma("GCC unroll 4")                \
        for (long j = 0; j < STRIPE; j++) {    \
            const FN(vec) x = acc[j];          \
            acc[j] = (expression);             \
        }                                      \
    } while (0)
#define AT(k) ((const REAL *)at[k] + offset)
#define VECTOR(k) (tail ? FN(fetch_part)(AT(k) + j * VL, left - (int)(j * VL)) : *(const FN(vec) *)(AT(k) + j * VL))
#define NUMBER(k) FN(all)(((const FN(Pair) *)at[k])->high)
#define ERROR(k) FN(all)(((const FN(Pair) *)at[k])->low)

#define MODE(op, role, mode) case (op) * MOVE_MODES + 4 * (role) + (mode)
#define UNARY(op, expression) \
    case (op) * MOVE_MODES: EACH(expression); break;
/* y is a vector or a number. */
#define BINARY_ROLE(op, role, expression)                                                       \
    MODE(op, role, 0): EACH(({ const FN(vec) y = VECTOR(0); expression; })); break;             \
    MODE(op, role, 1): { const FN(vec) y = NUMBER(0); EACH(expression); break; }
#define COMMUTATIVE(op, expression) BINARY_ROLE(op, 0, expression)
#define BINARY(op, expression, reversed) BINARY_ROLE(op, 0, expression) BINARY_ROLE(op, 1, reversed)
/* y and z are vectors or numbers; the error of z is added to the result if it is a number. */
#define TERNARY_ROLE(op, role, expression, rest)                                                                                  \
    MODE(op, role, 0): EACH(({ const FN(vec) y = VECTOR(0), z = VECTOR(1); expression; })); break;                                \
    MODE(op, role, 1): { const FN(vec) y = NUMBER(0); EACH(({ const FN(vec) z = VECTOR(1); expression; })); break; }              \
    MODE(op, role, 2): { const FN(vec) z = NUMBER(1), e = ERROR(1); EACH(({ const FN(vec) y = VECTOR(0); (void)e; expression rest; })); break; } \
    MODE(op, role, 3): { const FN(vec) y = NUMBER(0), z = NUMBER(1), e = ERROR(1); (void)e; EACH(expression rest); break; }
#if IS_DOUBLE
#define PLUS(low)
#define MINUS(low)
#else
#define PLUS(low) + low
#define MINUS(low) - low
#endif
#define TRUTH(comparison) FN(truth)((FN(whole))(comparison))

/* Run all moves of a chain on the numbers from `offset` on of a row. `left` numbers are left, fewer than a stripe if `tail`. */
INLINE void FN(stripe)(const int tail, const int16_t *code, char *const *at, long offset, int left) {
    FN(vec) acc[STRIPE];
    for (long j = 0; j < STRIPE; j++) acc[j] = FN(all)(1);
    for (;; code++, at += 2)
        switch (*code) {
            UNARY(OP_NEG, -x)
            UNARY(OP_ABS, FN(absolute)(x))
            UNARY(OP_SIGN, FN(signs)(x))
            UNARY(OP_RECIPROCAL, (REAL)1 / x)
            UNARY(OP_SQRT, FN(root)(x))
            UNARY(OP_RSQRT, (REAL)1 / FN(root)(x))
            UNARY(OP_ROUND, FN(rounded)(x))
            UNARY(OP_NOT, TRUTH(x == (REAL)0))
            MODE(OP_ADD, 0, 0): EACH(x + VECTOR(0)); break;
            MODE(OP_ADD, 0, 1): { const FN(vec) y = NUMBER(0), e = ERROR(0); (void)e; EACH(x + y PLUS(e)); break; }
            MODE(OP_SUB, 0, 0): EACH(x - VECTOR(0)); break;
            MODE(OP_SUB, 0, 1): { const FN(vec) y = NUMBER(0), e = ERROR(0); (void)e; EACH(x - y MINUS(e)); break; }
            MODE(OP_SUB, 1, 0): EACH(VECTOR(0) - x); break;
            MODE(OP_SUB, 1, 1): { const FN(vec) y = NUMBER(0), e = ERROR(0); (void)e; EACH(y - x PLUS(e)); break; }
            COMMUTATIVE(OP_MUL, x * y)
            BINARY(OP_DIV, x / y, y / x)
            BINARY(OP_MAX, FN(larger)(x, y), FN(larger)(y, x))
            BINARY(OP_MIN, FN(smaller)(x, y), FN(smaller)(y, x))
            BINARY(OP_GT, TRUTH(x > y), TRUTH(y > x))
            BINARY(OP_GE, TRUTH(x >= y), TRUTH(y >= x))
            BINARY(OP_LT, TRUTH(x < y), TRUTH(y < x))
            BINARY(OP_LE, TRUTH(x <= y), TRUTH(y <= x))
            COMMUTATIVE(OP_EQ, TRUTH(x == y))
            COMMUTATIVE(OP_NE, TRUTH(x != y))
            COMMUTATIVE(OP_AND, TRUTH(x != (REAL)0) * TRUTH(y != (REAL)0))
            COMMUTATIVE(OP_OR, FN(truth)((FN(whole))(x != (REAL)0) | (FN(whole))(y != (REAL)0)))
            TERNARY_ROLE(OP_WHERE, 0, FN(choose)((FN(whole))(x != (REAL)0), y, z), )
            TERNARY_ROLE(OP_WHERE, 1, FN(choose)((FN(whole))(y != (REAL)0), x, z), )
            TERNARY_ROLE(OP_WHERE, 2, FN(choose)((FN(whole))(y != (REAL)0), z, x), )
            TERNARY_ROLE(OP_MUL_ADD, 0, x * y + z, PLUS(e))
            TERNARY_ROLE(OP_MUL_ADD, 2, y * z + x, )
            TERNARY_ROLE(OP_MUL_SUB, 0, x * y - z, MINUS(e))
            TERNARY_ROLE(OP_MUL_SUB, 2, y * z - x, )
            TERNARY_ROLE(OP_SUB_MUL, 0, z - x * y, PLUS(e))
            TERNARY_ROLE(OP_SUB_MUL, 2, x - y * z, )
            TERNARY_ROLE(OP_MUL_MUL, 0, x * y * z, )
            case MOVE_SQUARE: EACH(x * x); break;
            case MOVE_LOAD: EACH(((void)x, VECTOR(0))); break;
            case MOVE_LOAD_NUMBER: EACH(((void)x, NUMBER(0))); break;
            case MOVE_STORE:
                for (long j = 0; j < STRIPE; j++) {
                    if (!tail) *(FN(vec) *)(AT(0) + j * VL) = acc[j];
                    else if (left > (int)(j * VL)) FN(store)((REAL *)AT(0) + j * VL, acc[j], left - (int)(j * VL));
                }
                break;
            case MOVE_STORE_SUM:
                for (long j = 0; j < STRIPE; j++) {
                    if (!tail) *(FN(vec) *)(AT(0) + j * VL) += acc[j];
                    else if (left > (int)(j * VL)) FN(store)((REAL *)AT(0) + j * VL, VECTOR(0) + acc[j], left - (int)(j * VL));
                }
                break;
            case MOVE_SUM: {
                F64(vec) sums[2] = {{0}}, *total = (F64(vec) *)at[0];
                for (long j = 0; j < STRIPE; j++) {
                    if (!tail) FN(onto_doubles)(acc[j], sums);
                    else if (left > (int)(j * VL)) FN(onto_doubles)(FN(before_end)(acc[j], left - (int)(j * VL)), sums);
                }
                total[0] += sums[0];
                total[1] += sums[1];
                break;
            }
            case MOVE_DOT: case MOVE_DOT_SELF: {
                FN(vec) products = {0};
                const int self = *code == MOVE_DOT_SELF;
                for (long j = 0; j < STRIPE; j++) {
                    const FN(vec) y = self ? acc[j] : VECTOR(1);
                    if (!tail) products += acc[j] * y;
                    else if (left > (int)(j * VL)) products += FN(before_end)(acc[j] * y, left - (int)(j * VL));
                }
                FN(onto_doubles)(products, (F64(vec) *)at[0]);
                break;
            }
            case MOVE_END: return;
            default: __builtin_unreachable();
        }
}

static void FN(full_stripe)(const int16_t *code, char *const *at, long offset) { FN(stripe)(0, code, at, offset, (int)(STRIPE * VL)); }

static void FN(last_stripe)(const int16_t *code, char *const *at, long offset, int left) { FN(stripe)(1, code, at, offset, left); }

/* Convert the numbers of up to CHAIN_ROWS rows. */
INLINE void FN(pairs)(const Source *from, const char *at, long apart, long rows, FN(Pair) *to) {
    for (long r = 0; r < rows; r++) {
        if (from->is_float) {
            to[r] = (FN(Pair)){(REAL)*((const float *)at + r * apart), (REAL)-0.0};
            continue;
        }
        const double x = *((const double *)at + r * apart), low = x - (double)(REAL)x;
        to[r] = (FN(Pair)){(REAL)x, low == 0.0 || low != low ? (REAL)-0.0 : (REAL)low};
    }
}

/* Run a chain on all rows of a tile. */
static void FN(chain)(const Step *first, const Input *base, long rows) {
    enum { MOST_MOVES = 3 * MOST_CHAIN };
    int16_t code[MOST_MOVES + 1];
    char *at[2 * MOST_MOVES + 2];
    long apart[2 * MOST_MOVES + 2];
    FN(Pair) pair[MOST_CHAIN_NUMBERS][CHAIN_ROWS];
    F64(vec) sums[MOST_CHAIN_SUMS][2];
    double *total[MOST_CHAIN_SUMS];
    long total_apart[MOST_CHAIN_SUMS];
    const long count = first->count;
    for (long row = 0; row < rows; row += CHAIN_ROWS) {
        const long many = rows - row < CHAIN_ROWS ? rows - row : CHAIN_ROWS;
        long moves = 0, pairs = 0, totals = 0;
        for (const Step *step = first; step < first + first->chain; step++)
            for (const Move *move = step->move; move < step->move + step->moves; move++, moves++) {
                code[moves] = move->code;
                for (int k = 0; k < 2; k++) {
                    char **here = at + 2 * moves + k;
                    long *far = apart + 2 * moves + k;
                    *here = NULL;
                    *far = 0;
                    if (move->of[k] < 0) continue;
                    const Source *from = move->of[k] == TARGET ? &step->to : step->from + move->of[k];
                    const Input start = base[from->base];
                    const long size = from->is_float ? (long)sizeof(float) : (long)sizeof(double), wide = from->base >= BASE_INPUTS ? start.apart : from->apart;
                    char *place = (char *)start.at + from->bytes + row * wide * size;
                    if (move->code >= MOVE_SUM && move->code <= MOVE_DOT_SELF && move->of[k] == TARGET) {
                        total[totals] = (double *)place;
                        total_apart[totals] = wide;
                        sums[totals][0] = sums[totals][1] = (F64(vec)){0};
                        *here = (char *)sums[totals++];
                    } else if (move->of[k] != TARGET && step->kind != STEP_SUMS && !(step->vectors >> move->of[k] & 1)) {
                        FN(pairs)(from, place, wide, many, pair[pairs]);
                        *here = (char *)pair[pairs++];
                        *far = sizeof(FN(Pair));
                    } else {
                        *here = place;
                        *far = wide * size;
                    }
                }
            }
        if (moves == 0) return;
        code[moves] = MOVE_END;
        for (long r = 0; r < many; r++) {
            long i = 0;
            for (; i + STRIPE * VL <= count; i += STRIPE * VL) FN(full_stripe)(code, at, i);
            if (i < count) FN(last_stripe)(code, at, i, (int)(count - i));
            for (long k = 0; k < 2 * moves; k++) at[k] += apart[k];
            for (long k = 0; k < totals; k++) {
                total[k][r * total_apart[k]] = F64(reduce)(sums[k][0] + sums[k][1]);
                sums[k][0] = sums[k][1] = (F64(vec)){0};
            }
        }
    }
}

#undef EACH
#undef AT
#undef VECTOR
#undef NUMBER
#undef ERROR
#undef MODE
#undef UNARY
#undef BINARY_ROLE
#undef COMMUTATIVE
#undef BINARY
#undef TERNARY_ROLE
#undef PLUS
#undef MINUS
#undef TRUTH
#undef STRIPE
#undef CHAIN_ROWS
