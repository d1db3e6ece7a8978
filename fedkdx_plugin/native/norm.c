/* What follows a convolution, in as few passes over memory as it takes. */

#include <math.h>

#include "vectors.h"

#define ROWS 64 /* added up in float before they go into a double */
#define APART 4 /* sums side by side: an addition need not wait for the last one */

/* Sum over rows of x - centre, or of its squares, for a vector of channels. */
INLINE void sum_of_rows(const int squares, const float *x, ptrdiff_t rows, ptrdiff_t channels, vector centre,
                        double *sum) {
    wide total = {0};
    for (ptrdiff_t start = 0; start < rows; start += ROWS) {
        const ptrdiff_t end = start + ROWS < rows ? start + ROWS : rows;
        vector part[APART] = {0};
        ptrdiff_t r = start;
        for (; r + APART <= end; r += APART)
            UNROLL for (int k = 0; k < APART; k++) {
                vector value = load(x + (r + k) * channels) - centre;
                if (squares) value *= value;
                part[k] += value;
            }
        for (; r < end; r++) {
            vector value = load(x + r * channels) - centre;
            if (squares) value *= value;
            part[0] += value;
        }
        total += __builtin_convertvector((part[0] + part[1]) + (part[2] + part[3]), wide);
    }
    for (int k = 0; k < LANES; k++) sum[k] = total[k];
}

/* Batch norm by the statistics of x, ReLU, and the larger of two neighbours in time.

   x (n, time, channels) -> out (n, time / 2, channels); mean and rstd = 1 / sqrt(var + eps) of each channel.
   The running statistics go `momentum` of the way to those of x, the variance unbiased. */
void norm_relu_pool(const float *x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t channels, const float *weight,
                    const float *bias, double eps, double momentum, float *running_mean, float *running_var, float *mean,
                    float *rstd, float *out) {
    const ptrdiff_t rows = n * time, half = time / 2;
    for (ptrdiff_t c = 0; c < channels; c += LANES) {
        double sum[LANES], squares[LANES];
        sum_of_rows(0, x + c, rows, channels, (vector){0}, sum);
        for (int k = 0; k < LANES; k++) mean[c + k] = sum[k] / rows;
        sum_of_rows(1, x + c, rows, channels, load(mean + c), squares);
        for (int k = 0; k < LANES; k++) {
            rstd[c + k] = 1 / sqrt(squares[k] / rows + eps);
            running_mean[c + k] += momentum * (mean[c + k] - running_mean[c + k]);
            running_var[c + k] += momentum * (squares[k] / (rows - 1) - running_var[c + k]);
        }
        const vector scale = load(rstd + c) * load(weight + c), shift = load(bias + c) - load(mean + c) * scale;
        for (ptrdiff_t w = 0; w < n; w++)
            for (ptrdiff_t t = 0; t < half; t++) {
                const float *first = x + (w * time + 2 * t) * channels + c;
                const vector u = load(first) * scale + shift, v = load(first + channels) * scale + shift;
                const vector larger = either(u >= v, u, v);
                store(out + (w * half + t) * channels + c, where(~(larger <= 0), larger)); /* NaN stays NaN */
            }
    }
}

/* Gradients by x, weight and bias of the above, from that by out (g). A gradient goes to the larger of two neighbours,
   to the first of equal ones, to none where ReLU cuts. Where G is what arrives at batch norm's output and x^ its
   normalised input, the one by x is scale * (G - mean(G) - x^ mean(G x^)). It is laid out with `margin` rows of zeros
   before and after each window. */
void norm_relu_pool_backward(const float *x, const float *g, ptrdiff_t n, ptrdiff_t time, ptrdiff_t channels,
                             const float *weight, const float *bias, const float *mean, const float *rstd,
                             ptrdiff_t margin, float *by_x, float *by_weight, float *by_bias) {
    const ptrdiff_t rows = n * time, half = time / 2, padded = time + 2 * margin;
    for (ptrdiff_t w = 0; w < n; w++)
        for (ptrdiff_t k = 0; k < margin * channels; k++)
            by_x[w * padded * channels + k] = by_x[((w + 1) * padded - margin) * channels + k] = 0;
    for (ptrdiff_t c = 0; c < channels; c += LANES) {
        const vector centre = load(mean + c), scale = load(rstd + c) * load(weight + c);
        const vector shift = load(bias + c) - centre * scale;
        wide sum = {0}, sum_apart = {0}; /* of G, of G (x - mean) */
        for (ptrdiff_t w = 0; w < n; w++) {
            vector part = {0}, part_apart = {0};
            for (ptrdiff_t t = 0; t < half; t++) {
                const float *at = x + (w * time + 2 * t) * channels + c;
                const vector first = load(at), second = load(at + channels);
                const vector u = first * scale + shift, v = second * scale + shift;
                const mask is_first = u >= v;
                const vector passed = where(~(either(is_first, u, v) <= 0), load(g + (w * half + t) * channels + c));
                part += passed;
                part_apart += passed * (either(is_first, first, second) - centre);
            }
            sum += __builtin_convertvector(part, wide);
            sum_apart += __builtin_convertvector(part_apart, wide);
        }
        float constants[LANES], slopes[LANES];
        for (int k = 0; k < LANES; k++) {
            by_weight[c + k] = sum_apart[k] * rstd[c + k];
            by_bias[c + k] = sum[k];
            slopes[k] = scale[k] * (sum_apart[k] * rstd[c + k] * rstd[c + k] / rows);
            constants[k] = scale[k] * (sum[k] / rows) - slopes[k] * mean[c + k];
        }
        const vector constant = load(constants), slope = load(slopes);
        for (ptrdiff_t w = 0; w < n; w++) {
            const float *at = x + w * time * channels + c, *arrives = g + w * half * channels + c;
            float *to = by_x + (w * padded + margin) * channels + c;
            for (ptrdiff_t t = 0; t < half; t++, at += 2 * channels, to += 2 * channels, arrives += channels) {
                const vector first = load(at), second = load(at + channels), passed = load(arrives) * scale;
                const vector u = first * scale + shift, v = second * scale + shift;
                const mask is_first = u >= v;
                store(to, where(is_first & ~(u <= 0), passed) - constant - slope * first);
                store(to + channels, where(~is_first & ~(v <= 0), passed) - constant - slope * second);
            }
            if (time % 2) store(to, -constant - slope * load(at)); /* the last one has no neighbour */
        }
    }
}
