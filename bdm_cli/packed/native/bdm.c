#include "bdm.h"

/* Of which sources this library was made (build.py). */
#ifndef BDM_SOURCES
#define BDM_SOURCES ""
#endif
const char bdm_sources[] = BDM_SOURCES;

extern const bdm_path bdm_planes;
#if defined(__x86_64__)
extern const bdm_path bdm_avx512, bdm_avx2;
const bdm_path *const bdm_paths[] = {&bdm_avx512, &bdm_avx2, &bdm_planes, 0};
#elif defined(__aarch64__)
extern const bdm_path bdm_neon;
const bdm_path *const bdm_paths[] = {&bdm_neon, &bdm_planes, 0};
#else
const bdm_path *const bdm_paths[] = {&bdm_planes, 0};
#endif

void bdm_put_sums(const bdm_shape *s, const uint8_t *bits, int32_t *sums) {
    int taps = s->kh * s->kw, corrected = bdm_corrected(s);
    for (int k = 0; k < s->k; k++) {
        sums[k] = 0;
        for (int tap = 0; tap < taps; tap++) {
            int32_t sum = 0;
            for (int c = 0; c < s->c; c++) sum += 2 * bdm_bit(bits, s, k, c, tap) - 1;
            sums[k] += sum;
            if (corrected) sums[(size_t)(1 + tap) * s->k + k] = sum;
        }
    }
}
