"""Sets of images and of features, and processes, for the tests of the metrics."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from bdm_cli.images.sets import ImageSet
from bdm_cli.metrics.summary import Statistics, Summary

CPU = torch.device("cpu")


def statistics(rows: np.ndarray) -> Statistics:
    """Mean and covariance of rows [N, D] by numpy, in float64."""
    wide = rows.astype(np.float64)
    return Statistics(wide.mean(0), np.atleast_2d(np.cov(wide.T)), len(rows))


def summary(**rows: np.ndarray) -> Summary:
    """Of features [N, D] by name, all kept."""
    kept = {name: part.astype(np.float32) for name, part in rows.items()}
    gaussian = {name: statistics(kept[name]) for name in ("pool", "spatial") if name in kept}
    return Summary(len(next(iter(kept.values()))), gaussian, kept)


def noise(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


@dataclass
class Watched:
    """Images in memory that tell which of them were read, and break off before the image `fails_at`."""

    images: np.ndarray
    fails_at: int | None = None
    error: BaseException = field(default_factory=KeyboardInterrupt)
    read: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice) -> np.ndarray:
        if self.fails_at is not None and which.stop > self.fails_at:
            raise self.error
        self.read += range(*which.indices(len(self)))
        return self.images[which]

    def content(self) -> str:
        return hashlib.sha256(f"{self.shape}".encode() + self.images.tobytes()).hexdigest()


def image_set(images: np.ndarray, source: str = "somewhere", **settings: object) -> ImageSet:
    return ImageSet(source, Watched(images, **settings))


class Process:
    """One of several processes, as accelerate's PartialState tells it: a thread, of which one at a time runs."""

    def __init__(self, process_index: int = 0, barriers: threading.Barrier | None = None) -> None:
        self.process_index, self.device = process_index, CPU
        self.num_processes = 1 if barriers is None else barriers.parties
        self.barriers = barriers

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        if self.barriers is not None:
            TURN.release()
            try:
                self.barriers.wait(timeout=60)
            finally:
                TURN.acquire()


TURN = threading.Lock()


def in_processes(n: int, work: Callable[[Process], object]) -> list:
    """What `work` gives each of n processes."""
    barriers = threading.Barrier(n)
    found: list[object] = [None] * n

    def one(index: int) -> None:
        with TURN:
            try:
                found[index] = work(Process(index, barriers))
            except BaseException as error:
                barriers.abort()
                found[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
