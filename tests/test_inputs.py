"""What a recipe lacks, what images a name stands for, and what an evaluation is asked: before anything is started."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bdm_cli import inputs, runs
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe, load

RECIPES = Path(__file__).parent / "recipes"


def test_everything_that_is_missing_is_told_with_its_place_and_source(home: Path):
    told = inputs.missing(load("churches-w1a4"))
    assert [text.split(":")[0] for text in told] == ["training images", "full-precision teacher", "first stage"]
    assert str(home / "models/ldm/churches") in told[1]
    assert "bdm import model.ckpt --model churches" in told[1]
    with pytest.raises(BdmError, match="'churches-w1a4' lacks 3 inputs"):
        inputs.require(load("churches-w1a4"))


def test_images_are_not_missed_once_they_are_encoded(home: Path):
    cache = home / "data" / "churches-latents"
    cache.mkdir(parents=True)
    (cache / "plan.json").write_text("{}")
    assert len(inputs.missing(load("churches"))) == 3
    (cache / "cache.json").write_text("{}")
    assert [text.split(":")[0] for text in inputs.missing(load("churches"))] == [
        "full-precision teacher",
        "first stage",
    ]


def test_methods_without_data_miss_no_images(home: Path):
    told = inputs.missing(load("churches-w4a4-efficientdm"))
    assert [text.split(":")[0] for text in told] == ["full-precision teacher", "first stage"]


@pytest.mark.parametrize(("name", "more"), [("bedrooms", 1), ("imagenet", 1), ("churches", 0), ("digits", 0)])
def test_the_reference_is_told_only_for_the_evaluation(home: Path, name: str, more: int):
    spec = load(name)
    told = inputs.missing(spec, evaluation=True)
    assert len(told) == len(inputs.missing(spec)) + more
    if more:
        assert "VIRTUAL_" in told[-1]
        (home / spec.evaluate.reference).parent.mkdir(parents=True)
        (home / spec.evaluate.reference).touch()
        assert inputs.missing(spec, evaluation=True) == inputs.missing(spec)


def test_a_hub_id_is_not_missed(home: Path):
    spec = load("bedrooms", ["model.pretrained=owner/name"])
    assert [text.split(":")[0] for text in inputs.missing(spec)] == ["training images", "first stage"]


# what a name stands for


def finished(
    name: str, *overrides: str, method: str | None = None, seed: int = 0, sampled: bool = True
) -> tuple[str, Recipe]:
    """The id and recipe of a run that has weights, and images unless told otherwise."""
    spec = load(name, overrides, method)
    run_id = spec.run_id(seed)
    runs.write_text(runs.recipe_copy(run_id), spec.model_dump_json())
    runs.weights(run_id).touch()
    if sampled:
        runs.write_text(runs.samples_npz(spec, run_id), "")
    return run_id, spec


@pytest.fixture
def images(tmp_path: Path) -> str:
    """A file of images, which nobody reads here."""
    (tmp_path / "images.npz").touch()
    return str(tmp_path / "images.npz")


def message(call: Callable[[], object]) -> str:
    with pytest.raises(BdmError) as error:
        call()
    return str(error.value)


def test_a_run_is_named_by_its_id_or_its_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_id, spec = finished("digits-w1a4", seed=3)
    monkeypatch.chdir(tmp_path)
    for text in (run_id, str(runs.run_dir(run_id)), f"home/runs/{run_id}", f"./home/runs/{run_id}/"):
        found = inputs.source(text)
        assert found == inputs.Source(run_id, runs.samples_npz(spec, run_id), spec, run_id), text


def test_a_run_is_known_under_a_home_that_is_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BDM_HOME")
    run_id, _ = finished("digits-w1a4")
    for text in (run_id, f"runs/{run_id}", str(tmp_path / "runs" / run_id)):
        assert inputs.source(text).run_id == run_id, text


def test_a_run_may_have_several_sets_of_images():
    run_id, spec = finished("digits-w1a4")
    assert "has no images at" in message(lambda: inputs.source(run_id, ["sample.steps=7"]))
    other = load("digits-w1a4", ["sample.steps=7"])
    runs.write_text(runs.samples_npz(other, run_id), "")
    found = inputs.source(run_id, ["sample.steps=7"])
    assert found.path == runs.samples_npz(other, run_id) != runs.samples_npz(spec, run_id)
    assert found.recipe.id == "digits-w1a4+sample.steps=7"


def test_a_run_without_images_says_how_to_make_them():
    run_id, spec = finished("digits-w1a4", sampled=False)
    told = message(lambda: inputs.source(run_id))
    assert told.startswith(f"run '{run_id}' has no images at {runs.samples_npz(spec, run_id)}.\n")
    assert f"bdm sample --run {run_id}" in told


def test_what_was_fixed_by_the_training_cannot_be_set():
    run_id, _ = finished("digits-w1a4")
    assert "'train.lr' was fixed when the run was trained" in message(lambda: inputs.source(run_id, ["train.lr=1"]))


@pytest.mark.parametrize("name", ["digits", "digits-w1a4", str(RECIPES / "tiny.toml")])
def test_a_recipe_stands_for_its_data_set(name: str):
    found = inputs.source(name, ["evaluate.n_reference=7"])
    assert (found.text, found.path, found.run_id) == (name, None, None)
    assert found.recipe == load(name, ["evaluate.n_reference=7"])


def test_a_folder_called_like_a_recipe_is_written_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert inputs.source("digits").path is None
    for text in ("./digits", str(tmp_path / "digits"), "digits/"):
        assert inputs.source(text) == inputs.Source(text, Path(text)), text


def test_a_file_called_like_a_run_is_written_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_id, _ = finished("digits-w1a4")
    monkeypatch.chdir(tmp_path)
    (tmp_path / run_id).mkdir()
    assert inputs.source(run_id).run_id == run_id
    assert inputs.source(f"./{run_id}") == inputs.Source(f"./{run_id}", Path(run_id))


def test_everything_else_is_files(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inputs.source(images) == inputs.Source(images, Path(images))
    assert inputs.source("images.npz") == inputs.Source("images.npz", Path("images.npz"))
    assert inputs.source("~/images.npz").path == tmp_path / "images.npz"


def test_a_recipe_file_below_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(RECIPES))
    assert inputs.source("~/tiny.toml").recipe.name == "tiny"


def test_names_that_stand_for_nothing_are_told_with_the_nearest(tmp_path: Path):
    told = message(lambda: inputs.source("churches-w1a5"))
    assert told.startswith("there are no images called 'churches-w1a5'. Did you mean 'churches-w1a4'?\n")
    assert "a finished run (there is none yet)" in told
    finished("digits-w1a4", seed=7)
    told = message(lambda: inputs.source("digits-w1a4-s6"))
    assert told.startswith("there are no images called 'digits-w1a4-s6'. Did you mean 'digits-w1a4-s7'?\n")
    assert "allowed: an npz, a folder, tar" in told
    told = message(lambda: inputs.source(str(tmp_path / "nowhere.npz")))
    assert str(tmp_path / "nowhere.npz") in told
    assert "Did you mean" not in told
    assert "cannot read recipe" in message(lambda: inputs.source("nowhere.toml"))


# what is asked of an evaluation


def asked(
    *given: str,
    reference: str | None = None,
    name: str | None = None,
    method: str | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
) -> inputs.Evaluation:
    return inputs.evaluation(given, reference, name, method, seed, overrides)


def test_a_recipe_and_a_seed_name_a_run_that_is_recorded():
    run_id, spec = finished("digits-w1a4", seed=2)
    found = asked(name="digits-w1a4", seed=2)
    assert found == inputs.of_run(spec, run_id)
    assert [source.run_id for source in found.samples] == [run_id]
    assert found.reference == inputs.Source("digits", None, spec)
    assert found.settings == spec.evaluate
    assert found.recorded
    assert asked(run_id) == asked(run_id, name="digits-w1a4") == found


def test_the_method_chooses_a_run():
    run_id, _ = finished("digits-w1a4")
    by_method, spec = finished("digits-w1a4", method="baseline")
    assert by_method != run_id
    found = asked(name="digits-w1a4", method="baseline")
    assert (found.samples[0].run_id, found.samples[0].recipe) == (by_method, spec)
    told = message(lambda: asked(by_method, method="baseline"))
    assert "--method chooses a run" in told
    assert "leave out --method" in told


def test_a_run_that_is_not_finished_or_not_told():
    assert "unknown finished run 'digits-w1a4-s0'" in message(lambda: asked(name="digits-w1a4"))
    assert "--recipe NAME (with --seed)" in message(asked)


def test_overrides_of_a_run_are_part_of_what_is_recorded():
    run_id, _ = finished("digits-w1a4")
    found = asked(run_id, overrides=["evaluate.n_reference=50"])
    assert found.settings.n_reference == 50
    assert found.samples[0].recipe.id == "digits-w1a4+evaluate.n_reference=50"
    assert found.recorded


@pytest.mark.parametrize("reference", ["digits", "other.npz"])
def test_a_run_against_another_reference_keeps_its_settings_and_is_not_recorded(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.npz").touch()
    run_id, spec = finished("digits-w1a4")
    for found in (asked(run_id, reference=reference), asked(name="digits-w1a4", reference=reference)):
        assert found.reference == inputs.source(reference)
        assert found.settings == spec.evaluate
        assert not found.recorded


def test_a_run_by_another_recipe_is_not_recorded():
    run_id, _ = finished("digits-w1a4")
    found = asked(run_id, name="digits-w1a8", overrides=["evaluate.n_reference=9"])
    assert found.settings.n_reference == 9
    assert found.reference.recipe.name == "digits-w1a8"
    assert not found.recorded


def test_a_run_may_be_the_reference(images: str):
    run_id, spec = finished("digits-w1a4")
    found = asked(images, reference=run_id)
    assert found.reference == inputs.Source(run_id, runs.samples_npz(spec, run_id), spec, run_id)
    assert found.settings == spec.evaluate
    assert not found.recorded


def test_images_by_a_recipe(images: str):
    found = asked(images, name="digits", overrides=["evaluate.n_reference=9"])
    assert found.samples == (inputs.Source(images, Path(images)),)
    assert (found.settings.features, found.settings.n_reference) == ("digits", 9)
    assert found.reference.recipe == load("digits", ["evaluate.n_reference=9"])
    assert not found.recorded
    assert asked(images, reference="digits", overrides=["evaluate.n_reference=9"]).settings == found.settings


def test_the_recipe_goes_before_the_reference(images: str):
    found = asked(images, name="digits", reference="cifar10")
    assert found.settings == load("digits").evaluate
    assert found.reference.recipe == load("cifar10")


def test_images_without_a_recipe_are_scored_by_adm_on_inception(images: str):
    found = asked(images, reference=images)
    assert found.reference == inputs.Source(images, Path(images))
    assert (found.settings.features, found.settings.protocol, found.settings.n_reference) == ("inception", "adm", 0)
    assert found.settings.metrics == ("fid", "sfid", "is", "precision", "recall")
    assert not found.recorded
    assert asked(images).reference is None
    found = asked(images, overrides=["evaluate.features=digits", "evaluate.metrics=['is']"])
    assert (found.settings.features, found.settings.metrics) == ("digits", ("is",))


def test_a_recipe_as_samples_brings_its_settings(images: str):
    found = asked("digits", reference=images)
    assert found.samples[0].recipe == load("digits")
    assert found.settings == load("digits").evaluate
    assert asked("digits").reference is None


def test_a_seed_or_a_preparation_that_would_do_nothing_is_refused(images: str):
    assert message(lambda: asked(images, seed=3)).startswith("--seed chooses a run, with --recipe.\n")
    told = message(lambda: asked(images, reference=images, overrides=["evaluate.prepare=adm-crop"]))
    assert told.startswith(f"{images} is taken as it is; --prepare is for a reference of image files.\n")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("evaluate.protocol=cleen", "evaluate.protocol: input should be 'adm', 'clean' or 'torch-fidelity'"),
        ("evaluate.features=vgg", "evaluate.features: input should be 'digits', 'cifar10' or 'inception'"),
        ("evaluate.prepare=crop", "evaluate.prepare: input should be 'none', 'square-bicubic'"),
        ("evaluate.n_reference=-1", "evaluate.n_reference: input should be greater than or equal to 0"),
        ("evaluate.n_refs=1", "evaluate.n_refs: unknown key (given 1). Did you mean 'n_reference'?"),
        ("evaluate.distances=half", "evaluate.distances: input should be 'exact' or 'float16'"),
    ],
)
def test_faults_of_the_settings(images: str, override: str, told: str):
    for found in (
        lambda: asked(images, overrides=[override]),
        lambda: asked(images, name="digits", overrides=[override]),
    ):
        assert told in message(found)


def test_all_faults_of_the_settings_are_told_at_once(images: str):
    told = message(lambda: asked(images, overrides=["evaluate.protocol=a", "evaluate.features=b"]))
    assert told.startswith("the evaluation has 2 faults:\n")


def test_images_of_no_recipe_have_no_other_settings(images: str):
    told = message(lambda: asked(images, reference=images, overrides=["sample.steps=3"]))
    assert told.startswith("'sample.steps' says nothing about images of no recipe.\n")


def test_several_sets_by_the_runs_among_them(images: str):
    first, spec = finished("digits-w1a4")
    second, _ = finished("digits-w1a4-baseline")
    third, _ = finished("digits-fp")
    found = asked(images, first, second, third)
    assert [source.text for source in found.samples] == [images, first, second, third]
    assert found.settings == spec.evaluate
    assert found.reference == inputs.Source("digits", None, spec)
    assert not found.recorded


def test_runs_whose_recipes_score_differently_are_refused():
    first, _ = finished("digits-w1a4")
    second, _ = finished("digits-w1a8", "evaluate.n_reference=50", "evaluate.protocol=clean")
    third, _ = finished("cifar10-w1a32")
    told = message(lambda: asked(first, second))
    assert told.startswith(
        f"the recipes of {first} and {second} score images differently: evaluate.n_reference, evaluate.protocol.\n"
    )
    assert told.endswith("say by which recipe: --recipe NAME")
    told = message(lambda: asked(first, third, reference="digits"))
    assert all(key in told for key in ("evaluate.features", "data.dataset", "data.image_size", "data.channels"))
    found = asked(first, second, name="digits")
    assert found.settings == load("digits").evaluate
    assert not found.recorded


def test_the_reference_of_a_recipe_is_a_file_that_must_be_there(home: Path, images: str):
    told = message(lambda: asked(images, name="bedrooms"))
    path = home / load("bedrooms").evaluate.reference
    assert told.startswith(f"evaluate.reference: there is nothing at {path}.\n")
    assert "get it: " in told
    path.parent.mkdir(parents=True)
    path.touch()
    assert asked(images, name="bedrooms").reference == inputs.Source(str(path), path)
    found = asked(images, name="bedrooms", overrides=["evaluate.reference=''"])
    assert found.reference.path is None
    assert found.reference.recipe.name == "bedrooms"


def test_a_reference_that_is_not_there(images: str):
    assert "no images called 'digit'. Did you mean 'digits'?" in message(lambda: asked(images, reference="digit"))
