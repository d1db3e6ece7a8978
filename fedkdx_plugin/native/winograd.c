/* Convolutions along time in fewer products, after Winograd (1980) and Lavin & Gray (arXiv:1509.09308): F(3, 3).

   Three results of three taps take five products instead of nine, of sums of inputs and sums of weights, which stand for
   values of polynomials at 0, 1, -1, 2 and infinity. More taps are groups of three: as a group lies three samples from
   the next, all see the same transformed inputs, and at each point what is left is a convolution of `taps / 3` taps over
   tiles of three samples. Backward is the transpose of each step. */

#include "layers.h"
#include "products.h"
#include "vectors.h"

#define STEP 3   /* results of a tile, taps of a group */
#define SPAN 5   /* samples that a tile sees */
#define POINTS 5
#define WINDOWS 8 /* at work at a time, so that what is made of them stays in the cache */
#define TERMS 48  /* of a weight's gradient; the sums of fewer are too exact to be put together from transforms */

struct sizes {
    ptrdiff_t after, groups, tiles; /* of a window: results, groups of taps, tiles of results */
    ptrdiff_t rows;                 /* of a window: tiles of samples, groups - 1 more than of results */
    ptrdiff_t all;                  /* of all windows at work: rows, and groups - 1 of zeros */
};

static struct sizes sizes_of(ptrdiff_t n, ptrdiff_t time, ptrdiff_t taps) {
    struct sizes s = {.after = time - taps + 1, .groups = taps / STEP};
    s.tiles = (s.after + STEP - 1) / STEP;
    s.rows = s.tiles + s.groups - 1;
    s.all = n * s.rows + s.groups - 1;
    return s;
}

static ptrdiff_t smaller(ptrdiff_t one, ptrdiff_t other) { return one < other ? one : other; }

/* Transforms round a few times however short a sum is, and multiply what sums of random terms are off by √2: the root of
   the mean, over a tile's results, of Σ_p A_rp² |G_p|² |B_p|² / 9 for the transforms' rows. A direct sum of few terms is
   next to exact: by weights, Winograd's gradients are off by up to four times as much. From TERMS on it is twice at most
   for whatever is computed, so that no more than a bit is lost. */
int winograd_takes(ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, ptrdiff_t taps) {
    return taps % STEP == 0 && inputs % BLOCK == 0 && n * (time - taps + 1) >= TERMS;
}

ptrdiff_t winograd_scratch(ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, ptrdiff_t taps, ptrdiff_t filters) {
    const struct sizes s = sizes_of(smaller(n, WINDOWS), time, taps);
    return POINTS * (s.all * (2 * inputs + filters) + 2 * s.groups * inputs * filters);
}

static void zero(float *values, ptrdiff_t count) {
    for (ptrdiff_t k = 0; k < count; k++) values[k] = 0;
}

/* A sum of a tile's samples at each point, (POINTS, all, inputs). */
static void transform_samples(const float *x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, struct sizes s, float *u) {
    const ptrdiff_t plane = s.all * inputs;
    for (ptrdiff_t w = 0; w < n; w++)
        for (ptrdiff_t j = 0; j < s.rows; j++) {
            const float *from = x + (w * time + STEP * j) * inputs;
            const ptrdiff_t there = time - STEP * j; /* a window's last tile may go on beyond it */
            float *to = u + (w * s.rows + j) * inputs;
            for (ptrdiff_t c = 0; c < inputs; c += LANES, to += LANES) {
                vector d[SPAN];
                UNROLL for (int k = 0; k < SPAN; k++) d[k] = k < there ? load(from + k * inputs + c) : (vector){0};
                store(to, 2 * (d[0] - d[2]) - d[1] + d[3]);
                store(to + plane, d[3] - d[2] - 2 * d[1]);
                store(to + 2 * plane, 2 * d[1] - 3 * d[2] + d[3]);
                store(to + 3 * plane, d[3] - d[1]);
                store(to + 4 * plane, 2 * (d[1] - d[3]) - d[2] + d[4]);
            }
        }
    for (ptrdiff_t p = 0; p < POINTS; p++) zero(u + p * plane + n * s.rows * inputs, (s.groups - 1) * inputs);
}

/* The transpose of that: from gradients by the sums to those by the samples. */
static void samples_from(const float *u, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, struct sizes s, float *x) {
    const ptrdiff_t plane = n * s.rows * inputs;
    for (ptrdiff_t w = 0; w < n; w++)
        for (ptrdiff_t c = 0; c < inputs; c += LANES) {
            vector fourth = {0}, fifth = {0}; /* of the tile before: the next one's first and second sample */
            for (ptrdiff_t j = 0; j <= s.rows; j++) {
                const float *from = u + (w * s.rows + j) * inputs + c;
                float *to = x + (w * time + STEP * j) * inputs + c;
                const ptrdiff_t there = time - STEP * j;
                vector v[POINTS] = {{0}};
                if (j < s.rows) UNROLL for (int p = 0; p < POINTS; p++) v[p] = load(from + p * plane);
                if (there > 0) store(to, 2 * v[0] + fourth);
                if (there > 1) store(to + inputs, 2 * (v[2] - v[1] + v[4]) - v[0] - v[3] + fifth);
                if (there > 2) store(to + 2 * inputs, -2 * v[0] - v[1] - 3 * v[2] - v[4]);
                fourth = v[0] + v[1] + v[2] + v[3] - 2 * v[4];
                fifth = v[4];
            }
        }
}

