"""What the metrics need of a set of images: Gaussian statistics, and the features themselves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from bdm_cli import tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.metrics.features import Features


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by N - 1) of a set of features, float64; n = None if read from a file."""

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None

    @property
    def degenerate(self) -> bool:
        """Whether there are too few images for a covariance of full rank."""
        return self.n is not None and self.n <= len(self.mu)


@dataclass(frozen=True)
class Summary:
    """One set of images as the metrics see it. pool [M, D] may be a choice among the images behind the statistics."""

    pool_statistics: Statistics
    spatial_statistics: Statistics
    pool: Tensor
    logits: Tensor


def statistics(features: Tensor) -> Statistics:
    """Raises: BdmError for fewer than two images."""
    if len(features) < 2:
        raise BdmError(f"FID and sFID need at least 2 images, given {len(features)}.\n  sample more images")
    found = fid_features_to_statistics(features)
    return Statistics(found["mu"].astype(np.float64), found["sigma"].astype(np.float64), len(features))


def summarize(features: Features, stored: Mapping[str, np.ndarray] | None = None, n_pool: int = 0) -> Summary:
    """The summary of a set of images.

    stored: mu, sigma, mu_s, sigma_s of a file, which replace the statistics of its images for FID and sFID (as in ADM).
    n_pool: how many images serve precision and recall, chosen by a fixed seed and kept in file order; 0 = all.
    Raises: BdmError if there are fewer images than n_pool, or if the stored statistics are of other features.
    """
    n = len(features.pool)
    if n_pool > n:
        raise BdmError(
            f"{n_pool} reference images are asked for, and there are {n}.\n"
            "  set evaluate.n_reference to at most that number, or to 0 for all"
        )
    chosen = np.sort(np.random.default_rng(0).choice(n, n_pool, replace=False)) if n_pool else slice(None)
    pool, spatial = (
        (
            _stored(stored["mu"], stored["sigma"], features.pool),
            _stored(stored["mu_s"], stored["sigma_s"], features.spatial),
        )
        if stored
        else (statistics(features.pool), statistics(features.spatial))
    )
    return Summary(pool, spatial, features.pool[chosen], features.logits[chosen])


def _stored(mu: np.ndarray, sigma: np.ndarray, features: Tensor) -> Statistics:
    if len(mu) != features.shape[1]:
        raise BdmError(
            f"the file's statistics have {len(mu)} dimensions, the features have {features.shape[1]}.\n"
            '  published files need evaluate.features = "inception"; or give a file without mu'
        )
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), None)


def save(summary: Summary, path: Path) -> None:
    tensors, counts = {"pool": summary.pool, "logits": summary.logits}, {}
    for name in ("pool", "spatial"):
        part = getattr(summary, f"{name}_statistics")
        tensors |= {f"{name}.mu": torch.from_numpy(part.mu), f"{name}.sigma": torch.from_numpy(part.sigma)}
        counts[name] = json.dumps(part.n)
    tensorfile.write(path, tensors, counts)


def load(path: Path) -> Summary:
    """What save wrote."""
    tensors, counts = tensorfile.read(path)
    pool, spatial = (
        Statistics(tensors[f"{name}.mu"].numpy(), tensors[f"{name}.sigma"].numpy(), json.loads(counts[name]))
        for name in ("pool", "spatial")
    )
    return Summary(pool, spatial, tensors["pool"], tensors["logits"])
