/* AVX2: 1-bit activations by lookup (see avx2.h). A table's entries are at most 4, so that 60 lookups add in bytes. */

#define BINARY 1
#define JOIN 1
#define BYTES 60 /* steps that bytes hold: 60 * 4 <= 255 */
#define LIMIT (273 * BYTES) /* 273 * 240 <= 65535 */
#define NEAR (8 << 10)
#include "avx2.h"

#define EIGHT_SUMS \
    [a0] "+x"(sum[0][0]), [a1] "+x"(sum[1][0]), [a2] "+x"(sum[2][0]), [a3] "+x"(sum[3][0]), [b0] "+x"(sum[0][1]), \
    [b1] "+x"(sum[1][1]), [b2] "+x"(sum[2][1]), [b3] "+x"(sum[3][1])
#define OTHER_REGISTERS "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15"
#define PIXEL(p, table, entry) \
    "vbroadcasti128 16*" #p "(%%r8,%[left]),%%ymm" #table "\n" \
    "vpshufb %%ymm8,%%ymm" #table ",%%ymm" #entry "\n vpshufb %%ymm9,%%ymm" #table ",%%ymm" #table "\n" \
    "vpaddb %%ymm" #entry ",%[a" #p "],%[a" #p "]\n vpaddb %%ymm" #table ",%[b" #p "],%[b" #p "]\n"

/* 4 pixels, 64 output channels, up to BYTES steps. width: output channels of the block. */
__attribute__((noinline)) static void kernel_64(const uint8_t *const *points, const uint8_t *indices, long steps,
                                                size_t left, size_t width, uint16_t *sums, int fresh) {
    __m256i sum[4][2];
    for (int i = 0; i < 4; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    __asm__ volatile(
        ".p2align 6\n 1:\n"
        "mov (%[points]),%%r8\n vmovdqu (%[indices]),%%ymm8\n vmovdqu 32(%[indices]),%%ymm9\n"
        PIXEL(0, 10, 11) PIXEL(1, 12, 13) PIXEL(2, 14, 15) PIXEL(3, 10, 11)
        "add $8,%[points]\n add %[width],%[indices]\n dec %[steps]\n jne 1b\n"
        : [points] "+r"(points), [indices] "+r"(indices), [steps] "+r"(steps), EIGHT_SUMS
        : [left] "r"(left), [width] "r"(width)
        : "r8", "memory", "cc", OTHER_REGISTERS);
    for (int i = 0; i < 4; i++)
        for (int unit = 0; unit < 2; unit++)
            put_sums(sum[i][unit], _mm256_srli_epi16(sum[i][unit], 8), sums + i * width + unit * UNIT, fresh);
}

/* 4 pixels, 32 output channels. */
__attribute__((noinline)) static void kernel_32(const uint8_t *const *points, const uint8_t *indices, long steps,
                                                size_t left, size_t width, uint16_t *sums, int fresh) {
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (long step = 0; step < steps; step++, indices += width)
        for (int i = 0; i < 4; i++) {
            const __m128i *from = (const __m128i *)(points[step] + left + i * TABLE);
            const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
            const __m256i index = _mm256_loadu_si256((const __m256i *)indices);
            sum[i] = _mm256_add_epi8(sum[i], _mm256_shuffle_epi8(table, index));
        }
    for (int i = 0; i < 4; i++) put_sums(sum[i], _mm256_srli_epi16(sum[i], 8), sums + i * width, fresh);
}

/* A block's indices are UNIT_INDEX = UNIT bytes of each unit in turn: from step to step as far apart as the sums are
   from pixel to pixel. */
static inline void kernel(int units, const uint8_t *const *points, const uint8_t *indices, int steps, size_t left,
                          uint16_t *sums, int fresh) {
    const size_t width = (size_t)units * UNIT, rest = width - UNIT; /* of the last unit */
    for (int step = 0; step < steps; step += BYTES) {
        const int some = steps - step < BYTES ? steps - step : BYTES, begin = fresh && !step;
        const uint8_t *at = indices + step * width;
        for (int pixel = 0; pixel < PIXELS; pixel += 4) {
            const size_t from = left + pixel * TABLE;
            uint16_t *to = sums + pixel * width;
            if (units > 1) kernel_64(points + step, at, some, from, width, to, begin);
            if (units != 2) kernel_32(points + step, at + rest, some, from, width, to + rest, begin);
        }
    }
}

#include "lookup.h"

static int usable(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

const bdm_path bdm_avx2_binary = {"avx2", usable, arranged_size, arrange, convolve};
