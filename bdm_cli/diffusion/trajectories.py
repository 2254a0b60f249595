"""The calls that a full-precision network gets while it samples: training inputs without data."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bdm_cli.diffusion import conditions
from bdm_cli.diffusion.models import estimate_noise
from bdm_cli.diffusion.sampling import draw, guided, sample, times
from bdm_cli.recipe import Recipe

STREAM = 2
"""Keeps the noise of trajectories apart from that of the images that are drawn later with the same seed."""


class Call(NamedTuple):
    """inputs: x_t [N, C, H, W], t [N] and the condition, if any; estimate: the network's, [N, C, H, W]."""

    inputs: tuple[Tensor, ...]
    estimate: Tensor


class Calls:
    """The n-th call along trajectories of the recipe's sampler, train.batch images each: call n belongs to trajectory
    n // len(self), and is a pure function of (network, recipe, seed, n).

    The trajectory under way is kept in memory; asking for calls in order computes each once. Where the recipe samples
    with guidance, this drives the trajectory; the estimate is the network's own, of the given condition.
    rank, world: this process and how many there are; each follows every world-th trajectory.
    """

    def __init__(self, spec: Recipe, teacher: nn.Module, seed: int, rank: int = 0, world: int = 1) -> None:
        self.spec, self.teacher, self.seed, self.rank, self.world = spec, teacher, seed, rank, world
        s = spec.sample
        self.length = len(times(s.sampler, spec.scheduler, s.steps, s.spacing))
        self.condition = conditions.of_recipe(spec, self.device)
        self.number, self.calls = -1, []

    def __len__(self) -> int:
        """Calls per trajectory."""
        return self.length

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def __call__(self, n: int) -> Call:
        number, position = divmod(n, self.length)
        if number != self.number:
            self.number, self.calls = number, self.trajectory(number * self.world + self.rank)
        return self.calls[position]

    def trajectory(self, number: int) -> list[Call]:
        """Every call of one trajectory, in the sampler's order."""
        spec, settings, n = self.spec, self.spec.sample, self.spec.train.batch
        indices = range(number * n, (number + 1) * n)
        # not [seed, STREAM, index]: NumPy fills short seeds up with zeros, so that index 0 would be image STREAM's own
        seeds = [np.random.SeedSequence([self.seed, index], spawn_key=(STREAM,)) for index in indices]
        streams = [np.random.default_rng(seed) for seed in seeds]
        told = [part.to(self.device) for part in self.condition.of_images(indices, self.seed)]
        untold = [part.to(self.device) for part in self.condition.none(n)]
        driving, made = guided(self.teacher, told, untold, settings.guidance), []

        def estimate(x: Tensor, t: Tensor) -> Tensor:
            e = driving(x, t)
            own = e if settings.guidance == 1 or not told else estimate_noise(self.teacher, x, t, *told)
            made.append((x, t, own))
            return e

        shape = (spec.unet.arguments["in_channels"], *[spec.unet.arguments["sample_size"]] * 2)
        sample(estimate, spec.scheduler, settings, draw(streams, shape).to(self.device), streams)
        # sampling computes in inference mode, whose tensors autograd refuses; copies made outside are plain ones
        return [Call((x.clone(), t.clone(), *told), e.clone()) for x, t, e in made]
