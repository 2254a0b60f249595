"""How an image of any size becomes a square one: the preparations that the published numbers rest on, pure functions.

Each takes an RGB or grey PIL image and gives uint8 [size, size, C]. With `random` (a numpy Generator) the crop lies
anywhere, without it in the middle. All but `as_it_is` also enlarge what is smaller than `size`.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from bdm_cli.errors import BdmError
from bdm_cli.recipe import Preparation

MODES = {1: "L", 3: "RGB"}
Random = np.random.Generator | None


def prepared(
    image: Image.Image, how: Preparation, size: int, channels: int, random: Random = None, name: str = "an image"
) -> np.ndarray:
    """The image in grey (channels = 1) or RGB (3), then prepared: uint8 [size, size, channels].

    Raises: BdmError that names the image, if `how` is "none" and it has another size.
    """
    if how == "none" and image.size != (size, size):
        others = ", ".join(sorted(PREPARATIONS.keys() - {"none"}))
        raise BdmError(
            f"{name} is {image.width}x{image.height} (width x height), {size}x{size} is wanted.\n"
            f"  give images of that size, or say how to make it: --set data.prepare=..., evaluate.prepare=...: {others}"
        )
    return PREPARATIONS[how](in_colour(image, channels), size, random)


def in_colour(image: Image.Image, channels: int) -> Image.Image:
    """The image in 8-bit grey (channels = 1) or RGB (3), as the originals' `convert` does before anything else.

    Grey is repeated; colour becomes grey by ITU-R 601; of CMYK the naive inverse is taken; a palette is looked up;
    alpha is dropped without blending. Of 16 bits the upper 8 are kept, as PIL does itself for 16-bit colour (its
    `convert` would clip 16-bit grey at 255). EXIF orientation and colour profiles are ignored, as in the originals.

    Raises: ValueError for another number of channels.
    """
    if channels not in MODES:
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def as_it_is(image: Image.Image, size: int, random: Random = None) -> np.ndarray:
    """none: the image's own pixels; it has the size already (CIFAR-10)."""
    return _cut(_pixels(image), size, random)


def square_bicubic(image: Image.Image, size: int, random: Random = None) -> np.ndarray:
    """square-bicubic: a square of the short side, cut out first, then PIL bicubic.

    CompVis LSUN (latent-diffusion, ldm/data/lsun.py). On images whose short side is `size`, as fyu/lsun distributes
    them, this, box-crop and adm-crop give the same pixels.
    """
    square = _cut(_pixels(image), min(image.size), random)
    shaped = Image.fromarray(square.squeeze(-1) if square.shape[2] == 1 else square)
    return _pixels(shaped.resize((size, size), Image.Resampling.BICUBIC))


def box_crop(image: Image.Image, size: int, random: Random = None) -> np.ndarray:
    """box-crop: short side to `size` by PIL's box filter, then the crop.

    ADM LSUN (openai/guided-diffusion, datasets/lsun_bedroom.py), of which VIRTUAL_lsun_bedroom256 is made.
    """
    return _cut(_pixels(_short_side_to(image, size, Image.Resampling.BOX)), size, random)


def adm_crop(image: Image.Image, size: int, random: Random = None) -> np.ndarray:
    """adm-crop: halved by the box filter while the short side is at least 2 * size, then PIL bicubic, then the crop.

    ADM ImageNet (openai/guided-diffusion, image_datasets.py, center_crop_arr). ADM's own random crop also draws the
    scale (0.8 to 1 of the short side); here only its place is drawn.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _cut(_pixels(_short_side_to(image, size, Image.Resampling.BICUBIC)), size, random)


def bilinear_crop(image: Image.Image, size: int, random: Random = None) -> np.ndarray:
    """bilinear-crop: short side to `size` by OpenCV's bilinear rule, without antialiasing, then the crop.

    CompVis FFHQ and ImageNet (taming-transformers, taming/data/base.py: albumentations 0.4.3 SmallestMaxSize, then
    CenterCrop or RandomCrop). The random offset is int((length - size) * u), u in [0, 1), first of rows, then of
    columns; so it is in 0.4.3, where the last offset never occurs.
    """
    height, width = (round(side * (size / min(image.size))) for side in (image.height, image.width))
    return _cut(resize_linear(_pixels(image), height, width), size, random)


PREPARATIONS: dict[str, Callable[[Image.Image, int, Random], np.ndarray]] = {
    "none": as_it_is,
    "square-bicubic": square_bicubic,
    "box-crop": box_crop,
    "adm-crop": adm_crop,
    "bilinear-crop": bilinear_crop,
}


def resize_linear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """What cv2.resize(..., INTER_LINEAR) makes of uint8 [H, W, C] (OpenCV, modules/imgproc/src/resize.cpp).

    Output pixel x lies at f = (x + 0.5) * W / width - 0.5 and is mixed from its two neighbours, along rows and then
    columns, in fixed point: weights in 1/2048, 4 bits dropped between, 16 after. Bit-equal to cv2 5.0 on x86-64 for
    thousands of random sizes; OpenCV builds that resize by other code (some ARM ones) may differ in the last bit.
    """
    channels = pixels.shape[2]
    left, right, w_left, w_right = _taps(pixels.shape[1], width, clamp=True)
    above, below, w_above, w_below = _taps(pixels.shape[0], height, clamp=False)
    left, right = ((column[:, None] * channels + np.arange(channels)).ravel() for column in (left, right))
    w_left, w_right = w_left.repeat(channels), w_right.repeat(channels)
    flat = pixels.reshape(len(pixels), -1)  # [H, W * C]: numpy takes from two axes far faster than from three

    def rows(which: np.ndarray) -> np.ndarray:
        chosen = flat.take(which, axis=0)
        return (chosen.take(left, axis=1) * w_left + chosen.take(right, axis=1) * w_right) >> 4

    upper = (rows(above) * w_above[:, None]) >> 16
    lower = (rows(below) * w_below[:, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8).reshape(height, width, channels)


def _taps(n_from: int, n_to: int, clamp: bool) -> tuple[np.ndarray, ...]:
    """The two neighbours of each output pixel and their weights in 1/2048, which OpenCV rounds half to even.

    clamp: give the nearer neighbour all the weight beyond the border. OpenCV does it for columns; of rows it takes the
    border row twice, with both weights.
    """
    position = ((np.arange(n_to) + 0.5) * (1.0 / (n_to / n_from)) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    part = position - first.astype(np.float32)
    if clamp:
        part[(first < 0) | (first >= n_from - 1)] = 0
    weights = (np.rint(w * np.float32(2048)).astype(np.int32) for w in (np.float32(1) - part, part))
    return first.clip(0, n_from - 1), (first + 1).clip(0, n_from - 1), *weights


def _short_side_to(image: Image.Image, size: int, how: Image.Resampling) -> Image.Image:
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), how)


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C]"""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _cut(pixels: np.ndarray, size: int, random: Random) -> np.ndarray:
    """size x size of [H, W, C]: the middle (the smaller half of an odd rest comes first), or anywhere."""
    rest = [length - size for length in pixels.shape[:2]]
    top, left = (r // 2 if random is None else int(r * random.random()) for r in rest)
    return pixels[top : top + size, left : left + size]
