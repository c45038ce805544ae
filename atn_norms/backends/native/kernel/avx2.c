/* The kernels for x86-64 with AVX2 and FMA. */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define X86(name) _mm256_##name
#define X86_FLOATS (__m256)
#define X86_DOUBLES (__m256d)
#define LEVEL avx2
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#include "level.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int atn_norms_avx2_is_not_for_this_processor;
#endif
