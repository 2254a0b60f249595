/* AVX-512 with VBMI and VPOPCNTDQ (Ice Lake, Zen 4 and later): 2..8-bit activations by lookup.

   A table register holds the 32 subset sums of 5 channels for two groups of channels. VPERMB with an index vector looks up
   64 sums: 32 output channels x 2 groups = 320 products in one instruction. Three lookups add in bytes (3 x 75 <= 255) with
   saturating adds, which leave the permute units alone; VPMADDUBSW joins the two groups into 16 bits. */

#include <immintrin.h>
#include "avx512_asm.h"
#include "bdm.h"

#define GROUP 5
#define CHANNELS 10
#define TABLE 64
#define PIXELS 8
#define UNIT 32
#define UNIT_INDEX 64
#define JOIN 3
#define LIMIT (145 * JOIN) /* 145 * 450 <= 65535 */
#define PLANE_BITS 4
#define BINARY 0

static inline void put_index(const bdm_shape *s, const uint8_t *bits, int k0, int table, int tap, uint8_t *to) {
    for (int k = 0; k < UNIT && k0 + k < s->k; k++)
        for (int group = 0; group < 2; group++) {
            int index = group << GROUP;
            for (int i = 0; i < GROUP; i++) {
                int c = table * CHANNELS + group * GROUP + i;
                if (c < s->c) index |= bdm_bit(bits, s, k0 + k, c, tap) << i;
            }
            to[k * 2 + group] = (uint8_t)index;
        }
}

/* The 64 entries are a[e & 3] + b[e >> 2 & 3] + c[e >> 4 & 1], a and b over two channels each: three permutations of the
   channels' u and of the sums of neighbours, which are made for three tables at a time. */
#define TABLES 3
#define FROM(t, g) ((t) * CHANNELS + (g))
#define ALTERNATING(g) 0, g, g + 1, g + 32
#define ALTERNATING_4(g) ALTERNATING(g), ALTERNATING(g), ALTERNATING(g), ALTERNATING(g)
#define FOURS(g) 0, 0, 0, 0, g, g, g, g, g + 1, g + 1, g + 1, g + 1, g + 32, g + 32, g + 32, g + 32
#define SIXTEEN(g) g, g, g, g, g, g, g, g, g, g, g, g, g, g, g, g
#define SOURCES(t) \
    {{ALTERNATING_4(FROM(t, 0)), ALTERNATING_4(FROM(t, 0)), ALTERNATING_4(FROM(t, 5)), ALTERNATING_4(FROM(t, 5))}, \
     {FOURS(FROM(t, 2)), FOURS(FROM(t, 2)), FOURS(FROM(t, 7)), FOURS(FROM(t, 7))}, \
     {SIXTEEN(0), SIXTEEN(FROM(t, 4)), SIXTEEN(0), SIXTEEN(FROM(t, 9))}}
static const uint8_t sources[TABLES][3][64] __attribute__((aligned(64))) = {SOURCES(0), SOURCES(1), SOURCES(2)};
/* byte g < 32: u of channel g; byte 32 + g: of channels g and g + 1 */

static inline __attribute__((always_inline)) void fill_tables_of(int plane, int nibbles, const uint8_t *u, int tables,
                                                                 uint8_t *to, size_t stride) {
    const __mmask64 in_first = 0xEEEEEEEEEEEEEEEEull, in_second = 0xFFF0FFF0FFF0FFF0ull;
    const __mmask64 in_third = 0xFFFF0000FFFF0000ull;
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int t = 0; t < tables; t += TABLES) {
        __m256i own = _mm256_loadu_si256((const __m256i *)(u + t * CHANNELS));
        __m256i next = _mm256_loadu_si256((const __m256i *)(u + t * CHANNELS + 1));
        if (plane) own = _mm256_srli_epi16(own, 4), next = _mm256_srli_epi16(next, 4);
        if (nibbles) own = _mm256_and_si256(own, nibble), next = _mm256_and_si256(next, nibble);
        const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(own), _mm256_add_epi8(own, next), 1);
        for (int i = 0; i < TABLES; i++) {
            if (t + i >= tables) break;
            __m512i entries = _mm512_maskz_permutexvar_epi8(in_first, _mm512_load_si512(sources[i][0]), all);
            entries = _mm512_add_epi8(
                entries, _mm512_maskz_permutexvar_epi8(in_second, _mm512_load_si512(sources[i][1]), all));
            entries = _mm512_add_epi8(
                entries, _mm512_maskz_permutexvar_epi8(in_third, _mm512_load_si512(sources[i][2]), all));
            _mm512_store_si512(to + (size_t)(t + i) * stride, entries);
        }
    }
}

