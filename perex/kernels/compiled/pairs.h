/* Squared norms of G_b = sum_t l_bt r_bt^T from inner products of positions: sum_ts (l_t . l_s) (r_t . r_s).
 *
 * The matrices of inner products are symmetric: positions t, ROWS of them, meet those up to the last of them. Of an
 * example's rows, some numbers at a time are copied to where they lie one after the other, with zeros behind them that
 * make whole tiles. Each sum over numbers is spread over the lanes of a vector until its end.
 */

#define SIDE 4               /* positions t of a tile */
#define REACH (3 * RUNS / 2) /* positions s of a tile */
#define SPAN 256             /* numbers of a row that are copied, and added up in registers, at most */

/* What a thread works on, and how many numbers that takes. */
typedef struct {
    size positions, blocks, padded; /* how many, of t, and with zeros behind them */
    size span;                      /* numbers from one copied row to the next */
    size of_rows, of_gram, of_all;
} NAME(Pairs);

FUNCTION static NAME(Pairs) NAME(pairs_of)(const Outer *s)
{
    NAME(Pairs) p;
    size longest = s->rows > s->columns ? s->rows : s->columns;
    p.positions = s->positions;
    p.blocks = (s->positions + ROWS - 1) / ROWS;
    p.padded = p.blocks * ROWS + REACH;
    p.span = longest < SPAN ? (longest + LANES - 1) / LANES * LANES : SPAN;
    p.of_rows = p.padded * p.span;
    p.of_gram = p.blocks * p.padded * ROWS;
    p.of_all = p.of_rows + 2 * p.of_gram;
    return p;
}

FUNCTION size NAME(pairs_room)(const Outer *s)
{
    return s->threads * NAME(pairs_of)(s).of_all + LANES;
}

/* Numbers of an example's inner products. */
FUNCTION size NAME(pairs_of_one)(const Outer *s)
{
    return NAME(pairs_of)(s).of_gram;
}

/* gram += (t . s), of SIDE rows t, side by side, and REACH rows s, of `numbers` numbers each, `next` apart. */
INLINE void NAME(dots)(const REAL *t, const REAL *s, size next, size numbers, REAL *gram)
{
    VECTOR sum[REACH][SIDE];
#pragma GCC unroll 6
    for (size j = 0; j < REACH; j++)
#pragma GCC unroll 4
        for (size i = 0; i < SIDE; i++)
            sum[j][i] = (VECTOR){};
    for (size k = 0; k < numbers; k += LANES, t += LANES, s += LANES) {
        VECTOR other[REACH];
#pragma GCC unroll 6
        for (size j = 0; j < REACH; j++)
            other[j] = *(const VECTOR *)(s + j * next);
#pragma GCC unroll 4
        for (size i = 0; i < SIDE; i++) {
            VECTOR own = *(const VECTOR *)(t + i * next);
#pragma GCC unroll 6
            for (size j = 0; j < REACH; j++)
                sum[j][i] += own * other[j];
        }
    }
#pragma GCC unroll 6
    for (size j = 0; j < REACH; j++, gram += ROWS) {
        VECTOR even = NAME(halved)(sum[j][0], sum[j][2]), odd = NAME(halved)(sum[j][1], sum[j][3]);
        VECTOR all = NAME(halved)(even, odd); /* of t, t + 1, t + 2, t + 3, and again */
#pragma GCC unroll 4
        for (size i = 0; i < SIDE; i++)
#pragma GCC unroll 4
            for (size lane = i; lane < LANES; lane += SIDE)
                gram[i] += all[lane];
    }
}

