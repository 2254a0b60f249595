"""bdm's own feature networks: shapes, orders, batch independence, and files that are missing or wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CPU, noise
from torch import Tensor

from bdm_cli import tensorfile
from bdm_cli.diffusion.data import labelled_images
from bdm_cli.errors import BdmError
from bdm_cli.metrics import FEATURES, features
from bdm_cli.metrics.extraction import fingerprint
from bdm_cli.metrics.features import FeatureNet, Shape
from bdm_cli.places import locate
from bdm_cli.registry import resolve

PLAIN = Shape("digits", channels=1, size=16, n_classes=10, width=16)
RESIDUAL = Shape("cifar10", channels=3, size=32, n_classes=5, width=64, body="residual")


@pytest.fixture(autouse=True)
def same_weights_every_time():
    torch.manual_seed(0)


def images(n: int, shape: Shape) -> Tensor:
    return torch.from_numpy(noise(n, shape.channels, shape.size, shape.size))


def test_the_digits_network_tells_digits_apart():
    pixels, labels = labelled_images("digits", "")
    found = features.digits().extract(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "pool": (1797, 64),
        "spatial": (1797, 112),
        "logits": (1797, 10),
    }
    assert all(part.dtype == torch.float32 for part in found.values())
    assert (found["logits"].argmax(1).numpy() == labels).mean() > 0.99


def test_the_digits_network_is_small_and_says_how_it_was_made():
    path = locate("package:digits-features.safetensors")
    assert path.stat().st_size < 500_000
    _, header = tensorfile.read(path)
    assert json.loads(header["measured"])["accuracy"] > 98
    assert set(json.loads(header["measured"])) == {"accuracy", "seed", "steps"}


def test_the_cifar10_network_is_shipped_too():
    path = locate("package:cifar10-features.safetensors")
    assert path.stat().st_size < 5_000_000
    _, header = tensorfile.read(path)
    assert set(json.loads(header["measured"])) == {"accuracy", "seed", "steps"}
    network = features.cifar10()
    assert (network.shape.dataset, network.shape.channels, network.shape.size) == ("cifar10", 3, 32)
    found = network.extract(torch.from_numpy(noise(2, 3, 32, 32)))
    assert found["logits"].shape == (2, 10)
    assert found["spatial"].shape == (2, 8 * 8 * 7)


def test_files_written_before_there_were_bodies_are_plain():
    _, header = tensorfile.read(locate("package:digits-features.safetensors"))
    assert features.digits().shape.body == json.loads(header["feature_network"]).get("body", "plain") == "plain"


@pytest.mark.parametrize("shape", [PLAIN, RESIDUAL])
def test_an_images_features_do_not_depend_on_the_images_beside_it(shape):
    network, given = FeatureNet(shape).eval(), images(20, shape)
    whole = network.extract(given)
    for batch in (1, 7):
        parts = [network.extract(given[at : at + batch]) for at in range(0, 20, batch)]
        for name in whole:
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [PLAIN, RESIDUAL])
def test_logits_have_no_bias_and_spatial_features_are_in_nhwc_order(shape):
    network = FeatureNet(shape).eval()
    kept = []
    network.stages[2].register_forward_hook(lambda _, __, y: kept.append(y))
    found = network.extract(images(2, shape))
    quarter = shape.size // 4
    assert found["pool"].shape == (2, shape.width)
    assert found["spatial"].shape == (2, quarter * quarter * 7)
    torch.testing.assert_close(found["logits"], found["pool"] @ network.head.weight.T)
    by_hand = [kept[0][1, c, y, x] for y in range(quarter) for x in range(quarter) for c in range(7)]
    assert torch.equal(found["spatial"][1], torch.stack(by_hand))
    assert found["pool"].std(0).min() > 0


@pytest.mark.parametrize("shape", [PLAIN, RESIDUAL])
def test_training_reaches_every_weight_and_extraction_none(shape):
    network = FeatureNet(shape)
    network(images(8, shape)).square().mean().backward()
    assert all(weight.grad.abs().max() > 0 for weight in network.parameters())
    assert not any(part.requires_grad for part in network.extract(images(2, shape)).values())
    network.eval()
    assert torch.equal(network(images(2, shape)), network.extract(images(2, shape))["logits"])


def test_a_residual_network_adds_to_what_it_is_given():
    network = FeatureNet(RESIDUAL).eval()
    added = network.stages[1]
    x = torch.randn(1, 16, 16, 16)
    torch.testing.assert_close(added(x) - x, added[1](added[0](x)))
    assert (added(x) - x).abs().max() > 0.01


def test_a_feature_net_survives_the_disk(tmp_path):
    for shape in (PLAIN, RESIDUAL):
        network = FeatureNet(shape).eval()
        network.save(tmp_path / "a.safetensors", accuracy=1.0)
        found = FeatureNet.load(tmp_path / "a.safetensors")
        assert found.shape == shape
        assert fingerprint(found) == fingerprint(network)
        assert not found.training
        assert not any(weight.requires_grad for weight in found.parameters())
        assert torch.equal(found.extract(images(2, shape))["pool"], network.extract(images(2, shape))["pool"])


@pytest.mark.parametrize("given", [torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 16, 16)])
def test_images_of_another_shape_or_type_are_a_programming_mistake(given):
    kind = f"{given.dtype} \\(2, {given.shape[1]}, 16, 16\\)"
    with pytest.raises(ValueError, match=rf"images are {kind}, not uint8 \(N, \*\(1, 16, 16\)\)"):
        FeatureNet(PLAIN).extract(given)


@pytest.mark.parametrize("shape", [(17, 16, 1), (16, 15, 1), (32, 32, 1), (16, 16, 3)])
def test_images_that_a_network_is_not_for(shape):
    with pytest.raises(BdmError) as error:
        FeatureNet(PLAIN).require(shape, "somewhere")
    assert f"for images [16, 16, 1], somewhere has {list(shape)}" in str(error.value)
    assert "choose other features: digits, cifar10, inception" in str(error.value)


def test_grey_images_will_do_for_a_network_of_colours():
    FeatureNet(RESIDUAL).require((32, 32, 1), "somewhere")
    FeatureNet(RESIDUAL).require((32, 32, 3), "somewhere")
    FeatureNet(PLAIN).require((16, 16, 1), "somewhere")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _foreign(path: Path) -> None:
    tensorfile.write(path, tensorfile.read(path)[0], {})


def _other_layers(path: Path) -> None:
    tensors, header = tensorfile.read(path)
    tensorfile.write(path, {"head.weight": tensors["head.weight"]}, header)


def _other_keys(path: Path) -> None:
    tensors, header = tensorfile.read(path)
    tensorfile.write(path, tensors, header | {"feature_network": '{"depth": 3}'})


def _other_body(path: Path) -> None:
    tensors, header = tensorfile.read(path)
    shape = json.loads(header["feature_network"]) | {"body": "recurrent"}
    tensorfile.write(path, tensors, header | {"feature_network": json.dumps(shape)})


@pytest.mark.parametrize("damage", [_cut, _foreign, _other_layers, _other_keys, _other_body])
def test_a_file_that_is_not_a_whole_feature_network(tmp_path, damage: Callable[[Path], None]):
    path = tmp_path / "a.safetensors"
    FeatureNet(PLAIN).save(path)
    damage(path)
    with pytest.raises(BdmError, match=r"a\.safetensors"):
        FeatureNet.load(path)


def test_networks_of_one_data_set_and_different_bodies_have_different_names():
    assert FeatureNet(PLAIN).name == "plain network of digits"
    assert FeatureNet(RESIDUAL).name == "residual network of cifar10"


def test_features_are_looked_up_by_name():
    assert isinstance(resolve("feature network", "digits", FEATURES)(), FeatureNet)
    with pytest.raises(BdmError, match=r"unknown feature network 'incepton'\. Did you mean 'inception'"):
        resolve("feature network", "incepton", FEATURES)


def test_all_networks_answer_to_what_the_metrics_ask():
    for shape in (PLAIN, RESIDUAL):
        network = FeatureNet(shape)
        assert network.channels == shape.channels
        assert isinstance(network.name, str)
        assert np.prod(network.to(CPU).extract(images(1, shape))["spatial"].shape) == (shape.size // 4) ** 2 * 7


def test_the_tables_of_metrics_and_features_load_no_torch():
    code = "import sys, bdm_cli.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
