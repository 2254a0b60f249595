"""One pass of a feature network over a set of images: streamed, in shards that survive a kill, cached by content."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from bdm_cli import output, runs, tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.images.sets import ImageSet, Pixels
from bdm_cli.metrics.features import Features, Network
from bdm_cli.metrics.summary import Statistics, Summary, chosen

BATCH = 64
SHARD = 40 * BATCH
"""Images whose features are lost by a kill, at most; of large sets more, so that there are at most SHARDS shards."""
SHARDS = 64
ALL_KEPT = 100_000
"""Sets up to so many images keep the features of all; about 20 KB each with Inception."""
GAUSSIAN = ("pool", "spatial")
"""Features whose mean and covariance are wanted."""


def summary_of(
    network: Network,
    images: ImageSet,
    processes: PartialState,
    keep: int = 0,
    batch: int = BATCH,
    what: str = "features",
) -> Summary:
    """The summary of a set of images, from runs/cache/features if they were seen before, wherever they lay.

    Every process of a distributed launch takes its part of the shards; all get the same summary. keep: whose features
    are kept beside the statistics, of a set larger than ALL_KEPT; 0 = all. The batch bounds the memory and changes
    nothing but rounding.
    Memory: a batch and its activations, the covariances, one shard's features.
    Raises: BdmError if images cannot be read, the network gives what is not a number, or the cache cannot be written.
    """
    n = len(images.pixels)
    kept = np.arange(n) if n <= ALL_KEPT or not keep else chosen(n, min(keep, n))
    told = f"{network.name} {fingerprint(network)} {images.pixels.content()} {len(kept)}"
    folder = runs.cache_dir() / "features" / hashlib.sha256(told.encode()).hexdigest()[:16]
    with runs.turn(folder) if processes.is_main_process else contextlib.nullcontext():  # the first takes it for all
        processes.wait_for_everyone()
        found = _load(folder)
        processes.wait_for_everyone()
        if found is not None and processes.is_main_process:
            for left in folder.glob("shard-*"):  # of a process that was killed while it removed them
                left.unlink()
        if found is None:
            shards = _shards(n)
            missing = [shard for shard in shards if not _whole(_file(folder, shard))]
            processes.wait_for_everyone()
            mine = missing[processes.process_index :: processes.num_processes]
            done = (n - sum(map(len, missing))) // processes.num_processes
            total = done + sum(map(len, mine))
            with output.progress(what, total, "images", done) as advance:
                for shard in mine:
                    tensors = _shard(network, images, shard, kept, batch, processes.device, advance)
                    tensorfile.write(_file(folder, shard), tensors, {"n": str(len(shard))})
            processes.wait_for_everyone()
            if processes.is_main_process:
                _put_together(folder, shards, n, len(kept))
            processes.wait_for_everyone()
            found = _load(folder)
    if found is None:
        raise BdmError(f"{folder} was removed while it was in use.\n  do it again")
    return found


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's state, whatever file it came from."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def extract(
    network: Network, pixels: Pixels | np.ndarray, which: range, batch: int, device: torch.device
) -> Iterator[Features]:
    """Features of images, a batch at a time, on the device; the next batch is read meanwhile.

    TF32 is off, so that a GPU agrees with a CPU.
    """
    starts = range(which.start, which.stop, batch)
    with ThreadPoolExecutor(1) as ahead, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reading = [ahead.submit(pixels.__getitem__, slice(at, min(at + batch, which.stop))) for at in starts[:1]]
        for number in range(len(starts)):
            images = reading.pop().result()
            for at in starts[number + 1 : number + 2]:
                reading.append(ahead.submit(pixels.__getitem__, slice(at, min(at + batch, which.stop))))
            x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
            yield network.extract(x if x.shape[1] == network.channels else x.expand(-1, network.channels, -1, -1))


def _shards(n: int) -> list[range]:
    size = max(SHARD, -(-n // (SHARDS * BATCH)) * BATCH)
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def _shard(
    network: Network,
    images: ImageSet,
    shard: range,
    kept: np.ndarray,
    batch: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """Sums and products of the Gaussian features over a shard, float64, and the features of those kept."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    at = shard.start
    for features in extract(network, images.pixels, shard, batch, device):
        n = len(features["pool"])
        here = torch.from_numpy(kept[np.searchsorted(kept, at) : np.searchsorted(kept, at + n)] - at)
        for name, part in features.items():
            if not part.isfinite().all():
                raise BdmError(
                    f"{images.source}: the {name} features of images {at} to {at + n - 1} are not finite numbers.\n"
                    "  the feature network's weights are damaged, or the images are"
                )
            rows.setdefault(name, []).append(part[here.to(part.device)].cpu())
            if name in GAUSSIAN:
                wide = part.double()
                if f"{name}.sum" not in sums:
                    d = wide.shape[1]
                    sums[f"{name}.sum"], sums[f"{name}.products"] = wide.new_zeros(d), wide.new_zeros(d, d)
                sums[f"{name}.sum"] += wide.sum(0)
                sums[f"{name}.products"].addmm_(wide.T, wide)
        at += n
        advance(n)
    return sums | {name: torch.cat(parts) for name, parts in rows.items()}


def _put_together(folder: Path, shards: list[range], n: int, kept: int) -> None:
    """From shards to means, covariances and one array per feature; always in the same order."""
    sums: dict[str, Tensor] = {}
    files: dict[str, BinaryIO] = {}
    try:
        with contextlib.ExitStack() as stack:
            for shard in shards:
                for name, part in tensorfile.read(_file(folder, shard))[0].items():
                    if "." in name:
                        sums[name] = sums[name].add_(part) if name in sums else part
                        continue
                    if name not in files:
                        files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
                        header = {"descr": "<f4", "fortran_order": False, "shape": (kept, part.shape[1])}
                        np.lib.format.write_array_header_1_0(files[name], header)
                    files[name].write(part.numpy().data)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise BdmError(f"cannot write below {folder} ({error.strerror or error}).\n  free some room") from None
    statistics = {}
    for name in GAUSSIAN:
        if f"{name}.sum" in sums:
            mean = sums[f"{name}.sum"] / n
            statistics[f"{name}.mu"] = mean
            statistics[f"{name}.sigma"] = (sums[f"{name}.products"] - n * torch.outer(mean, mean)) / max(1, n - 1)
    tensorfile.write(_done(folder), statistics, {"n": str(n), "rows": json.dumps(sorted(files))})
    for shard in shards:
        _file(folder, shard).unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    try:
        tensorfile.read(path)
    except BdmError:
        return False
    return True


def _load(folder: Path) -> Summary | None:
    """What was put together; None if it is missing or damaged."""
    try:
        tensors, header = tensorfile.read(_done(folder))
        rows = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in json.loads(header["rows"])}
    except (BdmError, OSError, ValueError):
        return None
    n = int(header["n"])
    found = {name for name in GAUSSIAN if f"{name}.mu" in tensors}
    statistics = {
        name: Statistics(tensors[f"{name}.mu"].numpy(), tensors[f"{name}.sigma"].numpy(), n) for name in found
    }
    return Summary(n, statistics, rows)


def _done(folder: Path) -> Path:
    return folder / "summary.safetensors"


def _file(folder: Path, shard: range) -> Path:
    return folder / f"shard-{shard.start:08d}-{shard.stop:08d}.safetensors"
