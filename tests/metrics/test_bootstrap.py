"""Bootstrap intervals: how often they cover, by simulation; and what they must do whatever is drawn."""

import numpy as np
import pytest
from builders import CPU, statistics, summary
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm_cli.metrics import bootstrap, precision_recall
from bdm_cli.metrics.bootstrap import intervals
from bdm_cli.metrics.comparison import Comparison, Reference
from bdm_cli.metrics.protocols import ADM, TORCH_FIDELITY, Protocol
from bdm_cli.metrics.summary import Statistics, Summary

D = 4


def drawn(n: int, seed: int, shift: float = 0.6) -> Summary:
    """Samples of a model whose features are Gaussian: of another mean and spread than the reference's."""
    draw = np.random.default_rng(seed)
    return summary(
        pool=draw.normal(size=(n, D)) * np.linspace(0.5, 1.5, D) + shift,
        spatial=draw.normal(size=(n, D)) + shift,
        logits=2 * draw.normal(size=(n, 5)),
    )


REFERENCE = drawn(200, 10**6, shift=0.0)


def compared(samples: Summary, reference: Summary = REFERENCE) -> Comparison:
    return Comparison(samples, Reference(reference, "exact", CPU))


def found(
    c: Comparison, *metrics: str, resamples: int = 100, seed: int = 0, protocol: Protocol = ADM
) -> tuple[dict[str, float], dict[str, tuple[float, float] | None]]:
    values = {metric: protocol.functions[metric](c) for metric in metrics}
    return values, intervals(c, protocol, values, resamples, seed)


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


# ---- coverage


SETS = 250


@pytest.fixture(scope="module")
def simulated() -> dict[str, list[tuple[float, tuple[float, float]]]]:
    """Of many sets of 150 samples: the value and its interval."""
    results: dict[str, list] = {"fid": [], "sfid": [], "is": [], "precision": []}
    for seed in range(SETS):
        values, edges = found(compared(drawn(150, seed)), *results, resamples=120, seed=seed)
        for name, each in results.items():
            each.append((values[name], edges[name]))
    return results


@pytest.mark.parametrize("metric", ["fid", "sfid", "is", "precision"])
def test_95_percent_intervals_cover_what_is_expected_at_that_number_of_samples(metric, simulated):
    values = np.array([value for value, _ in simulated[metric]])
    edges = np.array([interval for _, interval in simulated[metric]])
    covered = ((edges[:, 0] <= values.mean()) & (values.mean() <= edges[:, 1])).mean()
    assert 0.88 <= covered <= 0.99


@pytest.mark.parametrize("metric", ["fid", "sfid", "is", "precision"])
def test_intervals_are_as_wide_as_the_spread_of_the_values(metric, simulated):
    spread = np.std([value for value, _ in simulated[metric]])
    widths = [width(interval) for _, interval in simulated[metric]]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_an_interval_is_not_that_of_the_distribution_itself():
    """FID of few samples comes out too high, and the interval stays around the value."""
    draw = np.random.default_rng(0)
    reference, few = (summary(pool=draw.normal(size=(n, 32))) for n in (20_000, 100))
    values, edges = found(compared(few, reference), "fid")
    assert 0 < edges["fid"][0] < values["fid"] < edges["fid"][1]
    assert edges["fid"][0] > 1  # and the two distributions are the same


def test_recall_covers_what_other_reference_images_of_the_same_kind_would_give():
    samples = drawn(150, 1)
    results = []
    for seed in range(SETS):
        values, edges = found(compared(samples, drawn(120, 1000 + seed, shift=0.0)), "recall", seed=seed)
        results.append((values["recall"], *edges["recall"]))
    values, low, high = np.array(results).T
    assert 0 < values.mean() < 100
    assert 0.88 <= ((low <= values.mean()) & (values.mean() <= high)).mean() <= 0.99


def test_widths_shrink_with_the_root_of_the_number_of_samples():
    names = ("fid", "sfid", "is", "precision")
    few, many = (
        np.mean([[width(found(compared(drawn(n, s)), *names, seed=s)[1][m]) for m in names] for s in range(5)], axis=0)
        for n in (200, 1800)
    )
    np.testing.assert_allclose(few / many, 3, rtol=0.25)


# ---- what holds whatever is drawn


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(4, 30), st.integers(2, 40), st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_no_interval_excludes_its_value(n, resamples, seed, shift):
    names = ("fid", "sfid", "is", "precision", "recall")
    values, edges = found(compared(drawn(n, seed, shift)), *names, resamples=resamples, seed=seed)
    for name in names:
        low, high = edges[name]
        assert 0 <= low <= values[name] <= high


def test_no_share_of_images_exceeds_100_percent():
    samples = Summary(50, {}, {})  # of which only the number counts
    for seed in range(20):
        edges = intervals(compared(samples), ADM, {"precision": 94.0}, 50, seed)
        assert edges["precision"][1] <= 100


def test_a_small_set_compared_with_itself_has_its_distance_in_the_interval():
    few = summary(pool=10 * np.random.default_rng(1).normal(size=(10, 64)))
    values, edges = found(compared(few, few), "fid")
    assert edges["fid"][0] <= values["fid"] <= edges["fid"][1]


