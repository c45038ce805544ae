/* Sums of vectors and the matrix product, for one REAL and one instruction set. Included by recurrent.inc.h. */

typedef double FN(wide) __attribute__((vector_size(VECTOR_BYTES)));

INLINE FN(wide) FN(widened)(FN(vec) value) {
#if IS_DOUBLE
    return (FN(wide))value;
#else
    typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
    half halves[2];
    memcpy(halves, &value, sizeof halves);
    return __builtin_convertvector(halves[0], FN(wide)) + __builtin_convertvector(halves[1], FN(wide));
#endif
}

/* Add the sum of each vector to first and second, in double and always in the same order. */
INLINE void FN(totals)(FN(vec) one, FN(vec) other, double *first, double *second) {
    const FN(wide) a = FN(widened)(one), b = FN(widened)(other);
#if VECTOR_BYTES == 64
    FN(wide) sum = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5);
    sum += __builtin_shufflevector(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6);
#elif VECTOR_BYTES == 32
    FN(wide) sum = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    sum += __builtin_shufflevector(sum, sum, 1, 0, 3, 2);
#else
    const FN(wide) sum = __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3);
#endif
    *first += sum[0];
    *second += sum[VECTOR_BYTES / 16];
}

INLINE void FN(copy)(REAL *restrict to, const REAL *restrict from, long n) {
    if (n < VL) {
        memcpy(to, from, (size_t)n * sizeof(REAL));
        return;
    }
    for (long i = 0; i + VL <= n; i += VL) *(FN(vec) *)(to + i) = *(const FN(vec) *)(from + i);
    *(FN(vec) *)(to + n - VL) = *(const FN(vec) *)(from + n - VL);
}

/* Pack one panel, from column p on, of a matrix whose rows are `row` apart. */
static void FN(pack_panel)(REAL *to, const REAL *from, long K, long M, long p, long row) {
    const long columns = M - p < PANEL ? M - p : PANEL;
    for (long k = 0; k < K; k++, to += PANEL) {
        FN(store)(to, FN(load)(from + k * row + p, columns), VL);
        FN(store)(to + VL, columns > VL ? FN(load)(from + k * row + p + VL, columns - VL) : (FN(vec)){0}, VL);
    }
}

/* The numbers of two vectors in turn: of their first halves (LOW), and of their second halves (HIGH). */
#if VECTOR_BYTES == 64 && !IS_DOUBLE
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VECTOR_BYTES == 64 || (VECTOR_BYTES == 32 && !IS_DOUBLE)
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif VECTOR_BYTES == 32 || !IS_DOUBLE
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#else
#define LOW 0, 2
#define HIGH 1, 3
#endif

/* Store at most a vector of numbers of VL rows as columns, which are a panel wide; a row may be NULL, for zeros. Each round rotates
   the bits of the number of a row, followed by those of a column, by one. */
INLINE void FN(turn)(REAL *to, const REAL *const row[VL], long at, long n) {
    FN(vec) now[VL], next[VL];
    for (long r = 0; r < VL; r++) now[r] = row[r] ? FN(load)(row[r] + at, n) : (FN(vec)){0};
    for (long round = 1; round < VL; round *= 2) {
        for (long r = 0; r < VL / 2; r++) {
            next[2 * r] = __builtin_shufflevector(now[r], now[r + VL / 2], LOW);
            next[2 * r + 1] = __builtin_shufflevector(now[r], now[r + VL / 2], HIGH);
        }
        memcpy(now, next, sizeof now);
    }
    for (long i = 0; i < VL && i < n; i++) *(FN(vec) *)(to + i * PANEL) = now[i];
}
#undef LOW
#undef HIGH

/* Pack one panel with columns that are K numbers each; a column may be NULL, for zeros. */
static void FN(pack_columns)(REAL *to, const REAL *const column[PANEL], long K) {
    for (long half = 0; half < PANEL; half += VL)
        for (long k = 0; k < K; k += VL) FN(turn)(to + k * PANEL + half, column + half, k, K - k);
}

