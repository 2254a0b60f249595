"""Building teacher and student from a recipe, and students on disk."""

import copy
import datetime
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from bdm_cli import methods, recipe, records, runs, tensorfile
from bdm_cli.diffusion.models import build_unet, load_strictly, load_teacher
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Method
from bdm_cli.packed import pack
from bdm_cli.packed.fusion import fuse_
from bdm_cli.packed.layers import unpack_
from bdm_cli.packed.pack import Packed
from bdm_cli.recipe import Model, Recipe

PATIENCE = datetime.timedelta(days=7)
"""How long processes wait for each other: one may have hours of sampling or encoding left."""


class Built(NamedTuple):
    teacher: nn.Module | None
    student: nn.Module
    method: Method


def build(spec: Recipe, seed: int, random_teacher: bool = False) -> Built:
    """Teacher, student (its quantized copy) and method of a recipe.

    A recipe without a teacher trains the full-precision network from scratch, initialised by `seed`.
    random_teacher: random weights in place of the teacher's, for rehearsals.
    Raises: BdmError if the method's fields or the teacher's file are at fault.
    """
    method = methods.build(spec)
    torch.manual_seed(seed)
    if spec.model.pretrained:
        teacher = build_unet(spec.unet).eval().requires_grad_(False) if random_teacher else load_teacher(spec)
        student = copy.deepcopy(teacher).requires_grad_(True)
    else:
        teacher = None
        student = build_unet(spec.unet)
    method.quantize_(student)
    method.on_step_(student, 0, spec.train.steps)
    return Built(teacher, student.train(), method)


def use_threads(spec: Recipe) -> None:
    """The recipe's number of CPU threads, on which the rounding of sums depends; 0 leaves torch's default."""
    if spec.train.threads:
        torch.set_num_threads(spec.train.threads)


def processes() -> PartialState:
    """This process and its fellows under torchrun or `accelerate launch`; on the CPU without a GPU, or if so told."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def save(path: Path, student: nn.Module, spec: Recipe, seed: int, step: int) -> None:
    """Write the weights with the resolved recipe in the header."""
    header = {"recipe": spec.model_dump_json(), "seed": str(seed), "step": str(step)}
    tensorfile.write(path, student.state_dict(), header | {"commit": records.provenance()["commit"]})


class Loaded(NamedTuple):
    student: nn.Module
    recipe: Recipe
    seed: int
    step: int


def load(path: Path) -> Loaded:
    """Rebuild a student from its file alone, strictly, frozen and in eval mode.

    Raises: BdmError if the file is missing, damaged or not a student's.
    """
    tensors, header = tensorfile.read(path)
    if header.get("format") == pack.FORMAT:
        raise BdmError(
            f"{path} is packed already.\n  draw from it: bdm sample --packed {path}; look: bdm inspect {path}"
        )
    if "recipe" not in header or "step" not in header:
        raise BdmError(f"{path} is not a model that bdm wrote (no recipe in its header).\n  give a file of `bdm train`")
    spec, step = recipe.from_json(header["recipe"], str(path)), int(header["step"])
    method, student = methods.build(spec), build_unet(spec.unet)
    method.quantize_(student)
    method.on_step_(student, step, spec.train.steps)
    load_strictly(student, tensors, path)
    return Loaded(student.eval().requires_grad_(False), spec, int(header["seed"]), step)


def load_run(run_id: str) -> Loaded:
    """The finished student of a run. Raises: BdmError if there is none."""
    runs.existing(run_id)
    return load(runs.weights(run_id))


def unpacked(packed: Packed, path: Path, fused: bool = False) -> nn.Module:
    """The network of a packed file (at `path`), frozen and in eval mode; its bits are never all in fp32.

    fused: with fused blocks, which are faster and round otherwise (packed/fusion.py).
    Raises: BdmError if the file does not fit the network of its own recipe.
    """
    spec = packed.header.recipe
    with torch.device("meta"):
        unet = build_unet(spec.unet)
        methods.build(spec).quantize_(unet)
    try:
        unpack_(unet, packed)
    except ValueError as error:
        raise BdmError(f"{path} does not fit the network of its own recipe: {error}.\n  {pack.AGAIN}") from None
    if fused:
        fuse_(unet)
    return unet.eval().requires_grad_(False)


def random_finished(spec: Recipe, seed: int) -> nn.Module:
    """A student as after training, of random weights, to measure size and speed. It stands in for its own teacher."""
    built = build(spec.model_copy(update={"model": Model(pretrained="")}), seed)
    unet, method = built.student.eval(), built.method
    inputs = random_inputs(spec, 1, torch.Generator().manual_seed(seed))
    method.calibrate_(unet, unet, [inputs])
    method.on_step_(unet, spec.train.steps, spec.train.steps)
    return unet


def random_inputs(spec: Recipe, n: int, random: torch.Generator) -> tuple[Tensor, ...]:
    """n inputs of the recipe's U-Net, the positional arguments of its forward: noise, times, condition."""
    arguments = spec.unet.arguments
    x = torch.randn(n, arguments["in_channels"], arguments["sample_size"], arguments["sample_size"], generator=random)
    t = torch.randint(spec.scheduler.n_timesteps, (n,), generator=random)
    text = torch.zeros(n, 1, arguments.get("cross_attention_dim", 0))
    contexts = {"none": (), "classes": (torch.arange(n) % max(spec.unet.n_classes, 1),), "text": (text,)}
    return x, t, *contexts[spec.unet.condition]
