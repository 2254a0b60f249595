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


def folder(pretrained: str, *, weights: bool) -> Path:
    """The local folder; one on the hub is downloaded first (once, into the hub's own cache).

    weights: the networks' files too, not only their configurations.
    Raises: BdmError if there is none, or the hub cannot be reached.
    """
    path = locate(pretrained)
    if path.is_dir():
        return path
    if not is_hub_id(pretrained):
        raise BdmError(f"model.pretrained: there is no folder {path}.\n  {ALLOWED}")
    import huggingface_hub

    patterns = ["*.json", "*.txt", "*.model"] + (["*.safetensors", "*.bin"] if weights else [])
    try:
        return Path(huggingface_hub.snapshot_download(pretrained, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BdmError(
            f"model.pretrained: '{pretrained}' is neither a folder here ({path}) nor could it be had from the hub "
            f"({type(error).__name__}: {reason}).\n  {ALLOWED}"
        ) from None


def sections(pretrained: str) -> dict[str, Any]:
    """The tables `unet`, `scheduler` and `first_stage` of a recipe for this folder.

    Raises: BdmError if its network, schedule or prediction type is none that bdm can train.
    """
    root = folder(pretrained, weights=False)
    network = _config(part(root, "unet"), "config.json")
    kind = network.pop("_class_name", None)
    if kind not in ("UNet2DModel", "UNet2DConditionModel"):
        raise BdmError(
            f"{part(root, 'unet')} holds a {kind}.\n  allowed: a UNet2DModel or a UNet2DConditionModel of diffusers"
        )
    unet = {"name": Path(pretrained).name, "kind": kind, "heads": network.pop("bdm_heads", 0)}
    unet["arguments"] = {k: v for k, v in network.items() if not k.startswith("_")}
    if (root / "class_embedder").is_dir():
        unet["n_classes"] = _config(root / "class_embedder", "config.json")["num_embeddings"]
    found = {"unet": unet, "scheduler": _scheduler(root)}
    stage = next((root / name for name in FIRST_STAGES if (root / name).is_dir()), None)
    if stage is not None:
        arguments = _config(stage, "config.json")
        found["first_stage"] = {
            "kind": arguments.pop("_class_name"),
            "path": str(stage.resolve()),
            "arguments": {k: v for k, v in arguments.items() if not k.startswith("_")},
        }
    return found


def part(root: Path, name: str) -> Path:
    """A component's folder of a pipeline; a single network's folder is its own U-Net."""
    return root / name if (root / name).is_dir() else root


def _scheduler(root: Path) -> dict[str, Any]:
    path = next((p for p in (root / "scheduler", root) if (p / "scheduler_config.json").exists()), None)
    if path is None:
        raise BdmError(
            f"{root} has no scheduler/scheduler_config.json.\n  give the noise schedule in the recipe: [scheduler]"
        )
    config = _config(path, "scheduler_config.json")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise BdmError(
            f"{path}: the network predicts '{config['prediction_type']}'.\n"
            "  allowed: epsilon (the noise), as in the papers"
        )
    if config.get("beta_schedule") not in SCHEDULES or config.get("trained_betas") is not None:
        raise BdmError(f"{path}: beta_schedule '{config.get('beta_schedule')}'.\n  allowed: {', '.join(SCHEDULES)}")
    defaults = {"beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True, "steps_offset": 0}  # diffusers' own
    return (
        defaults
        | {"n_timesteps": config.get("num_train_timesteps", 1000)}
        | {key: config[key] for key in SCHEDULER_KEYS if key in config}
    )


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
