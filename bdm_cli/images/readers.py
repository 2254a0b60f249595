"""Images by number, decoded when asked for, wherever they lie; and what is decoded once and cached."""

import functools
import hashlib
import io
import json
import os
import struct
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from bdm_cli import output, runs
from bdm_cli.errors import BdmError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What is read, whatever the suffix says (one file of ImageNet is a PNG called .JPEG)."""

ALLOWED = (
    "give a folder of images (png, jpg, jpeg, webp, bmp; the folders in it are classes), a tar of such a folder, or an "
    "LSUN lmdb (the folder with data.mdb)"
)
WORKERS = min(16, os.cpu_count() or 1)
NAMED = 10
"""How many faulty images a message names."""
BLOCK = 1024
"""How many images are handed to the threads at a time."""
T = TypeVar("T")


class CorruptImage(ValueError):  # noqa: N818
    """An image that cannot be decoded; the text is the reason."""


class Reader(ABC):
    """Images by number.

    path: where they lie. labels: class of each image int64 [N], or None; then `unlabelled` says why there are none.
    classes: the names of the classes 0, 1, ... left_out: images that are there and not read (beside train/).
    """

    kind: str
    path: Path
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    unlabelled: str = ""
    left_out: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """The image's name below path."""

    @abstractmethod
    def content(self, i: int) -> bytes:
        """The image's file (of Arrays its pixels). Raises: BdmError if it cannot be read."""

    def open(self, i: int) -> Image.Image:
        """The decoded image. Raises: CorruptImage; BdmError if its bytes cannot be read."""
        return decode(self.content(i))

    @abstractmethod
    def digest(self) -> str:
        """Identity of the images' content, the same wherever they lie. Captions are no part of it."""

    @property
    def captions(self) -> list[str] | None:
        """The text of each image, or None if there are none. Raises: BdmError if only some images have one."""
        return None


def decode(data: bytes) -> Image.Image:
    """The decoded image of a file's bytes.

    Raises: CorruptImage if it is empty, cut short, none of FORMATS, or has several frames.

    A PNG that lacks only bytes behind its pixels (its checksum) is whole to PIL.
    """
    if not data:
        raise CorruptImage("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise CorruptImage(f"{image.width}x{image.height} are more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        image.load()
        if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:  # a JPEG's further ones are previews
            raise CorruptImage(f"it is animated ({image.n_frames} frames)")
    except Image.UnidentifiedImageError:
        raise CorruptImage(f"it is no {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, LookupError, struct.error, Image.DecompressionBombError) as error:
        raise CorruptImage(str(error) or type(error).__name__) from None
    return image


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # decode refuses what PIL only warns of


def parallel(work: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
    """work(number) for each, in order, by threads (PIL sets the interpreter free while it decodes)."""
    return list(_threads(os.getpid()).map(work, numbers)) if len(numbers) > 1 else [work(number) for number in numbers]


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Those of this process: a fork inherits the pool, but not its threads."""
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="decode")


class Survey(NamedTuple):
    """What every image is: width, height int32 [N] and mode [N]; of those that are corrupt (0, 0, ''), the reason.

    content: SHA-256 of all files, in order, whatever their names and times.
    """

    width: np.ndarray
    height: np.ndarray
    mode: np.ndarray
    corrupt: dict[int, str]
    content: str


def survey(reader: Reader) -> Survey:
    """Every image read and decoded once; the result is cached by the reader's digest.

    Raises: BdmError if one cannot be read.
    """
    found = cached(f"seen-{reader.digest()[:16]}", lambda: _surveyed(reader))
    corrupt = {int(i): reason for i, reason in json.loads(found["corrupt"].tobytes()).items()}
    content = found["content"].tobytes().hex()
    return Survey(found["width"], found["height"], found["mode"], corrupt, content)


def _surveyed(reader: Reader) -> dict[str, np.ndarray]:
    def look(i: int) -> tuple[int, int, str, str, bytes]:
        content = hashlib.sha256(reader.content(i)).digest()
        try:
            image = reader.open(i)
        except CorruptImage as error:
            return 0, 0, "", str(error), content
        return *image.size, image.mode, "", content

    n, corrupt, contents = len(reader), {}, hashlib.sha256()
    width, height, mode = np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, "U6")
    with output.progress(f"checking {reader.path.name}", n, "images") as advance:
        for start in range(0, n, BLOCK):
            numbers = range(start, min(start + BLOCK, n))
            for i, (*size, name, reason, content) in zip(numbers, parallel(look, numbers), strict=True):
                (width[i], height[i]), mode[i] = size, name
                contents.update(content)
                if reason:
                    corrupt[i] = reason
            advance(len(numbers))
    return {"width": width, "height": height, "mode": mode, "corrupt": as_json(corrupt)} | {
        "content": np.frombuffer(contents.digest(), np.uint8)
    }


def cached(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of runs/cache/<name>.npz; made and written if there is no such file, or a damaged one."""
    path = runs.cache_dir() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        arrays = make()
        runs.write_whole(path, lambda temporary: np.savez(temporary, **arrays))
        return arrays


def as_json(content: object) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


class Arrays(Reader):
    """Images that are in memory: uint8 [N, H, W, C]."""

    kind = "arrays"

    def __init__(self, path: Path, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        self.path, self.images, self.labels, self.classes = path, images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"image {i}"

    def content(self, i: int) -> bytes:
        return self.images[i].tobytes()

    def open(self, i: int) -> Image.Image:
        image = self.images[i]
        return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)

    def digest(self) -> str:
        return hashlib.sha256(str(self.images.shape).encode() + np.ascontiguousarray(self.images).data).hexdigest()


def stamp(path: Path) -> str:
    """Identity of a large file: size, time, and its ends (archives may come with a time of 0)."""
    stat, part = path.stat(), 2**16
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with open(path, "rb") as file:
        digest.update(file.read(part))
        file.seek(max(0, stat.st_size - part))
        digest.update(file.read(part))
    return digest.hexdigest()


def unreadable(path: Path, error: OSError) -> BdmError:
    return BdmError(
        f"cannot read {path} ({error.strerror or error}).\n  mend its permissions or link, or copy it again"
    )
