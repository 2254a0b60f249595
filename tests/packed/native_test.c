/* Compares every path of the library that can run here with sums in the order of the definition, over random shapes.

   native_test [cases [seed [path]]]: prints one line for each path, and one for each case that differs; returns their
   number.
   It needs no Python, so that the paths of another processor can be checked in an emulator. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "bdm.h"

static uint64_t state;

/* 0 .. n - 1 (xorshift) */
static int random_below(int n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int)((state >> 20) % (uint64_t)n);
}

static void *room(size_t size) {
    void *memory = aligned_alloc(64, (size + 64) / 64 * 64);
    if (!memory) exit(125);
    memset(memory, 0, (size + 64) / 64 * 64);
    return memory;
}

/* a of one number, and what stands before it is quantized. Numbers are chosen so that every step of it but SiLU is
   exact. */
static double level(const bdm_shape *s, const bdm_input *input, int n, int c, float x) {
    if (input->gain) {
        x = x * input->gain[n * s->c + c] + input->shift[n * s->c + c];
        if (input->silu) x = (float)(x / (1 + exp(-(double)x)));
    }
    if (s->bits == 32) return x;
    if (s->bits == 1) return x >= (input->threshold ? input->threshold[c] : 0) ? 1 : -1;
    const float high = input->low + (float)((1 << s->bits) - 1);
    float v = rintf(x / input->step + input->zero);
    v = v > high ? high : v >= input->low ? v : input->low;
    return v - input->zero;
}

