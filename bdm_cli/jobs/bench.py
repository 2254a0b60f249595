"""`bdm bench`: how fast and how large, beside others' code that does the same, in one run on one machine.

Every measurement is a process of its own; contenders take turns, and the median over the rounds counts.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch_fidelity import calculate_metrics

from bdm_cli import measure, output, records, runs, student
from bdm_cli.images import sets
from bdm_cli.measure import Measured
from bdm_cli.metrics import inception_score, precision_recall
from bdm_cli.metrics.extraction import summary_of
from bdm_cli.metrics.frechet import FrechetTo
from bdm_cli.metrics.inception import INCEPTION, InceptionFeatures, write_random
from bdm_cli.metrics.summary import Summary
from bdm_cli.places import home_at

DIMENSIONS = 2048
CDIST_COPIES = 3
"""Matrices of all distances that torch.cdist with kthvalue holds at once."""

Work = Callable[[Path, Path], None]
"""What is measured: given the folder with its input, and Inception's weights."""


class Task(NamedTuple):
    """The same work by bdm and by another (None: it does not fit), on so many images."""

    what: str
    images: int
    ours: Work
    other_name: str
    other: Work | None


def evaluate(
    images: int, size: int, samples: int, reference: int, rounds: int, weights: Path | None = None
) -> pd.DataFrame:
    """The evaluator beside torch-fidelity, on the same images and weights, and beside a plain torch.cdist.

    images: how many of size x size go through Inception, in each of two sets. samples, reference: how many rows of 2048
    features precision and recall compare. weights: Inception's; None = those at hand, else random ones (as fast).
    Each row also goes to results/bench/evaluate.jsonl, with its provenance.
    Raises: BdmError if a contender fails.
    """
    needed = CDIST_COPIES * 4 * max(samples, reference) ** 2
    fits = needed < 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not fits:
        output.say(f"torch.cdist is left out: it would take about {needed / 2**30:.0f} GiB")
    tasks = [
        Task(f"Inception pass and IS, {size}x{size}", images, _pass, "torch-fidelity", _their_pass),
        Task(f"FID, IS (bdm: also sFID), {size}x{size}", 2 * images, _report, "torch-fidelity", _their_report),
        Task(
            f"precision and recall, {samples:,} x {reference:,}",
            samples,
            _coverage,
            "torch.cdist",
            _their_coverage if fits else None,
        ),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = weights or INCEPTION.find()
        weights = given or write_random(folder / "random.pth")
        for number, name in enumerate(("a", "b")):
            _draw(folder / name, images, size, number)
        for number, (name, n) in enumerate((("samples", samples), ("reference", reference))):
            _draw_features(folder / f"{name}.npy", n, number)
        rows = []
        for task in tasks:
            rows.append(_measured(task, rounds, folder, weights) | {"weights": "Inception-v3" if given else "random"})
            line = rows[-1] | records.provenance() | {"time": records.now()}
            runs.append_line(runs.bench_dir() / "evaluate.jsonl", line)
    columns = {
        "Task": "task",
        "Images": "images",
        "bdm, s": "wall_s",
        "Other, s": "other_wall_s",
        "Times as fast": "ratio",
        "bdm, images/s": "images_per_s",
        "bdm, peak MiB": "peak_mib",
        "Other, peak MiB": "other_peak_mib",
        "Other": "other",
    }
    return pd.DataFrame([[row[key] for key in columns.values()] for row in rows], columns=list(columns), dtype=object)


def _measured(task: Task, rounds: int, folder: Path, weights: Path) -> dict[str, object]:
    contenders = {"": task.ours} | ({"other_": task.other} if task.other else {})
    found: dict[str, list[Measured]] = {name: [] for name in contenders}
    with output.progress(task.what, rounds * len(contenders), "measurements") as advance:
        for _ in range(rounds):
            for name, work in contenders.items():
                found[name].append(_alone(work, folder, weights))
                advance(1)
    row: dict[str, object] = {"task": task.what, "images": task.images, "other": task.other_name, "rounds": rounds}
    row |= {"threads": torch.get_num_threads(), "other_wall_s": None, "other_peak_mib": None, "ratio": None}
    for name, measured in found.items():
        row[f"{name}wall_s"] = round(statistics.median(each.wall_s for each in measured), 3)
        row[f"{name}peak_mib"] = round(statistics.median(each.peak_mib for each in measured))
    row["images_per_s"] = round(statistics.median(task.images / each.wall_s for each in found[""]), 1)
    if task.other:
        pairs = zip(found["other_"], found[""], strict=True)
        row["ratio"] = round(statistics.median(theirs.wall_s / ours.wall_s for theirs, ours in pairs), 2)
    return row


def _alone(work: Work, folder: Path, weights: Path) -> Measured:
    """The work in a process of its own with an empty cache."""
    with tempfile.TemporaryDirectory() as home:
        return measure.alone(_work, work, folder, weights, home)


def _work(work: Work, folder: Path, weights: Path, home: str) -> None:
    os.environ["BDM_QUIET"] = "1"
    torch.set_float32_matmul_precision("highest")  # as bdm evaluate has it, for all alike
    with home_at(home):
        work(folder, weights)


def _summary(name: str, folder: Path, weights: Path) -> Summary:
    return summary_of(InceptionFeatures(weights), sets.load(folder / name), student.processes())


def _pass(folder: Path, weights: Path) -> None:
    logits = _summary("a", folder, weights).rows["logits"]
    inception_score.score(logits, inception_score.in_file_order(len(logits)))


def _their_pass(folder: Path, weights: Path) -> None:
    calculate_metrics(input1=str(folder / "a"), isc=True, **_settings(weights))


def _report(folder: Path, weights: Path) -> None:
    a, b = (_summary(name, folder, weights) for name in ("a", "b"))
    for part in ("pool", "spatial"):
        FrechetTo(b.statistics[part])(a.statistics[part])
    inception_score.score(a.rows["logits"], inception_score.in_file_order(a.n))


def _their_report(folder: Path, weights: Path) -> None:
    calculate_metrics(input1=str(folder / "a"), input2=str(folder / "b"), isc=True, fid=True, **_settings(weights))


def _settings(weights: Path) -> dict[str, object]:
    return {
        "feature_extractor": "inception-v3-compat",
        "feature_extractor_weights_path": str(weights),
        "cuda": torch.cuda.is_available(),
        "cache": False,
        "verbose": False,
    }


def _coverage(folder: Path, weights: Path) -> None:
    sides = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("samples", "reference"))
    precision_recall.exact(*sides, student.processes().device)


def _their_coverage(folder: Path, weights: Path) -> None:
    """The definition in four lines: every distance at once."""
    device = student.processes().device
    samples, reference = (torch.from_numpy(np.load(folder / f"{n}.npy")).to(device) for n in ("samples", "reference"))
    of_samples, of_reference = (torch.cdist(x, x).kthvalue(4).values for x in (samples, reference))
    across = torch.cdist(samples, reference)
    (across <= of_reference).any(1).double().mean(), (across <= of_samples[:, None]).any(0).double().mean()


def _draw(folder: Path, n: int, size: int, seed: int) -> None:
    """n PNG images: smooth colours with some noise, which compress like photographs."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(n):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:06d}.png")


def _draw_features(path: Path, n: int, seed: int) -> None:
    """Rows like Inception's: many dimensions that move together, none below 0."""
    random, mixing = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(64, DIMENSIONS)) / 8
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, DIMENSIONS))
    for first in range(0, n, 1024):
        some = len(rows[first : first + 1024])
        mixed = random.normal(size=(some, 64)) @ mixing + 0.3 * random.normal(size=(some, DIMENSIONS))
        rows[first : first + some] = mixed.clip(0)
