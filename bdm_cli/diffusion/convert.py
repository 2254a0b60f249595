"""Original checkpoints (CompVis/latent-diffusion, ermongroup/ddim) to diffusers modules, strictly, running no code.

Every tensor of the file is accounted for: each one that the networks need must be there once, with its shape; a name
that no network explains is refused. Names without a dot (buffers of the noise schedule, and leftovers) are ignored, but
the schedule itself must be the recipe's.
"""

import hashlib
import pickle
import re
import struct
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

FOREIGN = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.")
"""Packages whose names a checkpoint may mention beside its tensors (callbacks, learning rates as NumPy numbers);
stand-ins without code take their place."""

DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What torch's reader raises on damaged files."""

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
    state = _state_dict(_load(path), weights)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise BdmError(f"{path} holds no state dict.\n  give an original checkpoint of the networks that bdm imports")
    if "conv_in.weight" in state and weights == "ema" and _md5(path) == UNAVERAGED_CIFAR10:
        raise BdmError(
            f"{path} is the CIFAR-10 model without weight averaging (FID 12 instead of 3 at 1000 steps).\n"
            "  give ema_diffusion_cifar10_model/model-790000.ckpt, or take it as it is with --weights raw"
        )
    return state


def _state_dict(content: object, weights: Weights) -> dict | None:
    """The state dict in what a file holds, if there is one."""
    if isinstance(content, list) and len(content) in (4, 5) and isinstance(content[0], dict):
        if weights == "ema" and not isinstance(content[-1], dict):  # model, optimizer, epoch, step(, average)
            raise BdmError("the training checkpoint holds no average.\n  take the raw weights: --weights raw")
        return {k.removeprefix("module."): v for k, v in content[-1 if weights == "ema" else 0].items()}
    found = content.get("state_dict", content) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def _load(path: Path) -> object:
    archive = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_stand_ins(path)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
        broken = zipfile.ZipFile(path).testzip() if archive else None  # torch does not compare the checksums
    except DAMAGED as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BdmError(
            f"{path} is not a whole checkpoint that can be read without running code ({reason}).\n"
            "  download it again; nothing was written"
        ) from None
    if broken is not None:
        raise BdmError(f"{path} is damaged (checksum of {broken}).\n  download it again; nothing was written")
    return content


