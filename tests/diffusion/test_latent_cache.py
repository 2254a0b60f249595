"""The cache of encoded images: the same batches as the images give, whole or refused, made in pieces or by several."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from conftest import RECIPES, Bdm
from PIL import Image

from bdm_cli import recipe, runs
from bdm_cli.diffusion import data, first_stage, latent_cache, sources
from bdm_cli.diffusion.first_stage import FirstStage
from bdm_cli.diffusion.latent_cache import Cache
from bdm_cli.errors import BdmError
from bdm_cli.jobs import train
from bdm_cli.jobs.data import prepare
from bdm_cli.places import home, locate
from bdm_cli.recipe import Recipe

MODELS = ["tiny-ldm", "tiny-cond"]
UNCONDITIONAL = ["unet.n_classes=0", "unet.kind=UNet2DModel", "sample.guidance=1"]
UNCONDITIONAL += ["train.drop_condition=0", "pretrain.drop_condition=0"]
"""Of tiny-cond: images without classes may be encoded for it."""


@pytest.fixture
def images(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 grey images of 19x16 in three class folders; five of them make a file of the cache."""
    monkeypatch.setattr(latent_cache, "SHARD", 5)
    folder = home / "images"
    random = np.random.default_rng(0)
    for i in range(12):
        path = folder / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 19), dtype=np.uint8)).save(path)
    return folder


def of_folder(name: str, *overrides: str, path: str = "images") -> Recipe:
    """A tiny recipe on a folder of images."""
    where = ["data.dataset=folder", f"data.path={path}", "data.prepare=bilinear-crop", "train.batch=4"]
    return recipe.load(str(RECIPES / f"{name}.toml"), [*where, *overrides])


def stage_of(spec: Recipe) -> FirstStage:
    return first_stage.load(spec.first_stage)


def written(spec: Recipe, **options: object) -> Path:
    """The folder of the recipe's cache, written as the job does."""
    given = {"crops": 1, "half": False, "batch": 64} | options
    return latent_cache.write(spec, data.training_images(spec), stage_of(spec), **given)


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("moments-*.npy")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def message(call: Callable[[], object]) -> str:
    with pytest.raises(BdmError) as caught:
        call()
    return str(caught.value)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# the same batches


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_gives_the_batches_of_the_images(images: Path, name: str, flip: bool):
    """From the same draws, and it leaves the generator in the same state."""
    spec = of_folder(name, f"data.flip={str(flip).lower()}")
    stage = stage_of(spec)
    on_the_fly = sources.Encoded(spec, stage)
    written(spec, batch=3)
    cached = sources.of_recipe(spec, torch.device("cpu"))
    assert isinstance(cached, sources.Cached)
    assert len(cached) == len(on_the_fly) == 12
    for seed, chosen in enumerate(([0, 11, 4, 5, 0, 9], [10], list(range(12)))):
        one, other = generator(seed), generator(seed)
        ours, theirs = cached.batch(np.array(chosen), one), on_the_fly.batch(np.array(chosen), other)
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.equal(one.get_state(), other.get_state())
        if spec.unet.condition == "classes":
            assert np.array_equal(cached.known(np.array(chosen)), on_the_fly.known(np.array(chosen)))


@pytest.mark.parametrize("name", MODELS)
def test_training_sees_the_same_batches_of_digits(name: str, tiny_recipe: Callable[..., Recipe]):
    """All 1,797 of them, in files of the real size."""
    spec = tiny_recipe(name=name)
    on_the_fly = train.real_batches(spec, seed=3)[0]
    theirs = [on_the_fly(step) for step in (0, 500)]
    folder = written(spec)
    assert len(shards(folder)) == 4
    cached = train.real_batches(spec, seed=3)[0]
    for step, their in zip((0, 500), theirs, strict=True):
        ours = cached(step)
        assert torch.equal(ours.noise, their.noise)
        assert torch.allclose(ours.inputs[0], their.inputs[0], atol=1e-5)
        for own, wanted in zip(ours.inputs[1:], their.inputs[1:], strict=True):
            assert torch.equal(own, wanted)


def test_a_cache_keeps_the_classes(images: Path):
    spec = of_folder("tiny-cond")
    written(spec)
    cache = Cache(spec)
    assert cache.labels.dtype == np.int64
    assert cache.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4  # sorted by folder
    assert cache.captions is None


