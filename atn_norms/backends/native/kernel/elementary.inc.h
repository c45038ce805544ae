/* Elementary functions of vectors of REAL. Included by level.inc.h for each REAL. */

INLINE FN(vec) FN(choose)(FN(whole) mask, FN(vec) yes, FN(vec) no) {
    return (FN(vec))((mask & (FN(whole))yes) | (~mask & (FN(whole))no));
}

INLINE FN(vec) FN(truth)(FN(whole) mask) { return (FN(vec))(mask & (FN(whole))FN(all)(1)); }

INLINE FN(vec) FN(absolute)(FN(vec) x) { return (FN(vec))((FN(whole))x & (IS_DOUBLE ? INT64_MAX : INT32_MAX)); }

/* Return true if the sign bit of any element is set. */
INLINE int FN(any)(FN(whole) mask) {
#if VECTOR_BYTES == 64 && IS_DOUBLE
    return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif VECTOR_BYTES == 64
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__x86_64__) && IS_DOUBLE
    return X86(movemask_pd)(X86_DOUBLES mask) != 0;
#elif defined(__x86_64__)
    return X86(movemask_ps)(X86_FLOATS mask) != 0;
#else
    int either = 0;
    for (long i = 0; i < VL; i++) either |= mask[i] < 0;
    return either;
#endif
}

INLINE FN(vec) FN(root)(FN(vec) x) {
#if defined(__x86_64__) && IS_DOUBLE
    return (FN(vec))X86(sqrt_pd)(X86_DOUBLES x);
#elif defined(__x86_64__)
    return (FN(vec))X86(sqrt_ps)(X86_FLOATS x);
#else
    for (long i = 0; i < VL; i++) x[i] = (REAL)sqrt((double)x[i]);
    return x;
#endif
}

/* Return the smaller, or the larger, of each number and a limit; NaN stays NaN. */
INLINE FN(vec) FN(at_most)(FN(vec) x, REAL limit) {
#if defined(__x86_64__) && IS_DOUBLE
    return (FN(vec))X86(min_pd)(X86(set1_pd)(limit), X86_DOUBLES x);
#elif defined(__x86_64__)
    return (FN(vec))X86(min_ps)(X86(set1_ps)(limit), X86_FLOATS x);
#else
    return FN(choose)((FN(whole))(x > limit), FN(all)(limit), x);
#endif
}

INLINE FN(vec) FN(at_least)(FN(vec) x, REAL limit) {
#if defined(__x86_64__) && IS_DOUBLE
    return (FN(vec))X86(max_pd)(X86(set1_pd)(limit), X86_DOUBLES x);
#elif defined(__x86_64__)
    return (FN(vec))X86(max_ps)(X86(set1_ps)(limit), X86_FLOATS x);
#else
    return FN(choose)((FN(whole))(x < limit), FN(all)(limit), x);
#endif
}

/* Reduce x, which is NaN or neither too large nor too small for exp: return 2^n, and set r with exp(x) = 2^n exp(r) and
   |r| <= ln(2) / 2. */
INLINE FN(vec) FN(reduced)(FN(vec) x, FN(vec) *r) {
#if IS_DOUBLE
    const FN(vec) shifted = x * 1.4426950408889634074 + 6755399441055744.0; /* + 1.5 * 2^52 leaves an integer in the low bits */
    const FN(vec) n = shifted - 6755399441055744.0;
    *r = x - n * 6.93147180369123816490e-1 - n * 1.90821492927058770002e-10;
    return (FN(vec))(((FN(whole))shifted + 1023) << 52);
#else
    const FN(vec) shifted = x * 1.44269504f + 12582912.0f; /* + 1.5 * 2^23 leaves an integer in the low bits */
    const FN(vec) n = shifted - 12582912.0f;
    *r = x - n * 0.693359375f + n * 2.12194440e-4f;
    return (FN(vec))(((FN(whole))shifted + 127) << 23);
#endif
}

/* Compute (exp(r) - 1) / r by a polynomial for |r| <= ln(2) / 2: minimax in float, with a relative error of 2.8e-9 of exp(r);
   Taylor's in double. */
INLINE FN(vec) FN(exp_slope)(FN(vec) r) {
#if IS_DOUBLE
    FN(vec) p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
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
    return p * r + 1.0;
#else
    FN(vec) p = r * 0.0013839915627613664f + 0.00837522093206644f;
    p = p * r + 0.0416681207716465f;
    p = p * r + 0.16666418313980103f;
    p = p * r + 0.4999999403953552f;
    return p * r + 1.0f;
#endif
}

/* Compute exp(x + more) for x well within the range of REAL and a small second part. */
INLINE FN(vec) FN(near_exp_sum)(FN(vec) x, FN(vec) more) {
    FN(vec) r;
    const FN(vec) scale = FN(reduced)(x, &r);
    r += more;
    return (FN(exp_slope)(r) * r + (REAL)1) * scale;
}

/* Compute exp of arguments that are NaN or neither too large nor too small for REAL. Adding -0 changes nothing. */
INLINE FN(vec) FN(near_exp)(FN(vec) x) { return FN(near_exp_sum)(x, FN(all)((REAL)-0.0)); }

