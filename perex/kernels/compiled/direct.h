/* Squared norms of G_b = sum_p g_bp u_bp^T, with each G_b multiplied out.
 *
 * A tile of G_b has ROWS rows, channels of g, and as many columns as the weight; a few columns at a time are in registers.
 */

#define SPELL 4096 /* places of a row that are added up at a time, at most */

/* Adds what a band brings to one tile of G. */
FUNCTION static void NAME(multiply_all)(const Shape *s, const NAME(Layout) *l, const REAL *g, const REAL *x, size rows,
                                        VECTOR *G)
{
    size pieces = (l->threes + RUNS - 1) / RUNS, begins[RUNS], n = 0, w = s->places_x;
    size down = l->step_y * l->row, right = l->step_x * l->pixel;
    for (size piece = 1; piece <= pieces; piece++) {
        size from = n;
        for (; n < piece * l->threes / pieces; n++)
            begins[n - from] = NAME(begins)(s, l, n);
        if (w <= SPELL)
            NAME(multiply)(n - from, g, x, begins, l->apart, rows, w, down, right, G + from * 6, 2);
        else
            for (size y = 0; y < rows; y++)
                for (size p = 0; p < w; p += SPELL)
                    NAME(multiply)(n - from, g + (y * w + p) * ROWS, x + y * down + p * right, begins, l->apart, 1,
                                   w - p < SPELL ? w - p : SPELL, down, right, G + from * 6, 2);
    }
}

/* The sum of squares of one tile's columns; in double every few columns, so that large weights lose no digits. */
FUNCTION static double NAME(squared)(const Shape *s, const NAME(Layout) *l, const VECTOR *G)
{
    double total = 0;
    for (size three = 0; three < l->threes;) {
        VECTOR sum = (VECTOR){};
        for (size stop = three + 8 < l->threes ? three + 8 : l->threes; three < stop; three++)
            for (size j = 0; j < 3 && NAME(column)(s, three, j) >= 0; j++)
                for (size v = 0; v < 2; v++)
                    sum += G[(three * 3 + j) * 2 + v] * G[(three * 3 + j) * 2 + v];
        total += NAME(added)(sum);
    }
    return total;
}

/* How G is multiplied out: plane by plane, each plane as if it were an image, from which some columns are made. */
typedef struct {
    Shape shape;                      /* of a plane */
    NAME(Layout) image, plane;        /* of what is packed, and of a plane */
    size planes, columns;             /* one of each, or four and three */
    size tiles, vectors;              /* to a group's rows; to a tile of one plane's product */
    size pixels, factors, places, terms, gradient; /* numbers of the parts of a thread's memory */
} NAME(Way);

FUNCTION static NAME(Way) NAME(way)(const Shape *s)
{
    NAME(Way) w;
    w.shape = *s;
    w.image = w.plane = NAME(layout)(s);
    w.planes = w.columns = 1;
    w.tiles = (s->rows + ROWS - 1) / ROWS;
    if (s->kernel_x == 3 && s->step_x == 1 && s->spread_x == 1 && s->places_x > 3) {
        w.planes = 4;
        w.columns = 3;
        if (s->places_x % 2) { /* a last place is alone, with a pixel beyond the row that is nobody's: nothing, not the next row's */
            w.image.width++;
            w.image.row = w.image.width * w.image.pixel;
            w.image.channel = w.image.channel > 1 ? w.image.height * w.image.width : 1;
        }
        w.shape.kernel_x = 1;
        w.shape.places_x = (s->places_x + 1) / 2;
        w.plane.width = (w.shape.places_x + LANES - 1) / LANES * LANES;
        w.plane.pixel = 1;
        w.plane.row = w.plane.width;
        w.plane.channel = w.plane.apart = w.plane.height * w.plane.width;
        w.plane.threes = s->kernel_y * ((s->channels + 2) / 3);
    }
    w.vectors = w.plane.threes * 6;
    size more = 2 * w.image.apart + 4 * ROWS * w.image.pixel; /* read by whole threes and vectors, and left out of sums */
    w.pixels = (s->channels * w.image.height * w.image.width + more + LANES - 1) / LANES * LANES;
    w.factors = w.planes > 1 ? w.planes * s->channels * w.plane.channel + 2 * w.plane.apart : 0;
    w.places = s->band * s->places_x * ROWS;
    w.terms = w.planes > 1 ? w.planes * s->band * w.shape.places_x * ROWS : 0;
    w.gradient = (s->groups * w.tiles + s->parts - 1) / s->parts * w.planes * w.vectors * LANES;
    return w;
}

FUNCTION static size NAME(own)(const NAME(Way) *w)
{
    return w->pixels + w->factors + w->places + w->terms + w->gradient;
}

FUNCTION size NAME(direct_room)(const Shape *s, size with_sum)
{
    NAME(Way) w = NAME(way)(s);
    return s->threads * (NAME(own)(&w) + (with_sum ? s->groups * w.tiles * w.columns * w.vectors * LANES : 0)) + LANES;
}

