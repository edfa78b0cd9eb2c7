/* squares[o][i] += sum_n (sum_t left[n][t][o] right[n][t][i])^2: an example's gradient is squared in registers, never stored.
 *
 * left (B, T, O) and right (B, T, I) are copied, some examples and outputs at a time, into panels of ROWS and COLUMNS features,
 * (panel, positions, features), the last one filled up with zeros: what a tile reads lies in one piece, and in cache. Each
 * element's sum is the same whichever outputs are asked for together.
 */
#include <stddef.h>

#define ROWS 6 /* twelve products under way hide the latency of a multiplication; with AVX2 the sums then lie in cache */
#define COLUMNS 32
#define POSITIONS 1024 /* of the examples that are packed at a time, unless one alone has more */
#define BAND (256 * ROWS) /* outputs that are packed at a time */

const char *source_of_squares(void) { return SQUARES_SOURCE; }

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static ptrdiff_t count(ptrdiff_t size, ptrdiff_t step) { return (size + step - 1) / step; }

static ptrdiff_t group(ptrdiff_t examples, ptrdiff_t positions) {
    return smaller(examples, positions < POSITIONS ? POSITIONS / positions : 1);
}

static ptrdiff_t room_for_right(ptrdiff_t length, ptrdiff_t inputs) { return count(inputs, COLUMNS) * COLUMNS * length; }

/* Floats of the workspace of one call. */
ptrdiff_t room(ptrdiff_t examples, ptrdiff_t positions, ptrdiff_t outputs, ptrdiff_t inputs) {
    const ptrdiff_t length = group(examples, positions) * positions;
    return room_for_right(length, inputs) + count(smaller(outputs, BAND), ROWS) * ROWS * length;
}

/* Rows [0, length) of `features` columns, `stride` apart, into panels. */
static void pack(const float *from, ptrdiff_t stride, ptrdiff_t length, ptrdiff_t features, const int width, float *panels) {
    for (ptrdiff_t first = 0; first < features; first += width) {
        float *to = panels + first * length;
        const ptrdiff_t here = smaller(width, features - first);
        for (ptrdiff_t t = 0; t < length; t++, to += width) {
            const float *row = from + t * stride + first;
            for (int k = 0; k < width; k++) to[k] = k < here ? row[k] : 0;
        }
    }
}

/* The sums of ROWS outputs and COLUMNS inputs into `sum`, two vectors of WIDTH columns at a time. */
#define TILE(NAME, WIDTH, TARGET)                                                                                              \
    TARGET static void NAME(const float *left, const float *right, ptrdiff_t examples, ptrdiff_t positions, float *sum) {      \
        typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4)));                                              \
        for (int column = 0; column < COLUMNS; column += 2 * WIDTH) {                                                          \
            const float *l = left, *r = right + column;                                                                        \
            vector total[ROWS][2] = {{{0}}};                                                                                   \
            for (ptrdiff_t n = 0; n < examples; n++) {                                                                         \
                vector product[ROWS][2] = {{{0}}};                                                                             \
                for (ptrdiff_t t = 0; t < positions; t++, l += ROWS, r += COLUMNS)                                             \
                    _Pragma("GCC unroll 8") for (int o = 0; o < ROWS; o++)                                                     \
                        _Pragma("GCC unroll 8") for (int i = 0; i < 2; i++)                                                    \
                            product[o][i] += l[o] * *(const vector *)(r + i * WIDTH);                                          \
                _Pragma("GCC unroll 8") for (int o = 0; o < ROWS; o++)                                                         \
                    _Pragma("GCC unroll 8") for (int i = 0; i < 2; i++) total[o][i] += product[o][i] * product[o][i];          \
            }                                                                                                                  \
            for (int o = 0; o < ROWS; o++)                                                                                     \
                for (int i = 0; i < 2; i++) *(vector *)(sum + o * COLUMNS + column + i * WIDTH) = total[o][i];                 \
        }                                                                                                                      \
    }

typedef void (*tile)(const float *, const float *, ptrdiff_t, ptrdiff_t, float *);

TILE(tile_of_any, 4, )
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#define FUSED(processor) __attribute__((target(processor)))
#else
#define FUSED(processor) __attribute__((target(processor), optimize("fp-contract=fast")))
#endif
TILE(tile_of_avx512, 16, FUSED("avx512f"))
TILE(tile_of_avx2, 8, FUSED("avx2,fma"))

static tile best(void) {
    if (__builtin_cpu_supports("avx512f")) return tile_of_avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? tile_of_avx2 : tile_of_any;
}
#else
static tile best(void) { return tile_of_any; }
#endif

/* Outputs [from, to) of the squares. `space`: room(...) floats of this call's own. */
void add_squares(const float *left, const float *right, float *squares, float *space, ptrdiff_t from, ptrdiff_t to,
                 ptrdiff_t examples, ptrdiff_t positions, ptrdiff_t outputs, ptrdiff_t inputs) {
    const ptrdiff_t together = group(examples, positions), across = count(inputs, COLUMNS);
    float *columns = space, *rows = space + room_for_right(together * positions, inputs), sum[ROWS * COLUMNS];
    const tile add = best();
    for (ptrdiff_t n = 0; n < examples; n += together) {
        const ptrdiff_t here = smaller(together, examples - n), length = here * positions;
        pack(right + n * positions * inputs, inputs, length, inputs, COLUMNS, columns);
        for (ptrdiff_t band = from; band < to; band += BAND) {
            const ptrdiff_t high = smaller(BAND, to - band), down = count(high, ROWS);
            pack(left + n * positions * outputs + band, outputs, length, high, ROWS, rows);
            for (ptrdiff_t place = 0; place < down * across; place++) { /* neighbours share a panel of columns, which stays in cache */
                const ptrdiff_t o = place % down * ROWS, i = place / down * COLUMNS;
                add(rows + o * length, columns + i * length, here, positions, sum);
                for (ptrdiff_t row = 0; row < ROWS && o + row < high; row++)
                    for (ptrdiff_t column = 0; column < COLUMNS && i + column < inputs; column++)
                        squares[(band + o + row) * inputs + i + column] += sum[row * COLUMNS + column];
            }
        }
    }
}
