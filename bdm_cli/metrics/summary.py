"""What the metrics need of a set of images: Gaussian statistics, and the features themselves."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by N - 1) of a set of features, float64; n = None if read from a file."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None

    @property
    def degenerate(self) -> bool:
        """Whether there are too few images for a covariance of full rank."""
        return self.n is not None and self.n <= len(self.mu)


@dataclass(frozen=True, eq=False)
class Summary:
    """One set of images as the metrics see it.

    n: how many images. statistics: of "pool" and "spatial". rows: features float32 [M, D] of "pool", "spatial",
    "logits", "manifold", as far as the network has them, memory-mapped; M < n if only a choice was kept.
    """

    n: int
    statistics: Mapping[str, Statistics]
    rows: Mapping[str, np.ndarray]

    @functools.cached_property
    def different(self) -> int:
        """How many of the images differ in their pooled features."""
        return len({row.tobytes() for row in self.rows["pool"]})

    def choice(self, n: int) -> "Summary":
        """With the rows of n images only, chosen by a fixed seed and kept in file order; 0 = all.

        Raises: ValueError if there are fewer.
        """
        held = len(self.rows["pool"])
        if n > held:
            raise ValueError(f"there are rows of {held} images, not {n}")
        if n in (0, held):
            return self
        return replace(self, rows={name: rows[chosen(held, n)] for name, rows in self.rows.items()})

    def with_stored(self, stored: Mapping[str, np.ndarray]) -> "Summary":
        """With mu, sigma, mu_s, sigma_s of a file in place of the statistics of its images, as ADM takes them.

        Raises: ValueError if they are of other features.
        """
        if not stored:
            return self
        files = {"pool": (stored["mu"], stored["sigma"]), "spatial": (stored["mu_s"], stored["sigma_s"])}
        found = {}
        for name, own in self.statistics.items():
            mu, sigma = (part.astype(np.float64) for part in files[name])
            if mu.shape != own.mu.shape:
                raise ValueError(f"stored means {mu.shape}, of {name} features {own.mu.shape}")
            found[name] = Statistics(mu, sigma, None)
        return replace(self, statistics=found)


def chosen(n: int, k: int) -> np.ndarray:
    """k of the numbers 0..n-1, ascending, the same ones every time."""
    return np.sort(np.random.default_rng(0).choice(n, k, replace=False))
