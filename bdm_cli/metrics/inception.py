"""Inception-v3 as ADM, torch-fidelity and clean-fid use it (one network of 2015), and where its weights come from."""

import hashlib
import os
import pickle
import socket
import tempfile
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cleanfid.downloads_helper import inception_url as CLEAN_URL
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, BasicConv2d, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

from bdm_cli import output
from bdm_cli.errors import BdmError
from bdm_cli.metrics.features import Features, first_channels

LONGEST = 400
"""Characters of a library's own message that are passed on."""
PATIENCE_S = 30
"""How long a server may keep silent."""


@dataclass(frozen=True)
class Weights:
    """A published file: what it is, its address, SHA-256 (or its beginning), and the variable that may name it.

    folder: where its library keeps it; '' = torch hub's folder. option: whether --inception-weights may name it too.
    instead: what needs no such file.
    """

    what: str
    url: str
    sha256: str
    variable: str
    folder: str = ""
    option: bool = True
    instead: str = "--features digits or cifar10, small networks of bdm's own, need no download"

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    def place(self) -> Path:
        """Where the library that uses it keeps it."""
        return Path(self.folder or Path(torch.hub.get_dir()) / "checkpoints") / self.file  # hub: below $TORCH_HOME

    def find(self, given: Path | None = None) -> Path | None:
        """`given`, else the file that the variable names, else the one in its place; None if that is not there yet.

        Raises: BdmError if a named file is missing, or if the file is another one.
        """
        named = given or (Path(os.environ[self.variable]) if os.environ.get(self.variable) else None)
        path = named or self.place()
        if not path.is_file():
            if named:
                raise BdmError(f"the weights of {self.what} are not at {path}.\n{self.advice()}")
            return None
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(self.sha256):
            raise BdmError(
                f"{path} has SHA-256 {found[:8]}..., not {self.sha256[:8]}...: another or a cut-off file.\n"
                f"{self.advice()}"
            )
        return path

    def get(self, given: Path | None = None) -> Path:
        """As find; what is not there is downloaded to its place, once.

        Raises: BdmError that names file, address, place and what needs no download, if that fails.
        """
        path = self.find(given)
        if path is not None:
            return path
        place, before = self.place(), socket.getdefaulttimeout()
        socket.setdefaulttimeout(PATIENCE_S)
        output.say(f"downloading {self.url} to {place}, once")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(place), self.sha256, progress=not output.quiet())
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise BdmError(
                f"the weights of {self.what} are not at {place}, and cannot be downloaded ({error}).\n{self.advice()}"
            ) from None
        finally:
            socket.setdefaulttimeout(before)
        return place

    def advice(self) -> str:
        option = "--inception-weights FILE or " if self.option else ""
        return (
            f"  file: {self.file}\n  get it: {self.url}\n"
            f"  put it at {self.place()}, or name it: {option}${self.variable}\n  {self.instead}"
        )


INCEPTION = Weights("Inception-v3", URL_INCEPTION_V3, "6726825d", "BDM_INCEPTION")
VGG = Weights(
    "VGG-16",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af",
    "BDM_VGG16",
    option=False,
    instead="only precision and recall need it: --metrics fid,is,kid does not",
)
CLEAN = Weights(
    "clean-fid's Inception-v3",
    CLEAN_URL,
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "BDM_CLEAN_INCEPTION",
    folder="/tmp",
    instead="--protocol adm --features digits or cifar10, small networks of bdm's own, need no download",
)


class _Published(nn.Module):
    """A network for colour images of any size. Grey ones are repeated to three channels."""

    channels = 3

    def require(self, shape: tuple[int, int, int], source: str) -> None:
        """Any size will do."""


class InceptionFeatures(_Published):
    """ADM's features by torch-fidelity's Inception-v3 (the same weights and the same in-network resize to 299).

    pool: 2048 (`pool_3`); spatial: ReLU output of Mixed_6d.branch1x1, first 7 channels, 17 * 17 * 7 = 2023
    (`mixed_6/conv`); logits: 1008, without bias. Normalisation is folded into the convolutions and the channels lie
    last in memory: twice as fast on a CPU, and equal to about 1e-7.

    Shapes: images uint8 [N, 3, H, W], any size.
    Raises: BdmError if the file holds other weights, or anything but tensors.
    """

    name = "Inception-v3 of ADM"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.network = _read(
            lambda: FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights)),
            weights,
            INCEPTION,
        )
        for module in self.network.modules():
            if isinstance(module, BasicConv2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        kept: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: kept.append(first_channels(y)))
        with hook:
            pool, logits = self.network(images)
        return {"pool": pool, "spatial": kept[0], "logits": logits}


class TorchFidelityFeatures(_Published):
    """torch-fidelity's features: pool and logits of InceptionFeatures; manifold, 4096, of VGG-16 (fc2 after ReLU)."""

    name = "Inception-v3 and VGG-16 of torch-fidelity"

    def __init__(self, weights: Path, vgg: Path | None) -> None:
        super().__init__()
        self.inception = InceptionFeatures(weights)
        self.vgg = (
            None if vgg is None else _read(lambda: FeatureExtractorVGG16("vgg", ["fc2_relu"], str(vgg)), vgg, VGG)
        )

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        found = self.inception.extract(images)
        del found["spatial"]  # of which torch-fidelity knows nothing
        return found if self.vgg is None else found | {"manifold": self.vgg(images)[0]}


class CleanFeatures(_Published):
    """clean-fid's features (arXiv:2104.11222): PIL's bicubic resize in float, per channel, then Inception-v3 (pool).

    Raises: BdmError if the file is not that TorchScript network.
    """

    name = "Inception-v3 of clean-fid"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.network = _read(lambda: _torchscript(weights), weights, CLEAN, check=False)  # its hash was: it is code
        self.resize = build_resizer("clean")

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        large = np.stack([self.resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()])
        return {"pool": self.network(torch.from_numpy(large).permute(0, 3, 1, 2).to(images.device))}


def write_random(path: Path) -> Path:
    """A file of Inception's layout with random weights, for measuring speed. Returns its path."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            """Keep the initial weights."""

    torch.save({}, path)  # read, and left unused
    torch.save(Untrained("untrained", ["2048"], str(path)).state_dict(), path)
    return path


def _torchscript(weights: Path) -> nn.Module:
    """clean-fid's network; it is read from a folder, under its own name."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(weights.resolve(), Path(folder) / CLEAN.file)
        return InceptionV3W(folder, download=False, resize_inside=False).eval().requires_grad_(False)


def _read(make, path: Path, weights: Weights, check: bool = True) -> nn.Module:
    try:
        if check:  # only tensors may reach torch-fidelity's unpickling
            torch.load(path, map_location="meta", weights_only=True)
        return make()
    except (OSError, EOFError, AttributeError, TypeError, pickle.UnpicklingError, RuntimeError) as error:
        why = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else f"{error}"[:LONGEST]
        what = f"cannot read {path} as the weights of {weights.what}: {why}"
        raise BdmError(f"{what}\n  get it: {weights.url}") from None