static inline void fill_tables(const uint8_t *u, int plane, int planes, int tables, uint8_t *to, size_t stride) {
    if (planes == 1)
        fill_tables_of(0, 0, u, tables, to, stride);
    else if (plane == 0)
        fill_tables_of(0, 1, u, tables, to, stride);
    else
        fill_tables_of(1, 1, u, tables, to, stride);
}

#define LOAD(a) "vmovdqa64 64*" #a "(%[sums]),%%zmm" #a "\n"
#define STORE(a) "vmovdqa64 %%zmm" #a ",64*" #a "(%[sums])\n"

/* One pixel, three steps, 64 output channels: sums in registers a and b; indices in zmm16..21, ones in zmm22. */
#define PIXEL_64(p, a, b) \
    "vmovdqa64 64*" #p "(%%r8,%[left]),%%zmm23\n" \
    "vpermb %%zmm23,%%zmm16,%%zmm26\n vpermb %%zmm23,%%zmm17,%%zmm27\n" \
    "vmovdqa64 64*" #p "(%%r9,%[left]),%%zmm24\n" \
    "vpermb %%zmm24,%%zmm18,%%zmm28\n vpermb %%zmm24,%%zmm19,%%zmm29\n" \
    "vmovdqa64 64*" #p "(%%r10,%[left]),%%zmm25\n" \
    "vpermb %%zmm25,%%zmm20,%%zmm30\n vpermb %%zmm25,%%zmm21,%%zmm31\n" \
    "vpaddusb %%zmm26,%%zmm28,%%zmm26\n vpaddusb %%zmm27,%%zmm29,%%zmm27\n" \
    "vpaddusb %%zmm26,%%zmm30,%%zmm26\n vpaddusb %%zmm27,%%zmm31,%%zmm27\n" \
    "vpmaddubsw %%zmm22,%%zmm26,%%zmm26\n vpaddusw %%zmm26,%%zmm" #a ",%%zmm" #a "\n" \
    "vpmaddubsw %%zmm22,%%zmm27,%%zmm27\n vpaddusw %%zmm27,%%zmm" #b ",%%zmm" #b "\n"

/* The compiler's register allocator would spill this loop; written out, it keeps the permute units busy. */
__attribute__((noinline)) static void kernel_64(const uint8_t *const *points, const uint8_t *indices, long joins,
                                                size_t left, uint16_t *sums, int fresh) {
    __asm__ volatile(
        BEGIN(ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7)
              ZERO(8) ZERO(9) ZERO(10) ZERO(11) ZERO(12) ZERO(13) ZERO(14) ZERO(15),
              LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7)
              LOAD(8) LOAD(9) LOAD(10) LOAD(11) LOAD(12) LOAD(13) LOAD(14) LOAD(15))
        "mov $0x01010101,%%eax\n vpbroadcastd %%eax,%%zmm22\n"
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n mov 8(%[points]),%%r9\n mov 16(%[points]),%%r10\n"
        "vmovdqa64 (%[indices]),%%zmm16\n vmovdqa64 64(%[indices]),%%zmm17\n vmovdqa64 128(%[indices]),%%zmm18\n"
        "vmovdqa64 192(%[indices]),%%zmm19\n vmovdqa64 256(%[indices]),%%zmm20\n vmovdqa64 320(%[indices]),%%zmm21\n"
        "add $24,%[points]\n add $384,%[indices]\n"
        PIXEL_64(0, 0, 1) PIXEL_64(1, 2, 3) PIXEL_64(2, 4, 5) PIXEL_64(3, 6, 7)
        PIXEL_64(4, 8, 9) PIXEL_64(5, 10, 11) PIXEL_64(6, 12, 13) PIXEL_64(7, 14, 15)
        "dec %[joins]\n jne 1b\n"
        STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7)
        STORE(8) STORE(9) STORE(10) STORE(11) STORE(12) STORE(13) STORE(14) STORE(15)
        : [points] "+r"(points), [indices] "+r"(indices), [joins] "+r"(joins)
        : [left] "r"(left), [sums] "r"(sums), [fresh] "r"(fresh)
        : "rax", "r8", "r9", "r10", "memory", "cc", EVERY_REGISTER);
}

