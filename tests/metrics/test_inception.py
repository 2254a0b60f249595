"""Inception and VGG against the libraries whose networks they are; and weights that are missing, wrong or harmful."""

import hashlib
import shutil
import socket
import urllib.error
from dataclasses import replace
from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import torch
import torch_fidelity
from builders import CPU, Process, image_set, noise
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torchvision.models import VGG16_Weights, vgg16

from bdm_cli.errors import BdmError
from bdm_cli.metrics import inception, protocols
from bdm_cli.metrics.comparison import Comparison, Reference
from bdm_cli.metrics.extraction import summary_of
from bdm_cli.metrics.inception import (
    CLEAN,
    INCEPTION,
    VGG,
    CleanFeatures,
    InceptionFeatures,
    TorchFidelityFeatures,
    Weights,
)


class Untrained(FeatureExtractorInceptionV3):
    def load_state_dict(self, *args, **kwargs):
        """Keep the initial weights."""


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """A file of Inception's layout: random weights, and running means and variances that suit them."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Untrained("random", ["2048"], str(folder / "empty.pth"))
    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.bn.momentum = None  # the mean over what is seen
            module.bn.weight.data.uniform_(0.5, 1)
            module.bn.bias.data.normal_(1, 0.3)  # mostly open: rounding does not grow from layer to layer
            nn.init.kaiming_normal_(module.conv.weight, nonlinearity="relu")
    network.train()
    with torch.no_grad():
        middle = network(bytes_of(pictures(3)))[0].mean(0)
    rows = torch.randn(network.fc.weight.shape)
    network.fc.weight.data = rows - torch.outer(rows @ middle, middle) / middle.square().sum()  # answers that differ
    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.bn.momentum = 0.1
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    """A file of VGG-16's layout, random; the rows of its large matrices overlap in memory, so that it is small."""
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: part.shape for name, part in vgg16().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            overlapping = torch.randn(sum(shape), generator=draw) * (2 / shape[1]) ** 0.5
            state[name] = overlapping.as_strided(shape, (1, 1))
        else:
            fan_in = int(np.prod(shape[1:]))
            state[name] = torch.randn(shape, generator=draw) * ((2 / fan_in) ** 0.5 if len(shape) > 1 else 0.1)
    path = tmp_path_factory.mktemp("vgg") / "random.pth"
    torch.save(state, path)
    assert path.stat().st_size < 2**27
    return path


