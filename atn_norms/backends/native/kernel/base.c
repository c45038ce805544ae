/* The kernels for the baseline processor of the compiler. */

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define X86(name) _mm_##name
#define X86_FLOATS (__m128)
#define X86_DOUBLES (__m128d)
#define LEVEL base
#define VECTOR_BYTES 16
#define TILE_ROWS 6
#include "level.inc.h"
