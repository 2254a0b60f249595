"""What each protocol has, on which features; and kernel distances against the formula."""

import inspect

import numpy as np
import pytest
import torch
from builders import CPU, summary
from cleanfid.fid import kernel_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_kid import kid_features_to_metric

from bdm_cli.errors import BdmError
from bdm_cli.metrics import METRICS, PROTOCOLS, inception_score, kernel, precision_recall
from bdm_cli.metrics.comparison import Comparison, Reference
from bdm_cli.metrics.frechet import FrechetTo
from bdm_cli.metrics.protocols import ADM, CLEAN, TORCH_FIDELITY, protocol
from bdm_cli.recipe import ASKED_FOR, Evaluate


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def compared(distances: str = "exact") -> Comparison:
    sides = [
        summary(
            pool=features(n, 8, seed, shift),
            spatial=features(n, 5, seed + 10, shift),
            logits=features(n, 4, seed + 20),
            manifold=features(n, 16, seed + 30, shift),
        )
        for n, seed, shift in ((120, 1, 0.6), (90, 2, 0.0))
    ]
    return Comparison(sides[0], Reference(sides[1], distances, CPU))


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of arXiv:1801.01401, Eq. 4, with its cubic kernel, in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    d, m, n = x.shape[1], len(x), len(y)
    same = [np.power(z @ z.T / d + 1, 3) for z in (x, y)]
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in same]
    return sum(within) - 2 * np.power(x @ y.T / d + 1, 3).sum() / (m * n)


# ---- protocols


def test_the_metrics_of_the_protocols():
    assert set(ADM.functions) == set(METRICS) == {"fid", "sfid", "is", "precision", "recall", "kid"}
    assert set(CLEAN.functions) == {"fid", "kid"}
    assert set(TORCH_FIDELITY.functions) == {"fid", "is", "precision", "recall", "kid"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_found_by_its_name_with_its_metrics(name):
    found = protocol(name, ("fid", "kid"), "inception")
    assert found.name == name
    assert protocol(name, tuple(found.functions), "inception") is found


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_metric_of_a_protocol_gives_a_number(name):
    for function in protocol(name, (), "inception").functions.values():
        assert isinstance(function(compared()), float)


def test_adms_metrics_look_at_the_features_that_they_are_defined_on():
    c = compared()
    ours, theirs = c.samples, c.reference.summary
    coverage = precision_recall.exact(ours.rows["pool"], theirs.rows["pool"], CPU)
    wanted = {
        "fid": FrechetTo(theirs.statistics["pool"])(ours.statistics["pool"]),
        "sfid": FrechetTo(theirs.statistics["spatial"])(ours.statistics["spatial"]),
        "is": inception_score.score(ours.rows["logits"], inception_score.in_file_order(120)),
        "precision": coverage.precision,
        "recall": coverage.recall,
        "kid": kernel.torch_fidelity(ours.rows["pool"], theirs.rows["pool"]),
    }
    assert {metric: function(c) for metric, function in ADM.functions.items()} == pytest.approx(wanted, rel=1e-12)
    assert len({round(value, 6) for value in wanted.values()}) == 6
    assert 0 < coverage.precision < 100


def test_torch_fidelitys_differ_in_parts_and_features():
    c = compared()
    functions = TORCH_FIDELITY.functions
    assert functions["is"](c) == inception_score.score(c.samples.rows["logits"], inception_score.in_shuffled_parts(120))
    assert functions["is"](c) != ADM.functions["is"](c)
    sides = c.samples.rows["manifold"], c.reference.summary.rows["manifold"]
    assert (functions["precision"](c), functions["recall"](c)) == precision_recall.torch_fidelity(*sides)
    assert functions["precision"](c) != ADM.functions["precision"](c)
    assert functions["fid"](c) == ADM.functions["fid"](c)


def test_distances_in_float16_are_another_rounding_of_the_same_thing():
    exact, rounded = (ADM.functions["precision"](compared(distances)) for distances in ("exact", "float16"))
    assert rounded == pytest.approx(exact, abs=3)


def test_the_inception_score_does_not_look_at_the_reference():
    c = compared()
    assert ADM.functions["is"](c) == ADM.functions["is"](Comparison(c.samples, Reference(c.samples, "exact", CPU)))


def test_coverage_is_computed_once_for_precision_and_recall(monkeypatch):
    c, calls = compared(), []
    exact = precision_recall.exact
    monkeypatch.setattr(precision_recall, "exact", lambda *sides: calls.append(1) or exact(*sides))
    assert ADM.functions["precision"](c) != ADM.functions["recall"](c)
    assert calls == [1]


def test_an_unknown_protocol_or_metric():
    with pytest.raises(BdmError, match=r"unknown protocol 'cleanfid'\. Did you mean 'clean'\?\n  known: adm, clean, t"):
        protocol("cleanfid", ("fid",), "inception")
    with pytest.raises(BdmError, match=r"unknown metric 'presicion'\. Did you mean 'precision'\?"):
        protocol("adm", ("fid", "presicion"), "inception")
    with pytest.raises(BdmError, match=r"unknown metric 'fdi'\. Did you mean 'fid'\?"):
        protocol("clean", ("fdi",), "inception")


@pytest.mark.parametrize(
    ("name", "metrics", "lacking"),
    [
        ("clean", ("fid", "sfid"), "sfid"),
        ("clean", ("fid", "is", "recall"), "is, recall"),
        ("torch-fidelity", ("sfid", "fid"), "sfid"),
    ],
)
def test_a_metric_that_a_protocol_has_not(name, metrics, lacking):
    with pytest.raises(
        BdmError, match=f"the protocol '{name}' has no {lacking}.\n  allowed: fid, .*'adm' has them all"
    ):
        protocol(name, metrics, "inception")


@pytest.mark.parametrize("features", ["digits", "cifar10"])
@pytest.mark.parametrize("name", ["clean", "torch-fidelity"])
def test_a_protocol_of_inception_alone_refuses_other_features(name, features):
    with pytest.raises(
        BdmError, match=f"the protocol '{name}' is defined on Inception's features, not on '{features}'"
    ):
        protocol(name, ("fid",), features)
    assert protocol("adm", ("fid", "sfid"), features) is ADM


# ---- kernel distances


SUITES = [kernel.torch_fidelity, kernel.clean_fid]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (40, 1), (200, 16), (300, 8)])
def test_of_all_images_it_is_the_unbiased_formula(suite, n, d):
    x, y = features(n, d, 1).astype(np.float64), features(n, d, 2, 0.5).astype(np.float64)
    assert suite(x, y) == pytest.approx(mmd(x, y), rel=1e-9)
    assert suite(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(mmd(x, y), rel=1e-3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.integers(1, 6), st.floats(-2, 2), st.integers(0, 2**32 - 2))
def test_both_suites_agree_of_all_images(n, d, shift, seed):
    x, y = features(n, d, seed).astype(np.float64), features(n, d, seed + 1, shift).astype(np.float64)
    assert kernel.torch_fidelity(x, y) == pytest.approx(mmd(x, y), rel=1e-7, abs=1e-9)
    assert kernel.clean_fid(x, y) == pytest.approx(mmd(x, y), rel=1e-7, abs=1e-9)


def test_of_more_images_it_is_the_mean_over_subsets(monkeypatch):
    monkeypatch.setattr(kernel, "SUBSET", 150)
    x, y = features(300, 4, 1), features(250, 4, 2, 0.7)
    found = kernel.torch_fidelity(x, y)
    wanted = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=150, verbose=False)
    assert found == wanted["kernel_inception_distance_mean"]
    assert found == pytest.approx(mmd(x, y), rel=0.1)
    assert found != mmd(x, y)


