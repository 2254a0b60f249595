"""The training and reference images of a recipe as uint8 [N, H, W, C], whatever form they lie in."""

import functools
import hashlib
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bdm_cli import output
from bdm_cli.errors import BdmError
from bdm_cli.images import files, readers
from bdm_cli.images.prepare import prepared
from bdm_cli.places import locate
from bdm_cli.recipe import Data, Preparation, Recipe, Unet

CIFAR_FORMS = (
    "give the folder of the official python version (cifar-10-batches-py with data_batch_1..5), a folder of class "
    "folders (train/airplane/*.png ...), or a tar of such a folder"
)
IN_MEMORY = 2**29
"""Bytes up to which prepared images are held in memory, and cached on disk, rather than decoded at every use."""
TEN = tuple("0123456789")
"""Names of the classes of digits, and of CIFAR-10's python version."""


class Images:
    """Images of a reader, prepared; small sets are decoded once, of large ones what is asked for, by threads.

    `images[a:b]` and `images[[3, 1, 4]]` are uint8 [n, H, W, C] with the crop in the middle.

    Raises: BdmError that names the file, here or on use, for an image that is corrupt, or of another size than
    how = "none" wants.
    """

    def __init__(
        self,
        reader: readers.Reader,
        how: Preparation,
        size: int,
        channels: int,
        *,
        recipe: str,
        crop: str = "centre",
        corrupt: dict[int, str] | None = None,
    ) -> None:
        """recipe: its name, for advice. crop: what `views` does. corrupt: numbers of images to leave out."""
        self.reader, self.how, self.crop, self.recipe = reader, how, crop, recipe
        self._numbers = np.setdiff1d(np.arange(len(reader)), list(corrupt or ()))
        if not len(self._numbers):
            raise BdmError(
                f"{reader.path}: none of its {len(reader)} images can be decoded.\n  copy or unpack it again"
            )
        self.shape = (len(self._numbers), size, size, channels)
        self._held: np.ndarray | None = None
        if isinstance(reader, readers.Arrays) and how == "none" and self.shape == reader.images.shape:
            self._held = reader.images
        elif np.prod(self.shape) <= IN_MEMORY and (crop == "centre" or how == "none"):
            self._held = self._all() if isinstance(reader, readers.Arrays) else self._cached()
        else:
            self[:1]  # so that a wrong preparation shows before the first batch

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, which: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = self._chosen(which)
        if self._held is not None:
            return self._held[chosen]
        return self._stacked(lambda k: self._prepared(chosen[k]), len(chosen))

    def views(self, which: slice | Sequence[int] | np.ndarray, random: np.random.Generator) -> np.ndarray:
        """As images[which], but with random crops if the recipe has them, a pure function of the generator's state."""
        if self.crop != "random":
            return self[which]
        chosen = self._chosen(which)
        seeds = random.integers(2**63, size=len(chosen))  # a generator per image: threads may finish in any order
        return self._stacked(lambda k: self._prepared(chosen[k], np.random.default_rng(seeds[k])), len(chosen))

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """The class of each image, int64 [N], or None if they have none."""
        return None if self.reader.labels is None else self.reader.labels[self._numbers]

    @functools.cached_property
    def captions(self) -> list[str] | None:
        """The text of each image, or None if they have none. Raises: BdmError if only some have one."""
        texts = self.reader.captions
        return None if texts is None else [texts[number] for number in self._numbers]

    def name(self, i: int) -> str:
        return self.reader.name(int(self._numbers[i]))

    def digest(self) -> str:
        """Identity of what images[...] gives: the files (names, sizes, times), the preparation, what is left out.

        Labels follow the names; captions and random crops are no part of it.
        """
        digest = hashlib.sha256(f"{self.reader.digest()} {self.how} {self.shape}".encode())
        if len(self) < len(self.reader):
            digest.update(self._numbers.data)
        return digest.hexdigest()

    def content(self) -> str:
        """As digest, but by the content of the files: the same wherever they lie, at the price of reading them once."""
        digest = hashlib.sha256(f"{readers.survey(self.reader).content} {self.how} {self.shape}".encode())
        digest.update(self._numbers.data)
        return digest.hexdigest()

    def names_digest(self) -> str:
        """Identity that survives copying and touching: preparation, names and order of the images."""
        digest = hashlib.sha256(f"{self.how} {self.shape}".encode())
        for i in range(len(self)):
            digest.update(f"{self.name(i)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _chosen(self, which: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 positions in 0..N-1."""
        if isinstance(which, slice):
            return np.arange(*which.indices(len(self)))
        chosen = np.asarray(which)
        if chosen.ndim != 1 or (chosen.dtype.kind not in "iu" and chosen.size):
            raise TypeError(f"images are taken by a slice or a list of numbers, not by {which!r}")
        if chosen.size and not -len(self) <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"there are {len(self)} images; asked for {chosen.min()}..{chosen.max()}")
        return chosen.astype(np.int64) % max(1, len(self))

    def _prepared(self, i: int, random: np.random.Generator | None = None) -> np.ndarray:
        reader, number = self.reader, int(self._numbers[i])
        try:
            image = reader.open(number)
        except readers.CorruptImage as error:
            raise BdmError(
                f"{reader.path}: cannot decode {reader.name(number)} ({error}).\n"
                f"  see whether there are more: bdm data check --recipe {self.recipe}\n"
                "  copy it again, or go on without such images: --set data.corrupt=skip"
            ) from None
        name = f"{reader.path}: {reader.name(number)}"
        return prepared(image, self.how, self.shape[1], self.shape[3], random, name)

    def _stacked(self, make: Callable[[int], np.ndarray], n: int) -> np.ndarray:
        return np.stack(readers.parallel(make, range(n))) if n else np.empty((0, *self.shape[1:]), np.uint8)

    def _all(self) -> np.ndarray:
        images = np.empty(self.shape, np.uint8)
        with output.progress(f"reading {self.reader.path.name}", len(self), "images") as advance:
            for start in range(0, len(self), readers.BLOCK):
                block = self[start : start + readers.BLOCK]
                images[start : start + len(block)] = block
                advance(len(block))
        return images

    def _cached(self) -> np.ndarray:
        return readers.cached(f"images-{self.digest()[:16]}", lambda: {"images": self._all()})["images"]


