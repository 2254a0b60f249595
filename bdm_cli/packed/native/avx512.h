/* Quantizing rows of an image, and storing tiles, with AVX-512. */
#ifndef BDM_AVX512_H
#define BDM_AVX512_H

#include <immintrin.h>
#include <string.h>
#include "avx512_math.h"
#include "bdm.h"

typedef struct {
    __m512 inverse, step, offset, zero, low, high, unclear;
} quantizer_512;

static inline quantizer_512 make_quantizer(const bdm_shape *s, const bdm_input *input) {
    float high = (float)((1 << s->bits) - 1), offset = input->zero - input->low;
    float size = (offset < 0 ? -offset : offset) + high + 1;
    float near = input->step > 0x1p-100f && input->step < 0x1p100f ? size * 0x1p-20f : 2; /* 2: always divide */
    quantizer_512 q = {_mm512_set1_ps(1 / input->step), _mm512_set1_ps(input->step), _mm512_set1_ps(offset),
                       _mm512_set1_ps(input->zero), _mm512_set1_ps(input->low), _mm512_set1_ps(high),
                       _mm512_set1_ps(0.5f - near)};
    return q;
}

/* u = clip(round(x / step + zero), low, low + high) - low of four vectors, exactly as with a true division: a product
   with 1 / step decides, but where a value is so near to the middle of two levels that its rounding could, all are
   divided. NaN gives 0. */
static inline void levels_512(const quantizer_512 *q, const __m512 x[4], __m512i u[4]) {
    const __m512 none = _mm512_setzero_ps();
    __m512 far = none; /* the largest distance to a whole number */
    for (int i = 0; i < 4; i++) {
        const __m512 v = _mm512_min_ps(_mm512_max_ps(_mm512_fmadd_ps(x[i], q->inverse, q->offset), none), q->high);
        far = _mm512_range_ps(far, _mm512_reduce_ps(v, 0), 0x0B);
        u[i] = _mm512_cvtps_epi32(v);
    }
    if (__builtin_expect(_mm512_cmp_ps_mask(far, q->unclear, _CMP_GT_OQ), 0))
        for (int i = 0; i < 4; i++) {
            const __m512 v = _mm512_roundscale_ps(_mm512_add_ps(_mm512_div_ps(x[i], q->step), q->zero), 0);
            u[i] = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_sub_ps(v, q->low), none), q->high));
        }
}