def pictures(n: int, size: int = 40, seed: int = 0) -> np.ndarray:
    """Images [n, size, size, 3] of coarse random patches, each of a brightness of its own."""
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(0, 1, (n, 8, 8, 3)) * draw.uniform(0.3, 1, (n, 1, 1, 1))
    fine = coarse.repeat(size // 8, 1).repeat(size // 8, 2) + draw.normal(0, 0.05, (n, size, size, 3))
    return (255 * fine.clip(0, 1)).astype(np.uint8)


def bytes_of(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def comparison(network: nn.Module, samples: np.ndarray, reference: np.ndarray) -> Comparison:
    ours, theirs = (summary_of(network, image_set(side), Process()) for side in (samples, reference))
    return Comparison(ours, Reference(theirs, "exact", CPU))


def close(found: Tensor, wanted: Tensor, closeness: float = 1e-5) -> bool:
    """Relative to the largest number."""
    assert found.shape == wanted.shape
    assert wanted.std() > 1e-3
    return bool((found - wanted).abs().max() <= closeness * wanted.abs().max())


# ---- ADM's features


def test_adms_features_are_those_of_the_unmodified_network(inception_file):
    names = ["2048", "logits_unbiased"]
    plain = FeatureExtractorInceptionV3("inception", names, str(inception_file))
    kept = []
    plain.Mixed_6d.register_forward_hook(lambda _, __, y: kept.append(y))
    images = bytes_of(pictures(2))
    with torch.no_grad():
        pool, logits = plain(images)
    found = InceptionFeatures(inception_file).extract(images)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    assert all(part.dtype == torch.float32 for part in found.values())
    assert close(found["pool"], pool)
    assert close(found["logits"], logits)
    assert close(found["logits"], found["pool"] @ plain.fc.weight.T)
    assert kept[0].shape == (2, 768, 17, 17)
    by_hand = kept[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, 2023)
    assert close(found["spatial"], torch.from_numpy(by_hand))


def test_an_images_features_do_not_depend_on_the_images_beside_it(inception_file):
    network, images = InceptionFeatures(inception_file), bytes_of(pictures(3, size=32))
    whole, parts = network.extract(images), [network.extract(images[i : i + 1]) for i in range(3)]
    for name, part in whole.items():
        assert close(torch.cat([each[name] for each in parts]), part)


def test_no_hook_is_left_behind(inception_file):
    network = InceptionFeatures(inception_file)
    network.extract(bytes_of(pictures(1)))
    assert not network.network.Mixed_6d.branch1x1._forward_hooks


def test_grey_images_of_any_size_are_repeated(inception_file):
    network, grey = InceptionFeatures(inception_file), noise(1, 20, 24, 1)
    network.require((20, 24, 1), "somewhere")
    found, wanted = (summary_of(network, image_set(side), Process()) for side in (grey, grey.repeat(3, axis=3)))
    for name, rows in wanted.rows.items():
        np.testing.assert_allclose(found.rows[name], rows, rtol=1e-5, atol=1e-6)


# ---- torch-fidelity


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images: np.ndarray) -> None:
        self.images = bytes_of(images).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return self.images[number]


def by_torch_fidelity(
    samples: np.ndarray, reference: np.ndarray, weights: Path, **settings: object
) -> dict[str, float]:
    sides = {"input1": Pictures(samples), "input2": Pictures(reference)}
    usual = {"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False}
    return torch_fidelity.calculate_metrics(**sides, **usual, **settings, feature_extractor_weights_path=str(weights))


def test_torch_fidelitys_is_fid_and_kid_are_its_own(inception_file):
    samples, reference = pictures(12), pictures(8, seed=1) // 2
    wanted = by_torch_fidelity(samples, reference, inception_file, isc=True, fid=True, kid=True, kid_subset_size=8)
    functions = protocols.TORCH_FIDELITY.functions
    c = comparison(TorchFidelityFeatures(inception_file, None), samples, reference)
    assert set(c.samples.rows) == {"pool", "logits"}
    assert functions["is"](c) == pytest.approx(wanted["inception_score_mean"], rel=1e-5)
    assert functions["fid"](c) == pytest.approx(wanted["frechet_inception_distance"], rel=1e-5)
    assert functions["kid"](c) == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-5)
    assert wanted["inception_score_mean"] > 1.1
    assert wanted["frechet_inception_distance"] > 1
    assert wanted["kernel_inception_distance_mean"] > 0.01


def test_torch_fidelitys_precision_and_recall_are_its_own_on_vggs_features(inception_file, vgg_file, quick_to_build):
    samples, reference = pictures(7), pictures(6, seed=1)
    samples[0] = 0
    wanted = by_torch_fidelity(samples, reference, vgg_file, prc=True)
    network = TorchFidelityFeatures(inception_file, vgg_file)
    c = comparison(network, samples, reference)
    assert c.samples.rows["manifold"].shape == (7, 4096)
    assert c.samples.rows["manifold"].min() == 0  # after the ReLU
    functions = protocols.TORCH_FIDELITY.functions
    assert functions["precision"](c) == pytest.approx(100 * wanted["precision"], rel=1e-6)
    assert functions["recall"](c) == pytest.approx(100 * wanted["recall"], rel=1e-6)
    assert 0 < wanted["precision"] < 1


@pytest.fixture
def quick_to_build(monkeypatch):
    """Initial weights of VGG-16, which are replaced at once, take three seconds to draw."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **settings: tensor)


# ---- clean-fid


class Layers(nn.Module):
    """[N, 3, 299, 299] -> [N, 2048], of which all but 12 are 0, for the sake of scipy's matrix root."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 12, 5, 40)

    def forward(self, x: Tensor) -> Tensor:
        found = (10 * self.mix(x)).abs().mean((2, 3))
        return torch.cat([found, torch.zeros(x.shape[0], 2036)], 1)


class StandIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, return_features: bool = True) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def clean_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clean") / "another-name.pt"
    torch.jit.script(StandIn().eval()).save(str(path))
    return path