def training_images(recipe: Recipe) -> Images:
    """The recipe's training images, prepared by data.prepare, with the classes or captions that its network wants.

    Raises: BdmError if they cannot be read, or lack what the network is conditioned on.
    """
    images = _images(recipe, recipe.data.prepare, recipe.data.crop)
    require_condition(images, recipe.unet)
    return images


def reference_images(recipe: Recipe) -> Images:
    """What samples are compared with: all the training images (BinaryDM, App. B.1), prepared by evaluate.prepare.

    Raises: BdmError if they cannot be read.
    """
    return _images(recipe, recipe.evaluate.prepare, "centre")


def _images(recipe: Recipe, how: Preparation, crop: str) -> Images:
    data = recipe.data
    reader = find(data)
    corrupt = readers.survey(reader).corrupt if data.corrupt == "skip" else {}
    for number in list(corrupt)[: readers.NAMED]:
        output.say(f"left out, cannot be decoded: {reader.path / reader.name(number)} ({corrupt[number]})")
    if corrupt:
        more = f"; {len(corrupt) - readers.NAMED} more are not named" if len(corrupt) > readers.NAMED else ""
        output.say(f"{len(corrupt)} of {len(reader)} images of {reader.path} are left out{more}")
    return Images(reader, how, data.image_size, data.channels, recipe=recipe.name, crop=crop, corrupt=corrupt)


