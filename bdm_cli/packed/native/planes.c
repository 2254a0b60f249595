/* Plain C for any processor: bit planes (Eq. 19 of arXiv:2404.05662).

   An activation of b bits is a sum of planes b_i = +-1: u = sum of 2^i (b_i + 1) / 2, and with a = u - zero
       2 a = sum of 2^i b_i + (2^b - 1 - 2 zero);   4 bits around 8:  a = 4 b_3 + 2 b_2 + b_1 + b_0 / 2 - 1/2.
   1 bit: a = b_0. With +1 as a bit that is set, the product of two planes of c channels is c - 2 popcount(w ^ b_i), 64
   channels at a time; bits beyond c are clear in both. A tap outside the image is skipped. */

#include <math.h>
#include <stdlib.h>
#include <string.h>
#define LANES 4
#include "real.h"
#include "by_bits.h"

#define OUTPUTS 8 /* output channels that are counted together, so that the compiler can use vectors */

typedef struct {
    int words, taps, blocks;
    size_t sums; /* bytes of the taps' sums: int32_t [k][taps], before the weights' words [block][tap][word][OUTPUTS] */
} plan;

static plan make_plan(const bdm_shape *s) {
    plan p = {(s->c + 63) / 64, s->kh * s->kw, (s->k + OUTPUTS - 1) / OUTPUTS, 0};
    p.sums = ((size_t)s->k * p.taps * 4 + 63) / 64 * 64;
    return p;
}

static size_t arranged_size(const bdm_shape *s) {
    const plan p = make_plan(s);
    return p.sums + (size_t)p.blocks * p.taps * p.words * OUTPUTS * 8;
}

static void arrange(const bdm_shape *s, const uint8_t *bits, uint8_t *arranged) {
    const plan p = make_plan(s);
    memset(arranged, 0, arranged_size(s));
    int32_t *sums = (int32_t *)arranged;
    uint64_t *words = (uint64_t *)(arranged + p.sums);
    for (int k = 0; k < s->k; k++)
        for (int tap = 0; tap < p.taps; tap++)
            for (int c = 0; c < s->c; c++) {
                const uint64_t bit = bdm_bit(bits, s, k, c, tap);
                const size_t word = ((size_t)(k / OUTPUTS) * p.taps + tap) * p.words + c / 64;
                words[word * OUTPUTS + k % OUTPUTS] |= bit << c % 64;
                sums[k * p.taps + tap] += bit ? 1 : -1;
            }
}

/* u of one number, as the header of bdm.h says: halves to even, NaN to 0. The division is a division: a product with
   1 / step would round otherwise. */
static inline unsigned level(const bdm_shape *s, const bdm_input *input, int c, float x) {
    if (s->bits == 1) return x >= (input->threshold ? input->threshold[c] : 0);
    const float high = (float)((1 << s->bits) - 1), v = rintf(x / input->step + input->zero) - input->low;
    return !(v > 0) ? 0 : v > high ? (unsigned)high : (unsigned)v;
}

/* One row of an image to planes [pixel][bit][word]; reads neighbours in memory one after another. */
static void pack_row(const bdm_shape *s, const bdm_input *input, int words, const float *x, int n, int row,
                     uint64_t *to) {
    const int last = s->channels_last, outer = last ? s->w : s->c, inner = last ? s->c : s->w;
    const size_t plane = (size_t)s->h * s->w, next = last ? (size_t)s->c : plane;
    x += (size_t)n * s->c * plane + (size_t)row * s->w * (last ? s->c : 1);
    memset(to, 0, (size_t)s->w * s->bits * words * 8);
    for (int i = 0; i < outer; i++)
        for (int j = 0; j < inner; j++) {
            const int c = last ? j : i, pixel = last ? i : j;
            const float v = before(input, (size_t)n * s->c + c, x[i * next + j]);
            const uint64_t u = level(s, input, c, v);
            uint64_t *word = to + (size_t)pixel * s->bits * words + c / 64;
            for (int bit = 0; bit < s->bits; bit++) word[bit * words] |= (u >> bit & 1) << c % 64;
        }
}

/* counts[k] += the bits that differ between `words` words of output channel k and of a plane. Bits are counted within
   the bytes of a word, which the compiler does for several output channels in one vector; bytes hold 31 counts of 8. */
