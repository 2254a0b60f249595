"""Latent models through the real commands: train, sample with each sampler, evaluate; stopped, killed, by two."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECIPES, Bdm, random_teacher
from PIL import Image

from bdm_cli import places, recipe, records, runs, student, tensorfile
from bdm_cli.diffusion import first_stage, sampling
from bdm_cli.diffusion.data import to_float
from bdm_cli.jobs import train
from bdm_cli.quant.swap import quantized_layers
from bdm_cli.recipe import Recipe

MODELS = ["tiny-ldm", "tiny-cond"]
COND = str(RECIPES / "tiny-cond.toml")
STEPS = 12
LONGER = ["-s", f"train.steps={STEPS}", "-s", "unet.arguments.dropout=0.1"]
LONGER += ["-s", "train.checkpoint_every=2", "-s", "train.log_every=1"]
LONG_RUN = f"tiny-cond+train.steps={STEPS}+unet.arguments.dropout=0.1-s0"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe]) -> str:
    """The name of a tiny recipe whose teacher is there."""
    random_teacher(tiny_recipe(name=request.param))
    return request.param


def test_the_whole_path_with_every_sampler(model: str, bdm: Bdm):
    path = str(RECIPES / f"{model}.toml")
    code, out, err = bdm("train", "-r", path, "-s", "train.grid_every=6")
    assert code == 0, err
    run = f"{model}-s0"
    assert Path(out.strip()) == runs.weights(run)
    assert Image.open(runs.run_dir(run) / "grids" / "step-0000006.png").size == (8 * 50 + 2, 2 * 50 + 2)
    pictures = {}
    for sampler in ("ddim", "plms", "dpm-solver"):
        chosen = ["-s", f"sample.sampler={sampler}", "-s", "sample.eta=0", "-s", "sample.steps=4"]
        code, out, err = bdm("sample", "-r", path, *chosen)
        assert code == 0, err
        with np.load(Path(out.strip())) as arrays:
            pictures[sampler] = arrays["arr_0"]
            assert ("arr_1" in arrays) == (model == "tiny-cond")
        assert pictures[sampler].shape == (24, 16, 16, 1)
        code, out, err = bdm("evaluate", "-r", path, *chosen, "-f", "json")
        assert code == 0, err
        measured = {row["Metric"]: row["Value"] for row in json.loads(out)}
        assert set(measured) == {"FID", "sFID", "IS", "Prec.", "Recall"}
        assert all(np.isfinite(value) for value in measured.values())
        found = [r for r in records.read() if r.metric == "fid"][-1]
        assert (found.run, found.value, found.sampling_steps) == (run, pytest.approx(measured["FID"]), 4)
    assert all((pictures["ddim"] != pictures[other]).any() for other in ("plms", "dpm-solver"))


def test_records_tell_the_samplers_apart(tiny_ldm_teacher: Path, bdm: Bdm):
    """Also of a recipe that is named by its path, with --recipe and with --run."""
    path = str(RECIPES / "tiny-ldm.toml")
    assert bdm("train", "-r", path)[0] == 0
    for which, scored in ((["-r", path], ["-r", path]), (["--run", "tiny-ldm-s0"], ["tiny-ldm-s0"])):
        for settings in ([], ["-s", "sample.sampler=plms", "-s", "sample.eta=0"]):
            assert bdm("sample", *which, *settings)[0] == 0
            assert bdm("evaluate", *scored, *settings)[0] == 0
        ids = {r.recipe for r in records.read() if r.metric == "fid"}
        assert ids == {"tiny-ldm", "tiny-ldm+sample.eta=0+sample.sampler=plms"}, which


def test_samples_are_the_decoded_latents_of_the_student(model: str, bdm: Bdm, tiny_recipe: Callable[..., Recipe]):
    """The first images, made by hand: each image's own noise, its class, guidance, the first stage's decoder."""
    assert bdm("train", "-r", str(RECIPES / f"{model}.toml"))[0] == 0
    spec = tiny_recipe("sample.eta=0", name=model)
    code, out, _ = bdm("sample", "-r", str(RECIPES / f"{model}.toml"), "-s", "sample.eta=0")
    assert code == 0
    with np.load(Path(out.strip())) as arrays:
        images, labels = arrays["arr_0"][:8], arrays["arr_1"][:8] if model == "tiny-cond" else None
    unet, stage = student.load_run(f"{model}-s0").student, first_stage.load(spec.first_stage)
    channels = spec.first_stage.channels
    noise = [np.random.default_rng([0, i]).standard_normal((channels, 8, 8), dtype=np.float32) for i in range(8)]

    def estimate(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if labels is None:
            return unet(x, t).sample
        told, untold = (unet(x, t, torch.as_tensor(c)).sample for c in (labels, np.full(8, 10)))
        return untold + spec.sample.guidance * (told - untold)

    with torch.inference_mode():
        x = sampling.sample(estimate, spec.scheduler, spec.sample, torch.from_numpy(np.stack(noise)), [])
        pixels = (stage.decode(x) + 1) * 127.5
    ours = pixels.clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - images.astype(int)).max() <= 1
    assert float((to_float(images) - to_float(images[::-1])).abs().mean()) > 0.01


def test_what_is_binarized(model: str, bdm: Bdm):
    """Every layer of the U-Net but for those next to input and output has two weights per channel at the end."""
    assert bdm("train", "-r", str(RECIPES / f"{model}.toml"))[0] == 0
    unet = student.load_run(f"{model}-s0").student
    layers = dict(quantized_layers(unet))
    plain = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(plain) == len({id(layer) for layer in layers.values()})
    edges = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    for name, layer in layers.items():
        levels = {len(row.unique()) for row in layer.weight_quantizer(layer.weight)}
        assert max(levels) <= 256 if name in edges else levels == {2}, name
    if model == "tiny-cond":
        assert sum("attn2" in name for name in layers) == 4 * (
            2 + 1 + 4
        )  # q, k, v, out of each cross-attention: down, mid, up
        assert type(unet.class_embedder) is torch.nn.Embedding


def test_operands_of_cross_attention_are_quantized_too(tiny_cond_teacher: Path, bdm: Bdm):
    code, _, err = bdm("train", "-r", COND, "-s", "method.attention_matmul=true", "-s", "train.steps=2")
    assert code == 0, err


def test_a_rehearsal_keeps_nothing(model: str, home: Path, bdm: Bdm):
    """And needs neither teacher nor first stage nor images."""
    for path in home.iterdir():
        path.unlink()
    given = ["-s", "first_stage.path=nowhere", "--rehearse", "--rehearse-steps", "2", "-f", "json"]
    code, out, err = bdm("train", "-r", str(RECIPES / f"{model}.toml"), *given)
    assert code == 0, err
    assert json.loads(out)[0]["Network"] == model
    assert list(home.iterdir()) == []


def test_a_teacher_of_ones_own(model: str, bdm: Bdm):
    path = str(RECIPES / f"{model}.toml")
    code, out, err = bdm("pretrain", "-r", path)
    assert code == 0, err
    code, _, err = bdm("train", "-r", path, "-s", f"model.pretrained={Path(out.strip()).resolve()}")
    assert code == 0, err


def test_inputs_that_are_missing_are_told_at_once(bdm: Bdm, home: Path):
    code, _, err = bdm("train", "-r", COND, "-s", "first_stage.path=nowhere")
    assert code == 2
    assert "lacks 2 inputs (nothing was started)" in err
    assert f"full-precision teacher: put it at {home / 'tiny-cond-teacher.safetensors'}" in err
    assert f"first stage: put it at {home / 'nowhere'} (or --set first_stage.path=PATH)" in err
    assert not list(home.iterdir())


def test_a_refused_training_was_not_started(tiny_cond_teacher: Path, home: Path, bdm: Bdm):
    """After mending what the error named, the same command must do, without --resume."""
    (home / "images").mkdir()
    given = ["-r", COND, "-s", "data.dataset=folder", "-s", "data.path=images", "-s", "train.batch=2"]
    assert bdm("train", *given)[0] == 2
    for i in range(4):
        (home / "images" / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16), 50 * i, np.uint8)).save(home / "images" / "ab"[i % 2] / f"{i}.png")
    code, _, err = bdm("train", *given)
    assert code == 0, err


# stopped and killed


def finished() -> dict[str, torch.Tensor]:
    return tensorfile.read(runs.weights(LONG_RUN))[0]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing stopped, made in another home."""
    with places.home_at(str(tmp_path_factory.mktemp("elsewhere"))):
        random_teacher(recipe.load(COND))
        train.run(recipe.load(COND, LONGER[1::2]))
        return finished()


