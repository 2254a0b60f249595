"""Images as uint8 [N, H, W, C], from the embedded digits, CIFAR-10 in three forms, or (later) folders."""

import hashlib
import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bdm_cli import output, runs
from bdm_cli.errors import BdmError
from bdm_cli.inputs import locate
from bdm_cli.recipe import Recipe

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
CIFAR_FORMS = (
    "give the folder of the official python version (cifar-10-batches-py with data_batch_1..5), a folder of class "
    "folders (train/airplane/*.png ...), or a tar of such a folder"
)


def training_images(recipe: Recipe) -> np.ndarray:
    """The recipe's training images, [N, image_size, image_size, channels]. Raises: BdmError if they cannot be read."""
    images, _ = labelled_images(recipe.data.dataset, recipe.data.path)
    wanted = (recipe.data.image_size, recipe.data.image_size, recipe.data.channels)
    if images.shape[1:] != wanted:
        raise BdmError(
            f"the images of {recipe.data.path or recipe.data.dataset} are {images.shape[1:]} (height, width, "
            f"channels), recipe '{recipe.name}' wants {wanted}.\n  {CIFAR_FORMS}"
        )
    return images


reference_images = training_images
"""What samples are compared with: the training images as they are (BinaryDM, App. B.1: all the data)."""


def labelled_images(dataset: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Training images uint8 [N, H, W, C] and class labels int64 [N] of 'digits' or 'cifar10'.

    Raises: BdmError for another data set, or if the files at `path` cannot be read.
    """
    if dataset == "digits":
        return _digits()
    if dataset == "cifar10":
        return _cifar10(locate(path))
    raise BdmError(
        f"this version cannot read the training images of '{dataset}'.\n"
        "  it reads: digits (embedded), cifar10. --rehearse runs the other networks on random latents"
    )


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] in 0..255 to float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_indices(n_images: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Which images make the batch of a step: epochs of shuffled images, a pure function of (seed, step).

    So a resumed training sees the batches that an uninterrupted one would.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    order = {
        int(epoch): np.random.default_rng([seed, int(epoch)]).permutation(n_images)
        for epoch in np.unique(positions // n_images)
    }
    return np.array([order[int(p // n_images)][p % n_images] for p in positions])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, resized to 16x16 (bicubic)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in small]
    return np.stack(large)[..., None], digits.target.astype(np.int64)


def _cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise BdmError(f"there is nothing at {path}.\n  {CIFAR_FORMS}")
    batches = next((p for p in (path, path / "cifar-10-batches-py") if (p / "data_batch_1").exists()), None)
    if batches is not None:
        return _python_batches(batches)
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = runs.cache_dir() / f"images-{key}.npz"
    if path.is_file() and cache.exists():  # decoding 50,000 files from a tar takes a minute
        with np.load(cache) as arrays:
            return arrays["images"], arrays["labels"]
    files = _tar_files(path) if path.is_file() else _folder_files(path)
    images, labels = _class_folders(files, path)
    if path.is_file():
        runs.write_whole(cache, lambda temporary: np.savez(temporary, images=images, labels=labels))
    return images, labels


def _class_folders(files: Iterator[tuple[str, object]], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode (relative name, file) pairs .../class/image; only those below train/ if there is such a folder."""
    found = []
    with output.progress(f"reading {path.name}", 50_000, "images") as advance:
        for name, file in files:
            parts = Path(name).parts
            if len(parts) < 2 or parts[-1].startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            try:
                with Image.open(file) as image:
                    found.append((parts[:-2], parts[-2], name, np.asarray(image.convert("RGB"))))
            except (UnidentifiedImageError, OSError) as error:
                raise BdmError(f"{path}: cannot decode {name} ({error}).\n  copy the images again") from None
            advance()
    if any("train" in above for above, *_ in found):
        found = [entry for entry in found if "train" in entry[0]]
    if not found:
        raise BdmError(f"{path} holds no images in class folders.\n  {CIFAR_FORMS}")
    if len({image.shape for *_, image in found}) > 1:
        sizes = sorted({image.shape[:2] for *_, image in found})
        raise BdmError(f"{path}: images of different sizes {sizes[:4]}.\n  {CIFAR_FORMS}")
    found.sort(key=lambda entry: entry[2])
    classes = sorted({name for _, name, *_ in found})
    labels = np.array([classes.index(name) for _, name, *_ in found], dtype=np.int64)
    return np.stack([image for *_, image in found]), labels


def _folder_files(path: Path) -> Iterator[tuple[str, object]]:
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield str(file.relative_to(path)), file


def _tar_files(path: Path) -> Iterator[tuple[str, io.BytesIO]]:
    """The files of a tar, whole. Raises: BdmError if the tar is damaged or cut short."""
    members = _tar_members(path)
    while True:
        try:
            entry = next(members, None)
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            raise BdmError(f"{path} is not a whole tar file ({error}).\n  {CIFAR_FORMS}") from None
        if entry is None:
            return
        yield entry


def _tar_members(path: Path) -> Iterator[tuple[str, io.BytesIO]]:
    """tarfile takes a header that it cannot read for the end; the true end is a block of zeros."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, io.BytesIO(tar.extractfile(member).read())
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends in the middle")
        while tar.fileobj.read(2**20):  # to the end, where a compressed stream carries its checksum
            pass


class _ArraysOnly(pickle.Unpickler):
    """Reads the official CIFAR-10 batches, which are pickles of arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("numpy.core", "numpy._core")
        allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        if (module, name) in allowed | {("numpy._core.multiarray", "_reconstruct")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _python_batches(path: Path) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = [], []
    for number in range(1, 6):
        file = path / f"data_batch_{number}"
        try:
            with open(file, "rb") as stream:
                batch = _ArraysOnly(stream, encoding="bytes").load()
            pixels.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch[b"labels"], dtype=np.int64))
            if len(pixels[-1]) != len(labels[-1]):
                raise ValueError(f"{len(pixels[-1])} images, {len(labels[-1])} labels")
        except (OSError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise BdmError(f"cannot read {file} ({error}).\n  {CIFAR_FORMS}") from None
    return np.concatenate(pixels).transpose(0, 2, 3, 1), np.concatenate(labels)
