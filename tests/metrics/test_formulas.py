"""FID, sFID, IS, precision and recall against float64 derivations that share no code with them."""

import numpy as np
import pytest
import scipy.linalg
import torch

from bdm_cli.errors import BdmError
from bdm_cli.metrics import METRICS, precision_recall
from bdm_cli.metrics.features import Features
from bdm_cli.metrics.frechet import fid, sfid
from bdm_cli.metrics.inception_score import inception_score
from bdm_cli.metrics.precision_recall import precision, recall
from bdm_cli.metrics.summary import load, save, statistics, summarize
from bdm_cli.registry import resolve


def features(n: int, seed: int, shift: float = 0.0, d: int = 12) -> Features:
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(n, d)) @ np.random.default_rng(0).normal(size=(d, d)) + shift
    arrays = (mixed, draw.normal(size=(n, 5)) * (1 + shift), draw.normal(size=(n, 4)))
    return Features(*(torch.from_numpy(array).float() for array in arrays))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """ADM's formula with scipy's matrix square root, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    covariances = [np.atleast_2d(np.cov(x.T)) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_fid_and_sfid_equal_the_formula_with_sqrtm(shift):
    a, b = features(300, 1), features(200, 2, shift)
    samples, reference = summarize(a), summarize(b)
    assert fid(samples, reference) == pytest.approx(frechet(a.pool.numpy(), b.pool.numpy()), rel=1e-6)
    assert sfid(samples, reference) == pytest.approx(frechet(a.spatial.numpy(), b.spatial.numpy()), rel=1e-6)
    assert fid(samples, samples) == pytest.approx(0, abs=1e-6)


def test_fid_of_two_gaussians_by_hand():
    x = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]) * (3 / 4) ** 0.5  # mean 0, covariance I
    near, far = (summarize(Features(y, y, y)) for y in (x, 2 * x + 5))  # mean (5, 5), covariance 4 I
    assert fid(near, far) == pytest.approx(50 + 2 + 8 - 2 * 4)


def test_fid_with_fewer_images_than_dimensions_is_finite_and_marked():
    a, b = summarize(features(8, 1, d=20)), summarize(features(9, 2, d=20))
    assert a.pool_statistics.degenerate
    assert np.isfinite(fid(a, b))
    assert not summarize(features(30, 1)).pool_statistics.degenerate


def test_inception_score_is_the_mean_over_blocks_of_5000_with_a_short_last_one():
    logits = np.random.default_rng(3).normal(size=(12_345, 6)) * 3
    given = features(12_345, 0)._replace(logits=torch.from_numpy(logits).float())
    p = np.exp(logits.astype(np.float32).astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = []
    for block in (p[:5000], p[5000:10_000], p[10_000:]):
        divergence = (block * (np.log(block) - np.log(block.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert inception_score(summarize(given)) == pytest.approx(np.mean(scores), rel=1e-9)


def test_inception_score_limits():
    sure = torch.eye(4).repeat(100, 1) * 200  # certain answers, all four classes equally often
    assert inception_score(summarize(features(400, 0)._replace(logits=sure))) == pytest.approx(4)
    assert inception_score(summarize(features(400, 0)._replace(logits=torch.zeros(400, 4)))) == pytest.approx(1)


def test_inception_score_depends_on_file_order():
    by_class = torch.eye(2).repeat_interleave(5000, 0) * 200
    mixed = torch.eye(2).repeat(5000, 1) * 200
    given = features(10_000, 0)
    assert inception_score(summarize(given._replace(logits=by_class))) == pytest.approx(1)
    assert inception_score(summarize(given._replace(logits=mixed))) == pytest.approx(2)


def share_inside(points: np.ndarray, centres: np.ndarray) -> float:
    """Brute force: is each point within the 3rd-neighbour radius of any centre?"""
    radii = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
    return 100 * np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])


@pytest.mark.parametrize("elements", [2**26, 700])
def test_precision_and_recall_equal_brute_force(elements, monkeypatch):
    monkeypatch.setattr(precision_recall, "STRIP_ELEMENTS", elements)  # 700: strips of 3 or 4 rows, the last one short
    a, b = features(160, 4, shift=1.0), features(211, 5)
    u, v = a.pool.double().numpy(), b.pool.double().numpy()
    samples, reference = summarize(a), summarize(b)
    found = precision(samples, reference), recall(samples, reference)
    assert found == pytest.approx((share_inside(u, v), share_inside(v, u)))
    assert 0 < min(found) < max(found) < 100
    assert precision(reference, samples) == recall(samples, reference)


def test_precision_and_recall_by_hand():
    """On a line: 0, 1, 2, 3 have the radii 3, 2, 2, 3, so the reference's manifold is [-3, 6], ends included."""
    reference = summarize(features(4, 0)._replace(pool=torch.tensor([[0.0], [1], [2], [3]])))
    samples = summarize(features(4, 0)._replace(pool=torch.tensor([[-3.0], [6], [6.1], [100]])))
    assert precision(samples, reference) == 50
    assert recall(samples, reference) == 100  # the ball around 100 reaches -3


