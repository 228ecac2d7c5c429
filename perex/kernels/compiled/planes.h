/* Sums over planes of images, sum_p g_p (x_p - m) / sqrt(v + eps) and sum_p g_p: what batch norms get of each example. */

#define STRETCH (64 * LANES) /* numbers that are added up in one vector: long sums lose digits */

/* Adds both sums over `count` numbers, without the root. */
INLINE void NAME(add_plane)(const REAL *x, const REAL *g, size count, REAL mean, double *centred, double *plain)
{
    for (size start = 0; start < count; start += STRETCH) {
        size stop = count - start < STRETCH ? count : start + STRETCH, p = start;
        VECTOR products[2] = {(VECTOR){}, (VECTOR){}}, sums[2] = {(VECTOR){}, (VECTOR){}};
        for (; p + LANES <= stop; p += 2 * LANES)
#pragma GCC unroll 2
            for (size v = 0; v < 2; v++) {
                if (p + (v + 1) * LANES > stop)
                    break;
                VECTOR own = *(const LOOSE *)(g + p + v * LANES);
                sums[v] += own;
                products[v] += own * (*(const LOOSE *)(x + p + v * LANES) - mean);
            }
        p = stop - (stop - start) % LANES;
        VECTOR both = NAME(halved)(products[0] + products[1], sums[0] + sums[1]);
        for (size several = LANES / 2; several > 1; several /= 2)
            both = NAME(halved)(both, both);
        *centred += both[0];
        *plain += both[LANES / 2];
        for (; p < stop; p++) {
            *plain += g[p];
            *centred += g[p] * (x[p] - mean);
        }
    }
}

/* weight, bias: (batch, channels). */
FUNCTION void NAME(planes)(const Planes *s, double eps, const REAL *x, const REAL *g, const REAL *mean,
                           const REAL *variance, REAL *weight, REAL *bias)
{
#pragma omp parallel for schedule(static) num_threads((int)s->threads)
    for (size n = 0; n < s->batch * s->channels; n++) {
        size b = n / s->channels, c = n % s->channels;
        double centred = 0, plain = 0;
        for (size r = 0; r < s->images; r++)
            NAME(add_plane)(x + b * s->x[0] + r * s->x[1] + c * s->x[2], g + b * s->g[0] + r * s->g[1] + c * s->g[2],
                            s->places, mean[c], &centred, &plain);
        weight[n] = (REAL)(centred / sqrt(variance[c] + eps));
        bias[n] = (REAL)plain;
    }
}
