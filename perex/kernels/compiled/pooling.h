/* Max pooling of images (planes, height, width): the largest pixel of each window, and where it is.
 *
 * As in torch, the first of equal pixels is taken, a NaN is larger than all, and a window of nothing but -inf is said to
 * have its largest pixel where it begins within the image. Planes are packed with -inf around them.
 */

typedef struct {
    size planes, height, width, places_y, places_x, threads;
    size kernel_y, kernel_x, step_y, step_x, padding_y, padding_x, spread_y, spread_x;
} NAME(Pool);

/* How many steps of a kernel spread by `spread` it takes to come from `start` into the image. */
FUNCTION static size NAME(entered)(size start, size spread)
{
    return start < 0 ? (-start + spread - 1) / spread : 0;
}

FUNCTION static size NAME(pool_width)(const NAME(Pool) *s)
{
    size met = (s->places_x - 1 + 2 * LANES) * s->step_x + s->kernel_x * s->spread_x, all = s->width + s->padding_x;
    return met > all ? met : all;
}

FUNCTION static size NAME(pool_height)(const NAME(Pool) *s)
{
    size met = (s->places_y - 1) * s->step_y + (s->kernel_y - 1) * s->spread_y + 1, all = s->height + s->padding_y;
    return met > all ? met : all;
}

/* Numbers of as many pixels as a vector has, every `step`-th one. */
INLINE VECTOR NAME(every)(size step, const REAL *from)
{
    if (step == 1)
        return *(const LOOSE *)from;
    if (step == 2)
        return __builtin_shufflevector(*(const LOOSE *)from, *(const LOOSE *)(from + LANES), EVEN);
    VECTOR found;
    for (size lane = 0; lane < LANES; lane++)
        found[lane] = from[lane * step];
    return found;
}

/* A plane's windows; `step` is `step_x`, a constant where this is inlined. */
INLINE void NAME(pool_plane)(size step, const NAME(Pool) *s, const REAL *plane, REAL *largest, int64_t *where)
{
    size pitch = NAME(pool_width)(s);
    BITS lanes;
    for (size lane = 0; lane < LANES; lane++)
        lanes[lane] = (INTEGER)(lane * step);
    for (size place = 0; place < s->places_y; place++) {
        size top = place * s->step_y, enter = NAME(entered)(top - s->padding_y, s->spread_y) * s->spread_y;
        for (size p = 0; p < s->places_x; p += LANES, largest += LANES, where += LANES) {
            size left = p * step - s->padding_x;
            VECTOR most = (VECTOR){} - INFINITY;
            BITS found = lanes + (INTEGER)((top + enter - s->padding_y) * s->width + left);
            for (size lane = 0; left + lane * step < 0 && lane < LANES; lane++)
                found[lane] += (INTEGER)(NAME(entered)(left + lane * step, s->spread_x) * s->spread_x);
            for (size i = 0; i < s->kernel_y * s->spread_y; i += s->spread_y)
                for (size j = 0; j < s->kernel_x * s->spread_x; j += s->spread_x) {
                    VECTOR pixel = NAME(every)(step, plane + (top + i) * pitch + p * step + j);
                    BITS larger = (BITS)(pixel > most) | (BITS)(pixel != pixel);
                    BITS at = lanes + (INTEGER)((top + i - s->padding_y) * s->width + left + j);
                    most = (VECTOR)(((BITS)pixel & larger) | ((BITS)most & ~larger));
                    found = (at & larger) | (found & ~larger);
                }
            size several = s->places_x - p < LANES ? s->places_x - p : LANES;
            for (size lane = 0; lane < several; lane++) {
                largest[lane] = most[lane];
                where[lane] = found[lane];
            }
            if (several < LANES) {
                largest += several - LANES;
                where += several - LANES;
            }
        }
    }
}

FUNCTION size NAME(pool_room)(const NAME(Pool) *s)
{
    return s->threads * NAME(pool_height)(s) * NAME(pool_width)(s);
}

/* largest and where: (planes, places_y, places_x). room: as many as pool_room. */
FUNCTION void NAME(pool)(const NAME(Pool) *s, const REAL *images, REAL *largest, int64_t *where, REAL *room)
{
    size height = NAME(pool_height)(s), width = NAME(pool_width)(s), places = s->places_y * s->places_x;
#pragma omp parallel num_threads((int)s->threads)
    {
        REAL *own = room + THREAD * height * width, *inner = own + s->padding_y * width + s->padding_x;
        for (size i = 0; i < height * width; i++)
            own[i] = -INFINITY;
#pragma omp for schedule(static)
        for (size plane = 0; plane < s->planes; plane++) {
            for (size y = 0; y < s->height; y++)
                NAME(copy)(inner + y * width, images + (plane * s->height + y) * s->width, s->width);
            REAL *to = largest + plane * places;
            if (s->step_x == 1)
                NAME(pool_plane)(1, s, own, to, where + plane * places);
            else if (s->step_x == 2)
                NAME(pool_plane)(2, s, own, to, where + plane * places);
            else
                NAME(pool_plane)(s->step_x, s, own, to, where + plane * places);
        }
    }
}