def test_a_cache_keeps_the_captions(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latent_cache, "SHARD", 5)
    pipelines.text_pipeline(home / "mine")
    captions = pipelines.captioned_images(home / "images")
    spec = recipe.load(pipelines.text_recipe(home / "r.toml", "mine", "images"))
    on_the_fly = sources.of_recipe(spec, torch.device("cpu"))
    written(spec)
    cached = sources.of_recipe(spec, torch.device("cpu"))
    chosen = np.array([7, 0, 11])
    assert cached.known(chosen) == on_the_fly.known(chosen) == [captions[i] for i in (7, 0, 11)]
    ours, theirs = (source.batch(chosen, generator()) for source in (cached, on_the_fly))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_posterior_is_drawn_from_anew_at_every_use(images: Path):
    """4,000 draws of one image: their mean and deviation are the posterior's."""
    spec = of_folder("tiny-ldm")
    stage = stage_of(spec)
    written(spec)
    cached = sources.Cached(spec, stage)
    assert not torch.equal(*(cached.batch(np.array([3]), generator(seed)) for seed in (0, 1)))
    drawn = cached.batch(np.full(4000, 3), generator())
    with torch.no_grad():
        mean, log_variance = stage.moments(data.to_float(data.training_images(spec)[[3]]))[0].chunk(2)
    deviation = (0.5 * log_variance).exp() * stage.scale
    assert ((drawn.mean(0) - mean * stage.scale) / deviation).abs().max() < 5 / 4000**0.5
    assert torch.allclose(drawn.std(0) / deviation, torch.ones_like(deviation), atol=0.06)


def test_a_vector_quantized_latent_is_always_the_same(images: Path):
    spec = of_folder("tiny-cond")
    written(spec)
    cached = sources.Cached(spec, stage_of(spec))
    assert torch.equal(*(cached.batch(np.array([3, 4]), generator(seed)) for seed in (0, 1)))


# random crops


def test_random_crops_are_views(images: Path):
    """Each view is one of the image's crops, the next one its mirror image; the crops differ."""
    spec = of_folder("tiny-cond", "data.crop=random", "data.flip=true")
    folder = written(spec, crops=2)
    views = np.concatenate([np.load(path) for path in sorted(folder.glob("moments-*.npy"))])
    assert views.shape == (12, 4, 3, 8, 8)
    stage, places = stage_of(spec), []
    with torch.no_grad():
        for i in range(12):
            pixels = np.asarray(Image.open(sorted(images.rglob("*.png"))[i]))[None, ..., None]
            for crop in range(2):
                found = []
                for left in range(3):
                    x = data.to_float(pixels[:, :, left : left + 16])
                    pair = [stage.moments(each)[0].numpy() for each in (x, x.flip(-1))]
                    if np.allclose(views[i, 2 * crop : 2 * crop + 2], pair, atol=1e-4):
                        found.append(left)
                assert len(found) == 1
                places.append(found[0])
    assert set(places) == {0, 1, 2}
    assert 0 < sum(a != b for a, b in zip(places[::2], places[1::2], strict=True)) < 12


