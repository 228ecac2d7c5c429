/* Squared norms of G_b = sum_t l_bt r_bt^T, and the sum of all G_b, each tile of G_b in registers once.
 *
 * A tile has PANEL rows, numbers of l that are spread over vectors one by one, and ROWS columns, numbers of r side by side.
 * A thread makes a block of tiles of one G_b after the other, so that what it adds up stays in its cache.
 */

#define PANEL (3 * RUNS)
#define DEPTH 192 /* positions that are packed, and added up in registers, at most */

/* What a thread is at: a block's first row and column, how many it has, and its memory. */
typedef struct {
    size row, rows, column, columns, panels; /* panels: of rows */
    size depth;
    REAL *tile, *packed; /* (depth, ROWS) and (panels, depth, PANEL) */
    VECTOR *G;           /* a tile, or all of the block's: (tiles of columns, panels, PANEL, 2) */
} NAME(Block);

FUNCTION static NAME(Block) NAME(block)(const Outer *s, size task, REAL *own)
{
    NAME(Block) b;
    size panels = (s->rows + PANEL - 1) / PANEL, tiles = (s->columns + ROWS - 1) / ROWS;
    size i = task / s->across, j = task % s->across;
    b.row = i * panels / s->down * PANEL;
    b.column = j * tiles / s->across * ROWS;
    b.panels = (i + 1) * panels / s->down - i * panels / s->down;
    b.rows = s->rows - b.row < b.panels * PANEL ? s->rows - b.row : b.panels * PANEL;
    b.columns = ((j + 1) * tiles / s->across - j * tiles / s->across) * ROWS;
    b.columns = s->columns - b.column < b.columns ? s->columns - b.column : b.columns;
    b.depth = s->positions < DEPTH ? s->positions : DEPTH;
    b.tile = own;
    b.packed = own + b.depth * ROWS;
    return b;
}

/* Numbers to a thread: for what is packed, and for G. */
FUNCTION static void NAME(outer_parts)(const Outer *s, size *packed, size *G)
{
    size depth = s->positions < DEPTH ? s->positions : DEPTH, panels = (s->rows + PANEL - 1) / PANEL;
    size high = (panels + s->down - 1) / s->down, wide = ((s->columns + ROWS - 1) / ROWS + s->across - 1) / s->across;
    *packed = (depth * (ROWS + high * PANEL) + LANES - 1) / LANES * LANES;
    *G = (s->positions > DEPTH ? high * wide : 1) * PANEL * ROWS;
}

FUNCTION size NAME(outer_room)(const Outer *s)
{
    size packed, G;
    NAME(outer_parts)(s, &packed, &G);
    return s->threads * (packed + G) + LANES;
}

/* (panels, depth, PANEL) of some rows; zeros where there are fewer. */
FUNCTION static void NAME(pack_rows)(const REAL *from, size next, size depth, size rows, REAL *to)
{
    for (size row = 0; row < rows; row += PANEL, from += PANEL) {
        size several = rows - row < PANEL ? rows - row : PANEL;
        for (size t = 0; t < depth; t++, to += PANEL)
            if (several == PANEL)
                memcpy(to, from + t * next, PANEL * sizeof(REAL));
            else
                for (size i = 0; i < PANEL; i++)
                    to[i] = i < several ? from[t * next + i] : 0;
    }
}

/* (depth, ROWS) of some columns; zeros where there are fewer. */
FUNCTION static void NAME(pack_columns)(const REAL *from, size next, size depth, size columns, REAL *to)
{
    for (size t = 0; t < depth; t++, from += next, to += ROWS)
        if (columns >= ROWS)
            memcpy(to, from, ROWS * sizeof(REAL));
        else
            for (size i = 0; i < ROWS; i++)
                to[i] = i < columns ? from[i] : 0;
}

/* Adds a tile to a sum that is laid out as the weight is, or puts it there if it is the first. */
FUNCTION static void NAME(add_tile)(const VECTOR *G, size rows, size columns, int first, REAL *total, size next)
{
    for (size i = 0; i < rows; i++, G += 2, total += next)
        if (columns >= ROWS)
            for (size v = 0; v < 2; v++) {
                VECTOR sum = G[v];
                if (!first)
                    sum += *(const LOOSE *)(total + v * LANES);
                *(LOOSE *)(total + v * LANES) = sum;
            }
        else
            for (size j = 0; j < columns; j++)
                total[j] = first ? ((const REAL *)G)[j] : total[j] + ((const REAL *)G)[j];
}

/* ||G_b||^2 of a block; what is added to a sum is what there is in registers anyway. */
FUNCTION static double NAME(one_example)(const Outer *s, const NAME(Block) *b, const REAL *left, const REAL *right,
                                         int first, REAL *total)
{
    static const size begins[4] = {0, 3, 6, 9};
    double square = 0;
    for (size t = 0; t < s->positions; t += b->depth) {
        size many = s->positions - t < b->depth ? s->positions - t : b->depth;
        NAME(pack_rows)(left + t * s->left[1] + b->row, s->left[1], many, b->rows, b->packed);
        for (size n = 0; n < b->columns; n += ROWS) {
            const REAL *from = right + t * s->right[1] + b->column + n;
            size columns = b->columns - n;
            VECTOR sum[2] = {(VECTOR){}, (VECTOR){}};
            NAME(pack_columns)(from, s->right[1], many, columns, b->tile);
            for (size k = 0; k < b->panels; k++) {
                VECTOR *G = b->G + (s->positions > DEPTH ? (n / ROWS * b->panels + k) * 2 * PANEL : 0);
                size rows = b->rows - k * PANEL < PANEL ? b->rows - k * PANEL : PANEL;
                NAME(multiply)(RUNS, b->tile, b->packed + k * many * PANEL, begins, 1, 1, many, 0, PANEL, G, 2);
                if (t + many < s->positions)
                    continue;
                for (size i = 0; i < rows; i++) {
                    sum[0] += G[2 * i] * G[2 * i];
                    sum[1] += G[2 * i + 1] * G[2 * i + 1];
                }
                if (total)
                    NAME(add_tile)(G, rows, columns, first, total + (b->row + k * PANEL) * s->columns + b->column + n,
                                   s->columns);
                for (size i = 0; i < 2 * PANEL; i++)
                    G[i] = (VECTOR){};
            }
            for (size j = 0; j < ROWS && j < columns; j++)
                square += sum[j / LANES][j % LANES];
        }
    }
    return square;
}

/* squares: (batch, down * across). total: the sum of all G_b, (rows, columns), or NULL. room: as many as outer_room. */
FUNCTION void NAME(outer)(const Outer *s, const REAL *left, const REAL *right, REAL *squares, REAL *total, REAL *room)
{
    size packed, of_G, tasks = s->down * s->across;
    NAME(outer_parts)(s, &packed, &of_G);
    room = (REAL *)(((uintptr_t)room + sizeof(VECTOR) - 1) / sizeof(VECTOR) * sizeof(VECTOR));
#pragma omp parallel num_threads((int)s->threads)
    {
        REAL *own = room + THREAD * (packed + of_G);
#pragma omp for schedule(static)
        for (size task = 0; task < tasks; task++) {
            NAME(Block) block = NAME(block)(s, task, own);
            block.G = (VECTOR *)(own + packed);
            memset(block.G, 0, of_G * sizeof(REAL));
            for (size b = 0; b < s->batch; b++)
                squares[b * tasks + task] = (REAL)NAME(one_example)(s, &block, left + b * s->left[0],
                                                                    right + b * s->right[0], b == 0, total);
        }
    }
}
