/* Merging of blocks in one pass: read, widen, compute, round and check, a chunk at a time, so that nothing leaves the first cache
 * but what is read and written.
 *
 * Every formula is computed as its readable rule in `gradmatch/rules` writes it: in float32, operation by operation in the same
 * order, so the results are the same bits. Compile with -ffp-contract=off (no multiplication and addition may be fused) and with
 * -fno-strict-aliasing (floats are looked at as bits). Where a kernel answers anything but DONE the caller repeats the block by
 * the readable rule, which finds the exact error.
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { DONE = 0, NOT_PLAIN = 1, NOT_READ = 2 };
enum { F32 = 0, BF16 = 1, F16 = 2 };
#define CHUNK 1024        /* values computed at a time: a dozen arrays of them stay in the first cache */
#define STEP (16 * CHUNK) /* values read at a time */
#define LANES 16
#define GROUP 8 /* divides CHUNK */
#define INLINE static inline __attribute__((always_inline))

/* The same code for several kinds of processor, chosen when the library is loaded, where the system can do that. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define KERNEL __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef KERNEL
#define KERNEL
#endif

const char *source_of_blocks(void) { return BLOCKS_SOURCE; }

int values_of_step(void) { return STEP; }

int values_of_chunk(void) { return CHUNK; }

/* Values in memory, or (data = NULL) in a file from a byte on; `room` then has space for STEP of them. */
typedef struct {
    const char *data;
    char *room;
    int64_t offset;
    int32_t fd, kind;
} source;

/* What the output is to be, and what is measured of it where it is rounded: every `every`-th block of `block` values. */
typedef struct {
    void *data;
    int64_t first, block, every; /* first: the place of its first value in the tensor */
    int32_t kind, bad;           /* bad: a value is not finite, before or after rounding */
    double error, update;        /* sums of squares: rounded - merged, merged - theta0 */
} target;

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int is_finite(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

/* A half as float: its exponent counts from 15 instead of 127, which a product with 2^112 corrects, subnormals included. */
INLINE float widened(uint16_t half) {
    const uint32_t moved = (uint32_t)(half & 0x7fffu) << 13;
    const uint32_t infinite = moved >= 0x0f800000u ? 0x7f800000u : 0; /* the largest exponent stays the largest */
    return float_of(bits_of(float_of(moved) * 0x1p112f) | infinite | (uint32_t)(half & 0x8000u) << 16);
}

/* A float to the nearest half, ties to even. */
INLINE uint16_t narrowed(float value) {
    const uint32_t size = bits_of(value) & 0x7fffffffu;
    const uint32_t normal = (size + (size >> 13 & 1) + 0xfff - 0x38000000u) >> 13;
    const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - 0x3f000000u; /* the last bit of 0.5 is a half's smallest step */
    const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t nearest = size >= 0x47800000u ? large : size < 0x38800000u ? subnormal : normal;
    return (uint16_t)(nearest | (bits_of(value) >> 16 & 0x8000u));
}

/* n <= CHUNK values from place `at` on, as float32, in `held` or where they are; NULL where the file ends. */
INLINE const float *values(const source *from, ptrdiff_t at, ptrdiff_t n, ptrdiff_t count, float *held) {
    const int64_t size = from->kind == F32 ? 4 : 2;
    const char *place = from->data ? from->data + at * size : from->room + at % STEP * size;
    if (!from->data && at % STEP == 0) {
        const size_t wanted = size * (count - at < STEP ? count - at : STEP);
        for (size_t done = 0; done < wanted;) {
            const ssize_t got = pread(from->fd, from->room + done, wanted - done, from->offset + at * size + done);
            if (got > 0) done += got;
            else if (got == 0 || errno != EINTR) return NULL;
        }
    }
    if (from->kind == F32) return (const float *)place;
    const uint16_t *half = (const uint16_t *)place;
    if (from->kind == BF16)
        for (ptrdiff_t i = 0; i < n; i++) held[i] = float_of((uint32_t)half[i] << 16);
    else
        for (ptrdiff_t i = 0; i < n; i++) held[i] = widened(half[i]);
    return held;
}

/* sum (a - b)^2, b = 0 where it is NULL */
INLINE double squares(const float *a, const float *b, ptrdiff_t n) {
    float part[LANES] = {0};
    double sum = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float difference = b ? a[i + lane] - b[i + lane] : a[i + lane];
            part[lane] += difference * difference;
        }
    for (; i < n; i++) part[i % LANES] += b ? (a[i] - b[i]) * (a[i] - b[i]) : a[i] * a[i];
    for (int lane = 0; lane < LANES; lane++) sum += part[lane];
    return sum;
}

