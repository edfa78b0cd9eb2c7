/* Merging of blocks in one pass: read, widen, compute, round and check, a chunk at a time, so that nothing leaves the first cache
 * but what is read and written.
 *
 * Arithmetic is in float32, in the order in which torch's operations do it (`kernels.py`, `electing.py`), a multiplication and an
 * addition fused where torch fuses them: the results are the same bits. Compile with -ffp-contract=off, so that nothing else is
 * fused (and with -fno-strict-aliasing, as floats are looked at as bits). The caller repeats a block with torch where a kernel answers anything but DONE; the exact error is found there.
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

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define MADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MADD(a, b, c) ((a) * (b) + (c))
#endif

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

int values_of_step(void) { return STEP; }

static int64_t size_of(int kind) { return kind == F32 ? 4 : 2; }

static int is_finite(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

/* n <= CHUNK values from place `at` on, as float32, in `held` or where they are; NULL where the file ends. */
static const float *values(const source *from, ptrdiff_t at, ptrdiff_t n, ptrdiff_t count, float *held) {
    const int64_t size = size_of(from->kind);
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
    if (from->kind == BF16) {
        const uint16_t *bits = (const uint16_t *)place;
        uint32_t *wide = (uint32_t *)held;
        for (ptrdiff_t i = 0; i < n; i++) wide[i] = (uint32_t)bits[i] << 16;
    } else {
#ifdef __FLT16_MAX__
        const _Float16 *half = (const _Float16 *)place;
        for (ptrdiff_t i = 0; i < n; i++) held[i] = half[i];
#else /* a compiler without the type: torch does it */
        return NULL;
#endif
    }
    return held;
}

/* sum (a - b)^2, b = 0 where it is NULL */
static double squares(const float *a, const float *b, ptrdiff_t n) {
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
static void store(target *to, const float *merged, const float *theta0, ptrdiff_t at, ptrdiff_t n) {
    const uint32_t *bits = (const uint32_t *)merged;
    float rounded[CHUNK];
    int bad = 0;
    if (to->kind == F32) {
        for (ptrdiff_t i = 0; i < n; i++) bad |= !is_finite(bits[i]);
        memcpy((float *)to->data + at, merged, n * sizeof(float));
    } else if (to->kind == BF16) {
        uint16_t *out = (uint16_t *)to->data + at;
        uint32_t *wide = (uint32_t *)rounded;
        for (ptrdiff_t i = 0; i < n; i++) {
            const uint32_t nearest = bits[i] + 0x7fff + (bits[i] >> 16 & 1);
            bad |= !is_finite(bits[i]) | !is_finite(nearest);
            wide[i] = nearest & 0xffff0000u;
            out[i] = nearest >> 16;
        }
    } else {
#ifdef __FLT16_MAX__
        _Float16 *out = (_Float16 *)to->data + at;
        for (ptrdiff_t i = 0; i < n; i++) {
            out[i] = (_Float16)merged[i];
            rounded[i] = out[i];
        }
        for (ptrdiff_t i = 0; i < n; i++) bad |= !is_finite(bits[i]) | !is_finite(((uint32_t *)rounded)[i]);
#else
        bad = 1;
#endif
    }
    to->bad |= bad;
    if (to->kind != F32 && theta0 && (to->first + at) / to->block % to->every == 0) {
        to->error += squares(rounded, merged, n);
        to->update += squares(merged, theta0, n);
    }
}

/* sum_k c_k x_k; theta0 may be NULL, or x where it is the first of them. */
int linear(ptrdiff_t count, ptrdiff_t terms, const source *x, const float *c, const source *theta0, target *to) {
    float merged[CHUNK], room[CHUNK], base_room[CHUNK];
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = theta0 ? values(theta0, at, n, count, base_room) : NULL;
        if (theta0 && !base) return NOT_READ;
        for (ptrdiff_t k = 0; k < terms; k++) {
            const float *from = x + k == theta0 ? base : values(x + k, at, n, count, room), weight = c[k];
            if (!from) return NOT_READ;
            if (k)
                for (ptrdiff_t i = 0; i < n; i++) merged[i] = MADD(from[i], weight, merged[i]);
            else
                for (ptrdiff_t i = 0; i < n; i++) merged[i] = from[i] * weight;
        }
        store(to, merged, base, at, n);
    }
    return to->bad ? NOT_PLAIN : DONE;
}

/* One task of Eq. 12; where it has no mean curvature, it is flat. */
typedef struct {
    source theta, mean;
    float alpha, examples, alpha_examples; /* alpha_t, N_t, alpha_t N_t */
    int32_t curved;
} task;

