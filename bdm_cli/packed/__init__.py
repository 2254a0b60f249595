"""Real bits: weights of 1 bit in files and in memory, and arithmetic on them. Knows quant, not diffusion."""
