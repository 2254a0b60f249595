"""First stages: moments, latents and decoding against their formulas; the shipped ones on digits; folders."""

import json
import math
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdm_cli import recipe
from bdm_cli.diffusion import data, first_stage
from bdm_cli.diffusion.first_stage import FirstStage
from bdm_cli.errors import BdmError
from bdm_cli.places import locate

SHAPE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 8],
    "latent_channels": 3,
    "norm_num_groups": 4,
    "sample_size": 16,
}
SCALE = 0.7
SHIPPED = ["digits-ldm", "digits-cond"]


def spec_of(kind: str, path: Path | str = "nowhere", **arguments: object) -> recipe.FirstStage:
    extra = {"num_vq_embeddings": 16} if kind == "VQModel" else {}
    return recipe.FirstStage(kind=kind, path=str(path), arguments=SHAPE | extra | arguments)


def network_of(kind: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return first_stage.build(spec_of(kind, scaling_factor=SCALE, **arguments)).eval().requires_grad_(False)


def pictures(n: int = 2, side: int = 16) -> Tensor:
    return torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(1)) * 2 - 1


def message(spec: recipe.FirstStage) -> str:
    with pytest.raises(BdmError) as caught:
        first_stage.load(spec)
    return str(caught.value)


# formulas


def test_kl_moments_are_the_encoders():
    network = network_of("AutoencoderKL")
    stage = FirstStage(network)
    moments = stage.moments(pictures())
    assert moments.shape == (2, 6, 8, 8)
    assert torch.equal(moments, network.quant_conv(network.encoder(pictures())))


def test_kl_latents_are_scaled_draws_of_the_posterior():
    """scale (mean + exp(clip(log variance, -30, 20) / 2) noise), in float64; the clamp is of the log variance."""
    stage = FirstStage(network_of("AutoencoderKL"))
    random = np.random.default_rng(0)
    mean, noise = (random.standard_normal((2, 3, 4, 4)) for _ in range(2))
    log_variance = random.uniform(-4, 2, (2, 3, 4, 4))
    log_variance.flat[:6] = [-31, -30, -100, 20, 21, 50]
    moments = torch.tensor(np.concatenate([mean, log_variance], axis=1))
    expected = SCALE * (mean + np.exp(np.clip(log_variance, -30, 20) / 2) * noise)
    np.testing.assert_allclose(stage.latents(moments, torch.tensor(noise)), expected, rtol=1e-12)
    np.testing.assert_allclose(stage.latents(moments), SCALE * mean, rtol=1e-12)
    posterior = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
    np.testing.assert_allclose(expected / SCALE, posterior.mean + posterior.std * torch.tensor(noise), rtol=1e-12)


def test_vq_latents_are_not_quantized():
    network = network_of("VQModel")
    stage = FirstStage(network)
    moments = stage.moments(pictures())
    assert torch.equal(moments, network.quant_conv(network.encoder(pictures())))
    assert torch.equal(stage.latents(moments), moments * SCALE)
    assert torch.equal(stage.latents(moments, torch.ones_like(moments)), moments * SCALE)
    codes = network.quantize.embedding.weight.numpy()
    rows = moments.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    assert np.abs(rows[:, None] - codes).max(-1).min(-1).min() > 1e-4  # none of them is a code


def test_vq_decodes_the_nearest_codes():
    network = network_of("VQModel")
    latents = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(2)) * 0.05
    codes = network.quantize.embedding.weight.double().numpy()
    rows = (latents / SCALE).permute(0, 2, 3, 1).double().numpy()
    nearest = np.square(rows[..., None, :] - codes).sum(-1).argmin(-1)
    assert len(np.unique(nearest)) > 3
    quantized = torch.tensor(codes[nearest]).permute(0, 3, 1, 2).float()
    expected = network.decoder(network.post_quant_conv(quantized))
    assert torch.allclose(FirstStage(network).decode(latents), expected, atol=1e-5)


