"""Preparations against values computed by hand, PIL operations written out, and numbers from OpenCV."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdm_cli.errors import BdmError
from bdm_cli.images.prepare import PREPARATIONS, in_colour, prepared, resize_linear

BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC
CROPS = sorted(PREPARATIONS.keys() - {"none"})


def pattern(height: int, width: int) -> np.ndarray:
    """Colours that wrap around, so that a pixel taken from a wrong place shows. uint8 [height, width, 3]"""
    y, x, c = np.indices((height, width, 3))
    return ((x * x // 3 + y * x // 5 + 7 * y + 53 * c) % 256).astype(np.uint8)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(pattern(height, width)).convert(mode)


def gray(rows: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(rows, np.uint8))


# each preparation


def test_none_keeps_the_pixels():
    assert np.array_equal(prepared(picture(6, 6), "none", 6, 3), pattern(6, 6))


@pytest.mark.parametrize("size", [(6, 7), (7, 6), (5, 5)])
def test_none_refuses_another_size_and_names_what_would_help(size: tuple[int, int]):
    with pytest.raises(BdmError) as error:
        prepared(picture(*size), "none", 6, 3, name="a/b.png")
    assert f"a/b.png is {size[0]}x{size[1]} (width x height), 6x6 is wanted" in str(error.value)
    assert "adm-crop, bilinear-crop, box-crop, square-bicubic" in str(error.value)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (41, 30), (30, 41), (33, 33), (12, 9)])
def test_square_bicubic_cuts_first_and_then_resizes(width: int, height: int):
    """(h - crop) // 2 : (h + crop) // 2, as ldm/data/lsun.py writes it."""
    side = min(width, height)
    rows = slice((height - side) // 2, (height + side) // 2)
    columns = slice((width - side) // 2, (width + side) // 2)
    square = Image.fromarray(pattern(height, width)[rows, columns])
    expected = np.asarray(square.resize((16, 16), BICUBIC))
    assert np.array_equal(prepared(picture(width, height), "square-bicubic", 16, 3), expected)


def test_box_crop_by_hand():
    """4x6 to 2x3, then the left of the two columns that could be the middle; each pixel a mean of 2x2."""
    image = gray([[0, 4, 8, 16, 1, 1], [8, 4, 8, 0, 1, 1], [100, 100, 7, 7, 9, 9], [100, 104, 7, 7, 9, 9]])
    assert prepared(image, "box-crop", 2, 1)[..., 0].tolist() == [[4, 8], [101, 7]]


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (12, 9), (100, 16)])
def test_box_crop_resizes_first_and_then_cuts(width: int, height: int):
    scale = 16 / min(width, height)
    small = picture(width, height).resize((round(scale * width), round(scale * height)), BOX)
    left, top = (small.width - 16) // 2, (small.height - 16) // 2
    expected = np.asarray(small.crop((left, top, left + 16, top + 16)))
    assert np.array_equal(prepared(picture(width, height), "box-crop", 16, 3), expected)


def test_adm_crop_halves_while_the_short_side_is_twice_the_size():
    """135x65 -> 67x32 (box) -> 33x16 (box); 31x40 is not halved."""
    halved = picture(135, 65).resize((67, 32), BOX).resize((33, 16), BOX)
    assert np.array_equal(prepared(picture(135, 65), "adm-crop", 16, 3), np.asarray(halved.crop((8, 0, 24, 16))))
    direct = picture(31, 40).resize((16, 21), BICUBIC)
    assert np.array_equal(prepared(picture(31, 40), "adm-crop", 16, 3), np.asarray(direct.crop((0, 2, 16, 18))))
    assert not np.array_equal(halved, picture(135, 65).resize((33, 16), BOX))


