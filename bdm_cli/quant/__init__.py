"""Few-bit arithmetic on tensors and layers. Knows torch, not diffusion."""