def test_kl_decodes_unscaled_latents():
    network = network_of("AutoencoderKL")
    latents = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    expected = network.decoder(network.post_quant_conv(latents / SCALE))
    assert torch.equal(FirstStage(network).decode(latents), expected)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("AutoencoderKL", {}),
        ("AutoencoderKL", {"latent_channels": 5}),
        ("VQModel", {}),
        ("VQModel", {"latent_channels": 5, "vq_embed_dim": 2}),
        (
            "VQModel",
            {
                "block_out_channels": [8, 8, 8],
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
            },
        ),
    ],
)
def test_a_recipe_knows_the_shape_of_the_latents(kind: str, arguments: dict):
    """Since it checks the U-Net's input against it."""
    stage = FirstStage(network_of(kind, **arguments))
    latents = stage.latents(stage.moments(pictures()))
    spec = spec_of(kind, **arguments)
    assert latents.shape == (2, spec.channels, 16 // spec.factor, 16 // spec.factor)
    assert stage.decode(latents).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_the_scaling_factor_makes_the_latents_of_unit_deviation(kind: str):
    """Of the latents' variance over everything; the KL posterior's own variance is part of it."""
    network = network_of(kind)
    images = pictures(64)
    torch.manual_seed(0)
    factor = first_stage.scaling_factor(network, images)
    moments = FirstStage(network).moments(images).double().numpy()
    if kind == "VQModel":
        assert factor == pytest.approx(1 / moments.std(ddof=1), rel=1e-5)
        return
    mean, log_variance = np.split(moments, 2, axis=1)
    expected = 1 / math.sqrt(mean.var() + np.exp(log_variance).mean())
    assert factor == pytest.approx(expected, rel=0.02)  # 12,288 draws: 0.6 % standard error
    assert factor < 0.95 / mean.std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_the_scaling_factor_on_a_gpu(kind: str):
    network = network_of(kind)
    torch.manual_seed(0)
    expected = first_stage.scaling_factor(network, pictures(64))
    assert first_stage.scaling_factor(network.cuda(), pictures(64).cuda()) == pytest.approx(expected, rel=0.02)


# the shipped ones


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> tuple[FirstStage, Tensor]:
    """A shipped first stage, and 256 digits."""
    spec = recipe.load(request.param)
    return first_stage.load(spec.first_stage), data.to_float(data.training_images(spec)[:256])


def test_the_shipped_first_stages_rebuild_digits(shipped: tuple[FirstStage, Tensor]):
    """Measured: RMS errors of 1.6 (KL, means), 1.8 (KL, draws) and 1.8 (VQ) of 255 grey levels."""
    stage, images = shipped
    with torch.no_grad():
        moments = stage.moments(images)
        noise = torch.randn(stage.latents(moments).shape, generator=torch.Generator().manual_seed(0))
        for latents in (stage.latents(moments), stage.latents(moments, noise)):
            rms = float((stage.decode(latents) - images).square().mean().sqrt()) * 127.5
            assert rms < 2.5


def test_the_shipped_first_stages_latents_are_of_order_one(shipped: tuple[FirstStage, Tensor]):
    stage, images = shipped
    with torch.no_grad():
        moments = stage.moments(images)
        noise = torch.randn(stage.latents(moments).shape, generator=torch.Generator().manual_seed(0))
        assert float(stage.latents(moments, noise).std()) == pytest.approx(1, rel=0.03)


def test_the_shipped_first_stages_are_frozen(shipped: tuple[FirstStage, Tensor]):
    stage, _ = shipped
    assert not stage.training
    assert not stage.network.training
    assert not any(p.requires_grad for p in stage.parameters())


# folders


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_a_saved_first_stage_is_the_same_with_its_scaling_factor(tmp_path: Path, kind: str):
    network = network_of(kind)
    first_stage.save(network, tmp_path / "stage", 1 / 3)
    stage = first_stage.load(spec_of(kind, tmp_path / "stage"))
    assert stage.scale == 1 / 3
    own, theirs = stage.network.state_dict(), network.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    assert torch.equal(
        stage.latents(stage.moments(pictures())), FirstStage(network).moments(pictures())[:, :3] * (1 / 3)
    )
    assert getattr(diffusers, kind).from_pretrained(tmp_path / "stage").config.scaling_factor == 1 / 3


def test_a_fresh_first_stage_has_no_scaling_factor_yet():
    """Not diffusers' default, which is Stable Diffusion's."""
    assert FirstStage(first_stage.build(spec_of("VQModel"))).scale == 1.0
    assert FirstStage(first_stage.build(spec_of("AutoencoderKL"))).scale == 1.0


def test_no_folder():
    text = message(spec_of("VQModel").model_copy(update={"get_it": "ask me"}))
    assert text.startswith("first_stage.path: there is no folder ")
    assert "ask me" in text


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("AutoencoderKL", {"norm_num_groups": 2}),
        ("AutoencoderKL", {"mid_block_add_attention": False}),
        ("AutoencoderKL", {"block_out_channels": [8, 16]}),
        ("VQModel", {"num_vq_embeddings": 17}),
        ("VQModel", {"lookup_from_codebook": True}),
    ],
)
def test_a_folder_of_another_first_stage(tmp_path: Path, kind: str, arguments: dict):
    """Also where the tensors would fit."""
    first_stage.save(network_of(kind), tmp_path / "stage", 1.0)
    text = message(spec_of(kind, tmp_path / "stage", **arguments))
    assert text.startswith(f"{tmp_path / 'stage'} holds another first stage than the recipe's:")
    ((key, value),) = arguments.items()
    given = tuple(value) if isinstance(value, list) else value
    assert fault_line(key, given) in text
    assert len(text.splitlines()) == 3


