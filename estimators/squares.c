/* squares[o][i] += sum_n (sum_t left[n][t][o] right[n][t][i])^2: an example's gradient is squared in registers, never stored.
 *
 * left (B, T, O) and right (B, T, I) are copied, some examples and outputs at a time, into panels of ROWS and COLUMNS features,
 * (panel, positions, features), the last one filled up with zeros: what a tile reads lies in one piece, and in cache. One tile
 * of the result belongs to one thread, so the sums are the same for any number of threads.
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
#define POSITIONS 1024 /* of the examples that are packed at a time, unless one alone has more */
#define BAND (256 * ROWS) /* outputs that are packed at a time */
#define STRETCH 32 /* positions that one thread packs at a time */

typedef float vector __attribute__((vector_size(4 * WIDTH)));

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static ptrdiff_t count(ptrdiff_t size, ptrdiff_t step) { return (size + step - 1) / step; }

static ptrdiff_t group(ptrdiff_t examples, ptrdiff_t positions) {
    return smaller(examples, positions < POSITIONS ? POSITIONS / positions : 1);
}

static ptrdiff_t room_for_right(ptrdiff_t length, ptrdiff_t inputs) { return count(inputs, COLUMNS) * COLUMNS * length; }

/* Floats of the workspace. */
ptrdiff_t room(ptrdiff_t examples, ptrdiff_t positions, ptrdiff_t outputs, ptrdiff_t inputs) {
    const ptrdiff_t length = group(examples, positions) * positions;
    return room_for_right(length, inputs) + count(smaller(outputs, BAND), ROWS) * ROWS * length;
}

/* Rows [0, length) of `features` columns, `stride` apart, into panels. Called by all threads, which share the work. */
static inline __attribute__((always_inline)) void pack(const float *from, ptrdiff_t stride, ptrdiff_t length, ptrdiff_t features,
                                                       const int width, float *panels) {
#pragma omp for schedule(static)
    for (ptrdiff_t start = 0; start < length; start += STRETCH) {
        const ptrdiff_t end = smaller(start + STRETCH, length);
        for (ptrdiff_t first = 0; first < features; first += width) {
            float *to = panels + first * length + start * width;
            const ptrdiff_t here = smaller(width, features - first);
            for (ptrdiff_t t = start; t < end; t++, to += width) {
                const float *row = from + t * stride + first;
                if (here == width)
                    for (int k = 0; k < width; k++) to[k] = row[k];
                else
                    for (int k = 0; k < width; k++) to[k] = k < here ? row[k] : 0;
            }
        }
    }
}

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

/* `space`: room(...) floats at a multiple of 64 bytes. */
void add_squares(const float *left, const float *right, float *squares, float *space, ptrdiff_t examples, ptrdiff_t positions,
                 ptrdiff_t outputs, ptrdiff_t inputs) {
    const ptrdiff_t together = group(examples, positions), across = count(inputs, COLUMNS);
    float *columns = space, *rows = space + room_for_right(together * positions, inputs);
#pragma omp parallel
    for (ptrdiff_t n = 0; n < examples; n += together) {
        const ptrdiff_t here = smaller(together, examples - n), length = here * positions;
        pack(right + n * positions * inputs, inputs, length, inputs, COLUMNS, columns);
        for (ptrdiff_t band = 0; band < outputs; band += BAND) {
            const ptrdiff_t high = smaller(BAND, outputs - band), down = count(high, ROWS);
            pack(left + n * positions * outputs + band, outputs, length, high, ROWS, rows);
#pragma omp for schedule(static)
            for (ptrdiff_t place = 0; place < down * across; place++) { /* neighbours share a panel of columns, which stays in cache */
                const ptrdiff_t o = place % down * ROWS, i = place / down * COLUMNS;
                vector sum[ROWS * VECTORS];
                tile(rows + o * length, (const vector *)(columns + i * length), here, positions, sum);
                for (ptrdiff_t row = 0; row < ROWS && o + row < high; row++)
                    for (ptrdiff_t column = 0; column < COLUMNS && i + column < inputs; column++)
                        squares[(band + o + row) * inputs + i + column] += ((float *)sum)[row * COLUMNS + column];
            }
        }
    }
}
