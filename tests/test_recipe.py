"""Recipes: every file loads, ids say what differs from the file, and faults are told in full."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm_cli import methods, recipe
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe, load

FILES = sorted((Path(__file__).resolve().parents[1] / "recipes").rglob("*.toml"))


# every recipe


def test_there_are_164_recipes():
    assert len(FILES) == 164
    assert Counter(path.parent.name for path in FILES) == {
        "digits": 31, "cifar10": 20, "bedrooms": 32, "churches": 23, "ffhq": 17, "imagenet": 8,
        "digits-ldm": 25, "digits-cond": 8
    }  # fmt: skip
    assert {path.stem for path in FILES} == set(recipe.names())
    assert len({path.stem for path in FILES}) == 164


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_method_builds(path: Path):
    spec = load(path.stem)
    method = methods.build(spec)
    assert spec.id == spec.train_id == spec.name == path.stem
    assert spec.run_id(3) == f"{path.stem}-s3"
    assert spec.data.dataset == path.parent.name.partition("-")[0]
    assert load(str(path)) == spec
    assert recipe.from_json(spec.model_dump_json()) == spec
    text = path.read_text()
    assert text.startswith("# ")
    assert spec.summary

    parts = [path.parent.name, *path.stem.removeprefix(path.parent.name).split("-")[1:]]
    if parts[1:] in ([], ["fp"]):
        assert spec.method == {"name": "fp"}
        assert spec.train.steps == 0 or parts[1:] == []
        return
    weights, activations = (int(bits) for bits in parts[1].removeprefix("w").split("a"))
    assert method.activation_bits == activations
    expected = parts[2] if len(parts) > 2 else "binarydm"
    assert spec.method["name"] == expected
    assert getattr(method, "weight_bits", 1) == weights
    assert (spec.train.steps > 0) == (expected != "qdiffusion")


@pytest.mark.parametrize(
    "name", ["digits", "digits-ldm", "digits-cond", "cifar10", "bedrooms", "churches", "ffhq", "imagenet"]
)
def test_recipes_of_one_data_set_share_network_data_and_teacher(name: str):
    base = load(name)
    for other in (path.stem for path in FILES if path.parent.name == name):
        spec = load(other)
        for section in ("data", "unet", "scheduler", "first_stage", "model", "sample", "evaluate", "pretrain"):
            found = getattr(spec, section)
            if section == "sample" and "-w1a1-" in other:  # sampled as BiDM samples
                found = found.model_copy(update={"steps": base.sample.steps, "n_images": base.sample.n_images})
            assert found == getattr(base, section), f"{other}: {section}"


def test_recipes_are_frozen():
    spec = load("digits")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        spec.train.lr = 1.0
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        spec.name = "other"


def test_the_recipe_of_a_teacher():
    spec = load("digits-w1a4").pretraining()
    assert spec.run_id(0) == "digits-w1a4-teacher-s0"
    assert spec.train == load("digits").pretrain
    assert (spec.method, spec.model.pretrained) == ({"name": "fp"}, "")
    assert load("cifar10").pretraining().run_id(0) == "cifar10-teacher-s0"


# ids


@pytest.mark.parametrize(
    ("overrides", "suffix"),
    [
        ([], ""),
        (["train.lr=1e-3", "method.tau=0.09", "method.lrm_k=4", "train.steps=400"], ""),
        (["train.lr=0.0010", "method.tau=9e-2", "method.lrm_k=4.0", "sample.eta=1"], ""),
        (["method.name=binarydm", "train.lr_schedule='cosine'", 'train.lr_schedule="cosine"'], ""),
        (["method.tau=9e-3"], "+method.tau=0.009"),
        (["method.tau=0.009"], "+method.tau=0.009"),
        (["method.tau=0.0"], "+method.tau=0"),
        (["method.tau=0"], "+method.tau=0"),
        (["method.lrm_k=8"], "+method.lrm_k=8"),
        (["method.lrm_k=8.0"], "+method.lrm_k=8"),
        (["method.ebb_center=true"], "+method.ebb_center=true"),
        (["method.distillation=mse"], "+method.distillation=mse"),
        (["method.distillation='mse'"], "+method.distillation=mse"),
        (["train.steps=10", "method.tau=0"], "+method.tau=0+train.steps=10"),
        (["method.tau=0", "train.steps=10"], "+method.tau=0+train.steps=10"),
        (["train.steps=10", "train.steps=20"], "+train.steps=20"),
        (["train.steps=10", "train.steps=400"], ""),
        (['evaluate.metrics=["fid", "is"]'], ""),
        (["data.path=/somewhere/else", "sample.batch=3", "sample.shard=9"], ""),
        (["model.pretrained=/a/b/mine.safetensors"], "+model.pretrained=mine-9a8a94"),
        (["train.log_every=1", "train.grid_every=7", "train.checkpoint_every=9", "pretrain.log_every=3"], ""),
        (["evaluate.reference=ref.npz"], "+evaluate.reference=ref-b06e5d"),
    ],
)
def test_an_id_is_the_name_and_what_changes_results(overrides: list[str], suffix: str):
    spec = load("digits-w1a4", overrides)
    assert spec.id == f"digits-w1a4{suffix}"
    assert "/" not in spec.id


def test_neutral_keys_do_act():
    spec = load("digits-w1a4", ["sample.batch=3", "data.path=x", "train.log_every=1"])
    assert (spec.sample.batch, spec.data.path, spec.train.log_every) == (3, "x", 1)
    assert spec.overrides == {}


def test_sampling_is_in_the_id_but_not_in_the_run_id():
    spec = load("digits-w1a4", ["sample.steps=10", "evaluate.n_reference=5", "method.tau=0"])
    assert spec.id == "digits-w1a4+evaluate.n_reference=5+method.tau=0+sample.steps=10"
    assert spec.train_id == "digits-w1a4+method.tau=0"
    assert spec.run_id(7) == "digits-w1a4+method.tau=0-s7"


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-8, 1e8), st.sampled_from(["{!r}", "{:e}", "{:.20g}", "{:E}", "+{!r}"]))
def test_one_number_has_one_id_however_it_is_written(value: float, form: str):
    text = form.format(value)
    first, again = load("digits-w1a4", [f"train.lr={value!r}"]), load("digits-w1a4", [f"train.lr={text}"])
    assert (again.train.lr == value) == (first.id == again.id)


def test_method_picks_the_sibling_recipe():
    spec = load("digits-w1a4", method="ebb")
    assert spec == load("digits-w1a4-ebb")
    assert load("digits-w1a4", ["method.tau=0"], method="ebb").id == "digits-w1a4-ebb+method.tau=0"
    assert load("digits-w1a4", method="binarydm") == load("digits-w1a4")
    assert load("digits-w1a4", method="baseline").id == "digits-w1a4-baseline"


@pytest.mark.parametrize(
    ("name", "method", "sibling"),
    [
        ("digits-w1a4", "fp", "digits-fp"),
        ("digits-w1a4", "lsq", "digits-w2a4-lsq"),
        ("digits-w1a4-ebb", "baseline", "digits-w1a4-baseline"),
        ("digits-w1a8-baseline", "binarydm", "digits-w1a8"),
        ("digits-w2a32-lsq", "ebb", "digits-w1a32-ebb"),
        ("digits-w1a4", "qdiffusion", "digits-w4a4-qdiffusion"),
        ("digits-w1a1-bidm", "xnor", "digits-w1a1-xnor"),
        ("digits-w1a1-xnor", "efficientdm", "digits-w1a1-efficientdm"),
    ],
)
def test_a_method_picks_its_row(name: str, method: str, sibling: str):
    assert load(name, method=method) == load(sibling)


def test_a_method_without_sibling_is_an_override(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits-w1a4-ebb"\n')
    spec = load(str(path), method="baseline")
    assert spec.id == "mine+method.name=baseline"
    assert spec.method == {"name": "baseline", "activation_bits": 4, "edge_bits": 8, "attention_matmul": False}
    methods.build(spec)
    fp = load(str(path), method="fp")
    assert fp.method == {"name": "fp"}
    methods.build(fp)


def test_an_override_of_another_method_is_in_the_id_although_the_recipes_own_method_has_that_value(tmp_path: Path):
    """Another method starts from its defaults (here ebb_scope = 6), not from the recipe's fields (4)."""
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits-w1a4-ebb"\n')
    plain = load(str(path), method="binarydm")
    assert "ebb_scope" not in plain.method
    assert methods.build(plain).ebb_scope == 6
    other = load(str(path), ["method.ebb_scope=4"], method="binarydm")
    assert methods.build(other).ebb_scope == 4
    assert other.run_id(0) != plain.run_id(0)
    assert other.id == "mine+method.ebb_scope=4+method.name=binarydm"


