/* AVX2 (Haswell, Zen and later): 2..8-bit activations by lookup (see avx2.h); four lookups add in bytes: 4 x 60 <= 255.
   Sends 1 bit and real activations where they belong. */

#define BINARY 0
#define JOIN 4
#define LIMIT (273 * JOIN) /* 273 * 240 <= 65535 */
#ifndef NEAR
#define NEAR (8 << 10)
#endif
#include "avx2.h"

#define EIGHT_SUMS \
    [a0] "+x"(all[0]), [a1] "+x"(all[1]), [a2] "+x"(all[2]), [a3] "+x"(all[3]), [h0] "+x"(high[0]), \
    [h1] "+x"(high[1]), [h2] "+x"(high[2]), [h3] "+x"(high[3])
#define OTHER_REGISTERS "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15"
#define WIDEN(i, bytes) \
    "vpaddw %%ymm" #bytes ",%[a" #i "],%[a" #i "]\n vpsrlw $8,%%ymm" #bytes ",%%ymm" #bytes "\n" \
    "vpaddw %%ymm" #bytes ",%[h" #i "],%[h" #i "]\n"

/* One step of 2 pixels and 64 output channels, into the bytes ymm8..11: the first of four, and the others. */
#define BEGIN_64(point, at) \
    "vmovdqu " #at "(%[indices]),%%ymm12\n vmovdqu " #at "+32(%[indices]),%%ymm13\n" \
    "vbroadcasti128 (%%" #point ",%[left]),%%ymm14\n vbroadcasti128 16(%%" #point ",%[left]),%%ymm15\n" \
    "vpshufb %%ymm12,%%ymm14,%%ymm8\n vpshufb %%ymm13,%%ymm14,%%ymm9\n" \
    "vpshufb %%ymm12,%%ymm15,%%ymm10\n vpshufb %%ymm13,%%ymm15,%%ymm11\n"
#define ADD_64(point, at) \
    "vmovdqu " #at "(%[indices]),%%ymm12\n vmovdqu " #at "+32(%[indices]),%%ymm13\n" \
    "vbroadcasti128 (%%" #point ",%[left]),%%ymm14\n" \
    "vpshufb %%ymm12,%%ymm14,%%ymm15\n vpshufb %%ymm13,%%ymm14,%%ymm14\n" \
    "vpaddb %%ymm15,%%ymm8,%%ymm8\n vpaddb %%ymm14,%%ymm9,%%ymm9\n" \
    "vbroadcasti128 16(%%" #point ",%[left]),%%ymm14\n" \
    "vpshufb %%ymm12,%%ymm14,%%ymm15\n vpshufb %%ymm13,%%ymm14,%%ymm14\n" \
    "vpaddb %%ymm15,%%ymm10,%%ymm10\n vpaddb %%ymm14,%%ymm11,%%ymm11\n"

/* 2 pixels, 64 output channels. The compiler's register allocator would spill these loops: all 16 registers are used.
   width: output channels of the block. */
__attribute__((noinline)) static void kernel_64(const uint8_t *const *points, const uint8_t *indices, long joins,
                                                size_t left, uint16_t *sums, int fresh, size_t width) {
    __m256i all[4], high[4];
    for (int i = 0; i < 4; i++) all[i] = high[i] = _mm256_setzero_si256();
    __asm__ volatile(
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n mov 8(%[points]),%%r9\n mov 16(%[points]),%%r10\n mov 24(%[points]),%%r11\n"
        BEGIN_64(r8, 0)
        "add %[width],%[indices]\n" ADD_64(r9, 0)
        "add %[width],%[indices]\n" ADD_64(r10, 0)
        "add %[width],%[indices]\n" ADD_64(r11, 0)
        "add %[width],%[indices]\n add $32,%[points]\n"
        WIDEN(0, 8) WIDEN(1, 9) WIDEN(2, 10) WIDEN(3, 11)
        "dec %[joins]\n jne 1b\n"
        : [points] "+r"(points), [indices] "+r"(indices), [joins] "+r"(joins), EIGHT_SUMS
        : [left] "r"(left), [width] "r"(width)
        : "r8", "r9", "r10", "r11", "memory", "cc", OTHER_REGISTERS);
    for (int pixel = 0; pixel < 2; pixel++)
        for (int unit = 0; unit < 2; unit++)
            put_sums(all[2 * pixel + unit], high[2 * pixel + unit], sums + pixel * width + unit * UNIT, fresh);
}

