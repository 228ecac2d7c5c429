/* Sums over positions, sum_t g_bt (x_bt - m_bt) / sqrt(v_bt + eps) and sum_t g_bt: what layer norms get of each example.
 *
 * m and v are of each row of x itself; without `centred`, as in RMS norms, m is 0.
 */

/* The sum over a row of (x - first) - then, to the power of 1 or 2. */
INLINE double NAME(moment)(const REAL *x, size width, REAL first, REAL then, int power)
{
    double total = 0;
    size i = 0;
    while (i + 2 * LANES <= width) {
        VECTOR sum[2] = {(VECTOR){}, (VECTOR){}};
        for (size n = 0; n < RUN && i + 2 * LANES <= width; n++, i += 2 * LANES)
#pragma GCC unroll 2
            for (size v = 0; v < 2; v++) {
                VECTOR from = *(const LOOSE *)(x + i + v * LANES) - first - then;
                if (power == 1)
                    sum[v] += from;
                else
                    sum[v] += from * from;
            }
        total += NAME(added)(sum[0] + sum[1]);
    }
    for (; i < width; i++) {
        REAL from = x[i] - first - then;
        total += power == 1 ? from : from * from;
    }
    return total;
}

/* weight, bias: (batch, width). Of `s`, left is x, and right g. */
FUNCTION void NAME(rows)(const Outer *s, double eps, int centred, const REAL *x, const REAL *g, REAL *weight, REAL *bias,
                         REAL *room)
{
    size width = s->rows;
#pragma omp parallel num_threads((int)s->threads)
    {
        REAL *of_weight = room + THREAD * 2 * width, *of_bias = of_weight + width;
#pragma omp for schedule(static)
        for (size b = 0; b < s->batch; b++) {
            REAL *weights = weight + b * width, *biases = bias + b * width;
            memset(weights, 0, width * sizeof(REAL));
            memset(biases, 0, width * sizeof(REAL));
            for (size start = 0; start < s->positions; start += RUN) {
                memset(of_weight, 0, 2 * width * sizeof(REAL));
                for (size t = start; t < start + RUN && t < s->positions; t++) {
                    const REAL *from = x + b * s->left[0] + t * s->left[1], *own = g + b * s->right[0] + t * s->right[1];
                    REAL mean = centred ? (REAL)(NAME(moment)(from, width, 0, 0, 1) / width) : 0;
                    REAL rest = centred ? (REAL)(NAME(moment)(from, width, mean, 0, 1) / width) : 0; /* lost in rounding */
                    double variance = NAME(moment)(from, width, mean, rest, 2) / width;
                    REAL scale = centred && !(variance < INFINITY) ? NAN : (REAL)(1 / sqrt(variance + eps));
                    size i = 0;
                    for (; i + LANES <= width; i += LANES) {
                        VECTOR grad = *(const LOOSE *)(own + i);
                        *(LOOSE *)(of_weight + i) += grad * ((*(const LOOSE *)(from + i) - mean - rest) * scale);
                        *(LOOSE *)(of_bias + i) += grad;
                    }
                    for (; i < width; i++) {
                        of_weight[i] += own[i] * ((from[i] - mean - rest) * scale);
                        of_bias[i] += own[i];
                    }
                }
                for (size i = 0; i < width; i++) {
                    weights[i] += of_weight[i];
                    biases[i] += of_bias[i];
                }
            }
        }
    }
}

FUNCTION size NAME(rows_room)(const Outer *s)
{
    return s->threads * 2 * s->rows;
}
