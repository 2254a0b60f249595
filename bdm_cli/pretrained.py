"""Diffusers folders: what a pretrained model's configuration files say, as sections of a recipe.

A folder is a pipeline's (unet/, scheduler/, vae/ or vqvae/, ... each with its config) or a single network's
(config.json). It lies on this machine, or on the hub under owner/name.
"""

import json
import re
from pathlib import Path
from typing import Any

from bdm_cli.errors import BdmError
from bdm_cli.places import locate

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FIRST_STAGES = ("vae", "vqvae")
WEIGHTS = "diffusion_pytorch_model*.safetensors"
HUB_FILES = [
    *("*.json", WEIGHTS, f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", f"vqvae/{WEIGHTS}"),
    *("class_embedder/*", "text_encoder/model*.safetensors", "tokenizer/*"),
]
HUB_NOT = ["*fp16*", "*non_ema*"]
"""What is downloaded of a hub repository, which may hold the same weights several times over."""

SCHEDULER_KEYS = ("beta_schedule", "beta_start", "beta_end", "set_alpha_to_one", "steps_offset", "clip_sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
ALLOWED = (
    "allowed: a file of `bdm pretrain`, a diffusers folder (`bdm import` makes one of a .ckpt), or a hub id owner/name"
)


def is_folder(pretrained: str) -> bool:
    """Whether a recipe's model.pretrained names a diffusers folder or a hub id, not a file that bdm wrote."""
    return bool(pretrained) and not pretrained.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))


def is_hub_id(pretrained: str) -> bool:
    """owner/name that is no folder here."""
    return bool(HUB_ID.fullmatch(pretrained)) and is_folder(pretrained) and not locate(pretrained).exists()


def folder(pretrained: str) -> Path:
    """The local folder; one on the hub is downloaded first, once, and what the hub's cache holds is used from then on.

    Raises: BdmError if there is none, or the hub cannot be reached.
    """
    path = locate(pretrained)
    if path.is_dir():
        return path
    if not is_hub_id(pretrained):
        raise BdmError(f"model.pretrained: there is no folder {path}.\n  {ALLOWED}")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            return Path(huggingface_hub.snapshot_download(pretrained, allow_patterns=HUB_FILES, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(
                huggingface_hub.snapshot_download(pretrained, allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT)
            )
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BdmError(
            f"model.pretrained: '{pretrained}' is neither a folder here ({path}) nor could it be had from the hub "
            f"({type(error).__name__}: {reason}).\n  {ALLOWED}"
        ) from None


def sections(pretrained: str) -> dict[str, Any]:
    """The tables `unet`, `scheduler` and `first_stage` of a recipe for this folder.

    Raises: BdmError if its network, schedule or prediction type is none that bdm can train.
    """
    root = folder(pretrained)
    found = {"unet": unet(pretrained)} | _scheduler(root)
    stage = next((root / name for name in FIRST_STAGES if (root / name).is_dir()), None)
    if stage is not None:
        arguments = _config(stage, "config.json")
        kind = arguments.pop("_class_name", None)
        if kind not in ("VQModel", "AutoencoderKL"):
            raise BdmError(f"{stage} holds a {kind}.\n  allowed: a VQModel or an AutoencoderKL of diffusers")
        found["first_stage"] = {
            "kind": kind,
            "path": str(stage) if is_hub_id(pretrained) else f"{pretrained}/{stage.name}",
            "arguments": {k: v for k, v in arguments.items() if not k.startswith("_")},
        }
    return found


def unet(pretrained: str) -> dict[str, Any]:
    """The table `unet`. Raises: BdmError if the folder holds no U-Net that bdm can train."""
    root = folder(pretrained)
    network = _config(part(root, "unet"), "config.json")
    kind = network.pop("_class_name", None)
    if kind not in ("UNet2DModel", "UNet2DConditionModel"):
        raise BdmError(
            f"{part(root, 'unet')} holds a {kind}.\n  allowed: a UNet2DModel or a UNet2DConditionModel of diffusers"
        )
    table = {"name": Path(pretrained).name, "kind": kind, "heads": network.pop("bdm_heads", 0)}
    table["arguments"] = {k: v for k, v in network.items() if not k.startswith("_")}
    if (root / "class_embedder").is_dir():
        n_classes = _config(root / "class_embedder", "config.json").get("num_embeddings")
        if not isinstance(n_classes, int):
            raise BdmError(f"{root / 'class_embedder' / 'config.json'} has no num_embeddings.\n  {ALLOWED}")
        table["n_classes"] = n_classes
    return table


def part(root: Path, name: str) -> Path:
    """A component's folder of a pipeline; a single network's folder is its own U-Net."""
    return root / name if (root / name).is_dir() else root


def _scheduler(root: Path) -> dict[str, Any]:
    """The table `scheduler`, or nothing where the folder has none: then the recipe must."""
    path = next((p for p in (root / "scheduler", root) if (p / "scheduler_config.json").exists()), None)
    if path is None:
        return {}
    config = _config(path, "scheduler_config.json")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise BdmError(
            f"{path}: the network predicts '{config['prediction_type']}'.\n"
            "  allowed: epsilon (the noise), as in the papers"
        )
    if config.get("beta_schedule") not in SCHEDULES or config.get("trained_betas") is not None:
        raise BdmError(f"{path}: beta_schedule '{config.get('beta_schedule')}'.\n  allowed: {', '.join(SCHEDULES)}")
    clipped = config.get("clip_sample") and config.get("clip_sample_range", 1.0) != 1.0
    if config.get("rescale_betas_zero_snr") or config.get("thresholding") or clipped:
        raise BdmError(
            f"{path}: rescale_betas_zero_snr, thresholding or a clip_sample_range other than 1 is set.\n"
            "  allowed: plain schedules, clipped at 1 or not at all"
        )
    defaults = {"beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True, "steps_offset": 0}  # diffusers' own
    told = {key: config[key] for key in SCHEDULER_KEYS if key in config}
    return {"scheduler": defaults | {"n_timesteps": config.get("num_train_timesteps", 1000)} | told}


def _config(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((path / name).read_text())
    except OSError as error:
        raise BdmError(f"cannot read {path / name} ({error.strerror}).\n  {ALLOWED}") from None
    except ValueError as error:
        raise BdmError(f"{path / name} is not JSON ({error}).\n  copy the folder again") from None
    if not isinstance(found, dict):
        raise BdmError(f"{path / name} is no configuration of diffusers.\n  {ALLOWED}")
    return found
