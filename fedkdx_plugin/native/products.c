/* Products of matrices whose sums stay in registers: close to what a processor can do. */

#include "products.h"
#include "vectors.h"

/* A tile of a product, out (r, c vectors) = start + a b, its sums in registers: r and c are known to the compiler.
   Row i of a lies at a + i * stride; where a is `turned`, row i of its transpose does. */
INLINE void tile(const int turned, const int r, const int c, const float *a, ptrdiff_t stride, const float *b,
                 ptrdiff_t columns, ptrdiff_t depth, float *out, const float *start, ptrdiff_t start_stride) {
    vector sum[12][4], right[4];
    UNROLL for (int i = 0; i < r; i++)
        UNROLL for (int j = 0; j < c; j++)
            sum[i][j] = start ? load(start + i * start_stride + j * LANES) : (vector){0};
    for (ptrdiff_t k = 0; k < depth; k++) {
        UNROLL for (int j = 0; j < c; j++) right[j] = load(b + k * columns + j * LANES);
        UNROLL for (int i = 0; i < r; i++) {
            const float left = turned ? a[k * stride + i] : a[i * stride + k];
            UNROLL for (int j = 0; j < c; j++) sum[i][j] += left * right[j];
        }
    }
    UNROLL for (int i = 0; i < r; i++)
        UNROLL for (int j = 0; j < c; j++) store(out + i * columns + j * LANES, sum[i][j]);
}

/* Tiles have as many sums as there are registers for. */
#define TILE(r, c) case r: tile(turned, r, c, a, stride, b, columns, depth, out, start, start_stride); break;
#define UP_TO_6(c) TILE(1, c) TILE(2, c) TILE(3, c) TILE(4, c) TILE(5, c) TILE(6, c)
#define UP_TO_12(c) UP_TO_6(c) TILE(7, c) TILE(8, c) TILE(9, c) TILE(10, c) TILE(11, c) TILE(12, c)
#if LANES == 16
#define WIDTH(left) ((left) < 2 * BLOCK ? BLOCK : (left) < 4 * BLOCK ? 2 * BLOCK : 4 * BLOCK)
#define HEIGHT(width) ((width) == 4 * BLOCK ? 6 : 12)
#define TILES(r, width)                                   \
    if ((width) == 4 * BLOCK) switch (r) { UP_TO_6(4) }   \
    else if ((width) == 2 * BLOCK) switch (r) { UP_TO_12(2) } \
    else switch (r) { UP_TO_12(1) }
#else
#define WIDTH(left) BLOCK
#define HEIGHT(width) 6
#define TILES(r, width) switch (r) { UP_TO_6(BLOCK / LANES) }
#endif

INLINE void any_tile(const int turned, ptrdiff_t r, ptrdiff_t width, const float *a, ptrdiff_t stride, const float *b,
                     ptrdiff_t columns, ptrdiff_t depth, float *out, const float *start, ptrdiff_t start_stride) {
    TILES(r, width)
}

INLINE void tiles(const int turned, const float *a, ptrdiff_t stride, ptrdiff_t rows, const float *b, ptrdiff_t columns,
                  ptrdiff_t depth, float *out, const float *start, ptrdiff_t start_stride) {
    for (ptrdiff_t j = 0, width; j < columns; j += width) {
        width = WIDTH(columns - j);
        const ptrdiff_t count = (rows + HEIGHT(width) - 1) / HEIGHT(width);
        for (ptrdiff_t i = 0; i < count; i++) { /* all of about the same height */
            const ptrdiff_t from = rows * i / count, to = rows * (i + 1) / count;
            any_tile(turned, to - from, width, a + from * (turned ? 1 : stride), stride, b + j, columns, depth,
                     out + from * columns + j, start ? start + from * start_stride + j : NULL, start_stride);
        }
    }
}

void product(const float *a, ptrdiff_t stride, ptrdiff_t rows, const float *b, ptrdiff_t columns, ptrdiff_t depth,
             float *out, const float *bias) {
    tiles(0, a, stride, rows, b, columns, depth, out, bias, 0);
}

void turned_product(const float *a, ptrdiff_t stride, ptrdiff_t rows, const float *b, ptrdiff_t columns,
                    ptrdiff_t depth, float *out, int added) {
    tiles(1, a, stride, rows, b, columns, depth, out, added ? out : NULL, columns);
}
