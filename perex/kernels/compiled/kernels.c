/* The kernels, for each type of numbers and each kind of CPU. They are called by address: Python sees an empty module. */

#if __has_include(<Python.h>)
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

#define VECTOR_BITS 512
#define REGISTERS 32
#define TARGET "avx512f,fma"
#define REAL_BITS 32
#include "template.h"
#define REAL_BITS 64
#include "template.h"
#undef VECTOR_BITS
#undef REGISTERS
#undef TARGET

#define VECTOR_BITS 256
#define REGISTERS 16
#define TARGET "avx2,fma"
#define REAL_BITS 32
#include "template.h"
#define REAL_BITS 64
#include "template.h"

#endif

/* What this file expects of whoever calls it, to be told from a build of another version. */
int perex_version(void)
{
    return 3;
}

/* How many bits the widest vectors have that this CPU and these kernels know; 0: none. */
int perex_bits(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return 512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 256;
#endif
    return 0;
}
