"""From noise to images: one random generator per image, so that an image does not depend on its neighbours."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from bdm_cli.diffusion.models import estimate_noise, noise_scheduler
from bdm_cli.recipe import Recipe


def noise_streams(seed: int, indices: range) -> list[np.random.Generator]:
    """One generator per image, a pure function of (seed, image index)."""
    return [np.random.default_rng([seed, index]) for index in indices]


def draw(streams: list[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [len(streams), *shape], each image's from its own stream."""
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


@torch.inference_mode()
def ddim(
    unet: nn.Module, scheduler: DDIMScheduler, noise: Tensor, steps: int, eta: float, streams: list[np.random.Generator]
) -> Tensor:
    """DDIM (arXiv:2010.02502, Eq. 12) from `noise` [N, C, H, W] to x_0, `steps` network calls.

    streams: where the noise of eta > 0 comes from, one per image.
    """
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps.tolist():
        time = torch.full((len(x),), t, device=x.device)
        extra = draw(streams, x.shape[1:]).to(x.device) if eta > 0 else None
        x = scheduler.step(estimate_noise(unet, x, time), t, x, eta=eta, variance_noise=extra, return_dict=False)[0]
    return x


def to_bytes(x: Tensor, how: str) -> np.ndarray:
    """Float [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C]: 'round' (ermongroup) or 'truncate' (CompVis, ADM)."""
    levels = ((x.float() + 1) * 127.5).clamp(0, 255)
    levels = levels.round() if how == "round" else levels
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def images(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    indices: range,
    *,
    shape: tuple[int, int, int],
    steps: int,
    eta: float,
    batch: int,
    seed: int,
    how: str,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The images with these indices, uint8 [len(indices), H, W, C]; shape is (C, H, W).

    The network always runs on full batches (the last one is filled up with repeats), so that the arithmetic of an image
    does not depend on how many images were asked for.
    """
    streams = noise_streams(seed, indices)
    filled = streams + [np.random.default_rng(0)] * (batch - len(streams))
    x = ddim(unet, scheduler, draw(filled, shape).to(device), steps, eta, filled)
    return to_bytes(x[: len(indices)], how)


def of_recipe(spec: Recipe, unet: nn.Module, batch: int, seed: int) -> Callable[[range], np.ndarray]:
    """`images` with the sampler's settings and the network's input shape of a recipe, on the network's device."""
    arguments, s = spec.unet.arguments, spec.sample
    return functools.partial(
        images,
        unet,
        noise_scheduler(spec.scheduler),
        shape=(arguments["in_channels"], arguments["sample_size"], arguments["sample_size"]),
        steps=s.steps,
        eta=s.eta,
        batch=batch,
        seed=seed,
        how=s.to_bytes,
        device=next(unet.parameters()).device,
    )


def grid(pictures: np.ndarray, columns: int = 8, tile: int = 48) -> Image.Image:
    """A contact sheet of uint8 images [N, H, W, C]; small ones are enlarged to about `tile` pixels."""
    scale = max(1, tile // pictures.shape[1])
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = pictures.shape
    rows, gap = -(-n // columns), 2
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
