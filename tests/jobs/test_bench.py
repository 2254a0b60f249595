"""`bdm bench`: contenders run alone and take turns, memory is the whole process's, a failure is told."""

import time
from pathlib import Path

import numpy as np
import pytest

from bdm_cli import measure
from bdm_cli.errors import BdmError
from bdm_cli.jobs import bench
from bdm_cli.jobs.bench import Task


def nothing(folder: Path, weights: Path) -> None:
    time.sleep(20 * measure.LOOK_S)


def large(folder: Path, weights: Path) -> None:
    held = np.ones(60 * 2**20)  # 480 MiB
    time.sleep(20 * measure.LOOK_S)
    assert held[-1] == 1


def marks(folder: Path, weights: Path) -> None:
    with open(folder / "order", "a") as file:
        file.write("a")


def marks_too(folder: Path, weights: Path) -> None:
    with open(folder / "order", "a") as file:
        file.write("b")


def fails(folder: Path, weights: Path) -> None:
    raise RuntimeError("no such thing")


def test_the_peak_is_what_the_work_holds(tmp_path):
    few, many = (bench._alone(work, tmp_path, tmp_path) for work in (nothing, large))
    assert 300 < many.peak_mib - few.peak_mib < 700
    assert few.wall_s >= 20 * measure.LOOK_S


def test_contenders_take_turns(tmp_path):
    row = bench._measured(Task("marks", 10, marks, "other", marks_too), 2, tmp_path, tmp_path)
    assert (tmp_path / "order").read_text() == "abab"
    assert row["rounds"] == 2
    assert row["ratio"] > 0
    assert row["other"] == "other"


def test_a_contender_may_be_missing(tmp_path):
    row = bench._measured(Task("marks", 10, marks, "other", None), 1, tmp_path, tmp_path)
    assert row["other_wall_s"] is None
    assert row["ratio"] is None
    assert (tmp_path / "order").read_text() == "a"


def test_a_failure_is_told(tmp_path):
    with pytest.raises(BdmError, match="ended early"):
        bench._alone(fails, tmp_path, tmp_path)


def test_precision_and_recall_run_in_both_forms(tmp_path):
    for number, name in enumerate(("samples", "reference")):
        bench._draw_features(tmp_path / f"{name}.npy", 40, number)
    bench._coverage(tmp_path, tmp_path)
    bench._their_coverage(tmp_path, tmp_path)


def test_images_are_drawn_alike_for_a_seed(tmp_path):
    for name in ("a", "b"):
        bench._draw(tmp_path / name, 3, 16, 5)
    files = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("a", "b")]
    assert files[0] == files[1]
    assert len(set(files[0])) == 3
