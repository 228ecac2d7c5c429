/* Squared norms of G_b = sum_p g_bp u_bp^T from inner products of pixels: sum_pq (g_p . g_q) sum_k x_ps+k . x_qs+k.
 *
 * Both Gram matrices are symmetric, so that only rows of pixels are multiplied with themselves and with those before. In
 * each row of a matrix, pixels of one row of the image are side by side, every s-th next to each other: what the places q
 * of a row meet under one entry k of the kernel is then a run of numbers.
 */

/* Which pixels of packed images are more than padding, and where a Gram matrix has them. */
typedef struct {
    size images, channels, image;     /* how many; the numbers of an image */
    size top, rows, left, columns;    /* of an image, without padding */
    size threes, pitch, phase, next;  /* of a row; numbers to a row of the image, a phase, a row of the matrix */
} NAME(Grid);

FUNCTION static size NAME(least)(size a, size b)
{
    return a < b ? a : b;
}

FUNCTION static NAME(Grid) NAME(grid)(const Shape *s, const NAME(Layout) *l)
{
    NAME(Grid) g;
    g.images = s->images;
    g.channels = s->channels;
    g.image = s->channels * l->height * l->width;
    g.top = NAME(least)((s->padding_y + l->gather_y - 1) / l->gather_y, l->height);
    g.left = NAME(least)((s->padding_x + l->gather_x - 1) / l->gather_x, l->width);
    g.rows = NAME(least)((s->height + s->padding_y - 1) / l->gather_y + 1, l->height) - g.top;
    g.columns = NAME(least)((s->width + s->padding_x - 1) / l->gather_x + 1, l->width) - g.left;
    g.threes = (g.columns + 2) / 3;
    g.phase = (l->width + l->step_x - 1) / l->step_x;
    g.pitch = g.phase * l->step_x;
    g.next = (s->images * g.rows * g.pitch + ROWS - 1) / ROWS * ROWS + ROWS;
    return g;
}

/* The shape of output gradients if they are taken for images: every place is a pixel. */
FUNCTION static Shape NAME(places)(const Shape *s)
{
    Shape n = *s;
    n.channels = s->rows;
    n.height = s->places_y;
    n.width = s->places_x;
    n.kernel_y = n.kernel_x = n.step_y = n.step_x = n.spread_y = n.spread_x = 1;
    n.padding_y = n.padding_x = 0;
    for (int i = 0; i < 5; i++)
        n.wide[i] = s->narrow[i];
    return n;
}

/* Some lanes' pixels, channel by channel: (channels, ROWS); zeros where there is none. */
FUNCTION static void NAME(pack_lanes)(const NAME(Grid) *g, const NAME(Layout) *l, const REAL *images, size first,
                                      REAL *tile)
{
    size of_image = g->rows * g->pitch, count = NAME(least)(ROWS, g->images * of_image - first), from[ROWS];
    if (l->pixel == 1 && l->step_x == 1 && first / of_image == (first + count - 1) / of_image) { /* one after the other */
        images += first / of_image * g->image + g->top * l->row + first % of_image;
        for (size c = 0; c < g->channels; c++, tile += ROWS, images += l->channel) {
            NAME(copy)(tile, images, count);
            for (size lane = count; lane < ROWS; lane++)
                tile[lane] = 0;
        }
        return;
    }
    for (size lane = 0; lane < ROWS; lane++) {
        size at = first + lane, row = at / g->pitch, x = at % g->pitch % g->phase * l->step_x + at % g->pitch / g->phase;
        size y = g->top + row % g->rows;
        from[lane] = lane < count && x < l->width ? row / g->rows * g->image + y * l->row + x * l->pixel : -1;
    }
    for (size c = 0; c < g->channels; c++, tile += ROWS, images += l->channel)
        for (size lane = 0; lane < ROWS; lane++)
            tile[lane] = from[lane] < 0 ? 0 : images[from[lane]];
}

/* Inner products of all pixels with those of their row and of rows before: (rows of pixels, 3 threes, next). */
FUNCTION static void NAME(products)(const NAME(Grid) *g, const NAME(Layout) *l, const REAL *images, REAL *tiles, REAL *gram)
{
    size rows = g->images * g->rows, next = g->next / LANES, pieces = (g->threes + RUNS - 1) / RUNS, begins[RUNS];
    size tile = g->channels * ROWS;
    for (size n = 0; n * ROWS < rows * g->pitch; n++)
        NAME(pack_lanes)(g, l, images, n * ROWS, tiles + n * tile);
    for (size row = 0; row < rows; row++) {
        const REAL *from = images + row / g->rows * g->image + (g->top + row % g->rows) * l->row + g->left * l->pixel;
        VECTOR *to = (VECTOR *)(gram + row * g->threes * 3 * g->next);
        memset(to, 0, g->threes * 3 * g->next * sizeof(REAL));
        for (size i = 0; i * ROWS < (row + 1) * g->pitch; i++)
            for (size piece = 1, n = 0; piece <= pieces; piece++) {
                size start = n;
                for (; n < piece * g->threes / pieces; n++)
                    begins[n - start] = n * 3 * l->pixel;
                NAME(multiply)(n - start, tiles + i * tile, from, begins, l->pixel, 1, g->channels, 0, l->channel,
                               to + start * 3 * next + 2 * i, next);
            }
    }
}