def test_pretraining_takes_no_training_overrides():
    with pytest.raises(BdmError, match=r"pretraining takes no train\.steps"):
        load("digits", ["train.steps=5"]).pretraining()
    assert load("digits", ["pretrain.steps=5"]).pretraining().train.steps == 5


def test_more_sampling_steps_than_there_are():
    with pytest.raises(BdmError, match=r"sample\.steps: at most 1000 \(given 2000\)"):
        load("digits-w1a4", ["sample.steps=2000"])


def test_a_child_with_another_method_keeps_the_shared_keys_only():
    spec = load("digits-w2a4-lsq")
    assert spec.method == {
        "name": "lsq", "weight_bits": 2, "activation_bits": 4, "edge_bits": 8, "attention_matmul": False
    }  # fmt: skip
    assert spec.train.steps == 400


# digest


def test_the_digest_follows_every_value_but_the_neutral_ones():
    base = load("digits-w1a4")
    assert load("digits-w1a4").digest == base.digest
    assert len(base.digest) == 12
    neutral = [
        "data.path=x",
        "model.pretrained=y",
        "sample.batch=3",
        "sample.shard=2",
        "train.log_every=3",
        "evaluate.reference=z",
    ]
    assert (
        load("digits-w1a4", [*neutral, "pretrain.grid_every=5", "data.get_it=there", "summary=other"]).digest
        == base.digest
    )
    changes = [
        "train.lr=2e-3", "train.steps=401", "train.threads=2", "pretrain.lr=1e-3", "method.tau=0", "data.flip=true",
        "method.ebb_center=true", "unet.arguments.norm_num_groups=4", "scheduler.beta_end=0.03",
        "sample.steps=21", "sample.to_bytes=truncate", "evaluate.n_reference=5",
    ]  # fmt: skip
    digests = {load("digits-w1a4", [change]).digest for change in changes}
    assert len(digests | {base.digest}) == len(changes) + 1