/* Coordinates at which Hbar is the remainder of a cancellation, as `kernels.cancelled` says. */
static int64_t cancelled(const float *h_bar, const float *size, float delta0, ptrdiff_t n) {
    const float rounding = 8 * 0x1p-23f, twice = 2 * delta0;
    int64_t count = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        count += ((h_bar[i] <= twice) & (h_bar[i] < 0.1f * size[i])) | (h_bar[i] < rounding * size[i]) | (h_bar[i] < 0);
    return count;
}

/* theta0 + Hbar^-1 sum_t alpha_t (H0 + H_t) tau_t, H0 = scale * h0 + delta0, or `number` where h0 is NULL. health: how many
 * Hbar are at the floor; the sum of squares of the update. */
int eq12(ptrdiff_t count, ptrdiff_t tasks, const task *given, const source *theta0, const source *h0, float scale, float number,
         float delta0, target *to, double *health) {
    float prior[CHUNK], h_bar[CHUNK], numerator[CHUNK], base_room[CHUNK], room[CHUNK], mean_room[CHUNK], size[CHUNK],
        curved[CHUNK];
    int negative = 0;
    for (ptrdiff_t t = 0; t < tasks; t++) negative |= given[t].alpha < 0;
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = values(theta0, at, n, count, base_room);
        if (!base) return NOT_READ;
        if (h0) {
            const float *mean = values(h0, at, n, count, room);
            if (!mean) return NOT_READ;
            for (ptrdiff_t i = 0; i < n; i++) prior[i] = MADD(mean[i], scale, delta0);
        } else
            for (ptrdiff_t i = 0; i < n; i++) prior[i] = number;
        for (ptrdiff_t i = 0; i < n; i++) h_bar[i] = prior[i], size[i] = __builtin_fabsf(prior[i]);
        for (ptrdiff_t t = 0; t < tasks; t++) {
            const float alpha = given[t].alpha, examples = given[t].examples, product = given[t].alpha_examples;
            const float *theta = values(&given[t].theta, at, n, count, room);
            const float *mean = given[t].curved ? values(&given[t].mean, at, n, count, mean_room) : NULL;
            if (!theta || (given[t].curved && !mean)) return NOT_READ;
            const float *weight = prior;
            if (mean) {
                for (ptrdiff_t i = 0; i < n; i++) {
                    curved[i] = MADD(mean[i], examples, prior[i]);
                    h_bar[i] = MADD(mean[i], product, h_bar[i]);
                    size[i] = MADD(__builtin_fabsf(mean[i]), __builtin_fabsf(product), size[i]);
                }
                weight = curved;
            }
            if (t)
                for (ptrdiff_t i = 0; i < n; i++) numerator[i] = MADD(alpha * weight[i], theta[i] - base[i], numerator[i]);
            else
                for (ptrdiff_t i = 0; i < n; i++) numerator[i] = weight[i] * (theta[i] - base[i]) * alpha;
        }
        int64_t floored = 0;
        for (ptrdiff_t i = 0; i < n; i++) floored += h_bar[i] <= 2 * delta0;
        if ((floored || negative) && cancelled(h_bar, size, delta0, n)) return NOT_PLAIN;
        for (ptrdiff_t i = 0; i < n; i++) numerator[i] /= h_bar[i];
        health[0] += floored;
        health[1] += squares(numerator, NULL, n);
        for (ptrdiff_t i = 0; i < n; i++) numerator[i] += base[i];
        store(to, numerator, base, at, n);
    }
    return to->bad ? NOT_PLAIN : DONE;
}

/* One task of TIES: entries within +-excluded (none below 0) are dropped; `votes` numbers the distinct |weight|. */
typedef struct {
    source theta;
    float weight, excluded;
    int32_t votes;
} voter;

#define GROUPS 8

/* theta0 + scale * sum_t w_t tau'_t with tau' by TIES, + rest * theta0. sizes (groups): the distinct |weight|; half: scale / 2.
 * health: places in conflict, exact cancellations, sum of elected signs. */
