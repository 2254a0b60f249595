/* NEON: 1-bit activations by lookup. */

#define BINARY 1
#include "neon.h"

const bdm_path bdm_neon_binary = {"neon", usable, arranged_size, arrange, convolve};
