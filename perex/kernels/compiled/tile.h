/* What all kernels are made of: vectors, and a product of packed numbers in registers. */

#define ROWS (2 * LANES)
#define RUNS (REGISTERS >= 32 ? 4 : 2)
#define RUN 64 /* rows that are added up one after the other: long sums lose digits */

typedef REAL NAME(vector) __attribute__((vector_size(LANES * sizeof(REAL)), may_alias));
typedef REAL NAME(loose) __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef INTEGER NAME(bits) __attribute__((vector_size(LANES * sizeof(REAL))));
#define VECTOR NAME(vector)
#define BITS NAME(bits)
#define LOOSE NAME(loose)
#define INLINE __attribute__((always_inline, target(TARGET))) static inline
#define FUNCTION __attribute__((target(TARGET)))

/* The first half of each vector and its second, added up: a number of one, and then one of the other. */
INLINE VECTOR NAME(halved)(VECTOR one, VECTOR other)
{
    return __builtin_shufflevector(one, other, LOWER) + __builtin_shufflevector(one, other, UPPER);
}

/* The sum over a vector. */
INLINE REAL NAME(added)(VECTOR all)
{
    for (size several = LANES; several > 1; several /= 2)
        all = NAME(halved)(all, all);
    return all[0];
}

/* G += sum_p g_p x_p^T, of two vectors g_p side by side, and some threes of numbers x_p, each spread over a vector.
 *
 * Places p are in `rows` rows of `columns` columns. In x, a three begins at one of `begins`, with its numbers `apart`, and
 * goes `right` and `down` with the places; G has `next` vectors to a number. `threes` is a constant where this is inlined:
 * all of its G is in registers. (For three numbers that lie evenly apart, one address does.)
 */
INLINE void NAME(multiplied)(size threes, const REAL *g, const REAL *x, const size *begins, size apart, size rows,
                             size columns, size down, size right, VECTOR *G, size next)
{
    VECTOR sum[4][3][2];
#pragma GCC unroll 4
    for (size n = 0; n < threes; n++)
#pragma GCC unroll 3
        for (size j = 0; j < 3; j++)
#pragma GCC unroll 2
            for (size v = 0; v < 2; v++)
                sum[n][j][v] = (VECTOR){}; /* apart from what there is already: long sums lose digits */
    for (size i = 0; i < rows; i++, x += down) {
        const REAL *from[4];
#pragma GCC unroll 4
        for (size n = 0; n < threes; n++)
            from[n] = x + begins[n];
        for (size p = 0; p < columns; p++, g += ROWS) {
            VECTOR one = *(const VECTOR *)g, other = *(const VECTOR *)(g + LANES);
#pragma GCC unroll 4
            for (size n = 0; n < threes; n++) {
#pragma GCC unroll 3
                for (size j = 0; j < 3; j++) {
                    VECTOR pixel = from[n][j * apart] - (VECTOR){}; /* spread: minus nothing, unlike plus, is no operation */
                    sum[n][j][0] += pixel * one;
                    sum[n][j][1] += pixel * other;
                }
                from[n] += right;
            }
        }
    }
#pragma GCC unroll 4
    for (size n = 0; n < threes; n++)
#pragma GCC unroll 3
        for (size j = 0; j < 3; j++)
#pragma GCC unroll 2
            for (size v = 0; v < 2; v++)
                G[(n * 3 + j) * next + v] += sum[n][j][v];
}

FUNCTION static void NAME(multiply)(size threes, const REAL *g, const REAL *x, const size *begins, size apart, size rows,
                                    size columns, size down, size right, VECTOR *G, size next)
{
    switch (threes) {
    case 1: NAME(multiplied)(1, g, x, begins, apart, rows, columns, down, right, G, next); break;
    case 2: NAME(multiplied)(2, g, x, begins, apart, rows, columns, down, right, G, next); break;
#if REGISTERS >= 32
    case 3: NAME(multiplied)(3, g, x, begins, apart, rows, columns, down, right, G, next); break;
    case 4: NAME(multiplied)(4, g, x, begins, apart, rows, columns, down, right, G, next); break;
#endif
    }
}
