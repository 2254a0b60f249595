"""`bdm import`: an original checkpoint becomes a diffusers folder."""

import hashlib
import json
import shutil
from pathlib import Path

import diffusers
import pandas as pd
import torch
from torch import Tensor, nn

from bdm_cli import output, recipe, records, tensorfile
from bdm_cli.diffusion import convert, first_stage
from bdm_cli.diffusion.models import build_unet, load_strictly, noise_scheduler
from bdm_cli.errors import BdmError, unknown
from bdm_cli.places import locate
from bdm_cli.recipe import Recipe

MODELS = ("cifar10", "bedrooms", "churches", "ffhq", "imagenet")
FIRST_STAGES = {"vq-f4": "bedrooms", "kl-f8": "churches"}
"""First stages in files of their own, and a recipe that has the same."""

PARTS = {"VQModel": "vqvae", "AutoencoderKL": "vae"}


def run(path: Path, model: str, weights: convert.Weights = "ema", out: Path | None = None) -> pd.DataFrame:
    """Convert the file strictly; one row per part of the folder that it became.

    model: one of MODELS or FIRST_STAGES. weights: the moving average, or the raw weights of the same file.
    out: the folder; None = where the model's recipes look for their teacher (for raw weights, beside it).
    Raises: BdmError if the file is damaged, of another model, or would run code, or the folder exists.
    """
    if model not in (*MODELS, *FIRST_STAGES):
        raise unknown(
            "model", model, (*MODELS, *FIRST_STAGES), "what the file is; the published files are in the README"
        )
    spec = recipe.load(FIRST_STAGES.get(model, model))
    if out is not None:
        folder = out
    elif model in FIRST_STAGES:
        folder = locate(f"models/first-stages/{model}")
    else:
        folder = locate(spec.model.pretrained)
        folder = folder if weights == "ema" else folder.with_name(f"{folder.name}-raw")
    if folder.exists():
        raise BdmError(f"{folder} exists.\n  remove it, or give another --out")
    output.say(f"reading {path}")
    state = convert.read(path, weights)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        rows = (
            _first_stage(model, spec, state, temporary)
            if model in FIRST_STAGES
            else _model(spec, state, weights, temporary)
        )
        _origin(path, model, temporary, rows)
        temporary.rename(folder)
    except OSError as error:
        raise BdmError(f"cannot write {folder} ({error.strerror or error}).\n  give another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    output.say(f"{model}: {folder}")
    return pd.DataFrame(rows, columns=["Part", "Class", "Parameters (M)", "Weights", "Note"])


def _model(spec: Recipe, state: dict[str, Tensor], weights: convert.Weights, folder: Path) -> list[tuple]:
    found = convert.convert(spec, state, weights)
    told = {True: "moving average (EMA)", False: "raw", None: "as in the file"}[found.averaged]
    note = f"{len(found.ignored)} buffers ignored" if found.ignored else ""
    plain = build_unet(spec.unet.model_copy(update={"n_classes": 0}))  # diffusers' own class, which it can load again
    load_strictly(plain, {k: v for k, v in found.unet.items() if not k.startswith("class_embedder.")}, folder)
    if spec.unet.heads:
        plain.register_to_config(bdm_heads=spec.unet.heads)
        note = f"{spec.unet.heads} heads, which diffusers alone gets wrong: load it with bdm. {note}".strip()
    plain.save_pretrained(folder / "unet")
    rows = [("unet", spec.unet.kind, _millions(plain), told, note)]
    parts = {"unet": ["diffusers", spec.unet.kind], "scheduler": ["diffusers", "DDIMScheduler"]}
    if spec.unet.n_classes:
        embedding = found.unet["class_embedder.weight"]
        tensorfile.write(folder / "class_embedder" / "model.safetensors", {"weight": embedding}, {"format": "pt"})
        config = {"num_embeddings": embedding.shape[0], "embedding_dim": embedding.shape[1]}
        (folder / "class_embedder" / "config.json").write_text(json.dumps(config, indent=2))
        rows.append(("class_embedder", "Embedding", round(embedding.numel() / 1e6, 2), "raw", "last row: no class"))
    if found.first_stage is not None:
        name = PARTS[spec.first_stage.kind]
        rows.append(_save_stage(spec, found.first_stage, found.scaling_factor, folder / name))
        parts["vqvae"] = ["diffusers", spec.first_stage.kind]
    noise_scheduler(spec.scheduler).save_pretrained(folder / "scheduler")
    rows.append(("scheduler", "DDIMScheduler", 0.0, "", f"{spec.scheduler.beta_schedule} betas"))
    pipeline = _pipeline(spec)
    if pipeline is not None:
        index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__} | parts
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return rows


def _pipeline(spec: Recipe) -> str | None:
    """The pipeline of diffusers that runs this model as it is, if there is one."""
    if spec.unet.condition != "none" or spec.unet.heads:
        return None
    if spec.first_stage is None:
        return "DDIMPipeline"
    return "LDMPipeline" if spec.first_stage.kind == "VQModel" else None


def _first_stage(model: str, spec: Recipe, state: dict[str, Tensor], folder: Path) -> list[tuple]:
    with torch.device("meta"):
        module = first_stage.build(spec.first_stage)
    tensors = convert.convert_first_stage(model, module, state)
    return [_save_stage(spec, tensors, 1.0, folder)]


def _save_stage(spec: Recipe, tensors: dict[str, Tensor], scaling_factor: float, folder: Path) -> tuple:
    network = first_stage.build(spec.first_stage)
    load_strictly(network, tensors, folder)
    first_stage.save(network, folder, scaling_factor)
    return (
        folder.name,
        spec.first_stage.kind,
        _millions(network),
        "as in the file",
        f"scaling factor {scaling_factor:.6g}",
    )


def _origin(path: Path, model: str, folder: Path, rows: list[tuple]) -> None:
    """What the folder was made of, beside it."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    made = {"model": model, "file": path.name, "sha256": sha256, "weights": rows[0][3], **records.provenance()}
    (folder / "origin.json").write_text(json.dumps(made, indent=2))


def _millions(module: nn.Module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)
