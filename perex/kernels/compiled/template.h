/* All kernels, for one type of numbers and one kind of CPU. */

#include "tile.h"

#include "pack.h"

#include "winograd.h"

#include "direct.h"
#include "gram.h"
#include "pooling.h"


#undef SPELL
#undef ROWS
#undef RUNS
#undef VECTOR
#undef LOOSE
#undef BITS
#undef INLINE
#undef FUNCTION
