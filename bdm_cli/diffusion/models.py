"""The networks: a U-Net from a recipe's arguments, the teacher, the noise scheduler, strict loading."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from bdm_cli import pretrained, tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.places import locate
from bdm_cli.recipe import Recipe, Scheduler, Unet

REASON = 400
"""Characters of another library's message that are passed on."""

BEYOND = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "time_cond_proj_dim")
"""Arguments of networks that want further inputs."""

HARMLESS = {"sample_size", "dropout"}
"""Arguments that do not change what a trained network computes."""


class ClassConditionalUnet(UNet2DConditionModel):
    """A UNet2DConditionModel that is told a class: its context is one token, the class's row of an embedding.

    As in LDM's ImageNet model (CompVis `ClassEmbedder`); the last class stands for "no class", for guidance.

    Shapes: sample [N, C, H, W]; timestep [N]; classes int64 [N].
    State: class_embedder.weight (parameter) [n_classes, cross_attention_dim], trained with the network.
    """

    def __init__(self, n_classes: int, **arguments: object) -> None:
        super().__init__(**arguments)
        self.class_embedder = nn.Embedding(n_classes, self.config.cross_attention_dim)

    def forward(self, sample: Tensor, timestep: Tensor, classes: Tensor, **options: object) -> object:
        return super().forward(sample, timestep, self.class_embedder(classes)[:, None], **options)


