"""`bdm features`: the same network for the same seed, one that learns; how its images are moved and mirrored."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bdm_cli import tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.jobs import features
from bdm_cli.metrics.extraction import fingerprint
from bdm_cli.metrics.features import FeatureNet


def test_it_learns_and_repeats(home, tmp_path):
    accuracy = features.run("digits", "", steps=60, seed=1)
    path = home / "runs" / "features" / "digits.safetensors"
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


def test_the_answers_are_those_of_the_network(tmp_path):
    """However many images go through it at once."""
    features.run("digits", "", steps=3, out=tmp_path / "a.safetensors")
    network = FeatureNet.load(tmp_path / "a.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (150, 16, 16, 1), dtype=np.uint8)
    logits = network.extract(torch.from_numpy(images).permute(0, 3, 1, 2))["logits"]
    assert np.array_equal(features.answers(network, images), logits.argmax(1).numpy())


def test_the_network_of_cifar10(tmp_path):
    """On 30 images of three classes, one step: its budget fits its network, which is the residual one."""
    random = np.random.default_rng(0)
    for i in range(30):
        file = tmp_path / "images" / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    out = tmp_path / "a.safetensors"
    accuracy = features.run("cifar10", str(tmp_path / "images"), steps=1, out=out)
    assert accuracy * 6 / 100 == pytest.approx(round(accuracy * 6 / 100))  # six images are held out
    shape = FeatureNet.load(out).shape
    assert (shape.dataset, shape.channels, shape.size, shape.n_classes, shape.body) == ("cifar10", 3, 32, 3, "residual")


@pytest.mark.parametrize(("by", "draws"), [(1, 60), (2, 250)])
def test_shifts_reach_every_place_and_repeat_the_border(by, draws):
    images = torch.arange(2 * 1 * 4 * 4, dtype=torch.uint8).reshape(2, 1, 4, 4)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (by, by), (by, by)), mode="edge")
    generator = torch.Generator().manual_seed(0)
    places = [(y, x) for y in range(2 * by + 1) for x in range(2 * by + 1)]
    seen = set()
    for _ in range(draws):
        found = features.shifted(images, generator, by).numpy()
        assert found.dtype == np.uint8
        here = [(y, x) for y, x in places if np.array_equal(found[0], padded[0, :, y : y + 4, x : x + 4])]
        assert len(here) == 1
        seen |= set(here)
    assert seen == set(places)
