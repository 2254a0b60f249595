/* AVX2: real activations. */

#define LANES 8
#include "real.h"

static int usable(void) { return 0; } /* by itself */

const bdm_path bdm_avx2_real = {"avx2", usable, real_size, real_arrange, real_convolve};
