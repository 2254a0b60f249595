"""`bdm import`: from an original file to a folder that bdm and diffusers read as the same network."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import Bdm
from torch import Tensor

from bdm_cli import places, recipe, records
from bdm_cli.diffusion import conditions, first_stage
from bdm_cli.diffusion.models import estimate_noise, load_teacher, noise_scheduler
from bdm_cli.diffusion.sampling import sample
from bdm_cli.errors import BdmError
from bdm_cli.jobs import import_checkpoint
from bdm_cli.recipe import Recipe

sys.path.append(str(Path(__file__).parents[1] / "diffusion"))
import originals

UNET, EMBEDDING = "model.diffusion_model.", "cond_stage_model.embedding.weight"
STAGE = "first_stage_model."

REDUCED = {
    "cifar10": ("ddim-cifar10", [32, 64, 64, 64], []),
    "bedrooms": ("ldm-lsun-bedrooms256", [32, 64, 96, 128], [32, 64, 128]),
    "churches": ("ldm-lsun-churches256", [32, 64, 64, 128, 128], [32, 64, 128, 128]),
    "imagenet": ("ldm-cin256-v2", [32, 64, 96, 160], [32, 64, 128]),
}
"""Manifest, widths of the U-Net and of the first stage: the published networks with the narrowest level at 32."""

HEADS = {"bedrooms": {"head_width": 32}, "churches": {"heads": 8}, "imagenet": {"heads": 1}}


@pytest.fixture(autouse=True)
def reduced_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the recipes of the published networks, the same with narrow ones."""
    whole = Path(recipe.__file__).parents[1] / "recipes"
    root = tmp_path / "recipes"
    root.mkdir()
    for name, (_, widths, stage) in REDUCED.items():
        text = f'extends = "{whole / name / name}.toml"\n[unet.arguments]\nblock_out_channels = {widths}\n'
        text += "attention_head_dim = 4\n" if name == "churches" else ""
        text += f"[first_stage.arguments]\nblock_out_channels = {stage}\n" if stage else ""
        (root / f"{name}.toml").write_text(text)
    monkeypatch.setattr(recipe, "roots", lambda: [root])


def original(name: str) -> dict[str, Tensor]:
    shapes = originals.shrunk(originals.manifest(REDUCED[name][0]), 32, first_stage_width=32)
    return originals.random_state(shapes, linear_end=0.0155 if name == "churches" else 0.0195)