int ties(ptrdiff_t count, ptrdiff_t tasks, const voter *given, const source *theta0, ptrdiff_t groups, const float *sizes,
         float half, float majority, int normalize, float rest, target *to, double *health) {
    float total[CHUNK], size[CHUNK], tau[CHUNK], base_room[CHUNK], room[CHUNK], ups[CHUNK], downs[CHUNK],
        up[GROUPS][CHUNK], down[GROUPS][CHUNK];
    memset(up[0], 0, sizeof up[0]), memset(down[0], 0, sizeof down[0]); /* read even where no task has a weight */
    float smallest = groups ? sizes[0] : 0;
    for (ptrdiff_t g = 1; g < groups; g++) smallest = sizes[g] < smallest ? sizes[g] : smallest;
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = values(theta0, at, n, count, base_room);
        if (!base) return NOT_READ;
        memset(total, 0, sizeof total);
        memset(size, 0, sizeof size);
        for (ptrdiff_t g = 0; g < groups; g++) memset(up[g], 0, sizeof up[g]), memset(down[g], 0, sizeof down[g]);
        for (ptrdiff_t t = 0; t < tasks; t++) {
            const float weight = given[t].weight, least = given[t].excluded, absolute = __builtin_fabsf(weight);
            const float *theta = values(&given[t].theta, at, n, count, room);
            if (!theta) return NOT_READ;
            float *plus = weight > 0 ? up[given[t].votes] : down[given[t].votes];
            float *minus = weight > 0 ? down[given[t].votes] : up[given[t].votes];
            for (ptrdiff_t i = 0; i < n; i++) {
                const float step = theta[i] - base[i];
                const float kept = (step >= -least) & (step <= least) ? 0.0f : step;
                total[i] = MADD(kept, weight, total[i]);
                size[i] = MADD(__builtin_fabsf(kept), absolute, size[i]);
                plus[i] += kept > 0 ? 1.0f : 0.0f;
                minus[i] += kept < 0 ? 1.0f : 0.0f;
            }
        }
        memcpy(ups, up[0], sizeof ups);
        memcpy(downs, down[0], sizeof downs);
        for (ptrdiff_t g = 1; g < groups; g++)
            for (ptrdiff_t i = 0; i < n; i++) ups[i] += up[g][i], downs[i] += down[g][i];
        int32_t conflicts = 0, cancellations = 0, signs = 0;
        for (ptrdiff_t i = 0; i < n; i++) {
            const int opposed = (ups[i] > 0) & (downs[i] > 0), sign = (total[i] > 0) - (total[i] < 0);
            conflicts += opposed;
            signs += sign;
            cancellations += opposed & (total[i] == 0);
            tau[i] = opposed & (total[i] == 0) ? majority : (float)sign;
        }
        health[0] += conflicts;
        health[1] += cancellations;
        health[2] += signs;
        for (ptrdiff_t i = 0; i < n; i++) total[i] = MADD(tau[i], size[i], total[i]); /* twice the sum over those who agree */
        if (normalize && groups) {
            memset(size, 0, sizeof size);
            for (ptrdiff_t g = 0; g < groups; g++)
                for (ptrdiff_t i = 0; i < n; i++) {
                    const float pro = up[g][i], contra = down[g][i];
                    size[i] = MADD(tau[i] > 0 ? pro : contra, sizes[g], size[i]);
                }
            for (ptrdiff_t i = 0; i < n; i++) size[i] = size[i] < smallest ? smallest : size[i]; /* nobody agrees */
            for (ptrdiff_t i = 0; i < n; i++) total[i] = base[i] + half * total[i] / size[i];
        } else
            for (ptrdiff_t i = 0; i < n; i++) total[i] = MADD(total[i], half, base[i]);
        if (rest != 0)
            for (ptrdiff_t i = 0; i < n; i++) total[i] = MADD(base[i], rest, total[i]);
        store(to, total, base, at, n);
    }
    return to->bad ? NOT_PLAIN : DONE;
}

/* One threshold that is looked for: how many |theta - theta0| are above `high`, and those from `low` to `high`. */
typedef struct {
    source theta;
    float *inside; /* as many places as there are values */
    int64_t above, held;
    float low, high;
} window;

int count_windows(ptrdiff_t count, ptrdiff_t windows, window *wanted, const source *theta0) {
    float base_room[CHUNK], room[CHUNK], magnitude[CHUNK];
    for (ptrdiff_t at = 0; at < count; at += CHUNK) {
        const ptrdiff_t n = count - at < CHUNK ? count - at : CHUNK;
        const float *base = values(theta0, at, n, count, base_room);
        if (!base) return NOT_READ;
        for (window *one = wanted; one < wanted + windows; one++) {
            const float low = one->low, high = one->high, *theta = values(&one->theta, at, n, count, room);
            if (!theta) return NOT_READ;
            int32_t above = 0;
            for (ptrdiff_t i = 0; i < n; i++) {
                magnitude[i] = __builtin_fabsf(theta[i] - base[i]);
                above += magnitude[i] > high;
            }
            one->above += above;
            for (ptrdiff_t first = 0; first < n; first += LANES) { /* most groups have nothing inside */
                const ptrdiff_t last = first + LANES < n ? first + LANES : n;
                int any = 0;
                for (ptrdiff_t i = first; i < last; i++) any |= (magnitude[i] >= low) & (magnitude[i] <= high);
                if (any)
                    for (ptrdiff_t i = first; i < last; i++) {
                        one->inside[one->held] = magnitude[i];
                        one->held += (magnitude[i] >= low) & (magnitude[i] <= high);
                    }
            }
        }
    }
    return DONE;
}
