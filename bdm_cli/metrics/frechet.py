"""Frechet distances between two sets of images: FID on pooled features, sFID on spatial ones."""

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from bdm_cli.metrics.summary import Statistics, Summary


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (FID, arXiv:1706.08500, Eq. 6).

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), the last trace as the sum of the roots of the
    eigenvalues of S_a S_b. ADM takes scipy's sqrtm; both agree to about 8 digits, at any rank.
    """
    sides = ({"mu": side.mu, "sigma": side.sigma} for side in (a, b))
    return fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]


def fid(samples: Summary, reference: Summary) -> float:
    """Frechet distance of the pooled features."""
    return frechet_distance(samples.pool_statistics, reference.pool_statistics)


def sfid(samples: Summary, reference: Summary) -> float:
    """Frechet distance of the spatial features (arXiv:2103.03841): sensitive to where things are."""
    return frechet_distance(samples.spatial_statistics, reference.spatial_statistics)
