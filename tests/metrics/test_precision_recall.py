"""Precision and recall against the definition written out in float64, where float32 cannot tell distances apart too."""

import numpy as np
import pytest
import torch
from builders import CPU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_prc import prc_features_to_metric

from bdm_cli.errors import BdmError
from bdm_cli.metrics import precision_recall
from bdm_cli.metrics.precision_recall import Coverage, exact, radii, torch_fidelity

DEFAULT = precision_recall.BLOCK


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All squared distances [N, M], each of its own differences."""
    return np.array([[np.square(x - y).sum() for y in b.astype(np.float64)] for x in a.astype(np.float64)])


def radii_by_definition(a: np.ndarray) -> np.ndarray:
    return np.sort(squared(a, a), axis=1)[:, 3]


def by_definition(samples: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    between = squared(samples, reference)
    inside = (between <= radii_by_definition(reference)[None]).any(1)
    return inside, (between <= radii_by_definition(samples)[:, None]).any(0)


def in_float32(samples: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition with |u|^2 - 2 u.v + |v|^2 in float32, around the mean as the blocks are taken."""
    centre = reference.mean(0, dtype=np.float64).astype(np.float32)
    samples, reference = samples - centre, reference - centre

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum(np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)[None], 0)

    own = [np.sort(distances(side, side), axis=1)[:, 3] for side in (samples, reference)]
    between = distances(samples, reference)
    return (between <= own[1][None]).any(1), (between <= own[0][:, None]).any(0)


def same(found: Coverage, wanted: tuple[np.ndarray, np.ndarray]) -> bool:
    return np.array_equal(found.inside, wanted[0]) and np.array_equal(found.reached, wanted[1])


# ---- sets that are hard to tell apart