def checkpoint(path: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """A file as published: ermongroup's is the bare state dict, CompVis' has it under 'state_dict'."""
    state = original(name)
    torch.save(state if name == "cifar10" else {"state_dict": state, "global_step": 7}, path)
    return path, state


def function_of(name: str, state: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The original's noise estimate, with the averaged weights where the file has them."""
    if name == "cifar10":
        return lambda x, t: originals.ddim_cifar(state, x, t)
    own = originals.averaged(state) if name != "imagenet" else state
    rows = state.get(EMBEDDING)

    def estimate(x: Tensor, t: Tensor, *classes: Tensor) -> Tensor:
        context = rows[classes[0]][:, None] if classes else None
        return originals.ldm_unet(originals.below(own, UNET), x, t, context, **HEADS[name])

    return estimate


def inputs(spec: Recipe) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    side = 32 if spec.first_stage is None or spec.unet.heads else 16
    x = torch.randn((2, spec.unet.arguments["in_channels"], side, side), generator=random)
    return x, torch.tensor([11, 933]), *((torch.tensor([207, 1000]),) if spec.unet.n_classes else ())


def close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max()) < 2e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("name", REDUCED)
@torch.no_grad()
def test_from_a_file_to_a_teacher(name: str, home: Path, tmp_path: Path, bdm: Bdm):
    path, state = checkpoint(tmp_path / "model.ckpt", name)
    code, out, err = bdm("import", str(path), "--model", name, "-f", "json")
    assert code == 0, err
    spec = recipe.load(name)
    folder = places.locate(spec.model.pretrained)
    assert folder.is_relative_to(home)
    rows = {row["Part"]: row for row in json.loads(out)}
    assert rows["unet"]["Class"] == spec.unet.kind
    averaged = {"cifar10": "as in the file", "imagenet": "raw"}.get(name, "moving average (EMA)")
    assert rows["unet"]["Weights"] == averaged

    # bdm's own reading
    wanted = function_of(name, state)(*inputs(spec))
    teacher = load_teacher(spec)
    ours = estimate_noise(teacher, *inputs(spec))
    assert close(ours, wanted)

    # a recipe without a network of its own
    bare = tmp_path / "mine.toml"
    sections = spec.model_dump(mode="json")
    bare.write_text(
        'summary = "mine"\n'
        + "".join(
            f"[{section}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in sections[section].items())
            for section in ("data", "model", "method", "train", "sample", "evaluate")
        )
    )
    mine = recipe.load(str(bare))
    assert (mine.unet.kind, mine.unet.heads, mine.unet.n_classes) == (
        spec.unet.kind,
        spec.unet.heads,
        spec.unet.n_classes,
    )
    assert torch.equal(noise_scheduler(mine.scheduler).alphas_cumprod, noise_scheduler(spec.scheduler).alphas_cumprod)
    assert mine.scheduler == spec.scheduler
    assert torch.equal(estimate_noise(load_teacher(mine), *inputs(spec)), ours)
    assert type(conditions.of_recipe(mine)) is type(conditions.of_recipe(spec))

    # diffusers' reading
    network = getattr(diffusers, spec.unet.kind).from_pretrained(folder / "unet").eval().requires_grad_(False)
    x, t, *classes = inputs(spec)
    context = [state[EMBEDDING][classes[0]][:, None]] if classes else []
    theirs = network(x, t, *context).sample
    assert torch.equal(theirs, ours) == (name != "churches")  # whose number of heads it cannot know

    # the first stage
    if spec.first_stage is None:
        return
    assert mine.first_stage.kind == spec.first_stage.kind
    picture = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1
    parts = originals.below(state, STAGE)
    for each in (spec, mine):
        stage = first_stage.load(each.first_stage)
        if name == "churches":
            moments = originals.kl_moments(parts, picture)
            assert stage.scale == pytest.approx(0.22)
            assert close(stage.latents(stage.moments(picture)), moments[:, :4] * 0.22)
            assert close(stage.decode(moments[:, :4] * 0.22), originals.kl_decode(parts, moments[:, :4]))
        else:
            latents = originals.vq_encode(parts, picture)
            assert stage.scale == 1
            assert close(stage.latents(stage.moments(picture)), latents)
            assert close(stage.decode(latents), originals.vq_decode(parts, latents))


def test_where_a_folder_comes_from(tmp_path: Path, bdm: Bdm):
    path, _ = checkpoint(tmp_path / "model-790000.ckpt", "cifar10")
    code, _, err = bdm("import", str(path), "--model", "cifar10", "--out", str(tmp_path / "mine"))
    assert code == 0, err
    made = json.loads((tmp_path / "mine" / "origin.json").read_text())
    assert made["model"] == "cifar10"
    assert made["file"] == "model-790000.ckpt"
    assert made["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert made["weights"] == "as in the file"
    assert made.items() >= records.provenance().items()
    assert sorted(p.name for p in tmp_path.iterdir() if "mine" in p.name) == ["mine"]


@torch.no_grad()
def test_diffusers_pipeline_makes_our_images_of_pixels(tmp_path: Path):
    path, _ = checkpoint(tmp_path / "model.ckpt", "cifar10")
    import_checkpoint.run(path, "cifar10", out=tmp_path / "mine")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "mine")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(5), num_inference_steps=2, output_type="np").images
    assert_same_images(theirs, "cifar10", tmp_path / "mine", (3, 32, 32))


@torch.no_grad()
def test_diffusers_pipeline_makes_our_images_of_latents(tmp_path: Path):
    path, _ = checkpoint(tmp_path / "model.ckpt", "bedrooms")
    import_checkpoint.run(path, "bedrooms", out=tmp_path / "mine")
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "mine")
    pipeline.unet.register_to_config(sample_size=16)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(5), num_inference_steps=2, output_type="np").images
    assert_same_images(theirs, "bedrooms", tmp_path / "mine", (3, 16, 16))


def assert_same_images(theirs: np.ndarray, name: str, folder: Path, shape: tuple[int, ...]) -> None:
    """Two steps of DDIM from the same noise; images as diffusers' pipelines give them, in [0, 1]."""
    spec = recipe.load(name, [f"model.pretrained={folder}", "sample.steps=2", "sample.eta=0"])
    teacher = load_teacher(spec)
    noise = torch.randn((2, *shape), generator=torch.Generator().manual_seed(5))
    x = sample(lambda x, t: estimate_noise(teacher, x, t), spec.scheduler, spec.sample, noise, [])
    if spec.first_stage is not None:
        stage = spec.first_stage.model_copy(update={"path": str(folder / "vqvae")})
        x = first_stage.load(stage).decode(x)
    ours = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_only_what_diffusers_can_run_is_a_pipeline_of_its(tmp_path: Path):
    for name, runs in (("cifar10", True), ("churches", False), ("imagenet", False)):
        path, _ = checkpoint(tmp_path / f"{name}.ckpt", name)
        import_checkpoint.run(path, name, out=tmp_path / name)
        assert (tmp_path / name / "model_index.json").exists() == runs