/* The sum over pairs of places, and that of absolute values, of (g_p . g_q) sum_k x_ps+k . x_qs+k. */
FUNCTION static void NAME(sum_pairs)(const Shape *s, const NAME(Layout) *l, const NAME(Grid) *wide, const REAL *pixels,
                                     const NAME(Grid) *narrow, const REAL *places, double *total, double *absolute)
{
    size w = s->places_x, a_row = 3 * wide->threes * wide->next;
    BITS last = (BITS){}, sign = (BITS){} + SIGN; /* which lanes of a row's last vector are places */
    for (size lane = 0; lane < LANES; lane++)
        last[lane] = lane < (w - 1) % LANES + 1 ? -1 : 0;
    for (size p = 0; p < s->images * s->places_y; p++)
        for (size x = 0; x < w; x++) {
            size met[LONGEST], several = 0; /* by entries of a row of the kernel: where x meets a pixel, and q the same */
            for (size j = 0; j < s->kernel_x; j++) {
                size shift = j * s->spread_x, column = x * l->step_x + shift - wide->left;
                if (column >= 0 && column < wide->columns)
                    met[several++] = column * wide->next + shift % l->step_x * wide->phase + shift / l->step_x;
            }
            size image = p / s->places_y * wide->rows, y = p % s->places_y * l->step_y - wide->top;
            const REAL *of_place = places + (p * 3 * narrow->threes + x) * narrow->next;
            VECTOR sum = (VECTOR){}, sum_of_sizes = (VECTOR){};
            for (size q = 0; q <= p; q++) {
                size image_q = q / s->places_y * wide->rows, y_q = q % s->places_y * l->step_y - wide->top;
                REAL times = q < p ? 2 : 1;
                for (size v = 0; v < w; v += LANES) {
                    VECTOR alike = (VECTOR){};
                    for (size down = 0; down < s->kernel_y * s->spread_y; down += s->spread_y) {
                        if (y + down < 0 || y + down >= wide->rows || y_q + down < 0 || y_q + down >= wide->rows)
                            continue;
                        const REAL *row = pixels + (image + y + down) * a_row + (image_q + y_q + down) * wide->pitch + v;
                        for (size n = 0; n < several; n++)
                            alike += *(const LOOSE *)(row + met[n]);
                    }
                    VECTOR product = times * alike * *(const LOOSE *)(of_place + q * w + v);
                    if (v + LANES >= w)
                        product = (VECTOR)((BITS)product & last);
                    sum += product;
                    sum_of_sizes += (VECTOR)((BITS)product & ~sign);
                }
            }
            *total += NAME(added)(sum);
            *absolute += NAME(added)(sum_of_sizes);
        }
}

/* Numbers a thread needs: for packed images, packed output gradients, some lanes, and both matrices. */
FUNCTION static void NAME(gram_parts)(const Shape *s, size parts[5])
{
    Shape n = NAME(places)(s);
    NAME(Layout) of_wide = NAME(layout)(s), of_narrow = NAME(layout)(&n);
    NAME(Grid) wide = NAME(grid)(s, &of_wide), narrow = NAME(grid)(&n, &of_narrow);
    parts[0] = s->images * wide.image + 2 * of_wide.pixel; /* a three may be longer than what is left of a row */
    parts[1] = s->images * narrow.image + 2 * of_narrow.pixel;
    size tiles = s->channels * wide.next, others = s->rows * narrow.next;
    parts[2] = tiles > others ? tiles : others;
    parts[3] = s->images * wide.rows * 3 * wide.threes * wide.next;
    parts[4] = s->images * narrow.rows * 3 * narrow.threes * narrow.next;
    for (int i = 0; i < 5; i++)
        parts[i] = (parts[i] + LANES - 1) / LANES * LANES;
}

FUNCTION size NAME(gram_room)(const Shape *s)
{
    size parts[5];
    NAME(gram_parts)(s, parts);
    return s->threads * (parts[0] + parts[1] + parts[2] + parts[3] + parts[4]) + LANES;
}

/* squares and sizes: (batch, groups), and sums of the absolute values of what they are sums of. band: all places. */
FUNCTION void NAME(gram)(const Shape *s, const REAL *wide, const REAL *narrow, REAL *squares, REAL *sizes, REAL *room)
{
    Shape n = NAME(places)(s);
    NAME(Layout) of_wide = NAME(layout)(s), of_narrow = NAME(layout)(&n);
    NAME(Grid) pixels = NAME(grid)(s, &of_wide), places = NAME(grid)(&n, &of_narrow);
    size parts[5];
    NAME(gram_parts)(s, parts);
    room = (REAL *)(((uintptr_t)room + sizeof(VECTOR) - 1) / sizeof(VECTOR) * sizeof(VECTOR));
#pragma omp parallel num_threads((int)s->threads)
    {
        REAL *images = room + THREAD * (parts[0] + parts[1] + parts[2] + parts[3] + parts[4]);
        REAL *gradients = images + parts[0], *tiles = gradients + parts[1], *alike = tiles + parts[2];
        REAL *of_places = alike + parts[3];
        memset(images, 0, (parts[0] + parts[1]) * sizeof(REAL));
#pragma omp for schedule(static)
        for (size task = 0; task < s->batch * s->groups; task++) {
            size b = task / s->groups, group = task % s->groups;
            for (size r = 0; r < s->images; r++) {
                NAME(pack_wide)(s, &of_wide, wide + b * s->wide[0] + r * s->wide[1] + group * s->channels * s->wide[2],
                                0, images + r * pixels.image);
                NAME(pack_wide)(&n, &of_narrow,
                                narrow + b * s->narrow[0] + r * s->narrow[1] + group * s->rows * s->narrow[2], 0,
                                gradients + r * places.image);
            }
            double total = 0, absolute = 0;
            if (pixels.rows > 0 && pixels.columns > 0) {
                NAME(products)(&pixels, &of_wide, images, tiles, alike);
                NAME(products)(&places, &of_narrow, gradients, tiles, of_places);
                NAME(sum_pairs)(s, &of_wide, &pixels, alike, &places, of_places, &total, &absolute);
            }
            squares[task] = (REAL)total;
            sizes[task] = (REAL)absolute;
        }
    }
}
