/* Rows of three columns of a kernel from four products for two places, where the direct way takes six: Winograd's F(3, 2).
 *
 * With places 0 and 1 and pixels 0 to 3, y_k = x_k g_0 + x_k+1 g_1 for k = 0, 1, 2 is
 *
 *     m_0 = (x_0 - x_2) g_0    m_1 = (x_1 + x_2) (g_0 + g_1) / 2    m_2 = (x_2 - x_1) (g_0 - g_1) / 2    m_3 = (x_3 - x_1) g_1
 *     y_0 = m_0 + m_1 + m_2    y_1 = m_1 - m_2                      y_2 = m_1 + m_2 + m_3
 *
 * Pixels and gradients are replaced by their factors, four planes of half as many; each plane is multiplied out as if it
 * were an image with a kernel of one column, and the four results make the three columns.
 *
 * S. Winograd, Arithmetic Complexity of Computations (1980); A. Lavin and S. Gray, arXiv:1509.09308.
 */

/* Pixels of packed rows, (rows, pitch) with `from` numbers to a row, to four planes `apart` with `to` numbers to a row. */
FUNCTION static void NAME(wide_factors)(const REAL *pixels, size rows, size from, size pixel, size places, REAL *planes,
                                        size to, size apart)
{
    for (size i = 0; i < rows; i++, pixels += from, planes += to)
        for (size p = 0; p < places; p += LANES) {
            VECTOR x[4];
            const REAL *at = pixels + 2 * p * pixel;
            if (pixel == 1)
                for (size j = 0; j < 2; j++) {
                    VECTOR one = *(const LOOSE *)(at + 2 * j), other = *(const LOOSE *)(at + 2 * j + LANES);
                    x[2 * j] = __builtin_shufflevector(one, other, EVEN);
                    x[2 * j + 1] = __builtin_shufflevector(one, other, ODD);
                }
            else
                for (size j = 0; j < 4; j++) {
                    x[j] = (VECTOR){};
                    for (size lane = 0; lane < LANES && p + lane < places; lane++)
                        x[j][lane] = at[(2 * lane + j) * pixel];
                }
            *(VECTOR *)(planes + p) = x[0] - x[2];
            *(VECTOR *)(planes + apart + p) = x[1] + x[2];
            *(VECTOR *)(planes + 2 * apart + p) = x[2] - x[1];
            *(VECTOR *)(planes + 3 * apart + p) = x[3] - x[1];
        }
}

/* Gradients of packed places, (rows, columns, ROWS), to four planes `apart` of as many for every two; a last one is alone. */
FUNCTION static void NAME(narrow_factors)(const VECTOR *g, size rows, size columns, VECTOR *planes, size apart)
{
    for (size i = 0; i < rows; i++, g += 2 * columns)
        for (size p = 0; p < columns; p += 2)
            for (size v = 0; v < 2; v++, planes++) {
                VECTOR one = g[2 * p + v], other = p + 1 < columns ? g[2 * p + 2 + v] : (VECTOR){};
                planes[0] = one;
                planes[apart] = (REAL)0.5 * (one + other);
                planes[2 * apart] = (REAL)0.5 * (one - other);
                planes[3 * apart] = other;
            }
}

/* The three columns in place of the first three products, `apart` vectors each. */
FUNCTION static void NAME(three_columns)(VECTOR *G, size apart)
{
    for (size i = 0; i < apart; i++) {
        VECTOR both = G[apart + i] + G[2 * apart + i], y = G[apart + i] - G[2 * apart + i];
        G[i] += both;
        G[2 * apart + i] = both + G[3 * apart + i];
        G[apart + i] = y;
    }
}
