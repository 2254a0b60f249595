"""Inception Score: how sure and how varied a classifier's answers on the samples are."""

import numpy as np
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

BLOCK = 5000
PARTS, SEED = 10, 2020


def score(logits: np.ndarray, blocks: list[np.ndarray]) -> float:
    """Inception Score (arXiv:1606.03498, Sec. 4) of logits [N, C]: mean over blocks of images (their numbers).

    Of a block: exp(mean_x KL(p(y|x) || p(y))), p(y) the mean of p(y|x) over it, in float64.
    """
    parts = (torch.from_numpy(np.array(logits[block])) for block in blocks)
    return float(np.mean([isc_features_to_metric(p, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN] for p in parts]))


def in_file_order(n: int) -> list[np.ndarray]:
    """ADM's blocks: 5000 consecutive images in file order, the last may be short; so classes must be shuffled."""
    return [np.arange(first, min(first + BLOCK, n)) for first in range(0, n, BLOCK)]


def in_shuffled_parts(n: int) -> list[np.ndarray]:
    """torch-fidelity's: shuffled by its seed, then ten parts."""
    order = np.random.RandomState(SEED).permutation(n)
    return [order[i * n // PARTS : (i + 1) * n // PARTS] for i in range(PARTS)]


def resampled(logits: np.ndarray, blocks: list[np.ndarray], random: np.random.Generator, resamples: int) -> np.ndarray:
    """Scores [resamples] of images drawn with replacement, each block from itself, which keeps what it is made of."""
    scores = np.zeros(resamples)
    for block in blocks:
        log_p = torch.from_numpy(np.array(logits[block])).double().log_softmax(1).numpy()
        p, n = np.exp(log_p), len(block)
        sure = (p * log_p).sum(1)
        for b in range(resamples):
            times = np.bincount(random.integers(n, size=n), minlength=n)
            mean = times @ p / n
            scores[b] += np.exp(times @ sure / n - (mean * np.log(mean)).sum())
    return scores / len(blocks)