def build_unet(spec: Unet) -> nn.Module:
    """The U-Net with fresh weights (on the meta device under `torch.device("meta")`).

    LDM-8 fixes the number of heads, which UNet2DModel cannot express: they are set on every attention afterwards.
    Raises: BdmError if diffusers refuses the arguments, or the network wants conditions that bdm cannot give.
    """
    arguments = construction(spec.arguments)
    beyond = sorted(key for key in BEYOND if arguments.get(key))
    if isinstance(arguments.get("cross_attention_dim"), tuple):
        beyond.append("several values of cross_attention_dim")
    if beyond:
        raise BdmError(
            f"unet '{spec.name}' wants inputs beyond image, time and one context ({', '.join(beyond)}).\n"
            "  allowed: unconditional networks, one text encoder's context, or unet.n_classes"
        )

    def make() -> nn.Module:
        if spec.n_classes:
            return ClassConditionalUnet(spec.n_classes, **arguments)
        return getattr(diffusers, spec.kind)(**arguments)

    unet = constructed(make, "unet.arguments", spec.kind)
    if spec.heads:
        for module in unet.modules():
            if hasattr(module, "to_q"):
                module.heads = spec.heads
                module.scale = (module.inner_dim // spec.heads) ** -0.5
                module.sliceable_head_dim = spec.heads
    return unet


def construction(arguments: dict) -> dict:
    """TOML has no null and no tuples: "none" means None, a list is a tuple."""
    return {k: tuple(v) if isinstance(v, list) else None if v == "none" else v for k, v in arguments.items()}


def constructed(make: Callable[[], nn.Module], key: str, kind: str) -> nn.Module:
    """make(), with what diffusers refuses as a BdmError about the recipe's `key`."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise BdmError(f"{key}: diffusers' {kind} refuses them ({error}).\n  see its documentation") from None


def estimate_noise(unet: nn.Module, x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
    """eps(x_t, t), shaped as x [N, C, H, W]; t [N]. context: classes int64 [N], or text [N, L, D]; none if there is no
    condition."""
    return unet(x, t, *context, return_dict=False)[0]


def noise_scheduler(spec: Scheduler) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=spec.n_timesteps,
        beta_schedule=spec.beta_schedule,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        clip_sample=spec.clip_sample,
        set_alpha_to_one=spec.set_alpha_to_one,
        steps_offset=spec.steps_offset,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def load_teacher(spec: Recipe) -> nn.Module:
    """The full-precision U-Net of spec.model.pretrained, frozen, in eval mode.

    Raises: BdmError if the file or folder is missing, damaged, or of another network.
    """
    source = spec.model.pretrained
    read = _folder_tensors if pretrained.is_folder(source) else _file_tensors
    path, tensors = read(spec)
    unet = build_unet(spec.unet)
    load_strictly(unet, tensors, path)
    return unet.eval().requires_grad_(False)


def _file_tensors(spec: Recipe) -> tuple[Path, dict[str, Tensor]]:
    """Of a file that `bdm pretrain` wrote."""
    path = locate(spec.model.pretrained)
    if path.suffix != ".safetensors":
        raise BdmError(
            f"{path} is an original checkpoint, or none at all.\n"
            "  convert it first: bdm import CHECKPOINT --model NAME, then give the folder that it makes"
        )
    tensors, metadata = tensorfile.read(path)
    stored = json.loads(metadata.get("recipe", "{}"))
    if "method" not in stored:
        raise BdmError(f"{path} is not a teacher that bdm wrote (no recipe in its header).\n  {pretrained.ALLOWED}")
    if stored["method"]["name"] != "fp":
        raise BdmError(
            f"{path} holds a '{stored['method']['name']}' student.\n  give a full-precision model (bdm pretrain)"
        )
    return path, tensors


def _folder_tensors(spec: Recipe) -> tuple[Path, dict[str, Tensor]]:
    """Of a diffusers folder: its U-Net's tensors, and the class embedding's if the network has one."""
    root = pretrained.folder(spec.model.pretrained)
    path = pretrained.part(root, "unet")
    _compare(spec.unet, pretrained.unet(spec.model.pretrained), path)
    tensors = from_pretrained(getattr(diffusers, spec.unet.kind), path).state_dict()
    if spec.unet.n_classes:
        embedding, _ = tensorfile.read(root / "class_embedder" / "model.safetensors")
        tensors |= {f"class_embedder.{name}": tensor for name, tensor in embedding.items()}
    return path, tensors


def _compare(spec: Unet, told: dict, path: Path) -> None:
    """Raises: BdmError if the recipe's network is another than the folder's, which its tensors alone may not show."""
    with torch.device("meta"):
        ours, theirs = (dict(build_unet(unet).config) for unet in (spec, Unet.model_validate(told)))
    ours["heads"], theirs["heads"] = spec.heads, told["heads"]
    keys = sorted(k for k in ours.keys() | theirs.keys() if not k.startswith("_") and k not in HARMLESS)
    other = [k for k in keys if _plain(ours.get(k)) != _plain(theirs.get(k))]
    if other:
        lines = "\n".join(f"  {k}: {theirs.get(k)!r} there, {ours.get(k)!r} in the recipe" for k in other)
        raise BdmError(
            f"{path} holds another network than the recipe's [unet]:\n{lines}\n  leave [unet] out, or mend it"
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def from_pretrained(kind: type[nn.Module], path: Path) -> nn.Module:
    """diffusers' own reader of a network's folder, made strict.

    Raises: BdmError if it cannot be read, or a tensor is missing, unexpected or of another shape.
    """
    options = {"output_loading_info": True, "local_files_only": True, "low_cpu_mem_usage": False}
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()  # what it would warn of is an error here
    try:
        network, info = kind.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:REASON]
        raise BdmError(f"diffusers cannot read the network in {path} ({reason}).\n  {pretrained.ALLOWED}") from None
    finally:
        diffusers.logging.set_verbosity(before)
    faults = {what: names for what, names in info.items() if names}
    if faults:
        text = "; ".join(
            f"{len(names)} {what.replace('_', ' ')} ({min(map(str, names))} ...)" for what, names in faults.items()
        )
        raise BdmError(
            f"{path} does not hold the network that its config.json describes: {text}.\n  copy the folder again"
        )
    return network


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load exactly these tensors. Raises: BdmError that counts missing, unexpected and misshapen ones."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if missing or unexpected or shapes:
        faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        text = "; ".join(f"{len(names)} {what} ({names[0]} ...)" for what, names in faults if names)
        raise BdmError(f"{path} does not fit the network of this recipe: {text}.\n  use the recipe it was made with")
    module.load_state_dict(tensors, strict=True)
