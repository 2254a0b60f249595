"""Kernel Inception Distance (KID, arXiv:1801.01401): squared MMD of pooled features under (x.y / D + 1)^3."""

import numpy as np
import torch
from cleanfid.fid import kernel_distance
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

SUBSET = 1000
SEED = 2020


def torch_fidelity(samples: np.ndarray, reference: np.ndarray) -> float:
    """Mean of the unbiased estimate over 100 pairs of subsets of 1000, drawn by torch-fidelity's seed.

    Sets of fewer than 1000 images are taken whole.
    """
    size = subset(samples, reference)
    sides = (torch.from_numpy(np.array(side)) for side in (samples, reference))
    return kid_features_to_metric(*sides, kid_subset_size=size, verbose=False)[KEY_METRIC_KID_MEAN]


def subset(samples: np.ndarray, reference: np.ndarray) -> int:
    """How many images a subset has."""
    return min(SUBSET, len(samples), len(reference))


def clean_fid(samples: np.ndarray, reference: np.ndarray) -> float:
    """clean-fid's estimate: 100 pairs of subsets of 1000 (or of the smaller set's size), here with a fixed seed."""
    state = np.random.get_state()
    np.random.seed(SEED)
    try:
        return kernel_distance(np.array(reference), np.array(samples))
    finally:
        np.random.set_state(state)
