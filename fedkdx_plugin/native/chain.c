/* Layers one after the other, forward and backward, in one call each way. */

#include "layers.h"
#include "vectors.h"

#define MOST 32 /* layers */

enum kind { CONVOLUTION_BLOCK, FLATTEN, DENSE, DENSE_RELU };

/* A layer, as chain.py describes it. A block is a convolution, batch norm, ReLU, and pooling of two; scale, shift and
   what is not of a convolution or dense layer belong to its norm. */
struct layer {
    ptrdiff_t kind, inputs, outputs, taps;
    double eps, momentum;
    const float *weight, *bias, *scale, *shift;
    float *running_mean, *running_var;
    long long *batches;
};

/* Samples that come into a layer, those that its convolution leaves, and where its values lie in what is kept. */
struct place {
    ptrdiff_t time, after, convolved, mean, rstd, out;
};

/* Numbers of values: kept for backward, at work in a convolution, and of the largest gradient. */
struct rooms {
    ptrdiff_t kept, convolution, gradient;
};

static ptrdiff_t aligned(ptrdiff_t values) { return (values + BLOCK - 1) / BLOCK * BLOCK; }

static ptrdiff_t taken(ptrdiff_t *end, ptrdiff_t values) {
    const ptrdiff_t from = *end;
    *end += aligned(values);
    return from;
}

static void at_least(ptrdiff_t *most, ptrdiff_t values) {
    if (aligned(values) > *most) *most = aligned(values);
}

static ptrdiff_t parameters(const struct layer *l) {
    return l->kind == CONVOLUTION_BLOCK ? 4 : l->kind == FLATTEN ? 0 : 2;
}

static int by_winograd(const struct layer *l, ptrdiff_t n, ptrdiff_t time) {
    return winograd_takes(n, time, l->inputs, l->taps);
}

/* Rows of zeros that a convolution's backward wants around each window's gradient. */
static ptrdiff_t margin(const struct layer *l, ptrdiff_t n, ptrdiff_t time) {
    return by_winograd(l, n, time) ? 0 : l->taps - 1;
}

static ptrdiff_t convolution_scratch(const struct layer *l, ptrdiff_t n, ptrdiff_t time) {
    return by_winograd(l, n, time) ? winograd_scratch(n, time, l->inputs, l->taps, l->outputs)
                                   : l->taps * l->inputs * l->outputs;
}

/* Values of a layer's result. */
static ptrdiff_t size_of(const struct layer *l, ptrdiff_t n, const struct place *p) {
    if (l->kind == CONVOLUTION_BLOCK) return n * (p->after / 2) * l->outputs;
    return n * (l->kind == FLATTEN ? p->time * l->inputs : l->outputs);
}

static struct rooms lay_out(const struct layer *layers, ptrdiff_t count, ptrdiff_t n, ptrdiff_t time,
                            struct place *places) {
    struct rooms rooms = {0};
    for (ptrdiff_t k = 0; k < count; k++) {
        const struct layer *l = &layers[k];
        struct place *p = &places[k];
        *p = (struct place){.time = time, .after = time - l->taps + 1};
        if (l->kind == CONVOLUTION_BLOCK) {
            p->convolved = taken(&rooms.kept, n * p->after * l->outputs);
            p->mean = taken(&rooms.kept, l->outputs);
            p->rstd = taken(&rooms.kept, l->outputs);
            at_least(&rooms.convolution, convolution_scratch(l, n, time));
            at_least(&rooms.gradient, n * (p->after + 2 * margin(l, n, time)) * l->outputs);
        }
        p->out = taken(&rooms.kept, size_of(l, n, p));
        at_least(&rooms.gradient, size_of(l, n, p));
        time = l->kind == CONVOLUTION_BLOCK ? p->after / 2 : 1;
    }
    return rooms;
}

/* Values that forward keeps for backward, and those that either needs while it is at work. */
void chain_sizes(const struct layer *layers, ptrdiff_t count, ptrdiff_t n, ptrdiff_t time, ptrdiff_t *kept,
                 ptrdiff_t *scratch) {
    struct place places[MOST];
    const struct rooms rooms = lay_out(layers, count, n, time, places);
    *kept = rooms.kept;
    *scratch = rooms.convolution + 3 * rooms.gradient;
}

/* (n, rows, columns) -> (n, columns, rows) */
static void turn(const float *from, ptrdiff_t n, ptrdiff_t rows, ptrdiff_t columns, float *to) {
    for (ptrdiff_t w = 0; w < n; w++, from += rows * columns, to += rows * columns)
        for (ptrdiff_t c = 0; c < columns; c++)
            for (ptrdiff_t r = 0; r < rows; r++) to[c * rows + r] = from[r * columns + c];
}