@pytest.mark.parametrize(("width", "height"), [(21, 16), (16, 24), (16, 16)])
def test_images_whose_short_side_fits_are_only_cut(width: int, height: int):
    """So it is with the LSUN that fyu/lsun distributes: all ways of preparing it agree."""
    top, left = (height - 16) // 2, (width - 16) // 2
    expected = pattern(height, width)[top : top + 16, left : left + 16]
    for how in CROPS:
        assert np.array_equal(prepared(picture(width, height), how, 16, 3), expected), how


@pytest.mark.parametrize("how", CROPS)
@pytest.mark.parametrize(("width", "height"), [(3, 5), (1, 1), (200, 17), (17, 200), (16, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_becomes_a_square(how: str, width: int, height: int, channels: int):
    found = prepared(picture(width, height), how, 16, channels)
    assert (found.shape, found.dtype) == ((16, 16, channels), np.uint8)


# OpenCV's bilinear rule


def test_resize_linear_by_hand():
    """3 columns to 5 lie at -0.2, 0.4, 1, 1.6, 2.2; 2 rows to 4 at -0.25, 0.25, 0.75, 1.25. Halves are rounded up."""
    found = resize_linear(np.array([[10, 20, 200], [30, 90, 250]], np.uint8)[..., None], 4, 5)
    assert found[..., 0].tolist() == [
        [10, 14, 20, 128, 200],
        [15, 24, 38, 143, 213],
        [25, 44, 73, 172, 238],
        [30, 54, 90, 186, 250],
    ]


def test_a_quarter_is_the_mean_of_the_inner_four_of_sixteen():
    """1024 to 256, FFHQ: pixel x lies at 4 x + 1.5; the outer pixels count for nothing."""
    image = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3)).astype(np.uint8)
    inner = [image[y::4, x::4].astype(int) for y in (1, 2) for x in (1, 2)]
    assert np.array_equal(prepared(Image.fromarray(image), "bilinear-crop", 256, 3), (sum(inner) + 2) // 4)


@pytest.mark.parametrize(
    ("given", "wanted", "checksum", "first", "inside", "last"),
    [
        ((1024, 1024), (256, 256), 0x384C42B5, [11, 64, 117], [100, 153, 142], [143, 132, 121]),
        ((375, 500), (256, 341), 0x93AFEC4E, [2, 54, 108], [100, 138, 186], [108, 116, 123]),
        ((500, 375), (341, 256), 0x78AB8E24, [2, 54, 108], [134, 155, 112], [120, 159, 212]),
        ((333, 500), (256, 384), 0x9AEA1439, [1, 54, 107], [146, 183, 100], [153, 206, 69]),
        ((100, 140), (256, 358), 0x5C405217, [0, 53, 106], [180, 36, 89], [157, 210, 7]),
        ((512, 512), (256, 256), 0x889317B4, [4, 57, 110], [136, 189, 114], [166, 91, 144]),
    ],
)
def test_resize_linear_is_opencvs(given: tuple, wanted: tuple, checksum: int, first: list, inside: list, last: list):
    """(height, width). Numbers of cv2.resize(pattern(*given), wanted[::-1], interpolation=cv2.INTER_LINEAR),
    opencv-python-headless 5.0.0.93 on x86-64, and zlib.crc32 of all of them."""
    found = resize_linear(pattern(*given), *wanted)
    assert found[0, 0].tolist() == first
    assert found[wanted[0] // 2, wanted[1] // 3].tolist() == inside
    assert found[-1, -1].tolist() == last
    assert zlib.crc32(found.tobytes()) == checksum


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_resize_linear_is_bilinear_to_a_level(height: int, width: int, new_height: int, new_width: int):
    """Against the rule in float64: fixed point is less than a level away."""
    image = pattern(height, width)

    def mix(n_from: int, n_to: int) -> np.ndarray:
        position = ((np.arange(n_to) + 0.5) * n_from / n_to - 0.5).clip(0, n_from - 1)
        return np.maximum(0, 1 - abs(position[:, None] - np.arange(n_from)))

    exact = np.einsum("yh,xw,hwc->yxc", mix(height, new_height), mix(width, new_width), image)
    assert abs(resize_linear(image, new_height, new_width) - exact).max() < 1


def test_resize_linear_to_the_same_size_changes_nothing():
    assert np.array_equal(resize_linear(pattern(9, 14), 9, 14), pattern(9, 14))


@pytest.mark.parametrize(("width", "height", "shape"), [(50, 30, (16, 27)), (30, 50, (27, 16)), (11, 8, (16, 22))])
def test_bilinear_crop_resizes_first_and_then_cuts(width: int, height: int, shape: tuple[int, int]):
    """round(50 * 16 / 30) = 27"""
    top, left = (shape[0] - 16) // 2, (shape[1] - 16) // 2
    expected = resize_linear(pattern(height, width), *shape)[top : top + 16, left : left + 16]
    assert np.array_equal(prepared(picture(width, height), "bilinear-crop", 16, 3), expected)


# random crops


@pytest.mark.parametrize("seed", range(5))
def test_a_random_crop_takes_its_offsets_from_the_generator(seed: int):
    """albumentations 0.4.3: int((length - size) * u), rows first."""
    random = np.random.default_rng(seed)
    _, left = int(0 * random.random()), int((40 - 16) * random.random())
    found = prepared(picture(40, 16), "bilinear-crop", 16, 3, np.random.default_rng(seed))
    assert np.array_equal(found, pattern(16, 40)[:, left : left + 16])


def test_random_crops_reach_every_offset_but_the_last():
    random = np.random.default_rng(0)
    columns = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8), (8, 1)))
    found = {int(prepared(columns, "bilinear-crop", 8, 1, random)[0, 0, 0]) for _ in range(200)}
    assert found == {0, 1, 2, 3}