def test_training_draws_among_the_views(images: Path):
    spec = of_folder("tiny-cond", "data.crop=random", "data.flip=true")
    folder = written(spec, crops=2)
    stage = stage_of(spec)
    drawn = sources.Cached(spec, stage).batch(np.full(400, 5), generator())
    views = torch.from_numpy(np.load(folder / "moments-000001.npy")[0]) * stage.scale
    assert len(views.unique(dim=0)) == 4
    distances = torch.stack([(views - x).abs().flatten(1).sum(1) for x in drawn])
    assert not distances.min(1).values.any()
    counts = Counter(distances.argmin(1).tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 60  # 100 expected, 8.7 is the deviation


def test_images_per_run_of_the_encoder_change_nothing(images: Path):
    """Where random crops lie must not depend on how many images fit into memory."""
    spec = of_folder("tiny-cond", "data.crop=random")
    made = []
    for batch in (2, 5):
        folder = written(spec, batch=batch, crops=2)
        made.append(np.concatenate([np.load(path) for path in sorted(folder.glob("moments-*.npy"))]))
        shutil.rmtree(folder)
    np.testing.assert_allclose(*made, atol=1e-5)


def test_crops_of_images_that_are_cropped_in_the_centre(images: Path):
    assert message(lambda: prepare(of_folder("tiny-ldm"), crops=2)).startswith("--crops 2: the images of ")


# in pieces


def test_only_what_is_missing_is_encoded(images: Path):
    spec = of_folder("tiny-ldm")
    folder = written(spec)
    before, whole = shards(folder), contents(folder)
    assert sorted(before) == ["moments-000000.npy", "moments-000001.npy", "moments-000002.npy"]
    (folder / "moments-000001.npy").unlink()
    assert written(spec) == folder
    after = shards(folder)
    assert [name for name in after if after[name] != before[name]] == ["moments-000001.npy"]
    assert contents(folder) == whole


def test_a_cache_that_is_not_whole_is_refused(images: Path, bdm: Bdm, tiny_ldm_teacher: Path):
    """What a kill leaves: the plan and some files. Training does not silently go on with the images."""
    spec = of_folder("tiny-ldm")
    folder = written(spec)
    (folder / "cache.json").unlink()
    (folder / "moments-000002.npy").unlink()
    text = message(lambda: sources.of_recipe(spec, torch.device("cpu")))
    assert text == (
        f"the latent cache {folder} is not whole.\n"
        "  go on with: bdm data prepare --recipe tiny-ldm, or remove the folder"
    )
    given = ["-r", str(RECIPES / "tiny-ldm.toml")]
    for key in ("data.dataset=folder", "data.path=images", "data.prepare=bilinear-crop", "train.batch=4"):
        given += ["-s", key]
    code, _, err = bdm("train", *given)
    assert code == 2
    assert "is not whole" in err
    code, out, err = bdm("data", "prepare", *given, "-f", "json")
    assert code == 0, err
    assert {"What": "Images", "Value": "12"} in json.loads(out)
    code, _, err = bdm("train", *given)
    assert code == 0, err
    assert "12 images' latents from" in err


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_cache_whose_files_are_damaged(images: Path, damage: str):
    """A BdmError that says what to do, at the latest when the file is read."""
    spec = of_folder("tiny-ldm")
    path = written(spec) / "moments-000001.npy"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    text = message(lambda: sources.Cached(spec, stage_of(spec)).batch(np.array([0, 6]), generator()))
    assert "bdm data prepare" in text


def test_a_cache_being_mended_is_not_whole(images: Path):
    """If it is killed in the middle, training must not find the old mark of completeness."""
    spec = of_folder("tiny-ldm")
    folder = written(spec)
    (folder / "moments-000001.npy").unlink()
    seen = []
    written(spec, wait=lambda: seen.append((folder / "cache.json").exists()))
    assert seen == [False, True]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_make_the_files_of_one(images: Path, name: str, home: Path):
    """The second runs while the first waits for it; the mark of completeness comes last."""
    spec = of_folder(name, "data.flip=true")
    folder = written(spec)
    alone = contents(folder)
    shutil.rmtree(folder)
    seen = []

    def other_process() -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        if len(seen) == 1:
            written(spec, rank=1, world=2)

    assert written(spec, rank=0, world=2, wait=other_process) == folder
    assert seen[0] == ["moments-000000.npy", "moments-000002.npy", "plan.json"]
    assert "cache.json" in seen[1]
    assert contents(folder) == alone


def test_16_bit_floats(images: Path):
    spec = of_folder("tiny-ldm")
    folder = written(spec)
    size = sum(path.stat().st_size for path in folder.glob("moments-*.npy"))
    exact = sources.Cached(spec, stage_of(spec)).batch(np.arange(12), generator())
    assert "dtype: 'float32' there, 'float16' wanted" in message(lambda: written(spec, half=True))
    shutil.rmtree(folder)
    written(spec, half=True)
    assert np.load(folder / "moments-000000.npy").dtype == np.float16
    assert sum(path.stat().st_size for path in folder.glob("moments-*.npy")) < 0.6 * size
    rounded = sources.Cached(spec, stage_of(spec)).batch(np.arange(12), generator())
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.01


# another one


OTHERS = {
    "flip": ("tiny-ldm", ["data.flip=true"], "flip: False there, True wanted"),
    "crop": ("tiny-ldm", ["data.crop=random"], "crop: 'centre' there, 'random' wanted"),
    "preparation": ("tiny-ldm", ["data.prepare=box-crop"], "prepare: 'bilinear-crop' there, 'box-crop' wanted"),
    "first stage": ("tiny-cond", ["data.latents=data/digits-ldm-latents"], "first_stage: "),
    "data set": ("tiny-ldm", ["data.dataset=digits", "data.prepare=none"], "dataset: 'folder' there, 'digits' wanted"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_of_something_else_is_refused(images: Path, name: str):
    """By training and by preparing."""
    folder = written(of_folder("tiny-ldm"))
    before = contents(folder)
    recipe_name, overrides, text = OTHERS[name]
    spec = of_folder(recipe_name, *overrides)
    for call in (
        lambda: sources.of_recipe(spec, torch.device("cpu")),
        lambda: prepare(spec, 1 if spec.data.crop == "random" else None),
    ):
        error = message(call)
        assert error.startswith(f"the latent cache {folder} is of something else:\n")
        assert text in error
        assert "--set data.latents=PATH" in error
    assert contents(folder) == before


def test_a_first_stage_with_another_scaling_factor_is_another(images: Path, home: Path):
    spec = of_folder("tiny-ldm")
    shutil.copytree(locate(spec.first_stage.path), home / "stage")
    moved = of_folder("tiny-ldm", "first_stage.path=stage")
    written(spec)
    Cache(moved)
    config = json.loads((home / "stage" / "config.json").read_text())
    (home / "stage" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert "first_stage: " in message(lambda: Cache(moved))


def test_what_else_lies_in_the_first_stages_folder(images: Path, home: Path):
    """huggingface_hub keeps a folder .cache in what it downloads."""
    spec = of_folder("tiny-ldm")
    written(spec)
    shutil.copytree(locate(spec.first_stage.path), home / "stage")
    (home / "stage" / ".cache" / "huggingface").mkdir(parents=True)
    Cache(of_folder("tiny-ldm", "first_stage.path=stage"))


def test_other_images_at_the_same_place_are_refused(images: Path):
    spec = of_folder("tiny-ldm")
    written(spec)
    next(iter(sorted(images.rglob("*.png")))).unlink()
    assert "n_images: 12 there, 11 wanted" in message(lambda: prepare(spec))


def test_another_folder_of_images_is_refused(images: Path, home: Path):
    """A folder's name does not fix what is in it, as a published data set's does."""
    written(of_folder("tiny-ldm"))
    shutil.copytree(images / "a", home / "others" / "a")
    spec = of_folder("tiny-ldm", path="others")
    message(lambda: sources.of_recipe(spec, torch.device("cpu")))


# a cache for a network that is told something


def bare(images: Path) -> None:
    """The images lie in no class folders any more."""
    for path in list(images.rglob("*.png")):
        path.rename(images / path.name)
    for folder in images.iterdir():
        if folder.is_dir():
            folder.rmdir()


def test_a_cache_without_classes_for_a_network_that_is_told_one(images: Path):
    bare(images)
    written(of_folder("tiny-cond", *UNCONDITIONAL))
    text = message(lambda: train.real_batches(of_folder("tiny-cond"), seed=0)[0](0))
    assert "class" in text


def test_a_cache_with_more_classes_than_the_network_knows(images: Path):
    for path in list(images.rglob("*.png")):
        (images / path.stem).mkdir()
        path.rename(images / path.stem / path.name)
    for name in "abc":
        (images / name).rmdir()
    written(of_folder("tiny-cond", "unet.n_classes=13"))
    assert Cache(of_folder("tiny-cond", "unet.n_classes=13")).labels.max() == 11
    text = message(lambda: [train.real_batches(of_folder("tiny-cond"), seed=0)[0](step) for step in range(3)])
    assert "class" in text


def test_a_cache_without_captions_for_a_network_that_is_told_one(home: Path):
    """The images have captions: the network is not silently trained on the empty text."""
    pipelines.text_pipeline(home / "mine")
    captions = pipelines.captioned_images(home / "images")
    file = pipelines.text_recipe(home / "r.toml", "mine", "images")
    written(recipe.load(file, ["unet.kind=UNet2DModel"]))
    try:
        source = sources.of_recipe(recipe.load(file), torch.device("cpu"))
    except BdmError as error:
        assert "caption" in str(error)  # noqa: PT017
    else:
        assert source.known(np.array([3])) == [captions[3]]


# training


def test_training_needs_no_images_once_they_are_encoded(bdm: Bdm, home: Path, images: Path, tiny_ldm_teacher: Path):
    given = ["-r", str(RECIPES / "tiny-ldm.toml"), "-s", "train.log_every=1"]
    for key in ("data.dataset=folder", "data.path=images", "data.prepare=bilinear-crop", "data.flip=true"):
        given += ["-s", key]
    assert bdm("train", *given, "--seed", "0")[0] == 0
    assert bdm("data", "prepare", *given)[0] == 0
    shutil.rmtree(images)
    code, out, err = bdm("train", *given, "--seed", "1")
    assert code == 0, err
    path = Path(out.strip())
    code, _, err = bdm("train", *given, "--resume", "--seed", "1")
    assert (code, "finished already" in err) == (0, True)
    assert path.exists()
    # the same seed, from images and from the cache: the same first loss
    log = next(home.glob("runs/*-s0/metrics.jsonl"))
    losses = runs.read_lines(log)
    shutil.rmtree(log.parent)
    assert bdm("train", *given, "--seed", "0")[0] == 0
    again = runs.read_lines(log)
    assert again[0]["loss_simple"] == pytest.approx(losses[0]["loss_simple"], rel=1e-4)


def test_pixels_are_not_encoded(bdm: Bdm):
    code, _, err = bdm("data", "prepare", "-r", "digits")
    assert code == 2
    assert "trains on pixels" in err


def test_a_place_that_cannot_be_written(images: Path):
    (home() / "file").write_text("not a folder")
    assert "cannot write" in message(lambda: prepare(of_folder("tiny-ldm", "data.latents=file/latents")))
