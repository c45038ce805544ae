/* The kernels for x86-64 with AVX-512. */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif
#define X86(name) _mm512_##name
#define X86_FLOATS (__m512)
#define X86_DOUBLES (__m512d)
#define LEVEL avx512
#define VECTOR_BYTES 64
#define TILE_ROWS 14
#include "level.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int atn_norms_avx512_is_not_for_this_processor;
#endif
