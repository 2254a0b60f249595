/* Everything of the lookups with NEON (64-bit ARM). Included by a file that has defined BINARY (1-bit activations).

   A table holds the 16 subset sums of 4 channels and fills a register. TBL with an index vector looks up 16 of them: 16
   output channels x 4 channels = 64 products in one instruction. BYTES lookups add in bytes, which then widen into 16
   bits: 4 of entries up to 60, or 60 of entries up to 4 (1 bit). */

#include <arm_neon.h>
#include <string.h>
#include "bdm.h"
#include "exp.h"

#define CHANNELS 4
#define TABLE 16
#define PIXELS 8
#define UNIT 16
#define UNIT_INDEX 16
#define PLANE_BITS 4
#define BYTES (BINARY ? 60 : 4)
#define JOIN (BINARY ? 1 : 4)
#define LIMIT (273 * BYTES) /* 273 * 240 <= 65535 */

static inline void put_index(const bdm_shape *s, const uint8_t *bits, int k0, int table, int tap, uint8_t *to) {
    for (int k = 0; k < UNIT && k0 + k < s->k; k++)
        for (int i = 0; i < CHANNELS; i++) {
            int c = table * CHANNELS + i;
            if (c < s->c) to[k] |= (uint8_t)(bdm_bit(bits, s, k0 + k, c, tap) << i);
        }
}

/* The 16 entries are a[e & 3] + b[e >> 2], each over two channels: two lookups of the channels' u and of the sums of
   neighbours. Two tables at a time. */
static void fill_tables(const uint8_t *u, int plane, int planes, int tables, uint8_t *to, size_t stride) {
#define NONE 255 /* gives 0 */
#define LOW(g) NONE, g, g + 1, g + 8
#define HIGH(g) NONE, NONE, NONE, NONE, g, g, g, g, g + 1, g + 1, g + 1, g + 1, g + 8, g + 8, g + 8, g + 8
    static const uint8_t from[2][2][16] = {{{LOW(0), LOW(0), LOW(0), LOW(0)}, {HIGH(2)}},
                                           {{LOW(4), LOW(4), LOW(4), LOW(4)}, {HIGH(6)}}};
    for (int t = 0; t < tables; t += 2) {
        uint8x8_t own = vld1_u8(u + t * CHANNELS); /* byte g: channel g */
        own = plane ? vshr_n_u8(own, 4) : planes > 1 ? vand_u8(own, vdup_n_u8(15)) : own;
        const uint8x8_t pairs = vadd_u8(own, vext_u8(own, vdup_n_u8(0), 1)); /* byte g: channels g and g + 1 */
        const uint8x16_t both = vcombine_u8(own, pairs);
        for (int i = 0; i < 2 && t + i < tables; i++)
            vst1q_u8(to + (size_t)(t + i) * stride, vaddq_u8(vqtbl1q_u8(both, vld1q_u8(from[i][0])),
                                                             vqtbl1q_u8(both, vld1q_u8(from[i][1]))));
    }
}

/* 4 pixels and `units` (1 or 2) times 16 output channels of a block of `width`; indices of neighbouring steps are
   `width` apart. */
static inline __attribute__((always_inline)) void add_steps(int units, const uint8_t *const *points,
                                                            const uint8_t *indices, int steps, size_t left,
                                                            size_t width, uint16_t *sums, int fresh) {
    uint16x8_t sum[4][2][2];
    for (int i = 0; i < 4; i++)
        for (int unit = 0; unit < units; unit++)
            for (int half = 0; half < 2; half++)
                sum[i][unit][half] = fresh ? vdupq_n_u16(0) : vld1q_u16(sums + i * width + unit * UNIT + half * 8);
    for (int step = 0; step < steps; step += BYTES) {
        uint8x16_t bytes[4][2];
        for (int i = 0; i < 4; i++) bytes[i][0] = bytes[i][1] = vdupq_n_u8(0);
        const int some = !BINARY ? 4 : steps - step < BYTES ? steps - step : BYTES;
#pragma GCC unroll 1 /* else the registers do not suffice */
        for (int i = 0; i < some; i++, indices += width) {
            const uint8_t *from = points[step + i] + left;
            const uint8x16_t first = vld1q_u8(indices), second = units > 1 ? vld1q_u8(indices + UNIT) : first;
            for (int pixel = 0; pixel < 4; pixel++) {
                const uint8x16_t table = vld1q_u8(from + pixel * TABLE);
                bytes[pixel][0] = vaddq_u8(bytes[pixel][0], vqtbl1q_u8(table, first));
                if (units > 1) bytes[pixel][1] = vaddq_u8(bytes[pixel][1], vqtbl1q_u8(table, second));
            }
        }
        for (int i = 0; i < 4; i++)
            for (int unit = 0; unit < units; unit++) {
                sum[i][unit][0] = vaddw_u8(sum[i][unit][0], vget_low_u8(bytes[i][unit]));
                sum[i][unit][1] = vaddw_high_u8(sum[i][unit][1], bytes[i][unit]);
            }
    }
    for (int i = 0; i < 4; i++)
        for (int unit = 0; unit < units; unit++)
            for (int half = 0; half < 2; half++)
                vst1q_u16(sums + i * width + unit * UNIT + half * 8, sum[i][unit][half]);
}

