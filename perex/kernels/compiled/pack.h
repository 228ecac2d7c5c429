/* Images and output gradients, packed into a thread's cache. */

/* The columns of one group: threes, and how a band of an image is packed, in whichever order the image itself has. */
typedef struct {
    size threes, apart;                      /* how many there are, and D */
    size height, width;                      /* sides of the band */
    size channel, row, pixel;                /* its strides */
    size gather_y, gather_x, step_y, step_x; /* pixels of the image to one of the band; pixels of the band to a place */
} NAME(Layout);

FUNCTION static NAME(Layout) NAME(layout)(const Shape *s)
{
    NAME(Layout) l;
    l.gather_y = s->kernel_y == 1 ? s->step_y : 1; /* what a kernel of one pixel steps over need not be packed */
    l.gather_x = s->kernel_x == 1 ? s->step_x : 1;
    l.step_y = s->kernel_y == 1 ? 1 : s->step_y;
    l.step_x = s->kernel_x == 1 ? 1 : s->step_x;
    l.height = (s->band - 1) * l.step_y + (s->kernel_y - 1) * s->spread_y + 1;
    l.width = (s->places_x - 1) * l.step_x + (s->kernel_x - 1) * s->spread_x + 1;
    int last = s->wide[2] < s->wide[4]; /* channels lie next to each other */
    l.channel = last ? 1 : l.height * l.width;
    l.pixel = last ? s->channels : 1;
    l.row = l.width * l.pixel;
    if (s->kernel_x == 1) {
        l.threes = s->kernel_y * ((s->channels + 2) / 3);
        l.apart = l.channel;
    } else {
        l.threes = s->channels * s->kernel_y * ((s->kernel_x + 2) / 3);
        l.apart = s->spread_x * l.pixel;
    }
    return l;
}

/* Where a three begins in the band. */
FUNCTION static size NAME(begins)(const Shape *s, const NAME(Layout) *l, size three)
{
    if (s->kernel_x == 1)
        return three / s->kernel_y * 3 * l->channel + three % s->kernel_y * s->spread_y * l->row;
    size several = (s->kernel_x + 2) / 3, row = three / several, y = row % s->kernel_y;
    return row / s->kernel_y * l->channel + y * s->spread_y * l->row + three % several * 3 * l->apart;
}

/* Which column of the weight one of a three is; -1 if the three is longer than what is left. */
FUNCTION static size NAME(column)(const Shape *s, size three, size j)
{
    if (s->kernel_x == 1) {
        size channel = three / s->kernel_y * 3 + j;
        return channel < s->channels ? channel * s->kernel_y + three % s->kernel_y : -1;
    }
    size several = (s->kernel_x + 2) / 3, x = three % several * 3 + j;
    return x < s->kernel_x ? three / several * s->kernel_x + x : -1;
}

INLINE void NAME(copy)(REAL *to, const REAL *from, size count)
{
    size i = 0;
    for (; i + LANES <= count; i += LANES)
        *(LOOSE *)(to + i) = *(const LOOSE *)(from + i);
    for (; i + 4 <= count; i += 4)
        memcpy(to + i, from + i, 4 * sizeof(REAL));
    for (; i < count; i++)
        to[i] = from[i];
}

/* Pixels of a group's channels as the kernel meets them in a band that begins at a row of places.
 *
 * The band is zero where nothing was packed, as it is left and right of an image; what other bands have there is cleared.
 */
FUNCTION static void NAME(pack_wide)(const Shape *s, const NAME(Layout) *l, const REAL *image, size first, REAL *band)
{
    size several = l->pixel > 1 ? s->channels : 1; /* numbers that are copied for each pixel */
    size left = (s->padding_x + l->gather_x - 1) / l->gather_x, stop = (s->width + s->padding_x - 1) / l->gather_x + 1;
    stop = stop < l->width ? stop : l->width;
    size apart = l->gather_x * s->wide[4], count = (stop - left) * l->pixel;
    int in_runs = apart == l->pixel && (several == 1 || s->wide[2] == 1);
    int whole = in_runs && l->row == s->wide[3] && l->width == s->width && l->gather_y == 1 && s->padding_y == 0;
    if (whole && s->padding_x == 0 && first * l->step_y + l->height <= s->height) { /* as it lies */
        for (size c = 0; c < s->channels; c += several)
            NAME(copy)(band + c * l->channel, image + c * s->wide[2] + first * l->step_y * l->row, l->height * l->row);
        return;
    }
    for (size c = 0; c < s->channels; c += several)
        for (size i = 0; i < l->height; i++) {
            REAL *to = band + c * l->channel + i * l->row + left * l->pixel;
            size y = (first * l->step_y + i) * l->gather_y - s->padding_y;
            if (y < 0 || y >= s->height) {
                if (s->band < s->places_y)
                    for (size j = 0; j < count; j++)
                        to[j] = 0;
                continue;
            }
            const REAL *from = image + c * s->wide[2] + y * s->wide[3] + left * apart - s->padding_x * s->wide[4];
            if (in_runs)
                NAME(copy)(to, from, count);
            else
                for (size j = 0; j < stop - left; j++)
                    for (size n = 0; n < several; n++)
                        to[j * l->pixel + n] = from[j * apart + n * s->wide[2]];
        }
}

/* Transposes LANES vectors: interleaving the first half of rows with the second, log2 LANES times over. */
INLINE void NAME(transpose)(VECTOR rows[LANES])
{
    VECTOR next[LANES];
#pragma GCC unroll 4
    for (size times = LANES; times > 1; times /= 2) {
#pragma GCC unroll 8
        for (size i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shufflevector(rows[i], rows[i + LANES / 2], LOWER);
            next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + LANES / 2], UPPER);
        }
#pragma GCC unroll 16
        for (size i = 0; i < LANES; i++)
            rows[i] = next[i];
    }
}

/* Channels of a band of places, side by side: (places, ROWS); zeros where there are fewer. */
FUNCTION static void NAME(pack_narrow)(const Shape *s, const REAL *image, size channels, size rows, REAL *tile)
{
    for (size y = 0; y < rows; y++, image += s->narrow[3], tile += s->places_x * ROWS)
        for (size c = 0; c < ROWS; c += LANES) {
            size x = 0, several = channels - c < LANES ? channels - c : LANES;
            const REAL *from = image + c * s->narrow[2];
            if (several == LANES && s->narrow[2] == 1)
                for (; x < s->places_x; x++)
                    *(VECTOR *)(tile + x * ROWS + c) = *(const LOOSE *)(from + x * s->narrow[4]);
            if (several == LANES && s->narrow[4] == 1)
                for (; x + LANES <= s->places_x; x += LANES) {
                    VECTOR block[LANES];
#pragma GCC unroll 16
                    for (size i = 0; i < LANES; i++)
                        block[i] = *(const LOOSE *)(from + i * s->narrow[2] + x);
                    NAME(transpose)(block);
#pragma GCC unroll 16
                    for (size i = 0; i < LANES; i++)
                        *(VECTOR *)(tile + (x + i) * ROWS + c) = block[i];
                }
            for (; x < s->places_x; x++)
                for (size i = 0; i < LANES; i++)
                    tile[x * ROWS + c + i] = i < several ? from[i * s->narrow[2] + x * s->narrow[4]] : 0;
        }
}
