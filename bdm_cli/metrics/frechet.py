"""Frechet distances between two sets of images: FID on pooled features, sFID on spatial ones."""

import functools

import numpy as np
import scipy.linalg

from bdm_cli.metrics.summary import Statistics


class FrechetTo:
    """Squared 2-Wasserstein distance of Gaussians to one reference (FID, arXiv:1706.08500, Eq. 6), in float64.

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)). The product has the eigenvalues of the symmetric
    R S_a R with R = S_b^(1/2), so the last trace is the sum of their roots: no matrix root that may fail, no imaginary
    part to drop. ADM takes scipy's sqrtm of the product and adds 1e-6 to both diagonals if that is not finite; it takes
    the means in float32, which is what is left of a difference (1e-7).
    """

    def __init__(self, reference: Statistics) -> None:
        self.reference = reference

    @functools.cached_property
    def _root(self) -> np.ndarray:
        values, vectors = scipy.linalg.eigh(self.reference.sigma)
        return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def __call__(self, samples: Statistics) -> float:
        """Raises: ValueError if the features have another number of dimensions."""
        a, b = samples, self.reference
        if a.mu.shape != b.mu.shape:
            raise ValueError(f"means {a.mu.shape} and {b.mu.shape} cannot be compared")
        product = self._root @ a.sigma @ self._root
        values = scipy.linalg.eigvalsh((product + product.T) / 2)
        shift = a.mu - b.mu
        traces = np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.sqrt(values.clip(min=0)).sum()
        return max(0.0, float(shift @ shift + traces))  # of equal sets what is left is rounding, of either sign
