"""Diffusers folders as teachers: what a recipe takes from them, what they may not be, and a training from one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pipelines
import pytest
import safetensors.torch
import torch
from conftest import Bdm
from torch import Tensor

from bdm_cli import pretrained, recipe, runs, student
from bdm_cli.diffusion import conditions, data, first_stage
from bdm_cli.diffusion.models import construction, estimate_noise, load_teacher, noise_scheduler
from bdm_cli.errors import BdmError
from bdm_cli.jobs import train
from bdm_cli.quant.swap import quantized_layers


def config(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def change(folder: Path, name: str = "config.json", **values: object) -> None:
    (folder / name).write_text(json.dumps(config(folder, name) | values))


def without_private(table: dict) -> dict:
    return {k: v for k, v in table.items() if not k.startswith("_")}


def message(load: Callable[[], object]) -> str:
    with pytest.raises(BdmError) as caught:
        load()
    return str(caught.value)


def noisy(network: torch.nn.Module, *context: Tensor) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    side, channels = network.config.sample_size, network.config.in_channels
    return torch.randn(2, channels, side, side, generator=random), torch.tensor([3, 700]), *context


# what a folder says


def test_sections_of_a_pixel_pipeline(tmp_path: Path):
    pipelines.pixel_pipeline(tmp_path / "mine")
    found = pretrained.sections(str(tmp_path / "mine"))
    arguments = without_private(config(tmp_path / "mine" / "unet"))
    assert arguments["block_out_channels"] == [8, 16]
    assert found == {
        "unet": {"name": "mine", "kind": "UNet2DModel", "heads": 0, "arguments": arguments},
        "scheduler": {
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.03,
            "n_timesteps": 1000,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "clip_sample": True,
        },
    }


def test_sections_of_a_text_pipeline(tmp_path: Path):
    pipelines.text_pipeline(tmp_path / "mine")
    found = pretrained.sections(str(tmp_path / "mine"))
    assert found["unet"]["kind"] == "UNet2DConditionModel"
    assert "n_classes" not in found["unet"]
    assert found["scheduler"] == {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "n_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    stage = found["first_stage"]
    assert (stage["kind"], Path(stage["path"])) == ("AutoencoderKL", (tmp_path / "mine" / "vae").resolve())
    assert stage["arguments"] == without_private(config(tmp_path / "mine" / "vae"))


def test_a_class_embedding_beside_the_network(tmp_path: Path):
    teacher = class_pipeline(tmp_path / "mine", n_classes=5)
    assert pretrained.sections(str(tmp_path / "mine"))["unet"]["n_classes"] == 5
    assert teacher.unet.n_classes == 5
    assert teacher.unet.condition == "classes"


def class_pipeline(folder: Path, n_classes: int) -> recipe.Recipe:
    """A text pipeline's network with an embedding of classes as its context, and a recipe for it on pixels."""
    network = pipelines.unet("UNet2DConditionModel", sample_size=16, in_channels=1, out_channels=1)
    pipelines.pixel_pipeline(folder, network)
    (folder / "class_embedder").mkdir()
    weight = torch.randn(n_classes, pipelines.CONTEXT, generator=torch.Generator().manual_seed(3))
    safetensors.torch.save_file({"weight": weight}, folder / "class_embedder" / "model.safetensors")
    (folder / "class_embedder" / "config.json").write_text(json.dumps({"num_embeddings": n_classes}))
    return recipe.load(pipelines.pixel_recipe(folder.with_suffix(".toml"), folder))


def test_a_single_network_is_its_own_folder(tmp_path: Path):
    """As google/ddpm-cifar10-32 lies on the hub: config.json, scheduler_config.json and the weights at the root."""
    network = pipelines.unet()
    network.save_pretrained(tmp_path / "mine")
    diffusers.DDPMScheduler(num_train_timesteps=500).save_pretrained(tmp_path / "mine")
    spec = recipe.load(pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine"))
    assert (spec.scheduler.n_timesteps, spec.unet.arguments["norm_num_groups"]) == (500, 4)
    assert_same_function(load_teacher(spec), network)


def test_the_schedule_is_the_folders(tmp_path: Path):
    """The whole of it, against the scheduler that was written."""
    schedules = {
        "linear": diffusers.DDPMScheduler(beta_start=2e-4, beta_end=0.025, num_train_timesteps=400),
        "cosine": diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
        "scaled": diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.013),
        "euler": diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.013),
    }
    for name, written in schedules.items():
        pipelines.pixel_pipeline(tmp_path / name, scheduler=written)
        spec = recipe.load(pipelines.pixel_recipe(tmp_path / f"{name}.toml", tmp_path / name))
        assert torch.equal(noise_scheduler(spec.scheduler).alphas_cumprod, written.alphas_cumprod), name


