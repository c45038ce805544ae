/* The equations of the cells and their derivatives, for n units at a time. n is VL, or the number of units if that is smaller.

   No function overwrites its inputs, so the same units may be computed twice: the last vector of a row ends at the end of the
   row and may overlap the one before. */

/* The factors that normalize one row of a site: y = ((x - high) * scale + rest) * gain + shift, with one statistic for each
   gate. `high` is the pooled mean rounded to REAL, and `rest` restores the rounding error, so the subtraction is exact. */
typedef struct { REAL high, scale, rest; } FN(Affine);

typedef struct {
    const REAL *x, *gain, *shift;
    FN(Affine) by[4];
    const REAL *high; /* with one statistic for each feature: y = (x - high) * gain + shift */
    int each;         /* true with one statistic for each feature; a constant in the loops over units */
} FN(Side);

/* Run `call` with `at` and a constant `n` over all H units. */
#define EVERY_UNIT(H, call)                                                                 \
    do {                                                                                    \
        if ((H) < VL) { const long at = 0, n = (H); call; }                                  \
        else for (long from_ = 0; from_ < (H); from_ += VL) {                                 \
            const long at = from_ + VL <= (H) ? from_ : (H) - VL, n = VL; call;               \
        }                                                                                   \
    } while (0)

/* Load the normalized numbers i to i + n - 1 of a row, whose units belong to the given gate. */
INLINE FN(vec) FN(normed)(const FN(Side) *side, int gate, long i, long n) {
    if (side->each) return (FN(load)(side->x + i, n) - FN(load)(side->high + i, n)) * FN(load)(side->gain + i, n) + FN(load)(side->shift + i, n);
    const FN(Affine) by = side->by[gate];
    const FN(vec) normal = (FN(load)(side->x + i, n) - by.high) * by.scale + by.rest;
    return normal * FN(load)(side->gain + i, n) + FN(load)(side->shift + i, n);
}

#define GATE(gate) (FN(normed)(&x, gate, gate * H + at, n) + FN(normed)(&u, gate, gate * H + at, n))
#define AT(row) FN(load)(row + at, n)

/* Compute the new c, and the reciprocal of the output gate. */
INLINE void FN(lstm)(const long n, long at, long H, const FN(Side) x, const FN(Side) u, const REAL *restrict old, REAL *restrict c,
                     REAL *restrict gate) {
    const FN(vec) i = (REAL)1 + FN(exp)(-GATE(0)), f = (REAL)1 + FN(exp)(-GATE(1)), g = FN(exp_below)(GATE(2));
    FN(store)(c + at, AT(old) / f - g / (i * ((REAL)2 + g)), n);
    FN(store)(gate + at, (REAL)1 + FN(exp)(-GATE(3)), n);
}

/* h = tanh(y) / `gate`, where `gate` is the reciprocal of the output gate and y the normalized c. */
INLINE void FN(lstm_output)(const long n, long at, const FN(Side) y, const REAL *restrict gate, REAL *restrict h) {
    const FN(vec) e = FN(exp_below)(FN(normed)(&y, 0, at, n));
    FN(store)(h + at, ((REAL)0 - e) / (AT(gate) * ((REAL)2 + e)), n);
}

/* From the gradient of h, compute the gradients of the output gate's pre-activation and of y. */
INLINE void FN(lstm_output_back)(const long n, long at, long H, const FN(Side) x, const FN(Side) u, const FN(Side) y, const REAL *restrict dout,
                                 const REAL *restrict dh, REAL *restrict dgate, REAL *restrict dy) {
    const FN(vec) o = FN(sigmoid)(GATE(3)), s = FN(tanh)(FN(normed)(&y, 0, at, n)), g = (AT(dout) + AT(dh)) * o;
    FN(store)(dgate + at, g * s * ((REAL)1 - o), n);
    FN(store)(dy + at, g * ((REAL)1 - s * s), n);
}

/* From the gradient of the new c, compute the gradients of the other gates and of the old c. */
INLINE void FN(lstm_back)(const long n, long at, long H, const FN(Side) x, const FN(Side) u, const REAL *restrict old, const REAL *restrict dc,
                          const REAL *restrict more, REAL *restrict dgates, REAL *restrict dold) {
    const FN(vec) i = FN(sigmoid)(GATE(0)), f = FN(sigmoid)(GATE(1)), g = FN(tanh)(GATE(2)), d = AT(dc) + AT(more);
    const FN(vec) di = d * i, df = d * f;
    FN(store)(dgates + at, di * g * ((REAL)1 - i), n);
    FN(store)(dgates + H + at, df * AT(old) * ((REAL)1 - f), n);
    FN(store)(dgates + 2 * H + at, di * ((REAL)1 - g * g), n);
    FN(store)(dold + at, df, n);
}

INLINE void FN(gru)(const long n, long at, long H, const FN(Side) x, const FN(Side) u, const REAL *restrict old, REAL *restrict h) {
    const FN(vec) reset = FN(sigmoid)(GATE(0)), keep = FN(sigmoid)(GATE(1));
    const FN(vec) new = FN(tanh)(FN(normed)(&x, 2, 2 * H + at, n) + reset * FN(normed)(&u, 2, 2 * H + at, n));
    FN(store)(h + at, ((REAL)1 - keep) * new + keep * AT(old), n);
}

/* From the gradient of h, compute the gradients of both products, which differ in the candidate only, and the direct gradient
   of the old h. */
INLINE void FN(gru_back)(const long n, long at, long H, const FN(Side) x, const FN(Side) u, const REAL *restrict old, const REAL *restrict dout,
                         const REAL *restrict dh, REAL *restrict dx, REAL *restrict du, REAL *restrict dold) {
    const FN(vec) reset = FN(sigmoid)(GATE(0)), keep = FN(sigmoid)(GATE(1)), candidate = FN(normed)(&u, 2, 2 * H + at, n);
    const FN(vec) new = FN(tanh)(FN(normed)(&x, 2, 2 * H + at, n) + reset * candidate), g = AT(dout) + AT(dh);
    const FN(vec) dn = g * ((REAL)1 - keep) * ((REAL)1 - new * new), back = dn * reset, past = g * keep;
    const FN(vec) dr = back * candidate * ((REAL)1 - reset), dz = past * (AT(old) - new) * ((REAL)1 - keep);
    FN(store)(dx + at, dr, n);
    FN(store)(du + at, dr, n);
    FN(store)(dx + H + at, dz, n);
    FN(store)(du + H + at, dz, n);
    FN(store)(dx + 2 * H + at, dn, n);
    FN(store)(du + 2 * H + at, back, n);
    FN(store)(dold + at, past, n);
}

INLINE void FN(rnn)(const int relu, const long n, long at, long H, const FN(Side) x, const FN(Side) u, REAL *restrict h) {
    const FN(vec) z = GATE(0);
    if (relu) FN(store)(h + at, FN(at_least)(z, 0), n);
    else FN(store)(h + at, FN(tanh)(z), n);
}

INLINE void FN(rnn_back)(const int relu, const long n, long at, long H, const FN(Side) x, const FN(Side) u, const REAL *restrict dout,
                         const REAL *restrict dh, REAL *restrict dz) {
    const FN(vec) z = GATE(0), g = AT(dout) + AT(dh), y = FN(tanh)(z);
    const FN(whole) down = (FN(whole))(z <= (REAL)0); /* not for NaN: its gradient passes, as in torch */
    FN(vec) back = g * ((REAL)1 - y * y);
    if (relu) back = (FN(vec))((FN(whole))g & ~down);
    FN(store)(dz + at, back, n);
}

#undef GATE
#undef AT
