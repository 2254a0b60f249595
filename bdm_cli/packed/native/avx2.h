/* What the lookups with AVX2 share: tables and indices; and quantizing rows of an image, and storing tiles, as avx512.h
   does, 8 numbers at a time. Included by a file that has defined BINARY (1-bit activations).

   A table holds the 16 subset sums of 4 channels, and is read into both halves of a register. VPSHUFB with an index
   vector looks up 32 of them: 32 output channels x 4 channels = 128 products in one instruction. Bytes are widened by
   arithmetic modulo 2^16: one sum takes the words as they are, low byte + 256 high byte, and another the high bytes
   alone; at the end the low bytes' sum is the first - 256 times the second. */
#ifndef BDM_AVX2_H
#define BDM_AVX2_H

#include <immintrin.h>
#include "bdm.h"
#include "exp.h"

#define CHANNELS 4
#define TABLE 16
#define PIXELS 8
#define UNIT 32
#define UNIT_INDEX 32
#define PLANE_BITS 4

/* Channels 0..15 of a unit are the low bytes of the words, 16..31 the high ones, so that the sums come out in order. */
static inline void put_index(const bdm_shape *s, const uint8_t *bits, int k0, int table, int tap, uint8_t *to) {
    for (int k = 0; k < UNIT && k0 + k < s->k; k++) {
        int index = 0;
        for (int i = 0; i < CHANNELS; i++) {
            int c = table * CHANNELS + i;
            if (c < s->c) index |= bdm_bit(bits, s, k0 + k, c, tap) << i;
        }
        to[k % 16 * 2 + k / 16] = (uint8_t)index;
    }
}

/* The 16 entries are a[e & 3] + b[e >> 2], each over two channels: two shuffles of the channels' u and of the sums of
   neighbours. Two tables at a time. */
static inline __attribute__((always_inline)) void fill_tables_of(int plane, int planes, const uint8_t *u, int tables,
                                                                 uint8_t *to, size_t stride) {
#define NONE -128
#define LOW(g) NONE, g, g + 1, g + 8
#define HIGH(g) NONE, NONE, NONE, NONE, g, g, g, g, g + 1, g + 1, g + 1, g + 1, g + 8, g + 8, g + 8, g + 8
    const __m256i first = _mm256_setr_epi8(LOW(0), LOW(0), LOW(0), LOW(0), LOW(4), LOW(4), LOW(4), LOW(4));
    const __m256i second = _mm256_setr_epi8(HIGH(2), HIGH(6));
    for (int t = 0; t < tables; t += 2) {
        __m128i own = _mm_loadl_epi64((const __m128i *)(u + t * CHANNELS)); /* byte g: channel g */
        if (plane) own = _mm_srli_epi16(own, 4);
        if (planes > 1) own = _mm_and_si128(own, _mm_set1_epi8(15));
        const __m128i pairs = _mm_add_epi8(own, _mm_bsrli_si128(own, 1)); /* byte g: channels g and g + 1 */
        const __m256i both = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(own, pairs));
        const __m256i entries = _mm256_add_epi8(_mm256_shuffle_epi8(both, first), _mm256_shuffle_epi8(both, second));
        _mm_store_si128((__m128i *)(to + (size_t)t * stride), _mm256_castsi256_si128(entries));
        if (t + 1 < tables)
            _mm_store_si128((__m128i *)(to + (size_t)(t + 1) * stride), _mm256_extracti128_si256(entries, 1));
    }
}

static void fill_tables(const uint8_t *u, int plane, int planes, int tables, uint8_t *to, size_t stride) {
    if (planes == 1)
        fill_tables_of(0, 1, u, tables, to, stride);
    else if (plane == 0)
        fill_tables_of(0, 2, u, tables, to, stride);
    else
        fill_tables_of(1, 2, u, tables, to, stride);
}