/* x (n, time, inputs), or (n, inputs) with time = 1 where the first layer is dense -> the results of layer `inner`, if
   that is one, and of the last one. */
void chain_forward(const struct layer *layers, ptrdiff_t count, const float *x, ptrdiff_t n, ptrdiff_t time,
                   float *kept, float *scratch, ptrdiff_t inner, float *between, float *out) {
    struct place places[MOST];
    lay_out(layers, count, n, time, places);
    for (ptrdiff_t k = 0; k < count; k++) {
        const struct layer *l = &layers[k];
        const struct place *p = &places[k];
        float *result = k + 1 == count ? out : k == inner ? between : kept + p->out;
        if (l->kind == FLATTEN) {
            turn(x, n, p->time, l->inputs, result);
        } else if (l->kind != CONVOLUTION_BLOCK) {
            dense(x, n, l->inputs, l->weight, l->bias, l->outputs, l->kind == DENSE_RELU, result);
        } else {
            float *convolved = kept + p->convolved;
            if (by_winograd(l, n, p->time))
                winograd_convolve(x, n, p->time, l->inputs, l->weight, l->bias, l->taps, l->outputs, scratch, convolved);
            else
                convolve(x, n, p->time, l->inputs, l->weight, l->bias, l->taps, l->outputs, scratch, convolved);
            norm_relu_pool(convolved, n, p->after, l->outputs, l->scale, l->shift, l->eps, l->momentum, l->running_mean,
                           l->running_var, kept + p->mean, kept + p->rstd, result);
            ++*l->batches;
        }
        x = result;
    }
}

/* Gradients by a block's weight, bias, scale and shift, and by what came in unless by_x is NULL. */
static void block_backward(const struct layer *l, const struct place *p, const float *x, const float *g, ptrdiff_t n,
                           const float *kept, float *scratch, float *by_convolved, float *const *by, float *by_x) {
    norm_relu_pool_backward(kept + p->convolved, g, n, p->after, l->outputs, l->scale, l->shift, kept + p->mean,
                            kept + p->rstd, margin(l, n, p->time), by_convolved, by[2], by[3]);
    /* batch norm takes its input's mean away: no constant that is added before it can be felt */
    for (ptrdiff_t f = 0; f < l->outputs; f++) by[1][f] = 0;
    if (by_winograd(l, n, p->time))
        winograd_convolve_backward(x, by_convolved, n, p->time, l->inputs, l->weight, l->taps, l->outputs, scratch, by_x,
                                   by[0]);
    else
        convolve_backward(x, by_convolved, n, p->time, l->inputs, l->weight, l->taps, l->outputs, scratch, by_x, by[0]);
}

/* Gradients by all parameters, in the layers' order, and by x unless by_x is NULL, from those by the two results; that
   by the inner one may be NULL. */
void chain_backward(const struct layer *layers, ptrdiff_t count, const float *x, ptrdiff_t n, ptrdiff_t time,
                    const float *kept, float *scratch, ptrdiff_t inner, const float *between, const float *by_between,
                    const float *out, const float *by_out, float *const *by, float *by_x) {
    struct place places[MOST];
    const struct rooms rooms = lay_out(layers, count, n, time, places);
    float *at_work = scratch + rooms.convolution, *apart[] = {at_work + rooms.gradient, at_work + 2 * rooms.gradient};
    const float *result = out, *g = by_out;
    for (ptrdiff_t k = 0; k < count; k++) by += parameters(&layers[k]);
    for (ptrdiff_t k = count - 1; k >= 0; k--) {
        const struct layer *l = &layers[k];
        const float *in = k == 0 ? x : k - 1 == inner ? between : kept + places[k - 1].out;
        float *by_in = k ? apart[k % 2] : by_x;
        by -= parameters(l);
        if (l->kind == FLATTEN) {
            if (by_in) turn(g, n, l->inputs, places[k].time, by_in);
        } else if (l->kind == CONVOLUTION_BLOCK) {
            block_backward(l, &places[k], in, g, n, kept, scratch, at_work, by, by_in);
        } else {
            dense_backward(in, result, g, n, l->inputs, l->weight, l->outputs, l->kind == DENSE_RELU, at_work, by_in,
                           by[0], by[1]);
        }
        if (k && k - 1 == inner && by_between)
            for (ptrdiff_t i = 0; i < size_of(&layers[inner], n, &places[inner]); i++) by_in[i] += by_between[i];
        result = in, g = by_in;
    }
}
