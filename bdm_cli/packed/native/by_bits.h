/* A path whose parts are written separately: 1-bit, 2..8-bit and real activations. */
#ifndef BDM_BY_BITS_H
#define BDM_BY_BITS_H

#include "bdm.h"

/* Defines the path bdm_<path>; `one`, `few`, `real` are addresses of paths. */
#define BDM_BY_BITS(path, one, few, real) \
    static const bdm_path *part(const bdm_shape *s) { return s->bits == 1 ? (one) : s->bits == 32 ? (real) : (few); } \
    static size_t any_size(const bdm_shape *s) { return part(s)->arranged_size(s); } \
    static void any_arrange(const bdm_shape *s, const uint8_t *bits, uint8_t *to) { part(s)->arrange(s, bits, to); } \
    static int any_convolve(const bdm_shape *s, const bdm_input *input, const float *x, const uint8_t *arranged, \
                            const float *sigma, const float *bias, float *y, int threads) { \
        return part(s)->convolve(s, input, x, arranged, sigma, bias, y, threads); \
    } \
    const bdm_path bdm_##path = {#path, usable, any_size, any_arrange, any_convolve};

#endif
