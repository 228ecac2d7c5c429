/* The kernels, for each type of numbers and each kind of CPU. They are called by address: Python sees an empty module. */

#if __has_include(<Python.h>)
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
static struct PyModuleDef empty = {PyModuleDef_HEAD_INIT, "_kernels", "Kernels in C.", 0, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&empty);
}
#endif

#include <math.h>
#include <string.h>

#include "shape.h"

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define LONGEST 32 /* entries of a row of a convolution's kernel, at most */

#if defined(__x86_64__)

#define REGISTERS 32
#define TARGET "avx512f,fma"
#define REAL float
#define INTEGER int32_t
#define SIGN INT32_MIN
#define LANES 16
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define NAME(name) name##_float_512
#include "template.h"
#undef REAL
#undef INTEGER
#undef SIGN
#undef LANES
#undef EVEN
#undef ODD
#undef LOWER
#undef UPPER
#undef NAME
#define REAL double
#define INTEGER int64_t
#define SIGN INT64_MIN
#define LANES 8
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#define NAME(name) name##_double_512
#include "template.h"
#undef REAL
#undef INTEGER
#undef SIGN
#undef LANES
#undef EVEN
#undef ODD
#undef LOWER
#undef UPPER
#undef NAME
#undef REGISTERS
#undef TARGET

#define REGISTERS 16
#define TARGET "avx2,fma"
#define REAL float
#define INTEGER int32_t
#define SIGN INT32_MIN
#define LANES 8
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#define NAME(name) name##_float_256
#include "template.h"
#undef REAL
#undef INTEGER
#undef SIGN
#undef LANES
#undef EVEN
#undef ODD
#undef LOWER
#undef UPPER
#undef NAME
#define REAL double
#define INTEGER int64_t
#define SIGN INT64_MIN
#define LANES 4
#define ODD 1, 3, 5, 7
#define EVEN 0, 2, 4, 6
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#define NAME(name) name##_double_256
#include "template.h"
#undef REAL
#undef INTEGER
#undef SIGN
#undef LANES
#undef EVEN
#undef ODD
#undef LOWER
#undef UPPER
#undef NAME

/* What this file expects of whoever calls it, to be told from a build of another version. */
int perex_version(void)
{
    return 1;
}

/* How many bits the widest vectors have that this CPU and these kernels know; 0: none. */
int perex_bits(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return 512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 256 : 0;
}

#else

int perex_bits(void)
{
    return 0;
}

int perex_version(void)
{
    return 1;
}

#endif
