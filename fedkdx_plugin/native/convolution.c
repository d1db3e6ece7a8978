/* Convolutions along time as products of matrices. */

#include "layers.h"
#include "products.h"

/* Convolution along time (n, time, inputs), weight (filters, taps, inputs) -> out (n, time - taps + 1, filters).
   What a filter sees at a time lies in one piece of memory, so that it is a product with the weights turned round,
   (taps, inputs, filters), which `turned` has room for. */
void convolve(const float *x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, const float *weight, const float *bias,
              ptrdiff_t taps, ptrdiff_t filters, float *turned, float *out) {
    const ptrdiff_t depth = taps * inputs, after = time - taps + 1;
    for (ptrdiff_t k = 0; k < depth; k++)
        for (ptrdiff_t f = 0; f < filters; f++) turned[k * filters + f] = weight[f * depth + k];
    for (ptrdiff_t w = 0; w < n; w++)
        product(x + w * time * inputs, inputs, after, turned, filters, depth, out + w * after * filters, bias);
}

/* Its gradients by weight, and by x unless by_x is NULL, from that by out: g (n, time + taps - 1, filters), each window
   with taps - 1 rows of zeros before and after. `turned` has room for the weights. */
void convolve_backward(const float *x, const float *g, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs,
                       const float *weight, ptrdiff_t taps, ptrdiff_t filters, float *turned, float *by_x,
                       float *by_weight) {
    const ptrdiff_t depth = taps * inputs, after = time - taps + 1, padded = time + taps - 1;
    for (ptrdiff_t k = 0; k < depth * filters; k++) turned[k] = 0;
    for (ptrdiff_t w = 0; w < n; w++)
        turned_product(x + w * time * inputs, inputs, depth, g + (w * padded + taps - 1) * filters, filters, after,
                           turned, 1);
    for (ptrdiff_t f = 0; f < filters; f++)
        for (ptrdiff_t k = 0; k < depth; k++) by_weight[f * depth + k] = turned[k * filters + f];
    if (!by_x) return;
    for (ptrdiff_t k = 0; k < taps; k++) /* the last tap first */
        for (ptrdiff_t f = 0; f < filters; f++)
            for (ptrdiff_t i = 0; i < inputs; i++)
                turned[(k * filters + f) * inputs + i] = weight[(f * taps + taps - 1 - k) * inputs + i];
    for (ptrdiff_t w = 0; w < n; w++)
        product(g + w * padded * filters, filters, time, turned, inputs, taps * filters, by_x + w * time * inputs, NULL);
}