static inline __mmask16 first_16(int n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* Four vectors of 32-bit integers 0..255 -> 64 bytes in order. */
static inline __m512i pack_64(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
    return _mm512_permutexvar_epi32(order, packed);
}

/* What is done to x before it is quantized: constants in each use, so that every combination is a loop of its own. */
enum { PLAIN, AFFINE, AFFINE_SILU };

static inline __attribute__((always_inline)) __m512 before_512(int how, __m512 x, __m512 gain, __m512 shift) {
    if (how != PLAIN) x = _mm512_fmadd_ps(x, gain, shift);
    return how == AFFINE_SILU ? silu_512(x) : x;
}

static inline __attribute__((always_inline)) void quantize_last_as(int how, int binary, const bdm_shape *s,
                                                                   const bdm_input *input, int n, const float *x,
                                                                   int pixels, uint8_t *u, int stride) {
    const quantizer_512 q = make_quantizer(s, input);
    const float *gain = how ? input->gain + (size_t)n * s->c : NULL, *shift = how ? input->shift + (size_t)n * s->c : NULL;
    const __m512 none = _mm512_setzero_ps();
    for (int pixel = 0; pixel < pixels; pixel++, x += s->c, u += stride)
        for (int c = 0; c < stride; c += 64) {
            __m512 v[4];
            __m512i level[4];
            __mmask16 bit[4];
            const int whole = c + 64 <= s->c;
            for (int i = 0; i < 4; i++) {
                const __mmask16 in = whole ? 0xFFFF : first_16(s->c - c - 16 * i);
                const int at = c + 16 * i;
                v[i] = whole ? _mm512_loadu_ps(x + at) : _mm512_maskz_loadu_ps(in, x + at);
                if (how)
                    v[i] = before_512(how, v[i], _mm512_maskz_loadu_ps(in, gain + at), _mm512_maskz_loadu_ps(in, shift + at));
                if (binary) {
                    const __m512 least = input->threshold ? _mm512_maskz_loadu_ps(in, input->threshold + at) : none;
                    bit[i] = _mm512_mask_cmp_ps_mask(in, v[i], least, _CMP_GE_OQ);
                }
            }
            if (binary) {
                const __mmask32 low = _mm512_kunpackw(bit[1], bit[0]), high = _mm512_kunpackw(bit[3], bit[2]);
                _mm512_storeu_si512(u + c, _mm512_maskz_set1_epi8(_mm512_kunpackd(high, low), 1));
                continue;
            }
            levels_512(&q, v, level);
            if (!whole)
                for (int i = 0; i < 4; i++) level[i] = _mm512_maskz_mov_epi32(first_16(s->c - c - 16 * i), level[i]);
            _mm512_storeu_si512(u + c, pack_64(level[0], level[1], level[2], level[3]));
        }
}

#define RUN 256  /* pixels of one channel that are read in one go */
#define AHEAD 4  /* channels to fetch ahead: they may lie too far apart for the processor to see a pattern */

/* 64 channels at a time: first each channel's run of pixels to bytes, then these turned, so that a pixel's channels are
   neighbours. */
static inline __attribute__((always_inline)) void quantize_first_as(int how, int binary, const bdm_shape *s,
                                                                    const bdm_input *input, int n, const float *x,
                                                                    int pixels, uint8_t *u, int stride) {
    const quantizer_512 q = make_quantizer(s, input);
    const size_t plane = (size_t)s->h * s->w;
    uint8_t bytes[64][RUN] __attribute__((aligned(64)));
    for (int from = 0; from < pixels; from += RUN, u += (size_t)RUN * stride)
        for (int c0 = 0; c0 < stride; c0 += 64) {
            const int run = pixels - from < RUN ? pixels - from : RUN;
            for (int c = c0; c < c0 + 64; c++) {
                if (c >= s->c) {
                    memset(bytes[c - c0], 0, RUN);
                    continue;
                }
                const float *row = x + c * plane + from;
                const __m512 gain = how ? _mm512_set1_ps(input->gain[(size_t)n * s->c + c]) : _mm512_setzero_ps();
                const __m512 shift = how ? _mm512_set1_ps(input->shift[(size_t)n * s->c + c]) : _mm512_setzero_ps();
                const __m512 least = _mm512_set1_ps(binary && input->threshold ? input->threshold[c] : 0);
                for (int at = 0; at < run; at += 64) {
                    __m512 v[4];
                    __m512i level[4];
                    for (int i = 0; i < 4; i++) {
                        if (c + AHEAD < s->c) _mm_prefetch((const char *)(row + AHEAD * plane + at + 16 * i), _MM_HINT_T0);
                        const __mmask16 in = first_16(run - at - 16 * i);
                        v[i] = before_512(how, _mm512_maskz_loadu_ps(in, row + at + 16 * i), gain, shift);
                        if (binary) level[i] = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v[i], least, _CMP_GE_OQ), 1);
                    }
                    if (!binary) levels_512(&q, v, level);
                    _mm512_store_si512(bytes[c - c0] + at, pack_64(level[0], level[1], level[2], level[3]));
                }
            }
            for (int at = 0; at < run; at += 64)
                for (int c = 0; c < 64; c += 16) {
                    __m512i four[4][4]; /* [j][i]: channels c + 4 i .. + 3 of the pixels 16 lane + 4 j .. + 3 */
                    for (int i = 0; i < 4; i++) {
                        const uint8_t *of = bytes[c + 4 * i] + at;
                        const __m512i r0 = _mm512_load_si512(of), r1 = _mm512_load_si512(of + RUN);
                        const __m512i r2 = _mm512_load_si512(of + 2 * RUN), r3 = _mm512_load_si512(of + 3 * RUN);
                        const __m512i low = _mm512_unpacklo_epi8(r0, r1), low2 = _mm512_unpacklo_epi8(r2, r3);
                        const __m512i high = _mm512_unpackhi_epi8(r0, r1), high2 = _mm512_unpackhi_epi8(r2, r3);
                        four[0][i] = _mm512_unpacklo_epi16(low, low2);
                        four[1][i] = _mm512_unpackhi_epi16(low, low2);
                        four[2][i] = _mm512_unpacklo_epi16(high, high2);
                        four[3][i] = _mm512_unpackhi_epi16(high, high2);
                    }
                    for (int j = 0; j < 4; j++) {
                        const __m512i a = _mm512_unpacklo_epi32(four[j][0], four[j][1]);
                        const __m512i b = _mm512_unpackhi_epi32(four[j][0], four[j][1]);
                        const __m512i d = _mm512_unpacklo_epi32(four[j][2], four[j][3]);
                        const __m512i e = _mm512_unpackhi_epi32(four[j][2], four[j][3]);
                        const __m512i rows[4] = {_mm512_unpacklo_epi64(a, d), _mm512_unpackhi_epi64(a, d),
                                                 _mm512_unpacklo_epi64(b, e), _mm512_unpackhi_epi64(b, e)};
                        for (int i = 0; i < 4; i++) {
                            uint8_t *to = u + (size_t)(at + 4 * j + i) * stride + c0 + c;
                            _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(rows[i]));
                            to += (size_t)16 * stride;
                            _mm_storeu_si128((__m128i *)to, _mm512_extracti32x4_epi32(rows[i], 1));
                            to += (size_t)16 * stride;
                            _mm_storeu_si128((__m128i *)to, _mm512_extracti32x4_epi32(rows[i], 2));
                            to += (size_t)16 * stride;
                            _mm_storeu_si128((__m128i *)to, _mm512_extracti32x4_epi32(rows[i], 3));
                        }
                    }
                }
        }
}

