"""Feature networks: shapes, orders, batch independence, and files that are missing or wrong."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bdm_cli import tensorfile
from bdm_cli.diffusion.data import labelled_images
from bdm_cli.errors import BdmError
from bdm_cli.metrics import features
from bdm_cli.metrics.features import (
    FeatureNet,
    InceptionFeatures,
    Shape,
    extract,
    find_inception_weights,
    fingerprint,
    load_features,
)
from bdm_cli.places import locate


def noise(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of Inception's layout with random weights."""

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Keep the initial weights."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Random("random", ["2048"], str(folder / "empty.pth"))
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


def test_the_digits_network_tells_digits_apart():
    images, labels = labelled_images("digits", "")
    found = extract(load_features("digits"), images)
    assert found.pool.shape == (1797, 64)
    assert found.spatial.shape == (1797, 112)
    assert found.logits.shape == (1797, 10)
    assert all(part.dtype == torch.float32 for part in found)
    assert (found.logits.argmax(1).numpy() == labels).mean() > 0.99


def test_the_digits_network_is_small_and_says_how_it_was_made():
    path = locate("package:digits-features.safetensors")
    assert path.stat().st_size < 500_000
    _, header = tensorfile.read(path)
    assert json.loads(header["measured"])["accuracy"] > 98
    assert set(json.loads(header["measured"])) == {"accuracy", "seed", "steps"}


def test_features_are_the_same_at_any_batch_size():
    network, images = load_features("digits"), noise(70, 16, 16, 1)
    whole = extract(network, images, batch=70)
    for batch in (1, 7, 64):
        for a, b in zip(extract(network, images, batch=batch), whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_logits_have_no_bias_and_spatial_features_are_in_nhwc_order():
    network = FeatureNet(Shape("cifar10", channels=3, size=32, n_classes=5, width=16))
    pixels = torch.from_numpy(noise(2, 32, 32, 3)).permute(0, 3, 1, 2)
    kept = []
    network.stages[2].register_forward_hook(lambda _, __, y: kept.append(y))
    found = network.extract(pixels)
    torch.testing.assert_close(found.logits, found.pool @ network.head.weight.T)
    assert found.spatial.shape == (2, 8 * 8 * 7)
    by_hand = [kept[0][1, c, y, x] for y in range(8) for x in range(8) for c in range(7)]
    assert torch.equal(found.spatial[1], torch.stack(by_hand))
    assert torch.equal(network(pixels), found.logits)


def test_a_feature_net_survives_the_disk(tmp_path):
    network = FeatureNet(Shape("digits", 1, 16, 10, 16))
    network.save(tmp_path / "a.safetensors", accuracy=1.0)
    found = FeatureNet.load(tmp_path / "a.safetensors")
    assert found.shape == network.shape
    assert fingerprint(found) == fingerprint(network)
    assert fingerprint(FeatureNet(network.shape)) != fingerprint(network)


def test_images_of_another_shape_are_a_programming_mistake():
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\), not uint8 \(N, \*\(1, 16, 16\)\)"):
        extract(load_features("digits"), noise(2, 16, 16, 3))


@pytest.mark.parametrize("damage", ["cut", "foreign", "other layers"])
def test_a_file_that_is_not_a_whole_feature_network(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    FeatureNet(Shape("digits", 1, 16, 10, 16)).save(path)
    tensors, header = tensorfile.read(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "foreign":
        tensorfile.write(path, tensors, {})
    else:
        tensorfile.write(path, {"head.weight": tensors["head.weight"]}, header)
    with pytest.raises(BdmError, match=r"a\.safetensors"):
        FeatureNet.load(path)


def test_a_missing_cifar10_network_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("BDM_HOME", str(tmp_path))
    with pytest.raises(BdmError, match="bdm features --dataset cifar10 --path"):
        load_features("cifar10")


def test_unknown_features():
    with pytest.raises(BdmError, match=r"unknown feature network 'incepton'\. Did you mean 'inception'"):
        load_features("incepton")


def test_inception_gives_adms_features(inception_file):
    network = InceptionFeatures(inception_file)
    images = noise(3, 32, 32, 3)
    kept = []
    network.network.Mixed_6d.register_forward_hook(lambda _, __, y: kept.append(y))
    found = extract(network, images)
    assert [tuple(part.shape) for part in found] == [(3, 2048), (3, 2023), (3, 1008)]
    torch.testing.assert_close(found.logits, found.pool @ network.network.fc.weight.T)
    assert torch.equal(found.spatial, kept[0][:, :7].permute(0, 2, 3, 1).flatten(1))
    for a, b in zip(extract(network, images, batch=2), found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_inception_repeats_gray_images(inception_file):
    network = InceptionFeatures(inception_file)
    gray = noise(1, 16, 16, 1)
    for a, b in zip(extract(network, gray), extract(network, gray.repeat(3, axis=3)), strict=True):
        assert torch.equal(a, b)


def test_inception_weights_are_found_by_environment_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("BDM_INCEPTION", raising=False)
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(BdmError, match=r"releases/download/v0\.2\.0/weights-inception") as error:
        find_inception_weights()
    assert str(place) in str(error.value)
    assert "digits" in str(error.value)

    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(BdmError, match=r"SHA-256 .*not 6726825d"):
        find_inception_weights()

    given = tmp_path / "elsewhere.pth"
    given.write_bytes(b"the real one")
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"the real one").hexdigest()[:8])
    monkeypatch.setenv("BDM_INCEPTION", str(given))
    assert find_inception_weights() == given


def test_inception_never_runs_code_from_a_file(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"x": Harmful()}, tmp_path / "a.pth")
    with pytest.raises(BdmError, match=r"a\.pth"):
        InceptionFeatures(tmp_path / "a.pth")
    assert not (tmp_path / "written").exists()


def test_the_tables_of_metrics_and_features_load_no_torch():
    code = "import sys, bdm_cli.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