def require_condition(images: Images, unet: Unet) -> None:
    """Raises: BdmError if the images have not the classes that the network is conditioned on, or captions for a part.

    Without any captions a text-conditional network is told the empty text, and a warning says so.
    """
    path, known = images.reader.path, unet.n_classes - 1
    if unet.condition == "text" and images.captions is None:
        output.say(
            f"warning: the network '{unet.name}' is told captions, and the images of {path} have none: each gets the "
            "empty text. Captions are metadata.csv or metadata.jsonl with file_name and text, or <name>.txt beside "
            "<name>.png"
        )
    if unet.condition != "classes":
        return
    if images.labels is None:
        raise BdmError(
            f"the network '{unet.name}' is told classes, and the images of {path} have none "
            f"({images.reader.unlabelled}).\n"
            "  allowed: one folder per class (n01440764/*.JPEG ...), whose sorted names are the classes 0, 1, ..."
        )
    found = images.reader.classes
    if len(found) > known:
        raise BdmError(
            f"{path} has {len(found)} class folders ({', '.join(found[:3])} ...), the network '{unet.name}' knows "
            f"{known} classes.\n  remove or merge folders, or set unet.n_classes to one more than the classes"
        )
    if len(found) < known:
        output.say(
            f"warning: {path} has {len(found)} class folders and the network '{unet.name}' knows {known} classes; the "
            f"sorted folders become the classes 0 to {len(found) - 1}"
        )


def find(data: Data) -> readers.Reader:
    """The images of a recipe's data set, undecoded. Raises: BdmError if there are none, or only a part."""
    if data.dataset == "digits":
        return _digits()
    allowed = CIFAR_FORMS if data.dataset == "cifar10" else readers.ALLOWED
    if data.get_it:
        allowed += f"\n  get it: {data.get_it}"
    if not data.path:
        raise BdmError(f"data.path is empty: where are the images of '{data.dataset}'?\n  {allowed}")
    path = locate(data.path)
    if data.dataset == "cifar10":
        batches = next((p for p in (path, path / "cifar-10-batches-py") if (p / "data_batch_1").exists()), None)
        if batches is not None:
            return _python_batches(batches)
    return files.find(path, allowed)


def labelled_images(dataset: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Training images uint8 [N, H, W, C] and class labels int64 [N] of 'digits' or 'cifar10', as they are.

    Raises: BdmError for another data set, or if the files at `path` cannot be read.
    """
    shapes = {"digits": (16, 1), "cifar10": (32, 3)}
    if dataset not in shapes:
        raise BdmError(
            f"cannot read the training images of '{dataset}' as arrays with labels.\n  allowed: {', '.join(shapes)}"
        )
    size, channels = shapes[dataset]
    reader = find(Data(dataset=dataset, path=path, image_size=size, channels=channels))
    if reader.labels is None:
        raise BdmError(f"{reader.path} has no class folders: {reader.unlabelled}.\n  {CIFAR_FORMS}")
    return Images(reader, "none", size, channels, recipe=dataset)[:], reader.labels


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] in 0..255 to float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_indices(n_images: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Which images make the batch of a step: epochs of shuffled images, a pure function of (seed, step).

    So a resumed training sees the batches that an uninterrupted one would.
    """
    positions = range(step * batch, (step + 1) * batch)
    return np.array([_epoch(n_images, seed, p // n_images)[p % n_images] for p in positions])


@functools.lru_cache(maxsize=2)
def _epoch(n_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch; kept, since shuffling three million numbers takes longer than a training step."""
    return np.random.default_rng([seed, epoch]).permutation(n_images)


def _digits() -> readers.Arrays:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, resized to 16x16 (bicubic)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in small]
    return readers.Arrays(Path("digits"), np.stack(large)[..., None], digits.target.astype(np.int64), TEN)


class _ArraysOnly(pickle.Unpickler):
    """Reads the official CIFAR-10 batches, which are pickles of arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("numpy.core", "numpy._core")
        allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        if (module, name) in allowed | {("numpy._core.multiarray", "_reconstruct")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _python_batches(path: Path) -> readers.Arrays:
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
    return readers.Arrays(path, np.concatenate(pixels).transpose(0, 2, 3, 1), np.concatenate(labels), TEN)
