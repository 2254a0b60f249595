"""The autoencoder of a latent diffusion model (arXiv:2112.10752, Sec. 3.1): images <-> latents. Never quantized."""

from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from bdm_cli import recipe
from bdm_cli.diffusion.models import constructed, construction, from_pretrained
from bdm_cli.errors import BdmError
from bdm_cli.places import locate

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Clamp of the posterior's log variance in the original and in diffusers."""


class FirstStage(nn.Module):
    """An AutoencoderKL or VQModel of diffusers with its scaling factor, which diffusers itself never applies.

    Latents are what the U-Net sees: scaling factor * z, with z a draw from the posterior (KL) or the vector before
    its quantization (VQ), as the original's interface returns it (CompVis `ddpm.py`, `VQModelInterface`).

    Shapes: images [N, 3 or 1, H, W] in [-1, 1]; latents [N, c, H/f, W/f]; moments as latents, for KL with 2c channels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.variational = isinstance(network, diffusers.AutoencoderKL)
        self.scale = float(network.config.scaling_factor)

    def moments(self, images: Tensor) -> Tensor:
        """What the encoder says: mean and log variance of the posterior (KL), or z itself (VQ)."""
        if self.variational:
            return self.network.encode(images).latent_dist.parameters
        return self.network.encode(images).latents

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents; noise: the posterior's standard normal draw (KL), None takes its mean."""
        if not self.variational:
            return moments * self.scale
        mean, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp() * noise
        return mean * self.scale

    def drawn(self, moments: Tensor, random: torch.Generator | None = None) -> Tensor:
        """Scaled latents with a draw from the posterior (KL) by `random`, a CPU generator; None = torch's own."""
        if not self.variational:
            return self.latents(moments)
        n, channels, height, width = moments.shape
        noise = torch.randn((n, channels // 2, height, width), generator=random)
        return self.latents(moments, noise.to(moments.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Images, not clipped; VQ quantizes to the nearest code first, as the original does."""
        return self.network.decode(latents / self.scale, return_dict=False)[0]


def build(spec: recipe.FirstStage) -> nn.Module:
    """The autoencoder with fresh weights; its scaling factor is 1 until it is known. Raises: BdmError."""
    arguments = {"scaling_factor": 1.0} | construction(spec.arguments)
    return constructed(lambda: getattr(diffusers, spec.kind)(**arguments), "first_stage.arguments", spec.kind)


def load(spec: recipe.FirstStage) -> FirstStage:
    """The first stage in the recipe's folder, frozen, in eval mode.

    Raises: BdmError if the folder is missing, damaged, or holds another autoencoder than the recipe says.
    """
    path = locate(spec.path)
    if not path.is_dir():
        raise BdmError(
            f"first_stage.path: there is no folder {path}.\n  get it: {spec.get_it or 'bdm import makes it'}"
        )
    network = from_pretrained(getattr(diffusers, spec.kind), path)
    wanted = construction(spec.arguments)
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in network.config.items()}
    other = sorted(k for k, v in wanted.items() if told.get(k) != v)
    if other:
        lines = "\n".join(f"  {k}: {told.get(k)} there, {wanted[k]} in the recipe" for k in other)
        raise BdmError(
            f"{path} holds another first stage than the recipe's:\n{lines}\n  give the right first_stage.path"
        )
    shifted = sorted(k for k in ("shift_factor", "latents_mean", "latents_std") if told.get(k) is not None)
    if shifted:
        raise BdmError(f"{path}: its latents are shifted ({', '.join(shifted)}).\n  allowed: a scaling_factor alone")
    return FirstStage(network).eval().requires_grad_(False)


def save(network: nn.Module, folder: Path, scaling_factor: float) -> None:
    """Write the autoencoder as a diffusers folder that carries its scaling factor."""
    network.register_to_config(scaling_factor=scaling_factor)
    network.save_pretrained(folder)


@torch.no_grad()
def scaling_factor(network: nn.Module, images: Tensor) -> float:
    """1 / standard deviation of the latents of one batch (LDM's `scale_by_std`)."""
    stage = FirstStage(network)
    stage.scale = 1.0
    return float(1 / stage.drawn(stage.moments(images)).std())
