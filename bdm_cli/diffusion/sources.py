"""What a U-Net is trained on: pixels, or latents of the first stage, encoded on the fly or read from a cache."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bdm_cli import output
from bdm_cli.diffusion import data, first_stage, latent_cache
from bdm_cli.diffusion.first_stage import FirstStage
from bdm_cli.places import locate
from bdm_cli.recipe import Recipe


class Pixels:
    """Training images as they are: float32 [n, C, H, W] in [-1, 1]; some mirrored where the recipe says so.

    identity: what a training on it must be resumed with.
    """

    identity = "images"

    def __init__(self, spec: Recipe) -> None:
        self.images = data.training_images(spec)
        told = spec.unet.condition  # captions that nobody is told may be incomplete
        self.labels = self.images.labels if told == "classes" else None
        self.captions = self.images.captions if told == "text" else None
        self.flip, self.random_crop = spec.data.flip, spec.data.crop == "random"

    def __len__(self) -> int:
        return len(self.images)

    def known(self, indices: np.ndarray) -> np.ndarray | Sequence[str] | None:
        """Labels or captions of these images."""
        return _of(self.labels, self.captions, indices)

    def batch(self, indices: np.ndarray, random: torch.Generator) -> Tensor:
        """x_0 of these images; every draw comes from `random`."""
        crops = np.random.default_rng(torch.randint(2**62, (1,), generator=random).item() if self.random_crop else 0)
        x = data.to_float(self.images.views(indices, crops))
        if self.flip:
            flipped = torch.rand(len(x), generator=random) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        return x


class Encoded(Pixels):
    """Their latents: the first stage runs on every batch."""

    def __init__(self, spec: Recipe, stage: FirstStage) -> None:
        super().__init__(spec)
        self.stage = stage

    @torch.no_grad()
    def batch(self, indices: np.ndarray, random: torch.Generator) -> Tensor:
        x = super().batch(indices, random).to(next(self.stage.parameters()).device)
        return self.stage.drawn(self.stage.moments(x), random)


class Cached:
    """Their latents, from a cache of moments."""

    def __init__(self, spec: Recipe, stage: FirstStage) -> None:
        path = locate(spec.data.path)
        at_hand = not spec.data.path or path.is_file() or (path.is_dir() and any(path.iterdir()))
        self.cache = latent_cache.Cache(spec, data.training_images(spec) if at_hand else None)
        self.stage = stage
        self.identity = f"a latent cache ({self.cache.identity})"

    def __len__(self) -> int:
        return len(self.cache)

    def known(self, indices: np.ndarray) -> np.ndarray | Sequence[str] | None:
        return _of(self.cache.labels, self.cache.captions, indices)

    def batch(self, indices: np.ndarray, random: torch.Generator) -> Tensor:
        n, cache = len(indices), self.cache  # the same draws as on images, where there is one crop
        crops = (
            torch.randint(cache.crops, (n,), generator=random) if cache.crops > 1 else torch.zeros(n, dtype=torch.long)
        )
        views = crops * 2 + (torch.rand(n, generator=random) < 0.5) if cache.flip else crops
        moments = cache.moments(indices, views.numpy()).to(next(self.stage.parameters()).device)
        return self.stage.drawn(moments, random)


def of_recipe(spec: Recipe, device: torch.device) -> Pixels | Cached:
    """The source of a recipe's x_0. Raises: BdmError if images, cache or first stage cannot be read."""
    if spec.first_stage is None:
        return Pixels(spec)
    stage = first_stage.load(spec.first_stage).to(device)
    if latent_cache.exists(spec):
        found = Cached(spec, stage)
        output.say(f"{spec.name}: {len(found):,} images' latents from {found.cache.folder}")
        return found
    return Encoded(spec, stage)


def _of(labels: np.ndarray | None, captions: Sequence[str] | None, indices: np.ndarray) -> object:
    if labels is not None:
        return labels[indices]
    return None if captions is None else [captions[i] for i in indices]