/* One step of 4 pixels and 32 output channels. */
#define BEGIN_32(point) \
    "vmovdqu (%[indices]),%%ymm12\n" \
    "vbroadcasti128 (%%" #point ",%[left]),%%ymm13\n vbroadcasti128 16(%%" #point ",%[left]),%%ymm14\n" \
    "vpshufb %%ymm12,%%ymm13,%%ymm8\n vpshufb %%ymm12,%%ymm14,%%ymm9\n" \
    "vbroadcasti128 32(%%" #point ",%[left]),%%ymm13\n vbroadcasti128 48(%%" #point ",%[left]),%%ymm14\n" \
    "vpshufb %%ymm12,%%ymm13,%%ymm10\n vpshufb %%ymm12,%%ymm14,%%ymm11\n"
#define ADD_32(point) \
    "vmovdqu (%[indices]),%%ymm12\n" \
    "vbroadcasti128 (%%" #point ",%[left]),%%ymm13\n vbroadcasti128 16(%%" #point ",%[left]),%%ymm14\n" \
    "vpshufb %%ymm12,%%ymm13,%%ymm13\n vpshufb %%ymm12,%%ymm14,%%ymm14\n" \
    "vpaddb %%ymm13,%%ymm8,%%ymm8\n vpaddb %%ymm14,%%ymm9,%%ymm9\n" \
    "vbroadcasti128 32(%%" #point ",%[left]),%%ymm13\n vbroadcasti128 48(%%" #point ",%[left]),%%ymm14\n" \
    "vpshufb %%ymm12,%%ymm13,%%ymm13\n vpshufb %%ymm12,%%ymm14,%%ymm14\n" \
    "vpaddb %%ymm13,%%ymm10,%%ymm10\n vpaddb %%ymm14,%%ymm11,%%ymm11\n"

/* 4 pixels, 32 output channels. */
__attribute__((noinline)) static void kernel_32(const uint8_t *const *points, const uint8_t *indices, long joins,
                                                size_t left, uint16_t *sums, int fresh, size_t width) {
    __m256i all[4], high[4];
    for (int i = 0; i < 4; i++) all[i] = high[i] = _mm256_setzero_si256();
    __asm__ volatile(
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n mov 8(%[points]),%%r9\n mov 16(%[points]),%%r10\n mov 24(%[points]),%%r11\n"
        BEGIN_32(r8)
        "add %[width],%[indices]\n" ADD_32(r9)
        "add %[width],%[indices]\n" ADD_32(r10)
        "add %[width],%[indices]\n" ADD_32(r11)
        "add %[width],%[indices]\n add $32,%[points]\n"
        WIDEN(0, 8) WIDEN(1, 9) WIDEN(2, 10) WIDEN(3, 11)
        "dec %[joins]\n jne 1b\n"
        : [points] "+r"(points), [indices] "+r"(indices), [joins] "+r"(joins), EIGHT_SUMS
        : [left] "r"(left), [width] "r"(width)
        : "r8", "r9", "r10", "r11", "memory", "cc", OTHER_REGISTERS);
    for (int pixel = 0; pixel < 4; pixel++) put_sums(all[pixel], high[pixel], sums + pixel * width, fresh);
}

/* A block's indices are UNIT_INDEX = UNIT bytes of each unit in turn: from step to step as far apart as the sums are
   from pixel to pixel. */
static inline void kernel(int units, const uint8_t *const *points, const uint8_t *indices, int steps, size_t left,
                          uint16_t *sums, int fresh) {
    const size_t width = (size_t)units * UNIT;
    if (units > 1)
        for (int pixel = 0; pixel < PIXELS; pixel += 2)
            kernel_64(points, indices, steps / JOIN, left + pixel * TABLE, sums + pixel * width, fresh, width);
    if (units != 2)
        for (int pixel = 0; pixel < PIXELS; pixel += 4)
            kernel_32(points, indices + (units - 1) * UNIT_INDEX, steps / JOIN, left + pixel * TABLE,
                      sums + pixel * width + (units - 1) * UNIT, fresh, width);
}

#include "lookup.h"

static int usable(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#include "by_bits.h"

extern const bdm_path bdm_avx2_binary, bdm_avx2_real;
static const bdm_path lookup = {"avx2", usable, arranged_size, arrange, convolve};
BDM_BY_BITS(avx2, &bdm_avx2_binary, &lookup, &bdm_avx2_real)
