"""What conditional networks are told: classes dealt to images, hidden ones in training, guidance, and `bdm sample`."""

import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECIPES, Bdm, random_teacher
from PIL import Image
from torch import Tensor, nn

from bdm_cli import places, recipe, runs, student
from bdm_cli.diffusion import conditions, data
from bdm_cli.diffusion.conditions import Classes, Condition, Text, dealt
from bdm_cli.diffusion.models import estimate_noise
from bdm_cli.diffusion.sampling import guided, noise_streams
from bdm_cli.errors import BdmError
from bdm_cli.jobs import train
from bdm_cli.recipe import Recipe

COND, LDM, PIXELS = (str(RECIPES / f"{name}.toml") for name in ("tiny-cond", "tiny-ldm", "tiny-w1a4"))

# who gets what


@pytest.mark.parametrize("choices", [1, 2, 10, 1000])
def test_every_block_of_images_gets_every_choice_once(choices: int):
    found = dealt(choices, range(3 * choices), seed=0)
    assert found.dtype == np.int64
    for block in found.reshape(3, choices):
        assert sorted(block) == list(range(choices))


@pytest.mark.parametrize(("choices", "n"), [(10, 24), (7, 50), (3, 1)])
def test_shares_are_equal_wherever_one_stops(choices: int, n: int):
    shares = np.bincount(dealt(choices, range(n), seed=4), minlength=choices)
    assert shares.max() - shares.min() <= 1


def test_what_an_image_gets_depends_on_seed_and_index_alone():
    everything = dealt(10, range(100), seed=3)
    for indices in (range(5), range(37), range(13, 29), range(99, 100), range(20, 20)):
        assert np.array_equal(dealt(10, indices, seed=3), everything[indices.start : indices.stop])


def test_orders_differ_between_blocks_and_seeds():
    blocks = [tuple(row) for seed in range(4) for row in dealt(10, range(50), seed).reshape(5, 10)]
    assert len(set(blocks)) == 20
    firsts = Counter(int(dealt(10, range(1), seed)[0]) for seed in range(200))
    assert len(firsts) == 10


def test_what_an_image_gets_is_independent_of_its_noise():
    """Both are made from (seed, index): the streams must not be the same."""
    stream = noise_streams(5, range(1))[0].permutation(1000)
    assert not np.array_equal(stream, dealt(1000, range(1000), seed=5))


# classes


def test_all_classes_but_the_one_that_stands_for_none():
    told = Classes(n_classes=4)
    labels = told.labels(range(30), seed=0)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [10, 10, 10]
    (ids,) = told.of_images(range(30), seed=0)
    assert ids.dtype == torch.int64
    assert ids.tolist() == labels.tolist()
    assert [part.tolist() for part in told.none(2)] == [[3, 3]]


def test_chosen_classes_in_equal_shares():
    labels = Classes(n_classes=11, chosen=(7, 3)).labels(range(40), seed=1)
    assert np.bincount(labels, minlength=10)[[3, 7]].tolist() == [20, 20]
    assert len(set(map(tuple, labels.reshape(20, 2)))) == 2  # the order changes


def test_a_hidden_class_is_the_one_that_stands_for_none():
    told = Classes(n_classes=11, chosen=(7, 3))  # choices for samples are no matter of training
    dropped = torch.tensor([False, True, False, True])
    (ids,) = told.of_training(np.array([9, 9, 0, 0]), dropped)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [9, 10, 0, 10]


def test_an_unconditional_network_is_told_nothing():
    told = Condition()
    assert told.of_training(None, torch.zeros(3, dtype=torch.bool)) == ()
    assert (told.of_images(range(3), 0), told.none(3), told.labels(range(3), 0)) == ((), (), None)


def test_text_without_an_encoder_is_zeros():
    told = Text(None, width=5)
    for (rows,) in (
        told.of_training(["a", "b"], torch.tensor([False, True])),
        told.of_training(None, torch.zeros(2, dtype=torch.bool)),
        told.of_images(range(2), 0),
        told.none(2),
    ):
        assert torch.equal(rows, torch.zeros(2, 1, 5))
    with pytest.raises(BdmError, match="no text encoder to read them"):
        Text(None, width=5, prompts=["a cat"])


