"""Original checkpoints (CompVis/latent-diffusion, ermongroup/ddim) to diffusers modules, strictly, running no code.

Every tensor of the file is accounted for: each one that the networks need must be there once, with its shape; a name
that no network explains is refused. Names without a dot (buffers of the noise schedule, and leftovers) are ignored, but
the schedule itself must be the recipe's.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bdm_cli.diffusion import first_stage
from bdm_cli.diffusion.models import build_unet, noise_scheduler
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe

Weights = Literal["ema", "raw"]

FOREIGN = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
"""Packages whose classes a checkpoint may mention beside its tensors; stand-ins without code take their place."""

UNAVERAGED_CIFAR10 = "82ed3067fd1002f5cf4c339fb80c4669"
"""MD5 of the CIFAR-10 file without averaging, which has the same name as the averaged one and is much worse."""

WITHOUT_AVERAGE = ("cifar10", "imagenet")
"""Published files with one set of weights: CIFAR-10's is the average already, ImageNet's model kept none."""

UNET, EMA, STAGE, EMBEDDING = (
    "model.diffusion_model.",
    "model_ema.",
    "first_stage_model.",
    "cond_stage_model.embedding.",
)
SHOWN = 3


class Converted(NamedTuple):
    """Tensors under diffusers' names. unet: also class_embedder.weight.

    scaling_factor: of the latents; None where there is no first stage.
    averaged: whether the U-Net's weights are the moving average; None if the file does not say.
    """

    unet: dict[str, Tensor]
    first_stage: dict[str, Tensor] | None
    scaling_factor: float | None
    averaged: bool | None
    ignored: list[str]


def read(path: Path, weights: Weights = "ema") -> dict[str, Tensor]:
    """The tensors of an original file, by their original names. No code in the file runs.

    weights: which entry of a training checkpoint of ermongroup's, which keeps both, apart.
    Raises: BdmError if the file is missing, cut short, no checkpoint, or would run code.
    """
    if not path.is_file():
        raise BdmError(f"there is no file {path}.\n  give an original checkpoint, e.g. model.ckpt")
    if zipfile.is_zipfile(path) and "model.ckpt" in zipfile.ZipFile(path).namelist():
        raise BdmError(f"{path} is an archive.\n  unpack it and give the model.ckpt inside")
    content = _load(path)
    if isinstance(content, list) and len(content) == 5:  # model, optimizer, epoch, step, average
        content = {k.removeprefix("module."): v for k, v in content[-1 if weights == "ema" else 0].items()}
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise BdmError(f"{path} holds no state dict.\n  give an original checkpoint of the networks that bdm imports")
    if "conv_in.weight" in state and weights == "ema" and _md5(path) == UNAVERAGED_CIFAR10:
        raise BdmError(
            f"{path} is the CIFAR-10 model without weight averaging (FID 12 instead of 3 at 1000 steps).\n"
            "  give ema_diffusion_cifar10_model/model-790000.ckpt, or take it as it is with --weights raw"
        )
    return state


def _load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_stand_ins(path)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise BdmError(
            f"{path} is not a whole checkpoint that can be read without running code ({reason}).\n"
            "  download it again; nothing was written"
        ) from None


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """A class without code for each foreign name in the file. Raises: BdmError for names that could be anything."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError):
        return []  # not torch's zip format, or broken: torch.load says which
    bad = [name for name in names if not name.startswith(FOREIGN)]
    if bad:
        raise BdmError(
            f"{path} would run code on loading: it calls {', '.join(sorted(bad)[:SHOWN])}.\n"
            "  it is not one of the published checkpoints; nothing was loaded"
        )
    return [(type(name.rpartition(".")[2], (), {}), name) for name in names]


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def convert(spec: Recipe, state: dict[str, Tensor], weights: Weights = "ema") -> Converted:
    """The tensors of an original file for the networks of a recipe.

    weights: the U-Net's moving average, with which the published numbers were made, or the raw weights.
    Raises: BdmError naming what is missing, unexpected or of another shape, and which model the file looks like.
    """
    averaged = _averaged(spec, state, weights)
    found, faults = _convert(spec, state, averaged)
    if faults:
        raise BdmError(
            f"the checkpoint is not the model '{spec.name}' (it looks like {looks_like(state)}):\n"
            + "\n".join(f"  {fault}" for fault in faults)
        )
    _check_schedule(spec, state)
    return found


def looks_like(state: dict[str, Tensor]) -> str:
    """Which published model a state dict seems to be, by names and widths alone."""
    first = state.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None:
        if f"{EMBEDDING}weight" in state:
            return "imagenet"
        known = {(224, 3): "bedrooms or ffhq", (192, 4): "churches"}
        return known.get(tuple(first.shape[:2]), "some latent diffusion model")
    if "temb.dense.0.weight" in state:
        return "cifar10"
    if "encoder.conv_in.weight" in state:
        return "the first stage vq-f4" if "quantize.embedding.weight" in state else "the first stage kl-f8"
    return "none of the published ones"