/* Write n merged values to place `at` on, to the nearest even; theta0 may be NULL. */
INLINE void store(target *to, const float *merged, const float *theta0, ptrdiff_t at, ptrdiff_t n) {
    float rounded[CHUNK];
    int bad = 0;
    for (ptrdiff_t i = 0; i < n; i++) bad |= !is_finite(bits_of(merged[i]));
    if (to->kind == F32)
        memcpy((float *)to->data + at, merged, n * sizeof(float));
    else {
        uint16_t *out = (uint16_t *)to->data + at;
        if (to->kind == BF16)
            for (ptrdiff_t i = 0; i < n; i++) {
                const uint32_t bits = bits_of(merged[i]), nearest = bits + 0x7fff + (bits >> 16 & 1);
                out[i] = nearest >> 16;
                rounded[i] = float_of(nearest & 0xffff0000u);
            }
        else
            for (ptrdiff_t i = 0; i < n; i++) {
                out[i] = narrowed(merged[i]);
                rounded[i] = widened(out[i]);
            }
        for (ptrdiff_t i = 0; i < n; i++) bad |= !is_finite(bits_of(rounded[i]));
    }
    to->bad |= bad;
    if (to->kind != F32 && theta0 && (to->first + at) / to->block % to->every == 0) {
        to->error += squares(rounded, merged, n);
        to->update += squares(merged, theta0, n);
    }
}

/* sum_k c_k x_k; theta0 may be NULL, or x where it is the first of them. */
KERNEL int linear(ptrdiff_t count, ptrdiff_t terms, const source *x, const float *c, const source *theta0, target *to) {
    float merged[CHUNK], room[CHUNK], base_room[CHUNK];
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = theta0 ? values(theta0, at, n, count, base_room) : NULL;
        if (theta0 && !base) return NOT_READ;
        for (ptrdiff_t k = 0; k < terms; k++) {
            const float *from = x + k == theta0 ? base : values(x + k, at, n, count, room), weight = c[k];
            if (!from) return NOT_READ;
            if (k)
                for (ptrdiff_t i = 0; i < n; i++) merged[i] += weight * from[i];
            else
                for (ptrdiff_t i = 0; i < n; i++) merged[i] = weight * from[i];
        }
        store(to, merged, base, at, n);
    }
    return to->bad ? NOT_PLAIN : DONE;
}

/* One task of Eq. 12: alpha_t, and N_t of its mean curvature; where it has none (curved = 0), it is flat. */
typedef struct {
    source theta, mean;
    float alpha, examples;
    int32_t curved;
} task;

/* theta0 + sum_t alpha_t (H0 + H_t) tau_t / Hbar, H_t = N_t F_t, H0 = scale * h0 + delta0, or `number` where h0 is NULL.
 * health: how many Hbar are at the floor; the sum of squares of the update. NOT_PLAIN where Hbar is not positive, or only the
 * remainder of a cancellation, as `arithmetic.cancelled` says. */
