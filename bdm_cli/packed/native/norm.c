/* Group normalisation as what it does to each channel: x -> gain x + shift. */

#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "bdm.h"

#define RUN 64  /* pixels whose sums are in fp32 before they go on in fp64 */
#define WIDE 64 /* neighbours that are summed together */

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define EVERY_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_VECTOR
#endif

/* sums[0][i] += the sum of x - at[i], sums[1][i] += of its square, over rows of `count` <= WIDE numbers. */
EVERY_VECTOR static void add_rows(const float *x, size_t next, int64_t rows, int count, const float *at, double *sums[2]) {
    for (int64_t from = 0; from < rows; from += RUN) {
        float some[2][WIDE] = {{0}};
        for (int64_t row = from; row < rows && row < from + RUN; row++)
            for (int i = 0; i < count; i++) {
                const float d = x[row * next + i] - at[i];
                some[0][i] += d, some[1][i] += d * d;
            }
        for (int i = 0; i < count; i++) sums[0][i] += some[0][i], sums[1][i] += some[1][i];
    }
}

/* gain = weight / sqrt(variance + eps), shift = bias - mean gain, over groups of channels of x: [n, c, pixels], or
   [n, pixels, c] if channels_last. weight and bias: [c], or NULL; gain and shift: [n, c]. Each channel's sums are taken
   around its first number, so that a large mean does not swallow the variance. */
int bdm_group_affine(const float *x, int n, int c, int64_t pixels, int groups, int channels_last, float eps,
                     const float *weight, const float *bias, float *gain, float *shift, int threads) {
    const int team = threads;
    if ((double)n * c * pixels < 2e5) threads = 1;
    const int parts = channels_last ? threads : 1, size = c / groups;
    double *sums = calloc((size_t)n * parts * c * 2, sizeof(double)); /* [n][parts][2][c] */
    if (!sums) return BDM_NO_MEMORY;
    const int items = channels_last ? n * parts : n * c;
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) if (threads > 1)
#endif
    for (int item = 0; item < items; item++) {
        const int image = item / (channels_last ? parts : c), part = item % (channels_last ? parts : c);
        const float *of = x + (size_t)image * c * pixels;
        double *own = sums + (size_t)image * parts * c * 2;
        if (channels_last) {
            own += (size_t)part * c * 2;
            const int64_t first = pixels * part / parts, last = pixels * (part + 1) / parts;
            for (int i = 0; i < c; i += WIDE) {
                double *to[2] = {own + i, own + c + i};
                add_rows(of + first * c + i, c, last - first, c - i < WIDE ? c - i : WIDE, of + i, to);
            }
        } else {
            const float *row = of + part * pixels;
            double wide[2][WIDE] = {{0}}, *to[2] = {wide[0], wide[1]};
            float at[WIDE];
            for (int i = 0; i < WIDE; i++) at[i] = row[0];
            add_rows(row, WIDE, pixels / WIDE, WIDE, at, to);
            add_rows(row + pixels / WIDE * WIDE, 0, 1, (int)(pixels % WIDE), at, to);
            for (int i = 0; i < WIDE; i++) own[part] += wide[0][i], own[c + part] += wide[1][i];
        }
    }
    for (int image = 0; image < n; image++)
        for (int group = 0; group < groups; group++) {
            double mean = 0, squares = 0, between = 0;
            double means[size];
            for (int i = 0; i < size; i++) {
                const int channel = group * size + i;
                double first = 0, second = 0;
                for (int part = 0; part < parts; part++) {
                    const double *own = sums + ((size_t)image * parts + part) * c * 2;
                    first += own[channel], second += own[c + channel];
                }
                const float at = x[(size_t)image * c * pixels + (channels_last ? channel : channel * pixels)];
                means[i] = at + first / pixels;
                mean += means[i] / size;
                squares += second - first * first / pixels;
            }
            for (int i = 0; i < size; i++) between += (means[i] - mean) * (means[i] - mean);
            const double variance = (squares + between * pixels) / ((double)size * pixels);
            const double by = 1 / sqrt((variance > 0 ? variance : 0) + eps);
            for (int i = 0; i < size; i++) {
                const int channel = group * size + i;
                const double scale = by * (weight ? weight[channel] : 1);
                gain[(size_t)image * c + channel] = (float)scale;
                shift[(size_t)image * c + channel] = (float)((bias ? bias[channel] : 0) - mean * scale);
            }
        }
    free(sums);
    return BDM_OK;
}