/* The sums of 16 channels' low bytes and of 16 channels' high bytes, to or onto 32 neighbouring sums. */
static inline void put_sums(__m256i all, __m256i high, uint16_t *sums, int fresh) {
    __m256i *to = (__m256i *)sums;
    const __m256i low = _mm256_sub_epi16(all, _mm256_slli_epi16(high, 8));
    _mm256_storeu_si256(to, fresh ? low : _mm256_add_epi16(low, _mm256_loadu_si256(to)));
    _mm256_storeu_si256(to + 1, fresh ? high : _mm256_add_epi16(high, _mm256_loadu_si256(to + 1)));
}

/* See exp.h. */
static inline __m256 exp_256(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(BDM_EXP_LEAST)), _mm256_set1_ps(BDM_EXP_MOST));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(BDM_LOG2_E)), 8);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(BDM_LN_2), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(BDM_LN_2_REST), r);
    __m256 e = _mm256_set1_ps(bdm_exp_terms[0]);
    for (int i = 1; i < BDM_EXP_TERMS; i++) e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(bdm_exp_terms[i]));
    e = _mm256_fmadd_ps(_mm256_mul_ps(e, r), r, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(e, _mm256_castsi256_ps(power));
}

static inline __m256 silu_256(__m256 x) {
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp_256(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

typedef struct {
    __m256 inverse, step, offset, zero, low, high, unclear;
    int divide;
} quantizer_256;

static inline quantizer_256 make_quantizer(const bdm_shape *s, const bdm_input *input) {
    float high = (float)((1 << s->bits) - 1), offset = input->zero - input->low;
    float size = (offset < 0 ? -offset : offset) + high + 1;
    quantizer_256 q = {_mm256_set1_ps(1 / input->step), _mm256_set1_ps(input->step), _mm256_set1_ps(offset),
                       _mm256_set1_ps(input->zero), _mm256_set1_ps(input->low), _mm256_set1_ps(high),
                       _mm256_set1_ps(0.5f - size * 0x1p-20f), !(input->step > 0x1p-100f && input->step < 0x1p100f)};
    return q;
}

/* u = clip(round(x / step + zero), low, low + high) - low of four vectors, exactly as with a true division: a product
   with 1 / step decides, but where a value is so near to the middle of two levels that its rounding could, or where
   1 / step is no ordinary number, all are divided. NaN gives 0. */
static inline void levels_256(const quantizer_256 *q, const __m256 x[4], __m256i u[4]) {
    const __m256 none = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.0f);
    __m256 r[4], far = none;
    for (int i = 0; i < 4; i++) {
        __m256 v = _mm256_min_ps(_mm256_max_ps(_mm256_fmadd_ps(x[i], q->inverse, q->offset), none), q->high);
        r[i] = _mm256_round_ps(v, 8);
        far = _mm256_max_ps(far, _mm256_andnot_ps(sign, _mm256_sub_ps(v, r[i])));
    }
    if (__builtin_expect(q->divide || _mm256_movemask_ps(_mm256_cmp_ps(far, q->unclear, _CMP_GT_OQ)), 0))
        for (int i = 0; i < 4; i++) {
            __m256 v = _mm256_round_ps(_mm256_add_ps(_mm256_div_ps(x[i], q->step), q->zero), 8);
            r[i] = _mm256_min_ps(_mm256_max_ps(_mm256_sub_ps(v, q->low), none), q->high);
        }
    for (int i = 0; i < 4; i++) u[i] = _mm256_cvtps_epi32(r[i]);
}

static inline __m256i first_8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* What is done to x before it is quantized: constants in each use, so that every combination is a loop of its own. */
enum { PLAIN, AFFINE, AFFINE_SILU };

static inline __attribute__((always_inline)) __m256 before_256(int how, __m256 x, __m256 gain, __m256 shift) {
    if (how != PLAIN) x = _mm256_fmadd_ps(x, gain, shift);
    return how == AFFINE_SILU ? silu_256(x) : x;
}

/* 1 where x >= least, else 0. */
static inline __m256i at_least(__m256 x, __m256 least) {
    return _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(x, least, _CMP_GE_OQ)), 31);
}