def test_the_digest_follows_the_values_not_how_they_came_about(tiny_recipe: Callable[..., Recipe]):
    renamed = load("digits-w1a4").model_copy(update={"name": "other", "summary": "", "overrides": {"a": 1}})
    assert renamed.digest == load("digits-w1a4").digest
    assert load("digits-w1a4", method="ebb").digest == load("digits-w1a4-ebb").digest
    assert recipe.from_json(tiny_recipe().model_dump_json()).digest == tiny_recipe().digest


@pytest.mark.parametrize("same", ["method.lrm_k=4.0", "method.tau=0.09", "train.lr=0.001", "sample.eta=1"])
def test_one_id_has_one_digest(same: str):
    base, other = load("digits-w1a4"), load("digits-w1a4", [same])
    assert other.id == base.id
    assert other.digest == base.digest


def test_difference_names_what_differs_and_not_the_neutral_keys():
    a, b = load("digits-w1a4"), load("digits-w1a4", ["method.tau=0.5", "sample.batch=3", "train.steps=7"])
    assert recipe.difference(a, b) == ["method.tau: 0.09 / 0.5", "train.steps: 400 / 7"]
    assert recipe.difference(a, a) == []


def test_resolved_lists_every_key():
    values = recipe.resolved(load("digits-w1a4"))
    assert values["train.beta2"] == 0.999  # a default
    assert values["unet.arguments.norm_num_groups"] == 8
    assert not any(key.startswith("overrides") for key in values)


# faults


def message(*overrides: str, name: str = "digits-w1a4") -> str:
    with pytest.raises(BdmError) as caught:
        load(name, overrides)
    return str(caught.value)


