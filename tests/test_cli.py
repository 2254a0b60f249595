"""The real entry point on the tiny recipe: the whole path, the forms of output, every error text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm_cli import records, runs

TINY = str(Path(__file__).parent / "recipes" / "tiny-w1a4.toml")


def test_the_whole_path(bdm, home, tiny_teacher):
    assert bdm("train", "--recipe", TINY)[0] == 0
    code, out, _ = bdm("sample", "--recipe", TINY)
    assert code == 0
    npz = Path(out.strip())
    images = np.load(npz)["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (24, 16, 16, 1)
    assert Image.open(npz.parent / "grid.png").width > 8 * 16
    code, out, _ = bdm("evaluate", "--recipe", TINY, "--format", "json")
    assert code == 0
    measured = {row["Metric"]: row["Value"] for row in json.loads(out)}
    assert set(measured) == {"FID", "sFID", "IS", "Prec.", "Recall"}
    found = {r.metric: r for r in records.read() if r.run == "tiny-w1a4-s0"}
    assert found["fid"].value == pytest.approx(measured["FID"])
    assert (found["fid"].n_images, found["fid"].steps, found["fid"].features) == (24, 6, "digits")
    assert bdm("evaluate", "--images", str(npz), "--recipe", "digits", "-f", "csv")[0] == 0
    code, out, _ = bdm("report")
    assert code == 0
    page = (home / "results" / "report.html").read_text()
    assert "tiny-w1a4" in page


def test_pretrain_makes_a_teacher_that_train_takes(bdm, home, tiny_recipe):
    tiny = TINY.replace("tiny-w1a4", "tiny")
    code, out, _ = bdm("pretrain", "--recipe", tiny)
    assert code == 0
    assert (
        bdm("train", "--recipe", TINY, "--method", "lsq", "--set", f"model.pretrained={Path(out.strip()).resolve()}")[0]
        == 0
    )
    assert list(home.glob("runs/tiny-w1a4+method.name=lsq+model.pretrained=weights-*-s0/weights.safetensors"))


def test_ablate_fills_only_what_is_missing(bdm, tiny_teacher):
    first = bdm("ablate", "lrm-k", "--values", "2,4", "--recipe", TINY, "-j", "1", "-f", "json")
    assert first[0] == 0
    assert "2 cells, 0 done, 2 to run" in first[2]
    again = bdm("ablate", "lrm-k", "--values", "2,4,8", "--recipe", TINY, "-j", "1", "-f", "json")
    assert "3 cells, 2 done, 1 to run" in again[2]
    assert json.loads(again[1])[:2] == json.loads(first[1])


def test_ablate_in_processes(bdm, tiny_teacher):
    code, out, err = bdm("ablate", "tau", "--values", "0,1e-2", "--recipe", TINY, "-j", "2", "-f", "csv")
    assert code == 0, err
    assert len(out.splitlines()) == 3


def test_rehearsal_keeps_nothing(bdm, home):
    code, out, _ = bdm("train", "--recipe", TINY, "--rehearse", "--rehearse-steps", "2", "-f", "json")
    assert code == 0
    assert json.loads(out)[0]["Steps"] == 2
    assert list(home.iterdir()) == []


def test_demo_is_one_command(bdm):
    code, out, _ = bdm("demo", "--help")
    assert code == 0
    assert "bdm demo" in out


@pytest.mark.parametrize("form", ["table", "json", "csv", "md", "latex"])
def test_forms(bdm, form):
    code, out, err = bdm("efficiency", "--bits", "1/4", "--model", "ddim-digits", "--format", form)
    assert code == 0
    assert "ddim-digits" in out
    assert "ddim-digits" not in err
    if form == "json":
        json.loads(out)


def test_listing(bdm):
    code, out, _ = bdm("recipes", "--format", "json")
    assert code == 0
    assert {"digits-w1a4", "churches-w1a4"} <= {row["Recipe"] for row in json.loads(out)}
    code, out, _ = bdm("recipes", "digits-w1a4", "--format", "json")
    assert {"key": "method.lrm_k", "value": "4.0"} in json.loads(out)
    assert bdm("doctor", "--format", "md")[0] == 0


def test_every_command_has_help_with_an_example(bdm):
    for command in (
        "demo",
        "recipes",
        "doctor",
        "pretrain",
        "train",
        "sample",
        "evaluate",
        "ablate",
        "efficiency",
        "report",
        "features",
    ):
        code, out, _ = bdm(command, "--help")
        assert code == 0
        assert f"bdm {command}" in out.split("Usage")[1].split("Options")[0].replace("\n", " "), command


ERRORS = {
    "unknown recipe": (["train", "-r", "digits-w1a5"], "unknown recipe 'digits-w1a5'. Did you mean 'digits-w1a"),
    "unknown key": (["train", "-r", "digits-w1a4", "-s", "train.step=5"], "train.step: unknown key"),
    "unknown method": (["train", "-r", "digits-w1a4", "-m", "binarydn"], "unknown method 'binarydn'"),
    "unknown method key": (["train", "-r", "digits-w1a4", "-s", "method.k=2"], "method.k: unknown key"),
    "wrong type": (["train", "-r", "digits-w1a4", "-s", "train.lr=fast"], "train.lr: input should be a valid number"),
    "impossible value": (["train", "-r", "digits-w1a4", "-s", "method.activation_bits=9"], "method.activation_bits"),
    "not an assignment": (["train", "-r", "digits-w1a4", "-s", "train.lr"], "cannot read --set"),
    "late transition": (
        ["train", "-r", "digits-w1a4", "-s", "method.transition=900000"],
        "after the last training step",
    ),
    "K too large": (["train", "-r", "digits-w1a4", "-s", "method.lrm_k=500"], "leaves no component"),
    "impossible network": (["train", "-r", "digits-w1a4", "-s", "unet.arguments.norm_num_groups=7"], "refuses them"),
    "no teacher": (
        ["train", "-r", "digits-w1a4", "-s", "model.pretrained=nowhere"],
        "full-precision teacher: put it at",
    ),
    "no data": (["train", "-r", "churches-w1a4"], "lacks 3 inputs"),
    "not finished": (["sample", "-r", "digits-w1a4"], "unknown finished run 'digits-w1a4-s0'"),
    "no run named": (["sample"], "give either --run ID or --recipe NAME"),
    "missing images": (["evaluate", "--images", "nowhere.npz"], "nowhere.npz"),
    "unknown ablation": (["ablate", "lrm"], "unknown ablation 'lrm'"),
    "bad ablation value": (["ablate", "lrm-k", "--values", "2,many"], "'many' is not a value of lrm-k"),
    "bad bits": (["efficiency", "--bits", "1-4"], "cannot read --bits '1-4'"),
    "unknown table": (["report", "--table", "77"], "unknown table '77'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_message_and_exit_code_2(bdm, home, name):
    arguments, text = ERRORS[name]
    code, out, err = bdm(*arguments)
    assert code == 2
    assert text in err
    assert err.startswith("bdm: ") or name == "K too large"  # that one shows once calibration has begun
    assert "Traceback" not in err
    assert out == ""
    assert not list(home.rglob("weights.safetensors"))
    assert not list(home.rglob("*.jsonl"))


def test_truncated_teacher(bdm, tiny_teacher):
    tiny_teacher.write_bytes(tiny_teacher.read_bytes()[:1000])
    code, _, err = bdm("train", "--recipe", TINY)
    assert code == 2
    assert "is not a whole safetensors file" in err


def test_teacher_of_another_network(bdm, tiny_teacher):
    code, _, err = bdm("train", "--recipe", TINY, "--set", "unet.arguments.block_out_channels=[8,16,24]")
    assert code == 2
    assert "does not fit the network of this recipe" in err


def test_truncated_checkpoint(bdm, tiny_teacher):
    assert bdm("train", "--recipe", TINY)[0] == 0
    weights = runs.weights("tiny-w1a4-s0")
    runs.checkpoint("tiny-w1a4-s0").write_bytes(weights.read_bytes()[:500])
    weights.unlink()
    code, _, err = bdm("train", "--recipe", TINY, "--resume")
    assert code == 2
    assert "is not a whole safetensors file" in err


def test_existing_run(bdm, tiny_teacher):
    assert bdm("train", "--recipe", TINY)[0] == 0
    code, _, err = bdm("train", "--recipe", TINY)
    assert code == 2
    assert "run 'tiny-w1a4-s0' exists (finished)" in err
    code, _, err = bdm("train", "--recipe", TINY, "--resume")
    assert code == 0
    assert "finished already" in err


def test_resume_with_another_recipe(bdm, tiny_teacher, tmp_path):
    changed = tmp_path / "tiny-w1a4.toml"
    changed.write_text(Path(TINY).read_text())
    assert bdm("train", "--recipe", str(changed))[0] == 0
    changed.write_text(Path(TINY).read_text().replace("batch = 8\nlog_every", "batch = 4\nlog_every"))
    code, _, err = bdm("train", "--recipe", str(changed), "--resume")
    assert code == 2
    assert "train.batch: 8 / 4" in err


def test_unwritable_home(bdm, tiny_teacher, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("BDM_HOME", str(blocked))
    code, _, err = bdm("train", "--recipe", TINY, "--set", f"model.pretrained={tiny_teacher}")
    assert code == 2
    assert "cannot write the run directory" in err


def test_two_processes_on_one_run(bdm, tiny_teacher):
    with runs.claim("tiny-w1a4-s0"):
        script = f"import sys; sys.argv = ['bdm', 'train', '-r', {TINY!r}]; from bdm_cli.cli import entry; entry()"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.returncode == 2
    assert "is being worked on by another process" in other.stderr


def test_foreign_npz(bdm, tmp_path):
    path = tmp_path / "foreign.npz"
    np.savez(path, weights=np.zeros(3))
    code, _, err = bdm("evaluate", "--images", str(path), "--recipe", "digits")
    assert code == 2
    assert "arr_0" in err


def test_empty_folder(bdm, tmp_path):
    (tmp_path / "images").mkdir()
    code, _, err = bdm("evaluate", "--images", str(tmp_path / "images"), "--recipe", "digits")
    assert code == 2
    assert "images" in err


def test_nan_stops_with_the_checkpoint_kept(bdm, tiny_teacher):
    code, _, err = bdm(
        "train",
        "--recipe",
        TINY,
        "--set",
        "train.lr=1e30",
        "--set",
        "train.grad_clip=0.0",
        "--set",
        "train.checkpoint_every=1",
    )
    assert code == 2
    assert "the last checkpoint is kept" in err
    assert runs.checkpoint("tiny-w1a4+train.grad_clip=0+train.lr=1e+30-s0").exists()


def test_help_is_quick_because_it_loads_no_torch():
    script = "import sys; sys.argv = ['bdm', '--help']\nfrom bdm_cli.cli import entry\n"
    script += "try:\n  entry()\nexcept SystemExit:\n  pass\n"
    script += "print([m for m in ('torch', 'diffusers', 'accelerate', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_sweep_that_was_left_before_its_scores_is_finished(tiny_teacher, tiny_recipe):
    """The demo counts a cell as done only if its records are of the images that lie here."""
    from bdm_cli.jobs import ablate

    spec = tiny_recipe()
    ablate.complete(spec, 0)
    assert ablate._complete(spec, 0, records.newest(records.read()), anew=True)
    runs.samples_npz(spec, spec.run_id(0)).unlink()
    assert not ablate._complete(spec, 0, records.newest(records.read()), anew=True)
    assert ablate._complete(spec, 0, records.newest(records.read()), anew=False)
