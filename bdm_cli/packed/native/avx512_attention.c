/* AVX-512: attention in fp32, softmax(scale Q K^T) V, head by head.

   Keys are laid out so that 32 of them are neighbours for each channel, values so that a key's channels are; then 8 queries
   at a time are multiplied with all keys, turned into probabilities, and multiplied with all values, without leaving the
   second cache. Every number is computed in fp32, as in a plain implementation. */

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "avx512_math.h"
#include "bdm.h"

#define QUERIES 8
#define KEYS 32
#define VECTOR 16

/* scores[i][key] = sum over channels of q[i] k[key]; keys: [blocks][d][KEYS]. */
__attribute__((noinline)) static void multiply_keys(const float *const q[QUERIES], int d, const float *keys, int blocks,
                                                    float *scores, size_t row) {
    for (int block = 0; block < blocks; block++) {
        __m512 sum[QUERIES][2];
        for (int i = 0; i < QUERIES; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int c = 0; c < d; c++, keys += KEYS) {
            const __m512 a = _mm512_load_ps(keys), b = _mm512_load_ps(keys + VECTOR);
            for (int i = 0; i < QUERIES; i++) {
                const __m512 x = _mm512_set1_ps(q[i][c]);
                sum[i][0] = _mm512_fmadd_ps(x, a, sum[i][0]);
                sum[i][1] = _mm512_fmadd_ps(x, b, sum[i][1]);
            }
        }
        for (int i = 0; i < QUERIES; i++) {
            _mm512_store_ps(scores + i * row + block * KEYS, sum[i][0]);
            _mm512_store_ps(scores + i * row + block * KEYS + VECTOR, sum[i][1]);
        }
    }
}

/* scores -> exp(scale (score - largest)), in place, 0 beyond n; returns 1 / their sum. */
__attribute__((noinline)) static float exponentiate(float *scores, int n, int padded, float scale) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    const int whole = n / VECTOR * VECTOR;
    const __mmask16 rest = (__mmask16)((1u << (n - whole)) - 1);
    for (int at = 0; at < whole; at += VECTOR) most = _mm512_max_ps(most, _mm512_load_ps(scores + at));
    if (rest) most = _mm512_mask_max_ps(most, rest, most, _mm512_load_ps(scores + whole));
    const __m512 by = _mm512_set1_ps(scale), off = _mm512_set1_ps(-_mm512_reduce_max_ps(most) * scale);
    for (int at = 0; at < whole; at += VECTOR) {
        const __m512 p = exp_512(_mm512_fmadd_ps(_mm512_load_ps(scores + at), by, off));
        _mm512_store_ps(scores + at, p);
        total = _mm512_add_ps(total, p);
    }
    for (int at = whole; at < padded; at += VECTOR) {
        const __mmask16 in = at == whole ? rest : 0;
        const __m512 p = _mm512_maskz_mov_ps(in, exp_512(_mm512_fmadd_ps(_mm512_load_ps(scores + at), by, off)));
        _mm512_store_ps(scores + at, p);
        total = _mm512_add_ps(total, p);
    }
    return 1 / _mm512_reduce_add_ps(total);
}

/* sums[i] = sum over keys of scores[i][key] v[key], 32 channels. values: `width` floats from key to key. */
__attribute__((noinline)) static void multiply_values(const float *scores, size_t row, int n, const float *values, int width,
                                                      const float scale[QUERIES], float sums[QUERIES][2 * VECTOR]) {
    __m512 sum[QUERIES][2];
    for (int i = 0; i < QUERIES; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int key = 0; key < n; key++, values += width) {
        const __m512 a = _mm512_load_ps(values), b = _mm512_load_ps(values + VECTOR);
        for (int i = 0; i < QUERIES; i++) {
            const __m512 p = _mm512_set1_ps(scores[i * row + key]);
            sum[i][0] = _mm512_fmadd_ps(p, a, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(p, b, sum[i][1]);
        }
    }
    for (int i = 0; i < QUERIES; i++)
        for (int half = 0; half < 2; half++)
            _mm512_store_ps(sums[i] + half * VECTOR, _mm512_mul_ps(sum[i][half], _mm512_set1_ps(scale[i])));
}

/* One head: queries first .. last - 1. q, y: [l][c] and k, v: [m][c], from the head's own channels on. */
static int head(const float *q, const float *k, const float *v, int first, int last, int m, int c, int d, float scale,
                float *y) {
    const int blocks = up(m, KEYS), padded = blocks * KEYS, width = up(d, 2 * VECTOR) * 2 * VECTOR;
    const size_t row = padded + VECTOR;
    float *memory = aligned_alloc(64, ((size_t)padded * (d + width) + QUERIES * row) * sizeof(float));
    if (!memory) return 0;
    float *keys = memory, *values = keys + (size_t)padded * d, *scores = values + (size_t)padded * width;
    for (int block = 0; block < blocks; block++)
        for (int i = 0; i < d; i++)
            for (int key = 0; key < KEYS; key++) {
                const int at = block * KEYS + key;
                keys[((size_t)block * d + i) * KEYS + key] = at < m ? k[(size_t)at * c + i] : 0;
            }
    for (int key = 0; key < m; key++) {
        memcpy(values + (size_t)key * width, v + (size_t)key * c, d * sizeof(float));
        memset(values + (size_t)key * width + d, 0, (width - d) * sizeof(float));
    }
    for (int from = first; from < last; from += QUERIES) {
        const float *of[QUERIES];
        float by[QUERIES], sums[QUERIES][2 * VECTOR] __attribute__((aligned(64)));
        const int some = last - from < QUERIES ? last - from : QUERIES;
        for (int i = 0; i < QUERIES; i++) of[i] = q + (size_t)(from + (i < some ? i : 0)) * c;
        multiply_keys(of, d, keys, blocks, scores, row);
        for (int i = 0; i < QUERIES; i++) by[i] = exponentiate(scores + i * row, m, padded, scale);
        for (int at = 0; at < d; at += 2 * VECTOR) {
            multiply_values(scores, row, m, values + at, width, by, sums);
            const int channels = d - at < 2 * VECTOR ? d - at : 2 * VECTOR;
            for (int i = 0; i < some; i++) memcpy(y + (size_t)(from + i) * c + at, sums[i], channels * sizeof(float));
        }
    }
    free(memory);
    return 1;
}

/* q, y: fp32 [n, l, heads * d]; k, v: fp32 [n, m, heads * d]. */
int bdm_attention_avx512(const float *q, const float *k, const float *v, int n, int l, int m, int heads, int d, float scale,
                         float *y, int threads) {
    const int c = heads * d, parts = up(threads, n * heads), items = n * heads * parts;
    const int team = threads;
    int failed = 0;
    if ((double)n * heads * l * m * d < 4e5) threads = 1;
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) schedule(dynamic) if (threads > 1) reduction(|| : failed)
#endif
    for (int item = 0; item < items; item++) {
        const int part = item % parts, which = item / parts, image = which / heads;
        const size_t own = (size_t)(which % heads) * d, at = (size_t)image * l * c + own, key = (size_t)image * m * c + own;
        const int tiles = up(l, QUERIES), first = tiles * part / parts * QUERIES, end = tiles * (part + 1) / parts * QUERIES;
        failed = failed || !head(q + at, k + key, v + key, first, end < l ? end : l, m, c, d, scale, y + at);
    }
    return failed ? BDM_NO_MEMORY : BDM_OK;
}
