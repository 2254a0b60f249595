/* Convolutions and matrix products with 1-bit weights on quantized activations: what the files of this folder share.

   y[k] = sigma[k] * step * sum over taps and channels of w[k] * a + bias[k],  w = +-1, a an integer of few bits.
   Activations are held as u = level - lowest level, 0 .. 2^bits - 1, and a = u - zero; for 1 bit a = 2 u - 1.
   With S = the sum of u where w = +1:  sum of w u = 2 S - sum of u.  All sums are exact integers. */
#ifndef BDM_H
#define BDM_H

#include <stdint.h>
#include <stddef.h>

enum { BDM_OK = 0, BDM_NO_MEMORY = 1 };

typedef struct {
    int32_t n, c, h, w;       /* input: images, channels, height, width */
    int32_t k, kh, kw;        /* output channels; height and width of the kernel */
    int32_t sh, sw, ph, pw;   /* strides; zeros on each side */
    int32_t bits;             /* of the activations: 1..8, or 32: real (step is 1, the sums are floats) */
    int32_t zero;             /* u of a real zero (2..8 bits); any integer */
    int32_t channels_last;    /* layout of x and y: 0 = [n, c, h, w], 1 = [n, h, w, c] */
} bdm_shape;

typedef struct {
    float step;               /* of the activations */
    float zero;               /* level = round(x / step + zero), clipped to low .. low + 2^bits - 1; u = level - low */
    float low;
    const float *threshold;   /* 1 bit: u = (x >= threshold[c]); NULL = 0 */
    const float *gain;        /* [n, c], or NULL: x is first replaced by f(gain x + shift), */
    const float *shift;
    int32_t silu;             /* f = SiLU, or the identity */
    int32_t bias_per_image;   /* bias is [n, k] rather than [k] */
    const float *residual;    /* added to y, in its shape and layout; or NULL */
} bdm_input;

/* What each path implements. Weights are arranged once for a path and a shape (n, h, w, layout do not matter). */
typedef struct {
    const char *name;
    int (*usable)(void);
    size_t (*arranged_size)(const bdm_shape *shape);
    void (*arrange)(const bdm_shape *shape, const uint8_t *bits, uint8_t *arranged);
    int (*convolve)(const bdm_shape *shape, const bdm_input *input, const float *x, const uint8_t *arranged,
                    const float *sigma, const float *bias, float *y, int threads);
} bdm_path;

extern const bdm_path *const bdm_paths[]; /* those of this processor's family, the fastest first; ends with NULL */

/* Sign of weight (k, c, tap) in the file's order: bit number c * taps + tap of row k, least significant bit first. */
static inline int bdm_bit(const uint8_t *bits, const bdm_shape *s, int k, int c, int tap) {
    size_t taps = (size_t)s->kh * s->kw, row = ((size_t)s->c * taps + 7) / 8, at = (size_t)c * taps + tap;
    return bits[(size_t)k * row + at / 8] >> (at % 8) & 1;
}

/* a / b, rounded up. */
static inline int up(int a, int b) { return (a + b - 1) / b; }

static inline int bdm_out(int size, int kernel, int stride, int pad) { return (size + 2 * pad - kernel) / stride + 1; }

/* u of the zeros around the image. Where a real zero has no u (1 bit; a zero point out of range), the border is
   corrected: see bdm_corrected. */
static inline int bdm_pad(const bdm_shape *s) {
    int high = (1 << s->bits) - 1;
    return s->bits == 1 ? 0 : s->zero < 0 ? 0 : s->zero > high ? high : s->zero;
}

static inline int bdm_corrected(const bdm_shape *s) {
    return (s->ph || s->pw) && (s->bits == 1 || bdm_pad(s) != s->zero);
}

/* Arranged weights begin with the sums of each output channel's signs, int32 [k], and where the border is corrected, of
   each of its taps, int32 [taps, k]; padded to 64 bytes. */
static inline size_t bdm_sums_size(const bdm_shape *s) {
    size_t per = 1 + (bdm_corrected(s) ? (size_t)s->kh * s->kw : 0);
    return (s->k * per * 4 + 63) / 64 * 64;
}
void bdm_put_sums(const bdm_shape *s, const uint8_t *bits, int32_t *sums);

#endif
