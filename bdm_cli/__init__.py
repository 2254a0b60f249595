"""bdm: train, sample, score and compare 1-bit diffusion models (BinaryDM, arXiv:2404.05662)."""

__version__ = "0.1.0"