/* One random case: how many numbers of y are wrong. */
static int wrong(const bdm_path *path, int bits) {
    bdm_shape s = {.n = 1 + random_below(3), .c = 1 + random_below(random_below(4) ? 70 : 600),
                   .k = 1 + random_below(130), .kh = 1 + random_below(4), .kw = 1 + random_below(4),
                   .sh = 1 + random_below(3), .sw = 1 + random_below(3), .bits = bits,
                   .channels_last = random_below(2)};
    if (!random_below(4)) s.kh = s.kw = s.sh = s.sw = 1;
    s.ph = random_below(s.kh), s.pw = random_below(s.kw);
    s.h = s.kh + random_below(9), s.w = s.kw + random_below(20);
    bdm_input input = {.step = bits == 32 ? 1.0f : 0.25f};
    input.zero = bits == 1 || bits == 32 ? 0 : (float)(random_below(3) ? random_below(7) - 3 : random_below(600) - 300);
    input.low = bits == 32 || random_below(2) ? 0 : -(float)(1 << (bits - 1));
    s.zero = (int)(input.zero - input.low);
    const int out_h = bdm_out(s.h, s.kh, s.sh, s.ph), out_w = bdm_out(s.w, s.kw, s.sw, s.pw), taps = s.kh * s.kw;
    const size_t row = ((size_t)s.c * taps + 7) / 8, pixels = (size_t)s.h * s.w, size = s.n * s.c * pixels;
    const size_t out_pixels = (size_t)out_h * out_w, out_size = s.n * s.k * out_pixels;
    uint8_t *weights = room(s.k * row), *arranged = room(path->arranged_size(&s));
    float *x = room(size * 4), *sigma = room(s.k * 4), *bias = room(s.k * 4), *y = room(out_size * 4);
    float *gain = room(s.n * s.c * 4), *shift = room(s.n * s.c * 4), *threshold = room(s.c * 4);
    double *a = room(size * 8); /* [n][c][h][w] */
    const int ones = !random_below(8);
    for (size_t i = 0; i < s.k * row; i++) weights[i] = ones ? 255 : (uint8_t)random_below(256);
    for (int k = 0; k < s.k; k++) sigma[k] = 1 / input.step, bias[k] = (float)random_below(9);
    for (int i = 0; i < s.n * s.c; i++) gain[i] = random_below(2) ? 2.0f : -0.5f, shift[i] = (float)random_below(5) / 8;
    for (int c = 0; c < s.c; c++) threshold[c] = (float)(random_below(9) - 4) / 8;
    const float range = bits == 32 ? 1 : (float)(1 << bits) / 4; /* twice that of the levels */
    for (size_t i = 0; i < size; i++) x[i] = (float)(random_below(257) - 128) / 128 * range;
    if (bits < 32)
        for (size_t i = 0; i < size; i += 1 + random_below(50)) {
            static const float special[] = {INFINITY, -INFINITY, NAN, 3e38f, -3e38f, 1e-41f, -0.0f};
            x[i] = special[random_below(7)];
        }
    const int with_gain = random_below(2), with_bias = random_below(2);
    if (with_gain) input.gain = gain, input.shift = shift, input.silu = bits == 32 && random_below(2);
    if (bits == 1 && random_below(2)) input.threshold = threshold;
    for (int n = 0; n < s.n; n++)
        for (int c = 0; c < s.c; c++)
            for (size_t i = 0; i < pixels; i++) {
                const size_t at = (size_t)n * s.c * pixels + (s.channels_last ? i * s.c + c : c * pixels + i);
                a[((size_t)n * s.c + c) * pixels + i] = level(&s, &input, n, c, x[at]);
            }
    bdm_shape for_weights = s;
    for_weights.n = 1, for_weights.h = s.kh, for_weights.w = s.kw, for_weights.channels_last = 1;
    path->arrange(&for_weights, weights, arranged);
    if (path->convolve(&s, &input, x, arranged, sigma, with_bias ? bias : NULL, y, 1 + random_below(3))) exit(125);
    int bad = 0;
    for (int n = 0; n < s.n; n++)
        for (int k = 0; k < s.k; k++)
            for (int i = 0; i < (int)out_pixels; i++) {
                double sum = with_bias ? bias[k] : 0, bound = 0;
                for (int c = 0; c < s.c; c++)
                    for (int tap = 0; tap < taps; tap++) {
                        const int above = i / out_w * s.sh - s.ph + tap / s.kw;
                        const int left = i % out_w * s.sw - s.pw + tap % s.kw;
                        if (above < 0 || above >= s.h || left < 0 || left >= s.w) continue;
                        const double of = a[((size_t)n * s.c + c) * pixels + above * s.w + left];
                        sum += bdm_bit(weights, &s, k, c, tap) ? of : -of;
                        bound += fabs(of);
                    }
                const size_t at = s.channels_last ? i * (size_t)s.k + k : k * out_pixels + i;
                bad += !(fabs(y[(size_t)n * s.k * out_pixels + at] - sum) <= (bits == 32 ? 1e-6 * bound + 1e-6 : 0));
            }
    if (bad)
        printf("%s %d bits: %d of %zu differ: n %d c %d %dx%d k %d kernel %dx%d stride %dx%d padding %dx%d zero %d "
               "last %d gain %d\n", path->name, bits, bad, out_size, s.n, s.c, s.h, s.w, s.k, s.kh, s.kw, s.sh, s.sw,
               s.ph, s.pw, s.zero, s.channels_last, with_gain);
    free(weights), free(arranged), free(x), free(sigma), free(bias), free(y), free(gain), free(shift), free(threshold);
    free(a);
    return bad != 0;
}

int main(int argc, char **argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : 100;
    static const int bits[] = {1, 2, 3, 4, 5, 8, 32};
    int bad = 0;
    for (const bdm_path *const *path = bdm_paths; *path; path++) {
        if (!(*path)->usable() || (argc > 3 && strcmp(argv[3], (*path)->name))) continue;
        state = 88172645463325252ull + (argc > 2 ? strtoull(argv[2], NULL, 10) : 0);
        int differ = 0;
        for (int i = 0; i < cases; i++) differ += wrong(*path, bits[i % 7]);
        printf("%s: %d of %d cases differ\n", (*path)->name, differ, cases);
        bad += differ;
    }
    return bad > 100 ? 100 : bad;
}
