"""Inception Scores against ADM's definition written out, and torch-fidelity's own code."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from bdm_cli.metrics import inception_score
from bdm_cli.metrics.inception_score import in_file_order, in_shuffled_parts, resampled, score


def by_definition(logits: np.ndarray, split_size: int = 5000) -> float:
    """compute_inception_score of evaluations/evaluator.py (openai/guided-diffusion), in float64."""
    wide = logits.astype(np.float64)
    preds = np.exp(wide - wide.max(1, keepdims=True))
    preds /= preds.sum(1, keepdims=True)
    scores = []
    for i in range(0, len(preds), split_size):
        part = preds[i : i + split_size]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        kl = np.mean(np.sum(kl, 1))
        scores.append(np.exp(kl))
    return float(np.mean(scores))


def logits(n: int, classes: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, classes)) * scale).astype(np.float32)


def certain(labels: np.ndarray, classes: int) -> np.ndarray:
    return 300 * np.eye(classes, dtype=np.float32)[labels]


@pytest.mark.parametrize("n", [1, 4, 300, 4999, 5000, 5001, 12_345])
def test_it_equals_adms_definition_in_file_order(n):
    given = logits(n, 6)
    assert score(given, in_file_order(n)) == pytest.approx(by_definition(given), rel=1e-12)


def test_blocks_in_file_order_are_5000_long_and_the_last_may_be_short():
    blocks = in_file_order(12_345)
    assert [len(block) for block in blocks] == [5000, 5000, 2345]
    assert np.array_equal(np.concatenate(blocks), np.arange(12_345))
    assert [len(block) for block in in_file_order(10_000)] == [5000, 5000]


def test_a_short_last_block_counts_as_much_as_a_full_one():
    given = np.concatenate([certain(np.arange(5000) % 8, 8), certain(np.zeros(1, int), 8)])
    assert score(given, in_file_order(5001)) == pytest.approx((8 + 1) / 2)


def test_answers_that_do_not_depend_on_the_image_score_one():
    assert score(np.zeros((400, 7), np.float32), in_file_order(400)) == pytest.approx(1, abs=1e-12)
    same = np.tile(logits(1, 7), (400, 1))
    assert score(same, in_file_order(400)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_certain_answers_of_all_classes_score_their_number(classes):
    given = certain(np.arange(1000) % classes, classes)
    assert score(given, in_file_order(1000)) == pytest.approx(classes, rel=1e-9)


def test_files_sorted_by_class_score_low():
    labels = np.repeat(np.arange(4), 5000)
    mixed = np.random.default_rng(0).permutation(labels)
    assert score(certain(labels, 4), in_file_order(20_000)) == pytest.approx(1)
    assert score(certain(mixed, 4), in_file_order(20_000)) == pytest.approx(4, rel=1e-2)


def test_a_constant_added_to_an_images_logits_changes_nothing():
    given = logits(200, 5)
    moved = given + np.linspace(-60, 60, 200, dtype=np.float32)[:, None]
    assert score(moved, in_file_order(200)) == pytest.approx(score(given, in_file_order(200)), rel=1e-5)


@pytest.mark.parametrize("n", [10, 11, 257, 1999, 12_345])
def test_shuffled_parts_are_torch_fidelitys_default(n):
    given = logits(n, 9)
    wanted = isc_features_to_metric(torch.from_numpy(given))["inception_score_mean"]
    assert score(given, in_shuffled_parts(n)) == pytest.approx(wanted, rel=1e-12)
    parts = in_shuffled_parts(n)
    assert len(parts) == 10
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


def test_shuffled_parts_do_not_touch_numpys_global_random_state():
    np.random.seed(1)
    wanted = np.random.random()
    np.random.seed(1)
    in_shuffled_parts(100)
    assert np.random.random() == wanted


@pytest.mark.parametrize("blocks", [in_file_order, in_shuffled_parts])
def test_a_resampled_score_is_the_score_of_the_images_drawn(blocks, monkeypatch):
    monkeypatch.setattr(inception_score, "BLOCK", 90)
    given, parts = logits(250, 5), blocks(250)
    draw = np.random.default_rng(7)
    drawn = [part[draw.integers(len(part), size=len(part))] for part in parts]
    found = resampled(given, parts, np.random.default_rng(7), 1)
    assert found == pytest.approx([score(given, drawn)], rel=1e-12)


def test_resampled_scores_spread_around_and_below_the_score():
    given = logits(400, 5)
    found = resampled(given, in_file_order(400), np.random.default_rng(0), 200)
    assert found.shape == (200,)
    assert 0 < found.std() < 0.2
    assert abs(found.mean() - score(given, in_file_order(400))) < 2 * found.std()