# a recipe over a folder


def test_a_recipes_own_values_win(tmp_path: Path):
    pipelines.text_pipeline(tmp_path / "mine")
    further = "[unet]\nheads = 1\n[unet.arguments]\ndropout = 0.5\n[scheduler]\nbeta_end = 0.02\n"
    further += '[first_stage]\nget_it = "ask me"\n'
    spec = recipe.load(pipelines.text_recipe(tmp_path / "r.toml", tmp_path / "mine", "images", further))
    assert (spec.unet.heads, spec.unet.arguments["dropout"], spec.scheduler.beta_end) == (1, 0.5, 0.02)
    assert spec.first_stage.get_it == "ask me"
    assert (spec.unet.name, spec.unet.arguments["cross_attention_dim"]) == ("mine", pipelines.CONTEXT)
    assert (spec.scheduler.beta_start, spec.first_stage.kind) == (0.00085, "AutoencoderKL")


def test_overrides_come_last_and_stand_in_the_id(tmp_path: Path):
    pipelines.pixel_pipeline(tmp_path / "mine")
    file = pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine")
    plain = recipe.load(file)
    spec = recipe.load(file, ["scheduler.clip_sample=false", "unet.arguments.dropout=0.1"])
    assert (plain.scheduler.clip_sample, plain.id) == (True, "r")
    assert (spec.scheduler.clip_sample, spec.unet.arguments["dropout"]) == (False, 0.1)
    assert spec.id == "r+scheduler.clip_sample=false+unet.arguments.dropout=0.1"
    assert spec.digest != plain.digest


def test_an_override_equal_to_the_folders_value_drops_out_of_the_id(tmp_path: Path):
    pipelines.pixel_pipeline(tmp_path / "mine")
    file = pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine")
    assert recipe.load(file, ["scheduler.clip_sample=true"]).id == "r"


def test_another_folder_by_override(tmp_path: Path):
    """The network is the folder's that --set names, not the file's."""
    pipelines.pixel_pipeline(tmp_path / "one")
    other = pipelines.unet(block_out_channels=(12, 12))
    pipelines.pixel_pipeline(tmp_path / "other", other)
    file = pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "one")
    spec = recipe.load(file, [f"model.pretrained={tmp_path / 'other'}"])
    assert spec.unet.arguments["block_out_channels"] == [12, 12]
    assert spec.id != recipe.load(file).id
    assert_same_function(load_teacher(spec), other)