def normal(n: int, d: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def far_off(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """All far from the origin, where float32 has few digits left for what is between them."""
    return normal(n, d, 1, 1000), normal(m, d, 2, 1000)


def lattice(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Small integers: many equal distances, many points on a ball's surface."""
    return np.round(2 * normal(n, d, 3)), np.round(1.6 * normal(m, d, 4) + 0.4)


def copies(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that are there 2, 3, 4 and 60 times, some of them on both sides."""
    a, b = normal(n, d, 5), normal(m, d, 6)
    for side in (a, b):
        side[1:2], side[3:5], side[6:9] = side[0], side[2], side[5]
    a[20:80] = a[20]
    b[10:14], b[14], b[15:19] = a[20], a[0], a[5]
    return a, b


def clusters(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of nearly equal images, 1e-4 wide, at a distance of 100 from the origin."""
    centres = normal(6, d, 7).astype(np.float64)
    centres *= 100 / np.linalg.norm(centres, axis=1, keepdims=True)
    sides = [centres[np.arange(k) % 6] + 1e-4 * normal(k, d, 8 + k) / np.sqrt(d) for k in (n, m)]
    return sides[0].astype(np.float32), sides[1].astype(np.float32)


def outlier(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """One image so far away that the others' distances vanish beside it."""
    a, b = normal(n, d, 9), normal(m, d, 10)
    a[0], b[0] = 1e5, -1e5
    return a, b


def equal_steps(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Points along a line in equal steps, the two sides half a step apart."""
    along = np.ones(d, np.float32)
    return np.arange(n, dtype=np.float32)[:, None] * along, (np.arange(m, dtype=np.float32)[:, None] + 0.5) * along


SETS = [far_off, lattice, copies, clusters, outlier, equal_steps]


@pytest.mark.parametrize("block", [5, 37, DEFAULT])
@pytest.mark.parametrize("make", SETS)
@pytest.mark.parametrize("d", [1, 2, 17, 130, 300])
def test_it_equals_the_definition_at_any_block_size(make, d, block, monkeypatch):
    monkeypatch.setattr(precision_recall, "BLOCK", block)
    samples, reference = make(85, 70, d)
    assert same(exact(samples, reference, CPU), by_definition(samples, reference))
    assert np.array_equal(radii(samples, CPU), radii_by_definition(samples))
    assert np.array_equal(radii(reference, CPU), radii_by_definition(reference))


@pytest.mark.parametrize("pairs", [1, 50, 4000])
@pytest.mark.parametrize("make", SETS)
def test_it_is_the_same_whatever_is_held_at_once(make, pairs, monkeypatch):
    samples, reference = make(85, 70, 12)
    wanted = exact(samples, reference, CPU)
    monkeypatch.setattr(precision_recall, "PAIRS", pairs)
    assert same(exact(samples, reference, CPU), (wanted.inside, wanted.reached))


@pytest.mark.parametrize(("n", "m"), [(4, 4), (4, 90), (90, 4), (5, 6), (8, 9), (37, 38)])
@pytest.mark.parametrize("make", [far_off, lattice, clusters, outlier])
def test_sets_of_unequal_and_smallest_size(make, n, m, monkeypatch):
    monkeypatch.setattr(precision_recall, "BLOCK", 8)
    samples, reference = make(n, m, 3)
    assert same(exact(samples, reference, CPU), by_definition(samples, reference))
    assert same(exact(reference, samples, CPU), by_definition(reference, samples))


def test_float32_alone_would_be_wrong():
    """Else the tests above would pass without the second, direct look."""
    sets = {make.__name__: make(85, 70, 17) for make in SETS}
    wrong = [name for name, sides in sets.items() if not same(Coverage(*in_float32(*sides)), by_definition(*sides))]
    assert {"clusters", "outlier"} <= set(wrong)


@pytest.mark.parametrize("make", [clusters, outlier, lattice, copies])
def test_neither_precision_nor_recall_is_all_or_nothing_on_what_is_hard(make):
    """Else the tests above would say little."""
    inside, reached = by_definition(*make(85, 70, 12))
    assert 0 < inside.mean() < 1 or 0 < reached.mean() < 1


@st.composite
def whole_numbers(draw) -> tuple[np.ndarray, np.ndarray]:
    d, most = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    sides = []
    for _ in range(2):
        n = draw(st.integers(4, 24))
        numbers = draw(st.lists(st.integers(-most, most), min_size=n * d, max_size=n * d))
        sides.append(np.array(numbers, np.float32).reshape(n, d))
    return sides[0], sides[1]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(whole_numbers(), st.sampled_from([5, 16, DEFAULT]), st.sampled_from([0.0, 1000.0, -3.5]), st.floats(1e-3, 1e3))
def test_ties_and_duplicates_of_any_kind(sides, block, offset, unit):
    samples, reference = (((side + offset) * unit).astype(np.float32) for side in sides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision_recall, "BLOCK", block)
        found = exact(samples, reference, CPU)
    assert same(found, by_definition(samples, reference))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(4, 40),
    st.integers(4, 40),
    st.integers(1, 40),
    st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_clusters_of_any_width(n, m, d, width, seed):
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(3, d)) * 10
    sides = [(centres[draw.integers(3, size=k)] + width * draw.normal(size=(k, d))).astype(np.float32) for k in (n, m)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision_recall, "BLOCK", 11)
        assert same(exact(*sides, CPU), by_definition(*sides))


def test_the_order_of_the_images_does_not_matter():
    samples, reference = copies(85, 70, 12)
    found = exact(samples, reference, CPU)
    order, other = np.random.default_rng(0).permutation(85), np.random.default_rng(1).permutation(70)
    mixed = exact(samples[order], reference[other], CPU)
    assert same(mixed, (found.inside[order], found.reached[other]))


def test_exchanging_the_sides_exchanges_precision_and_recall():
    samples, reference = normal(120, 6, 1), 0.5 * normal(90, 6, 2)
    there, back = exact(samples, reference, CPU), exact(reference, samples, CPU)
    assert there.precision == back.recall != there.recall == back.precision


def test_by_hand():
    """On a line: 0, 1, 2, 3 have the radii 3, 2, 2, 3, so the reference's manifold is [-3, 6], ends included."""
    reference = np.array([[0.0], [1], [2], [3]], np.float32)
    samples = np.array([[-3.0], [6], [6.1], [100]], np.float32)
    found = exact(samples, reference, CPU)
    assert found.inside.tolist() == [True, True, False, False]
    assert (found.precision, found.recall) == (50, 100)  # the ball around 100 reaches -3


def test_copies_of_one_image_are_a_manifold_of_one_point():
    reference = np.tile(normal(1, 50), (60, 1))
    samples = np.concatenate([reference[:4], np.nextafter(reference[:1], np.float32(np.inf)), normal(20, 50, 1)])
    found = exact(samples, reference, CPU)
    assert found.inside.tolist() == [True] * 4 + [False] * 21
    assert found.reached.all()


def test_a_set_covers_itself():
    for make in SETS:
        samples, _ = make(85, 70, 9)
        found = exact(samples, samples, CPU)
        assert found.precision == found.recall == 100


def test_memory_mapped_features_serve_as_well(tmp_path):
    samples, reference = lattice(85, 70, 12)
    np.save(tmp_path / "a.npy", samples)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert same(exact(mapped, reference, CPU), by_definition(samples, reference))
    assert torch_fidelity(mapped, reference) == torch_fidelity(samples, reference)


@pytest.mark.parametrize("sizes", [(3, 20), (20, 3), (0, 0)])
def test_too_few_images(sizes):
    samples, reference = normal(sizes[0], 5), normal(sizes[1], 5)
    few = next(size for size in sizes if size < 4)
    with pytest.raises(BdmError, match=f"at least 4 images on each side, given {few}"):
        exact(samples, reference, CPU)


@pytest.mark.parametrize("make", [lattice, copies, far_off])
def test_torch_fidelitys_are_its_own(make):
    samples, reference = make(85, 70, 12)
    sides = (torch.from_numpy(side) for side in (samples, reference))
    wanted = prc_features_to_metric(*sides, verbose=False)
    assert torch_fidelity(samples, reference) == (100 * wanted["precision"], 100 * wanted["recall"])


def test_torch_fidelity_and_adm_agree_where_nothing_is_tied():
    samples, reference = normal(300, 16, 1), 0.8 * normal(200, 16, 2)
    found = exact(samples, reference, CPU)
    assert torch_fidelity(samples, reference) == pytest.approx((found.precision, found.recall), abs=1e-4)
    assert 0 < found.precision < 100