KERNEL int eq12(ptrdiff_t count, ptrdiff_t tasks, const task *given, const source *theta0, const source *h0, float scale,
                float number, float delta0, target *to, double *health) {
    float prior[CHUNK], h_bar[CHUNK], numerator[CHUNK], size[CHUNK], h[CHUNK], base_room[CHUNK], room[CHUNK], mean_room[CHUNK];
    const float rounding = 8 * 0x1p-23f, twice = 2 * delta0;
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = values(theta0, at, n, count, base_room);
        const float *mean0 = h0 ? values(h0, at, n, count, room) : NULL;
        if (!base || (h0 && !mean0)) return NOT_READ;
        for (ptrdiff_t i = 0; i < n; i++) prior[i] = h0 ? scale * mean0[i] + delta0 : number;
        for (ptrdiff_t t = 0; t < tasks; t++) {
            const float alpha = given[t].alpha, examples = given[t].examples;
            const float *theta = values(&given[t].theta, at, n, count, room);
            const float *mean = given[t].curved ? values(&given[t].mean, at, n, count, mean_room) : NULL;
            if (!theta || (given[t].curved && !mean)) return NOT_READ;
            for (ptrdiff_t i = 0; i < n; i++) h[i] = mean ? examples * mean[i] : 0.0f;
            if (t)
                for (ptrdiff_t i = 0; i < n; i++) {
                    h_bar[i] += alpha * h[i];
                    size[i] += __builtin_fabsf(alpha * h[i]);
                    numerator[i] += alpha * (prior[i] + h[i]) * (theta[i] - base[i]);
                }
            else
                for (ptrdiff_t i = 0; i < n; i++) {
                    h_bar[i] = alpha * h[i];
                    size[i] = __builtin_fabsf(alpha * h[i]);
                    numerator[i] = alpha * (prior[i] + h[i]) * (theta[i] - base[i]);
                }
        }
        int32_t floored = 0, cancelled = 0;
        for (ptrdiff_t i = 0; i < n; i++) {
            h_bar[i] = prior[i] + h_bar[i];
            const float all = __builtin_fabsf(prior[i]) + size[i];
            floored += h_bar[i] <= twice;
            cancelled |= ((h_bar[i] <= twice) & (h_bar[i] < 0.1f * all)) | (h_bar[i] < rounding * all) | (h_bar[i] < 0);
        }
        if (cancelled) return NOT_PLAIN;
        for (ptrdiff_t i = 0; i < n; i++) numerator[i] /= h_bar[i];
        health[0] += floored;
        health[1] += squares(numerator, NULL, n);
        for (ptrdiff_t i = 0; i < n; i++) numerator[i] = base[i] + numerator[i];
        store(to, numerator, base, at, n);
    }
    return to->bad ? NOT_PLAIN : DONE;
}

/* One task of TIES: alpha_t, the threshold of its trim (0: none), and c_t of what is added. */
typedef struct {
    source theta;
    float alpha, threshold, c;
} voter;

/* c0 theta0 + sum_t c_t tau'_t, with tau' by TIES: trim, elect, share, times `scale`. work: tasks * CHUNK floats.
 * health: places in conflict, exact cancellations, sum of elected signs. */
