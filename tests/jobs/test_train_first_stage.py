"""`bdm first-stage`: its losses against their formulas, the folder it writes, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECIPES, Bdm

from bdm_cli.diffusion import data, first_stage
from bdm_cli.errors import BdmError
from bdm_cli.jobs import first_stage as job
from bdm_cli.recipe import Recipe

MODELS = ["tiny-ldm", "tiny-cond"]


def digits(spec: Recipe, n: int = 32) -> torch.Tensor:
    return data.to_float(data.training_images(spec)[:n])


@pytest.mark.parametrize("name", MODELS)
def test_a_few_steps_and_the_folder_loads(name: str, home: Path, tiny_recipe: Callable[..., Recipe], bdm: Bdm):
    code, out, err = bdm("first-stage", "-r", str(RECIPES / f"{name}.toml"), "-f", "json")
    assert code == 0, err
    (row,) = json.loads(out)
    folder = home / "runs" / f"{name}-first-stage-s0"
    assert Path(row["First stage"]) == folder
    assert row["Steps"] == 3
    assert not list(folder.parent.glob(".*"))
    spec = tiny_recipe(f"first_stage.path=runs/{folder.name}", name=name)
    stage = first_stage.load(spec.first_stage)
    assert stage.scale == pytest.approx(row["Scaling factor"], rel=1e-8)
    assert row["Parameters"] == sum(p.numel() for p in stage.parameters())
    images = digits(spec, 512)
    with torch.no_grad():
        moments = stage.moments(images)
        noise = torch.randn(stage.latents(moments).shape, generator=torch.Generator().manual_seed(0))
        assert float(stage.latents(moments, noise).std()) == pytest.approx(1, rel=0.1)
        rms = float((stage.decode(stage.latents(moments)) - images).square().mean().sqrt()) * 127.5
    assert rms == pytest.approx(row["RMS error (grey levels)"], rel=0.05)

    code, _, err = bdm("first-stage", "-r", str(RECIPES / f"{name}.toml"))
    assert code == 2
    assert f"{folder} exists" in err
    assert first_stage.load(spec.first_stage).scale == stage.scale


@pytest.mark.parametrize("name", MODELS)
def test_training_is_a_function_of_the_seed(name: str, tmp_path: Path, tiny_recipe: Callable[..., Recipe]):
    spec = tiny_recipe(name=name)
    tensors = []
    for i, seed in enumerate((0, 0, 1)):
        job.run(spec, seed=seed, out=tmp_path / f"{i}")
        tensors.append((tmp_path / f"{i}" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert tensors[0] == tensors[1]
    assert tensors[0] != tensors[2]


@pytest.mark.parametrize("name", MODELS)
def test_the_error_falls(name: str, tmp_path: Path, tiny_recipe: Callable[..., Recipe]):
    """Measured: from 97 after one step to 27 after 60 (KL), from 102 to 54 (VQ) grey levels."""
    first, last = (
        job.run(tiny_recipe(f"first_stage.train.steps={steps}", name=name), out=tmp_path / f"{steps}").loc[
            0, "RMS error (grey levels)"
        ]
        for steps in (1, 60)
    )
    assert last < 0.7 * first


def test_the_losses_of_a_variational_first_stage(tiny_recipe: Callable[..., Recipe]):
    """Divergence from N(0, 1): mean over latent numbers of (m^2 + v - 1 - log v) / 2, in float64."""
    spec = tiny_recipe(name="tiny-ldm")
    network, x = first_stage.build(spec.first_stage), digits(spec)
    torch.manual_seed(3)
    error, divergence = job.losses(network, x)
    with torch.no_grad():
        moments = first_stage.FirstStage(network).moments(x)
        mean, log_variance = np.split(moments.double().numpy(), 2, axis=1)
        expected = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).mean()
        torch.manual_seed(3)
        z = moments[:, :4] + (0.5 * moments[:, 4:]).exp() * torch.randn(32, 4, 8, 8)
        rebuilt = network.decode(z).sample
    assert divergence.item() == pytest.approx(expected, rel=1e-4)
    assert error.item() == pytest.approx(float((rebuilt - x).square().mean()), rel=1e-4)
    (error + divergence).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_the_losses_of_a_vector_quantized_first_stage(tiny_recipe: Callable[..., Recipe]):
    """The codes and the encoder's outputs are drawn to each other; the error's gradient passes straight through."""
    spec = tiny_recipe(name="tiny-cond")
    network, x = first_stage.build(spec.first_stage), digits(spec)
    error, codebook = job.losses(network, x)
    with torch.no_grad():
        z = network.quant_conv(network.encoder(x))
        codes = network.quantize.embedding.weight
        rows = z.permute(0, 2, 3, 1)
        nearest = codes[torch.cdist(rows.reshape(-1, 3), codes).argmin(1)].reshape(rows.shape)
        distance = float((nearest - rows).square().mean())
        rebuilt = network.decode(z).sample
    assert error.item() == pytest.approx(float((rebuilt - x).square().mean()), rel=1e-4)
    assert codebook.item() == pytest.approx(1.25 * distance, rel=1e-3)  # LDM: beta = 0.25
    error.backward(retain_graph=True)
    assert network.encoder.conv_in.weight.grad.abs().sum() > 0
    assert network.quantize.embedding.weight.grad is None or not network.quantize.embedding.weight.grad.any()
    codebook.backward()
    assert network.quantize.embedding.weight.grad.abs().sum() > 0


def test_recipes_without_a_first_stage_to_train(bdm: Bdm):
    for name in ("digits", "bedrooms"):
        code, _, err = bdm("first-stage", "-r", name)
        assert code == 2
        assert f"recipe '{name}' trains no first stage" in err


def test_a_place_that_cannot_be_written(tmp_path: Path, tiny_recipe: Callable[..., Recipe]):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BdmError):
        job.run(tiny_recipe(name="tiny-ldm"), out=tmp_path / "file" / "stage")