def test_null_arguments_survive(tmp_path: Path):
    """attention_head_dim None is one head over all channels, not the default of 8 channels a head."""
    network = pipelines.unet(attention_head_dim=None)
    pipelines.pixel_pipeline(tmp_path / "mine", network)
    assert config(tmp_path / "mine" / "unet")["attention_head_dim"] is None
    spec = recipe.load(pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine"))
    again = recipe.from_json(spec.model_dump_json())
    assert again == spec
    for each in (spec, again):
        teacher = load_teacher(each)
        assert without_private(dict(teacher.config)) == without_private(dict(network.config))
        assert_same_function(teacher, network)
    assert noisy_estimate(network) != pytest.approx(noisy_estimate(pipelines.unet(attention_head_dim=8)))


@torch.no_grad()
def noisy_estimate(network: torch.nn.Module) -> float:
    return float(estimate_noise(network, *noisy(network)).square().mean())


def test_a_recipe_with_a_network_of_its_own_asks_no_folder(tmp_path: Path):
    """Recipes must load before their teacher is there."""
    spec = recipe.load("digits-w1a4", [f"model.pretrained={tmp_path / 'nowhere'}"])
    assert spec.unet.name == recipe.load("digits").unet.name


@pytest.mark.parametrize("override", ["model=5", "unet=5", "model.pretrained=5", "scheduler=5", "first_stage=5"])
def test_a_section_that_is_no_table_is_told(override: str):
    assert re.match(r"recipe 'digits-w1a4' has (a|\d+) fault", message(lambda: recipe.load("digits-w1a4", [override])))


# what a folder may not be


def load_changed(tmp_path: Path, spoil: Callable[[Path], object], further: str = "") -> Callable[[], object]:
    """The teacher of a pixel pipeline that `spoil(folder)` has changed."""
    pipelines.pixel_pipeline(tmp_path / "mine")
    spoil(tmp_path / "mine")
    file = pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine", further)
    return lambda: load_teacher(recipe.load(file))


def of_scheduler(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "scheduler", "scheduler_config.json", **values)


def of_unet(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "unet", **values)


REFUSED = {
    "v-prediction": (of_scheduler(prediction_type="v_prediction"), "the network predicts 'v_prediction'"),
    "sample prediction": (of_scheduler(prediction_type="sample"), "the network predicts 'sample'"),
    "unknown schedule": (of_scheduler(beta_schedule="sigmoid"), "beta_schedule 'sigmoid'"),
    "no schedule": (of_scheduler(beta_schedule=None), "beta_schedule 'None'"),
    "betas in a list": (of_scheduler(trained_betas=[0.1, 0.2]), "beta_schedule"),
    "rescaled betas": (of_scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    "thresholding": (of_scheduler(thresholding=True), "thresholding"),
    "another clip range": (of_scheduler(clip_sample_range=3.0), "clip_sample_range"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "no scheduler/scheduler_config.json"),
    "broken network config": (lambda folder: (folder / "unet" / "config.json").write_text('{"a": '), "is not JSON"),
    "broken scheduler config": (
        lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(""),
        "is not JSON",
    ),
    "a list": (lambda folder: (folder / "unet" / "config.json").write_text("[]"), "is no configuration"),
    "no network": (lambda folder: shutil.rmtree(folder / "unet"), "cannot read"),
    "no weights": (
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "cannot read the network",
    ),
    "no folder": (shutil.rmtree, "there is no folder"),
    "a transformer": (of_unet(_class_name="Transformer2DModel"), "holds a Transformer2DModel"),
    "unknown argument": (of_unet(block_out_channel=[8, 16]), "block_out_channel"),
    "other widths": (of_unet(block_out_channels=[8, 12]), "cannot read the network"),
    "image size": (of_unet(sample_size=32), "(32, 1) must be data's image_size, channels = (16, 1)"),
    "first stage without a class": (
        lambda folder: (
            (folder / "vae").mkdir(),
            (folder / "vae" / "config.json").write_text("{}"),
        ),
        "vae",
    ),
    "another first stage": (
        lambda folder: (
            (folder / "vae").mkdir(),
            (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}'),
        ),
        "vae holds a AutoencoderTiny.\n  allowed: a VQModel or an AutoencoderKL",
    ),
    "embedding without a size": (
        lambda folder: (
            (folder / "class_embedder").mkdir(),
            (folder / "class_embedder" / "config.json").write_text("{}"),
        ),
        "num_embeddings",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_are_refused(tmp_path: Path, name: str):
    spoil, text = REFUSED[name]
    assert text in message(load_changed(tmp_path, spoil))


def test_a_schedule_of_the_recipe_replaces_one_that_is_missing(tmp_path: Path):
    """As the error for the missing one advises."""
    schedule = '[scheduler]\nbeta_schedule = "linear"\nbeta_start = 1e-4\nbeta_end = 0.02\n'
    schedule += "set_alpha_to_one = true\nsteps_offset = 0\n"
    load_changed(tmp_path, lambda folder: shutil.rmtree(folder / "scheduler"), schedule)()


def test_networks_that_are_told_or_tell_something_else(tmp_path: Path):
    """A class beside the time, or also a variance (ADM): twice the channels."""
    for name, changes, text in (
        ("labels", {"num_class_embeds": 10}, "wants inputs beyond"),
        ("variances", {"out_channels": 2}, "output channels"),
    ):
        pipelines.pixel_pipeline(tmp_path / name, pipelines.unet(**changes))
        file = pipelines.pixel_recipe(tmp_path / f"{name}.toml", tmp_path / name)
        assert text in message(lambda file=file: load_teacher(recipe.load(file)))


TEXT_REFUSED = {
    "text_time": {"addition_embed_type": "text_time"},
    "class embedding": {"class_embed_type": "timestep"},
    "projected context": {"encoder_hid_dim": 7, "encoder_hid_dim_type": "text_proj"},
    "guidance embedding": {"time_cond_proj_dim": 7},
    "several context widths": {"cross_attention_dim": (24, 24)},
}


@pytest.mark.parametrize("name", TEXT_REFUSED)
def test_networks_with_inputs_that_bdm_cannot_give(tmp_path: Path, name: str):
    """SDXL's pooled text and sizes, among others: an error before the first step, not a crash or a silent zero."""
    extra = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32} if name == "text_time" else {}
    pipelines.text_pipeline(tmp_path / "mine", pipelines.unet("UNet2DConditionModel", **TEXT_REFUSED[name], **extra))
    file = pipelines.text_recipe(tmp_path / "r.toml", tmp_path / "mine", "images")
    assert "unet" in message(lambda: load_teacher(recipe.load(file)))


def test_a_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file = pipelines.pixel_recipe(tmp_path / "r.toml", "bdm-tests/not-there")
    text = message(lambda: recipe.load(file))
    assert text.startswith("model.pretrained: 'bdm-tests/not-there' is neither a folder here (")
    assert "nor could it be had from the hub (" in text
    assert "a diffusers folder" in text


def test_a_hub_id_without_network_through_the_command(tmp_path: Path, bdm: Bdm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, out, err = bdm("train", "-r", "digits-w1a4", "-s", "model.pretrained=bdm-tests/not-there")
    assert (code, out) == (2, "")
    assert "nor could it be had from the hub" in err
    assert "Traceback" not in err


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(home: Path):
    network = pipelines.pixel_pipeline(home / "owner" / "name")
    spec = recipe.load(pipelines.pixel_recipe(home / "r.toml", "owner/name"))
    assert not pretrained.is_hub_id("owner/name")
    assert pretrained.is_hub_id("owner/other")
    assert_same_function(load_teacher(spec), network)


def test_an_original_checkpoint_is_to_be_imported(tmp_path: Path, bdm: Bdm):
    """Whether the recipe has a network of its own or would take the teacher's."""
    checkpoint = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, checkpoint)
    for name in ("digits-w1a4", pipelines.pixel_recipe(tmp_path / "r.toml", "mine.ckpt")):
        code, _, err = bdm("train", "-r", name, "-s", f"model.pretrained={checkpoint}")
        assert code == 2
        assert "bdm import" in err, name


# the weights


def assert_same_function(teacher: torch.nn.Module, written: torch.nn.Module, *context: Tensor) -> None:
    inputs = noisy(written, *context)
    with torch.no_grad():
        assert torch.equal(estimate_noise(teacher, *inputs), estimate_noise(written, *inputs))


def test_a_teacher_is_bit_equal_to_the_network_written(tmp_path: Path):
    network = pipelines.pixel_pipeline(tmp_path / "mine")
    teacher = load_teacher(recipe.load(pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine")))
    own, theirs = teacher.state_dict(), network.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    assert_same_function(teacher, network)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_of_text_is_bit_equal(tmp_path: Path):
    network = pipelines.text_pipeline(tmp_path / "mine")
    teacher = load_teacher(recipe.load(pipelines.text_recipe(tmp_path / "r.toml", tmp_path / "mine", "images")))
    context = torch.randn(2, 5, pipelines.CONTEXT, generator=torch.Generator().manual_seed(4))
    assert_same_function(teacher, network, context)


def test_a_teacher_of_classes_is_the_network_on_rows_of_the_embedding(tmp_path: Path):
    spec = class_pipeline(tmp_path / "mine", n_classes=5)
    network = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "mine" / "unet").eval()
    rows = safetensors.torch.load_file(tmp_path / "mine" / "class_embedder" / "model.safetensors")["weight"]
    classes = torch.tensor([4, 2])
    teacher = load_teacher(spec)
    inputs = noisy(network)
    with torch.no_grad():
        ours = estimate_noise(teacher, *inputs, classes)
        assert torch.equal(ours, estimate_noise(network, *inputs, rows[classes][:, None]))
        assert not torch.equal(ours, estimate_noise(teacher, *inputs, classes.flip(0)))


def test_a_fixed_number_of_heads(tmp_path: Path):
    """bdm_heads = 2 on 16 channels is what 8 channels a head is, whatever attention_head_dim says (LDM-8)."""
    network = pipelines.unet(attention_head_dim=4)
    network.register_to_config(bdm_heads=2)
    pipelines.pixel_pipeline(tmp_path / "mine", network)
    spec = recipe.load(pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine"))
    assert spec.unet.heads == 2
    assert "bdm_heads" not in spec.unet.arguments
    same = pipelines.unet(attention_head_dim=8)
    same.load_state_dict(network.state_dict())
    teacher = load_teacher(spec)
    assert_same_function(teacher, same)
    with torch.no_grad():
        assert not torch.equal(
            estimate_noise(teacher, *noisy(network)), estimate_noise(pipelines.unet(), *noisy(network))
        )


@pytest.mark.parametrize("form", ["half", "shards", "bin"])
def test_weights_in_other_forms(tmp_path: Path, form: str):
    network = pipelines.pixel_pipeline(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "unet")
    saved = network.half() if form == "half" else network
    options = {"shards": {"max_shard_size": "20KB"}, "bin": {"safe_serialization": False}}.get(form, {})
    saved.save_pretrained(tmp_path / "mine" / "unet", **options)
    teacher = load_teacher(recipe.load(pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine")))
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert_same_function(teacher, network.float())


def remove(tensors: dict[str, Tensor]) -> None:
    del tensors["conv_out.bias"]


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["conv_out.bios"] = tensors.pop("conv_out.bias")


def add(tensors: dict[str, Tensor]) -> None:
    tensors["conv_out.extra"] = torch.zeros(1)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["conv_out.bias"] = torch.zeros(2)


@pytest.mark.parametrize("spoil", [remove, rename, add, reshape])
def test_weights_are_read_strictly(tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None]):
    pipelines.pixel_pipeline(tmp_path / "mine")
    path = tmp_path / "mine" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    spoil(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    spec = recipe.load(pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine"))
    text = message(lambda: load_teacher(spec))
    assert str(tmp_path / "mine" / "unet") in text
    assert "conv_out." in text


def test_weights_cut_short(tmp_path: Path):
    pipelines.pixel_pipeline(tmp_path / "mine")
    path = tmp_path / "mine" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    spec = recipe.load(pipelines.pixel_recipe(tmp_path / "r.toml", tmp_path / "mine"))
    assert "cannot read the network" in message(lambda: load_teacher(spec))


def test_an_embedding_of_another_size(tmp_path: Path):
    class_pipeline(tmp_path / "mine", n_classes=5)
    change(tmp_path / "mine" / "class_embedder", num_embeddings=6)
    spec = recipe.load(str(tmp_path / "mine.toml"))
    assert "class_embedder.weight" in message(lambda: load_teacher(spec))


def digits_unet(**changes: object) -> torch.nn.Module:
    return diffusers.UNet2DModel(**construction(recipe.load("digits").unet.arguments) | changes)


OTHERS = {
    "text": ("digits-w1a4", lambda: pipelines.unet("UNet2DConditionModel")),
    "pixels": ("digits-cond-w1a4", pipelines.unet),
    "pixels for latents": ("digits-ldm-w1a4", pipelines.unet),
    "widths": ("digits-w1a4", lambda: digits_unet(block_out_channels=(8, 16, 16), norm_num_groups=4)),
    "width of heads": ("digits-w1a4", lambda: digits_unet(attention_head_dim=4)),
    "eps": ("digits-w1a4", lambda: digits_unet(norm_eps=1e-3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_network_than_the_recipes(tmp_path: Path, name: str):
    """A recipe with a network of its own: another kind, other widths, or the same tensors in another function."""
    recipe_name, make = OTHERS[name]
    make().save_pretrained(tmp_path / "mine" / "unet")
    spec = recipe.load(recipe_name, [f"model.pretrained={tmp_path / 'mine'}"])
    assert str(tmp_path / "mine") in message(lambda: load_teacher(spec))


def test_a_folder_of_the_recipes_own_network(tmp_path: Path):
    network = digits_unet()
    network.save_pretrained(tmp_path / "mine" / "unet")
    spec = recipe.load("digits-w1a4", [f"model.pretrained={tmp_path / 'mine'}"])
    assert_same_function(load_teacher(spec), network.eval())


# from a folder to samples


@pytest.fixture
def own_model(home: Path) -> str:
    """A text-to-image model and images of one's own, in the home directory; the recipe's file."""
    pipelines.text_pipeline(home / "mine")
    pipelines.captioned_images(home / "images")
    return pipelines.text_recipe(home / "mine-w1a4.toml", "mine", "images")


def arrays(out: str) -> np.lib.npyio.NpzFile:
    return np.load(Path(out.strip()))


def test_a_text_model_without_its_encoder_from_a_folder_to_samples(own_model: str, bdm: Bdm):
    code, _, err = bdm("train", "-r", own_model)
    assert code == 0, err
    assert "no text encoder" in err
    trained = student.load_run("mine-w1a4-s0").student
    layers = [layer for name, layer in quantized_layers(trained) if ".to_k" in name or ".to_q" in name]
    assert len(layers) == 2 * 2 * 4  # self- and cross-attention in 2 + 2 blocks... of queries and keys
    for layer in layers:
        levels = layer.weight_quantizer(layer.weight)[0].unique()
        assert len(levels) == 2
    code, out, err = bdm("sample", "-r", own_model)
    assert code == 0, err
    assert arrays(out)["arr_0"].shape == (6, 16, 16, 3)
    assert "arr_1" not in arrays(out)
    code, _, err = bdm("sample", "-r", own_model, "-s", "sample.prompts=['a cat']")
    assert code == 2
    assert "no text encoder to read them" in err
    code, _, err = bdm("sample", "-r", own_model, "--classes", "1")
    assert code == 2
    assert "knows no classes" in err


def test_a_text_model_learns_from_latents_of_its_folder(own_model: str, home: Path):
    """One training batch against diffusers' own modules: image, posterior draw, scaling factor, noise."""
    spec = recipe.load(own_model)
    (x_t, t, context), noise, _ = train.real_batches(spec, seed=0)[0](0)
    vae = diffusers.AutoencoderKL.from_pretrained(home / "mine" / "vae").eval()
    scheduler = diffusers.PNDMScheduler.from_pretrained(home / "mine" / "scheduler")
    kept = scheduler.alphas_cumprod[t][:, None, None, None]
    latents = (x_t - (1 - kept).sqrt() * noise) / kept.sqrt()
    assert torch.equal(context, torch.zeros(4, 1, pipelines.CONTEXT))
    chosen = data.batch_indices(12, 4, 0, 0)
    pictures = data.to_float(data.training_images(spec)[chosen])
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
    drawn = (latents / pipelines.VAE["scaling_factor"] - posterior.mean) / posterior.std
    assert 0.9 < float(drawn.std()) < 1.1
    assert abs(float(drawn.mean())) < 0.1
    assert first_stage.load(spec.first_stage).scale == pipelines.VAE["scaling_factor"]


def test_a_text_model_from_a_folder_to_prompted_samples(own_model: str, home: Path, bdm: Bdm):
    transformers = pytest.importorskip("transformers")
    pipelines.text_encoder(home / "mine")
    assert bdm("train", "-r", own_model, "-s", "train.drop_condition=0.2")[0] == 0
    spec = recipe.load(own_model, ["train.drop_condition=0.2"])
    run_id = spec.run_id(0)
    assert runs.weights(run_id).exists()

    # training is told the captions of its images, or the empty text
    tokenizer = transformers.CLIPTokenizer.from_pretrained(home / "mine" / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(home / "mine" / "text_encoder").eval()

    def encoded(text: str) -> Tensor:
        tokens = tokenizer([text], padding="max_length", max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(tokens).last_hidden_state[0]

    hidden = 0
    for step in range(8):
        (_, _, context), *_ = train.real_batches(spec, seed=0)[0](step)
        for row, index in zip(context, data.batch_indices(12, 4, step, 0), strict=True):
            told = [torch.allclose(row, encoded(text), atol=1e-5) for text in (f"picture {index} of 12", "")]
            assert sum(told) == 1
            hidden += told[1]
    assert 1 <= hidden <= 14  # of 32; 6.4 expected

    def sampled(*prompts: str, guidance: float = 3.0) -> np.ndarray:
        chosen = ["-s", f"sample.prompts={json.dumps(prompts)}"] if prompts else []
        code, out, err = bdm(
            "sample", "-r", own_model, "-s", "train.drop_condition=0.2", "--guidance", str(guidance), *chosen
        )
        assert code == 0, err
        return arrays(out)["arr_0"].astype(int)

    cat, dog, both = sampled("a cat"), sampled("<<< dog >>>"), sampled("a cat", "<<< dog >>>")
    assert (cat != dog).any()
    assert (cat != sampled("a cat", guidance=1.0)).any()
    assert (cat != sampled()).any()
    which = conditions.dealt(2, range(6), seed=0)
    assert sorted(which) == [0, 0, 0, 1, 1, 1]
    wanted = np.where(which[:, None, None, None] == 0, cat, dog)
    assert np.abs(both - wanted).max() <= 1  # a text is encoded beside others: rounding


def other_width(folder: Path) -> str:
    shutil.rmtree(folder / "text_encoder")
    pipelines.text_encoder(folder, width=pipelines.CONTEXT // 2)
    return f"gives rows of {pipelines.CONTEXT // 2} numbers"


def wrong_config(folder: Path) -> str:
    change(folder / "text_encoder", hidden_size=pipelines.CONTEXT // 2)
    return "cannot read the text encoder"


def no_tokenizer(folder: Path) -> str:
    shutil.rmtree(folder / "tokenizer")
    return "cannot read the text encoder"


def missing_tensor(folder: Path) -> str:
    """transformers would go on with a random one."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors[next(name for name in tensors if name.endswith("token_embedding.weight"))]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return "token_embedding.weight"


def unknown_class(folder: Path) -> str:
    change(folder / "text_encoder", architectures=["LDMBertModel"])
    return "LDMBertModel"


@pytest.mark.parametrize("spoil", [other_width, wrong_config, no_tokenizer, missing_tensor, unknown_class])
def test_text_encoders_that_are_refused(own_model: str, home: Path, bdm: Bdm, spoil: Callable[[Path], str]):
    pytest.importorskip("transformers")
    pipelines.text_encoder(home / "mine")
    text = spoil(home / "mine")
    code, _, err = bdm("train", "-r", own_model)
    assert code == 2
    assert text in err


def test_images_without_captions(own_model: str, home: Path, bdm: Bdm):
    """None at all: the empty text, and a warning. Some: a mistake."""
    for path in (home / "images").glob("*.txt"):
        path.unlink()
    code, _, err = bdm("train", "-r", own_model)
    assert code == 0, err
    assert "each gets the empty text" in " ".join(err.split())
    (home / "images" / "03.txt").write_text("the only one")
    code, _, err = bdm("train", "-r", own_model, "--seed", "1")
    assert code == 2
    assert "11 images have no caption" in err


def test_prompts_are_told_apart_in_the_samples_folder(tmp_path: Path):
    pipelines.text_pipeline(tmp_path / "mine")
    file = pipelines.text_recipe(tmp_path / "r.toml", tmp_path / "mine", "images")
    lists = [["a,b"], ["a", "b"], ["b", "a"], ["a"], []]
    folders = {runs.samples_npz(recipe.load(file, [f"sample.prompts={json.dumps(p)}"]), "r-s0") for p in lists}
    assert len(folders) == len(lists)