KERNEL int ties(ptrdiff_t count, ptrdiff_t tasks, const voter *given, const source *theta0, float c0, float scale, float majority,
                int normalize, float *work, target *to, double *health) {
    float total[CHUNK], size[CHUNK], highest[CHUNK], lowest[CHUNK], elected[CHUNK], base_room[CHUNK], room[CHUNK];
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = values(theta0, at, n, count, base_room);
        if (!base) return NOT_READ;
        for (ptrdiff_t t = 0; t < tasks; t++) {
            const float alpha = given[t].alpha, threshold = given[t].threshold;
            const float *theta = values(&given[t].theta, at, n, count, room);
            float *trimmed = work + t * CHUNK;
            if (!theta) return NOT_READ;
            for (ptrdiff_t i = 0; i < n; i++) {
                const float tau = theta[i] - base[i];
                trimmed[i] = tau * (__builtin_fabsf(tau) >= threshold ? 1.0f : 0.0f);
                const float vote = alpha * trimmed[i];
                total[i] = t ? total[i] + vote : vote;
                highest[i] = t && highest[i] > vote ? highest[i] : vote;
                lowest[i] = t && lowest[i] < vote ? lowest[i] : vote;
            }
        }
        int32_t conflicts = 0, cancelled = 0, signs = 0;
        for (ptrdiff_t i = 0; i < n; i++) {
            const int opposed = (highest[i] > 0) & (lowest[i] < 0), sign = (total[i] > 0) - (total[i] < 0);
            conflicts += opposed;
            cancelled += opposed & (total[i] == 0);
            signs += sign;
            elected[i] = sign ? (float)sign : majority;
        }
        health[0] += conflicts, health[1] += cancelled, health[2] += signs;
        for (ptrdiff_t t = 0; t < tasks; t++) {
            const float alpha = given[t].alpha, absolute = __builtin_fabsf(alpha), *trimmed = work + t * CHUNK;
            for (ptrdiff_t i = 0; i < n; i++) {
                const float agrees = alpha * trimmed[i] * elected[i] > 0 ? absolute : 0.0f;
                size[i] = t ? size[i] + agrees : agrees;
            }
        }
        for (ptrdiff_t i = 0; i < n; i++) size[i] = size[i] == 0 || !normalize ? 1.0f : size[i]; /* 0: nobody agrees */
        for (ptrdiff_t t = 0; t < tasks; t++) {
            const float alpha = given[t].alpha, c = given[t].c, *trimmed = work + t * CHUNK;
            for (ptrdiff_t i = 0; i < n; i++) {
                const float agrees = alpha * trimmed[i] * elected[i] > 0 ? 1.0f : 0.0f;
                const float share = c * (scale * (trimmed[i] * agrees / size[i]));
                total[i] = t ? total[i] + share : share;
            }
        }
        for (ptrdiff_t i = 0; i < n; i++) total[i] = c0 * base[i] + total[i];
        store(to, total, base, at, n);
    }
    return to->bad ? NOT_PLAIN : DONE;
}

/* One histogram of the bits of |theta - theta0|: of the upper 16 where prefix < 0, else of the lower 16 of those whose upper are
 * `prefix`. */
typedef struct {
    source theta;
    int64_t *counts;
    int32_t prefix;
} histogram;

KERNEL int count_bits(ptrdiff_t count, ptrdiff_t histograms, const histogram *wanted, const source *theta0) {
    float base_room[CHUNK], room[CHUNK];
    uint32_t bits[CHUNK];
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = values(theta0, at, n, count, base_room);
        if (!base) return NOT_READ;
        for (const histogram *one = wanted; one < wanted + histograms; one++) {
            const float *theta = values(&one->theta, at, n, count, room);
            const uint32_t prefix = one->prefix;
            int64_t *counts = one->counts;
            if (!theta) return NOT_READ;
            for (ptrdiff_t i = 0; i < n; i++) bits[i] = bits_of(theta[i] - base[i]) & 0x7fffffffu;
            if (one->prefix < 0)
                for (ptrdiff_t i = 0; i < n; i++) counts[bits[i] >> 16]++;
            else { /* those that match are put side by side first: a branch for each would be guessed wrong too often */
                uint16_t lower[CHUNK];
                ptrdiff_t matching = 0;
                for (ptrdiff_t i = n; i < CHUNK; i++) bits[i] = ~prefix << 16;
                for (ptrdiff_t group = 0; group < n; group += GROUP) { /* in most groups none does */
                    int any = 0;
                    for (int i = 0; i < GROUP; i++) any |= bits[group + i] >> 16 == prefix;
                    for (int i = 0; any && i < GROUP; i++) {
                        lower[matching] = (uint16_t)bits[group + i];
                        matching += bits[group + i] >> 16 == prefix;
                    }
                }
                for (ptrdiff_t i = 0; i < matching; i++) counts[lower[i]]++;
            }
        }
    }
    return DONE;
}
