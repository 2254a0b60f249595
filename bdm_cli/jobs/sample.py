"""`bdm sample`: a run's images, in shards that survive a kill, as an ADM-style npz and a grid."""

import time
from pathlib import Path

import numpy as np
import torch

from bdm_cli import output, runs, student
from bdm_cli.diffusion import sampling
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe

GRID_IMAGES = 64


def run(spec: Recipe, run_id: str) -> Path:
    """Sample a finished run to spec.sample; returns the npz (arr_0: uint8 [N, H, W, C]). What is there is not redone.

    Image i is a function of the weights, the sampler's settings, the run's seed and i alone.
    Raises: BdmError if the run is not finished, its latents cannot be decoded, or the settings are impossible.
    """
    s = spec.sample
    if spec.first_stage is not None:
        raise BdmError(
            f"this version cannot decode latents of '{spec.first_stage.name}'.\n  it samples pixel-space models"
        )
    runs.existing(run_id)
    path = runs.samples_npz(spec, run_id)
    if path.exists():
        output.say(f"{run_id}: {s.n_images} images are there already: {path}")
        return path
    with runs.claim(f"{run_id}/samples/{path.parent.name}"):
        student.use_threads(spec)
        return _sample(spec, run_id, path)


def _sample(spec: Recipe, run_id: str, path: Path) -> Path:
    s = spec.sample
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = student.load_run(run_id).student.to(device)
    draw = sampling.of_recipe(spec, unet, s.batch, runs.seed(run_id))
    shards = [range(first, min(first + s.shard, s.n_images)) for first in range(0, s.n_images, s.shard)]
    with output.progress(f"sampling {run_id}", s.n_images, "images") as advance:
        for shard in shards:
            file = _shard_path(path.parent, shard)
            if file.exists():
                advance(len(shard))
                continue
            made = []
            for first in range(shard.start, shard.stop, s.batch):
                indices = range(first, min(first + s.batch, shard.stop))
                made.append(draw(indices))
                advance(len(indices))
            _write_array(file, np.concatenate(made))
    pictures = np.concatenate([np.load(_shard_path(path.parent, shard)) for shard in shards])
    runs.write_whole(path.parent / "grid.png", lambda temporary: sampling.grid(pictures[:GRID_IMAGES]).save(temporary))
    runs.write_whole(path, lambda temporary: np.savez(temporary, arr_0=pictures))
    for shard in shards:
        _shard_path(path.parent, shard).unlink()
    output.say(f"{run_id}: {s.n_images} images in {time.monotonic() - start:.0f} s: {path}")
    return path


def _write_array(path: Path, array: np.ndarray) -> None:
    runs.write_whole(path, lambda temporary: np.save(temporary, array))


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"shard-{shard.start:08d}-{shard.stop:08d}.npy"
