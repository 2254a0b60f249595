/* AVX-512: 1-bit activations, by AND and population count.

   In lookup.h's terms the "table" of 32 channels is their 32 bits, the index is the weights' 32 bits, and the entry that it
   names is the number of bits that both share: one VPANDD and one VPOPCNTD for 16 output channels x 32 products. */

#include <immintrin.h>
#include "avx512_asm.h"
#include "bdm.h"

#define CHANNELS 32
#define TABLE 4
#define PIXELS 8
#define UNIT 16
#define UNIT_INDEX 64
#define JOIN 1
#define LIMIT 2047 /* 2047 * 32 <= 65535 */
#define PLANE_BITS 1
#define BINARY 1

static inline void put_index(const bdm_shape *s, const uint8_t *bits, int k0, int table, int tap, uint8_t *to) {
    for (int k = 0; k < UNIT && k0 + k < s->k; k++) {
        uint32_t index = 0;
        for (int i = 0; i < CHANNELS && table * CHANNELS + i < s->c; i++)
            index |= (uint32_t)bdm_bit(bits, s, k0 + k, table * CHANNELS + i, tap) << i;
        ((uint32_t *)to)[k] = index;
    }
}

static inline void fill_tables(const uint8_t *u, int plane, int planes, int tables, uint8_t *to, size_t stride) {
    (void)plane, (void)planes;
    for (int t = 0; t < tables; t++) {
        const __m256i own = _mm256_loadu_si256((const __m256i *)(u + t * CHANNELS));
        *(uint32_t *)(to + (size_t)t * stride) = _mm256_test_epi8_mask(own, own);
    }
}

#define STORE(a) "vpmovdw %%zmm" #a ",32*" #a "(%[sums])\n"
#define LOAD(a) "vpmovzxwd 32*" #a "(%[sums]),%%zmm" #a "\n"
#define SHARED(p, index, x, sum) \
    "vpandd 4*" #p "(%%r8,%[left])%{1to16%},%%zmm" #index ",%%zmm" #x "\n vpopcntd %%zmm" #x ",%%zmm" #x "\n" \
    "vpaddd %%zmm" #x ",%%zmm" #sum ",%%zmm" #sum "\n"

/* Indices in zmm24 and zmm25. */
__attribute__((noinline)) static void kernel_2(const uint8_t *const *points, const uint8_t *indices, long steps,
                                               size_t left, uint16_t *sums, int fresh) {
    __asm__ volatile(
        BEGIN(ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7)
              ZERO(8) ZERO(9) ZERO(10) ZERO(11) ZERO(12) ZERO(13) ZERO(14) ZERO(15),
              LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7)
              LOAD(8) LOAD(9) LOAD(10) LOAD(11) LOAD(12) LOAD(13) LOAD(14) LOAD(15))
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n"
        "vmovdqa64 (%[indices]),%%zmm24\n vmovdqa64 64(%[indices]),%%zmm25\n"
        "add $8,%[points]\n add $128,%[indices]\n"
        SHARED(0, 24, 26, 0) SHARED(0, 25, 27, 1) SHARED(1, 24, 28, 2) SHARED(1, 25, 29, 3)
        SHARED(2, 24, 30, 4) SHARED(2, 25, 31, 5) SHARED(3, 24, 26, 6) SHARED(3, 25, 27, 7)
        SHARED(4, 24, 28, 8) SHARED(4, 25, 29, 9) SHARED(5, 24, 30, 10) SHARED(5, 25, 31, 11)
        SHARED(6, 24, 26, 12) SHARED(6, 25, 27, 13) SHARED(7, 24, 28, 14) SHARED(7, 25, 29, 15)
        "dec %[steps]\n jne 1b\n"
        STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7)
        STORE(8) STORE(9) STORE(10) STORE(11) STORE(12) STORE(13) STORE(14) STORE(15)
        : [points] "+r"(points), [indices] "+r"(indices), [steps] "+r"(steps)
        : [left] "r"(left), [sums] "r"(sums), [fresh] "r"(fresh)
        : "r8", "memory", "cc", EVERY_REGISTER);
}

