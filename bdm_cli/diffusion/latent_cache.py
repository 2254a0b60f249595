"""Encoded training images on disk, so that training a latent model does not run the first stage again.

A cache is a folder: plan.json (what is encoded, how), moments-<shard>.npy float [n, views, m, h, w], labels.npy and
captions.json where there are any, and cache.json, written last: without it the cache is not whole. It holds moments,
not latents: for a variational first stage every use draws from the posterior anew, as training on images would.

A view is one way in which training may see an image: mirrored or not, and one of `crops` random crops.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdm_cli import output, runs
from bdm_cli.diffusion.data import Images, to_float
from bdm_cli.diffusion.first_stage import FirstStage
from bdm_cli.errors import BdmError
from bdm_cli.places import locate
from bdm_cli.recipe import Recipe

SHARD = 512
"""Images per file."""
OPEN_SHARDS = 256


class Cache:
    """A whole cache, read by memory map: nothing but the asked-for rows is read.

    images: the images it should be of, where they are at hand; None takes the cache's word.
    Raises: BdmError if it is not whole, or of other images, another preparation or first stage than the recipe's; on
    reading, if a file is missing or cut short.
    """

    def __init__(self, spec: Recipe, images: Images | None = None) -> None:
        self.folder = locate(spec.data.latents)
        plan, whole = (_json(self.folder / name) for name in ("plan.json", "cache.json"))
        if plan is None or whole is None:
            raise BdmError(
                f"the latent cache {self.folder} is not whole.\n"
                f"  go on with: bdm data prepare --recipe {spec.name}, or remove the folder"
            )
        _compare(self.folder, plan, _wanted(spec) | ({} if images is None else _identity(spec, images)))
        self.crops, self.flip, self.shard = plan["crops"], plan["flip"], plan["shard"]
        self.identity = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
        self.n_images: int = whole["n_images"]
        labels, captions = self.folder / "labels.npy", self.folder / "captions.json"
        self.labels = np.load(labels) if labels.exists() else None
        self.captions = json.loads(captions.read_text()) if captions.exists() else None
        known = spec.unet.n_classes - 1
        if spec.unet.condition == "classes" and self.labels.max() >= known:
            raise BdmError(
                f"the latent cache {self.folder} has {self.labels.max() + 1} classes, the network '{spec.unet.name}' "
                f"knows {known}.\n  use the images that the network was made for"
            )
        self._open = lru_cache(OPEN_SHARDS)(self._shard)

    def __len__(self) -> int:
        return self.n_images

    def _shard(self, index: int) -> np.ndarray:
        path = shard_path(self.folder, index)
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise BdmError(
                f"the latent cache lacks a whole {path} ({error}).\n  remove it, and go on with: bdm data prepare"
            ) from None

    def moments(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        """float32 [n, m, h, w]."""
        rows = [self._open(int(i) // self.shard)[int(i) % self.shard, v] for i, v in zip(indices, views, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.float32))


def exists(spec: Recipe) -> bool:
    """Whether there is a cache, whole or not, where the recipe looks for one."""
    return bool(spec.data.latents) and (locate(spec.data.latents) / "plan.json").exists()


def write(
    spec: Recipe,
    images: Images,
    stage: FirstStage,
    *,
    crops: int,
    half: bool,
    batch: int,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Encode all images in all views; returns the folder. Shards that are there are kept.

    Every process of `world` takes every world-th shard; `wait` holds until all have come so far.
    Raises: BdmError if the folder holds another cache, or a file cannot be written.
    """
    folder = locate(spec.data.latents)
    plan = _wanted(spec) | _identity(spec, images)
    plan |= {"crops": crops, "shard": SHARD, "dtype": "float16" if half else "float32", "n_images": len(images)}
    _check_room(folder, plan, _encoded(spec, images, stage, range(1), crops, 1, lambda n: None))
    before = _json(folder / "plan.json")
    if before is not None:
        _compare(folder, before, plan)
    elif rank == 0:
        runs.write_text(folder / "plan.json", json.dumps(plan, indent=2))
    n_shards = -(-len(images) // SHARD)
    if rank == 0 and not all(shard_path(folder, index).exists() for index in range(n_shards)):
        (folder / "cache.json").unlink(missing_ok=True)  # not whole any more
    shards = range(rank, n_shards, world)
    total = sum(min(SHARD, len(images) - k * SHARD) for k in shards)
    with output.progress(f"encoding into {folder}", total, "images") as advance:
        for index in shards:
            chosen = range(index * SHARD, min((index + 1) * SHARD, len(images)))
            path = shard_path(folder, index)
            if not path.exists():
                encoded = _encoded(spec, images, stage, chosen, crops, batch, advance)
                array = encoded.astype(plan["dtype"])
                runs.write_whole(path, lambda temporary, array=array: np.save(temporary, array))
            else:
                advance(len(chosen))
    wait()
    if rank == 0:
        if images.labels is not None:
            runs.write_whole(folder / "labels.npy", lambda temporary: np.save(temporary, images.labels))
        if spec.unet.condition == "text" and images.captions is not None:
            runs.write_text(folder / "captions.json", json.dumps(images.captions, ensure_ascii=False))
        runs.write_text(folder / "cache.json", json.dumps({"n_images": len(images)}))
    wait()
    return folder


@torch.inference_mode()
def _encoded(
    spec: Recipe,
    images: Images,
    stage: FirstStage,
    chosen: range,
    crops: int,
    batch: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Moments [len(chosen), views, m, h, w] of some images."""
    device = next(stage.parameters()).device
    made = []
    for first in range(chosen.start, chosen.stop, batch):
        indices = range(first, min(first + batch, chosen.stop))
        of_views = []
        for crop in range(crops):
            if spec.data.crop == "random":  # a generator per image, so that `batch` does not change the crops
                views_of = [images.views([i], np.random.default_rng([crop, i])) for i in indices]
                pixels = to_float(np.concatenate(views_of)).to(device)
            else:
                pixels = to_float(images[indices]).to(device)
            of_views += [stage.moments(x) for x in ((pixels, pixels.flip(-1)) if spec.data.flip else (pixels,))]
        made.append(torch.stack(of_views, dim=1).float().cpu().numpy())
        advance(len(indices))
    return np.concatenate(made)


def _check_room(folder: Path, plan: dict, one: np.ndarray) -> None:
    """Say how much room the cache takes. Raises: BdmError if the disk has less; one: the moments of one image."""
    there = sum(path.stat().st_size for path in folder.glob("moments-*.npy"))
    size = plan["n_images"] * one.size * np.dtype(plan["dtype"]).itemsize
    free = shutil.disk_usage(next(p for p in (folder, *folder.resolve().parents) if p.exists())).free
    output.say(f"{plan['n_images']:,} images take {size / 2**30:.2f} GiB as {plan['dtype']}: {folder}")
    if size - there > free:
        raise BdmError(
            f"the latent cache {folder} needs {size / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free.\n"
            "  store 16-bit floats (--half), or choose another place: --set data.latents=PATH"
        )


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"moments-{index:06d}.npy"


def _wanted(spec: Recipe) -> dict[str, object]:
    """What a cache must have been made of and with to serve a recipe."""
    stage = locate(spec.first_stage.path)
    digest = hashlib.sha256()
    for path in sorted(stage.glob("*")) if stage.is_dir() else ():
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin") and path.name != "origin.json":
            digest.update(path.read_bytes())
    d = spec.data
    return {
        "dataset": d.dataset,
        "image_size": d.image_size,
        "channels": d.channels,
        "prepare": d.prepare,
        "crop": d.crop,
        "flip": d.flip,
        "first_stage": digest.hexdigest()[:16],
        "condition": spec.unet.condition,
    }


def _identity(spec: Recipe, images: Images) -> dict[str, str]:
    """Which images a cache is of, and what is told about them."""
    told = json.dumps(images.captions) if spec.unet.condition == "text" else ""
    return {"images": images.names_digest(), "captions": hashlib.sha256(told.encode()).hexdigest()[:16]}


def _compare(folder: Path, there: dict, wanted: dict) -> None:
    other = sorted(key for key in wanted if there.get(key) != wanted[key])
    if other:
        lines = "\n".join(f"  {key}: {there.get(key)!r} there, {wanted[key]!r} wanted" for key in other)
        raise BdmError(
            f"the latent cache {folder} is of something else:\n{lines}\n"
            "  remove it, or choose another place: --set data.latents=PATH"
        )


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None