__attribute__((noinline)) static void kernel_32(const uint8_t *const *points, const uint8_t *indices, int steps,
                                                size_t left, size_t width, uint16_t *sums, int fresh) {
    add_steps(2, points, indices, steps, left, width, sums, fresh);
}

__attribute__((noinline)) static void kernel_16(const uint8_t *const *points, const uint8_t *indices, int steps,
                                                size_t left, size_t width, uint16_t *sums, int fresh) {
    add_steps(1, points, indices, steps, left, width, sums, fresh);
}

static inline void kernel(int units, const uint8_t *const *points, const uint8_t *indices, int steps, size_t left,
                          uint16_t *sums, int fresh) {
    const size_t width = (size_t)units * UNIT, rest = width - UNIT;
    for (int pixel = 0; pixel < PIXELS; pixel += 4) {
        const size_t at = left + pixel * TABLE;
        uint16_t *to = sums + pixel * width;
        if (units > 1) kernel_32(points, indices, steps, at, width, to, fresh);
        if (units != 2) kernel_16(points, indices + rest, steps, at, width, to + rest, fresh);
    }
}

/* See exp.h. */
static inline float32x4_t exp_128(float32x4_t x) {
    x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(BDM_EXP_LEAST)), vdupq_n_f32(BDM_EXP_MOST));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, BDM_LOG2_E));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(BDM_LN_2));
    r = vfmsq_f32(r, n, vdupq_n_f32(BDM_LN_2_REST));
    float32x4_t e = vdupq_n_f32(bdm_exp_terms[0]);
    for (int i = 1; i < BDM_EXP_TERMS; i++) e = vfmaq_f32(vdupq_n_f32(bdm_exp_terms[i]), e, r);
    e = vfmaq_f32(vaddq_f32(r, vdupq_n_f32(1.0f)), vmulq_f32(e, r), r);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(e, vreinterpretq_f32_s32(power));
}

/* What becomes of x before it is quantized. */
static inline float32x4_t before_128(const bdm_input *input, float32x4_t x, float32x4_t gain, float32x4_t shift) {
    if (!input->gain) return x;
    x = vfmaq_f32(shift, x, gain);
    return input->silu ? vdivq_f32(x, vaddq_f32(vdupq_n_f32(1.0f), exp_128(vnegq_f32(x)))) : x;
}

/* u of four numbers: clip(round(x / step + zero), low, low + high) - low; NaN gives 0. 1 bit: x >= least. */
static inline uint32x4_t levels_128(const bdm_shape *s, const bdm_input *input, float32x4_t x, float32x4_t least) {
    if (BINARY) return vshrq_n_u32(vcgeq_f32(x, least), 31);
    float32x4_t v = vrndnq_f32(vaddq_f32(vdivq_f32(x, vdupq_n_f32(input->step)), vdupq_n_f32(input->zero)));
    v = vmaxnmq_f32(vsubq_f32(v, vdupq_n_f32(input->low)), vdupq_n_f32(0));
    return vcvtq_u32_f32(vminq_f32(v, vdupq_n_f32((float)((1 << s->bits) - 1))));
}

static inline uint8x16_t pack_16(const uint32x4_t u[4]) {
    return vcombine_u8(vmovn_u16(vcombine_u16(vmovn_u32(u[0]), vmovn_u32(u[1]))),
                       vmovn_u16(vcombine_u16(vmovn_u32(u[2]), vmovn_u32(u[3]))));
}

/* Up to 4 floats, zeros beyond. */
static inline float32x4_t load_some(const float *from, int n) {
    float some[4] = {0};
    if (n >= 4) return vld1q_f32(from);
    for (int i = 0; i < n; i++) some[i] = from[i];
    return vld1q_f32(some);
}

static void quantize_last(const bdm_shape *s, const bdm_input *input, int n, const float *x, int pixels, uint8_t *u,
                          int stride) {
    const float *gain = input->gain ? input->gain + (size_t)n * s->c : NULL;
    const float *shift = input->gain ? input->shift + (size_t)n * s->c : NULL;
    const float32x4_t none = vdupq_n_f32(0);
    for (int pixel = 0; pixel < pixels; pixel++, x += s->c, u += stride) {
        for (int c = 0; c < s->c; c += 16) {
            uint32x4_t level[4];
            for (int i = 0; i < 4; i++) {
                const int at = c + 4 * i, left = s->c - at;
                const float32x4_t by = gain ? load_some(gain + at, left) : none;
                const float32x4_t plus = gain ? load_some(shift + at, left) : none;
                const float32x4_t least = input->threshold ? load_some(input->threshold + at, left) : none;
                level[i] = levels_128(s, input, before_128(input, load_some(x + at, left), by, plus), least);
            }
            vst1q_u8(u + c, pack_16(level));
        }
        memset(u + s->c, 0, stride - s->c);
    }
}

