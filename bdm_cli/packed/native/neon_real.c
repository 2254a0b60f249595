/* NEON: real activations. */

#define LANES 4
#include "real.h"

static int usable(void) { return 0; } /* by itself */

const bdm_path bdm_neon_real = {"neon", usable, real_size, real_arrange, real_convolve};
