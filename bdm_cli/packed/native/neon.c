/* NEON: 2..8-bit activations by lookup; sends 1 bit and real activations where they belong. */

#define BINARY 0
#include "neon.h"
#include "by_bits.h"

extern const bdm_path bdm_neon_binary, bdm_neon_real;
static const bdm_path lookup = {"neon", usable, arranged_size, arrange, convolve};
BDM_BY_BITS(neon, &bdm_neon_binary, &lookup, &bdm_neon_real)
