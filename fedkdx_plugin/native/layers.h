/* What layers are made of. Windows lie in memory as (n, time, channels); n is their number. */

#pragma once

#include <stddef.h>

/* convolution.c */
void convolve(const float *x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, const float *weight, const float *bias,
              ptrdiff_t taps, ptrdiff_t filters, float *turned, float *out);
void convolve_backward(const float *x, const float *g, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs,
                       const float *weight, ptrdiff_t taps, ptrdiff_t filters, float *turned, float *by_x,
                       float *by_weight);

/* winograd.c: the same in fewer products, where `winograd_takes` it; g has no zeros around its windows. */
int winograd_takes(ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, ptrdiff_t taps);
ptrdiff_t winograd_scratch(ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, ptrdiff_t taps, ptrdiff_t filters);
void winograd_convolve(const float *x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs, const float *weight,
                       const float *bias, ptrdiff_t taps, ptrdiff_t filters, float *scratch, float *out);
void winograd_convolve_backward(const float *x, const float *g, ptrdiff_t n, ptrdiff_t time, ptrdiff_t inputs,
                                const float *weight, ptrdiff_t taps, ptrdiff_t filters, float *scratch, float *by_x,
                                float *by_weight);

/* norm.c */
void norm_relu_pool(const float *x, ptrdiff_t n, ptrdiff_t time, ptrdiff_t channels, const float *weight,
                    const float *bias, double eps, double momentum, float *running_mean, float *running_var, float *mean,
                    float *rstd, float *out);
void norm_relu_pool_backward(const float *x, const float *g, ptrdiff_t n, ptrdiff_t time, ptrdiff_t channels,
                             const float *weight, const float *bias, const float *mean, const float *rstd,
                             ptrdiff_t margin, float *by_x, float *by_weight, float *by_bias);

/* dense.c */
void dense(const float *x, ptrdiff_t n, ptrdiff_t inputs, const float *weight, const float *bias, ptrdiff_t outputs,
           int relu, float *out);
void dense_backward(const float *x, const float *out, const float *g, ptrdiff_t n, ptrdiff_t inputs,
                    const float *weight, ptrdiff_t outputs, int relu, float *masked, float *by_x, float *by_weight,
                    float *by_bias);
