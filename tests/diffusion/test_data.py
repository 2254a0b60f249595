"""Training images: the embedded digits, and CIFAR-10 from files fabricated in its three forms."""

import builtins
import os
import pickle
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdm_cli import recipe
from bdm_cli.diffusion.data import batch_indices, labelled_images, reference_images, to_float, training_images
from bdm_cli.errors import BdmError

CLASSES = ["airplane", "cat", "truck"]
PER_CLASS = 4


# digits


def test_digits():
    images, labels = labelled_images("digits", "")
    assert (images.shape, images.dtype) == ((1797, 16, 16, 1), np.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), np.int64)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert images.min() == 0
    assert images.max() == 255
    assert 60 < images.mean() < 95
    again, _ = labelled_images("digits", "")
    assert np.array_equal(again, images)


def test_the_training_images_of_a_recipe():
    spec = recipe.load("digits-w1a4")
    assert training_images(spec).shape == (1797, 16, 16, 1)
    assert np.array_equal(reference_images(spec)[:], training_images(spec)[:])
    with pytest.raises(BdmError, match=r"digits: image 0 is 16x16 .*, 32x32 is wanted"):
        training_images(recipe.load("digits-w1a4", ["data.image_size=32", "unet.arguments.sample_size=32"]))


def test_only_two_data_sets_are_given_as_arrays():
    with pytest.raises(BdmError, match="cannot read the training images of 'bedrooms' as arrays"):
        labelled_images("bedrooms", "data/bedrooms")


def test_to_float():
    x = to_float(np.array([[[[0], [255]], [[51], [204]]]], dtype=np.uint8))
    assert (x.shape, x.dtype) == ((1, 1, 2, 2), torch.float32)
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 1.0, -0.6, 0.6]))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    assert torch.equal(to_float(pictures)[1, 2, :, :], torch.tensor(pictures[1, :, :, 2]).float() / 127.5 - 1)


