/* Fully connected layers, with or without ReLU. */

#include "layers.h"
#include "products.h"
#include "vectors.h"

#define ROWS 4
#define OUTPUTS (LANES / ROWS)

/* Lane l: the sum of vector l's lanes. A step adds each lane to one `half` lanes away and makes one of two vectors. */
INLINE vector sums_of_lanes(vector v[LANES]) {
    UNROLL for (int half = LANES / 2; half; half /= 2) {
        mask same = {0}, other = {0};
        UNROLL for (int l = 0; l < LANES; l++) {
            same[l] = l & half ? LANES + l : l;
            other[l] = l & half ? LANES + l - half : l + half;
        }
        UNROLL for (int k = 0; k < half; k++)
            v[k] = shuffled(v[k], v[k + half], same) + shuffled(v[k], v[k + half], other);
    }
    return v[0];
}

/* r rows of x times c rows of weight, both read along what is added up. */
INLINE void dots(const int r, const int c, const float *x, ptrdiff_t inputs, const float *weight, const float *bias,
                 int relu, float *out, ptrdiff_t outputs) {
    vector sum[LANES];
    UNROLL for (int k = 0; k < LANES; k++) sum[k] = (vector){0};
    for (ptrdiff_t k = 0; k < inputs; k += LANES) {
        vector right[OUTPUTS];
        UNROLL for (int j = 0; j < c; j++) right[j] = load(weight + j * inputs + k);
        UNROLL for (int i = 0; i < r; i++) {
            const vector left = load(x + i * inputs + k);
            UNROLL for (int j = 0; j < c; j++) sum[i * OUTPUTS + j] += left * right[j];
        }
    }
    float totals[LANES];
    store(totals, sums_of_lanes(sum));
    UNROLL for (int i = 0; i < r; i++)
        UNROLL for (int j = 0; j < c; j++) {
            const float value = totals[i * OUTPUTS + j] + bias[j];
            out[i * outputs + j] = relu && value <= 0 ? 0 : value; /* NaN stays NaN */
        }
}

/* x (n, inputs), weight (outputs, inputs) -> out (n, outputs); inputs are a multiple of BLOCK. */
void dense(const float *x, ptrdiff_t n, ptrdiff_t inputs, const float *weight, const float *bias, ptrdiff_t outputs,
           int relu, float *out) {
    for (ptrdiff_t j = 0, c; j < outputs; j += c) {
        c = outputs - j < OUTPUTS ? 1 : OUTPUTS;
        for (ptrdiff_t i = 0, r; i < n; i += r) {
            r = n - i < ROWS ? 1 : ROWS;
            const float *from = x + i * inputs, *by = weight + j * inputs;
            float *to = out + i * outputs + j;
            if (r == ROWS && c == OUTPUTS) dots(ROWS, OUTPUTS, from, inputs, by, bias + j, relu, to, outputs);
            else if (r == ROWS) dots(ROWS, 1, from, inputs, by, bias + j, relu, to, outputs);
            else if (c == OUTPUTS) dots(1, OUTPUTS, from, inputs, by, bias + j, relu, to, outputs);
            else dots(1, 1, from, inputs, by, bias + j, relu, to, outputs);
        }
    }
}

/* Gradients by weight, bias, and x unless by_x is NULL, from that by out, g (n, outputs), for which `masked` has room. */
void dense_backward(const float *x, const float *out, const float *g, ptrdiff_t n, ptrdiff_t inputs,
                    const float *weight, ptrdiff_t outputs, int relu, float *masked, float *by_x, float *by_weight,
                    float *by_bias) {
    for (ptrdiff_t k = 0; relu && k < n * outputs; k++) masked[k] = out[k] <= 0 ? 0 : g[k];
    if (relu) g = masked;
    for (ptrdiff_t j = 0; j < outputs; j++) by_bias[j] = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < outputs; j++) by_bias[j] += g[i * outputs + j];
    turned_product(g, outputs, outputs, x, inputs, n, by_weight, 0);
    if (by_x) product(g, outputs, n, weight, inputs, outputs, by_x, NULL);
}
