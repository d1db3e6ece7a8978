/* Vectors of floats, with the types of GCC and Clang, which become whatever vectors the processor has. Channels lie
   innermost in memory, so that a vector is some channels of one sample; those who compute have a multiple of BLOCK. */

#pragma once

#include <stddef.h>

#define BLOCK 16
#if defined(__AVX512F__)
#define LANES 16 /* floats in a vector */
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define UNROLL _Pragma("GCC unroll 32")
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int mask __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* of a lane all bits, or none */
typedef double wide __attribute__((vector_size(8 * LANES)));

INLINE vector load(const float *from) { return *(const vector *)from; }
INLINE void store(float *to, vector value) { *(vector *)to = value; }
INLINE vector where(mask is, vector value) { return (vector)((mask)value & is); } /* else 0 */
INLINE vector either(mask is, vector one, vector other) { return (vector)(((mask)one & is) | ((mask)other & ~is)); }

/* Lane l: lane places[l] of one, or of the other where it is LANES or more. `places` are constants. */
INLINE vector shuffled(vector one, vector other, mask places) {
#ifdef __clang__
    vector result = {0};
    UNROLL for (int l = 0; l < LANES; l++) result[l] = places[l] < LANES ? one[places[l]] : other[places[l] - LANES];
    return result;
#else
    return __builtin_shuffle(one, other, places);
#endif
}