@pytest.fixture
def uninterrupted(elsewhere: dict[str, torch.Tensor], tiny_cond_teacher: Path) -> dict[str, torch.Tensor]:
    """The same, with the same teacher in this test's home."""
    return elsewhere


def logged() -> int:
    lines = runs.read_lines(runs.metrics_log(LONG_RUN))
    return lines[-1]["step"] if lines else 0


def assert_same(wanted: dict[str, torch.Tensor]) -> None:
    found = finished()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [line["step"] for line in runs.read_lines(runs.metrics_log(LONG_RUN))] == list(range(1, STEPS + 1))


def test_stopped_and_resumed(uninterrupted: dict[str, torch.Tensor], bdm: Bdm):
    """Once before the second basis is dropped, at half the steps, once after."""
    for steps, resume in ((2, []), (8, ["--resume"])):

        def stop(steps: int = steps) -> None:
            while logged() < steps:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        code, _, err = bdm("train", "-r", COND, *LONGER, *resume)
        thread.join()
        assert code == 128 + signal.SIGTERM
        assert "go on with --resume" in err
        assert steps <= logged() < STEPS
    code, _, err = bdm("train", "-r", COND, *LONGER, "--resume")
    assert code == 0, err
    assert_same(uninterrupted)


def test_killed_and_resumed(uninterrupted: dict[str, torch.Tensor], bdm: Bdm):
    process = subprocess.Popen(
        [sys.executable, "-m", "bdm_cli", "train", "-r", COND, *LONGER],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while logged() < 5 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert logged() >= 5, process.stderr.read()
    code, _, err = bdm("train", "-r", COND, *LONGER, "--resume")
    assert code == 0, err
    assert_same(uninterrupted)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for two processes on CPU")
def test_two_processes_train_one_student(tiny_cond_teacher: Path, bdm: Bdm):
    """Each takes half of every batch; the first one claims, writes and reports."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "bdm_cli", "train", "-r", COND, "-s", "train.batch=4", "-s", "train.log_every=1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run = "tiny-cond+train.batch=4-s0"
    assert done.stderr.count("6 steps, weights in") == 1
    assert [line["step"] for line in runs.read_lines(runs.metrics_log(run))] == list(range(1, 7))
    assert student.load_run(run).step == 6
