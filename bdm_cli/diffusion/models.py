"""The networks: a U-Net from a recipe's arguments, the noise scheduler, the teacher."""

import json
from pathlib import Path

import diffusers
from diffusers import DDIMScheduler
from torch import Tensor, nn

from bdm_cli import tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.inputs import locate
from bdm_cli.recipe import Recipe, Scheduler, Unet


def build_unet(spec: Unet) -> nn.Module:
    """The U-Net with fresh weights (on the meta device under `torch.device("meta")`).

    LDM-8 fixes the number of heads, which UNet2DModel cannot express: they are set on every attention afterwards.
    Raises: BdmError if diffusers refuses the arguments.
    """
    try:
        unet = getattr(diffusers, spec.kind)(**_tuples(spec.arguments))
    except (TypeError, ValueError) as error:
        raise BdmError(
            f"unet.arguments: diffusers' {spec.kind} refuses them ({error}).\n  see its documentation"
        ) from None
    if spec.heads:
        for module in unet.modules():
            if hasattr(module, "to_q"):
                module.heads = spec.heads
                module.scale = (module.inner_dim // spec.heads) ** -0.5
                module.sliceable_head_dim = spec.heads
    return unet


def _tuples(arguments: dict) -> dict:
    """TOML has no null and no tuples: "none" means None, a list is a tuple."""
    return {k: tuple(v) if isinstance(v, list) else None if v == "none" else v for k, v in arguments.items()}


def estimate_noise(unet: nn.Module, x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
    """eps(x_t, t), shaped as x [N, C, H, W]; t [N]; for class-conditional networks a context [N, L, D]."""
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


def load_teacher(recipe: Recipe) -> nn.Module:
    """The full-precision U-Net, frozen, in eval mode, from a file that `bdm pretrain` wrote.

    Raises: BdmError if the file is missing, damaged, or of another network.
    """
    path = locate(recipe.teacher.path)
    tensors, metadata = tensorfile.read(path)
    if "recipe" not in metadata:
        raise BdmError(
            f"{path} is not a teacher that bdm wrote (no recipe in its header).\n"
            "  make one with `bdm pretrain`; reading the original checkpoints is not in this version"
        )
    stored = json.loads(metadata["recipe"])
    if stored["method"]["name"] != "fp":
        raise BdmError(
            f"{path} holds a '{stored['method']['name']}' student.\n  give a full-precision model (bdm pretrain)"
        )
    unet = build_unet(recipe.unet)
    load_strictly(unet, tensors, path)
    return unet.eval().requires_grad_(False)


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