/* Indices in zmm24..26. */
__attribute__((noinline)) static void kernel_3(const uint8_t *const *points, const uint8_t *indices, long steps,
                                               size_t left, uint16_t *sums, int fresh) {
    __asm__ volatile(
        BEGIN(ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)
              ZERO(12) ZERO(13) ZERO(14) ZERO(15) ZERO(16) ZERO(17) ZERO(18) ZERO(19) ZERO(20) ZERO(21) ZERO(22) ZERO(23),
              LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7) LOAD(8) LOAD(9) LOAD(10) LOAD(11)
              LOAD(12) LOAD(13) LOAD(14) LOAD(15) LOAD(16) LOAD(17) LOAD(18) LOAD(19) LOAD(20) LOAD(21) LOAD(22) LOAD(23))
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n"
        "vmovdqa64 (%[indices]),%%zmm24\n vmovdqa64 64(%[indices]),%%zmm25\n vmovdqa64 128(%[indices]),%%zmm26\n"
        "add $8,%[points]\n add $192,%[indices]\n"
        SHARED(0, 24, 27, 0) SHARED(0, 25, 28, 1) SHARED(0, 26, 29, 2) SHARED(1, 24, 30, 3) SHARED(1, 25, 31, 4)
        SHARED(1, 26, 27, 5) SHARED(2, 24, 28, 6) SHARED(2, 25, 29, 7) SHARED(2, 26, 30, 8) SHARED(3, 24, 31, 9)
        SHARED(3, 25, 27, 10) SHARED(3, 26, 28, 11) SHARED(4, 24, 29, 12) SHARED(4, 25, 30, 13) SHARED(4, 26, 31, 14)
        SHARED(5, 24, 27, 15) SHARED(5, 25, 28, 16) SHARED(5, 26, 29, 17) SHARED(6, 24, 30, 18) SHARED(6, 25, 31, 19)
        SHARED(6, 26, 27, 20) SHARED(7, 24, 28, 21) SHARED(7, 25, 29, 22) SHARED(7, 26, 30, 23)
        "dec %[steps]\n jne 1b\n"
        STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7) STORE(8) STORE(9) STORE(10) STORE(11)
        STORE(12) STORE(13) STORE(14) STORE(15) STORE(16) STORE(17) STORE(18) STORE(19) STORE(20) STORE(21) STORE(22)
        STORE(23)
        : [points] "+r"(points), [indices] "+r"(indices), [steps] "+r"(steps)
        : [left] "r"(left), [sums] "r"(sums), [fresh] "r"(fresh)
        : "r8", "memory", "cc", EVERY_REGISTER);
}

static void kernel_1(const uint8_t *const *points, const uint8_t *indices, long steps, size_t left, uint16_t *sums,
                     int fresh) {
    for (int p = 0; p < PIXELS; p++) {
        __m512i sum = _mm512_setzero_si512();
        if (!fresh) sum = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i *)(sums + p * UNIT)));
        for (long step = 0; step < steps; step++) {
            const __m512i own = _mm512_set1_epi32(*(const int32_t *)(points[step] + left + p * TABLE));
            const __m512i shared = _mm512_and_si512(own, _mm512_load_si512(indices + step * UNIT_INDEX));
            sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(shared));
        }
        _mm256_store_si256((__m256i *)(sums + p * UNIT), _mm512_cvtepi32_epi16(sum));
    }
}

static inline void kernel(int units, const uint8_t *const *points, const uint8_t *indices, int steps, size_t left,
                          uint16_t *sums, int fresh) {
    (units == 2 ? kernel_2 : units == 3 ? kernel_3 : kernel_1)(points, indices, steps, left, sums, fresh);
}

#include "avx512.h"
#include "lookup.h"

/* Used where bdm_avx512 is. */
const bdm_path bdm_avx512_binary = {"avx512, 1 bit", NULL, arranged_size, arrange, convolve};
