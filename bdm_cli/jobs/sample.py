"""`bdm sample`: images of a run or of a packed file, in shards that survive a kill, as an ADM-style npz and a grid."""

import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from bdm_cli import output, recipe, runs, student
from bdm_cli.diffusion import conditions, first_stage, sampling
from bdm_cli.packed import ops, pack
from bdm_cli.recipe import Recipe

GRID_IMAGES = 64


class Source(NamedTuple):
    """What images are drawn from. npz: where they go; network: builds the U-Net, on `device`."""

    name: str
    spec: Recipe
    seed: int
    npz: Path
    device: torch.device
    network: Callable[[], nn.Module]


def run(spec: Recipe, run_id: str) -> Path:
    """Sample a finished run to spec.sample; returns the npz (arr_0: uint8 [N, H, W, C]; arr_1: int64 [N] classes, of a
    class-conditional network). What is there is not redone.

    Image i is a function of the weights, the sampler's settings, the run's seed and i alone. Every process of a
    distributed launch makes its part of the shards; the first puts them together.
    Raises: BdmError if the run is not finished, or an input is missing or damaged.
    """
    runs.existing(run_id)
    device = student.processes().device
    return _drawn(
        Source(
            run_id,
            spec,
            runs.seed(run_id),
            runs.samples_npz(spec, run_id),
            device,
            lambda: student.load_run(run_id).student.to(device),
        )
    )


def run_packed(
    path: Path, overrides: Sequence[str] = (), seed: int | None = None, out: Path | None = None, fast: bool = False
) -> Path:
    """As `run`, of a packed file and nothing else (the first stage and a text encoder apart); on the CPU.

    overrides: sample.*, and where inputs lie. seed: None = the student's. out: None = beside the file. The images'
    folder is named by the file and its content, then as a run's. fast: with fused blocks (packed/fusion.py), whose
    rounding is another: most images are the same, some are others as good.
    Raises: BdmError also if the file is damaged or none of ours.
    """
    ops.keep_memory()
    if ops.path() == "torch" and ops.library().reason:
        output.say(f"plain torch computes, which is much slower: {ops.library().reason} (bdm doctor)")
    packed = pack.read(path)
    header = packed.header
    spec = recipe.of_run(header.recipe, overrides)
    if header.random:
        output.say(f"{path.name}: its weights are random; the images show nothing")
    folder = (out or path.parent) / f"{path.stem}-{packed.sha256[:8]}{'-fast' if fast else ''}"
    if seed not in (None, header.seed):
        folder /= f"seed{seed}"
    return _drawn(
        Source(
            path.name,
            spec,
            header.seed if seed is None else seed,
            folder / runs.samples_name(spec, header.recipe),
            torch.device("cpu"),
            lambda: student.unpacked(packed, path, fast),
        )
    )


def _drawn(source: Source) -> Path:
    path = source.npz
    if path.exists():
        output.say(f"{source.name}: {source.spec.sample.n_images} images are there already: {path}")
        return path
    with runs.claim_folder(path.parent, f"the samples of {source.name}"):
        student.use_threads(source.spec)
        return _sample(source)


def _sample(source: Source) -> Path:
    spec, seed, path = source.spec, source.seed, source.npz
    s, processes, start = spec.sample, student.processes(), time.monotonic()
    stage = None if spec.first_stage is None else first_stage.load(spec.first_stage).to(source.device)
    condition = conditions.of_recipe(spec, source.device)
    draw = sampling.of_recipe(spec, source.network(), condition, stage, s.batch, seed)
    shards = [range(first, min(first + s.shard, s.n_images)) for first in range(0, s.n_images, s.shard)]
    processes.wait_for_everyone()  # all see the same shards as missing
    missing = [shard for shard in shards if not _shard_path(path.parent, shard).exists()]
    processes.wait_for_everyone()
    mine = missing[processes.process_index :: processes.num_processes]
    with output.progress(f"sampling {source.name}", sum(map(len, mine)), "images") as advance:
        for shard in mine:
            made = []
            for first in range(shard.start, shard.stop, s.batch):
                indices = range(first, min(first + s.batch, shard.stop))
                made.append(draw(indices))
                advance(len(indices))
            _write_array(_shard_path(path.parent, shard), np.concatenate(made))
    processes.wait_for_everyone()
    if processes.is_main_process:
        files = [_shard_path(path.parent, shard) for shard in shards]
        labels = condition.labels(range(s.n_images), seed)
        grid = sampling.grid(_first(files, GRID_IMAGES))
        runs.write_whole(path.parent / "grid.png", lambda temporary: grid.save(temporary))
        runs.write_whole(path, lambda temporary: _write_npz(temporary, files, s.n_images, labels))
        for file in files:
            file.unlink()
        output.say(f"{source.name}: {s.n_images} images in {time.monotonic() - start:.0f} s: {path}")
    processes.wait_for_everyone()
    return path


def _first(files: list[Path], n: int) -> np.ndarray:
    """The first n images of the shards."""
    images = np.load(files[0])[:n]
    for file in files[1:]:
        if len(images) >= n:
            break
        images = np.concatenate([images, np.load(file)[: n - len(images)]])
    return images


def _write_npz(path: Path, files: list[Path], n_images: int, labels: np.ndarray | None) -> None:
    """As np.savez(path, images, labels), one shard in memory at a time: 50,000 images of 256x256 are 10 GB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for number, file in enumerate(files):
                images = np.load(file)
                if number == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (n_images, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(np.ascontiguousarray(images).data)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as stream:
                np.save(stream, labels)


def _write_array(path: Path, array: np.ndarray) -> None:
    runs.write_whole(path, lambda temporary: np.save(temporary, array))


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"shard-{shard.start:08d}-{shard.stop:08d}.npy"
