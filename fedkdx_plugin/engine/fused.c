/* What a training step does to memory beside its products, in as few passes as it takes. Plain C that compilers turn
   into vector instructions: channels lie innermost, and every inner loop runs over them. See fused.py. */

#include <math.h>
#include <stddef.h>

#define ROWS 64      /* added up in float before they go into a double */
#define VALUES 4096  /* the same for squares */
#define SIDE_BY_SIDE 64

/* Batch norm by the statistics of x, ReLU, and the larger of two neighbours in time.

   x (n, time, channels) -> out (n, time / 2, channels); mean, rstd = 1 / sqrt(var + eps) and var (biased) of each channel. */
void norm_relu_pool(const float *restrict x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t channels,
                    const float *restrict weight, const float *restrict bias, double eps, float *restrict mean,
                    float *restrict rstd, float *restrict var, float *restrict out) {
    const ptrdiff_t rows = n * time, half = time / 2;
    double sum[channels];
    float part[channels], scale[channels], shift[channels];

    for (ptrdiff_t c = 0; c < channels; c++) sum[c] = 0;
    for (ptrdiff_t start = 0; start < rows; start += ROWS) {
        const ptrdiff_t end = start + ROWS < rows ? start + ROWS : rows;
        for (ptrdiff_t c = 0; c < channels; c++) part[c] = 0;
        for (ptrdiff_t r = start; r < end; r++)
            for (ptrdiff_t c = 0; c < channels; c++) part[c] += x[r * channels + c];
        for (ptrdiff_t c = 0; c < channels; c++) sum[c] += part[c];
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        mean[c] = sum[c] / rows;
        sum[c] = 0;
    }
    for (ptrdiff_t start = 0; start < rows; start += ROWS) {
        const ptrdiff_t end = start + ROWS < rows ? start + ROWS : rows;
        for (ptrdiff_t c = 0; c < channels; c++) part[c] = 0;
        for (ptrdiff_t r = start; r < end; r++)
            for (ptrdiff_t c = 0; c < channels; c++) {
                const float apart = x[r * channels + c] - mean[c];
                part[c] += apart * apart;
            }
        for (ptrdiff_t c = 0; c < channels; c++) sum[c] += part[c];
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        var[c] = sum[c] / rows;
        rstd[c] = 1 / sqrt(sum[c] / rows + eps);
        scale[c] = rstd[c] * weight[c];
        shift[c] = bias[c] - mean[c] * scale[c];
    }
    for (ptrdiff_t w = 0; w < n; w++)
        for (ptrdiff_t t = 0; t < half; t++) {
            const float *restrict first = x + (w * time + 2 * t) * channels, *restrict second = first + channels;
            float *restrict to = out + (w * half + t) * channels;
            for (ptrdiff_t c = 0; c < channels; c++) {
                const float u = first[c] * scale[c] + shift[c], v = second[c] * scale[c] + shift[c];
                const float larger = u >= v ? u : v;
                to[c] = larger <= 0 ? 0 : larger; /* NaN stays NaN */
            }
        }
}

/* Gradients by x, weight and bias of the above, from that by out (g). A gradient goes to the larger of two neighbours,
   to the first of equal ones, to none where ReLU cuts. Where G is what arrives at batch norm's output and x^ its
   normalised input, the one by x is scale * (G - mean(G) - x^ mean(G x^)). */