/* Sums of a group's three weights at each point. */
INLINE void transform_weights(const vector g[STEP], vector v[POINTS]) {
    const vector even = g[0] + g[2];
    v[0] = 0.5f * g[0];
    v[1] = -0.5f * (even + g[1]);
    v[2] = (-1 / 6.f) * (even - g[1]);
    v[3] = (1 / 6.f) * (g[0] + 2 * g[1] + 4 * g[2]);
    v[4] = g[2];
}

/* The transpose of that. */
INLINE void weights_from(const vector v[POINTS], vector g[STEP]) {
    const vector one = -0.5f * v[1], minus = (-1 / 6.f) * v[2], two = (1 / 6.f) * v[3];
    g[0] = 0.5f * v[0] + one + minus + two;
    g[1] = one - minus + 2 * two;
    g[2] = one + minus + 4 * two + v[4];
}

/* Weights (filters, taps, inputs) at each point, ready to be multiplied by samples: of a point (groups, inputs,
   filters). */
static void weights_for_samples(const float *weight, ptrdiff_t inputs, ptrdiff_t groups, ptrdiff_t filters,
                                float *points) {
    const ptrdiff_t plane = groups * inputs * filters, apart = groups * STEP * inputs;
    for (ptrdiff_t g = 0; g < groups; g++)
        for (ptrdiff_t i = 0; i < inputs; i++)
            for (ptrdiff_t f = 0; f < filters; f += LANES) {
                const float *from = weight + f * apart + g * STEP * inputs + i;
                float *to = points + (g * inputs + i) * filters + f;
                vector taps[STEP] = {{0}}, v[POINTS];
                UNROLL for (int k = 0; k < STEP; k++)
                    UNROLL for (int lane = 0; lane < LANES; lane++) taps[k][lane] = from[lane * apart + k * inputs];
                transform_weights(taps, v);
                UNROLL for (int p = 0; p < POINTS; p++) store(to + p * plane, v[p]);
            }
}

/* The transpose of that: from gradients at each point to those by the weights. */
static void weights_from_points(const float *points, ptrdiff_t inputs, ptrdiff_t groups, ptrdiff_t filters,
                                float *weight) {
    const ptrdiff_t plane = groups * inputs * filters, apart = groups * STEP * inputs;
    for (ptrdiff_t g = 0; g < groups; g++)
        for (ptrdiff_t i = 0; i < inputs; i++)
            for (ptrdiff_t f = 0; f < filters; f += LANES) {
                const float *from = points + (g * inputs + i) * filters + f;
                float *to = weight + f * apart + g * STEP * inputs + i;
                vector v[POINTS] = {{0}}, taps[STEP];
                UNROLL for (int p = 0; p < POINTS; p++) v[p] = load(from + p * plane);
                weights_from(v, taps);
                UNROLL for (int k = 0; k < STEP; k++)
                    UNROLL for (int lane = 0; lane < LANES; lane++) to[lane * apart + k * inputs] = taps[k][lane];
            }
}

/* Weights at each point, ready to be multiplied by gradients: of a point (groups, the last one first, filters,
   inputs). */
static void weights_for_gradients(const float *weight, ptrdiff_t inputs, ptrdiff_t groups, ptrdiff_t filters,
                                  float *points) {
    const ptrdiff_t plane = groups * inputs * filters;
    for (ptrdiff_t f = 0; f < filters; f++)
        for (ptrdiff_t g = 0; g < groups; g++)
            for (ptrdiff_t i = 0; i < inputs; i += LANES) {
                const float *from = weight + (f * groups + g) * STEP * inputs + i;
                const vector taps[STEP] = {load(from), load(from + inputs), load(from + 2 * inputs)};
                vector v[POINTS];
                transform_weights(taps, v);
                float *to = points + ((groups - 1 - g) * filters + f) * inputs + i;
                UNROLL for (int p = 0; p < POINTS; p++) store(to + p * plane, v[p]);
            }
}

