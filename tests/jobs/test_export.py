"""`bdm export`, `bdm inspect` and `bdm sample --packed` through the real entry point, and each of their refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pipelines
import pytest
import students
import torch
from conftest import RECIPES, Bdm
from PIL import Image

from bdm_cli import recipe, runs, student
from bdm_cli.packed import pack
from bdm_cli.recipe import Recipe

TINY = str(RECIPES / "tiny-w1a4.toml")
TinyRecipe = Callable[..., Recipe]


@pytest.fixture
def run(tiny_recipe: TinyRecipe) -> str:
    """The id of a finished run of tiny-w1a4."""
    spec = tiny_recipe()
    return students.run_of(spec, students.finished(spec))


@pytest.fixture
def file(run: str, bdm: Bdm, tmp_path: Path) -> Path:
    """It in packed form."""
    path = tmp_path / "m.safetensors"
    code, _, err = bdm("export", run, "-o", str(path))
    assert code == 0, err
    return path


def same_images(one: Path, other: Path, exact: bool) -> None:
    """Equal, or (where sums are rounded) equal up to one grey level but for a few pixels."""
    with np.load(one) as a, np.load(other) as b:
        assert a.files == b.files
        if "arr_1" in a:
            np.testing.assert_array_equal(a["arr_1"], b["arr_1"])
        difference = np.abs(a["arr_0"].astype(int) - b["arr_0"])
        assert a["arr_0"].std() > 1
    assert difference.max() == 0 if exact else (difference > 1).mean() < 0.01


# the whole path


KINDS = {
    "pixels": ("tiny-w1a4", [], True),
    "real activations": ("tiny-w1a4", ["method.activation_bits=32"], True),
    "two bases": ("tiny-w1a4", ["method.ebb_scope=2", "sample.eta=0"], False),
    "latents, plms": ("tiny-ldm", ["sample.sampler=plms", "sample.eta=0", "sample.steps=4"], True),
    "classes, guided": ("tiny-cond", ["sample.guidance=2", "method.attention_matmul=true"], True),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_model_draws_the_images_of_its_run(
    name: str, kernel: str, tiny_recipe: TinyRecipe, bdm: Bdm, tmp_path: Path
):
    kind, overrides, evolved = KINDS[name]
    spec = tiny_recipe(*overrides, name=kind)
    run = students.run_of(spec, students.finished(spec, evolved), step=None if evolved else 0)
    sampling = [part for text in overrides if text.startswith("sample.") for part in ("-s", text)]
    code, simulated, err = bdm("sample", "--run", run, *sampling)
    assert code == 0, err
    path = tmp_path / "m.safetensors"
    code, out, err = bdm("export", run, "-o", str(path), *sampling, "-f", "json")
    assert code == 0, err
    (told,) = json.loads(out)
    assert told["Size (MiB)"] == pytest.approx(path.stat().st_size / 2**20, abs=1e-3)
    runs.weights(run).unlink()  # from nothing but the packed file
    code, drawn, err = bdm("sample", "--packed", str(path), *sampling)
    assert code == 0, err
    assert Path(drawn.strip()).is_relative_to(tmp_path / f"m-{pack.digest(pack.read(path))[:8]}")
    assert Image.open(Path(drawn.strip()).parent / "grid.png").width > 8 * 16
    same_images(Path(simulated.strip()), Path(drawn.strip()), exact=name != "real activations")


def test_a_text_conditional_model(bdm: Bdm, tmp_path: Path):
    pipelines.text_pipeline(tmp_path / "mine")
    pipelines.text_encoder(tmp_path / "mine")
    file = pipelines.text_recipe(tmp_path / "text.toml", tmp_path / "mine", "images")
    spec = recipe.load(file)
    run = students.run_of(spec, students.finished(spec))
    prompts = ["-s", "sample.prompts=['a bed', 'a church']"]
    simulated = bdm("sample", "--run", run, *prompts)
    assert simulated[0] == 0, simulated[2]
    assert bdm("export", run, "-o", str(tmp_path / "m.safetensors"))[0] == 0
    code, out, err = bdm("sample", "--packed", str(tmp_path / "m.safetensors"), *prompts)
    assert code == 0, err
    same_images(Path(simulated[1].strip()), Path(out.strip()), exact=True)


def test_a_trained_run_by_id_by_recipe_and_by_file(bdm: Bdm, tiny_teacher: Path, tmp_path: Path):
    assert bdm("train", "-r", TINY)[0] == 0
    weights = runs.weights("tiny-w1a4-s0")
    ways = (["tiny-w1a4-s0"], ["--recipe", TINY], ["--recipe", TINY, "--seed", "0"], [str(weights)])
    found = []
    for number, given in enumerate(ways):
        path = tmp_path / f"{number}.safetensors"
        code, _, err = bdm("export", *given, "-o", str(path))
        assert code == 0, err
        found.append(pack.read(path))
    assert len({pack.digest(packed) for packed in found[:3]}) == 1
    trained = student.load(weights)
    for header, tensors, _ in found:
        assert (header.step, header.seed, header.random) == (trained.step, 0, False)
        assert header.recipe.method == trained.recipe.method
        assert all(np.array_equal(tensors[name], tensor) for name, tensor in found[0].tensors.items())
    assert found[3].header.recipe == trained.recipe


def test_settings_of_the_sampling_ride_along(run: str, bdm: Bdm, tmp_path: Path):
    """--set sample.* on export becomes what `bdm sample --packed` does if it is told nothing."""
    path = tmp_path / "m.safetensors"
    assert bdm("export", run, "-o", str(path), "-s", "sample.steps=5", "-s", "sample.n_images=3")[0] == 0
    code, out, _ = bdm("sample", "--packed", str(path))
    assert code == 0
    assert Path(out.strip()).parent.name == "ddim5-eta1-round"
    assert np.load(Path(out.strip()))["arr_0"].shape == (3, 16, 16, 1)


def test_options_of_the_sampling(file: Path, bdm: Bdm, tmp_path: Path):
    out = tmp_path / "elsewhere"
    options = ["--sampler", "plms", "--steps", "3", "-s", "sample.eta=0", "-n", "5", "--out", str(out)]
    made = {}
    for seed in ((), ("--seed", "0"), ("--seed", "7")):
        code, text, err = bdm("sample", "--packed", str(file), *options, *seed)
        assert code == 0, err
        made[seed] = Path(text.strip())
    assert made[()] == made["--seed", "0"] != made["--seed", "7"]
    assert all(path.is_relative_to(out) for path in made.values())
    assert "seed7" in made["--seed", "7"].parts
    images = [np.load(path)["arr_0"] for path in (made[()], made["--seed", "7"])]
    assert (images[0] != images[1]).any()
    code, _, err = bdm("sample", "--packed", str(file), *options)
    assert code == 0
    assert "5 images are there already" in err


def test_fast_sampling_has_a_folder_of_its_own_and_nearly_the_same_images(file: Path, run: str, bdm: Bdm):
    made = []
    for options in ((), ("--fast",)):
        code, text, err = bdm("sample", "--packed", str(file), "-n", "8", *options)
        assert code == 0, err
        made.append(Path(text.strip()))
    assert made[1].parents[1].name == f"{made[0].parents[1].name}-fast"
    exact, fast = (np.load(path)["arr_0"].astype(int) for path in made)
    assert exact.shape == fast.shape
    assert np.abs(exact - fast).mean() < 10  # grey levels; images of other noise differ by far more
    assert np.abs(exact - exact[::-1]).mean() > 20
    code, _, err = bdm("sample", "--run", run, "--fast")
    assert code == 2
    assert "--fast is for --packed" in err


def test_another_model_under_the_same_name_gets_images_of_its_own(file: Path, run: str, bdm: Bdm):
    first = bdm("sample", "--packed", str(file), "-n", "2")[1]
    file.unlink()
    assert bdm("export", run, "-o", str(file), "--half")[0] == 0
    assert bdm("sample", "--packed", str(file), "-n", "2")[1] != first


def test_random_weights_are_marked(bdm: Bdm, tmp_path: Path):
    """No teacher is needed."""
    path = tmp_path / "m.safetensors"
    code, out, err = bdm("export", "--recipe", TINY, "--random", "-o", str(path), "-f", "json")
    assert code == 0, err
    assert json.loads(out)[0]["Times smaller"] > 1
    assert "random weights, to measure size and speed" in err
    assert pack.read(path).header.random
    rows = {row["key"]: row["value"] for row in json.loads(bdm("inspect", str(path), "-f", "json")[1])}
    assert rows["weights"] == "RANDOM, to measure size and speed"
    code, _, err = bdm("sample", "--packed", str(path), "-n", "2")
    assert code == 0
    assert "m.safetensors: its weights are random; the images show nothing" in err


# inspect


def test_inspect_accounts_for_every_byte(file: Path, bdm: Bdm):
    code, out, err = bdm("inspect", str(file), "-f", "json")
    assert code == 0, err
    rows = {row["key"]: row["value"] for row in json.loads(out)}
    assert rows["recipe"] == "tiny-w1a4"
    assert rows["weights"] == "after 6 training steps"
    assert rows["layers, weights of 8 bits"] == "4"
    size = file.stat().st_size
    parts = [int(text.split()[0].replace(",", "")) for key, text in rows.items() if key.startswith("bytes, ")]
    assert sum(parts) == 2 * size  # all of them, and their sum
    assert rows["bytes, all"].startswith(f"{size:,} = ")
    layers = json.loads(bdm("inspect", str(file), "--layers", "-f", "json")[1])
    assert {row["Weights"] for row in layers} == {"1 bit", "8 bits"}
    assert len(layers) == 4 + int(rows["layers, weights of 1 bit"])
    first = layers[0]
    assert (first["Layer"], first["Kind"], first["Inputs"], first["Outputs"]) == ("conv_in", "conv 3x3", 1, 8)
    assert first["Input levels"] == "-128..127"


@pytest.mark.parametrize("form", ["table", "csv", "md", "latex"])
def test_inspect_in_all_forms(form: str, bdm: Bdm, tiny_recipe: TinyRecipe, tmp_path: Path):
    spec = tiny_recipe("method.attention_matmul=true", "method.edge_bits=32", "method.ebb_scope=1", name="tiny-cond")
    path = tmp_path / "m.safetensors"
    pack.write(path, students.packed(spec, students.finished(spec, evolved=False), half=True))
    for further in ([], ["--layers"]):
        code, out, err = bdm("inspect", str(path), "-f", form, *further)
        assert code == 0, err
        assert "1 bit, 2 bases" in out
    assert "fp16" in bdm("inspect", str(path), "-f", form)[1]


# what is refused


def test_mistakes_in_what_is_given(run: str, file: Path, bdm: Bdm, home: Path, tmp_path: Path):
    new = str(tmp_path / "new.safetensors")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    (home / "runs" / "tiny-w1a4-s9").mkdir()
    mistakes = [
        (["export", run, "-o", str(file)], f"{file} exists.\n  remove it, or give another --out"),
        (["export", run, "-o", str(tmp_path / "no" / "m")], f"there is no folder {tmp_path / 'no'}."),
        (["export", run, "-o", str(blocked / "m")], f"there is no folder {blocked}."),
        (["export", "-o", new], "give either RUN or --recipe NAME"),
        (["export", run, "-r", TINY, "-o", new], "give either RUN or --recipe NAME"),
        (["export", run, "-m", "lsq", "-o", new], "--method is for --recipe; a run has its own."),
        (["export", "tiny-w1a4-s1", "-o", new], "unknown finished run 'tiny-w1a4-s1'. Did you mean 'tiny-w1a4-s0'?"),
        (["export", "tiny-w1a4-s9", "-o", new], "was started and has not finished"),
        (["export", "nowhere.safetensors", "-o", new], "there is no file nowhere.safetensors."),
        (["export", str(file), "-o", new], f"{file} is packed already."),
        (
            ["export", run, "-o", new, "-s", "method.ebb_scope=1"],
            "'method.ebb_scope' was fixed when the run was trained",
        ),
        (["export", str(runs.weights(run)), "-o", new, "-s", "train.lr=1"], "'train.lr' was fixed when"),
        (["export", run, "--random", "-o", new], "--random takes a recipe alone."),
        (["export", "-r", TINY, "-m", "fp", "--random", "-o", new], "method 'fp' quantizes no layer"),
        (["inspect", new], f"there is no file {new}."),
        (["inspect", str(runs.weights(run))], "it is a model of bdm, not packed yet: bdm export"),
        (["inspect", str(blocked)], "is not a whole safetensors file"),
        (["sample", "--packed", new], f"there is no file {new}."),
        (["sample", "--packed", str(file), "--run", run], "--packed is a model of its own."),
        (["sample", "--packed", str(file), "-r", TINY], "--packed is a model of its own."),
        (["sample", "--packed", str(file), "-s", "method.ebb_scope=1"], "'method.ebb_scope' was fixed"),
        (["sample", "--packed", str(file), "-s", "unet.name=x"], "'unet.name' was fixed"),
        (["sample", "--packed", str(file), "--out", str(blocked)], f"cannot write the directory {blocked}"),
        (["sample", "--packed", str(file), "--guidance", "2"], "nothing can guide it"),
        (["sample", "--run", run, "--out", "x"], "--out is for --packed"),
    ]
    for arguments, told in mistakes:
        code, out, err = bdm(*arguments)
        assert (code, out) == (2, ""), arguments
        assert "bdm: " in err
        assert told in err, err
        assert "Traceback" not in err
    assert not Path(new).exists()


def test_a_first_stage_that_is_not_there(bdm: Bdm, tiny_recipe: TinyRecipe, tmp_path: Path):
    spec = tiny_recipe(name="tiny-ldm")
    path = tmp_path / "m.safetensors"
    pack.write(path, students.packed(spec, students.finished(spec)))
    code, _, err = bdm("sample", "--packed", str(path), "-s", "first_stage.path=nowhere")
    assert code == 2
    assert "first_stage.path: there is no folder" in err


def test_steps_are_for_the_sampler_they_were_made_for(bdm: Bdm, tiny_recipe: TinyRecipe, tmp_path: Path):
    spec = tiny_recipe("sample.steps=4")
    packed = students.packed(spec, students.finished(spec))
    listed = np.array([750.0, 500.0, 250.0, 0.0], np.float32)
    tensors = packed.tensors | {"conv_in.step": torch.rand(4) + 0.1, pack.TIMES: torch.from_numpy(listed)}
    path = tmp_path / "m.safetensors"
    pack.write(path, packed._replace(tensors=tensors))
    assert bdm("sample", "--packed", str(path), "-n", "2")[0] == 0
    assert "750, 500, 250, 0" in bdm("inspect", str(path))[1]
    code, _, err = bdm("sample", "--packed", str(path), "-n", "2", "--steps", "5")
    assert code == 2
    assert "has steps for 4 sampling times alone" in err