/* 16 channels of 16 pixels at a time, turned so that a pixel's channels are neighbours. */
static void quantize_first(const bdm_shape *s, const bdm_input *input, int n, const float *x, int pixels, uint8_t *u,
                           int stride) {
    const size_t plane = (size_t)s->h * s->w;
    for (int c = 0; c < stride; c += 16)
        for (int pixel = 0; pixel < pixels; pixel += 16) {
            uint8x16_t rows[16], turned[16];
            for (int i = 0; i < 16; i++) {
                rows[i] = vdupq_n_u8(0);
                if (c + i >= s->c) continue;
                const size_t of = (size_t)n * s->c + c + i;
                const float32x4_t gain = vdupq_n_f32(input->gain ? input->gain[of] : 0);
                const float32x4_t shift = vdupq_n_f32(input->gain ? input->shift[of] : 0);
                const float32x4_t least = vdupq_n_f32(input->threshold ? input->threshold[c + i] : 0);
                uint32x4_t level[4];
                for (int j = 0; j < 4; j++) {
                    const float32x4_t v = load_some(x + (c + i) * plane + pixel + 4 * j, pixels - pixel - 4 * j);
                    level[j] = levels_128(s, input, before_128(input, v, gain, shift), least);
                }
                rows[i] = pack_16(level);
            }
            for (int round = 0; round < 4; round++) { /* each doubles the length of the runs of neighbours */
                for (int i = 0; i < 8; i++) {
                    turned[2 * i] = vzip1q_u8(rows[i], rows[i + 8]);
                    turned[2 * i + 1] = vzip2q_u8(rows[i], rows[i + 8]);
                }
                memcpy(rows, turned, sizeof rows);
            }
            for (int i = 0; i < 16; i++) vst1q_u8(u + (size_t)(pixel + i) * stride + c, rows[i]);
        }
}

/* The sum of n bytes, n a multiple of 16. */
static inline int32_t sum_bytes(const uint8_t *u, int n) {
    uint32x4_t sum = vdupq_n_u32(0);
    for (int i = 0; i < n; i += 16) sum = vpadalq_u16(sum, vpaddlq_u8(vld1q_u8(u + i)));
    return (int32_t)vaddvq_u32(sum);
}

/* to[i][k] = scale[k] (2 S[i][k] - total[i] - of_zero[k]) + bias[k] (1 bit: 2 (2 S - total)); rows of y are `next`
   apart. The product is rounded before the sum, as in every path. */
static inline void finish_16(const uint16_t *sums, int outputs, int pixels, const int32_t *totals,
                             const int32_t *of_zero, const float *scale, const float *bias, int count, float *to,
                             size_t next) {
    for (int i = 0; i < pixels; i++, sums += outputs, to += next) {
        const int32_t total = totals[i] * (1 + BINARY);
        for (int k = 0; k < count; k++) {
            const int32_t sum = (int32_t)sums[k] * (2 << BINARY) - total - of_zero[k];
            to[k] = (float)sum * scale[k] + (bias ? bias[k] : 0);
        }
    }
}

/* stage [pixels][width] -> y [count channels, `plane` floats apart][pixels]; 4 x 4 numbers are turned at a time. */
static inline void store_first(const float *stage, size_t width, int count, int pixels, size_t plane, float *y) {
    for (int k = 0; k < count; k += 4)
        for (int pixel = 0; pixel < pixels; pixel += 4) {
            float32x4_t r[4];
            for (int i = 0; i < 4; i++) r[i] = vld1q_f32(stage + (size_t)(pixel + i) * width + k);
            const float32x4_t a = vzip1q_f32(r[0], r[2]), b = vzip2q_f32(r[0], r[2]);
            const float32x4_t c = vzip1q_f32(r[1], r[3]), d = vzip2q_f32(r[1], r[3]);
            const float32x4_t rows[4] = {vzip1q_f32(a, c), vzip2q_f32(a, c), vzip1q_f32(b, d), vzip2q_f32(b, d)};
            for (int m = 0; m < 4 && k + m < count; m++) {
                float *to = y + (size_t)(k + m) * plane + pixel;
                if (pixel + 4 <= pixels)
                    vst1q_f32(to, rows[m]);
                else
                    for (int i = 0; pixel + i < pixels; i++) to[i] = rows[m][i];
            }
        }
}

#include "lookup.h"

static int usable(void) { return 1; }
