"""From images to what the metrics compare: pooled, spatial and class features of a fixed network."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bdm_cli import places, runs, tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.metrics import FEATURES
from bdm_cli.registry import resolve

SPATIAL_CHANNELS = 7
BATCH = 64

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Features(NamedTuple):
    """Features of N images, float32 on the CPU: pool [N, D], spatial [N, S], logits [N, C] (without bias)."""

    pool: Tensor
    spatial: Tensor
    logits: Tensor


def _first_channels(x: Tensor) -> Tensor:
    """ADM's spatial feature: the first 7 channels, [N, C, H, W] -> [N, H * W * 7] in NHWC order."""
    return x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


@dataclass(frozen=True)
class Shape:
    """What a FeatureNet is built from, and what it was trained on."""

    dataset: str
    channels: int
    size: int
    n_classes: int
    width: int


class FeatureNet(nn.Module):
    """Small image classifier in Inception's part, for data sets on which Inception is missing or out of place.

    Four stages conv3x3 - GroupNorm - ReLU (width / 2, width / 2, width, width channels; the second and third halve the
    image), then the mean over positions (pool) and logits = pool W^T without bias, as ADM takes them from Inception.
    spatial: the first 7 channels of the third stage's output.

    Shapes: images uint8 [N, C, size, size]; pool [N, width]; spatial [N, (size / 4)^2 * 7].
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        half, width = shape.width // 2, shape.width
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.GroupNorm(8, n_out), nn.ReLU())
            for n_in, n_out, stride in (
                (shape.channels, half, 1),
                (half, half, 2),
                (half, width, 2),
                (width, width, 1),
            )
        )
        self.head = nn.Linear(width, shape.n_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, with gradients."""
        return self._features(images).logits

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        return self._features(images)

    def _features(self, images: Tensor) -> Features:
        wanted = (self.shape.channels, self.shape.size, self.shape.size)
        if images.dtype != torch.uint8 or images.shape[1:] != wanted:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, not uint8 (N, *{wanted})")
        x = images.float() / 127.5 - 1
        for stage in self.stages[:3]:
            x = stage(x)
        pool = self.stages[3](x).mean((2, 3))
        return Features(pool, _first_channels(x), self.head(pool))

    def save(self, path: Path, **measured: object) -> None:
        """Write the weights, with the shape and what was measured in the header."""
        header = {"feature_network": json.dumps(asdict(self.shape)), "measured": json.dumps(measured)}
        tensorfile.write(path, self.state_dict(), header)

    @classmethod
    def load(cls, path: Path) -> "FeatureNet":
        """Raises: BdmError if the file was not written by save, or not whole."""
        tensors, header = tensorfile.read(path)
        try:
            network = cls(Shape(**json.loads(header["feature_network"])))
            network.load_state_dict(tensors, strict=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BdmError(
                f"{path} is not a feature network that bdm wrote ({type(error).__name__}: {error}).\n"
                "  make it again: bdm features"
            ) from None
        return network.eval().requires_grad_(False)


class InceptionFeatures(nn.Module):
    """ADM's features by torch-fidelity's Inception-v3 (the same weights and the same in-network resize to 299).

    pool: 2048 (`pool_3`); spatial: ReLU output of Mixed_6d.branch1x1, first 7 channels, 17 * 17 * 7 = 2023
    (`mixed_6/conv`); logits: 1008, without bias. Gray images are repeated to three channels.

    Shapes: images uint8 [N, 1 or 3, H, W], any size.
    Raises: BdmError if the file holds other weights, or anything but tensors.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            torch.load(
                weights, map_location="meta", weights_only=True
            )  # only tensors may reach torch-fidelity's unpickling
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
        except (OSError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
            raise BdmError(
                f"cannot read {weights} as Inception's weights ({error}).\n  get it: {INCEPTION_URL}"
            ) from None

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        kept: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: kept.append(_first_channels(y)))
        with hook:
            pool, logits = self.network(images)
        return Features(pool, kept[0], logits)


def find_inception_weights() -> Path:
    """The Inception file at $BDM_INCEPTION, else in torch hub's checkpoint folder, with its hash checked.

    Raises: BdmError that says where to get it and where to put it.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE  # follows $TORCH_HOME
    given = os.environ.get("BDM_INCEPTION")
    path = Path(given) if given else hub
    advice = (
        f"  get it: {INCEPTION_URL}\n  put it at {hub}, or point BDM_INCEPTION to it\n"
        '  evaluate.features = "digits" needs no download, "cifar10" is trained by `bdm features`'
    )
    if not path.is_file():
        raise BdmError(f"the Inception weights are not at {path}.\n{advice}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(INCEPTION_SHA256):
        raise BdmError(
            f"{path} has SHA-256 {found[:8]}..., not {INCEPTION_SHA256}...: another or a cut-off file.\n{advice}"
        )
    return path


def digits() -> FeatureNet:
    return FeatureNet.load(places.locate("package:digits-features.safetensors"))


def trained(dataset: str) -> Path:
    """Where `bdm features` puts a feature network."""
    return runs.runs_dir() / "features" / f"{dataset}.safetensors"


def cifar10() -> FeatureNet:
    path = trained("cifar10")
    if not path.exists():
        raise BdmError(
            f"the CIFAR-10 feature network is not at {path}.\n"
            "  make it: bdm features --dataset cifar10 --path FOLDER (the CIFAR-10 images)\n"
            '  or set evaluate.features = "inception"'
        )
    return FeatureNet.load(path)


def inception() -> InceptionFeatures:
    return InceptionFeatures(find_inception_weights())


def load_features(name: str) -> FeatureNet | InceptionFeatures:
    """The feature network called `name` in FEATURES, on the CPU."""
    return resolve("feature network", name, FEATURES)()


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's state, whatever file it came from."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def extract(
    network: FeatureNet | InceptionFeatures,
    images: np.ndarray,
    batch: int = BATCH,
    advance: Callable[[int], object] = lambda n: None,
) -> Features:
    """Features of uint8 images [N, H, W, C] (an array, or anything whose slices are one), on the network's device.

    The batch bounds the memory and changes nothing but rounding. TF32 is off, so that a GPU agrees with a CPU.
    """
    device = next(network.parameters()).device
    parts = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + batch])).permute(0, 3, 1, 2)
            parts.append(Features(*(part.cpu() for part in network.extract(pixels.to(device)))))
            advance(len(pixels))
    return Features(*(torch.cat(part) for part in zip(*parts, strict=True)))