/* As PIXEL_64 for 32 output channels: indices in zmm16..18, ones in zmm22. */
#define PIXEL_32(p, a) \
    "vpermb 64*" #p "(%%r8,%[left]),%%zmm16,%%zmm26\n" \
    "vpermb 64*" #p "(%%r9,%[left]),%%zmm17,%%zmm27\n" \
    "vpermb 64*" #p "(%%r10,%[left]),%%zmm18,%%zmm28\n" \
    "vpaddusb %%zmm26,%%zmm27,%%zmm26\n vpaddusb %%zmm26,%%zmm28,%%zmm26\n" \
    "vpmaddubsw %%zmm22,%%zmm26,%%zmm26\n vpaddusw %%zmm26,%%zmm" #a ",%%zmm" #a "\n"

__attribute__((noinline)) static void kernel_32(const uint8_t *const *points, const uint8_t *indices, long joins,
                                                size_t left, uint16_t *sums, int fresh) {
    __asm__ volatile(
        BEGIN(ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7),
              LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7))
        "mov $0x01010101,%%eax\n vpbroadcastd %%eax,%%zmm22\n"
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n mov 8(%[points]),%%r9\n mov 16(%[points]),%%r10\n"
        "vmovdqa64 (%[indices]),%%zmm16\n vmovdqa64 64(%[indices]),%%zmm17\n vmovdqa64 128(%[indices]),%%zmm18\n"
        "add $24,%[points]\n add $192,%[indices]\n"
        PIXEL_32(0, 0) PIXEL_32(1, 1) PIXEL_32(2, 2) PIXEL_32(3, 3)
        PIXEL_32(4, 4) PIXEL_32(5, 5) PIXEL_32(6, 6) PIXEL_32(7, 7)
        "dec %[joins]\n jne 1b\n"
        STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7)
        : [points] "+r"(points), [indices] "+r"(indices), [joins] "+r"(joins)
        : [left] "r"(left), [sums] "r"(sums), [fresh] "r"(fresh)
        : "rax", "r8", "r9", "r10", "memory", "cc", EVERY_REGISTER);
}