void norm_relu_pool_backward(const float *restrict x, const float *restrict g, ptrdiff_t n, ptrdiff_t time,
                             ptrdiff_t channels, const float *restrict weight, const float *restrict bias,
                             const float *restrict mean, const float *restrict rstd, float *restrict by_x,
                             float *restrict by_weight, float *restrict by_bias) {
    const ptrdiff_t rows = n * time, half = time / 2;
    double sum[channels], sum_apart[channels]; /* of G, of G (x - mean) */
    float part[channels], part_apart[channels], scale[channels], shift[channels], constant[channels], slope[channels];

    for (ptrdiff_t c = 0; c < channels; c++) {
        scale[c] = rstd[c] * weight[c];
        shift[c] = bias[c] - mean[c] * scale[c];
        sum[c] = sum_apart[c] = 0;
    }
    for (ptrdiff_t w = 0; w < n; w++) {
        for (ptrdiff_t c = 0; c < channels; c++) part[c] = part_apart[c] = 0;
        for (ptrdiff_t t = 0; t < half; t++) {
            const float *restrict first = x + (w * time + 2 * t) * channels, *restrict second = first + channels;
            const float *restrict arrives = g + (w * half + t) * channels;
            for (ptrdiff_t c = 0; c < channels; c++) {
                const float u = first[c] * scale[c] + shift[c], v = second[c] * scale[c] + shift[c];
                const float larger = u >= v ? u : v, from = u >= v ? first[c] : second[c];
                const float passed = larger <= 0 ? 0 : arrives[c];
                part[c] += passed;
                part_apart[c] += passed * (from - mean[c]);
            }
        }
        for (ptrdiff_t c = 0; c < channels; c++) {
            sum[c] += part[c];
            sum_apart[c] += part_apart[c];
        }
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        by_weight[c] = sum_apart[c] * rstd[c];
        by_bias[c] = sum[c];
        slope[c] = scale[c] * (sum_apart[c] * rstd[c] * rstd[c] / rows);
        constant[c] = scale[c] * (sum[c] / rows) - slope[c] * mean[c];
    }
    for (ptrdiff_t w = 0; w < n; w++) {
        for (ptrdiff_t t = 0; t < half; t++) {
            const ptrdiff_t place = (w * time + 2 * t) * channels;
            const float *restrict first = x + place, *restrict second = first + channels;
            const float *restrict arrives = g + (w * half + t) * channels;
            float *restrict to_first = by_x + place, *restrict to_second = to_first + channels;
            for (ptrdiff_t c = 0; c < channels; c++) {
                const float u = first[c] * scale[c] + shift[c], v = second[c] * scale[c] + shift[c];
                const float passed = arrives[c] * scale[c];
                to_first[c] = ((u >= v) & !(u <= 0) ? passed : 0) - constant[c] - slope[c] * first[c];
                to_second[c] = (!(u >= v) & !(v <= 0) ? passed : 0) - constant[c] - slope[c] * second[c];
            }
        }
        if (time % 2) { /* the last one has no neighbour */
            const ptrdiff_t place = (w * time + time - 1) * channels;
            for (ptrdiff_t c = 0; c < channels; c++) by_x[place + c] = -constant[c] - slope[c] * x[place + c];
        }
    }
}

static double sum_of_squares(const float *restrict values, ptrdiff_t size) {
    double sum = 0;
    for (ptrdiff_t start = 0; start < size; start += VALUES) {
        const ptrdiff_t end = start + VALUES < size ? start + VALUES : size;
        float part[SIDE_BY_SIDE] = {0};
        ptrdiff_t i = start;
        for (; i + SIDE_BY_SIDE <= end; i += SIDE_BY_SIDE)
            for (ptrdiff_t k = 0; k < SIDE_BY_SIDE; k++) part[k] += values[i + k] * values[i + k];
        for (; i < end; i++) part[0] += values[i] * values[i];
        for (ptrdiff_t k = 0; k < SIDE_BY_SIDE; k++) sum += part[k];
    }
    return sum;
}

/* parameter -= rate * gradient for each of count tensors of a network, where the norm of all gradients together is
   first brought down to bound (0: left as it is). A tensor whose gradient is NULL stays. */
void clip_and_move(ptrdiff_t count, float *const *parameters, const float *const *gradients, const ptrdiff_t *sizes,
                   double bound, double rate) {
    double factor = 1;
    if (bound > 0) {
        double sum = 0;
        for (ptrdiff_t i = 0; i < count; i++)
            if (gradients[i]) sum += sum_of_squares(gradients[i], sizes[i]);
        factor = bound / (sqrt(sum) + 1e-6);
        if (factor > 1) factor = 1; /* NaN stays NaN */
    }
    const float by = rate * factor;
    for (ptrdiff_t i = 0; i < count; i++) {
        if (!gradients[i]) continue;
        float *restrict parameter = parameters[i];
        const float *restrict gradient = gradients[i];
        for (ptrdiff_t k = 0; k < sizes[i]; k++) parameter[k] -= by * gradient[k];
    }
}
