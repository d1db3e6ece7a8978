/* A step of plain SGD with the gradient's norm bounded. */

#include <math.h>
#include <stddef.h>

#define VALUES 4096 /* squares added up in float before they go into a double */
#define SIDE_BY_SIDE 64

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
