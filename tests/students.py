"""Finished students of the tiny recipes without training, packed or as runs."""

import copy
from pathlib import Path

import torch
from torch import nn

from bdm_cli import runs, student
from bdm_cli.diffusion.models import estimate_noise
from bdm_cli.diffusion.sampling import times
from bdm_cli.packed import pack
from bdm_cli.packed.pack import Packed
from bdm_cli.recipe import Model, Recipe

ONE_BIT = ("method.activation_bits=1", "method.edge_bits=32", "method.real_skips=true")
"""What BiDM's tables share."""

OWN = {
    "ebb": ("method.ebb_scope=4",),
    "lmb": ("method.ebb_scope=4",),
    "qdm": ("method.attention_matmul=true",),
    "qdiffusion": (
        "method.iterations=4",
        "method.activation_iterations=4",
        "method.calibration_steps=2",
        "method.calibration_images=8",
        "train.steps=0",
    ),
    **dict.fromkeys(("xnorpp", "bbcu", "dorefa", "reste", "xnor", "bidm"), ONE_BIT),
}
"""Values that a method's case on the tiny network needs."""

REFUSED = {"qdm": "per channel"}
"""Methods without a packed form, with a word of the reason."""


def finished(spec: Recipe, evolved: bool = True) -> nn.Module:
    """A student of random weights. Every parameter is moved a little, so that none is where it started.

    evolved: as at the end of the training; else as at its beginning (EBB: with two bases).
    """
    built = student.build(spec.model_copy(update={"model": Model(pretrained="")}), 0)
    unet = built.student.eval()
    built.method.calibrate_(unet, unet, [student.random_inputs(spec, 2, torch.Generator().manual_seed(0))])
    if evolved:
        built.method.on_step_(unet, spec.train.steps, spec.train.steps)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1 + 0.05 * torch.rand_like(parameter)).add_(1e-3 * torch.randn_like(parameter))
    return unet.requires_grad_(False)


def packed(spec: Recipe, unet: nn.Module, half: bool = False) -> Packed:
    s = spec.sample
    return pack.pack(unet, spec, 0, 6, times(s.sampler, spec.scheduler, s.steps, s.spacing), half)


def run_of(spec: Recipe, unet: nn.Module, seed: int = 0, step: int | None = None) -> str:
    """Writes the student as a finished run; returns its id. step: None = all."""
    run_id = spec.run_id(seed)
    runs.write_text(runs.recipe_copy(run_id), spec.model_dump_json())
    student.save(runs.weights(run_id), unet, spec, seed, spec.train.steps if step is None else step)
    return run_id


def assert_copies_agree(spec: Recipe, unet: nn.Module, folder: Path, step: int = 6) -> nn.Module:
    """A copy of a student, what is loaded of its file, and its packed form estimate the same noise, bit for bit.

    Returns the loaded one.
    """
    x, _ = student.random_inputs(spec, 2, torch.Generator().manual_seed(5))
    t = torch.full((2,), 500)
    student.save(folder / "s", unet, spec, seed=0, step=step)
    loaded = student.load(folder / "s").student
    with torch.no_grad():
        expected = estimate_noise(unet, x, t)
        for network in (copy.deepcopy(unet), loaded, student.unpacked(packed(spec, unet), folder)):
            assert torch.equal(estimate_noise(network, x, t), expected)
    return loaded
