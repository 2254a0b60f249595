"""What metrics ask of a feature network; and bdm's own ones, for where Inception is missing or out of place."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from bdm_cli import places, tensorfile
from bdm_cli.errors import BdmError

SPATIAL_CHANNELS = 7

Features = dict[str, Tensor]
"""Features of N images, float32, as far as a network has them: "pool" [N, D], "spatial" [N, S], "logits" [N, C] without
bias, "manifold" [N, M], for precision and recall where these do not use pool."""


class Network(Protocol):
    """What the metrics ask of a feature network (a torch module). name: part of the identity of what it computes."""

    name: str
    channels: int

    def extract(self, images: Tensor) -> Features:
        """Of uint8 images [N, C, H, W]."""

    def require(self, shape: tuple[int, int, int], source: str) -> None:
        """Raises: BdmError if images of that height, width and number of channels are not for this network."""


def first_channels(x: Tensor) -> Tensor:
    """ADM's spatial feature: the first 7 channels, [N, C, H, W] -> [N, H * W * 7] in NHWC order."""
    return x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


@dataclass(frozen=True)
class Shape:
    """What a FeatureNet is built from, and what it was trained on. body: see FeatureNet."""

    dataset: str
    channels: int
    size: int
    n_classes: int
    width: int
    body: Literal["plain", "residual"] = "plain"


def _plain(channels: int, width: int) -> list[nn.Module]:
    half = width // 2
    return [
        nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.GroupNorm(8, n_out), nn.ReLU())
        for n_in, n_out, stride in ((channels, half, 1), (half, half, 2), (half, width, 2), (width, width, 1))
    ]


def _convolved(n_in: int, n_out: int, halve: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
    return nn.Sequential(*layers, *[nn.MaxPool2d(2)] * halve)


class _Added(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _residual(channels: int, width: int) -> list[nn.Module]:
    first, second, third = width // 8, width // 4, width // 2
    return [
        nn.Sequential(_convolved(channels, first), _convolved(first, second, halve=True)),
        _Added(_convolved(second, second), _convolved(second, second)),
        _convolved(second, third, halve=True),
        nn.Sequential(_convolved(third, width, halve=True), _Added(_convolved(width, width), _convolved(width, width))),
    ]


_BODIES = {"plain": _plain, "residual": _residual}


class FeatureNet(nn.Module):
    """Small image classifier in Inception's part, for data sets on which Inception is missing or out of place.

    Four stages, then the mean over positions (pool) and logits = pool W^T without bias, as ADM takes them from
    Inception. spatial: the first 7 channels of the third stage's output, a quarter of the image's size.
    body "plain": each stage is conv3x3 - GroupNorm - ReLU; width / 2, width / 2, width, width channels.
    body "residual": conv3x3 - BatchNorm - ReLU with max pooling, width / 8 channels at first, twice as many after each
        of the three halvings; the second and the last stage add two convolutions to what they are given (a ResNet-9).

    Shapes: images uint8 [N, C, size, size]; pool [N, width]; spatial [N, (size / 4)^2 * 7].
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.stages = nn.ModuleList(_BODIES[shape.body](shape.channels, shape.width))
        self.head = nn.Linear(shape.width, shape.n_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, with gradients."""
        return self._features(images)["logits"]

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        return self._features(images)

    def _features(self, images: Tensor) -> Features:
        wanted = (self.shape.channels, self.shape.size, self.shape.size)
        if images.dtype != torch.uint8 or images.shape[1:] != wanted:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, not uint8 (N, *{wanted})")
        x = images.float() / 127.5 - 1
        if self.shape.body == "residual":  # where the order of the memory saves a quarter of the time
            x = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages[:3]:
            x = stage(x)
        pool = self.stages[3](x).mean((2, 3))
        return {"pool": pool, "spatial": first_channels(x), "logits": self.head(pool)}

    @property
    def name(self) -> str:
        return f"{self.shape.body} network of {self.shape.dataset}"

    @property
    def channels(self) -> int:
        return self.shape.channels

    def require(self, shape: tuple[int, int, int], source: str) -> None:
        """Raises: BdmError for images of another size, or in colour where the network is for grey ones."""
        size, channels = self.shape.size, self.shape.channels
        if shape[:2] != (size, size) or shape[2] > channels:
            raise BdmError(
                f"the features '{self.shape.dataset}' are for images [{size}, {size}, {channels}], "
                f"{source} has {list(shape)} (height, width, channels).\n"
                "  choose other features: digits, cifar10, inception (--features, or evaluate.features)"
            )

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


def digits() -> FeatureNet:
    return FeatureNet.load(places.locate("package:digits-features.safetensors"))


def cifar10() -> FeatureNet:
    return FeatureNet.load(places.locate("package:cifar10-features.safetensors"))