static inline __attribute__((always_inline)) void quantize_last_as(int how, int binary, const bdm_shape *s,
                                                                   const bdm_input *input, int n, const float *x,
                                                                   int pixels, uint8_t *u, int stride) {
    const quantizer_256 q = make_quantizer(s, input);
    const float *gain = how ? input->gain + (size_t)n * s->c : x, *shift = how ? input->shift + (size_t)n * s->c : x;
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int pixel = 0; pixel < pixels; pixel++, x += s->c, u += stride)
        for (int c = 0; c < stride; c += 32) {
            __m256 v[4];
            __m256i level[4];
            const int whole = c + 32 <= s->c;
            for (int i = 0; i < 4; i++) {
                const __m256i in = first_8(s->c - c - 8 * i);
                const int at = c + 8 * i;
#define READ(from) (whole ? _mm256_loadu_ps((from) + at) : _mm256_maskload_ps((from) + at, in))
                v[i] = READ(x);
                if (how) v[i] = before_256(how, v[i], READ(gain), READ(shift));
                if (binary) level[i] = at_least(v[i], input->threshold ? READ(input->threshold) : _mm256_setzero_ps());
#undef READ
            }
            if (!binary) levels_256(&q, v, level);
            if (!whole)
                for (int i = 0; i < 4; i++) level[i] = _mm256_and_si256(level[i], first_8(s->c - c - 8 * i));
            const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(level[0], level[1]),
                                                       _mm256_packus_epi32(level[2], level[3]));
            _mm256_storeu_si256((__m256i *)(u + c), _mm256_permutevar8x32_epi32(packed, order));
        }
}

/* 16 channels of 16 pixels at a time, turned so that a pixel's channels are neighbours. */
static inline __attribute__((always_inline)) void quantize_first_as(int how, int binary, const bdm_shape *s,
                                                                    const bdm_input *input, int n, const float *x,
                                                                    int pixels, uint8_t *u, int stride) {
    const quantizer_256 q = make_quantizer(s, input);
    const size_t plane = (size_t)s->h * s->w;
    for (int c0 = 0; c0 < stride; c0 += 64) /* a line of u at a time */
        for (int at = 0; at < (pixels + 15) / 16 * 64; at += 16) {
            const int pixel = at / 64 * 16, c = c0 + at % 64;
            __m256i four[2][4]; /* [pixels 0..7, 8..15] of 4 channels each */
            for (int i = 0; i < 4; i++)
                for (int half = 0; half < 2; half++) { /* both halves of a line of x in turn */
                    const int first = pixel + 8 * half, whole = first + 8 <= pixels;
                    const __m256i in = first_8(pixels - first);
                    __m256 v[4];
                    __m256i level[4];
                    for (int k = 0; k < 4; k++) {
                        const int channel = c + 4 * i + k;
                        const float *from = x + channel * plane + first;
                        if (channel >= s->c) {
                            v[k] = _mm256_setzero_ps(), level[k] = _mm256_setzero_si256();
                            continue;
                        }
                        v[k] = whole ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, in);
                        if (how) {
                            const size_t of = (size_t)n * s->c + channel;
                            v[k] = before_256(how, v[k], _mm256_set1_ps(input->gain[of]),
                                              _mm256_set1_ps(input->shift[of]));
                        }
                        if (binary)
                            level[k] = at_least(v[k], _mm256_set1_ps(input->threshold ? input->threshold[channel] : 0));
                    }
                    if (!binary) levels_256(&q, v, level);
                    if (c + 4 * i + 4 > s->c)
                        for (int k = 0; k < 4; k++)
                            if (c + 4 * i + k >= s->c) level[k] = _mm256_setzero_si256();
                    four[half][i] = _mm256_or_si256(
                        _mm256_or_si256(level[0], _mm256_slli_epi32(level[1], 8)),
                        _mm256_or_si256(_mm256_slli_epi32(level[2], 16), _mm256_slli_epi32(level[3], 24)));
                }
            for (int half = 0; half < 2; half++) {
                const __m256i *f = four[half];
                const __m256i a = _mm256_unpacklo_epi32(f[0], f[1]), b = _mm256_unpackhi_epi32(f[0], f[1]);
                const __m256i d = _mm256_unpacklo_epi32(f[2], f[3]), e = _mm256_unpackhi_epi32(f[2], f[3]);
                const __m256i rows[4] = {_mm256_unpacklo_epi64(a, d), _mm256_unpackhi_epi64(a, d),
                                         _mm256_unpacklo_epi64(b, e), _mm256_unpackhi_epi64(b, e)};
                uint8_t *to = u + (size_t)(pixel + 8 * half) * stride + c; /* rows[i]: pixels i and i + 4 */
                for (int i = 0; i < 4; i++) {
                    _mm_storeu_si128((__m128i *)(to + (size_t)i * stride), _mm256_castsi256_si128(rows[i]));
                    _mm_storeu_si128((__m128i *)(to + (size_t)(i + 4) * stride), _mm256_extracti128_si256(rows[i], 1));
                }
            }
        }
}