@pytest.mark.parametrize("how", CROPS)
def test_every_crop_can_be_random(how: str):
    crops = [prepared(picture(48, 16), how, 16, 3, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    assert not np.array_equal(crops[0], prepared(picture(48, 16), how, 16, 3))


# colour


def test_16_bit_gray_keeps_its_upper_byte():
    deep = Image.fromarray(np.array([[0, 255, 256], [4660, 65280, 65535]], np.uint16))
    assert deep.mode == "I;16"
    expected = [[0, 0, 1], [18, 255, 255]]
    assert np.asarray(in_colour(deep, 1)).tolist() == expected
    assert np.asarray(in_colour(deep, 3))[..., 2].tolist() == expected
    assert np.asarray(in_colour(Image.fromarray(np.array([[4660, 65535]], np.int32)), 1)).tolist() == [[18, 255]]


def test_modes():
    colour = Image.new("RGB", (1, 1), (204, 102, 51))
    for mode in ("RGB", "RGBA", "P"):
        assert in_colour(colour.convert(mode), 3).getpixel((0, 0)) == (204, 102, 51)
    assert in_colour(Image.new("RGBA", (1, 1), (200, 100, 50, 0)), 3).getpixel((0, 0)) == (200, 100, 50)
    assert in_colour(Image.new("LA", (1, 1), (77, 0)), 1).getpixel((0, 0)) == 77
    assert in_colour(Image.new("L", (1, 1), 77), 3).getpixel((0, 0)) == (77, 77, 77)
    assert in_colour(Image.new("1", (1, 1), 1), 3).getpixel((0, 0)) == (255, 255, 255)
    assert in_colour(colour, 1).getpixel((0, 0)) == round(0.299 * 204 + 0.587 * 102 + 0.114 * 51)
    # (255 - C)(255 - K) / 255
    assert in_colour(Image.new("CMYK", (1, 1), (10, 20, 30, 40)), 3).getpixel((0, 0)) == pytest.approx(
        (206.6, 198.2, 189.7), abs=1
    )


def test_other_numbers_of_channels_are_a_programming_mistake():
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        prepared(picture(4, 4), "none", 4, 4)


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    picture(20, 16).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(prepared(Image.open(tmp_path / "a.png"), "box-crop", 16, 3), pattern(16, 20)[:, 2:18])