/* Compute exp; NaN stays NaN, and the result saturates at both ends. */
INLINE FN(vec) FN(exp)(FN(vec) x) {
    const REAL high = IS_DOUBLE ? (REAL)708.0 : (REAL)88.0, low = IS_DOUBLE ? (REAL)-708.0 : (REAL)-87.0;
    return FN(near_exp)(FN(at_least)(FN(at_most)(x, high), low));
}

INLINE FN(vec) FN(sigmoid)(FN(vec) x) { return (REAL)1 / ((REAL)1 + FN(exp)(-x)); }

/* Compute e = exp(-2 x) - 1 for tanh(x) = -e / (2 + e), which keeps the digits of a small x. Arguments are limited to those with
   tanh(x) below 1 in REAL, so that products of e stay finite. Write `0 - e`, since tanh(0) is not -0. */
INLINE FN(vec) FN(exp_below)(FN(vec) x) {
    const REAL end = IS_DOUBLE ? (REAL)20 : (REAL)10;
    FN(vec) r;
    const FN(vec) scale = FN(reduced)((REAL)-2 * FN(at_least)(FN(at_most)(x, end), -end), &r);
    return FN(exp_slope)(r) * r * scale + (scale - (REAL)1);
}

INLINE FN(vec) FN(tanh)(FN(vec) x) {
    const FN(vec) e = FN(exp_below)(x);
    return ((REAL)0 - e) / ((REAL)2 + e);
}

/* Call a function of libm for each number, where the vector code does not apply. */
#define EACH_NUMBER(call)                                      \
    do {                                                       \
        for (long i = 0; i < VL; i++) y[i] = (REAL)(call);     \
    } while (0)

/* exp beyond the range of the vector code, and infinity, by libm. */
INLINE FN(vec) FN(exponential)(FN(vec) x) {
    if (!FN(any)(~(FN(whole))(FN(absolute)(x) <= (REAL)(IS_DOUBLE ? 708.0 : 87.0)))) return FN(near_exp)(x);
    FN(vec) y = x;
    EACH_NUMBER(exp((double)x[i]));
    return y;
}

/* Compute log of positive normal numbers: x = 2^n m with m within a factor sqrt(2) of 1, s = (m - 1) / (m + 1), log m = 2
   artanh s. */
INLINE FN(vec) FN(log_parts)(FN(vec) x, FN(vec) *exponent, FN(vec) *difference) {
    const FN(whole) bits = (FN(whole))x;
#if IS_DOUBLE
    const FN(whole) up = (bits & 0xfffffffffffffLL) - 0x6a09e667f3bcdLL; /* < 0 where m < sqrt(2) */
    const FN(whole) half = (FN(whole))(up >= 0) & 1, power = ((bits >> 52) & 0x7ff) - 1023 + half;
    const FN(vec) m = (FN(vec))((bits & 0xfffffffffffffLL) | ((1023 - half) << 52));
    const FN(vec) n = (FN(vec))(power + 0x4338000000000000LL) - 6755399441055744.0;
#else
    const FN(whole) up = (bits & 0x7fffff) - 0x3504f3;
    const FN(whole) half = (FN(whole))(up >= 0) & 1, power = (bits >> 23) - 127 + half;
    const FN(vec) m = (FN(vec))((bits & 0x7fffff) | ((127 - half) << 23)), n = __builtin_convertvector(power, FN(vec));
#endif
    const FN(vec) d = m - (REAL)1, s = d / (m + (REAL)1), z = s * s;
#if IS_DOUBLE
    FN(vec) p = z * (2.0 / 23.0) + 2.0 / 21.0;
    p = p * z + 2.0 / 19.0;
    p = p * z + 2.0 / 17.0;
    p = p * z + 2.0 / 15.0;
    p = p * z + 2.0 / 13.0;
    p = p * z + 2.0 / 11.0;
    p = p * z + 2.0 / 9.0;
#else
    FN(vec) p = z * (2.0f / 11.0f) + 2.0f / 9.0f;
#endif
    p = p * z + (REAL)(2.0 / 7.0);
    p = p * z + (REAL)(2.0 / 5.0);
    p = p * z + (REAL)(2.0 / 3.0);
    /* 2 s = d - s d, exact enough for small d; then the remaining terms of the series, and n ln 2 in two parts */
    const REAL low = (REAL)(IS_DOUBLE ? 1.90821492927058770002e-10 : -2.12194440e-4);
    *exponent = n;
    *difference = d;
    return n * low - s * (d - z * p);
}

INLINE FN(vec) FN(near_log)(FN(vec) x) {
    FN(vec) n, d;
    const FN(vec) rest = FN(log_parts)(x, &n, &d);
    return n * (REAL)(IS_DOUBLE ? 6.93147180369123816490e-1 : 0.693359375) + (d + rest);
}

INLINE int FN(all_normal)(FN(vec) x) {
    const REAL least = (REAL)(IS_DOUBLE ? 0x1p-1022 : 0x1p-126), most = (REAL)(IS_DOUBLE ? 0x1.fffffffffffffp1023 : 0x1.fffffep127);
    return !FN(any)(~((FN(whole))(x >= least) & (FN(whole))(x <= most)));
}