static void results_from(const float *points, const float *bias, ptrdiff_t n, ptrdiff_t filters, struct sizes s,
                         float *out) {
    const ptrdiff_t plane = n * s.tiles * filters;
    for (ptrdiff_t w = 0; w < n; w++)
        for (ptrdiff_t j = 0; j < s.tiles; j++) {
            const float *from = points + (w * s.tiles + j) * filters;
            float *to = out + (w * s.after + STEP * j) * filters;
            const ptrdiff_t left = s.after - STEP * j;
            for (ptrdiff_t f = 0; f < filters; f += LANES) {
                vector v[POINTS];
                UNROLL for (int p = 0; p < POINTS; p++) v[p] = load(from + p * plane + f);
                const vector even = v[1] + v[2], start = load(bias + f);
                store(to + f, start + v[0] + even + v[3]);
                if (left > 1) store(to + filters + f, start + v[1] - v[2] + 2 * v[3]);
                if (left > 2) store(to + 2 * filters + f, start + even + 4 * v[3] + v[4]);
            }
        }
}

void winograd_convolve(const float *x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, const float *weight,
                       const float *bias, ptrdiff_t taps, ptrdiff_t filters, float *scratch, float *out) {
    const ptrdiff_t depth = taps / STEP * inputs;
    float *by = scratch, *samples = by + POINTS * depth * filters;
    weights_for_samples(weight, inputs, taps / STEP, filters, by);
    for (ptrdiff_t first = 0; first < n; first += WINDOWS) {
        const ptrdiff_t count = smaller(n - first, WINDOWS);
        const struct sizes s = sizes_of(count, time, taps);
        float *results = samples + POINTS * s.all * inputs;
        transform_samples(x + first * time * inputs, count, time, inputs, s, samples);
        for (ptrdiff_t p = 0; p < POINTS; p++)
            for (ptrdiff_t w = 0; w < count; w++)
                product(samples + (p * s.all + w * s.rows) * inputs, inputs, s.tiles, by + p * depth * filters, filters,
                        depth, results + (p * count + w) * s.tiles * filters, NULL);
        results_from(results, bias, count, filters, s, out + first * s.after * filters);
    }
}

/* The transpose of that: gradients by results at each point, behind groups - 1 rows of zeros. */
static void transform_gradients(const float *g, ptrdiff_t n, ptrdiff_t filters, struct sizes s, float *z) {
    const ptrdiff_t plane = s.all * filters;
    for (ptrdiff_t p = 0; p < POINTS; p++) zero(z + p * plane, (s.groups - 1) * filters);
    for (ptrdiff_t w = 0; w < n; w++)
        for (ptrdiff_t j = 0; j < s.rows; j++) {
            const float *from = g + (w * s.after + STEP * j) * filters;
            const ptrdiff_t left = s.after - STEP * j;
            float *to = z + (s.groups - 1 + w * s.rows + j) * filters;
            for (ptrdiff_t f = 0; f < filters; f += LANES, to += LANES) {
                vector d[STEP];
                UNROLL for (int k = 0; k < STEP; k++) d[k] = k < left ? load(from + k * filters + f) : (vector){0};
                store(to, d[0]);
                store(to + plane, d[0] + d[1] + d[2]);
                store(to + 2 * plane, d[0] - d[1] + d[2]);
                store(to + 3 * plane, d[0] + 2 * d[1] + 4 * d[2]);
                store(to + 4 * plane, d[2]);
            }
        }
}

void winograd_convolve_backward(const float *x, const float *g, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs,
                                const float *weight, ptrdiff_t taps, ptrdiff_t filters, float *scratch, float *by_x,
                                float *by_weight) {
    const ptrdiff_t groups = taps / STEP, depth = groups * inputs;
    float *by = scratch, *by_points = by + POINTS * depth * filters, *samples = by_points + POINTS * depth * filters;
    if (by_x) weights_for_gradients(weight, inputs, groups, filters, by);
    for (ptrdiff_t first = 0; first < n; first += WINDOWS) {
        const ptrdiff_t count = smaller(n - first, WINDOWS);
        const struct sizes s = sizes_of(count, time, taps);
        const ptrdiff_t rows = count * s.rows;
        float *results = samples + POINTS * s.all * inputs, *by_samples = results + POINTS * s.all * filters;
        transform_samples(x + first * time * inputs, count, time, inputs, s, samples);
        transform_gradients(g + first * s.after * filters, count, filters, s, results);
        for (ptrdiff_t p = 0; p < POINTS; p++)
            turned_product(samples + p * s.all * inputs, inputs, depth, results + (p * s.all + groups - 1) * filters,
                           filters, rows, by_points + p * depth * filters, first > 0);
        if (!by_x) continue;
        for (ptrdiff_t p = 0; p < POINTS; p++)
            product(results + p * s.all * filters, filters, rows, by + p * depth * filters, inputs, groups * filters,
                    by_samples + p * rows * inputs, NULL);
        samples_from(by_samples, count, time, inputs, s, by_x + first * time * inputs);
    }
    weights_from_points(by_points, inputs, groups, filters, by_weight);
}