def test_training_tells_the_labels_of_its_images_and_hides_a_share(tiny_recipe: Callable[..., Recipe]):
    """Over 40 batches of 8: labels are the digits', 30 % are hidden; unconditional training draws no less."""
    spec = tiny_recipe("train.drop_condition=0.3", "first_stage.train.batch=8", name="tiny-cond")
    labels = data.training_images(spec).labels
    batches = train.real_batches(spec, seed=0)[0]
    hidden = 0
    for step in range(40):
        (_, _, classes), *_ = batches(step)
        known = labels[data.batch_indices(len(labels), 8, step, 0)]
        assert all(told in (10, real) for told, real in zip(classes.tolist(), known, strict=True))
        hidden += int((classes == 10).sum())
    assert 65 <= hidden <= 127  # 96 expected, 8.2 is the deviation

    plain = train.real_batches(tiny_recipe("train.drop_condition=0", name="tiny-cond"), seed=0)[0]
    with_drops, without = batches(0), plain(0)
    assert torch.equal(with_drops.inputs[0], without.inputs[0])
    assert without.inputs[2].tolist() == labels[data.batch_indices(len(labels), 8, 0, 0)].tolist()


# guidance


class Told(nn.Module):
    """Estimates sin(class + t) x; notes the size of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor, t: Tensor, classes: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.sizes.append(len(x))
        return (x * torch.sin(classes.double() + t)[:, None, None, None],)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5, 3.0])
def test_guidance_is_its_formula(scale: float):
    """e_u + s (e_c - e_u), each image with its own class and time."""
    random = np.random.default_rng(0)
    x, t, classes = random.standard_normal((4, 2, 3, 3)), np.array([0.5, 2.0, 9.0, 1.0]), np.array([1, 2, 3, 1])
    e_told, e_untold = (x * np.sin(c + t)[:, None, None, None] for c in (classes, np.full(4, 10)))
    network = Told()
    estimate = guided(network, (torch.tensor(classes),), (torch.full((4,), 10),), scale)
    found = estimate(torch.tensor(x), torch.tensor(t))
    np.testing.assert_allclose(found, e_untold + scale * (e_told - e_untold), rtol=1e-12)
    assert network.sizes == [4 if scale == 1 else 8]


def test_guidance_on_a_real_network(tiny_recipe: Callable[..., Recipe], tiny_cond_teacher: Path):
    unet = student.build(tiny_recipe(name="tiny-cond", method="fp"), seed=0).student.eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        x, t = torch.randn(3, 3, 8, 8, generator=random), torch.tensor([5, 300, 900])
        told, untold = torch.tensor([0, 4, 9]), torch.full((3,), 10)
        e_told, e_untold = (estimate_noise(unet, x, t, classes) for classes in (told, untold))
        assert float((e_told - e_untold).abs().max()) > 1e-3
        found = guided(unet, (told,), (untold,), 2.5)(x, t)
    assert torch.allclose(found, e_untold + 2.5 * (e_told - e_untold), atol=1e-5)


# bdm sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a trained tiny-cond."""
    folder = tmp_path_factory.mktemp("trained")
    with places.home_at(str(folder)):
        spec = recipe.load(COND)
        random_teacher(spec)
        train.run(spec)
    return folder


@pytest.fixture
def sampled(trained: Path, home: Path, bdm: Bdm) -> Callable[..., tuple[Path, np.ndarray, np.ndarray]]:
    """sampled(*arguments) -> the npz of `bdm sample`, its images and its labels; the trained run is in `home`."""
    shutil.copytree(trained, home, dirs_exist_ok=True)

    def run(*arguments: str) -> tuple[Path, np.ndarray, np.ndarray]:
        code, out, err = bdm("sample", "-r", COND, *arguments)
        assert code == 0, err
        path = Path(out.strip())
        with np.load(path) as arrays:
            return path, arrays["arr_0"], arrays["arr_1"]

    return run


