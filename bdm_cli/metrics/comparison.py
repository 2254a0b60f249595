"""One set of samples beside one reference: what several metrics share is computed once."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from bdm_cli.metrics import adm_float16, precision_recall
from bdm_cli.metrics.frechet import FrechetTo
from bdm_cli.metrics.precision_recall import Coverage
from bdm_cli.metrics.summary import Summary


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with. distances: see recipe.Evaluate; device: where the matrix products run."""

    summary: Summary
    distances: str
    device: torch.device

    @functools.cached_property
    def to_pool(self) -> FrechetTo:
        return FrechetTo(self.summary.statistics["pool"])

    @functools.cached_property
    def to_spatial(self) -> FrechetTo:
        return FrechetTo(self.summary.statistics["spatial"])

    @functools.cached_property
    def radii(self) -> np.ndarray:
        """Of the balls around its images, on pooled features."""
        return precision_recall.radii(self.summary.rows["pool"], self.device)


@dataclass(frozen=True, eq=False)
class Comparison:
    """The argument of every metric."""

    samples: Summary
    reference: Reference

    @functools.cached_property
    def coverage(self) -> Coverage:
        """Of ADM's precision and recall, on pooled features."""
        sides = self.samples.rows["pool"], self.reference.summary.rows["pool"]
        if self.reference.distances == "float16":
            return adm_float16.coverage(*sides, self.reference.device)
        return precision_recall.exact(*sides, self.reference.device, self.reference.radii)

    @functools.cached_property
    def vgg_coverage(self) -> tuple[float, float]:
        """torch-fidelity's precision and recall in percent, on VGG-16's features."""
        return precision_recall.torch_fidelity(self.samples.rows["manifold"], self.reference.summary.rows["manifold"])
