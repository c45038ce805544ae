/* Vectors of REAL: loads and stores of whole vectors and of the beginning of a vector. Included by level.inc.h for each REAL. */

typedef REAL FN(vec) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

#if IS_DOUBLE
typedef int64_t FN(whole) __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int32_t FN(whole) __attribute__((vector_size(VECTOR_BYTES)));
#endif

INLINE FN(vec) FN(all)(REAL x) {
#if defined(__x86_64__) && IS_DOUBLE
    return (FN(vec))X86(set1_pd)(x);
#elif defined(__x86_64__)
    return (FN(vec))X86(set1_ps)(x);
#else
    FN(vec) every = {0};
    return every + x;
#endif
}

/* Load the first n numbers at an address, n at most a vector; the other elements are `fill`. */
INLINE FN(vec) FN(load_or)(const REAL *from, long n, REAL fill) {
    if (n >= VL) return *(const FN(vec) *)from;
    FN(vec) part = FN(all)(fill);
#if VECTOR_BYTES == 64 && IS_DOUBLE
    part = (FN(vec))_mm512_mask_loadu_pd((__m512d)part, (__mmask8)((1u << n) - 1u), from);
#elif VECTOR_BYTES == 64
    part = (FN(vec))_mm512_mask_loadu_ps((__m512)part, (__mmask16)((1u << n) - 1u), from);
#else
    memcpy(&part, from, (size_t)n * sizeof(REAL));
#endif
    return part;
}

INLINE FN(vec) FN(load)(const REAL *from, long n) { return FN(load_or)(from, n, 0); }

INLINE void FN(store)(REAL *to, FN(vec) value, long n) {
    if (n >= VL) *(FN(vec) *)to = value;
#if VECTOR_BYTES == 64 && IS_DOUBLE
    else _mm512_mask_storeu_pd(to, (__mmask8)((1u << n) - 1u), (__m512d)value);
#elif VECTOR_BYTES == 64
    else _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1u), (__m512)value);
#else
    else memcpy(to, &value, (size_t)n * sizeof(REAL));
#endif
}
