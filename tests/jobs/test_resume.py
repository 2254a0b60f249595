"""kill -9 at any moment, resume, and end with the weights of an uninterrupted run, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bdm_cli import runs, tensorfile

TINY = str(Path(__file__).parents[1] / "recipes" / "tiny-w1a4.toml")
KILLS = int(os.environ.get("BDM_TEST_KILLS", "2"))
STEPS = 24
OPTIONS = ["--set", f"train.steps={STEPS}", "--set", "train.checkpoint_every=2"]
RUN = f"tiny-w1a4+train.steps={STEPS}-s0"


def train(*options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bdm_cli", "train", "--recipe", TINY, *OPTIONS, *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def uninterrupted(home, tiny_teacher, monkeypatch, tmp_path) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing stopped, made in another home."""
    other = tmp_path / "other"
    shutil.copytree(home, other)
    monkeypatch.setenv("BDM_HOME", str(other))
    process = train()
    assert process.wait() == 0, process.stderr.read()
    tensors, _ = tensorfile.read(runs.weights(RUN))
    monkeypatch.setenv("BDM_HOME", str(home))
    return tensors


def assert_same(wanted: dict[str, torch.Tensor]) -> None:
    tensors, _ = tensorfile.read(runs.weights(RUN))
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    steps = [line["step"] for line in runs.read_lines(runs.metrics_log(RUN))]
    assert steps == list(range(2, STEPS + 1, 2))


def wait_for_steps(process: subprocess.Popen, steps: int) -> None:
    """Until the run has logged that many steps, or ended."""
    while process.poll() is None:
        lines = runs.read_lines(runs.metrics_log(RUN))
        if lines and lines[-1]["step"] >= steps:
            return
        time.sleep(0.002)


def test_killed_at_random_moments(uninterrupted):
    chance = random.Random(0)
    for kill in range(KILLS):
        process = train(*(["--resume"] if kill else []))
        wait_for_steps(process, min(2 + kill * (STEPS - 4) // KILLS, STEPS - 2))
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = train("--resume")
    assert process.wait() == 0, process.stderr.read()
    assert_same(uninterrupted)


def test_asked_to_stop(uninterrupted):
    process = train("--set", "train.log_every=2")
    wait_for_steps(process, 6)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    assert code in (0, 128 + signal.SIGTERM)  # 0 if it was faster than the signal
    if code:
        assert "go on with --resume" in process.stderr.read()
        assert runs.checkpoint(RUN).exists()
        process = train("--resume")
        assert process.wait() == 0, process.stderr.read()
    assert_same(uninterrupted)
