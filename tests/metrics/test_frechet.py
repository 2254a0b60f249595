"""Frechet distances against scipy's matrix square root and against Gaussians whose distance is known."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from builders import statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm_cli.metrics.frechet import FrechetTo
from bdm_cli.metrics.summary import Statistics


def distance(a: Statistics, b: Statistics) -> float:
    return FrechetTo(b)(a)


def by_sqrtm(a: Statistics, b: Statistics) -> float:
    """ADM's and clean-fid's formula."""
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    return float(np.square(a.mu - b.mu).sum() + np.trace(a.sigma + b.sigma - 2 * root))


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, d)) @ draw.normal(size=(d, d)) + shift


def orthogonal(d: int, seed: int = 0) -> np.ndarray:
    return scipy.stats.ortho_group.rvs(d, random_state=seed)


def gaussian(mu: object, sigma: object) -> Statistics:
    return Statistics(np.atleast_1d(np.asarray(mu, float)), np.atleast_2d(np.asarray(sigma, float)), None)


@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("d", [1, 2, 12, 100])
def test_it_equals_the_formula_with_sqrtm(d, shift):
    a, b = statistics(features(300, d, 1)), statistics(features(250, d, 2, shift))
    assert distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)


@pytest.mark.parametrize("d", [1, 5, 64])
def test_gaussians_with_diagonal_covariances(d):
    draw = np.random.default_rng(d)
    a, b = draw.uniform(0, 9, (2, d))
    shift = draw.normal(size=d)
    wanted = np.square(shift).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert distance(gaussian(shift, np.diag(a)), gaussian(np.zeros(d), np.diag(b))) == pytest.approx(wanted, rel=1e-12)


def test_gaussians_with_commuting_covariances():
    draw, q = np.random.default_rng(0), orthogonal(20)
    a, b = draw.uniform(0, 9, (2, 20))
    found = distance(gaussian(np.zeros(20), q * a @ q.T), gaussian(np.full(20, 0.5), q * b @ q.T))
    assert found == pytest.approx(20 * 0.25 + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)


def test_gaussians_of_two_dimensions_that_do_not_commute():
    """The root of a 2x2 matrix M of two positive eigenvalues has the trace sqrt(tr M + 2 sqrt(det M))."""
    a, b = np.array([[4.0, 1.0], [1.0, 2.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    assert not np.allclose(a @ b, b @ a)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    found = distance(gaussian([1, 2], a), gaussian([0, 0], b))
    assert found == pytest.approx(5 + 6 + 4 - 2 * root, rel=1e-12)


@settings(deadline=None, derandomize=True)
@given(st.floats(-50, 50), st.floats(0, 20), st.floats(0, 20))
def test_gaussians_of_one_dimension(shift, a, b):
    found = distance(gaussian(shift, a**2), gaussian(0, b**2))
    assert found == pytest.approx(shift**2 + (a - b) ** 2, rel=1e-9, abs=1e-9)


def test_two_sets_of_four_points_by_hand():
    x = np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]) * (3 / 4) ** 0.5  # mean 0, covariance I
    assert distance(statistics(x), statistics(2 * x + 5)) == pytest.approx(50 + 2 + 8 - 2 * 4)


@pytest.mark.parametrize(("n", "d"), [(300, 12), (20, 40), (5, 100)])
def test_a_set_is_at_no_distance_from_itself(n, d):
    a = statistics(features(n, d, 1, shift=3.0))
    assert distance(a, a) == pytest.approx(0, abs=1e-6 * np.trace(a.sigma))


def test_fewer_images_than_dimensions():
    """tr (S_a S_b)^(1/2) is also the sum of the singular values of A B^T, A and B the centred rows / sqrt(n - 1)."""
    x, y = features(20, 50, 1), features(30, 50, 2, 0.3)
    a, b = statistics(x), statistics(y)
    assert a.degenerate
    assert b.degenerate
    roots = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y)]
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    wanted = np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * shared
    assert distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert distance(b, a) == pytest.approx(wanted, rel=1e-6)


def test_covariances_of_rank_one_and_none():
    v, w = np.array([1.0, 2, 3, 4]), np.array([2.0, -1, 0, 1])
    line, other, point = np.outer(v, v), np.outer(w, w), np.zeros((4, 4))
    zero = np.zeros(4)
    assert distance(gaussian(zero, line), gaussian(zero, other)) == pytest.approx(30 + 6 - 2 * abs(v @ w), rel=1e-7)
    assert distance(gaussian(v, line), gaussian(zero, point)) == pytest.approx(30 + 30, rel=1e-12)
    assert distance(gaussian(zero, point), gaussian(v, line)) == pytest.approx(30 + 30, rel=1e-12)


def test_statistics_are_degenerate_of_no_more_images_than_dimensions():
    assert Statistics(np.zeros(3), np.zeros((3, 3)), 3).degenerate
    assert not Statistics(np.zeros(3), np.zeros((3, 3)), 4).degenerate
    assert not Statistics(np.zeros(3), np.zeros((3, 3)), None).degenerate


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_it_does_not_depend_on_order_rotation_or_origin_and_grows_with_the_square_of_the_unit(d, seed):
    x, y = features(30, d, seed), features(40, d, seed + 1, 1.0)
    value = distance(statistics(x), statistics(y))
    assert value >= 0
    assert distance(statistics(y), statistics(x)) == pytest.approx(value, rel=1e-7)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    assert distance(statistics(x @ q - 7), statistics(y @ q - 7)) == pytest.approx(value, rel=1e-7)
    assert distance(statistics(3 * x), statistics(3 * y)) == pytest.approx(9 * value, rel=1e-7)


def test_one_reference_serves_many_samples():
    to = FrechetTo(statistics(features(300, 6, 0)))
    for seed in (1, 2, 3):
        samples = statistics(features(100, 6, seed))
        assert to(samples) == pytest.approx(by_sqrtm(samples, to.reference), rel=1e-9)


def test_statistics_of_other_features():
    with pytest.raises(ValueError, match=r"means \(5,\) and \(6,\) cannot be compared"):
        distance(statistics(features(20, 5, 1)), statistics(features(20, 6, 2)))