@torch.no_grad()
def test_raw_weights(tmp_path: Path):
    path, state = checkpoint(tmp_path / "model.ckpt", "bedrooms")
    table = import_checkpoint.run(path, "bedrooms", weights="raw", out=tmp_path / "raw")
    assert table.loc[0, "Weights"] == "raw"
    assert json.loads((tmp_path / "raw" / "origin.json").read_text())["weights"] == "raw"
    spec = recipe.load("bedrooms", [f"model.pretrained={tmp_path / 'raw'}"])
    x, t = inputs(spec)
    raw = originals.ldm_unet(originals.below(state, UNET), x, t, head_width=32)
    ours = estimate_noise(load_teacher(spec), x, t)
    assert close(ours, raw)
    assert not close(ours, function_of("bedrooms", state)(x, t))


@pytest.mark.parametrize(("name", "of"), [("vq-f4", "bedrooms"), ("kl-f8", "churches")])
def test_a_first_stage_from_its_own_file(name: str, of: str, home: Path, tmp_path: Path, bdm: Bdm):
    state = originals.random_state(originals.shrunk(originals.manifest(name), 32))
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    code, _, err = bdm("import", str(tmp_path / "model.ckpt"), "--model", name)
    assert code == 0, err
    spec = recipe.load(of, [f"first_stage.path=models/first-stages/{name}"])
    stage = first_stage.load(spec.first_stage)
    picture = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1)) * 2 - 1
    wanted = originals.vq_encode(state, picture) if name == "vq-f4" else originals.kl_moments(state, picture)
    with torch.no_grad():
        assert close(stage.moments(picture), wanted)
    assert stage.scale == 1
    assert (home / "models" / "first-stages" / name / "origin.json").exists()


# what goes wrong


def test_a_folder_that_is_there_is_left_alone(home: Path, tmp_path: Path, bdm: Bdm):
    path, _ = checkpoint(tmp_path / "model.ckpt", "cifar10")
    folder = places.locate(recipe.load("cifar10").model.pretrained)
    folder.mkdir(parents=True)
    (folder / "mine").write_text("precious")
    code, _, err = bdm("import", str(path), "--model", "cifar10")
    assert code == 2
    assert f"{folder} exists" in err
    assert [p.name for p in folder.parent.iterdir()] == ["cifar10"]
    assert [p.name for p in folder.iterdir()] == ["mine"]


def test_an_unknown_model(home: Path, bdm: Bdm):
    code, _, err = bdm("import", "model.ckpt", "--model", "bedroom")
    assert code == 2
    assert "unknown model 'bedroom'. Did you mean 'bedrooms'?" in err
    assert "known: bedrooms, churches, cifar10, ffhq, imagenet, kl-f8, vq-f4" in err
    assert not list(home.iterdir())


def test_no_file(home: Path, bdm: Bdm):
    code, _, err = bdm("import", "nowhere.ckpt", "--model", "bedrooms")
    assert code == 2
    assert "there is no file nowhere.ckpt" in err
    assert not list(home.iterdir())


def test_the_file_of_another_model_leaves_nothing(home: Path, tmp_path: Path, bdm: Bdm):
    path, _ = checkpoint(tmp_path / "model.ckpt", "cifar10")
    code, _, err = bdm("import", str(path), "--model", "bedrooms")
    assert code == 2
    assert "bdm: " in err
    assert not list(home.rglob("*.*"))


def test_an_interrupted_import_leaves_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped between the last network and the record of where it came from."""
    path, _ = checkpoint(tmp_path / "model.ckpt", "cifar10")

    def stop() -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "provenance", stop)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint.run(path, "cifar10")
    folder = places.locate(recipe.load("cifar10").model.pretrained)
    assert not folder.exists()
    assert not list(folder.parent.iterdir())
    import_checkpoint.run(path, "cifar10")
    assert (folder / "origin.json").exists()


def test_what_a_kill_left_is_no_part_of_the_next_import(tmp_path: Path):
    path, _ = checkpoint(tmp_path / "model.ckpt", "cifar10")
    (tmp_path / ".mine.part" / "unet").mkdir(parents=True)
    (tmp_path / ".mine.part" / "unet" / "rubbish").write_text("half a network")
    import_checkpoint.run(path, "cifar10", out=tmp_path / "mine")
    assert not (tmp_path / ".mine.part").exists()
    assert sorted(p.name for p in (tmp_path / "mine" / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_place_that_cannot_be_written(tmp_path: Path):
    path, _ = checkpoint(tmp_path / "model.ckpt", "cifar10")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BdmError, match="cannot write"):
        import_checkpoint.run(path, "cifar10", out=tmp_path / "file" / "mine")
    assert (tmp_path / "file").read_text() == "not a folder"