def test_clean_fids_fid_and_kid_are_its_own(clean_file, tmp_path):
    sides = {"samples": pictures(20), "reference": pictures(15, seed=1) // 2}
    shutil.copy(clean_file, tmp_path / "inception-2015-12-05.pt")
    model, rows = InceptionV3W(str(tmp_path), download=False, resize_inside=False), {}
    for name, images in sides.items():
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{number:03d}.png")
        rows[name] = cleanfid.fid.get_folder_features(
            str(tmp_path / name), model, num_workers=0, batch_size=4, device=CPU, mode="clean", verbose=False
        )
    c = comparison(CleanFeatures(clean_file), sides["samples"], sides["reference"])
    assert set(c.samples.rows) == {"pool"}
    for summary, wanted in ((c.samples, rows["samples"]), (c.reference.summary, rows["reference"])):
        assert close(torch.from_numpy(np.array(summary.rows["pool"])), torch.from_numpy(wanted))
    found = protocols.CLEAN.functions["fid"](c)
    assert found == pytest.approx(
        cleanfid.fid.fid_from_feats(rows["samples"][:, :12], rows["reference"][:, :12]), rel=1e-5
    )
    np.random.seed(2020)
    wanted = cleanfid.fid.kernel_distance(rows["reference"], rows["samples"])
    assert protocols.CLEAN.functions["kid"](c) == pytest.approx(wanted, rel=1e-3)
    assert found > 1


def test_clean_fid_resizes_with_antialiasing_before_the_network(clean_file):
    fine = np.tile(np.array([[0, 255], [255, 0]], np.uint8)[..., None], (1, 300, 300, 3))  # grey from afar
    found = CleanFeatures(clean_file).extract(bytes_of(fine))["pool"]
    grey = CleanFeatures(clean_file).extract(bytes_of(np.full((1, 600, 600, 3), 128, np.uint8)))["pool"]
    assert (found - grey).abs().max() < 0.05 * grey.abs().max()


# ---- files that are no weights


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_code_of_a_file_is_run(tmp_path, inception_file):
    torch.save({"x": Harmful(tmp_path / "written")}, tmp_path / "a.pth")
    for make in (InceptionFeatures, lambda path: TorchFidelityFeatures(inception_file, path)):
        with pytest.raises(BdmError, match=r"cannot read .*a\.pth as the weights of"):
            make(tmp_path / "a.pth")
        assert not (tmp_path / "written").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "written").exists()  # so it would have


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("make", [InceptionFeatures, CleanFeatures])
def test_files_that_are_no_network(make, content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(BdmError, match=r"(?s)cannot read .*a\.pth as the weights of .*\n  get it: https://"):
        make(tmp_path / "a.pth")


def test_files_of_other_tensors(tmp_path, inception_file):
    state = torch.load(inception_file, weights_only=True)
    torch.save({name: part for name, part in state.items() if name != "fc.weight"}, tmp_path / "a.pth")
    with pytest.raises(BdmError, match=r'(?s)cannot read .*a\.pth as the weights of Inception-v3: .*"fc.weight"'):
        InceptionFeatures(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [torch.zeros(3)],
        {"fc.weight": "text"},
    ],
)
def test_files_of_something_else_than_named_tensors(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(BdmError, match=r"cannot read .*a\.pth as the weights of Inception-v3"):
        InceptionFeatures(tmp_path / "a.pth")


def test_torchscript_of_another_network(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(BdmError, match=r"cannot read .*a\.pt as the weights of clean-fid's Inception-v3"):
        CleanFeatures(tmp_path / "a.pt")


# ---- where weights come from


CONTENT = b"the published weights"
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def published(tmp_path, monkeypatch) -> Weights:
    """A file that can be downloaded without a network, by the variable BDM_TEST."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("BDM_TEST", raising=False)
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "weights.pth").write_bytes(CONTENT)
    return Weights("a network", f"file://{tmp_path}/server/weights.pth", HASH[:8], "BDM_TEST")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **settings):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def test_what_is_not_there_is_downloaded_once_to_torch_hubs_folder(published, tmp_path):
    assert published.find() is None
    place = tmp_path / "torch" / "hub" / "checkpoints" / "weights.pth"
    assert published.get() == published.place() == place
    assert place.read_bytes() == CONTENT
    (tmp_path / "server" / "weights.pth").unlink()
    assert published.get() == published.find() == place


def test_a_download_of_another_file_is_not_kept(published, tmp_path):
    (tmp_path / "server" / "weights.pth").write_bytes(b"an error page")
    with pytest.raises(BdmError, match=r"cannot be downloaded .*invalid hash value"):
        published.get()
    assert not published.place().exists()


def test_a_server_has_limited_patience_for_the_download_alone(published, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: seen.append(socket.getdefaulttimeout()))
    before = socket.getdefaulttimeout()
    published.get()
    assert seen == [30]
    assert socket.getdefaulttimeout() == before


def test_the_file_that_is_given_comes_before_the_variable_and_that_before_the_place(published, tmp_path, monkeypatch):
    published.get()
    for name in ("given", "named"):
        (tmp_path / name).write_bytes(CONTENT)
    monkeypatch.setenv("BDM_TEST", str(tmp_path / "named"))
    assert published.get(tmp_path / "given") == tmp_path / "given"
    assert published.get() == tmp_path / "named"
    monkeypatch.setenv("BDM_TEST", "")
    assert published.get() == published.place()


@pytest.mark.parametrize("how", ["given", "variable"])
def test_a_named_file_that_is_missing_is_not_replaced_by_a_download(how, published, tmp_path, monkeypatch):
    given = None
    if how == "given":
        given = tmp_path / "missing.pth"
    else:
        monkeypatch.setenv("BDM_TEST", str(tmp_path / "missing.pth"))
    with pytest.raises(BdmError, match=r"the weights of a network are not at .*missing\.pth") as error:
        published.get(given)
    assert f"get it: {published.url}" in str(error.value)
    assert not published.place().exists()


@pytest.mark.parametrize("where", ["given", "place"])
def test_another_or_a_cut_off_file_is_refused(where, published, tmp_path):
    path = tmp_path / "given.pth" if where == "given" else published.place()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT[:-1])
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()[:8]
    with pytest.raises(BdmError, match=f"{path} has SHA-256 {found}..., not {HASH[:8]}...: another or a cut-off file"):
        published.find(path if where == "given" else None)


@pytest.mark.parametrize("weights", [INCEPTION, VGG, CLEAN])
def test_without_a_network_the_message_names_file_address_place_and_what_needs_none(
    weights, no_network, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(inception.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv(weights.variable, raising=False)
    with pytest.raises(BdmError, match=r"cannot be downloaded .*no route to host") as error:
        weights.get()
    told = str(error.value)
    assert f"file: {weights.file}\n" in told
    assert f"get it: {weights.url}\n" in told
    assert f"put it at {weights.place()}, or name it: " in told
    assert f"${weights.variable}" in told
    assert ("--inception-weights FILE" in told) == (weights is not VGG)
    assert weights.instead in told
    assert weights.place().parent == (Path("/tmp") if weights is CLEAN else tmp_path / "torch" / "hub" / "checkpoints")


def test_a_place_that_cannot_be_written_is_told(published, tmp_path):
    (tmp_path / "torch").write_text("in the way")
    with pytest.raises(BdmError, match="cannot be downloaded"):
        published.get()


def test_the_files_are_the_ones_the_libraries_use():
    assert INCEPTION.file == "weights-inception-2015-12-05-6726825d.pth"
    assert INCEPTION.file.removesuffix(".pth").endswith(INCEPTION.sha256)
    assert CLEAN.file == "inception-2015-12-05.pt"
    assert VGG.url == VGG16_Weights.IMAGENET1K_V1.url
    assert VGG.file.removesuffix(".pth").endswith(VGG.sha256)
    assert len({weights.variable for weights in (INCEPTION, VGG, CLEAN)}) == 3


def test_the_networks_of_the_protocols(inception_file, vgg_file, clean_file, monkeypatch, quick_to_build):
    def named(name: str, path: Path) -> None:
        weights = getattr(inception, name)
        own = replace(weights, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        monkeypatch.setattr(protocols, {"CLEAN": "CLEAN_WEIGHTS"}.get(name, name), own)
        monkeypatch.setenv(weights.variable, str(path))

    for name, path in (("INCEPTION", inception_file), ("VGG", vgg_file), ("CLEAN", clean_file)):
        named(name, path)
    found = protocols.network(protocols.ADM, "inception", ("fid",))
    assert isinstance(found, InceptionFeatures)
    assert isinstance(protocols.network(protocols.CLEAN, "inception", ("fid",)), CleanFeatures)
    few = protocols.network(protocols.TORCH_FIDELITY, "inception", ("fid", "is", "kid"))
    assert few.vgg is None
    full = protocols.network(protocols.TORCH_FIDELITY, "inception", ("recall",))
    assert isinstance(full.vgg, FeatureExtractorVGG16)
    assert protocols.network(protocols.ADM, "digits", ("fid",)).name == "plain network of digits"
    with pytest.raises(BdmError, match="--inception-weights says nothing about the features 'digits'"):
        protocols.network(protocols.ADM, "digits", ("fid",), inception_file)
    assert found.name != few.name  # so that what one computes is not taken for the other's
