/* Elementary functions and the product, for one REAL and one instruction set. Included by recurrent.inc.h. */

#define VL ((long)(VECTOR_BYTES / sizeof(REAL)))
#define PANEL (2 * VL) /* columns of a packed panel: two vectors */

typedef REAL FN(vec) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

/* exp by range reduction to |r| <= ln(2) / 2 and a polynomial; NaN stays NaN, the ends saturate. */
static inline __attribute__((always_inline)) REAL FN(exp)(REAL x) {
    const REAL high = IS_DOUBLE ? (REAL)708.0 : (REAL)88.0, low = IS_DOUBLE ? (REAL)-708.0 : (REAL)-87.0;
    x = x > high ? high : x;
    x = x < low ? low : x;
#if IS_DOUBLE
    const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer held in the low bits */
    union { double f; int64_t i; } shifted = {x * 1.4426950408889634074 + magic}, scale;
    double n = shifted.f - magic;
    double r = x - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
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
    p = p * r + 1.0;
    p = p * r + 1.0;
    scale.i = (int64_t)((uint64_t)(shifted.i + 1023) << 52);
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23 */
    union { float f; int32_t i; } shifted = {x * 1.44269504f + magic}, scale;
    float n = shifted.f - magic;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    scale.i = (int32_t)((uint32_t)(shifted.i + 127) << 23);
#endif
    return p * scale.f;
}

static inline __attribute__((always_inline)) REAL FN(sigmoid)(REAL x) { return (REAL)1 / ((REAL)1 + FN(exp)(-x)); }

/* exp(-2 x) for use in tanh(x) = (1 - e) / (1 + e), kept to where tanh is not yet 1 in REAL: it can then be multiplied. */
static inline __attribute__((always_inline)) REAL FN(small_exp)(REAL x) {
    const REAL end = IS_DOUBLE ? (REAL)20 : (REAL)10;
    x = x > end ? end : x;
    x = x < -end ? -end : x;
    return FN(exp)((REAL)-2 * x);
}

static inline __attribute__((always_inline)) REAL FN(tanh)(REAL x) {
    const REAL e = FN(small_exp)(x);
    return ((REAL)1 - e) / ((REAL)1 + e);
}

/* Pack a matrix of K rows and M columns, element (k, m) at from[k * row + m * column], into panels [M / PANEL][K][PANEL]. */
static void FN(pack)(REAL *to, const REAL *from, long K, long M, long row, long column) {
    for (long p = 0; p < M; p += PANEL)
        for (long k = 0; k < K; k++, to += PANEL)
            for (long m = 0; m < PANEL; m++) to[m] = p + m < M ? from[k * row + (p + m) * column] : (REAL)0;
}

/* One panel, from column p on, of a matrix whose rows lie `row` apart. */
static void FN(pack_panel)(REAL *to, const REAL *from, long K, long M, long p, long row) {
    const long columns = M - p < PANEL ? M - p : PANEL;
    for (long k = 0; k < K; k++, to += PANEL) {
        memcpy(to, from + k * row + p, (size_t)columns * sizeof(REAL));
        if (columns < PANEL) memset(to + columns, 0, (size_t)(PANEL - columns) * sizeof(REAL));
    }
}

static inline long FN(panels)(long M) { return (M + PANEL - 1) / PANEL; }

/* `rows` rows of A times one panel, onto what `sum` starts from, to `columns` columns of the result. Element (r, k) of A is
   at A[r * lda + k * step]. Each element is summed over k in order, so it does not depend on how rows are grouped. */
static inline __attribute__((always_inline)) void FN(tile)(const int rows, const int onto, long K, const REAL *A, long lda, long step,
                                                           const REAL *panel, const REAL *bias, REAL *out, long ldo, long columns) {
    FN(vec) sum[TILE_ROWS][2];
    REAL edge[TILE_ROWS][PANEL] __attribute__((aligned(64)));
    if (onto && columns < PANEL)
        for (int r = 0; r < rows; r++) memcpy(edge[r], out + r * ldo, (size_t)columns * sizeof(REAL));
    for (int r = 0; r < rows; r++) {
        const REAL *from = !onto ? bias : columns < PANEL ? edge[r] : out + r * ldo;
        sum[r][0] = *(const FN(vec) *)from;
        sum[r][1] = *(const FN(vec) *)(from + VL);
    }
    for (long k = 0; k < K; k++, panel += PANEL) {
        const FN(vec) left = *(const FN(vec) *)panel, right = *(const FN(vec) *)(panel + VL);
        for (int r = 0; r < rows; r++) {
            const REAL a = A[r * lda + k * step];
            sum[r][0] += a * left;
            sum[r][1] += a * right;
        }
    }
    for (int r = 0; r < rows; r++) {
        REAL *to = columns < PANEL ? edge[r] : out + r * ldo;
        *(FN(vec) *)to = sum[r][0];
        *(FN(vec) *)(to + VL) = sum[r][1];
        if (columns < PANEL) memcpy(out + r * ldo, edge[r], (size_t)columns * sizeof(REAL));
    }
}

/* One panel's columns of R rows: as many rows at a time as stay in registers. */
static inline __attribute__((always_inline)) void FN(strip)(const int onto, long R, long K, const REAL *A, long lda, long step,
                                                            const REAL *panel, const REAL *bias, REAL *out, long ldo, long columns) {
    for (long r = 0; r < R;) {
        const REAL *a = A + r * lda;
        REAL *o = out + r * ldo;
#define TILE(n) FN(tile)(n, onto, K, a, lda, step, panel, bias, o, ldo, columns), r += n
        const long left = R - r;
        if (left >= TILE_ROWS) TILE(TILE_ROWS);
#if TILE_ROWS > 4
        else if (left >= 4) TILE(4);
#endif
        else if (left >= 2) TILE(2);
        else TILE(1);
#undef TILE
    }
}

/* out [R, M] = A [R, K], whose rows lie lda apart, times packed panels, plus a padded bias. */
static void FN(product)(long R, long K, long M, const REAL *A, long lda, const REAL *packed, const REAL *bias, REAL *out) {
    for (long p = 0; p < M; p += PANEL, packed += K * PANEL) FN(strip)(0, R, K, A, lda, 1, packed, bias + p, out + p, M, M - p);
}

/* Rows from to to of out [N, M] += A [K, N] transposed times packed panels [M / PANEL][K][PANEL]. */
static void FN(accumulate)(long from, long to, long N, long K, long M, const REAL *A, const REAL *packed, REAL *out) {
    for (long p = 0; p < M; p += PANEL, packed += K * PANEL)
        FN(strip)(1, to - from, K, A + from, 1, N, packed, NULL, out + from * M + p, M, M - p);
}
