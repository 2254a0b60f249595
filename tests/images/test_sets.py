"""Sets of images to score: npz files, folders, tars; what is read of them, what is said of them, what is refused."""

import io
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm_cli import runs
from bdm_cli.errors import BdmError
from bdm_cli.images import sets

RGB = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
WRITERS = [np.savez, np.savez_compressed]
STATISTICS = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def encoded(image: Image.Image, form: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def write_folder(folder: Path, pixels: np.ndarray, suffix: str = ".png") -> Path:
    folder.mkdir(exist_ok=True)
    for i, each in enumerate(pixels):
        picture(each).save(folder / f"{i:04d}{suffix}")
    return folder


def npz(writer: Callable = np.savez, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    writer(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def zipped(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """A zip file of members; `__` in a name stands for a dot."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return file.getvalue()


def refusal(path: Path, content: bytes | None = None) -> str:
    """What is said of a file that is refused."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BdmError) as error:
        sets.load(path)
    assert str(path) in str(error.value)
    return str(error.value)


# npz


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_as_adm_writes_it(tmp_path: Path, writer: Callable, channels: int):
    writer(tmp_path / "a.npz", RGB[..., :channels], np.arange(5))
    found = sets.load(tmp_path / "a.npz")
    assert found.pixels.shape == (5, 8, 6, channels)
    assert len(found.pixels) == 5
    assert found.pixels[0:5].dtype == np.uint8
    assert np.array_equal(found.pixels[0:5], RGB[..., :channels])
    assert found.stored == {}
    assert found.notes == ()
    assert found.source == str(tmp_path / "a.npz")


ORDERS = {
    "forward": [(0, 7), (7, 14), (14, 50)],
    "backward": [(40, 50), (20, 40), (0, 20)],
    "overlapping": [(0, 10), (5, 15), (5, 15), (14, 16), (0, 50)],
    "with gaps": [(3, 4), (30, 31), (49, 50), (10, 12)],
    "beyond the end": [(48, 60), (50, 60), (0, 1)],
    "nothing": [(4, 4), (0, 2), (2, 2), (2, 3)],
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("order", ORDERS)
def test_slices_of_an_npz_are_the_same_in_any_order(tmp_path: Path, writer: Callable, order: str):
    pixels = np.random.default_rng(1).integers(0, 256, (50, 8, 6, 3), dtype=np.uint8)
    writer(tmp_path / "a.npz", pixels, **STATISTICS)  # arrays before and behind the images
    found = sets.load(tmp_path / "a.npz").pixels
    for start, stop in ORDERS[order]:
        assert np.array_equal(found[start:stop], pixels[start:stop])


def test_other_steps_than_one_are_a_programming_mistake(tmp_path: Path):
    np.savez(tmp_path / "a.npz", RGB)
    with pytest.raises(ValueError, match="images are taken in order"):
        sets.load(tmp_path / "a.npz").pixels[::2]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_large_npz_is_never_held_whole(tmp_path: Path, writer: Callable):
    """200 MB of images; at most a few blocks of 16 MiB are held."""
    n, size = 4096, 128 * 128 * 3
    writer(tmp_path / "a.npz", np.broadcast_to(np.zeros(1, np.uint8), (n, 128, 128, 3)))
    assert ((tmp_path / "a.npz").stat().st_size > n * size) == (writer is np.savez)
    tracemalloc.start()
    try:
        found = sets.load(tmp_path / "a.npz").pixels
        found.content()
        for start in (0, 64, 4000, 1000):
            assert found[start : start + 64].shape == (64, 128, 128, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        (tmp_path / "a.npz").unlink()
    assert 64 * size < peak < 60e6


def test_the_content_of_an_npz_is_its_pixels(tmp_path: Path):
    """However it is compressed, whatever lies beside them, wherever and whenever it was written."""
    np.savez(tmp_path / "stored.npz", RGB)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=RGB, labels=np.arange(5), **STATISTICS)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "stored.npz", tmp_path / "elsewhere" / "copy.npz")
    os.utime(tmp_path / "elsewhere" / "copy.npz", ns=(1, 1))
    first = sets.load(tmp_path / "stored.npz").pixels.content()
    for name in ("compressed.npz", "elsewhere/copy.npz"):
        assert sets.load(tmp_path / name).pixels.content() == first
    os.utime(tmp_path / "stored.npz")
    assert sets.load(tmp_path / "stored.npz").pixels.content() == first
    changed = RGB.copy()
    changed[4, 7, 5, 2] ^= 1
    for i, other in enumerate((changed, RGB[::-1], RGB[:4], RGB.reshape(5, 6, 8, 3), RGB.reshape(15, 8, 6, 1)[:5])):
        np.savez(tmp_path / f"{i}.npz", np.ascontiguousarray(other))
        assert sets.load(tmp_path / f"{i}.npz").pixels.content() != first


def test_the_content_of_a_changed_file_is_not_that_of_before(tmp_path: Path):
    np.savez(tmp_path / "a.npz", RGB)
    before = sets.load(tmp_path / "a.npz").pixels.content()
    np.savez(tmp_path / "a.npz", 255 - RGB)
    os.utime(tmp_path / "a.npz", ns=(1, 1))
    assert sets.load(tmp_path / "a.npz").pixels.content() != before


def test_the_content_is_computed_once(tmp_path: Path):
    np.savez(tmp_path / "a.npz", RGB)
    first = sets.load(tmp_path / "a.npz").pixels.content()
    (cached,) = runs.cache_dir().glob("npz-*")
    written = cached.stat().st_mtime_ns
    assert sets.load(tmp_path / "a.npz").pixels.content() == first
    assert cached.stat().st_mtime_ns == written


def test_stored_statistics_are_read(tmp_path: Path):
    np.savez(tmp_path / "a.npz", RGB, **STATISTICS)
    found = sets.load(tmp_path / "a.npz").stored
    assert found.keys() == STATISTICS.keys()
    assert all(np.array_equal(found[name], STATISTICS[name]) for name in STATISTICS)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_damaged_byte_is_found_before_the_pixels_are_used(tmp_path: Path, writer: Callable):
    """Of the pixels: the file opens, and its checksum does not fit; or it cannot be unpacked."""
    pixels = np.random.default_rng(2).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    whole, path = npz(writer, arr_0=pixels), tmp_path / "a.npz"
    for at in (1000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        found = sets.load(path).pixels
        with pytest.raises(BdmError, match=r"cannot read .*a\.npz as an npz file"):
            found.content()
        assert not list(runs.cache_dir().glob("npz-*"))


def test_a_byte_that_was_damaged_afterwards_is_found_too(tmp_path: Path):
    """In a compressed file; the content was known, and the file has changed since."""
    path = tmp_path / "a.npz"
    pixels = np.random.default_rng(2).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    np.savez_compressed(path, pixels)
    found, whole = sets.load(path).pixels, path.read_bytes()
    found.content()
    path.write_bytes(whole[:9000] + b"\xff" * 40 + whole[9040:])
    with pytest.raises(BdmError, match=r"cannot read .*a\.npz as an npz file"):
        found[0:50]


@pytest.mark.parametrize("writer", WRITERS)
def test_an_npz_cut_short_anywhere_is_refused(tmp_path: Path, writer: Callable):
    whole = npz(writer, arr_0=RGB, **STATISTICS)
    for length in [0, 1, 4, 30, 100, 200, 500, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        assert "cannot read" in refusal(tmp_path / "a.npz", whole[:length])


FLOATS = RGB / np.float32(127.5) - 1
WITH_NAN = np.where(np.arange(6)[:, None] == 2, np.float32(np.nan), FLOATS)
REFUSED = {
    "no arr_0": (npz(images=RGB), "has no arr_0; it holds: images."),
    "nothing in it": (zipped(), "has no arr_0; it holds: (nothing)."),
    "floats": (npz(arr_0=FLOATS), "is float32 [5, 8, 6, 3], its first images from -1 to 1.\n"),
    "compressed floats": (npz(np.savez_compressed, arr_0=FLOATS), "its first images from -1 to 1.\n"),
    "doubles": (npz(arr_0=RGB / 255), "is float64 [5, 8, 6, 3], its first images from 0 to 1.\n"),
    "NaN": (npz(arr_0=WITH_NAN), "its first images from -1 to 1, 120 values NaN."),
    "only NaN": (npz(arr_0=np.full_like(FLOATS, np.nan)), "is float32 [5, 8, 6, 3], 720 values NaN."),
    "how floats become bytes": (npz(arr_0=FLOATS), "((x + 1) * 127.5).clip(0, 255).astype(np.uint8)"),
    "other whole numbers": (npz(arr_0=RGB.astype(np.int64)), "is int64 [5, 8, 6, 3]"),
    "channels first": (npz(arr_0=RGB.transpose(0, 3, 1, 2).copy()), "is uint8 [5, 3, 8, 6]"),
    "alpha": (npz(arr_0=np.zeros((5, 8, 6, 4), np.uint8)), "is uint8 [5, 8, 6, 4]"),
    "one image": (npz(arr_0=RGB[0]), "is uint8 [8, 6, 3]"),
    "one number": (npz(arr_0=np.uint8(3)), "is uint8 []"),
    "no images": (npz(arr_0=RGB[:0]), "is uint8 [0, 8, 6, 3]"),
    "objects": (npz(arr_0=np.array([None])), "is object [1]"),
    "pickled images": (npz(arr_0=RGB.astype(object)), "is object [5, 8, 6, 3]"),
    "Fortran order": (npz(arr_0=np.asfortranarray(RGB)), "are in Fortran order; save np.ascontiguousarray"),
    "no npy": (zipped(arr_0__npy=b"hello"), "cannot read"),
    "an npy cut off in its head": (zipped(arr_0__npy=npy(RGB)[:20]), "cannot read"),
    "text": (b"hello", "cannot read"),
    "empty": (b"", "cannot read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_npz_files_that_are_refused(tmp_path: Path, kind: str):
    content, message = REFUSED[kind]
    told = refusal(tmp_path / "a.npz", content)
    assert message in told
    assert "allowed: an npz with arr_0 (uint8, [N, H, W, 1 or 3])" in told


def test_an_npy_that_is_called_npz_is_refused(tmp_path: Path):
    assert "cannot read" in refusal(tmp_path / "a.npz", npy(RGB))


def test_an_npy_is_refused(tmp_path: Path):
    assert "allowed: an npz with arr_0" in refusal(tmp_path / "a.npy", npy(RGB))


def test_a_zip_whose_arr_0_is_no_npy_is_refused(tmp_path: Path):
    assert "cannot read" in refusal(tmp_path / "a.npz", zipped(arr_0=npy(RGB)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_npy_with_fewer_pixels_than_it_says_is_refused(tmp_path: Path, compression: int):
    lie = npy(RGB[:3]).replace(b"(3, 8, 6, 3)", b"(5, 8, 6, 3)")
    content = zipped(compression, arr_0__npy=lie, labels__npy=npy(np.arange(1000)))
    assert "cannot read" in refusal(tmp_path / "a.npz", content)


BAD_STATISTICS = {
    "only of pool": ({"mu_s": None, "sigma_s": None}, "incomplete statistics: mu [2], sigma [2, 2]."),
    "no covariance": ({"sigma": None}, "incomplete statistics: mu [2], mu_s [3], sigma_s [3, 3]."),
    "of other sizes": ({"sigma": np.eye(3)}, "incomplete statistics: mu [2], sigma [3, 3]"),
    "flat": ({"sigma_s": np.zeros(9)}, "incomplete statistics"),
    "numbers": ({"mu": np.float64(0)}, "incomplete statistics"),
    "NaN": ({"mu": np.array([0, np.nan])}, "mu of "),
    "infinite": ({"sigma_s": np.diag([1, np.inf, 1])}, "sigma_s of "),
    "whole numbers": ({"mu": np.array([0, 1])}, "is not finite numbers (int64)"),
    "objects": ({"mu": np.array([None, 1])}, "cannot read"),
}


@pytest.mark.parametrize("kind", BAD_STATISTICS)
def test_stored_statistics_that_are_refused(tmp_path: Path, kind: str):
    change, message = BAD_STATISTICS[kind]
    stored = {name: values for name, values in (STATISTICS | change).items() if values is not None}
    assert message in refusal(tmp_path / "a.npz", npz(arr_0=RGB, **stored))


def test_nothing_there(tmp_path: Path):
    assert "there are no images at" in refusal(tmp_path / "a.npz")


# folders and tars


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_in_order_of_names(tmp_path: Path, channels: int):
    write_folder(tmp_path / "a", RGB[::-1, ..., :channels])
    for i in range(5):  # the first becomes the last
        (tmp_path / "a" / f"{i:04d}.png").rename(tmp_path / "a" / f"b{4 - i}.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    found = sets.load(tmp_path / "a")
    assert found.pixels.shape == (5, 8, 6, channels)
    assert found.notes == ()
    assert np.array_equal(found.pixels[0:3], RGB[:3, ..., :channels])
    assert np.array_equal(found.pixels[3:9], RGB[3:, ..., :channels])
    assert found.pixels[5:9].shape == (0, 8, 6, channels)


@pytest.mark.parametrize("kind", ["", "gz"])
def test_a_tar_holds_the_images_of_its_folder(tmp_path: Path, kind: str):
    folder = write_folder(tmp_path / "a", RGB)
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as tar:
        tar.add(folder, "top")
    of_tar, of_folder = sets.load(tmp_path / "a.tar").pixels, sets.load(folder).pixels
    assert of_tar.shape == of_folder.shape == RGB.shape
    for start, stop in ((3, 5), (0, 4)):
        assert np.array_equal(of_tar[start:stop], RGB[start:stop])
        assert np.array_equal(of_folder[start:stop], RGB[start:stop])
    assert of_tar.content() == of_folder.content()


def test_the_content_of_a_folder_is_its_files(tmp_path: Path):
    folder = write_folder(tmp_path / "a", RGB)
    first = sets.load(folder).pixels.content()
    shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile)
    for file in (tmp_path / "b").iterdir():
        os.utime(file, ns=(7, 7))
    assert sets.load(tmp_path / "b").pixels.content() == first
    changed = RGB.copy()
    changed[2, 0, 0, 0] ^= 1
    assert sets.load(write_folder(tmp_path / "b", changed)).pixels.content() != first
    assert sets.load(write_folder(tmp_path / "c", RGB[::-1])).pixels.content() != first
    assert sets.load(write_folder(tmp_path / "d", RGB[:4])).pixels.content() != first


def test_images_need_not_be_square(tmp_path: Path):
    wide = np.random.default_rng(0).integers(0, 256, (4, 5, 31, 3), dtype=np.uint8)
    found = sets.load(write_folder(tmp_path / "a", wide)).pixels
    assert found.shape == (4, 5, 31, 3)
    assert np.array_equal(found[0:4], wide)


COLOUR = Image.new("RGB", (6, 8), (204, 102, 51))
DEEP = Image.fromarray(np.full((8, 6), 77 * 256 + 200, np.uint16))
ALPHA = "with alpha: alpha dropped"
LOSSY = "JPEG, whose losses move FID; png or npz keep every pixel"
KINDS = {
    "16-bit grey": (encoded(DEEP, "PNG"), 1, (77,), "16-bit grey: their upper 8 bits kept"),
    "CMYK": (
        encoded(Image.new("CMYK", (6, 8), (51, 153, 204, 0)), "JPEG", quality=100),
        3,
        (204, 102, 51),
        "CMYK: converted to RGB without a colour profile",
    ),
    "alpha": (
        encoded(Image.new("RGBA", (6, 8), (204, 102, 51, 0)), "PNG"),
        3,
        (204, 102, 51),
        ALPHA,
    ),
    "grey with alpha": (encoded(Image.new("LA", (6, 8), (77, 0)), "PNG"), 1, (77,), ALPHA),
    "palette": (encoded(COLOUR.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), 3, (204, 102, 51), None),
    "black and white": (encoded(Image.new("1", (6, 8), 1), "PNG"), 1, (255,), None),
    "JPEG": (
        encoded(COLOUR, "JPEG", quality=100),
        3,
        (204, 102, 51),
        "JPEG, whose losses move FID; png or npz keep every pixel",
    ),
    "webp": (encoded(COLOUR, "WEBP", lossless=True), 3, (204, 102, 51), None),
    "bmp": (encoded(COLOUR, "BMP"), 3, (204, 102, 51), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_images_than_8_bit_grey_and_rgb_are_taken_with_a_note(tmp_path: Path, kind: str):
    content, channels, expected, note = KINDS[kind]
    for i in range(3):
        (tmp_path / f"{i}.{'jpg' if kind == 'JPEG' else 'png'}").write_bytes(content)
    plain = np.full((8, 6, channels), 9, np.uint8)
    picture(plain).save(tmp_path / "9.png")
    found = sets.load(tmp_path)
    assert found.pixels.shape == (4, 8, 6, channels)
    assert abs(found.pixels[0:3].astype(int) - expected).max() <= 1
    assert np.array_equal(found.pixels[3:4][0], plain)
    told = [] if note is None else [f"{tmp_path}: 3 of 4 images are {note}"]
    assert list(found.notes) == told


def test_grey_images_among_coloured_ones_are_repeated_and_counted(tmp_path: Path):
    write_folder(tmp_path, RGB[:3])
    for i, image in enumerate([picture(RGB[3, ..., :1]), DEEP, Image.new("LA", (6, 8), (7, 0))]):
        image.save(tmp_path / f"grey{i}.png")
    found = sets.load(tmp_path)
    assert found.pixels.shape == (6, 8, 6, 3)
    assert np.array_equal(found.pixels[0:4], np.concatenate([RGB[:3], RGB[3:4, ..., :1].repeat(3, 3)]))
    assert np.unique(found.pixels[4:6]).tolist() == [7, 77]
    assert sorted(found.notes) == [
        f"{tmp_path}: 1 of 6 images are 16-bit grey: their upper 8 bits kept",
        f"{tmp_path}: 1 of 6 images are with alpha: alpha dropped",
        f"{tmp_path}: 3 of 6 images are grey: repeated to RGB",
    ]


def test_jpeg_images_are_counted(tmp_path: Path):
    write_folder(tmp_path, RGB)
    (tmp_path / "0009.JPEG").write_bytes(encoded(COLOUR, "JPEG"))
    (told,) = sets.load(tmp_path).notes
    assert told == f"{tmp_path}: 1 of 6 images are JPEG, whose losses move FID; png or npz keep every pixel"


def test_images_beside_train_are_counted(tmp_path: Path):
    for name in ("train", "val"):
        write_folder(tmp_path / name, RGB)
    found = sets.load(tmp_path)
    assert len(found.pixels) == 5
    assert found.notes == (f"{tmp_path}: 5 images beside train/ are not read",)


def test_images_of_several_sizes_are_refused_with_an_example_of_each(tmp_path: Path):
    write_folder(tmp_path, RGB)
    picture(RGB[0, :4]).save(tmp_path / "0008.png")
    picture(RGB[0, :, :4]).save(tmp_path / "0007.png")
    picture(RGB[1, :4]).save(tmp_path / "0009.png")
    told = refusal(tmp_path)
    assert (
        "several sizes (width x height): 5 of 6x8 (0000.png ...), 2 of 6x4 (0008.png ...), 1 of 4x8 (0007.png ...).\n"
        in told
    )
    assert "prepare them alike (of a reference: --prepare)" in told


def test_only_the_most_frequent_sizes_are_named(tmp_path: Path):
    for i in range(14):
        Image.new("RGB", (6 + i, 8)).save(tmp_path / f"{i:02d}.png")
    told = refusal(tmp_path)
    assert told.count("1 of ") == 10
    assert "and 4 other sizes.\n" in told


def animated(form: str) -> bytes:
    first, *others = map(picture, RGB)
    return encoded(first, form, save_all=True, append_images=others, lossless=True)


BIG = picture(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))
BROKEN = {
    "animated.png": (animated("PNG"), "it is animated (5 frames)"),
    "animated.webp": (animated("WEBP"), "it is animated (5 frames)"),
    "cut.png": (encoded(BIG, "PNG")[:1500], "truncated"),
    "cut.jpg": (encoded(BIG, "JPEG")[:-200], "truncated"),
    "empty.png": (b"", "it is empty"),
    "text.png": (b"<html>not found</html>", "it is no PNG, JPEG, WEBP, BMP"),
    "gif.png": (encoded(BIG, "GIF"), "it is no PNG, JPEG, WEBP, BMP"),
}


def test_images_that_cannot_be_used_are_named_all_at_once(tmp_path: Path):
    write_folder(tmp_path, RGB)
    for name, (content, _) in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    told = refusal(tmp_path)
    assert f"{tmp_path}: {len(BROKEN)} of {5 + len(BROKEN)} images cannot be used:\n" in told
    for name, (_, reason) in BROKEN.items():
        (line,) = (line for line in told.splitlines() if line.startswith(f"    {name}: "))
        assert reason in line
    assert "    0000.png" not in told
    assert "nothing was computed" in told


def test_up_to_ten_broken_images_are_named(tmp_path: Path):
    for i in range(25):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    told = refusal(tmp_path)
    assert told.count("it is empty") == 10
    assert "    09.png: " in told
    assert "    10.png: " not in told
    assert "    and 15 more\n" in told


def test_broken_images_of_a_tar_are_named(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("animated.png", "empty.png"):
            (tmp_path / name).write_bytes(BROKEN[name][0])
            tar.add(tmp_path / name, f"top/{name}")
    told = refusal(tmp_path / "a.tar")
    assert "    top/animated.png: it is animated (5 frames)\n    top/empty.png: it is empty\n" in told


def test_a_png_with_one_frame_of_animation_is_an_image(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(encoded(picture(RGB[0]), "PNG", save_all=True, append_images=[]))
    assert np.array_equal(sets.load(tmp_path).pixels[0:1], RGB[:1])


def test_an_empty_folder_is_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    assert "a holds no images.\n" in refusal(tmp_path / "a")
    (tmp_path / "a" / "samples.npz").write_bytes(b"")
    assert "a holds no images, but 1 .npz" in refusal(tmp_path / "a")


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("not images")
    assert "allowed: an npz with arr_0" in refusal(tmp_path / "notes.txt")
    picture(RGB[0]).save(tmp_path / "one.png")
    assert "allowed: an npz with arr_0" in refusal(tmp_path / "one.png")