#define EVERY_WAY(name) \
    static void name(const bdm_shape *s, const bdm_input *input, int n, const float *x, int pixels, uint8_t *u, \
                     int stride) { \
        if (!input->gain) name##_as(PLAIN, BINARY, s, input, n, x, pixels, u, stride); \
        else if (!input->silu) name##_as(AFFINE, BINARY, s, input, n, x, pixels, u, stride); \
        else name##_as(AFFINE_SILU, BINARY, s, input, n, x, pixels, u, stride); \
    }
EVERY_WAY(quantize_last)
EVERY_WAY(quantize_first)

/* The sum of n bytes, n a multiple of 32. */
static inline int32_t sum_bytes(const uint8_t *u, int n) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 32) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(u + i));
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return (int32_t)(_mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1));
}

/* to[i][k] = scale[k] (2 S[i][k] - total[i] - of_zero[k]) + bias[k] (1 bit: 2 (2 S - total)); rows of y are `next`
   apart. The product is rounded before the sum, as in every path. */
static inline void finish_16(const uint16_t *sums, int outputs, int pixels, const int32_t *totals,
                             const int32_t *of_zero, const float *scale, const float *bias, int count, float *to,
                             size_t next) {
    for (int k = 0; k < count; k += 8) {
        const __m256i in = first_8(count - k);
        const __m256i zero = _mm256_maskload_epi32(of_zero + k, in);
        const __m256 by = _mm256_maskload_ps(scale + k, in);
        const __m256 plus = bias ? _mm256_maskload_ps(bias + k, in) : _mm256_setzero_ps();
        const int whole = k + 8 <= count;
        for (int i = 0; i < pixels; i++) {
            __m256i sum = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(sums + i * outputs + k)));
            sum = _mm256_slli_epi32(sum, 1 + BINARY);
            sum = _mm256_sub_epi32(_mm256_sub_epi32(sum, zero), _mm256_set1_epi32(totals[i] << BINARY));
            const __m256 y = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), by), plus);
            if (whole)
                _mm256_storeu_ps(to + i * next + k, y);
            else
                _mm256_maskstore_ps(to + i * next + k, in, y);
        }
    }
}

/* stage [pixels][width] -> y [count channels, `plane` floats apart][pixels]; 8 x 8 numbers are turned at a time. */
static inline void store_first(const float *stage, size_t width, int count, int pixels, size_t plane, float *y) {
    for (int k = 0; k < count; k += 8)
        for (int pixel = 0; pixel < pixels; pixel += 8) {
            const float *from = stage + (size_t)pixel * width + k;
            __m256 r[8], t[8];
            for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * width);
            for (int i = 0; i < 8; i += 2) {
                t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
                t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int h = 0; h < 2; h++) {
                    r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0x44);
                    r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0xEE);
                } /* r[i + m]: pixels i .. i + 3 of the channels m and m + 4 */
            for (int m = 0; m < 8; m++) {
                if (k + m >= count) break;
                const __m256 row = m < 4 ? _mm256_permute2f128_ps(r[m], r[m + 4], 0x20)
                                         : _mm256_permute2f128_ps(r[m - 4], r[m], 0x31);
                float *to = y + (size_t)(k + m) * plane + pixel;
                if (pixel + 8 <= pixels)
                    _mm256_storeu_ps(to, row);
                else
                    _mm256_maskstore_ps(to, first_8(pixels - pixel), row);
            }
        }
}

#endif