INLINE long FN(panels)(long M) { return (M + PANEL - 1) / PANEL; }

/* Multiply `rows` rows of A by the first `wide` vectors of one panel, add the result to `start`, and store it in `out`: all columns of the
   vectors, or only the first `columns` of them with `edge`. Element (r, k) of A is A[r * lda + k * step]. The sum over k has a fixed
   order, so it does not depend on the grouping of rows. */
INLINE void FN(tile)(const int rows, const int wide, const int edge, long K, const REAL *A, long lda, long step, const REAL *panel,
                     const REAL *start, long lds, REAL *out, long ldo, long columns) {
    FN(vec) sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++) sum[r][v] = edge && v * VL >= columns ? (FN(vec)){0} : FN(load)(start + r * lds + v * VL, edge ? columns - v * VL : VL);
    /* The address of a row is one register plus an odd multiple of the distance between rows times 1, 2, 4 or 8, which
       processors add at no cost. Otherwise the compiler keeps an address for each row and runs out of registers. */
    const char *at = (const char *)A;
    const long ahead = step * (long)sizeof(REAL);
    long apart[TILE_ROWS];
    for (int r = 1; r < rows; r += 2) {
        apart[r] = r * lda * (long)sizeof(REAL);
        __asm__("" : "+r"(apart[r]));
    }
    for (long k = 0; k < K; k++, panel += PANEL, at += ahead) {
        FN(vec) part[2];
        for (int v = 0; v < wide; v++) __builtin_prefetch((const char *)(panel + v * VL) + FETCH_BYTES, 0, 3);
        for (int v = 0; v < wide; v++) part[v] = *(const FN(vec) *)(panel + v * VL);
        for (int r = 0; r < rows; r++) {
            const long times = r % 8 == 0 ? 8 : r % 4 == 0 ? 4 : r % 2 == 0 ? 2 : 1;
            const REAL a = *(const REAL *)(r ? at + apart[r / times] * times : at);
            for (int v = 0; v < wide; v++) sum[r][v] += a * part[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide && (!edge || v * VL < columns); v++) FN(store)(out + r * ldo + v * VL, sum[r][v], edge ? columns - v * VL : VL);
}

/* Multiply R rows by the columns of one panel, in tiles of about equal size that fit into the registers; `onto`: add the result to
   `out`, otherwise to the padded bias. All tiles use the same few rows of the panel, which stay in the nearest cache, before the
   next ones. If the panel has columns in its first vector only, the second one is computed only with `whole`. */
INLINE void FN(strip)(const int onto, const int whole, long R, long K, const REAL *A, long lda, long step, const REAL *panel, const REAL *bias,
                      REAL *out, long ldo, long columns) {
    for (long from = 0; from < K || from == 0; from += DEPTH) {
        const long deep = K - from < DEPTH ? K - from : DEPTH;
        const int add = onto || from;
        for (long row = 0, tiles = (R + TILE_ROWS - 1) / TILE_ROWS, rows; tiles > 0; tiles--, row += rows) {
            rows = (R - row + tiles - 1) / tiles;
            REAL *to = out + row * ldo;
            const REAL *part = A + row * lda + from * step, *deeper = panel + from * PANEL, *start = add ? to : bias;
            const long between = add ? ldo : 0;
#define TILE(n)                                                                                                          \
    case n:                                                                                                              \
        if (columns >= PANEL) FN(tile)(n, 2, 0, deep, part, lda, step, deeper, start, between, to, ldo, PANEL);           \
        else if (columns > VL || whole) FN(tile)(n, 2, 1, deep, part, lda, step, deeper, start, between, to, ldo, columns); \
        else FN(tile)(n, 1, 1, deep, part, lda, step, deeper, start, between, to, ldo, columns);                          \
        break;
            switch (rows) {
                TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if TILE_ROWS > 6
                TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
            }
#undef TILE
        }
    }
}

/* Compute the share of thread `id` of `team` threads in out [R, M] = A [R, K] times packed panels, plus a padded bias; rows of
   A are lda apart. */
static void FN(product)(int id, int team, long R, long K, long M, const REAL *A, long lda, const REAL *packed, const REAL *bias, REAL *out) {
    const long panels = FN(panels)(M), last = panels * (id + 1) / team * PANEL;
    for (long p = panels * id / team * PANEL; p < last; p += PANEL)
        FN(strip)(0, M > 4 * PANEL, R, K, A, lda, 1, packed + p * K, bias + p, out + p, M, M - p); /* with many panels, half a panel saves nothing */
}

/* The same product with an unpacked matrix [M, K], for so few rows that packing would cost more than the product. */
static void FN(dots)(int id, int team, long R, long K, long M, const REAL *A, long lda, const REAL *matrix, const REAL *bias, REAL *out) {
    for (long m = M * id / team; m < M * (id + 1) / team; m += 2) {
        const REAL *one = matrix + m * K, *other = m + 1 < M ? one + K : one;
        for (long r = 0; r < R; r++) {
            FN(vec) first = {0}, second = {0};
            for (long k = 0; k < K; k += VL) {
                const FN(vec) a = FN(load)(A + r * lda + k, K - k);
                first += a * FN(load)(one + k, K - k);
                second += a * FN(load)(other + k, K - k);
            }
            double sums[2] = {bias ? (double)bias[m] : 0.0, bias && m + 1 < M ? (double)bias[m + 1] : 0.0};
            FN(totals)(first, second, sums, sums + 1);
            out[r * M + m] = (REAL)sums[0];
            if (m + 1 < M * (id + 1) / team) out[r * M + m + 1] = (REAL)sums[1];
        }
    }
}

/* Compute rows `from` to `to` of out [N, M] += A [K, N] transposed times packed panels [M / PANEL][K][PANEL]. */
static void FN(accumulate)(long from, long to, long N, long K, long M, const REAL *A, const REAL *packed, REAL *out) {
    for (long p = 0; p < M; p += PANEL, packed += K * PANEL)
        FN(strip)(1, 0, to - from, K, A + from, 1, N, packed, NULL, out + from * M + p, M, M - p);
}

/* Sum two vectors of columns, from column n on, over the K rows of A [K, N]: add the rows to `total` if it is given, and their
   products with the few columns of xs [K, D] to dweight [N, D]. */
INLINE void FN(thin_columns)(const int D, long n, long columns, long N, long K, const REAL *A, const REAL *xs, REAL *dweight, REAL *total) {
    FN(vec) sums[THIN + 1][2] = {{{0}}};
    const long left = columns < VL ? columns : VL, right = columns - left;
    for (long k = 0; k < K; k++) {
        const FN(vec) a = FN(load)(A + k * N + n, left), b = FN(load)(A + k * N + n + left, right);
        sums[D][0] += a;
        sums[D][1] += b;
        for (int d = 0; d < D; d++) {
            sums[d][0] += a * xs[k * D + d];
            sums[d][1] += b * xs[k * D + d];
        }
    }
    for (long j = 0; j < columns; j++) {
        const long half = j >= VL, at = j - half * VL;
        if (total) total[n + j] += sums[D][half][at];
        for (int d = 0; d < D; d++) dweight[(n + j) * D + d] += sums[d][half][at];
    }
}

static void FN(thin)(long from, long to, long N, long K, long D, const REAL *A, const REAL *xs, REAL *dweight, REAL *total) {
    for (long n = from; n < to; n += PANEL) {
        const long columns = to - n < PANEL ? to - n : PANEL;
#define FEW(d) case d: FN(thin_columns)(d, n, columns, N, K, A, xs, dweight, total); break;
        switch (D) { FEW(0) FEW(1) FEW(2) FEW(3) FEW(4) }
#undef FEW
    }
}