# batches


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 10), epochs=st.integers(1, 3))
def test_batches_go_through_every_image_once_per_epoch(n: int, batch: int, seed: int, epochs: int):
    steps = -(-n * epochs // batch)
    seen = np.concatenate([batch_indices(n, batch, step, seed) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_are_pure_and_shuffled():
    later = batch_indices(1797, 64, 1000, 0)
    assert len(later) == 64
    np.random.seed(1)
    batch_indices(1797, 64, 3, 0)
    assert np.array_equal(batch_indices(1797, 64, 1000, 0), later)
    assert not np.array_equal(batch_indices(1797, 64, 1000, 1), later)
    first, second = (np.concatenate([batch_indices(100, 50, s, 0) for s in pair]) for pair in ((0, 1), (2, 3)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(100))


# CIFAR-10, official python version


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2's protocol 2 does, as in the official files."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        self.write(b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value)))
        self.write(value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write_batch(path: Path, content: object, official: bool) -> None:
    if not official:
        path.write_bytes(pickle.dumps(content, protocol=2))
        return
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """30 images and their labels."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8), random.integers(0, 10, 30)


@pytest.fixture
def batches(home: Path, pictures: tuple[np.ndarray, np.ndarray]) -> Path:
    """The folder data/cifar10/cifar-10-batches-py of five batches with six images each."""
    return write_batches(home / "data" / "cifar10" / "cifar-10-batches-py", pictures, official=True)


def write_batches(folder: Path, pictures: tuple[np.ndarray, np.ndarray], official: bool) -> Path:
    folder.mkdir(parents=True)
    images, labels = pictures
    for i in range(5):
        part = slice(6 * i, 6 * i + 6)
        content = {
            b"batch_label": f"training batch {i + 1} of 5".encode(),
            b"labels": labels[part].tolist(),
            b"data": images[part].transpose(0, 3, 1, 2).reshape(6, 3072),
            b"filenames": [f"image_{j}.png".encode() for j in range(6)],
        }
        write_batch(folder / f"data_batch_{i + 1}", content, official)
    write_batch(folder / "test_batch", {b"labels": [0], b"data": images[:1].reshape(1, 3072)}, official)
    return folder


@pytest.mark.parametrize("official", [True, False])
def test_official_batches(home: Path, pictures: tuple[np.ndarray, np.ndarray], official: bool):
    folder = write_batches(home / "data" / "cifar10" / "cifar-10-batches-py", pictures, official)
    for path in ("data/cifar10", "data/cifar10/cifar-10-batches-py", str(folder)):
        images, labels = labelled_images("cifar10", path)
        assert np.array_equal(images, pictures[0])
        assert np.array_equal(labels, pictures[1])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert training_images(recipe.load("cifar10")).shape == (30, 32, 32, 3)


class Calls:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_does_not(batches: Path, tmp_path: Path, protocol: int):
    trap = tmp_path / "trap"
    for call in (
        Calls(os.mkdir, str(trap)),
        Calls(os.system, f"mkdir '{trap}'"),
        Calls(builtins.eval, f"__import__('os').mkdir({str(trap)!r})"),
        Calls(Path.touch, Path(trap)),
    ):
        (batches / "data_batch_3").write_bytes(pickle.dumps({b"data": call, b"labels": []}, protocol=protocol))
        with pytest.raises(BdmError, match=r"cannot read .*data_batch_3 \(.* is not an array\)"):
            labelled_images("cifar10", "data/cifar10")
        assert not trap.exists()


def test_only_numpys_own_function_rebuilds_arrays(batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module of another name that ends alike is not even imported."""
    trap = tmp_path / "trap"
    (tmp_path / "mymultiarray.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n_reconstruct = dict\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (batches / "data_batch_1").write_bytes(b"cmymultiarray\n_reconstruct\n(tR.")
    with pytest.raises(BdmError, match="is not an array"):
        labelled_images("cifar10", "data/cifar10")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"\x80\x02}q\x00.",
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": ["a", "b"]}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps(None, protocol=2),
        b"cnomultiarray\n_reconstruct\n(tR.",
        b"cnumpy.core.nomultiarray\n_reconstruct\n(tR.",
        b"\x80\x02(K\x01K\x02d.",
        b"\x80\x02cnumpy\ndtype\nq\x00(U\x03zzztR.",
    ],
    ids=[
        "empty",
        "text",
        "no-keys",
        "no-labels",
        "odd-size",
        "odd-labels",
        "list",
        "none",
        "module",
        "numpy",
        "odd",
        "dtype",
    ],
)
def test_wrong_batches(batches: Path, content: bytes):
    (batches / "data_batch_2").write_bytes(content)
    with pytest.raises(BdmError, match=r"cannot read .*data_batch_2 \("):
        labelled_images("cifar10", "data/cifar10")


def test_as_many_labels_as_images(batches: Path):
    content = {b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2]}
    write_batch(batches / "data_batch_5", content, official=True)
    with pytest.raises(BdmError, match="data_batch_5"):
        labelled_images("cifar10", "data/cifar10")


def test_a_missing_and_a_cut_batch(batches: Path):
    whole = (batches / "data_batch_5").read_bytes()
    (batches / "data_batch_5").write_bytes(whole[:-200])
    with pytest.raises(BdmError, match=r"cannot read .*data_batch_5"):
        labelled_images("cifar10", "data/cifar10")
    (batches / "data_batch_5").unlink()
    with pytest.raises(BdmError, match=r"cannot read .*data_batch_5"):
        labelled_images("cifar10", "data/cifar10")


# CIFAR-10 as class folders and tars of them


@pytest.fixture
def folders(home: Path) -> Path:
    """data/cifar10/train/<class>/<n>.png and a test/ beside it, every image of one value."""
    top = home / "data" / "cifar10"
    for split, first in (("train", 10), ("test", 200)):
        for c, name in enumerate(CLASSES):
            (top / split / name).mkdir(parents=True)
            for i in range(PER_CLASS):
                value = first + 10 * c + i
                Image.new("RGB", (32, 32), (value, value, 255 - value)).save(top / split / name / f"{i:04d}.png")
    (top / "train" / "labels.txt").write_text("airplane")
    return top


def expected() -> tuple[np.ndarray, np.ndarray]:
    values = [10 + 10 * c + i for c in range(3) for i in range(PER_CLASS)]
    pixels = np.array([(v, v, 255 - v) for v in values], dtype=np.uint8)
    return np.broadcast_to(pixels[:, None, None], (12, 32, 32, 3)), np.repeat(np.arange(3), PER_CLASS)


def check(path: Path | str) -> None:
    images, labels = labelled_images("cifar10", str(path))
    assert np.array_equal(images, expected()[0])
    assert np.array_equal(labels, expected()[1])
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)


def packed(folders: Path, kind: str, top: str = "cifar10", reverse: bool = False) -> Path:
    path = folders.parent / f"cifar10.tar{kind and '.' + kind}"
    files = sorted((file for file in folders.rglob("*") if file.is_file()), reverse=reverse)
    with tarfile.open(path, f"w:{kind}") as tar:
        for file in files:
            tar.add(file, f"{top}/{file.relative_to(folders)}" if top else str(file.relative_to(folders)))
    return path


def test_class_folders(folders: Path):
    check("data/cifar10")
    check(folders / "train")


@pytest.mark.parametrize("kind", ["", "xz", "gz", "bz2"])
def test_a_tar_gives_the_arrays_of_its_folder(folders: Path, kind: str):
    path = packed(folders, kind)
    check(path)
    check(path)  # from the cache


@pytest.mark.parametrize("top", ["", ".", "a/b"])
def test_a_tar_with_files_in_another_order_or_depth(folders: Path, top: str):
    check(packed(folders, "", top, reverse=True))


def test_a_changed_tar_is_read_again(folders: Path):
    path = packed(folders, "xz")
    check(path)
    for image in (folders / "train" / "truck").iterdir():
        image.unlink()
    os.utime(packed(folders, "xz"), ns=(1, 1))
    images, labels = labelled_images("cifar10", str(path))
    assert (len(images), set(labels.tolist())) == (8, {0, 1})


def test_folders_without_a_train_folder_are_all_used(folders: Path):
    for split in ("train", "test"):
        (folders / split).rename(folders / f"{split}ing")
    images, labels = labelled_images("cifar10", "data/cifar10")
    assert len(images) == 24
    assert labels.tolist() == ([0] * 4 + [1] * 4 + [2] * 4) * 2


def test_grey_and_jpeg_images_become_rgb(folders: Path):
    Image.new("L", (32, 32), 77).save(folders / "train" / "cat" / "0004.png")
    Image.new("RGB", (32, 32), (50, 60, 70)).save(folders / "train" / "cat" / "0005.JPG", format="jpeg")
    images, _ = labelled_images("cifar10", "data/cifar10")
    assert images.shape == (14, 32, 32, 3)
    assert images[8].tolist() == [[[77] * 3] * 32] * 32


# what is wrong with the files


def cuts(path: Path) -> Iterator[int]:
    """Where to cut a tar short: everywhere in steps of half a block, up to the end of its last member."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    yield from range(256, last.offset_data + last.size, 256)


def test_a_tar_cut_short_anywhere_is_an_error(folders: Path, tmp_path: Path):
    path = packed(folders, "")
    whole = path.read_bytes()
    for cut in cuts(path):
        short = tmp_path / f"short{cut}.tar"
        short.write_bytes(whole[:cut])
        with pytest.raises(BdmError, match=f"{re.escape(str(short))} is not a whole tar file"):
            labelled_images("cifar10", str(short))


def test_a_tar_damaged_between_its_files_is_an_error(folders: Path):
    """tarfile itself takes a header that it cannot read for the end."""
    path = packed(folders, "")
    with tarfile.open(path) as tar:
        header = tar.getmembers()[9].offset
    content = bytearray(path.read_bytes())
    content[header : header + 512] = b"x" * 512
    path.write_bytes(content)
    with pytest.raises(BdmError, match=r"cifar10.tar is not a whole tar file"):
        labelled_images("cifar10", str(path))


@pytest.mark.parametrize("kind", ["xz", "gz", "bz2"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9, 0.98])
def test_a_compressed_tar_cut_short_is_an_error(folders: Path, kind: str, part: float):
    path = packed(folders, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(BdmError, match=r"cifar10.tar.* is not a whole tar file"):
        labelled_images("cifar10", str(path))


def test_a_file_that_is_no_tar(home: Path):
    (home / "cifar.tar").write_text("hello")
    with pytest.raises(BdmError, match=r"cifar.tar is not a whole tar file(.|\n)*give the folder of the official"):
        labelled_images("cifar10", "cifar.tar")


def test_nothing_there(home: Path):
    with pytest.raises(BdmError, match=r"there is nothing at .*data/cifar10(.|\n)*give the folder of the official"):
        labelled_images("cifar10", "data/cifar10")


def test_an_empty_folder_and_one_without_classes(home: Path):
    (home / "data").mkdir()
    with pytest.raises(BdmError, match=r"data holds no images\."):
        labelled_images("cifar10", "data")
    Image.new("RGB", (32, 32)).save(home / "data" / "0.png")
    with pytest.raises(BdmError, match=r"has no class folders: 0\.png lies in no class folder"):
        labelled_images("cifar10", "data")


def test_an_empty_tar(folders: Path):
    path = folders.parent / "empty.tar"
    with tarfile.open(path, "w"):
        pass
    with pytest.raises(BdmError, match=r"empty\.tar holds no images\."):
        labelled_images("cifar10", str(path))


def test_images_of_mixed_sizes(folders: Path):
    Image.new("RGB", (28, 32)).save(folders / "train" / "cat" / "0009.png")
    with pytest.raises(BdmError, match=r"cat/0009\.png is 28x32 .*, 32x32 is wanted"):
        labelled_images("cifar10", "data/cifar10")


def test_images_of_another_size_than_the_recipes(folders: Path):
    with pytest.raises(BdmError, match=r"0000\.png is 32x32 .*, 64x64 is wanted"):
        training_images(recipe.load("cifar10", ["data.image_size=64", "unet.arguments.sample_size=64"]))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_cannot_be_decoded(folders: Path, content: bytes):
    (folders / "train" / "cat" / "0002.png").write_bytes(content)
    for path in (folders, packed(folders, "xz")):
        with pytest.raises(BdmError, match=r"cannot decode .*train/cat/0002.png"):
            labelled_images("cifar10", str(path))


def test_an_image_that_was_cut_short(folders: Path):
    path = folders / "train" / "cat" / "0002.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BdmError, match=r"cannot decode .*train/cat/0002.png"):
        labelled_images("cifar10", "data/cifar10")