static inline void count(const uint64_t *w, const uint64_t *plane, int words, int32_t counts[OUTPUTS]) {
    const uint64_t ones = ~(uint64_t)0;
    for (int from = 0; from < words; from += 31) {
        uint64_t bytes[OUTPUTS] = {0};
        for (int word = from; word < words && word < from + 31; word++)
            for (int k = 0; k < OUTPUTS; k++) {
                uint64_t v = w[word * OUTPUTS + k] ^ plane[word];
                v -= v >> 1 & ones / 3;
                v = (v & ones / 5) + (v >> 2 & ones / 5);
                bytes[k] += (v + (v >> 4)) & ones / 17;
            }
        for (int k = 0; k < OUTPUTS; k++) {
            const uint64_t pairs = (bytes[k] & ones / 257) + (bytes[k] >> 8 & ones / 257);
            counts[k] += (int32_t)(pairs * (ones / 65535) >> 48);
        }
    }
}

typedef struct {
    const bdm_shape *s;
    const plan *p;
    const uint64_t *image, *words; /* planes [n][h][w][bit][word]; weights */
    const int32_t *sums;
    const bdm_input *input;
    const float *scale, *bias;
    float *y;
} job;

/* One row of the output. */
static void put_row(const job *j, int n, int row, int out_h, int out_w) {
    const bdm_shape *s = j->s;
    const plan *p = j->p;
    const int above = row * s->sh - s->ph, offset = s->bits == 1 ? 0 : (1 << s->bits) - 1 - 2 * s->zero;
    const size_t pixel_words = (size_t)s->bits * p->words;
    for (int block = 0; block < p->blocks; block++)
        for (int column = 0; column < out_w; column++) {
            const int before = column * s->sw - s->pw, k0 = block * OUTPUTS;
            int32_t sums[OUTPUTS] = {0}; /* of w (2 a); 1 bit: of w a */
            for (int tap = 0; tap < p->taps; tap++) {
                const int at_y = above + tap / s->kw, at_x = before + tap % s->kw;
                if (at_y < 0 || at_y >= s->h || at_x < 0 || at_x >= s->w) continue;
                const uint64_t *w = j->words + ((size_t)block * p->taps + tap) * p->words * OUTPUTS;
                const uint64_t *plane = j->image + (((size_t)n * s->h + at_y) * s->w + at_x) * pixel_words;
                for (int bit = 0; bit < s->bits; bit++, plane += p->words) {
                    int32_t counts[OUTPUTS] = {0};
                    count(w, plane, p->words, counts);
                    for (int k = 0; k < OUTPUTS; k++) sums[k] += (s->c - 2 * counts[k]) * (1 << bit);
                }
                for (int k = 0; k < OUTPUTS && k0 + k < s->k; k++)
                    sums[k] += offset * j->sums[(size_t)(k0 + k) * p->taps + tap];
            }
            for (int k = k0; k < k0 + OUTPUTS && k < s->k; k++) {
                const int32_t sum = s->bits == 1 ? sums[k - k0] : sums[k - k0] / 2;
                const size_t pixel = (size_t)row * out_w + column, size = (size_t)out_h * out_w;
                const size_t at = (size_t)n * s->k * size + (s->channels_last ? pixel * s->k + k : k * size + pixel);
                j->y[at] = after(s, j->input, j->bias, n, k, at, (float)sum * j->scale[k]);
            }
        }
}

#define WORTH_A_THREAD 1e6 /* products; about 20 microseconds */

static int convolve(const bdm_shape *s, const bdm_input *input, const float *x, const uint8_t *arranged,
                    const float *sigma, const float *bias, float *y, int threads) {
    const plan p = make_plan(s);
    const int out_h = bdm_out(s->h, s->kh, s->sh, s->ph), out_w = bdm_out(s->w, s->kw, s->sw, s->pw);
    const size_t row_words = (size_t)s->w * s->bits * p.words;
    float *scale = malloc(s->k * sizeof(float));
    uint64_t *image = malloc(row_words * s->n * s->h * 8);
    if (!scale || !image) {
        free(scale), free(image);
        return BDM_NO_MEMORY;
    }
    for (int k = 0; k < s->k; k++) scale[k] = sigma[k] * input->step;
    if ((double)s->n * out_h * out_w * s->k * s->c * p.taps < WORTH_A_THREAD * threads) threads = 1;
    const job j = {s, &p, image, (const uint64_t *)(arranged + p.sums), (const int32_t *)arranged,
                   input, scale, bias, y};
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (int row = 0; row < s->n * s->h; row++)
        pack_row(s, input, p.words, x, row / s->h, row % s->h, image + row * row_words);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (int row = 0; row < s->n * out_h; row++) put_row(&j, row / out_h, row % out_h, out_h, out_w);
    free(scale), free(image);
    return BDM_OK;
}

static int usable(void) { return 1; }

static const bdm_path planes = {"planes", usable, arranged_size, arrange, convolve};
static const bdm_path real = {"planes", usable, real_size, real_arrange, real_convolve};
BDM_BY_BITS(planes, &planes, &planes, &real)