@pytest.mark.parametrize("damaged", [1, 2])
def test_one_image_that_outweighs_all_others_does_not_push_the_value_out(damaged):
    samples = drawn(100, 3)
    rows = {name: np.array(part) for name, part in samples.rows.items()}
    for part in rows.values():
        part[:damaged] *= 1000
    values, edges = found(compared(summary(**rows)), "fid", "sfid", "is", resamples=200)
    assert all(edges[name][0] <= values[name] <= edges[name][1] for name in values)
    assert width(edges["fid"]) > values["fid"]


def test_the_same_seed_gives_the_same_intervals_and_another_gives_others():
    names, c = ("fid", "sfid", "is", "precision", "recall"), compared(drawn(100, 1))
    _, first = found(c, *names)
    _, again = found(compared(drawn(100, 1)), *names)
    _, other = found(c, *names, seed=1)
    assert first == again
    assert all(first[name] != other[name] for name in ("fid", "sfid", "is"))
    assert all(width(other[name]) == pytest.approx(width(first[name]), rel=0.5) for name in names)


def test_numpys_global_random_state_is_left_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    found(compared(drawn(50, 1)), "fid", "sfid", "is", "precision", "recall", resamples=5)
    assert np.array_equal(np.random.get_state()[1], before)


def test_a_resampled_fid_is_the_fid_of_the_images_drawn():
    """Of one resample, whose distance from its own mean is nothing; so it is looked at before it is moved."""
    samples, random = drawn(80, 2), np.random.default_rng(3)
    picked = np.random.default_rng(3).integers(80, size=80)
    c = compared(samples)
    score = bootstrap._frechet(c, "pool", c.reference.to_pool, random, 1, lambda n: None)
    assert score == pytest.approx([c.reference.to_pool(statistics(samples.rows["pool"][picked]))], rel=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_weighted_statistics_are_those_of_repeated_rows(rows, monkeypatch):
    monkeypatch.setattr(bootstrap, "ROWS", rows)
    pool = drawn(60, 4).rows["pool"] + np.float32(50)
    times = np.bincount(np.random.default_rng(0).integers(60, size=60), minlength=60)
    weighted, wanted = bootstrap._weighted(pool, times, pool.mean(0), CPU), statistics(np.repeat(pool, times, axis=0))
    np.testing.assert_allclose(weighted.mu, wanted.mu, rtol=1e-6)
    np.testing.assert_allclose(weighted.sigma, wanted.sigma, rtol=1e-4, atol=1e-5)
    assert weighted.n == wanted.n == 60


def test_kid_has_no_interval():
    values, edges = found(compared(drawn(50, 1)), "fid", "kid")
    assert edges["kid"] is None
    assert edges["fid"] is not None
    assert isinstance(values["kid"], float)


def test_statistics_from_a_file_have_no_interval():
    samples, pool = drawn(50, 1), drawn(500, 2).statistics["pool"]
    stored = {"mu": pool.mu, "sigma": pool.sigma, "mu_s": pool.mu, "sigma_s": pool.sigma}
    _, edges = found(compared(samples.with_stored(stored)), "fid", "sfid", "is", "precision")
    assert edges["fid"] is edges["sfid"] is None
    assert edges["is"] is not None
    assert edges["precision"] is not None


def test_statistics_of_more_images_than_are_kept_have_no_interval():
    _, edges = found(compared(drawn(50, 1).choice(40)), "fid", "sfid")
    assert edges == {"fid": None, "sfid": None}


def test_a_reference_of_stored_statistics_serves():
    pool = drawn(500, 2).statistics["pool"]
    stored = Statistics(pool.mu, pool.sigma, None)
    reference = Summary(500, {"pool": stored, "spatial": stored}, drawn(20, 2).rows)
    values, edges = found(compared(drawn(50, 1), reference), "fid")
    assert edges["fid"][0] < values["fid"] < edges["fid"][1]


def test_precision_is_counted_over_samples_and_recall_over_reference_images():
    """The standard error of a share of n is sqrt(p (1 - p) / n)."""
    c = compared(drawn(400, 1), drawn(100, 2, shift=0.0))
    values, edges = found(c, "precision", "recall", resamples=2000)
    for name, n in (("precision", 400), ("recall", 100)):
        share = values[name] / 100
        assert 0.05 < share < 0.95
        wanted = 2 * 1.96 * 100 * np.sqrt(share * (1 - share) / n)
        assert width(edges[name]) == pytest.approx(wanted, rel=0.15)


def test_the_scores_of_torch_fidelitys_parts_are_drawn_part_by_part():
    values, edges = found(compared(drawn(200, 1)), "is", protocol=TORCH_FIDELITY)
    assert values["is"] == TORCH_FIDELITY.functions["is"](compared(drawn(200, 1)))
    assert edges["is"][0] < values["is"] < edges["is"][1]


def test_progress_is_told_for_every_resample_that_takes_long():
    done, c = [], compared(drawn(50, 1))
    values = {"fid": 1.0, "sfid": 2.0, "is": 3.0}
    intervals(c, ADM, values, 7, advance=done.append)
    assert sum(done) == 14


def test_the_shares_of_hand_made_sets():
    """Where all samples are inside, no draw can say otherwise."""
    reference = summary(pool=np.arange(8.0)[:, None] * np.ones(8))
    c = compared(reference, reference)
    assert precision_recall.exact(c.samples.rows["pool"], reference.rows["pool"], CPU).precision == 100
    _, edges = found(c, "precision", "recall")
    assert edges == {"precision": (100, 100), "recall": (100, 100)}