/* G of one example, some tiles of it, into `G`: (tiles, planes, vectors), the first planes being columns. */
FUNCTION static void NAME(gradient)(const Shape *s, const NAME(Way) *w, const REAL *wide, const REAL *narrow, size from,
                                    size to, REAL *pixels, VECTOR *G)
{
    REAL *factors = pixels + w->pixels, *places = factors + w->factors, *terms = places + w->places;
    size plane = s->channels * w->plane.channel, a_tile = w->planes * w->vectors;
    memset(G, 0, (to - from) * a_tile * sizeof(VECTOR));
    for (size group = from / w->tiles; group * w->tiles < to; group++)
        for (size r = 0; r < s->images; r++)
            for (size y = 0; y < s->places_y; y += s->band) {
                size rows = s->places_y - y < s->band ? s->places_y - y : s->band;
                NAME(pack_wide)(s, &w->image, wide + r * s->wide[1] + group * s->channels * s->wide[2], y, pixels);
                if (w->planes > 1)
                    for (size c = 0; c < s->channels; c++)
                        NAME(wide_factors)(pixels + c * w->image.channel, w->plane.height, w->image.row, w->image.pixel,
                                           w->shape.places_x, factors + c * w->plane.channel, w->plane.row, plane);
                for (size n = 0; n < w->tiles; n++) {
                    size tile = group * w->tiles + n, left = s->rows - n * ROWS;
                    if (tile < from || tile >= to)
                        continue;
                    const REAL *g = narrow + r * s->narrow[1] + (group * s->rows + n * ROWS) * s->narrow[2];
                    VECTOR *here = G + (tile - from) * a_tile;
                    NAME(pack_narrow)(s, g + y * s->narrow[3], left < ROWS ? left : ROWS, rows, places);
                    if (w->planes == 1) {
                        NAME(multiply_all)(s, &w->plane, places, pixels, rows, here);
                        continue;
                    }
                    size apart = s->band * w->shape.places_x * ROWS;
                    NAME(narrow_factors)((VECTOR *)places, rows, s->places_x, (VECTOR *)terms, apart / LANES);
                    for (size f = 0; f < w->planes; f++)
                        NAME(multiply_all)(&w->shape, &w->plane, terms + f * apart, factors + f * plane, rows,
                                           here + f * w->vectors);
                }
            }
    for (size tile = from; tile < to && w->planes > 1; tile++)
        NAME(three_columns)(G + (tile - from) * a_tile, w->vectors);
}

/* The sum over threads of one tile of the sum of all G_b, laid out as the weight is. */
FUNCTION static void NAME(add_up)(const Shape *s, const NAME(Way) *w, const REAL *sums, size tile, REAL *total)
{
    size left = s->rows - tile % w->tiles * ROWS, row = tile / w->tiles * s->rows + tile % w->tiles * ROWS;
    size columns = s->channels * s->kernel_y * s->kernel_x, all = s->groups * w->tiles * w->columns * w->vectors * LANES;
    for (size f = 0; f < w->columns; f++)
        for (size three = 0; three < w->plane.threes; three++)
            for (size j = 0; j < 3 && NAME(column)(&w->shape, three, j) >= 0; j++) {
                const REAL *from = sums + ((tile * w->columns + f) * w->vectors + (three * 3 + j) * 2) * LANES;
                REAL *to = total + row * columns + NAME(column)(&w->shape, three, j) * w->columns + f;
                for (size lane = 0; lane < ROWS && lane < left; lane++) {
                    REAL found = 0;
                    for (size n = 0; n < s->threads; n++)
                        found += from[n * all + lane];
                    to[lane * columns] = found;
                }
            }
}

/* squares: (batch, parts). total: the sum of all G_b, shaped as the weight is, or NULL. room: as many as direct_room. */
FUNCTION void NAME(direct)(const Shape *s, const REAL *wide, const REAL *narrow, REAL *squares, REAL *total, REAL *room)
{
    NAME(Way) w = NAME(way)(s);
    size tiles = s->groups * w.tiles, own = NAME(own)(&w), a_sum = w.columns * w.vectors, a_tile = w.planes * w.vectors;
    room = (REAL *)(((uintptr_t)room + sizeof(VECTOR) - 1) / sizeof(VECTOR) * sizeof(VECTOR));
    REAL *sums = room + s->threads * own;
#pragma omp parallel num_threads((int)s->threads)
    {
        REAL *pixels = room + THREAD * own;
        VECTOR *G = (VECTOR *)(pixels + own - w.gradient), *sum = (VECTOR *)sums + THREAD * tiles * a_sum;
        memset(pixels, 0, (w.pixels + w.factors) * sizeof(REAL));
        if (total)
#pragma omp for schedule(static)
            for (size n = 0; n < s->threads; n++) /* also of those that are not there */
                memset((VECTOR *)sums + n * tiles * a_sum, 0, tiles * a_sum * sizeof(VECTOR));
#pragma omp for schedule(static)
        for (size task = 0; task < s->batch * s->parts; task++) {
            size b = task / s->parts, part = task % s->parts;
            size from = part * tiles / s->parts, to = (part + 1) * tiles / s->parts;
            NAME(gradient)(s, &w, wide + b * s->wide[0], narrow + b * s->narrow[0], from, to, pixels, G);
            double square = 0;
            for (size tile = from; tile < to; tile++)
                for (size f = 0; f < w.columns; f++)
                    square += NAME(squared)(&w.shape, &w.plane, G + (tile - from) * a_tile + f * w.vectors);
            squares[task] = (REAL)square;
            if (total)
                for (size tile = from; tile < to; tile++)
                    for (size i = 0; i < a_sum; i++)
                        sum[tile * a_sum + i] += G[(tile - from) * a_tile + i];
        }
        if (total)
#pragma omp for schedule(static)
            for (size tile = 0; tile < tiles; tile++)
                NAME(add_up)(s, &w, sums, tile, total);
    }
}