/* As PIXEL_64 for 96 output channels: sums in a, b, c; indices in zmm12..20. */
#define PIXEL_96(p, a, b, c) \
    "vmovdqa64 64*" #p "(%%r8,%[left]),%%zmm21\n" \
    "vpermb %%zmm21,%%zmm12,%%zmm23\n vpermb %%zmm21,%%zmm13,%%zmm24\n vpermb %%zmm21,%%zmm14,%%zmm25\n" \
    "vmovdqa64 64*" #p "(%%r9,%[left]),%%zmm21\n" \
    "vpermb %%zmm21,%%zmm15,%%zmm26\n vpermb %%zmm21,%%zmm16,%%zmm27\n vpermb %%zmm21,%%zmm17,%%zmm28\n" \
    "vmovdqa64 64*" #p "(%%r10,%[left]),%%zmm21\n" \
    "vpermb %%zmm21,%%zmm18,%%zmm29\n vpermb %%zmm21,%%zmm19,%%zmm30\n vpermb %%zmm21,%%zmm20,%%zmm31\n" \
    "vpaddusb %%zmm23,%%zmm26,%%zmm23\n vpaddusb %%zmm24,%%zmm27,%%zmm24\n vpaddusb %%zmm25,%%zmm28,%%zmm25\n" \
    "vpaddusb %%zmm23,%%zmm29,%%zmm23\n vpaddusb %%zmm24,%%zmm30,%%zmm24\n vpaddusb %%zmm25,%%zmm31,%%zmm25\n" \
    "vpmaddubsw %%zmm22,%%zmm23,%%zmm23\n vpmaddubsw %%zmm22,%%zmm24,%%zmm24\n" \
    "vpmaddubsw %%zmm22,%%zmm25,%%zmm25\n vpaddusw %%zmm23,%%zmm" #a ",%%zmm" #a "\n" \
    "vpaddusw %%zmm24,%%zmm" #b ",%%zmm" #b "\n vpaddusw %%zmm25,%%zmm" #c ",%%zmm" #c "\n"

/* Four pixels only: three units of sums and indices fill the registers. */
__attribute__((noinline)) static void kernel_96(const uint8_t *const *points, const uint8_t *indices, long joins,
                                                size_t left, uint16_t *sums, int fresh) {
    __asm__ volatile(
        BEGIN(ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11),
              LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7) LOAD(8) LOAD(9) LOAD(10) LOAD(11))
        "mov $0x01010101,%%eax\n vpbroadcastd %%eax,%%zmm22\n"
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n mov 8(%[points]),%%r9\n mov 16(%[points]),%%r10\n"
        "vmovdqa64 (%[indices]),%%zmm12\n vmovdqa64 64(%[indices]),%%zmm13\n vmovdqa64 128(%[indices]),%%zmm14\n"
        "vmovdqa64 192(%[indices]),%%zmm15\n vmovdqa64 256(%[indices]),%%zmm16\n vmovdqa64 320(%[indices]),%%zmm17\n"
        "vmovdqa64 384(%[indices]),%%zmm18\n vmovdqa64 448(%[indices]),%%zmm19\n vmovdqa64 512(%[indices]),%%zmm20\n"
        "add $24,%[points]\n add $576,%[indices]\n"
        PIXEL_96(0, 0, 1, 2) PIXEL_96(1, 3, 4, 5) PIXEL_96(2, 6, 7, 8) PIXEL_96(3, 9, 10, 11)
        "dec %[joins]\n jne 1b\n"
        STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7) STORE(8) STORE(9) STORE(10) STORE(11)
        : [points] "+r"(points), [indices] "+r"(indices), [joins] "+r"(joins)
        : [left] "r"(left), [sums] "r"(sums), [fresh] "r"(fresh)
        : "rax", "r8", "r9", "r10", "memory", "cc", EVERY_REGISTER);
}

static inline void kernel(int units, const uint8_t *const *points, const uint8_t *indices, int steps, size_t left,
                          uint16_t *sums, int fresh) {
    if (units == 2)
        kernel_64(points, indices, steps / JOIN, left, sums, fresh);
    else if (units == 1)
        kernel_32(points, indices, steps / JOIN, left, sums, fresh);
    else
        for (int half = 0; half < 2; half++)
            kernel_96(points, indices, steps / JOIN, left + (size_t)half * 4 * TABLE, sums + half * 4 * 96,
                      fresh);
}

#include "avx512.h"
#include "lookup.h"

static int usable(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#include "by_bits.h"

extern const bdm_path bdm_avx512_binary, bdm_avx2_real;
static const bdm_path lookup = {"avx512", usable, arranged_size, arrange, convolve};
BDM_BY_BITS(avx512, &bdm_avx512_binary, &lookup, &bdm_avx2_real)
