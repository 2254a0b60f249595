"""How far a score would move with other samples of the same model: bootstrap intervals (Efron, 1979)."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from bdm_cli.metrics import inception_score
from bdm_cli.metrics.comparison import Comparison
from bdm_cli.metrics.frechet import FrechetTo
from bdm_cli.metrics.protocols import Protocol
from bdm_cli.metrics.summary import Statistics

LEVEL = 0.95
GREATEST = {"precision": 100.0, "recall": 100.0}
"""What a metric cannot exceed; none can be negative."""
ROWS = 4096

Interval = tuple[float, float]


def intervals(
    comparison: Comparison,
    protocol: Protocol,
    values: Mapping[str, float],
    resamples: int,
    seed: int = 0,
    advance: Callable[[int], object] = lambda n: None,
) -> dict[str, Interval | None]:
    """95 % intervals around `values`, from `resamples` sets of images drawn with replacement; the reference is fixed.

    FID, sFID, IS: the samples are drawn again. Precision: the samples, with the reference's balls as they are. Recall:
    the reference images, with the samples' balls as they are (a copy of an image would shrink its own ball).
    A set drawn with replacement holds fewer different images, which alone raises FID; the mean of the drawn scores is
    therefore moved back to the value: the interval says how far the number spreads at this number of images, not how
    far it is from that of infinitely many.
    None: for KID, which is no mean over images, and for statistics that were read from a file.
    advance: called with the resamples done, for each metric.
    """
    drawers: dict[str, Callable[[np.random.Generator, int], np.ndarray | None]] = {
        "fid": lambda random, k: _frechet(comparison, "pool", comparison.reference.to_pool, random, k, advance),
        "sfid": lambda random, k: _frechet(comparison, "spatial", comparison.reference.to_spatial, random, k, advance),
        "is": lambda random, k: inception_score.resampled(
            comparison.samples.rows["logits"], protocol.blocks(comparison.samples.n), random, k
        ),
        "precision": lambda random, k: _share(values["precision"], comparison.samples.n, random, k),
        "recall": lambda random, k: _share(values["recall"], len(comparison.reference.summary.rows["pool"]), random, k),
    }
    found: dict[str, Interval | None] = {}
    for number, name in enumerate(values):
        drawn = drawers[name](np.random.default_rng([seed, number]), resamples) if name in drawers else None
        if drawn is None:
            found[name] = None
            continue
        low, high = values[name] + np.quantile(drawn - drawn.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = (max(0.0, float(low)), min(GREATEST.get(name, float(high)), float(high)))
    return found


def _share(percent: float, n: int, random: np.random.Generator, resamples: int) -> np.ndarray:
    """A share of n drawn again: its count is binomial."""
    return 100 * random.binomial(n, percent / 100, resamples) / n


def _frechet(
    comparison: Comparison,
    part: str,
    distance: FrechetTo,
    random: np.random.Generator,
    resamples: int,
    advance: Callable[[int], object],
) -> np.ndarray | None:
    own, rows = comparison.samples.statistics[part], comparison.samples.rows[part]
    if own.n is None or own.n != len(rows):
        return None
    scores = []
    for _ in range(resamples):
        times = np.bincount(random.integers(own.n, size=own.n), minlength=own.n)
        scores.append(distance(_weighted(rows, times, own.mu, comparison.reference.device)))
        advance(1)
    return np.array(scores)


def _weighted(rows: np.ndarray, times: np.ndarray, centre: np.ndarray, device: torch.device) -> Statistics:
    """Statistics of rows [N, D], each taken so many times.

    Products in float32 around the mean: far closer than the spread that they serve.
    """
    d, n = rows.shape[1], int(times.sum())
    shift = torch.from_numpy(centre.astype(np.float32)).to(device)
    first, second = torch.zeros(d, dtype=torch.float64, device=device), torch.zeros(d, d, device=device)
    taken = np.flatnonzero(times)
    for at in range(0, len(taken), ROWS):
        some = taken[at : at + ROWS]
        x = torch.from_numpy(np.array(rows[some])).to(device) - shift
        weighted = x * torch.from_numpy(times[some].astype(np.float32)).to(device)[:, None]
        first += weighted.sum(0, dtype=torch.float64)
        second.addmm_(weighted.T, x)
    mean = first / n
    sigma = (second.double() - n * torch.outer(mean, mean)) / (n - 1)
    return Statistics(centre + mean.cpu().numpy(), sigma.cpu().numpy(), n)