class _StandIn:
    """In the place of a class or function whose code is not wanted: takes everything, does nothing."""

    def __new__(cls, *arguments: object, **options: object) -> "_StandIn":
        return object.__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """A stand-in for each foreign name in the file. Raises: BdmError for names that could be anything."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except DAMAGED:
        return []  # not torch's zip format, or broken: torch.load says which
    bad = [name for name in names if not name.startswith(FOREIGN)]
    if bad:
        raise BdmError(
            f"{path} would run code on loading: it calls {', '.join(sorted(bad)[:SHOWN])}.\n"
            "  it is not one of the published checkpoints; nothing was loaded"
        )
    return [(type(name.rpartition(".")[2], (_StandIn,), {}), name) for name in names]


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def convert(spec: Recipe, state: dict[str, Tensor], weights: Weights = "ema") -> Converted:
    """The tensors of an original file for the networks of a recipe.

    weights: the U-Net's moving average, with which the published numbers were made, or the raw weights.
    Raises: BdmError naming what is missing, unexpected or of another shape, and which model the file looks like.
    """
    averaged = any(name.startswith(EMA) for name in state)
    found, faults = _convert(spec, state, averaged and weights == "ema")
    if faults:
        raise BdmError(
            f"the checkpoint is not the model '{spec.name}' (it looks like {looks_like(state)}):\n"
            + "\n".join(f"  {fault}" for fault in faults)
        )
    if weights == "ema" and not averaged and spec.data.dataset not in WITHOUT_AVERAGE:
        raise BdmError(
            "the checkpoint holds no averaged weights (model_ema.*), with which the published numbers were made.\n"
            "  give the published file, or take the raw weights with --weights raw"
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
    renamed, unknown = _renamed(wanted, _ddpm_names(wanted))
    found, faults = _fitted(module, renamed, "")
    faults = _listed("unexpected", unknown) + faults
    if faults:
        raise BdmError(
            f"the checkpoint is not the first stage '{kind}' (it looks like {looks_like(state)}):\n"
            + "\n".join(f"  {fault}" for fault in faults)
        )
    return found


def _convert(spec: Recipe, state: dict[str, Tensor], averaged: bool) -> tuple[Converted, list[str]]:
    with torch.device("meta"):
        unet = build_unet(spec.unet)
        stage = None if spec.first_stage is None else first_stage.build(spec.first_stage)
    if stage is None:
        renamed, unknown = _renamed(state, _ddpm_names(state))
        tensors, faults = _fitted(unet, renamed, "")
        return Converted(tensors, None, None, None, []), _listed("unexpected", unknown) + faults

    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (UNET, EMA, STAGE, EMBEDDING)}
    ignored, unknown = [], []
    for name, tensor in state.items():
        prefix = next((p for p in parts if name.startswith(p)), None)
        if prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = tensor
        elif "." in name:
            unknown.append(name)
        elif name != "scale_factor":
            ignored.append(name)
    faults = _check_shadows(parts[UNET], parts[EMA]) if parts[EMA] else []
    raw = parts[UNET]
    chosen = {name: parts[EMA].get(_squeezed(name), raw[name]) for name in raw} if averaged else raw
    of_unet, strange = _renamed(chosen, _compvis_names(chosen))
    of_unet = dict(_split_attentions(unet, of_unet))
    of_stage, strange_stage = _renamed(parts[STAGE], _ddpm_names(parts[STAGE]))
    unknown += [UNET + name for name in strange] + [STAGE + name for name in strange_stage]
    if spec.unet.n_classes:
        of_unet |= {f"class_embedder.{name}": tensor for name, tensor in parts[EMBEDDING].items()}
    else:
        unknown += [EMBEDDING + name for name in parts[EMBEDDING]]
    if spec.first_stage.kind == "AutoencoderKL" and "scale_factor" not in state:
        faults.append("scale_factor is missing: without it the latents have another scale; there is no default")
    tensors, faults_unet = _fitted(unet, of_unet, "U-Net: ")
    stage_tensors, faults_stage = _fitted(stage, of_stage, "first stage: ")
    scale = float(state.get("scale_factor", 1.0))
    found = Converted(tensors, stage_tensors, scale, averaged, ignored)
    return found, _listed("unexpected", unknown) + faults + faults_unet + faults_stage


def _squeezed(name: str) -> str:
    """The name under which CompVis' LitEma keeps the average of a U-Net parameter."""
    return f"diffusion_model.{name}".replace(".", "")


def _check_shadows(raw: dict[str, Tensor], shadows: dict[str, Tensor]) -> list[str]:
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
        _listed(f"{where}missing (diffusers' names)", [name for name in own if name not in tensors])
        + _listed(f"{where}unexpected", [name for name in tensors if name not in own])
        + _listed(f"{where}of another shape", shapes)
    )
    return {name: tensors[name].float() for name in own if name in tensors}, faults


