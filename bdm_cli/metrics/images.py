"""Sets of images from files: ADM-style npz (`arr_0`, uint8, NHWC) or a folder of PNG or JPEG."""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from bdm_cli.errors import BdmError

SUFFIXES = (".png", ".jpg", ".jpeg")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
ALLOWED = "an npz with arr_0 (uint8, [N, H, W, 1 or 3]) or a folder of png or jpg, all of one size"


class ImageFolder:
    """The images below a folder in the order of their paths; a slice is decoded when it is asked for.

    Raises: BdmError if there is none, if they differ in size or mode, or if one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise BdmError(f"no images below {folder}.\n  allowed: {ALLOWED}")
        self.size, self.mode = first = self._header(self.paths[0])
        for path in self.paths[1:]:
            if (found := self._header(path)) != first:
                given, wanted = (f"{size[0]}x{size[1]} {mode}" for size, mode in (found, first))
                raise BdmError(
                    f"{path} is {given}, {self.paths[0]} is {wanted}.\n"
                    "  allowed: images of one size and mode; crop and convert them first"
                )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), self.size[1], self.size[0], {"L": 1, "RGB": 3}[self.mode]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.stack([self._decoded(path) for path in self.paths[index]]).reshape(-1, *self.shape[1:])

    def digest(self) -> str:
        """SHA-256 of the files."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    @staticmethod
    def _header(path: Path) -> tuple[tuple[int, int], str]:
        try:
            with Image.open(path) as image:
                size, mode = image.size, image.mode
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise BdmError(f"cannot read the image {path} ({error}).\n  replace or remove it") from None
        if mode not in ("L", "RGB"):
            raise BdmError(f"{path} has mode {mode}.\n  allowed: 8-bit gray (L) and RGB; convert it first")
        return size, mode

    @staticmethod
    def _decoded(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.asarray(image)
        except (OSError, SyntaxError) as error:  # PIL reports broken PNG chunks as SyntaxError
            raise BdmError(f"cannot read the image {path} ({error}).\n  replace or remove it") from None


class Pixels(Protocol):
    """Images uint8 [N, H, W, C] that are decoded when a slice is asked for."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: slice) -> np.ndarray: ...
    def digest(self) -> str:
        """Identity of their content."""


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, H, W, C], and the statistics that their file carries, if any (mu, sigma, mu_s, sigma_s)."""

    source: str
    pixels: np.ndarray | Pixels
    stored: Mapping[str, np.ndarray] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of the shape, the pixels (or their own digest) and the stored statistics."""
        digest = hashlib.sha256(str(self.pixels.shape).encode())
        if isinstance(self.pixels, np.ndarray):
            digest.update(np.ascontiguousarray(self.pixels).data)
        else:
            digest.update(self.pixels.digest().encode())
        for name in STATISTICS:
            if name in self.stored:
                digest.update(np.ascontiguousarray(self.stored[name]).data)
        return digest.hexdigest()


def load(path: Path) -> ImageSet:
    """The images of an npz file or a folder. Raises: BdmError for anything else, or for broken files."""
    if path.is_dir():
        return ImageSet(str(path), ImageFolder(path))
    if not path.exists():
        raise BdmError(f"there are no images at {path}.\n  allowed: {ALLOWED}\n  `bdm sample` makes them")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise BdmError(f"{path} is not an npz file but a single array.\n  allowed: {ALLOWED}")
        with file:
            if "arr_0" not in file:
                names = ", ".join(file.files) or "(nothing)"
                raise BdmError(f"{path} has no arr_0; it holds: {names}.\n  allowed: {ALLOWED}")
            pixels = file["arr_0"]
            stored = {name: file[name] for name in STATISTICS if name in file} if "mu" in file else {}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BdmError(f"cannot read {path} as an npz file ({error}).\n  allowed: {ALLOWED}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.size:
        raise BdmError(f"arr_0 of {path} is {pixels.dtype} {list(pixels.shape)}.\n  allowed: {ALLOWED}")
    _check_stored(path, stored)
    return ImageSet(str(path), pixels, stored)


def _check_stored(path: Path, stored: Mapping[str, np.ndarray]) -> None:
    """ADM reads mu_s and sigma_s as soon as there is a mu."""
    if not stored:
        return
    shapes = {name: stored[name].shape for name in STATISTICS if name in stored}
    pairs = [(shapes.get(mu), shapes.get(sigma)) for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s"))]
    if not all(mu and sigma and len(mu) == 1 and sigma == mu * 2 for mu, sigma in pairs):
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise BdmError(
            f"{path} carries incomplete statistics: {given}.\n"
            "  allowed: mu [D], sigma [D, D], mu_s [S], sigma_s [S, S] together, or none of them"
        )