def test_every_metric_has_the_common_signature():
    a, b = summarize(features(20, 1)), summarize(features(20, 2))
    for name in METRICS:
        assert isinstance(resolve("metric", name, METRICS)(a, b), float)


def test_too_few_images():
    with pytest.raises(BdmError, match="at least 2 images, given 1"):
        statistics(torch.zeros(1, 3))
    with pytest.raises(BdmError, match="at least 4 images on each side, given 3"):
        recall(summarize(features(3, 0)), summarize(features(20, 0)))
    with pytest.raises(BdmError, match="50 reference images are asked for, and there are 20"):
        summarize(features(20, 0), n_pool=50)


def test_stored_statistics_replace_those_of_the_images_for_fid_only():
    everything, few = features(300, 1), features(300, 1)
    whole = summarize(everything)
    few = Features(*(part[:40] for part in few))
    stored = {
        "mu": whole.pool_statistics.mu.astype(np.float32),
        "sigma": whole.pool_statistics.sigma,
        "mu_s": whole.spatial_statistics.mu.astype(np.float32),
        "sigma_s": whole.spatial_statistics.sigma,
    }
    samples, reference = summarize(features(100, 2)), summarize(few, stored)
    assert fid(samples, reference) == fid(samples, whole)
    assert sfid(samples, reference) == sfid(samples, whole)
    assert precision(samples, reference) == precision(samples, summarize(few)) != precision(samples, whole)
    assert reference.pool_statistics.n is None
    with pytest.raises(BdmError, match="statistics have 3 dimensions, the features have 12"):
        summarize(few, stored | {"mu": np.zeros(3), "sigma": np.zeros((3, 3))})


def test_chosen_reference_images_are_the_same_every_time_and_keep_the_statistics():
    given = features(50, 1)
    chosen = summarize(given, n_pool=10)
    assert chosen.pool.shape == (10, 12)
    assert torch.equal(chosen.pool, summarize(given, n_pool=10).pool)
    assert chosen.pool_statistics.n == 50
    rows = [int((given.pool == row).all(1).nonzero()) for row in chosen.pool]
    assert rows == sorted(set(rows))


def test_a_summary_survives_the_disk(tmp_path):
    given = summarize(features(50, 1), n_pool=10)
    save(given, tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")
    assert torch.equal(found.pool, given.pool)
    assert torch.equal(found.logits, given.logits)
    for a, b in (
        (found.pool_statistics, given.pool_statistics),
        (found.spatial_statistics, given.spatial_statistics),
    ):
        assert np.array_equal(a.mu, b.mu)
        assert np.array_equal(a.sigma, b.sigma)
        assert a.n == b.n == 50
