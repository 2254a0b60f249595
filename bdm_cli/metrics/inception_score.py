"""Inception Score: how sure and how varied a classifier's answers on the samples are."""

import numpy as np
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from bdm_cli.metrics.summary import Summary

BLOCK = 5000


def inception_score(samples: Summary, reference: Summary | None = None) -> float:
    """Inception Score (arXiv:1606.03498, Sec. 4) as ADM computes it; needs no reference.

    Mean over blocks of exp(mean_x KL(p(y|x) || p(y))), p(y) the mean of p(y|x) over its block. Blocks are 5000
    consecutive images in file order (the last may be short), so class-conditional samples must be shuffled.
    """
    blocks = samples.logits.split(BLOCK)
    scores = [isc_features_to_metric(block, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN] for block in blocks]
    return float(np.mean(scores))
