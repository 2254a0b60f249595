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
    assert bdm("evaluate", str(npz), "--recipe", "digits", "-f", "csv")[0] == 0
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
        "methods",
        "doctor",
        "pretrain",
        "train",
        "sample",
        "export",
        "inspect",
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
    "missing images": (["evaluate", "nowhere.npz"], "there are no images called 'nowhere.npz'"),
    "nothing to evaluate": (["evaluate"], "--recipe NAME (with --seed)"),
    "unknown run": (["evaluate", "digits-w1a5"], "there are no images called 'digits-w1a5'. Did you mean 'digits-w1a"),
    "not finished, to evaluate": (["evaluate", "-r", "digits-w1a4"], "unknown finished run 'digits-w1a4-s0'"),
    "no reference": (["evaluate", "digits", "--features", "digits"], "there is no reference"),
    "missing reference": (["evaluate", "digits", "--reference", "nowhere"], "there are no images called 'nowhere'"),
    "missing reference of a recipe": (
        ["evaluate", "digits", "-r", "bedrooms"],
        "evaluate.reference: there is nothing at",
    ),
    "unknown metric": (["evaluate", "digits", "-r", "digits", "--metrics", "fid,fit"], "unknown metric 'fit'"),
    "no metric": (["evaluate", "digits", "-r", "digits", "--metrics", "fid,"], "unknown metric ''"),
    "unknown protocol": (
        ["evaluate", "digits", "-r", "digits", "--protocol", "cleen"],
        "evaluate.protocol: input should be 'adm', 'clean' or 'torch-fidelity'",
    ),
    "unknown features": (
        ["evaluate", "digits", "--features", "vgg"],
        "evaluate.features: input should be 'digits', 'cifar10' or 'inception'",
    ),
    "unknown preparation": (["evaluate", "digits", "--prepare", "crop"], "evaluate.prepare: input should be 'none'"),
    "a protocol of other features": (
        ["evaluate", "digits", "-r", "digits", "--protocol", "clean", "--metrics", "fid"],
        "the protocol 'clean' is defined on Inception's features, not on 'digits'",
    ),
    "metrics of another protocol": (
        ["evaluate", "digits", "-r", "digits", "--protocol", "clean", "--metrics", "fid,recall"],
        "the protocol 'clean' has no recall",
    ),
    "weights of other features": (
        ["evaluate", "digits", "-r", "digits", "--inception-weights", "weights.pth"],
        "--inception-weights says nothing about the features 'digits'",
    ),
    "missing weights": (
        ["evaluate", "digits", "-r", "digits", "--features", "inception", "--inception-weights", "nowhere.pth"],
        "the weights of Inception-v3 are not at nowhere.pth",
    ),
    "a method beside images": (["evaluate", "digits", "-r", "digits-w1a4", "-m", "lsq"], "--method chooses a run"),
    "settings of no recipe": (["evaluate", __file__, "-s", "sample.steps=3"], "says nothing about images of no recipe"),
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
    assert "cannot write the directory" in err


def test_two_processes_on_one_run(bdm, tiny_teacher):
    with runs.claim("tiny-w1a4-s0"):
        script = f"import sys; sys.argv = ['bdm', 'train', '-r', {TINY!r}]; from bdm_cli.cli import entry; entry()"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.returncode == 2
    assert "is being worked on by another process" in other.stderr


def test_evaluate_takes_its_options_for_settings(bdm, home):
    """--protocol, --features, --metrics, --prepare and --reference are short for evaluate.*."""
    raw = np.random.default_rng(0).integers(0, 256, (70, 24, 20), dtype=np.uint8)
    (home / "raw").mkdir()
    for i, image in enumerate(raw):
        Image.fromarray(image).save(home / "raw" / f"{i}.png")
    short = ["--features", "digits", "--protocol", "adm", "--metrics", "fid, kid", "--prepare", "adm-crop"]
    long = [f"evaluate.{key}" for key in ("features=digits", "protocol=adm", "prepare=adm-crop")]
    long.append("evaluate.metrics=['fid', 'kid']")
    given = ["evaluate", "digits", "--reference", str(home / "raw"), "-f", "json"]
    code, out, err = bdm(*given, *short)
    assert code == 0, err
    assert [row["Metric"] for row in json.loads(out)] == ["FID", "KID"]
    assert json.loads(out)[0]["Reference images"] == 70
    assert bdm(*given, *(part for text in long for part in ("-s", text)))[1] == out


@pytest.mark.parametrize("form", ["table", "json", "csv", "md", "latex"])
def test_evaluate_compares(bdm, home, form):
    """What people read is side by side, what programs read has a row for each number."""
    images = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 1), dtype=np.uint8)
    np.savez(home / "noise.npz", images)
    given = [str(home / "noise.npz"), "digits", "--reference", "digits", "--metrics", "precision,recall"]
    code, out, err = bdm("evaluate", *given, "--compare", "--resamples", "10", "-f", form)
    assert code == 0, err
    if form == "json":
        assert [(row["Samples"], row["Metric"]) for row in json.loads(out)] == [
            (samples, metric) for samples in given[:2] for metric in ("Prec.", "Recall")
        ]
        assert all(row["Low"] <= row["Value"] <= row["High"] for row in json.loads(out))
    elif form == "csv":
        assert len(out.splitlines()) == 5
        assert out.startswith("Samples,Metric,Value,Low,High,")
    else:
        assert "100 [100, 100]" in out
        assert "Prec." in out
        assert "Low" not in out


def test_the_options_of_evaluate_have_bounds(bdm):
    for option in (["--batch", "0"], ["--resamples", "9"], ["--seed", "-1"], ["--format", "xml"]):
        code, out, err = bdm("evaluate", "digits", *option)
        assert (code, out) == (2, ""), option
        assert option[0] in err


def test_a_run_is_no_option_of_evaluate(bdm):
    for option in (["--run", "digits-w1a4-s0"], ["--images", "a.npz"]):
        code, out, err = bdm("evaluate", *option)
        assert (code, out) == (2, "")
        assert f"No such option: {option[0]}" in err


def test_foreign_npz(bdm, tmp_path):
    path = tmp_path / "foreign.npz"
    np.savez(path, weights=np.zeros(3))
    code, _, err = bdm("evaluate", str(path), "--recipe", "digits")
    assert code == 2
    assert "arr_0" in err


def test_empty_folder(bdm, tmp_path):
    (tmp_path / "images").mkdir()
    code, _, err = bdm("evaluate", str(tmp_path / "images"), "--recipe", "digits")
    assert code == 2
    assert f"{tmp_path / 'images'} holds no images" in err


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


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["evaluate", "--help"], ["evaluate", "nowhere"], ["evaluate"], ["export", "no-s0", "-o", "x"]],
)
def test_help_and_plain_mistakes_are_quick_because_they_load_no_torch(arguments):
    script = f"import sys; sys.argv = {['bdm', *arguments]}\nfrom bdm_cli.cli import entry\n"
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
