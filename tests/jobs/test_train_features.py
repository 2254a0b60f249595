"""`bdm features`: the same network for the same seed, one that learns, and shifts by one pixel."""

import json

import numpy as np
import pytest
import torch

from bdm_cli import tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.jobs import features
from bdm_cli.metrics.features import FeatureNet, fingerprint


def test_it_learns_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setenv("BDM_HOME", str(tmp_path))
    accuracy = features.run("digits", "", steps=60, seed=1)
    path = tmp_path / "runs" / "features" / "digits.safetensors"
    _, header = tensorfile.read(path)
    assert json.loads(header["measured"]) == {"accuracy": accuracy, "seed": 1, "steps": 60}
    assert accuracy > 80
    assert features.run("digits", "", steps=60, seed=1, out=tmp_path / "again.safetensors") == accuracy
    features.run("digits", "", steps=2, seed=2, out=tmp_path / "other.safetensors")
    first, again, other = (
        FeatureNet.load(p) for p in (path, tmp_path / "again.safetensors", tmp_path / "other.safetensors")
    )
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_one_step_is_enough_to_run(tmp_path):
    features.run("digits", "", steps=1, out=tmp_path / "a.safetensors")


def test_a_data_set_without_labels(tmp_path):
    with pytest.raises(BdmError, match="cannot read the training images of 'bedrooms'"):
        features.run("bedrooms", "", out=tmp_path / "a.safetensors")


def test_shifts_are_by_one_pixel_at_most_and_repeat_the_border():
    images = torch.arange(2 * 1 * 4 * 4, dtype=torch.uint8).reshape(2, 1, 4, 4)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        found = features.shifted(images, generator).numpy()
        assert found.dtype == np.uint8
        places = [
            (y, x) for y in range(3) for x in range(3) if np.array_equal(found[0], padded[0, :, y : y + 4, x : x + 4])
        ]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) == 9
