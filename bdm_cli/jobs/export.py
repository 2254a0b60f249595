"""`bdm export`: a student becomes a file whose weights are bits, measured on disk beside its full-precision form."""

import tempfile
from pathlib import Path

import pandas as pd
import torch

from bdm_cli import output, recipe, student, tensorfile
from bdm_cli.diffusion import sampling
from bdm_cli.diffusion.models import build_unet
from bdm_cli.errors import BdmError
from bdm_cli.inputs import Exported
from bdm_cli.packed import pack
from bdm_cli.recipe import Recipe

MIB = 2**20


def run(asked: Exported, out: Path, half: bool = False) -> pd.DataFrame:
    """Write the packed file; one row: its size on disk, that of the same network in fp32, their ratio, Eq. 16's size.

    asked: a finished student, or random weights. half: sigma, biases and what is not quantized in fp16.
    Raises: BdmError if `out` exists or cannot be written, or a layer has no packed form.
    """
    if out.exists():
        raise BdmError(f"{out} exists.\n  remove it, or give another --out")
    if not out.parent.is_dir():
        raise BdmError(f"there is no folder {out.parent}.\n  make it, or give another --out")
    if asked.weights is None:
        spec, seed, step = asked.recipe, asked.seed, 0
        output.say(f"{spec.name}: random weights, to measure size and speed; its images will show nothing")
        unet = student.random_finished(spec, seed)
    else:
        unet, trained, seed, step = student.load(asked.weights)
        spec = asked.recipe or recipe.of_run(trained, asked.overrides)
    s = spec.sample
    times = sampling.times(s.sampler, spec.scheduler, s.steps, s.spacing)
    packed = pack.pack(unet, spec, seed, step, times, half, random=asked.weights is None)
    del unet
    pack.write(out, packed)
    size, full = out.stat().st_size / MIB, _full_precision_mib(spec)
    output.say(f"{spec.name}: {out}; bdm inspect {out} explains it, bdm sample --packed {out} draws from it")
    row = {"File": str(out), "Size (MiB)": round(size, 3), "FP32 file (MiB)": round(full, 2)}
    row |= {"Times smaller": round(full / size, 2), "Eq. 16 (MiB)": round(packed.counted_bits() / 8 / MIB, 3)}
    return pd.DataFrame([row])


def _full_precision_mib(spec: Recipe) -> float:
    """Size of the network's file in fp32: written, measured, removed."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_unet(spec.unet).state_dict().items()}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "fp32.safetensors"
        tensorfile.write(path, {name: torch.empty(shape) for name, shape in shapes.items()}, {})
        return path.stat().st_size / MIB