#define EVERY_WAY(name) \
    static inline void name(const bdm_shape *s, const bdm_input *input, int n, const float *x, int pixels, uint8_t *u, \
                            int stride) { \
        const int how = !input->gain ? PLAIN : input->silu ? AFFINE_SILU : AFFINE; \
        if (BINARY) { \
            if (how == PLAIN) name##_as(PLAIN, 1, s, input, n, x, pixels, u, stride); \
            else if (how == AFFINE) name##_as(AFFINE, 1, s, input, n, x, pixels, u, stride); \
            else name##_as(AFFINE_SILU, 1, s, input, n, x, pixels, u, stride); \
        } else { \
            if (how == PLAIN) name##_as(PLAIN, 0, s, input, n, x, pixels, u, stride); \
            else if (how == AFFINE) name##_as(AFFINE, 0, s, input, n, x, pixels, u, stride); \
            else name##_as(AFFINE_SILU, 0, s, input, n, x, pixels, u, stride); \
        } \
    }
EVERY_WAY(quantize_last)
EVERY_WAY(quantize_first)

/* The sum of n bytes, n a multiple of 64. */
static inline int32_t sum_bytes(const uint8_t *u, int n) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 64)
        sum = _mm512_add_epi64(sum, _mm512_sad_epu8(_mm512_loadu_si512(u + i), _mm512_setzero_si512()));
    return (int32_t)_mm512_reduce_add_epi64(sum);
}

/* to[pixel][k] = scale[k] * (factor (2 S - total[pixel]) - of_zero[k]) + bias[k]; sums: S [pixels][outputs]. */
static inline void finish_16(const uint16_t *sums, int outputs, int pixels, const int32_t *totals, const int32_t *of_zero,
                             const float *scale, const float *bias, int count, float *to, size_t next) {
    for (int k = 0; k < count; k += 16) {
        const __mmask16 in = first_16(count - k);
        const __m512i zero = _mm512_maskz_loadu_epi32(in, of_zero + k);
        const __m512 by = _mm512_maskz_loadu_ps(in, scale + k);
        const __m512 plus = bias ? _mm512_maskz_loadu_ps(in, bias + k) : _mm512_setzero_ps();
        for (int i = 0; i < pixels; i++) {
            __m512i sum = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(sums + i * outputs + k)));
            sum = _mm512_slli_epi32(sum, 1 + BINARY);
            sum = _mm512_sub_epi32(_mm512_sub_epi32(sum, zero), _mm512_set1_epi32(totals[i] << BINARY));
            /* two roundings, as in PyTorch: the same numbers as the simulated layer's */
            _mm512_mask_storeu_ps(to + i * next + k, in, _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), by), plus));
        }
    }
}

/* stage [pixels][width] -> y [count channels, `plane` floats apart][pixels]; 16 x 16 numbers are turned at a time. */
static inline void store_first(const float *stage, size_t width, int count, int pixels, size_t plane, float *y) {
    for (int k = 0; k < count; k += 16)
        for (int pixel = 0; pixel < pixels; pixel += 16) {
            const __mmask16 in = first_16(pixels - pixel);
            const float *from = stage + (size_t)pixel * width + k;
            __m512 r[16], t[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * width);
            for (int i = 0; i < 16; i += 2) {
                t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
            }
            for (int i = 0; i < 16; i += 4)
                for (int h = 0; h < 2; h++) {
                    r[i + 2 * h] = _mm512_shuffle_ps(t[i + h], t[i + h + 2], 0x44);
                    r[i + 2 * h + 1] = _mm512_shuffle_ps(t[i + h], t[i + h + 2], 0xEE);
                } /* r[i + m]: pixels i .. i + 3 of the channels m, m + 4, m + 8, m + 12 */
            for (int m = 0; m < 4; m++) {
                const __m512 a = _mm512_shuffle_f32x4(r[m], r[m + 4], 0x88);
                const __m512 b = _mm512_shuffle_f32x4(r[m], r[m + 4], 0xDD);
                const __m512 c = _mm512_shuffle_f32x4(r[m + 8], r[m + 12], 0x88);
                const __m512 d = _mm512_shuffle_f32x4(r[m + 8], r[m + 12], 0xDD);
                const __m512 rows[4] = {_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(b, d, 0x88),
                                        _mm512_shuffle_f32x4(a, c, 0xDD), _mm512_shuffle_f32x4(b, d, 0xDD)};
                for (int i = 0; i < 4; i++)
                    if (k + m + 4 * i < count)
                        _mm512_mask_storeu_ps(y + (size_t)(k + m + 4 * i) * plane + pixel, in, rows[i]);
            }
        }
}

#endif