def fault_line(key: str, given: object) -> str:
    was = {
        "norm_num_groups": 4,
        "mid_block_add_attention": True,
        "block_out_channels": (8, 8),
        "num_vq_embeddings": 16,
        "lookup_from_codebook": False,
    }
    return f"  {key}: {was[key]} there, {given} in the recipe"


@pytest.mark.parametrize(("saved", "wanted"), [("VQModel", "AutoencoderKL"), ("AutoencoderKL", "VQModel")])
def test_a_folder_of_another_kind(tmp_path: Path, saved: str, wanted: str):
    first_stage.save(network_of(saved), tmp_path / "stage", 1.0)
    assert str(tmp_path / "stage") in message(spec_of(wanted, tmp_path / "stage"))


def test_a_scaling_factor_in_the_recipe_is_not_ignored(tmp_path: Path):
    """It is part of the recipe's id, so it must act, or be refused."""
    first_stage.save(network_of("VQModel"), tmp_path / "stage", 0.25)
    spec = spec_of("VQModel", tmp_path / "stage", scaling_factor=0.5)
    try:
        assert first_stage.load(spec).scale == 0.5
    except BdmError as error:
        assert "scaling_factor" in str(error)  # noqa: PT017


def test_a_shift_of_the_latents_is_not_ignored(tmp_path: Path):
    """AutoencoderKL's shift_factor (Stable Diffusion 3): latents are scale (z - shift)."""
    network = network_of("AutoencoderKL")
    network.register_to_config(shift_factor=0.1)
    first_stage.save(network, tmp_path / "stage", 1.0)
    assert "shift_factor" in message(spec_of("AutoencoderKL", tmp_path / "stage"))


def test_a_damaged_folder(tmp_path: Path):
    first_stage.save(network_of("VQModel"), tmp_path / "stage", 1.0)
    weights = tmp_path / "stage" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    assert "cannot read the network" in message(spec_of("VQModel", tmp_path / "stage"))
    weights.unlink()
    assert "cannot read the network" in message(spec_of("VQModel", tmp_path / "stage"))
    weights.write_bytes(whole)
    (tmp_path / "stage" / "config.json").write_text("{")
    assert str(tmp_path / "stage") in message(spec_of("VQModel", tmp_path / "stage"))


def test_a_copy_of_the_shipped_folder_serves(tmp_path: Path):
    """Its place is no part of the recipe's identity."""
    there = locate(recipe.load("digits-ldm").first_stage.path)
    shutil.copytree(there, tmp_path / "copy")
    spec = recipe.load("digits-ldm", [f"first_stage.path={tmp_path / 'copy'}"])
    assert spec.id == "digits-ldm"
    assert spec.digest == recipe.load("digits-ldm").digest
    factor = json.loads((there / "config.json").read_text())["scaling_factor"]
    assert first_stage.load(spec.first_stage).scale == factor