def convert_first_stage(kind: str, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a first stage's own file (vq-f4, kl-f8). Raises: BdmError as convert."""
    wanted = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    found, faults = _fitted(module, _renamed(_ddpm_names(wanted), wanted), "")
    if faults:
        raise BdmError(
            f"the checkpoint is not the first stage '{kind}' (it looks like {looks_like(state)}):\n"
            + "\n".join(f"  {fault}" for fault in faults)
        )
    return found


def _averaged(spec: Recipe, state: dict[str, Tensor], weights: Weights) -> bool:
    """Whether to take the shadows of the moving average. Raises: BdmError if they are wanted and not there."""
    there = any(name.startswith(EMA) for name in state)
    if weights == "ema" and not there and spec.data.dataset not in WITHOUT_AVERAGE:
        raise BdmError(
            "the checkpoint holds no averaged weights (model_ema.*), with which the published numbers were made.\n"
            "  give the published file, or take the raw weights with --weights raw"
        )
    return there and weights == "ema"


def _convert(spec: Recipe, state: dict[str, Tensor], averaged: bool) -> tuple[Converted, list[str]]:
    with torch.device("meta"):
        unet = build_unet(spec.unet)
        stage = None if spec.first_stage is None else first_stage.build(spec.first_stage)
    if stage is None:
        tensors, faults = _fitted(unet, _renamed(_ddpm_names(state), state), "")
        return Converted(tensors, None, None, None, []), faults

    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (UNET, EMA, STAGE, EMBEDDING)}
    ignored, unknown = [], []
    for name, tensor in state.items():
        prefix = next((p for p in parts if name.startswith(p)), None)
        if prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = tensor
        elif "." not in name:
            ignored.append(name)
        else:
            unknown.append(name)
    faults = _listed("unexpected", unknown)
    if parts[EMA]:
        faults += _check_shadows(parts[UNET], parts[EMA], bool(spec.unet.n_classes))
    raw = parts[UNET]
    chosen = raw if not averaged else {name: parts[EMA].get(_squeezed(name), raw[name]) for name in raw}
    renamed = _renamed(_compvis_names(chosen), chosen)
    renamed = dict(_split_attentions(unet, renamed))
    if spec.unet.n_classes:
        renamed |= {f"class_embedder.{name}": tensor for name, tensor in parts[EMBEDDING].items()}
    else:
        faults += _listed("unexpected", [EMBEDDING + name for name in parts[EMBEDDING]])
    tensors, of_unet = _fitted(unet, renamed, "U-Net: ")
    of_stage_names = _renamed(_ddpm_names(parts[STAGE]), parts[STAGE])
    stage_tensors, of_stage = _fitted(stage, of_stage_names, "first stage: ")
    scale = 1.0
    if spec.first_stage.kind == "AutoencoderKL":
        if "scale_factor" in state:
            scale = float(state["scale_factor"])
        else:
            faults.append("scale_factor is missing: without it the latents have another scale; there is no default")
    return Converted(tensors, stage_tensors, scale, averaged, ignored), faults + of_unet + of_stage


def _squeezed(name: str) -> str:
    """The name under which CompVis' LitEma keeps the average of a U-Net parameter."""
    return f"diffusion_model.{name}".replace(".", "")


def _check_shadows(raw: dict[str, Tensor], shadows: dict[str, Tensor], conditional: bool) -> list[str]:
    """Faults of the averaged weights: one for each parameter, of its shape, and nothing else."""
    wanted = {_squeezed(name): tensor for name, tensor in raw.items()}
    extra = sorted(shadows.keys() - wanted.keys() - {"decay", "num_updates"})
    shapes = [
        EMA + name for name in sorted(wanted.keys() & shadows.keys()) if wanted[name].shape != shadows[name].shape
    ]
    return (
        _listed("missing", [EMA + name for name in sorted(wanted.keys() - shadows.keys())])
        + _listed("unexpected", [EMA + name for name in extra])
        + _listed("of another shape than the raw weight", shapes)
    )


def _check_schedule(spec: Recipe, state: dict[str, Tensor]) -> None:
    """Raises: BdmError if the file's noise schedule is not the recipe's."""
    stored = state.get("alphas_cumprod")
    if stored is None:
        return
    ours = noise_scheduler(spec.scheduler).alphas_cumprod
    if stored.shape != ours.shape or not torch.allclose(stored.float(), ours, atol=1e-5):
        raise BdmError(
            f"the checkpoint was trained with another noise schedule than '{spec.name}' (alphas_cumprod).\n"
            "  give the right --model"
        )


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what}: {', '.join(names[:SHOWN])}{more}"] if names else []