/* Inner products of an example's rows: (blocks of t, s, ROWS), of every down-th block, and s up to the last of its t. */
FUNCTION static void NAME(inner_products)(const NAME(Pairs) *p, const REAL *x, size next, size numbers, size first, size down,
                                          REAL *rows, REAL *gram)
{
    for (size block = first; block < p->blocks; block += down)
        memset(gram + block * p->padded * ROWS, 0, p->padded * ROWS * sizeof(REAL));
    for (size start = 0; start < numbers; start += SPAN) {
        size many = numbers - start < SPAN ? numbers - start : SPAN, whole = (many + LANES - 1) / LANES * LANES;
        for (size t = 0; t < p->positions; t++) {
            memcpy(rows + t * p->span, x + t * next + start, many * sizeof(REAL));
            for (size k = many; k < whole; k++)
                rows[t * p->span + k] = 0;
        }
        for (size block = first; block < p->blocks; block += down)
            for (size s = 0; s < p->positions && s < (block + 1) * ROWS; s += REACH)
                for (size t = block * ROWS; t < p->positions && t < (block + 1) * ROWS; t += SIDE)
                    if (t + SIDE > s)
                        NAME(dots)(rows + t * p->span, rows + s * p->span, p->span, whole,
                                   gram + (block * p->padded + s) * ROWS + t % ROWS);
    }
}

/* Of a block of t: the sum over pairs s <= t of products of two matrices' numbers, and that of absolute values. */
FUNCTION static void NAME(sum_products)(const NAME(Pairs) *p, size block, const REAL *one, const REAL *other, double *total,
                                        double *absolute)
{
    BITS sign = (BITS){} + SIGN, lanes = (BITS){};
    for (size lane = 0; lane < LANES; lane++)
        lanes[lane] = (INTEGER)lane;
    one += block * p->padded * ROWS;
    other += block * p->padded * ROWS;
    VECTOR sum = (VECTOR){}, sum_of_sizes = (VECTOR){};
    for (size s = 0; s < p->positions && s < (block + 1) * ROWS; s++) {
        for (size v = 0; v < 2; v++, one += LANES, other += LANES) {
            BITS product = (BITS)(*(const LOOSE *)one * *(const LOOSE *)other);
            BITS after = lanes + (INTEGER)(block * ROWS + v * LANES - s); /* how far t is from s */
            BITS twice = product & (after > 0), once = product & (after == 0);
            sum += 2 * (VECTOR)twice + (VECTOR)once;
            sum_of_sizes += 2 * (VECTOR)(twice & ~sign) + (VECTOR)(once & ~sign);
        }
        if (s % RUN == RUN - 1 || s + 1 == p->positions || s + 1 == (block + 1) * ROWS) {
            *total += NAME(added)(sum);
            *absolute += NAME(added)(sum_of_sizes);
            sum = sum_of_sizes = (VECTOR){};
        }
    }
}

/* squares and sizes: (batch, down), of every down-th block of t, and sums of absolute values of what they are sums of.
 *
 * known: the inner products of right, which then is not read; or NULL. made: where those of left go, all that is wanted
 * then; or NULL. Both (batch, pairs_of_one).
 */
FUNCTION void NAME(pairs)(const Outer *s, const REAL *left, const REAL *right, const REAL *known, REAL *made, REAL *squares,
                          REAL *sizes, REAL *room)
{
    NAME(Pairs) p = NAME(pairs_of)(s);
    room = (REAL *)(((uintptr_t)room + sizeof(VECTOR) - 1) / sizeof(VECTOR) * sizeof(VECTOR));
#pragma omp parallel num_threads((int)s->threads)
    {
        REAL *rows = room + THREAD * p.of_all, *of_left = rows + p.of_rows, *of_right = of_left + p.of_gram;
        memset(rows, 0, p.of_rows * sizeof(REAL)); /* behind the last row nothing is copied to */
#pragma omp for schedule(static)
        for (size task = 0; task < s->batch * s->down; task++) {
            size b = task / s->down, first = task % s->down;
            REAL *one = made ? made + b * p.of_gram : of_left;
            const REAL *other = known ? known + b * p.of_gram : of_right;
            double total = 0, absolute = 0;
            NAME(inner_products)(&p, left + b * s->left[0], s->left[1], s->rows, first, s->down, rows, one);
            if (made)
                continue;
            if (!known)
                NAME(inner_products)(&p, right + b * s->right[0], s->right[1], s->columns, first, s->down, rows, of_right);
            for (size block = first; block < p.blocks; block += s->down)
                NAME(sum_products)(&p, block, one, other, &total, &absolute);
            squares[task] = (REAL)total;
            sizes[task] = (REAL)absolute;
        }
    }
}
