/* squares[o][i] += sum_n (sum_t left[n][t][o] right[n][t][i])^2: an example's gradient is squared in registers, never stored.
 *
 * left (B, T, O) and right (B, T, I) are packed into panels of ROWS and COLUMNS features, (panel, B T, features), the last one
 * filled up with zeros. One tile of the result belongs to one thread, so the sums are the same for any number of threads.
 */
#include <stddef.h>

#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
#define ROWS 6 /* twelve products under way hide the latency of a multiplication; with AVX2 the sums then lie in cache */
#define VECTORS 2
#define COLUMNS (WIDTH * VECTORS)

typedef float vector __attribute__((vector_size(4 * WIDTH)));

int rows_of_panel(void) { return ROWS; }
int columns_of_panel(void) { return COLUMNS; }

static void tile(const float *left, const vector *right, ptrdiff_t examples, ptrdiff_t positions, vector *sum) {
    vector total[ROWS][VECTORS] = {{{0}}};
    for (ptrdiff_t n = 0; n < examples; n++) {
        vector product[ROWS][VECTORS] = {{{0}}};
        for (ptrdiff_t t = 0; t < positions; t++, left += ROWS, right += VECTORS)
#pragma GCC unroll 8
            for (int o = 0; o < ROWS; o++)
#pragma GCC unroll 8
                for (int i = 0; i < VECTORS; i++) product[o][i] += left[o] * right[i];
#pragma GCC unroll 8
        for (int o = 0; o < ROWS; o++)
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) total[o][i] += product[o][i] * product[o][i];
    }
    for (int o = 0; o < ROWS; o++)
        for (int i = 0; i < VECTORS; i++) sum[o * VECTORS + i] = total[o][i];
}

void add_squares(const float *left, const float *right, float *squares, ptrdiff_t examples, ptrdiff_t positions,
                 ptrdiff_t outputs, ptrdiff_t inputs) {
    const ptrdiff_t length = examples * positions;
    const ptrdiff_t down = (outputs + ROWS - 1) / ROWS, across = (inputs + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t place = 0; place < down * across; place++) { /* neighbours share a panel of `right`, which stays in cache */
        const ptrdiff_t o = place % down * ROWS, i = place / down * COLUMNS;
        vector sum[ROWS * VECTORS];
        tile(left + o * length, (const vector *)(right + i * length), examples, positions, sum);
        for (ptrdiff_t row = 0; row < ROWS && o + row < outputs; row++)
            for (ptrdiff_t column = 0; column < COLUMNS && i + column < inputs; column++)
                squares[(o + row) * inputs + i + column] += ((float *)sum)[row * COLUMNS + column];
    }
}
