"""`bdm first-stage`: train a miniature's autoencoder from scratch, without perceptual or adversarial loss."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bdm_cli import output, runs
from bdm_cli.diffusion import data, first_stage
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe

SCALING_IMAGES = 512
"""Images whose latents' standard deviation gives the scaling factor."""


def run(spec: Recipe, seed: int = 0, out: Path | None = None) -> pd.DataFrame:
    """Train with the recipe's [first_stage.train] budget and write a diffusers folder; one row about it.

    out: the folder; None = runs/<recipe>-first-stage-s<seed>.
    Raises: BdmError if the recipe has no first stage or no budget for one, or the folder exists.
    """
    if spec.first_stage is None or spec.first_stage.train is None:
        raise BdmError(
            f"recipe '{spec.name}' trains no first stage (no [first_stage.train]).\n  allowed: digits-ldm, digits-cond"
        )
    images = data.training_images(spec)
    folder = out or runs.run_dir(f"{spec.name}-first-stage-s{seed}")
    if folder.exists():
        raise BdmError(f"{folder} exists.\n  remove it, or give another --out or --seed")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise BdmError(f"cannot write {folder} ({error.strerror}).\n  give another --out") from None
    try:
        return _trained(spec, seed, images, folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _trained(spec: Recipe, seed: int, images: data.Images, folder: Path, temporary: Path) -> pd.DataFrame:
    budget = spec.first_stage.train
    if budget.threads:
        torch.set_num_threads(budget.threads)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = first_stage.build(spec.first_stage).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=budget.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    with output.progress("first stage", budget.steps, "steps") as advance:
        for step in range(budget.steps):
            chosen = data.batch_indices(len(images), budget.batch, step, seed)
            x = data.to_float(images[chosen]).to(device)
            error, prior = losses(network, x)
            optimizer.zero_grad()
            (error + budget.prior * prior).backward()
            optimizer.step()
            schedule.step()
            advance(1, f"squared error {error.item():.5f}")
    network.eval()
    sample = np.random.default_rng(seed).permutation(len(images))[:SCALING_IMAGES]
    factor = first_stage.scaling_factor(network, data.to_float(images[sample]).to(device))
    first_stage.save(network.cpu(), temporary, factor)
    temporary.chmod(0o755)
    temporary.rename(folder)
    with torch.no_grad():
        x = data.to_float(images[sample])
        stage = first_stage.FirstStage(network)
        rebuilt = stage.decode(stage.latents(stage.moments(x)))
    rms = float((rebuilt - x).square().mean().sqrt()) * 127.5
    row = {"First stage": str(folder), "Parameters": sum(p.numel() for p in network.parameters())}
    return pd.DataFrame([row | {"Steps": budget.steps, "RMS error (grey levels)": rms, "Scaling factor": factor}])


def losses(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean squared error of the reconstruction, divergence per latent number (KL) or codebook loss (VQ))."""
    if hasattr(network, "quantize"):
        decoded = network.decode(network.encode(x).latents)
        return (decoded.sample - x).square().mean(), decoded.commit_loss.mean()
    posterior = network.encode(x).latent_dist
    latents = posterior.sample()
    return (network.decode(latents).sample - x).square().mean(), posterior.kl().mean() / latents[0].numel()