def test_an_unknown_recipe():
    text = message(name="churches-w1a5")
    assert re.match(r"unknown recipe 'churches-w1a5'\. Did you mean 'churches-w1a[48]'\?\n  known: bedrooms, ", text)
    assert text.endswith("\n  or give the path of a .toml file")
    assert "Did you mean" not in message(name="zzz")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.lrr=1", "train.lrr: unknown key (given 1). Did you mean 'lr'? known: batch, beta1, beta2, "),
        ("trian.lr=1", "trian: unknown key (given {'lr': 1}). Did you mean 'train'? known: data, evaluate, "),
        ("sample.foo.bar=1", "sample.foo: unknown key (given {'bar': 1}). known: "),
        ("first_stage.pat=x", "first_stage.pat: unknown key (given 'x'). Did you mean 'path'?"),
        ("train.steps=abc", "train.steps: input should be a valid integer (given 'abc')"),
        ("train.steps=1.5", "train.steps: input should be a valid integer"),
        ("train.steps=true", "train.steps: input should be a valid integer (given True)"),
        ('train.steps="5"', "train.steps: input should be a valid integer (given '5')"),
        ("train.steps=", "train.steps: input should be a valid integer (given '')"),
        ("train.steps=-1", "train.steps: input should be greater than or equal to 0 (given -1)"),
        ("train.lr=0", "train.lr: input should be greater than 0 (given 0"),
        ("train.lr=nan", "train.lr: "),
        ("train.ema=1.1", "train.ema: input should be less than or equal to 1 (given 1.1)"),
        ("train.batch=0", "train.batch: input should be greater than or equal to 1 (given 0)"),
        ("data.flip=1", "data.flip: input should be a valid boolean (given 1)"),
        ("train.loss=l2", "train.loss: input should be 'mse', 'mse-sum' or 'l1' (given 'l2')"),
        ("data.dataset=mnist", "data.dataset: input should be 'digits', 'cifar10', "),
        ("evaluate.metrics=fid", "evaluate.metrics: input should be a valid"),
        ("train=5", "train: input should be an object (given 5)"),
        ("method=5", "method: input should be "),
        ("method.name=5", "method: needs a name"),
        ("train.lr=nan", "train.lr: input should be a finite number (given nan)"),
        ("unet.arguments.in_channels=3", "unet.arguments sample_size, in_channels = (16, 3) must be data's"),
    ],
)
def test_faults_name_the_key_the_value_and_what_is_allowed(override: str, text: str):
    error = message(override)
    assert error.startswith("recipe 'digits-w1a4' has ")
    assert f"\n  {text}" in error


def test_all_faults_come_at_once():
    error = message("train.steps=-1", "train.lrr=2", "sample.eta=2", "data.flip=7")
    assert error.startswith("recipe 'digits-w1a4' has 4 faults:\n")
    assert all(f"\n  {key}: " in error for key in ("train.steps", "train.lrr", "sample.eta", "data.flip"))
    assert message("train.steps=-1").startswith("recipe 'digits-w1a4' has a fault:\n")


@pytest.mark.parametrize("text", ["train.lr", "=3", " =3", ""])
def test_an_override_that_cannot_be_read(text: str):
    assert message(text) == f"cannot read --set '{text}'.\n  give section.key=value, e.g. --set train.lr=1e-4"


@pytest.mark.parametrize("key", ["name", "overrides.train.lr", "overrides"])
def test_what_a_recipe_is_called_cannot_be_set(key: str):
    """It would be ignored otherwise, and stand in the id."""
    with pytest.raises(BdmError, match=key.split(".")[0]):
        load("digits-w1a4", [f"{key}=1"])


# files