INLINE FN(vec) FN(logarithm)(FN(vec) x) {
    if (FN(all_normal)(x)) return FN(near_log)(x);
    FN(vec) y = x;
    EACH_NUMBER(log((double)x[i]));
    return y;
}

/* Return true if x to the power e is well within the range of REAL; `product` is e log x. */
INLINE int FN(near_power)(FN(vec) x, FN(vec) product) {
    return FN(all_normal)(x) && !FN(any)(~(FN(whole))(FN(absolute)(product) <= (REAL)(IS_DOUBLE ? 700.0 : 86.0)));
}

#if IS_DOUBLE
/* Compute x to the power e; l is log x. */
INLINE FN(vec) FN(power_of)(FN(vec) x, FN(vec) l, FN(vec) e) {
    const FN(vec) product = l * e;
    if (FN(near_power)(x, product)) return FN(near_exp)(product);
    FN(vec) y = x;
    EACH_NUMBER(pow(x[i], e[i]));
    return y;
}

INLINE FN(vec) FN(power)(FN(vec) x, FN(vec) e) { return FN(power_of)(x, FN(near_log)(x), e); }
#else
/* Return the rounding error of a product, or 0 where the processor has no fused operation. */
INLINE FN(vec) FN(product_error)(FN(vec) a, FN(vec) b, FN(vec) product) {
#if VECTOR_BYTES > 16
    return (FN(vec))X86(fmsub_ps)(X86_FLOATS a, X86_FLOATS b, X86_FLOATS product);
#else
    (void)a; (void)b; (void)product;
    return (FN(vec)){0};
#endif
}

/* Compute x to the power e. The logarithm and its product with e have two parts, since the rounding error of a large product
   would be a large relative error of the result. */
INLINE FN(vec) FN(power)(FN(vec) x, FN(vec) e) {
    FN(vec) n, d;
    const FN(vec) rest = FN(log_parts)(x, &n, &d), first = n * 0.693359375f; /* exact */
    const FN(vec) sum = first + d, low = rest + (d - (sum - first)), log = sum + low, error = low - (log - sum);
    const FN(vec) product = log * e, more = FN(product_error)(log, e, product) + error * e;
    if (FN(near_power)(x, product)) return FN(near_exp_sum)(product, more);
    FN(vec) y = x;
    EACH_NUMBER(pow((double)x[i], (double)e[i]));
    return y;
}

INLINE FN(vec) FN(power_of)(FN(vec) x, FN(vec) l, FN(vec) e) {
    (void)l; /* not exact enough */
    return FN(power)(x, e);
}
#endif

/* Compute a / b for b from 1 to 2: with AVX-512 in float from an approximate reciprocal and one step of Newton's method, which is
   faster than a division. */
INLINE FN(vec) FN(over)(FN(vec) a, FN(vec) b) {
#if VECTOR_BYTES == 64 && !IS_DOUBLE
    const FN(vec) about = (FN(vec))_mm512_rcp14_ps((__m512)b), quotient = a * about;
    return quotient + (a - quotient * b) * about;
#else
    return a / b;
#endif
}

/* tanh for programs, with the sign of x, also for 0. */
INLINE FN(vec) FN(hyperbolic)(FN(vec) x) {
    const FN(vec) size = FN(absolute)(x), e = FN(exp_below)(size), y = FN(over)(-e, e + (REAL)2);
    return (FN(vec))((FN(whole))FN(absolute)(y) | ((FN(whole))x & ~(FN(whole))size));
}

INLINE FN(vec) FN(logistic)(FN(vec) x) { return (REAL)1 / ((REAL)1 + FN(exponential)(-x)); }

INLINE FN(vec) FN(signs)(FN(vec) x) {
    return FN(truth)((FN(whole))(x > (REAL)0)) - FN(truth)((FN(whole))(x < (REAL)0)); /* 0 for NaN, as in torch */
}

INLINE FN(vec) FN(rounded)(FN(vec) x) {
#if IS_DOUBLE
    typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
    return __builtin_convertvector(__builtin_convertvector(x, half), FN(vec));
#else
    return x;
#endif
}

/* Return the larger number, or NaN if one of them is NaN. */
INLINE FN(vec) FN(larger)(FN(vec) a, FN(vec) b) { return FN(choose)((FN(whole))(a > b) | (FN(whole))(a != a), a, b); }

INLINE FN(vec) FN(smaller)(FN(vec) a, FN(vec) b) { return FN(choose)((FN(whole))(a < b) | (FN(whole))(a != a), a, b); }

#define LIBM(name)                               \
    INLINE FN(vec) FN(libm_##name)(FN(vec) x) {  \
        FN(vec) y = x;                           \
        EACH_NUMBER(name((double)x[i]));         \
        return y;                                \
    }
LIBM(log1p)
LIBM(expm1)
LIBM(erf)
LIBM(sin)
LIBM(cos)
#undef LIBM
#undef EACH_NUMBER