def test_subsets_are_of_1000_images_as_in_the_libraries():
    theirs = inspect.signature(kernel_distance).parameters
    assert kernel.SUBSET == DEFAULTS["kid_subset_size"] == theirs["max_subset_size"].default == 1000
    assert DEFAULTS["rng_seed"] == kernel.SEED


@pytest.mark.parametrize("suite", SUITES)
def test_the_smaller_set_is_taken_whole(suite):
    x, y = features(300, 4, 1), features(60, 4, 2, 0.7)
    assert suite(x, y) == pytest.approx(mmd(x, y), rel=0.05)
    assert suite(y, x) == pytest.approx(mmd(y, x), rel=0.05)


@pytest.mark.parametrize("suite", SUITES)
def test_sets_of_one_distribution_are_at_no_distance_on_average(suite):
    values = [suite(features(100, 4, 2 * seed), features(100, 4, 2 * seed + 1)) for seed in range(20)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(20)
    assert min(values) < 0 < max(values)  # unbiased: it may be negative


@pytest.mark.parametrize("suite", SUITES)
def test_numpys_global_random_state_is_left_alone(suite):
    np.random.seed(5)
    before = np.random.get_state()
    one = suite(features(50, 3, 1), features(40, 3, 2))
    after = np.random.get_state()
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]
    np.random.seed(6)
    assert suite(features(50, 3, 1), features(40, 3, 2)) == one


def test_every_protocol_has_what_it_is_asked_for_by_default():
    assert ASKED_FOR.keys() == PROTOCOLS.keys()
    for name, metrics in ASKED_FOR.items():
        assert set(metrics) <= set(protocol(name, metrics, "inception").functions)
    assert ASKED_FOR["adm"] == Evaluate.model_fields["metrics"].default