def test_a_recipe_by_path(tmp_path: Path, home: Path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "digits-w1a4"\n[train]\nsteps = 3\n')
    spec = load(str(path), ["train.lr=1e-4"])
    assert (spec.id, spec.train.steps) == ("mine+train.lr=0.0001", 3)
    assert spec.method == load("digits-w1a4").method
    assert load(str(path), ["train.steps=3"]).id == "mine"


def test_extends_takes_a_file_beside_the_recipe(tmp_path: Path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base.toml").write_text('extends = "digits"\n[train]\nbatch = 5\n')
    (folder / "child.toml").write_text('extends = "base.toml"\n[train]\nsteps = 3\n')
    spec = load(str(folder / "child.toml"))
    assert (spec.name, spec.train.batch, spec.train.steps) == ("child", 5, 3)


def test_extends_takes_an_absolute_path(tmp_path: Path):
    (tmp_path / "base.toml").write_text('extends = "digits"\n[train]\nbatch = 5\n')
    (tmp_path / "child.toml").write_text(f'extends = "{tmp_path}/base.toml"\n')
    assert load(str(tmp_path / "child.toml")).train.batch == 5


def test_a_recipe_that_extends_itself(tmp_path: Path):
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text(f'extends = "{b}"\n')
    b.write_text(f'extends = "{a}"\n')
    with pytest.raises(BdmError, match=rf"recipe '{a}' extends itself: {a} -> {b} -> {a}\.\n  remove one 'extends'"):
        load(str(a))
    a.write_text(f'extends = "{a}"\n')
    with pytest.raises(BdmError, match="extends itself"):
        load(str(a))


def test_files_that_are_no_recipes(tmp_path: Path):
    path = tmp_path / "broken.toml"
    for content in (b"[train\n", b"steps = \n", b"\xff\xfe", b"a = 1\na = 2\n"):
        path.write_bytes(content)
        assert f"recipe {path} is not valid TOML: " in message(name=str(path))
    assert message(name=str(tmp_path / "absent.toml")).startswith(
        f"cannot read recipe {tmp_path}/absent.toml (No such file"
    )
    (tmp_path / "folder.toml").mkdir()
    assert message(name=str(tmp_path / "folder.toml")).startswith("cannot read recipe ")
    path.write_text('extends = "digitz"\n')
    assert message(name=str(path)).startswith("unknown recipe 'digitz'. Did you mean 'digits'?")
    path.write_text('summary = "lacks nearly everything"\n')
    error = message(name=str(path))
    assert "\n  train: is missing" in error
    assert "\n  unet: is missing" in error


def test_an_extends_that_is_no_name(tmp_path: Path):
    path = tmp_path / "odd.toml"
    for value in ("5", '["digits"]', "true"):
        path.write_text(f"extends = {value}\n")
        assert "extends" in message(name=str(path))


# recipes of finished runs


def test_a_run_takes_other_sampling_but_no_other_training():
    stored = load("digits-w1a4", ["method.tau=0"])
    spec = recipe.of_run(stored, ["sample.steps=10", "evaluate.n_reference=7", "data.path=elsewhere", "sample.batch=2"])
    assert (spec.sample.steps, spec.evaluate.n_reference, spec.data.path, spec.sample.batch) == (10, 7, "elsewhere", 2)
    assert spec.id == "digits-w1a4+evaluate.n_reference=7+method.tau=0+sample.steps=10"
    assert spec.run_id(0) == stored.run_id(0)
    for key in ("train.lr=1", "method.tau=1", "unet.heads=2", "data.flip=true", "pretrain.steps=1", "name=x"):
        with pytest.raises(BdmError, match=rf"'{key.split('=')[0]}' was fixed when .*\n  allowed here: sample\.\*"):
            recipe.of_run(stored, [key])
    with pytest.raises(BdmError, match=r"sample\.stepz: unknown key"):
        recipe.of_run(stored, ["sample.stepz=1"])


def test_a_run_with_the_files_own_sampling_has_the_files_id():
    stored = load("digits-w1a4")
    assert recipe.of_run(stored, ["sample.steps=20"]).id == "digits-w1a4"
    assert recipe.of_run(stored, []) == stored


def test_a_run_by_recipe_takes_the_sampling_of_the_recipe():
    stored = load("digits-w1a4", ["sample.steps=10"])
    like = load("digits-w1a4", ["sample.eta=0.5", "evaluate.n_reference=5"])
    spec = recipe.of_run(stored, [], like)
    assert (spec.sample, spec.evaluate, spec.train) == (like.sample, like.evaluate, stored.train)
    assert spec.id == like.id


# of methods that train along the sampler's trajectories, the sampler is a part of the training


@pytest.mark.parametrize("name", ["digits-ldm-w4a4-efficientdm", "digits-ldm-w4a4-qdiffusion"])
def test_trajectories_are_a_part_of_the_training(name: str):
    plain = load(name)
    other = load(name, ["sample.eta=0.0", "sample.n_images=64"])
    assert other.id == f"{name}+sample.eta=0+sample.n_images=64"
    assert other.train_id == f"{name}+sample.eta=0"
    assert load("digits-ldm-w1a4", ["sample.eta=0.0"]).train_id == "digits-ldm-w1a4"

    assert recipe.of_run(plain, []).id == name
    assert recipe.of_run(other, []).id == other.id
    drawn = {
        recipe.of_run(plain, ["sample.eta=0.0", "sample.n_images=64"]).id: "+drawn.eta=0+sample.n_images=64",
        recipe.of_run(other, ["sample.eta=1.0"]).id: "+drawn.eta=1+sample.eta=0+sample.n_images=64",
        recipe.of_run(other, ["sample.n_images=2000", "sample.steps=10"]).id: "+drawn.steps=10+sample.eta=0",
    }
    assert drawn == {f"{name}{suffix}": suffix for suffix in drawn.values()}
    spec = recipe.of_run(other, ["sample.eta=1.0"])
    assert (spec.sample.eta, spec.train_id) == (1.0, other.train_id)
