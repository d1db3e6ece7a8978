/* Products of matrices. Rows of a begin `stride` values apart, and may overlap; b and out have `columns`, a multiple of
   BLOCK. */

#pragma once

#include <stddef.h>

/* out (rows, columns) = a b, plus the same `bias` in each row unless that is NULL. */
void product(const float *a, ptrdiff_t stride, ptrdiff_t rows, const float *b, ptrdiff_t columns, ptrdiff_t depth,
             float *out, const float *bias);

/* out (rows, columns) = the transpose of a, times b; added to what is there, if so. */
void turned_product(const float *a, ptrdiff_t stride, ptrdiff_t rows, const float *b, ptrdiff_t columns,
                    ptrdiff_t depth, float *out, int added);
