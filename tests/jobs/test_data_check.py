"""`bdm data check` on folders and an lmdb that the tests write: what it tells, and the grid."""

import io
from pathlib import Path

import lmdb
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bdm_cli import recipe, runs
from bdm_cli.diffusion.data import training_images
from bdm_cli.errors import BdmError
from bdm_cli.jobs import data
from bdm_cli.recipe import Recipe


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def small(*overrides: str, name: str) -> Recipe:
    fitting = ["data.image_size=16", "first_stage.arguments.block_out_channels=[8]", "data.path=images"]
    return recipe.load(name, [*fitting, "unet.arguments.sample_size=16", *overrides])


def told(table: pd.DataFrame) -> dict[str, str]:
    """What -> Found; of a repeated What the lines together."""
    return table.groupby("What", sort=False)["Found"].agg("\n".join).to_dict()


@pytest.fixture
def folder(home: Path) -> Path:
    """Two classes: three images of 20x16, 30x40 and 12x10 (grey), and one of 20x16."""
    (home / "images" / "train" / "n2").mkdir(parents=True)
    (home / "images" / "train" / "n1").mkdir()
    (home / "images" / "val").mkdir()
    picture(0, 20, 16).save(home / "images" / "train" / "n2" / "0.png")
    picture(1, 30, 40).save(home / "images" / "train" / "n2" / "1.png")
    picture(2, 12, 10).convert("L").save(home / "images" / "train" / "n2" / "2.jpg")
    picture(3, 20, 16).save(home / "images" / "train" / "n1" / "3.webp")
    picture(4, 20, 16).save(home / "images" / "val" / "4.png")
    return home / "images" / "train"


def test_a_folder_of_classes(folder: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    spec = small("unet.n_classes=3", name="imagenet")
    table = data.check(spec)
    assert list(table.columns) == ["What", "Found"]
    found = told(table)
    grid = home / "runs" / "data-check" / "imagenet" / "grid.png"
    assert found == {
        "Recipe": "imagenet",
        "Data set": "imagenet",
        "Kind": "folder",
        "Path": str(home / "images"),
        "Images": "4",
        "Not read, beside train/": "1",
        "Classes": "2, of 1 (n1) to 3 (n2) images",
        "Captions": "none",
        "Width (min, median, max)": "12, 20, 30",
        "Height (min, median, max)": "10, 16, 40",
        "Distinct sizes": "3",
        "Short side below 16": "1",
        "Modes": "L (1), RGB (3)",
        "Corrupt": "0",
        "Prepared for training": "bilinear-crop, random crop, not flipped",
        "Prepared as reference": "adm-crop, centre crop, not flipped",
        "Grid": str(grid),
    }
    assert Image.open(grid).size == (8 * (48 + 2) + 2, 48 + 4)
    assert f"4 prepared images: {grid}" in capsys.readouterr().err


def test_the_grid_shows_training_images(folder: Path, home: Path):
    """Enlarged to 48 pixels, with 2 pixels of white between."""
    spec = small(name="ffhq")
    data.check(spec)
    sheet = np.asarray(Image.open(home / "runs" / "data-check" / "ffhq" / "grid.png"))
    shown = [sheet[2:50:3, 2 + 50 * i : 50 + 50 * i : 3] for i in range(4)]
    assert np.array_equal(shown, training_images(spec)[:])


def test_corrupt_images_are_told_and_not_shown(folder: Path):
    for i in range(12):
        (folder / "n1" / f"empty{i:02d}.jpg").write_bytes(b"")
    found = told(data.check(small(name="ffhq")))
    assert found["Images"] == "16"
    assert found["Corrupt"] == "12"
    lines = found["Corrupt image"].splitlines()
    assert lines[0] == "train/n1/empty00.jpg (it is empty)"
    assert (len(lines), lines[-1]) == (11, "and 2 more")
    assert "--set data.corrupt=skip" in found["Problem"]
    assert "Grid" in found
    assert found["Modes"] == "L (1), RGB (3)"
    skipped = told(data.check(small("data.corrupt=skip", name="ffhq")))
    assert skipped["Corrupt"] == "12"
    assert "Problem" not in skipped


def test_nothing_but_corrupt_images(home: Path):
    (home / "images").mkdir()
    (home / "images" / "a.png").write_bytes(b"")
    found = told(data.check(small(name="ffhq")))
    assert "none of its 1 images can be decoded" in found["Problem"]
    assert "Grid" not in found
    assert "Modes" not in found


def test_what_would_stop_a_training_is_told(folder: Path):
    found = told(data.check(small("unet.n_classes=2", name="imagenet")))
    assert "has 2 class folders (n1, n2 ...), the network 'ldm4-imagenet' knows 1 classes" in found["Problem"]
    found = told(data.check(small("data.prepare=none", name="ffhq")))
    assert "16x16 is wanted" in found["Problem"]
    assert "Grid" not in found
    found = told(data.check(small("evaluate.prepare=none", name="ffhq")))
    assert found["Problem"].startswith("4 images cannot be a reference as they are")


def test_captions(folder: Path):
    (folder / "n1" / "3.txt").write_text("a house")
    assert "not usable: " in told(data.check(small(name="ffhq")))["Captions"]
    for i in range(3):
        (folder / "n2" / f"{i}.txt").write_text("a garden")
    assert told(data.check(small(name="ffhq")))["Captions"] == "4, the first is 'a house'"


def test_an_lmdb(home: Path):
    (home / "images").mkdir()
    with lmdb.open(str(home / "images")) as environment, environment.begin(write=True) as transaction:
        for i in range(70):
            file = io.BytesIO()
            picture(i, 20, 16).save(file, "WEBP")
            transaction.put(b"%040x" % i, file.getvalue())
    found = told(data.check(small(name="churches")))
    assert (found["Kind"], found["Images"], found["Distinct sizes"]) == ("lmdb", "70", "1")
    assert found["Classes"] == "none (an lmdb has no class folders)"
    assert found["Prepared for training"] == "square-bicubic, centre crop, half of them flipped"
    assert Image.open(found["Grid"]).size == (402, 402)  # 64 of them


def test_every_image_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    data.check(small(name="ffhq"))
    (cached,) = runs.cache_dir().glob("seen-*")
    before = cached.stat().st_mtime_ns
    data.check(small("data.prepare=box-crop", name="ffhq"))
    assert cached.stat().st_mtime_ns == before


def test_digits():
    found = told(data.check(recipe.load("digits")))
    assert (found["Images"], found["Classes"]) == ("1,797", "10, of 174 (8) to 183 (3) images")


def test_nothing_there():
    with pytest.raises(BdmError, match=r"there is nothing at .*images(.|\n)*get it: https://"):
        data.check(small(name="churches"))