def _fitted(module: nn.Module, tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that the module has, in float32, and what is missing, unexpected or of another shape."""
    own = module.state_dict()
    shapes = [
        f"{name} {list(tensors[name].shape)} (wanted: {list(own[name].shape)})"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults = (
        _listed(f"{where}missing", [name for name in own if name not in tensors])
        + _listed(f"{where}unexpected", [name for name in tensors if name not in own])
        + _listed(f"{where}of another shape", shapes)
    )
    return {name: tensors[name].float() for name in own if name in tensors}, faults


def _renamed(names: Iterator[tuple[str, str]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their new names; a 1x1 convolution of an attention becomes a linear layer's matrix."""
    found = {}
    for old, new in names:
        tensor = tensors[old]
        if ".attentions." in new and re.search(r"\.to_(q|k|v|out\.0)\.weight$", new):
            tensor = tensor.flatten(1) if tensor.ndim > 2 else tensor
        found[new] = tensor
    return found


DDPM_RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
DDPM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
DDPM_FIXED = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2"}
COMPVIS_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
COMPVIS_FIXED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
PER_LEVEL = 3
"""Original blocks per level: two residual blocks and a resampler downwards, three residual blocks upwards."""


def _ddpm_names(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(original name, diffusers name) of ermongroup's `Model` and of CompVis' autoencoders, which share their blocks.

    What no rule knows keeps its name, and is then unexpected.
    """
    levels = 1 + max((int(found[1]) for name in tensors if (found := re.search(r"\bup\.(\d+)\.", name))), default=0)
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        half, found = re.match(r"((?:encoder|decoder)\.)?(.*)", stem).groups()
        yield name, f"{half or ''}{_ddpm_stem(found, levels)}.{leaf}"


def _ddpm_stem(stem: str, levels: int) -> str:
    if found := re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)", stem):
        way, level, kind, index, rest = found.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)  # the original counts up blocks from the image
        if kind == "block":
            return f"{way}_blocks.{level}.resnets.{index}.{DDPM_RESNET.get(rest, rest)}"
        return f"{way}_blocks.{level}.attentions.{index}.{DDPM_ATTENTION.get(rest, rest)}"
    if found := re.fullmatch(r"(down|up)\.(\d+)\.(down|up)sample\.conv", stem):
        way, level = found[1], int(found[2])
        level = level if way == "down" else levels - 1 - level
        return f"{way}_blocks.{level}.{way}samplers.0.conv"
    if found := re.fullmatch(r"mid\.block_([12])\.(\w+)", stem):
        return f"mid_block.resnets.{int(found[1]) - 1}.{DDPM_RESNET.get(found[2], found[2])}"
    if found := re.fullmatch(r"mid\.attn_1\.(\w+)", stem):
        return f"mid_block.attentions.0.{DDPM_ATTENTION.get(found[1], found[1])}"
    return {"norm_out": "conv_norm_out"}.get(stem, DDPM_FIXED.get(stem, stem))


def _compvis_names(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(original name, diffusers name) of CompVis' `UNetModel`. An AttentionBlock's qkv stays one tensor here."""
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        if stem in COMPVIS_FIXED:
            yield name, f"{COMPVIS_FIXED[stem]}.{leaf}"
            continue
        found = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)|middle_block\.([012])\.(.+)", stem)
        yield name, f"{_compvis_stem(tensors, found)}.{leaf}" if found else name


def _compvis_stem(tensors: dict[str, Tensor], found: re.Match) -> str:
    way, block, child, rest, middle, of_middle = found.groups()
    if middle is not None:
        place = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}[middle]
        simple = f"middle_block.{middle}.qkv.weight" in tensors
        return f"{place}.{_compvis_inside(of_middle, simple)}"
    down = way == "input_blocks"
    level, index = divmod(int(block) - 1, PER_LEVEL) if down else divmod(int(block), PER_LEVEL)
    blocks = f"{'down' if down else 'up'}_blocks.{level}"
    if rest in ("op", "conv"):
        return f"{blocks}.{'down' if down else 'up'}samplers.0.conv"
    if rest in COMPVIS_RESNET:
        resampler = index == PER_LEVEL - 1 if down else child != "0"
        place = f"{'down' if down else 'up'}samplers.0" if resampler else f"resnets.{index}"
        return f"{blocks}.{place}.{COMPVIS_RESNET[rest]}"
    simple = f"{way}.{block}.{child}.qkv.weight" in tensors
    return f"{blocks}.attentions.{index}.{_compvis_inside(rest, simple)}"


def _compvis_inside(rest: str, simple: bool) -> str:
    """A name inside a residual block or an attention; a SpatialTransformer's (not simple) are diffusers' own."""
    if simple:
        return {"norm": "group_norm", "proj_out": "to_out.0"}.get(rest, rest)
    return COMPVIS_RESNET.get(rest, rest)


def _split_attentions(unet: nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """CompVis' AttentionBlock keeps q, k, v in one 1-D convolution [3C, C, 1], grouped by head first (legacy order)."""
    modules = dict(unet.named_modules())
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.+)\.qkv\.(weight|bias)", name)
        heads = getattr(modules.get(found[1]) if found else None, "heads", 0)
        if not heads or tensor.shape[0] % (3 * heads):
            yield name, tensor
            continue
        rows = tensor.reshape(heads, 3, -1, *tensor.shape[1:2])  # [heads, 3, width of a head, C]
        for index, part in enumerate(("to_q", "to_k", "to_v")):
            yield f"{found[1]}.{part}.{found[2]}", rows[:, index].flatten(0, 1)
