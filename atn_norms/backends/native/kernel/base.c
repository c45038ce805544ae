/* The kernels for every processor the compiler is told of. */

#define LEVEL base
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#include "level.inc.h"
