/* All kernels, for one type of numbers and one kind of CPU.
 *
 * Given are REAL_BITS, the length of a number, VECTOR_BITS, that of a vector, REGISTERS, how many vectors the CPU has, and
 * TARGET, what its instructions are called. From these: REAL, the type of numbers; INTEGER, one of the same length, and
 * SIGN, its first bit; LANES, how many numbers a vector holds; the order of numbers where those at EVEN or ODD places of two
 * vectors are taken, or where their LOWER or UPPER halves alternate; and NAME, a function's name for all that.
 */

#define JOIN(name, type, bits) name##_##type##_##bits
#define JOINED(name, type, bits) JOIN(name, type, bits)
#define NAME(name) JOINED(name, REAL, VECTOR_BITS)

#if REAL_BITS == 32
#define REAL float
#define INTEGER int32_t
#define SIGN INT32_MIN
#else
#define REAL double
#define INTEGER int64_t
#define SIGN INT64_MIN
#endif

#define LANES (VECTOR_BITS / REAL_BITS)

#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#endif

#include "tile.h"

#include "pack.h"
#include "winograd.h"

#include "direct.h"
#include "gram.h"
#include "outer.h"
#include "pairs.h"
#include "planes.h"
#include "pooling.h"
#include "rows.h"

#undef REAL_BITS
#undef JOIN
#undef JOINED
#undef NAME
#undef REAL
#undef INTEGER
#undef SIGN
#undef LANES
#undef EVEN
#undef ODD
#undef LOWER
#undef UPPER
#undef SPELL
#undef PANEL
#undef DEPTH
#undef STRETCH
#undef ROWS
#undef SIDE
#undef REACH
#undef SPAN
#undef RUN
#undef RUNS
#undef VECTOR
#undef LOOSE
#undef BITS
#undef INLINE
#undef FUNCTION