def test_samples_come_with_their_classes(sampled):
    path, images, labels = sampled()
    assert images.shape == (24, 16, 16, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == dealt(10, range(24), seed=0).tolist()
    assert np.bincount(labels, minlength=10).min() == 2
    assert sorted(p.name for p in path.parent.iterdir()) == ["grid.png", "lock", "samples-24.npz"]


def test_the_grid_shows_64_images_whatever_the_files_hold(sampled):
    path, _, _ = sampled("-n", "70", "-s", "sample.shard=10")
    assert Image.open(path.parent / "grid.png").size == (8 * 50 + 2, 8 * 50 + 2)


def test_fewer_images_are_the_first_of_more(sampled):
    """Whatever the batches and files they are made in."""
    _, many, labels = sampled("--images", "24")
    for n in (8, 7, 1):
        _, few, own = sampled("--images", str(n), "-s", "sample.shard=5")
        assert few.tobytes() == many[:n].tobytes()
        assert own.tolist() == labels[:n].tolist()


def test_an_image_depends_on_its_class_and_on_guidance(sampled):
    _, threes, labels = sampled("--classes", "3", "-n", "8")
    assert set(labels) == {3}
    _, sevens, _ = sampled("--classes", "7", "-n", "8")
    _, strong, _ = sampled("--classes", "3", "-n", "8", "--guidance", "9")
    _, plain, _ = sampled("--classes", "3", "-n", "8", "--guidance", "1")
    for one, other in itertools.combinations((threes, sevens, strong, plain), 2):
        assert (one != other).any()
    _, both, labels = sampled("--classes", "3,7", "-n", "8")
    assert sorted(labels) == [3] * 4 + [7] * 4
    wanted = np.where((labels == 3)[:, None, None, None], threes, sevens)
    assert np.array_equal(both, wanted)


SPELLINGS = [
    (["--classes", "3,7"], ["sample.classes=[3,7]"]),
    (["--guidance", "2"], ["sample.guidance=2.0"]),
    (["--guidance", "1"], ["sample.guidance=1"]),
    (["--sampler", "plms", "--steps", "4"], ["sample.sampler=plms", "sample.steps=4"]),
    (["--sampler", "dpm-solver"], ["sample.sampler='dpm-solver'"]),
    (["--steps", "5"], ["sample.steps=5"]),
    (["--classes", "1", "--guidance", "0.5", "--images", "9"], ["sample.classes=[1]", "sample.guidance=0.5"]),
]


def test_options_are_short_for_set_and_every_choice_has_its_folder(sampled, bdm: Bdm):
    folders = {sampled("-n", "9")[0].parent}
    for options, settings in SPELLINGS:
        long = itertools.chain(*(("-s", text) for text in [*settings, "sample.n_images=9"]))
        path, _, _ = sampled("--images", "9", *options)
        stamp = path.stat().st_mtime_ns
        code, out, err = bdm("sample", "-r", COND, *long)
        assert (code, out.strip()) == (0, str(path))
        assert "9 images are there already" in err
        assert path.stat().st_mtime_ns == stamp
        code, out, _ = bdm("sample", "--run", "tiny-cond-s0", "--images", "9", *options)
        assert (code, out.strip()) == (0, str(path))
        folders.add(path.parent)
    assert len(folders) == 1 + len(SPELLINGS)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for two processes on CPU")
def test_two_processes_make_the_images_of_one(sampled, home: Path):
    """The real command under torchrun; four files for two processes, the last one not full."""
    given = ["--guidance", "2", "--classes", "0,3,9", "-n", "22", "-s", "sample.shard=6", "-s", "sample.batch=4"]
    path, images, labels = sampled(*given)
    path.rename(home / "one.npz")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "bdm_cli", "sample", "-r", COND, *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert done.stderr.count("22 images in") == 1
    with np.load(path) as arrays:
        assert arrays["arr_0"].tobytes() == images.tobytes()
        assert arrays["arr_1"].tobytes() == labels.tobytes()
    assert not list(path.parent.glob("shard-*"))


def test_every_kind_of_network_has_its_condition():
    assert type(conditions.of_recipe(recipe.load(PIXELS))) is Condition
    assert type(conditions.of_recipe(recipe.load(LDM))) is Condition
    assert type(conditions.of_recipe(recipe.load(COND))) is Classes


ERRORS = {
    "class out of range": ([COND, "--classes", "3,10"], "sample.classes: [10] are out of range; 'tiny-cond' has"),
    "class far out of range": ([COND, "--classes", "99"], "the classes 0..9 (10 stands for no class)"),
    "negative class": ([COND, "--classes", "-1"], "sample.classes.0: input should be greater than or equal to 0"),
    "no class": ([COND, "--classes", "3,,7"], "sample.classes: input should be a valid"),
    "half a class": ([COND, "--classes", "3.5"], "sample.classes.0: input should be a valid integer"),
    "guidance without a condition": ([LDM, "--guidance", "2"], "is unconditional, nothing can guide it"),
    "guidance of pixels": ([PIXELS, "--guidance", "0"], "is unconditional, nothing can guide it"),
    "negative guidance": ([COND, "--guidance", "-2"], "sample.guidance: input should be greater than or equal to 0"),
    "guidance that is no number": ([COND, "--guidance", "nan"], "sample.guidance: input should be a finite number"),
    "eta with plms": ([LDM, "--sampler", "plms"], "sample.eta: is DDIM's; with plms it must be 0 (given 1)"),
    "eta with dpm-solver": ([COND, "--sampler", "dpm-solver", "-s", "sample.eta=0.5"], "must be 0 (given 0.5)"),
    "classes without a condition": ([LDM, "--classes", "1"], "sample.classes: the network 'tiny-ldm' knows no classes"),
    "prompts without text": ([COND, "-s", "sample.prompts=['a']"], "sample.prompts: the network 'tiny-cond' reads no"),
    "unknown sampler": ([COND, "--sampler", "ddpm"], "sample.sampler: input should be 'ddim', 'plms' or 'dpm-solver'"),
    "no steps": ([COND, "--steps", "0"], "sample.steps: input should be greater than or equal to 1"),
    "too many steps": ([COND, "--steps", "1001"], "sample.steps: at most 1000"),
    "no images": ([COND, "--images", "0"], "sample.n_images: input should be greater than or equal to 1"),
    "drops without a condition": ([LDM, "-s", "train.drop_condition=0.1"], "drop_condition: the network 'tiny-ldm'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_message_and_exit_code_2(bdm: Bdm, home: Path, name: str):
    (recipe_path, *arguments), text = ERRORS[name]
    code, out, err = bdm("sample", "-r", recipe_path, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("bdm: ")
    assert text in err
    assert not list(home.iterdir())


def test_mistakes_about_a_finished_run(sampled, bdm: Bdm, home: Path):
    before = sorted(home.rglob("*"))
    for arguments, text in (
        (["--classes", "10"], "are out of range"),
        (["-s", "train.lr=1"], "was fixed when the run was trained"),
        (["-s", "unet.n_classes=12"], "was fixed when the run was trained"),
    ):
        code, _, err = bdm("sample", "--run", "tiny-cond-s0", *arguments)
        assert code == 2
        assert text in err
    assert sorted(home.rglob("*")) == before


def test_a_first_stage_that_has_moved(sampled, bdm: Bdm, home: Path, trained: Path):
    """A place is no part of a run: what was trained with the first stage at one place is sampled from another."""
    shutil.copytree(places.locate(recipe.load(COND).first_stage.path), home / "stage")
    assert bdm("train", "-r", COND, "--seed", "1", "-s", "first_stage.path=stage")[0] == 0
    (home / "stage").rename(home / "elsewhere")
    assert recipe.load(COND, ["first_stage.path=elsewhere"]).run_id(1) == "tiny-cond-s1"
    code, _, err = bdm("sample", "-r", COND, "--seed", "1", "-s", "first_stage.path=elsewhere", "-n", "8")
    assert code == 0, err
    assert runs.weights("tiny-cond-s1").exists()
