"""What a recipe's images are: found, counted, measured, decoded, prepared, and looked at, before any training."""

import numpy as np
import pandas as pd

from bdm_cli import output, runs, student
from bdm_cli.diffusion import data, first_stage, latent_cache, sampling
from bdm_cli.errors import BdmError
from bdm_cli.images import readers
from bdm_cli.places import locate
from bdm_cli.recipe import Recipe

GRID_IMAGES = 64


def check(recipe: Recipe) -> pd.DataFrame:
    """Decode every training image once (the result is cached) and tell what was found; write a grid of prepared images.

    Rows of What and Found, among them a row 'Problem' for each thing that would stop a training. The grid is 64 images,
    chosen by a fixed seed, as training sees them but not flipped: runs/data-check/<dataset>/grid.png.
    Raises: BdmError if there are no images at data.path, or if they cannot be read (as files; corrupt ones are told).
    """
    d = recipe.data
    reader = data.find(d)
    seen = readers.survey(reader)
    rows = [
        ("Recipe", recipe.name),
        ("Data set", d.dataset),
        ("Kind", reader.kind),
        ("Path", str(reader.path)),
        ("Images", f"{len(reader):,}"),
        *([("Not read, beside train/", f"{reader.left_out:,}")] if reader.left_out else []),
        ("Classes", _classes(reader)),
        ("Captions", _captions(reader)),
        *_sizes(seen, d.image_size),
        *_corrupt(reader, seen),
        ("Prepared for training", f"{d.prepare}, {d.crop} crop, {'half of them' if d.flip else 'not'} flipped"),
        ("Prepared as reference", f"{recipe.evaluate.prepare}, centre crop, not flipped"),
    ]
    if seen.corrupt and d.corrupt == "error":
        rows.append(("Problem", "corrupt images: replace them, or go on without them by --set data.corrupt=skip"))
    other = ((seen.width != d.image_size) | (seen.height != d.image_size)) & (seen.width > 0)
    if recipe.evaluate.prepare == "none" and other.any() and not recipe.evaluate.reference:
        rows.append(
            ("Problem", f"{other.sum():,} images cannot be a reference as they are: --set evaluate.prepare=...")
        )
    try:
        images = data.Images(
            reader, d.prepare, d.image_size, d.channels, recipe=recipe.name, crop=d.crop, corrupt=seen.corrupt
        )
        rows.append(("Grid", _grid(images, d.dataset)))
        data.require_condition(images, recipe.unet)
    except BdmError as error:
        rows.append(("Problem", str(error)))
    return pd.DataFrame(rows, columns=["What", "Found"])


def prepare(recipe: Recipe, crops: int | None = None, half: bool = False, batch: int = 16) -> pd.DataFrame:
    """Encode a latent model's training images once, into the recipe's data.latents; goes on where it was left.

    crops: random crops per image, to be given where data.crop is random. half: 16-bit floats. batch: images per run of
    the encoder. Every process of a distributed launch encodes its part.
    Raises: BdmError for a recipe without a first stage, for missing inputs, or if the folder holds another cache.
    """
    if recipe.first_stage is None or not recipe.data.latents:
        raise BdmError(
            f"recipe '{recipe.name}' trains on pixels, or has no data.latents: there is nothing to encode.\n"
            "  allowed: bedrooms, churches, ffhq, imagenet, digits-ldm, digits-cond and their siblings, "
            "or --set data.latents=PATH"
        )
    if crops is not None and recipe.data.crop != "random":
        raise BdmError(f"--crops {crops}: the images of '{recipe.name}' are cropped in the centre.\n  leave it out")
    if crops is None and recipe.data.crop == "random":
        raise BdmError(
            f"'{recipe.name}' crops at random, anew at every use; a cache holds as many crops per image as you say.\n"
            "  give --crops N, e.g. --crops 4, or --set data.crop=centre"
        )
    crops = crops or 1
    processes = student.processes()
    stage = first_stage.load(recipe.first_stage).to(processes.device)
    images = data.training_images(recipe)
    folder = latent_cache.write(
        recipe,
        images,
        stage,
        crops=crops,
        half=half,
        batch=batch,
        rank=processes.process_index,
        world=processes.num_processes,
        wait=processes.wait_for_everyone,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    rows = [
        ("Folder", str(folder)),
        ("Images", f"{len(images):,}"),
        ("Views of each", f"{crops} crops, {'with' if recipe.data.flip else 'without'} mirror images"),
        ("Size", f"{size / 2**20:,.1f} MiB"),
        ("First stage", str(locate(recipe.first_stage.path))),
    ]
    return pd.DataFrame(rows, columns=["What", "Value"])


def _classes(reader: readers.Reader) -> str:
    if reader.labels is None:
        return f"none ({reader.unlabelled})"
    counts = np.bincount(reader.labels, minlength=len(reader.classes))
    few, many = int(counts.argmin()), int(counts.argmax())
    return (
        f"{len(counts):,}, of {counts[few]:,} ({reader.classes[few]}) to {counts[many]:,} "
        f"({reader.classes[many]}) images"
    )


def _captions(reader: readers.Reader) -> str:
    try:
        texts = reader.captions
    except BdmError as error:
        return f"not usable: {error}"
    return "none" if texts is None else f"{len(texts):,}, the first is {texts[0][:60]!r}"


def _sizes(seen: readers.Survey, wanted: int) -> list[tuple[str, str]]:
    whole = seen.width > 0
    if not whole.any():
        return []
    width, height = seen.width[whole], seen.height[whole]
    small = (np.minimum(width, height) < wanted).sum()
    modes, counts = np.unique(seen.mode[whole], return_counts=True)
    return [
        ("Width (min, median, max)", f"{width.min()}, {np.median(width):g}, {width.max()}"),
        ("Height (min, median, max)", f"{height.min()}, {np.median(height):g}, {height.max()}"),
        ("Distinct sizes", f"{len(np.unique(np.stack([width, height]), axis=1).T):,}"),
        (f"Short side below {wanted}", f"{small:,}"),
        ("Modes", ", ".join(f"{mode} ({n:,})" for mode, n in zip(modes, counts, strict=True))),
    ]


def _corrupt(reader: readers.Reader, seen: readers.Survey) -> list[tuple[str, str]]:
    named = [f"{reader.name(number)} ({why})" for number, why in list(seen.corrupt.items())[: readers.NAMED]]
    more = len(seen.corrupt) - len(named)
    return [
        ("Corrupt", f"{len(seen.corrupt):,}"),
        *(("Corrupt image", name) for name in named),
        *([("Corrupt image", f"and {more:,} more")] if more else []),
    ]


def _grid(images: data.Images, dataset: str) -> str:
    """Where the contact sheet was written."""
    random = np.random.default_rng(0)
    chosen = np.sort(random.permutation(len(images))[:GRID_IMAGES])
    path = runs.runs_dir() / "data-check" / dataset / "grid.png"
    runs.write_whole(path, sampling.grid(images.views(chosen, random)).save)
    output.say(f"{len(chosen)} prepared images: {path}")
    return str(path)