def _renamed(
    tensors: dict[str, Tensor], names: Iterator[tuple[str, str | None]]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under their new names, and the old names that no rule knows, or whose new name was taken already.

    A 1x1 convolution of an attention becomes a linear layer's matrix.
    """
    found, unknown = {}, []
    for old, new in names:
        if new is None or new in found:
            unknown.append(old)
            continue
        tensor = tensors[old]
        if ".attentions." in new and re.search(r"\.to_(q|k|v|out\.0)\.weight$", new) and tensor.ndim > 2:
            tensor = tensor.flatten(1)
        found[new] = tensor
    return found, unknown


DDPM_RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
}
DDPM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
DDPM_PARTS = {"block": ("resnets", DDPM_RESNET), "attn": ("attentions", DDPM_ATTENTION)}
DDPM_FIXED = {
    **{name: name for name in ("conv_in", "conv_out", "quant_conv", "post_quant_conv", "quantize.embedding")},
    "norm_out": "conv_norm_out",
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
}
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


def _ddpm_names(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str | None]]:
    """(original name, diffusers name) of ermongroup's `Model` and of CompVis' autoencoders, which share their blocks.

    None where no rule knows the name.
    """
    levels = 1 + max((int(found[1]) for name in tensors if (found := re.search(r"\bup\.(\d+)\.", name))), default=0)
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        half, found = re.match(r"((?:encoder|decoder)\.)?(.*)", stem).groups()
        new = _ddpm_stem(found, levels)
        yield name, None if new is None else f"{half or ''}{new}.{leaf}"


def _ddpm_stem(stem: str, levels: int) -> str | None:
    def blocks(way: str, level: str) -> str:  # the original counts up blocks from the image
        return f"{way}_blocks.{level if way == 'down' else levels - 1 - int(level)}"

    if found := re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)", stem):
        modules, names = DDPM_PARTS[found[3]]
        return names.get(found[5]) and f"{blocks(found[1], found[2])}.{modules}.{found[4]}.{names[found[5]]}"
    if found := re.fullmatch(r"(down|up)\.(\d+)\.(\1)sample\.conv", stem):
        return f"{blocks(found[1], found[2])}.{found[1]}samplers.0.conv"
    if found := re.fullmatch(r"mid\.(block|attn)_([12])\.(\w+)", stem):
        modules, names = DDPM_PARTS[found[1]]
        return names.get(found[3]) and f"mid_block.{modules}.{int(found[2]) - 1}.{names[found[3]]}"
    return DDPM_FIXED.get(stem)


def _compvis_names(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str | None]]:
    """(original name, diffusers name) of CompVis' `UNetModel`; None where no rule knows the name.

    An AttentionBlock's qkv stays one tensor here.
    """
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        new = COMPVIS_FIXED.get(stem)
        if found := re.fullmatch(r"middle_block\.([012])\.(.+)", stem):
            new = _compvis_middle(tensors, *found.groups())
        elif new is None and (found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", stem)):
            new = _compvis_block(tensors, *found.groups())
        yield name, None if new is None else f"{new}.{leaf}"


def _compvis_middle(tensors: dict[str, Tensor], child: str, rest: str) -> str | None:
    if child == "1":
        return f"mid_block.attentions.0.{_compvis_attention(tensors, 'middle_block.1', rest)}"
    return COMPVIS_RESNET.get(rest) and f"mid_block.resnets.{int(child) // 2}.{COMPVIS_RESNET[rest]}"


def _compvis_block(tensors: dict[str, Tensor], way: str, block: str, child: str, rest: str) -> str | None:
    """One of the input or output blocks; its children are residual block, attention, resampler, in this order."""
    down = way == "input"
    level, index = divmod(int(block) - 1, PER_LEVEL) if down else divmod(int(block), PER_LEVEL)
    blocks = f"{'down' if down else 'up'}_blocks.{level}"
    resampler = f"{blocks}.{'down' if down else 'up'}samplers.0"
    between = f"{way}_blocks.{block}.1"
    if down and index == PER_LEVEL - 1:  # a downsampler stands alone
        new = "conv" if rest == "op" else COMPVIS_RESNET.get(rest)
        return f"{resampler}.{new}" if new and child == "0" else None
    if child == "0":
        return COMPVIS_RESNET.get(rest) and f"{blocks}.resnets.{index}.{COMPVIS_RESNET[rest]}"
    attended = f"{between}.norm.weight" in tensors
    if not down and child == ("2" if attended else "1"):
        new = "conv" if rest == "conv" else COMPVIS_RESNET.get(rest)
        return new and f"{resampler}.{new}"
    if child == "1" and attended:
        return f"{blocks}.attentions.{index}.{_compvis_attention(tensors, between, rest)}"
    return None


def _compvis_attention(tensors: dict[str, Tensor], place: str, rest: str) -> str:
    """A name inside an attention: an AttentionBlock's differ, a SpatialTransformer's are diffusers' own."""
    simple = f"{place}.qkv.weight" in tensors
    return {"norm": "group_norm", "proj_out": "to_out.0"}.get(rest, rest) if simple else rest


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
