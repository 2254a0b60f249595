"""From noise to images: one random generator per image, so that an image does not depend on its neighbours."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from PIL import Image
from torch import Tensor, nn

from bdm_cli.diffusion.conditions import Condition
from bdm_cli.diffusion.first_stage import FirstStage
from bdm_cli.diffusion.models import estimate_noise, noise_scheduler
from bdm_cli.quant.swap import begin_trajectory_
from bdm_cli.recipe import Recipe, Sample, Scheduler

Estimate = Callable[[Tensor, Tensor], Tensor]
"""(x_t [N, C, H, W], t [N]) -> the estimated noise, shaped as x_t."""

QUAD_END = 0.8
"""ermongroup's quadratic times end at this part of the schedule."""


def noise_streams(seed: int, indices: range) -> list[np.random.Generator]:
    """One generator per image, a pure function of (seed, image index)."""
    return [np.random.default_rng([seed, index]) for index in indices]


def draw(streams: list[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [len(streams), *shape], each image's from its own stream."""
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


def times(sampler: str, spec: Scheduler, steps: int, spacing: str = "uniform") -> list[float]:
    """The times at which the network is called, in order, as the original codes list them.

    ddim, plms: every (n // steps)-th time from 0, plus the offset (CompVis: 1, ermongroup: 0), downwards. That is more
        than `steps` calls where steps does not divide n: 167 for 150 of 1000, 500 for 400. PLMS calls its second time
        twice.
    ddim, quad: squares of `steps` even numbers up to sqrt(0.8 n), truncated, plus the offset; small times repeat.
    dpm-solver: `steps` even, fractional times from n - 1 (CompVis' wrapper, time_uniform).
    """
    n = spec.n_timesteps
    if sampler == "dpm-solver":
        return (n * np.linspace(1, 1 / n, steps + 1)[:-1] - 1).tolist()
    if spacing == "quad":
        return [int(root**2) + spec.steps_offset for root in np.linspace(0, (n * QUAD_END) ** 0.5, steps)][::-1]
    listed = [t + spec.steps_offset for t in range(0, n, n // steps)][::-1]
    return listed[:2] + listed[1:] if sampler == "plms" else listed


@torch.inference_mode()
def sample(
    estimate: Estimate, spec: Scheduler, settings: Sample, noise: Tensor, streams: Sequence[np.random.Generator]
) -> Tensor:
    """x_0 [N, C, H, W] from `noise`, with the recipe's sampler. No thresholding; DDIM clips x_0 if clip_sample says so.

    streams: where the noise of eta > 0 comes from, one per image.
    """
    loop = {"ddim": _quad if settings.spacing == "quad" else _ddim, "plms": _plms, "dpm-solver": _dpm_solver}
    return loop[settings.sampler](estimate, spec, settings, noise, streams)


def _ddim(
    estimate: Estimate, spec: Scheduler, settings: Sample, x: Tensor, streams: Sequence[np.random.Generator]
) -> Tensor:
    """DDIM (arXiv:2010.02502, Eq. 12) over an even list of times."""
    scheduler = noise_scheduler(spec)
    scheduler.set_timesteps(settings.steps)  # gives `step` its stride, n // steps
    for t in times("ddim", spec, settings.steps):
        extra = draw(streams, x.shape[1:]).to(x.device) if settings.eta > 0 else None
        e = estimate(x, torch.full((len(x),), t, device=x.device))
        x = scheduler.step(e, t, x, eta=settings.eta, variance_noise=extra, return_dict=False)[0]
    return x


def _quad(
    estimate: Estimate, spec: Scheduler, settings: Sample, x: Tensor, streams: Sequence[np.random.Generator]
) -> Tensor:
    """DDIM (arXiv:2010.02502, Eq. 12) over any list of times, which diffusers' scheduler cannot take.

    x' = sqrt(a') x0 + sqrt(1 - a' - s^2) e + s z, x0 = (x - sqrt(1 - a) e) / sqrt(a),
    s = eta sqrt((1 - a') / (1 - a) (1 - a / a')). A repeated time is an identity step.
    """
    scheduler = noise_scheduler(spec)
    listed = times("ddim", spec, settings.steps, "quad")
    alphas = [scheduler.alphas_cumprod[t] for t in listed] + [scheduler.final_alpha_cumprod]
    for t, a, a_next in zip(listed, alphas[:-1], alphas[1:], strict=True):
        extra = draw(streams, x.shape[1:]).to(x.device) if settings.eta > 0 else None
        e = estimate(x, torch.full((len(x),), t, device=x.device))
        s = settings.eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        if spec.clip_sample:
            x0 = x0.clamp(-1, 1)
        x = a_next.sqrt() * x0 + (1 - a_next - s**2).sqrt() * e
        x = x if extra is None else x + s * extra
    return x


def _plms(
    estimate: Estimate, spec: Scheduler, settings: Sample, x: Tensor, streams: Sequence[np.random.Generator]
) -> Tensor:
    """Pseudo linear multistep (arXiv:2202.09778) as CompVis runs it: one more network call than steps."""
    scheduler = PNDMScheduler(
        num_train_timesteps=spec.n_timesteps,
        beta_schedule=spec.beta_schedule,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        skip_prk_steps=True,
        set_alpha_to_one=spec.set_alpha_to_one,
        steps_offset=spec.steps_offset,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(settings.steps)
    for t in times("plms", spec, settings.steps):
        x = scheduler.step(estimate(x, torch.full((len(x),), t, device=x.device)), t, x, return_dict=False)[0]
    return x


def _dpm_solver(
    estimate: Estimate, spec: Scheduler, settings: Sample, x: Tensor, streams: Sequence[np.random.Generator]
) -> Tensor:
    """DPM-Solver++ (arXiv:2211.01095), multistep of order 2, as CompVis' wrapper runs it: fractional times, log alpha
    between training steps interpolated linearly, first order in the first step (and in the last below 15 steps)."""
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=spec.n_timesteps,
        beta_schedule=spec.beta_schedule,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        thresholding=False,
        timestep_spacing="linspace",
        final_sigmas_type="sigma_min",
    )
    listed = times("dpm-solver", spec, settings.steps)
    log_alphas = np.log(scheduler.alphas_cumprod.double().numpy())
    alphas = np.exp(np.interp([*listed, 0.0], np.arange(spec.n_timesteps), log_alphas))
    scheduler.set_timesteps(settings.steps)
    scheduler.timesteps = torch.tensor(listed)  # it would round them
    scheduler.sigmas = torch.tensor(((1 - alphas) / alphas) ** 0.5, dtype=torch.float32)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = scheduler.step(estimate(x, t.expand(len(x)).to(x.device)), t, x, return_dict=False)[0]
    return x


def guided(unet: nn.Module, told: Sequence[Tensor], untold: Sequence[Tensor], scale: float) -> Estimate:
    """Classifier-free guidance (arXiv:2207.12598): e_u + scale (e_c - e_u), the unconditional half of the batch first.

    told, untold: the network's condition and the empty one, one row per image; () for an unconditional network.
    Without a condition, or with scale 1, the network is called once.
    """
    if scale == 1 or not told:
        return lambda x, t: estimate_noise(unet, x, t, *told)
    both = [torch.cat(pair) for pair in zip(untold, told, strict=True)]

    def estimate(x: Tensor, t: Tensor) -> Tensor:
        e_untold, e_told = estimate_noise(unet, torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        return e_untold + scale * (e_told - e_untold)

    return estimate


def to_bytes(x: Tensor, how: str) -> np.ndarray:
    """Float [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C]: 'round' (ermongroup) or 'truncate' (CompVis, ADM)."""
    levels = ((x.float() + 1) * 127.5).clamp(0, 255)
    levels = levels.round() if how == "round" else levels
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def of_recipe(
    spec: Recipe, unet: nn.Module, condition: Condition, first_stage: FirstStage | None, batch: int, seed: int
) -> Callable[[range], np.ndarray]:
    """The images of a recipe's sampler: a function of the images' indices, to uint8 [len(indices), H, W, C].

    An image is a function of (network, settings, seed, its index). The network always runs on full batches (the last
    one is filled up), so that the arithmetic of an image does not depend on how many images were asked for.
    """
    arguments = spec.unet.arguments
    shape = (arguments["in_channels"], arguments["sample_size"], arguments["sample_size"])
    device = next(unet.parameters()).device

    @torch.inference_mode()
    def images(indices: range) -> np.ndarray:
        filled = range(indices.start, indices.start + batch)
        streams = noise_streams(seed, filled)
        told = [part.to(device) for part in condition.of_images(filled, seed)]
        untold = [part.to(device) for part in condition.none(batch)]
        estimate = guided(unet, told, untold, spec.sample.guidance)
        begin_trajectory_(unet)
        x = sample(estimate, spec.scheduler, spec.sample, draw(streams, shape).to(device), streams)
        x = x if first_stage is None else first_stage.decode(x)
        return to_bytes(x[: len(indices)], spec.sample.to_bytes)

    return images


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
