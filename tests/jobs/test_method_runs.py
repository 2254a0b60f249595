"""Every method on the tiny network: trained, broken off, resumed, sampled, evaluated, exported."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch

from bdm_cli import inputs, places, records, runs, student, tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.inputs import Exported
from bdm_cli.jobs import evaluate, export, sample, train
from bdm_cli.methods import METHODS
from bdm_cli.methods.qdiffusion import units
from bdm_cli.recipe import Recipe


class Broken(BaseException):
    """What a crash looks like from inside."""


def break_off(monkeypatch: pytest.MonkeyPatch, spec: Recipe) -> None:
    """Let the next training end at its fifth step, or a calibration that keeps what it has done at its third part."""
    log, write, written = train.Log.__call__, train.Kept.write, []

    def logged(self: train.Log, done: int, *arguments: object) -> None:
        log(self, done, *arguments)
        if done == 5:
            raise Broken

    def kept(self: train.Kept, tensors: dict[str, torch.Tensor]) -> None:
        write(self, tensors)
        written.append(1)
        if len(written) == 3:
            raise Broken

    monkeypatch.setattr(train.Log, "__call__", logged)
    if not spec.train.steps:
        monkeypatch.setattr(train.Kept, "write", kept)


@pytest.mark.parametrize("method", METHODS)
def test_a_rehearsal(method: str, tiny_recipe: Callable[..., Recipe], home: Path):
    """On random weights: there is no teacher. Nothing is kept."""
    spec = tiny_recipe(*students.OWN.get(method, ()), method=method)
    row = train.rehearse(spec, steps=2).iloc[0]
    assert row["Network"] == spec.unet.name
    assert row["Peak memory (GiB)"] > 0
    if spec.train.steps:
        assert (row["Batch"], row["Steps"]) == (spec.train.batch, 2)
        assert row["Step (s)"] > 0
    else:
        assert (row["Batch"], row["Iterations"]) == (32, 2)
        n = len(units(student.build(spec, 0, random_teacher=True).student))
        told = [f"Iteration of all {n} units, {which} (s)" for which in ("rounding", "steps")]
        assert [name for name in row.index if name.startswith("Iteration of")] == told
        assert row["All iterations (h)"] >= 0
    assert not any(home.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_from_training_to_export(
    method: str, tiny_recipe: Callable[..., Recipe], tiny_teacher: Path, home: Path, tmp_path: Path
):
    spec = tiny_recipe("train.checkpoint_every=2", *students.OWN.get(method, ()), method=method)
    run_id = spec.run_id(0)
    shutil.copytree(home, tmp_path / "other")
    with places.home_at(str(tmp_path / "other")):
        train.run(spec)
        wanted, _ = tensorfile.read(runs.weights(run_id))

    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, spec)
        with pytest.raises(Broken):
            train.run(spec)
    assert not runs.weights(run_id).exists()
    train.run(spec, resume=True)
    tensors, _ = tensorfile.read(runs.weights(run_id))
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert not runs.checkpoint(run_id).exists()
    assert not runs.calibration(run_id).exists()

    images = np.load(sample.run(spec, run_id))["arr_0"]
    assert len(images) == 24
    assert len(np.unique(images)) > 2
    evaluate.run(inputs.of_run(spec, run_id))
    scored = {record.metric for record in records.read() if record.run == run_id}
    assert {"fid", "is", "precision"} <= scored

    out, asked = tmp_path / "packed.safetensors", Exported(runs.weights(run_id))
    if method in students.REFUSED or method == "fp":
        with pytest.raises(BdmError, match=r"nothing to pack|has no packed form"):
            export.run(asked, out)
        assert not out.exists()
        return
    export.run(asked, out)
    drawn = np.load(sample.run_packed(out))["arr_0"]
    assert np.array_equal(drawn, images)
