/* Real activations (bits = 32): y = sigma * sum of +-x + bias, in C that is the same for every processor. The including
   file defines LANES, the floats of its vectors.

   Weights stay bits; those of a block of BLOCK output channels are expanded to +-1.0f while it is computed, as
   [tap][channel][BLOCK], so that a product is the change of a sign. The image is copied once, channels last and with
   its border of zeros: then every window is kh runs of kw * c neighbouring numbers. */
#ifndef BDM_REAL_H
#define BDM_REAL_H

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "bdm.h"

#define BLOCK (2 * LANES) /* output channels, and */
#define ACROSS 4          /* neighbouring output pixels whose sums are held in registers */

typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* f(gain x + shift) */
static inline float before(const bdm_input *input, size_t channel, float x) {
    if (!input->gain) return x;
    x = x * input->gain[channel] + input->shift[channel];
    return input->silu ? x / (1.0f + expf(-x)) : x;
}

/* Number `at` of y, of image n and channel k: plus its bias, plus the residual, in this order. */
static inline float after(const bdm_shape *s, const bdm_input *input, const float *bias, size_t n, int k, size_t at,
                          float y) {
    if (bias) y += bias[input->bias_per_image ? n * s->k + k : (size_t)k];
    return input->residual ? y + input->residual[at] : y;
}

static inline size_t real_blocks(const bdm_shape *s) { return ((size_t)s->k + BLOCK - 1) / BLOCK; }

/* uint16_t [blocks][kh][kw][c]: bit i is set where w of output channel block * BLOCK + i is +1. */
static size_t real_size(const bdm_shape *s) { return real_blocks(s) * s->kh * s->kw * s->c * sizeof(uint16_t); }

static void real_arrange(const bdm_shape *s, const uint8_t *bits, uint8_t *arranged) {
    uint16_t *to = (uint16_t *)arranged;
    for (size_t block = 0; block < real_blocks(s); block++)
        for (int tap = 0; tap < s->kh * s->kw; tap++)
            for (int c = 0; c < s->c; c++, to++) {
                *to = 0;
                for (int i = 0; i < BLOCK && (int)block * BLOCK + i < s->k; i++)
                    *to |= (uint16_t)(bdm_bit(bits, s, (int)block * BLOCK + i, c, tap) << i);
            }
}

/* sums[p][i] = the sum over `rows` runs of `length` numbers of x[p * next] w[i]; runs of x are row_size apart. */
__attribute__((noinline)) static void real_sums(const float *x, size_t next, size_t row_size, int rows, int length,
                                                const float *w, float sums[ACROSS][BLOCK]) {
    lanes sum[ACROSS][2] = {{{0}}};
    for (int row = 0; row < rows; row++)
        for (const float *at = x + row * row_size, *end = at + length; at < end; at++, w += BLOCK) {
            const lanes first = *(const lanes *)w, second = *(const lanes *)(w + LANES);
            for (int p = 0; p < ACROSS; p++) {
                sum[p][0] += at[p * next] * first;
                sum[p][1] += at[p * next] * second;
            }
        }
    memcpy(sums, sum, sizeof sum);
}

static int real_convolve(const bdm_shape *s, const bdm_input *input, const float *x, const uint8_t *arranged,
                         const float *sigma, const float *bias, float *y, int threads) {
    const int out_h = bdm_out(s->h, s->kh, s->sh, s->ph), out_w = bdm_out(s->w, s->kw, s->sw, s->pw);
    const int height = s->h + 2 * s->ph, width = s->w + 2 * s->pw, blocks = (int)real_blocks(s);
    const int length = s->kw * s->c, window = s->kh * length;
    const size_t row_size = (size_t)width * s->c, size = row_size * height;
    /* The last tile of a row reads ACROSS - 1 windows further. */
    float *image = malloc((size * s->n + (size_t)ACROSS * s->sw * s->c) * sizeof(float));
    float *expanded = malloc((size_t)threads * window * BLOCK * sizeof(float));
    if (!image || !expanded) {
        free(image), free(expanded);
        return BDM_NO_MEMORY;
    }
    memset(image + size * s->n, 0, (size_t)ACROSS * s->sw * s->c * sizeof(float));
    const size_t plane = (size_t)s->h * s->w;
    if ((double)s->n * out_h * out_w * s->k * window < 20e6) threads = 1;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (int line = 0; line < s->n * height; line++) {
        const int n = line / height, row = line % height - s->ph;
        float *to = image + line * row_size;
        memset(to, 0, row_size * sizeof(float));
        if (row < 0 || row >= s->h) continue;
        to += (size_t)s->pw * s->c;
        for (int column = 0; column < s->w; column++)
            for (int c = 0; c < s->c; c++) {
                const size_t pixel = (size_t)row * s->w + column;
                const size_t at = s->channels_last ? pixel * s->c + c : c * plane + pixel;
                *to++ = before(input, (size_t)n * s->c + c, x[(size_t)n * s->c * plane + at]);
            }
    }
    const size_t out_plane = (size_t)out_h * out_w;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
    for (int part = 0; part < threads; part++) {
        float *w = expanded + (size_t)part * window * BLOCK;
        for (int block = part; block < blocks; block += threads) {
            const uint16_t *word = (const uint16_t *)arranged + (size_t)block * window;
            for (int at = 0; at < window; at++)
                for (int i = 0; i < BLOCK; i++) w[at * BLOCK + i] = word[at] >> i & 1 ? 1.0f : -1.0f;
            const int count = s->k - block * BLOCK < BLOCK ? s->k - block * BLOCK : BLOCK;
            for (size_t line = 0; line < (size_t)s->n * out_h; line++) {
                const size_t n = line / out_h, row = line % out_h;
                for (int left = 0; left < out_w; left += ACROSS) {
                    float sums[ACROSS][BLOCK];
                    real_sums(image + n * size + row * s->sh * row_size + (size_t)left * s->sw * s->c,
                              (size_t)s->sw * s->c, row_size, s->kh, length, w, sums);
                    for (int p = 0; p < ACROSS && left + p < out_w; p++) {
                        const size_t pixel = row * out_w + left + p;
                        for (int i = 0; i < count; i++) {
                            const int k = block * BLOCK + i;
                            const size_t own = s->channels_last ? pixel * s->k + k : k * out_plane + pixel;
                            const size_t at = n * s->k * out_plane + own;
                            y[at] = after(s, input, bias, n, k, at, sums[p][i] * sigma[k]);
                        }
                    }
                }
            }
        }
    }
    free(image), free(expanded);
    return BDM_OK;
}

#endif
