"""npz files and folders of images: what is read, and what is refused with which words."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from bdm_cli.errors import BdmError
from bdm_cli.metrics import images

RGB = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


def write_folder(folder, pixels, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for i, each in enumerate(pixels):
        Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each).save(folder / f"{i:04d}{suffix}")


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_adm_style_npz(tmp_path, writer):
    writer(tmp_path / "a.npz", RGB, np.arange(5))
    found = images.load(tmp_path / "a.npz")
    assert np.array_equal(found.pixels, RGB)
    assert found.stored == {}


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_in_order_of_names(tmp_path, channels):
    write_folder(tmp_path / "a", RGB[..., :channels])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    found = images.load(tmp_path / "a").pixels
    assert found.shape == (5, 8, 6, channels)
    assert np.array_equal(found[0:3], RGB[:3, ..., :channels])
    assert np.array_equal(found[3:9], RGB[3:, ..., :channels])


def test_jpeg_is_read(tmp_path):
    write_folder(tmp_path / "a", RGB, ".jpg")
    assert images.load(tmp_path / "a").pixels[0:5].shape == RGB.shape


def test_digest_follows_pixels_and_statistics(tmp_path):
    stored = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "a.npz", RGB)
    np.savez(tmp_path / "b.npz", RGB, **stored)
    np.savez(tmp_path / "c.npz", RGB, **stored | {"mu": np.ones(2)})
    write_folder(tmp_path / "d", RGB)
    write_folder(tmp_path / "e", RGB[::-1])
    digests = [images.load(tmp_path / name).digest() for name in ("a.npz", "b.npz", "c.npz", "d", "e", "a.npz", "d")]
    assert len(set(digests[:5])) == 5
    assert digests[5:] == [digests[0], digests[3]]
    assert set(images.load(tmp_path / "b.npz").stored) == set(stored)


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def empty_zip() -> bytes:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return file.getvalue()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz(images=RGB), "has no arr_0; it holds: images"),
        (empty_zip(), r"has no arr_0; it holds: \(nothing\)"),
        (npz(arr_0=RGB.astype(np.float32)), r"is float32 \[5, 8, 6, 3\]"),
        (npz(arr_0=RGB.transpose(0, 3, 1, 2)), r"is uint8 \[5, 3, 8, 6\]"),
        (npz(arr_0=RGB[0]), r"is uint8 \[8, 6, 3\]"),
        (npz(arr_0=RGB[:0]), r"is uint8 \[0, 8, 6, 3\]"),
        (npz(arr_0=np.array([None])), "Object arrays cannot be loaded"),
        (npz(arr_0=RGB)[:300], "cannot read"),
        (flipped(npz(arr_0=RGB)), "cannot read"),
        (npy(RGB), "is not an npz file"),
        (b"hello", "cannot read"),
        (b"", "cannot read"),
        (npz(arr_0=RGB, mu=np.zeros(2), sigma=np.eye(2)), r"incomplete statistics: mu \[2\], sigma \[2, 2\]"),
        (npz(arr_0=RGB, mu=np.zeros(2), sigma=np.eye(3), mu_s=np.zeros(1), sigma_s=np.eye(1)), "incomplete statistics"),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(BdmError, match=message) as error:
        images.load(path)
    assert str(path) in str(error.value)
    assert "allowed" in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(BdmError, match="there are no images at"):
        images.load(tmp_path / "a.npz")


def test_empty_folder(tmp_path):
    with pytest.raises(BdmError, match="no images below"):
        images.load(tmp_path)


def test_folder_of_different_sizes_or_modes(tmp_path):
    write_folder(tmp_path / "a", RGB)
    Image.fromarray(RGB[0, :4]).save(tmp_path / "a" / "0009.png")
    with pytest.raises(BdmError, match=r"0009\.png is 6x4 RGB, .*0000\.png is 6x8 RGB"):
        images.load(tmp_path / "a")
    Image.fromarray(RGB[0, ..., 0]).save(tmp_path / "a" / "0009.png")
    with pytest.raises(BdmError, match=r"0009\.png is 6x8 L, .*0000\.png is 6x8 RGB"):
        images.load(tmp_path / "a")


def test_folder_with_another_mode(tmp_path):
    Image.new("RGBA", (6, 8)).save(tmp_path / "a.png")
    with pytest.raises(BdmError, match=r"has mode RGBA"):
        images.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 100])
def test_folder_with_a_broken_image(tmp_path, keep):
    write_folder(tmp_path, np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    whole = (tmp_path / "0001.png").read_bytes()
    (tmp_path / "0001.png").write_bytes(whole[:keep])
    with pytest.raises(BdmError, match=r"cannot read the image .*0001\.png"):
        images.load(tmp_path).pixels[0:2]
