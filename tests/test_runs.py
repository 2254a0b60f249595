"""Files that appear only whole, lines that survive a kill, and the claim on a run directory."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import bdm_cli
from bdm_cli import places, recipe, runs
from bdm_cli.errors import BdmError


@pytest.fixture
def blocked(home: Path) -> Path:
    """A directory that cannot be made, for root either: its parent is a file."""
    (home / "file").write_text("in the way")
    return home / "file" / "below"


# paths


def test_paths_lie_below_the_home_directory(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert runs.weights("digits-w1a4-s0") == home / "runs" / "digits-w1a4-s0" / "weights.safetensors"
    assert runs.records_dir() == home / "results" / "records"
    assert runs.tables_dir() == home / "results" / "tables"
    monkeypatch.delenv("BDM_HOME")
    assert runs.runs_dir() == Path("runs")
    monkeypatch.setenv("BDM_HOME", "")
    assert runs.runs_dir() == Path("runs")


def test_another_home_for_a_while(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with places.home_at(str(tmp_path / "other")):
        assert places.home() == tmp_path / "other"
    assert places.home() == home
    with pytest.raises(KeyError), places.home_at(str(tmp_path / "other")):
        raise KeyError
    assert places.home() == home
    monkeypatch.delenv("BDM_HOME")
    with places.home_at(str(tmp_path)):
        assert places.home() == tmp_path
    assert "BDM_HOME" not in os.environ


@pytest.mark.parametrize(("run_id", "seed"), [("digits-w1a4-s0", 0), ("a-s1-s12", 12), ("x+method.tau=0.009-s3", 3)])
def test_the_seed_in_a_run_id(run_id: str, seed: int):
    assert runs.seed(run_id) == seed


def test_samples_of_other_settings_lie_elsewhere():
    settings = ["steps=10", "eta=0", "eta=0.5", "to_bytes=truncate", "n_images=10"]
    specs = [recipe.load("digits-w1a4"), *(recipe.load("digits-w1a4", [f"sample.{text}"]) for text in settings)]
    assert len({runs.samples_npz(spec, "r-s0") for spec in specs}) == len(specs)
    same = recipe.load("digits-w1a4", ["sample.batch=7", "sample.shard=9"])
    assert runs.samples_npz(same, "r-s0") == runs.samples_npz(specs[0], "r-s0")


# write_whole


def test_write_whole(home: Path):
    path = home / "a" / "b" / "file.npz"
    seen = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        assert not path.exists()
        temporary.write_bytes(b"content")

    runs.write_whole(path, write)
    assert path.read_bytes() == b"content"
    assert seen[0].parent == path.parent
    assert seen[0].suffix == ".npz"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_fails_leaves_what_was_there(home: Path, before: str | None):
    path = home / "file.txt"
    if before is not None:
        path.write_text(before)
    listed = sorted(home.iterdir())

    for error, expected in (
        (OSError(28, "No space left on device"), BdmError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def half(temporary: Path, error: BaseException = error) -> None:
            temporary.write_text("half")
            raise error

        with pytest.raises(expected):
            runs.write_whole(path, half)
        assert sorted(home.iterdir()) == listed
        assert not path.exists() if before is None else path.read_text() == before


def test_an_unwritable_place_is_the_users_mistake(blocked: Path):
    with pytest.raises(
        BdmError, match=r"^cannot write .*below/x.txt \(.+\)\.\n  free or choose another place \(BDM_HOME\)$"
    ):
        runs.write_text(blocked / "x.txt", "text")
    with pytest.raises(BdmError, match=r"cannot write .*below/x.jsonl"):
        runs.append_line(blocked / "x.jsonl", {})


def test_a_kill_while_writing_leaves_nothing_under_the_final_name(home: Path):
    code = """
        import os, signal
        from pathlib import Path
        from bdm_cli import runs

        def write(temporary):
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        runs.write_whole(Path(os.environ["BDM_HOME"]) / "file.txt", write)
    """
    assert python(code).wait(30) == -signal.SIGKILL
    assert not (home / "file.txt").exists()
    runs.write_text(home / "file.txt", "whole")
    assert (home / "file.txt").read_text() == "whole"


# append_line and read_lines


def test_lines_come_back_in_order(home: Path):
    path = home / "results" / "records" / "run.jsonl"
    assert runs.read_lines(path) == []
    lines = [{"i": i, "text": "a\nb ü", "value": 0.1 * i, "none": None} for i in range(5)]
    for line in lines:
        runs.append_line(path, line)
    assert runs.read_lines(path) == lines
    assert path.read_bytes().count(b"\n") == 5


@pytest.mark.parametrize("torn", [b"{", b'{"i": 1', b'{"i": 1}'])
def test_a_torn_line_is_left_out_and_then_replaced(home: Path, torn: bytes):
    path = home / "x.jsonl"
    runs.append_line(path, {"i": 0})
    with open(path, "ab") as file:
        file.write(torn)
    assert runs.read_lines(path) == [{"i": 0}]
    runs.append_line(path, {"i": 2})
    assert runs.read_lines(path) == [{"i": 0}, {"i": 2}]
    assert path.read_bytes() == b'{"i": 0}\n{"i": 2}\n'


def test_a_file_that_is_only_a_torn_line(home: Path):
    path = home / "x.jsonl"
    path.write_bytes(b'{"i"')
    assert runs.read_lines(path) == []
    runs.append_line(path, {"i": 2})
    assert runs.read_lines(path) == [{"i": 2}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_refused_and_changes_nothing(home: Path, value: float):
    path = home / "x.jsonl"
    runs.append_line(path, {"i": 0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.append_line(path, {"i": value})
    assert runs.read_lines(path) == [{"i": 0}]


def test_a_line_that_is_not_json_is_an_error(home: Path):
    path = home / "x.jsonl"
    path.write_text('{"i": 0}\n<<<<<<< ours\n{"i": 1}\n')
    with pytest.raises(BdmError, match=r"x.jsonl holds a line that is not JSON(.|\n)*mend or remove that line"):
        runs.read_lines(path)


# claim


def python(code: str, **environment: str) -> subprocess.Popen:
    """A process of its own that runs this code with this package and this home directory."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(Path(bdm_cli.__file__).parents[1])} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


HOLD = """
    from bdm_cli import runs
    from bdm_cli.errors import BdmError

    try:
        with runs.claim("digits-w1a4-s0"):
            print("claimed", flush=True)
            input()
    except BdmError as error:
        print(error)
"""


@pytest.fixture
def holder(home: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the run until it gets a line."""
    process = python(HOLD)
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_ends(home: Path, holder: subprocess.Popen):
    second, _ = python(HOLD).communicate("\n", timeout=30)
    assert second.startswith("run 'digits-w1a4-s0' is being worked on by another process (")
    assert "wait for it, stop it, or use another --seed" in second
    with pytest.raises(BdmError, match="another process"), runs.claim("digits-w1a4-s0"):
        pass
    with runs.claim("digits-w1a4-s1") as folder:  # another run is free
        assert folder == home / "runs" / "digits-w1a4-s1"
    holder.communicate("\n", timeout=30)
    with runs.claim("digits-w1a4-s0"):
        pass


def test_a_killed_process_gives_its_claim_back(holder: subprocess.Popen):
    holder.kill()
    holder.wait(30)
    with runs.claim("digits-w1a4-s0") as folder:
        assert folder.is_dir()


def test_a_claim_ends_with_its_block(home: Path):
    for _ in range(2):
        with pytest.raises(KeyError), runs.claim("x-s0"):
            raise KeyError
    with runs.claim("x-s0"), pytest.raises(BdmError, match="another process"), runs.claim("x-s0"):
        pass


def test_the_other_processes_of_a_distributed_training_claim_nothing(holder: subprocess.Popen):
    out, _ = python(HOLD, RANK="1").communicate("\n", timeout=30)
    assert out == "claimed\n"


def test_a_run_directory_that_cannot_be_written(blocked: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BDM_HOME", str(blocked))
    with (
        pytest.raises(BdmError, match=r"^cannot write the directory .*\(.+\)\.\n  use a directory you may write"),
        runs.claim("x-s0"),
    ):
        pass


# finished runs


def finished(spec: recipe.Recipe, seed: int = 0) -> str:
    run_id = spec.run_id(seed)
    runs.write_text(runs.recipe_copy(run_id), spec.model_dump_json())
    runs.write_text(runs.weights(run_id), "")
    return run_id


def test_a_run_by_id_or_by_recipe():
    spec = recipe.load("digits-w1a4", ["method.tau=0.009"])
    run_id = finished(spec, seed=2)
    assert run_id == "digits-w1a4+method.tau=0.009-s2"
    by_id, found = runs.target(run_id, None, None, ["sample.n_images=10"], 0)
    assert (found, by_id.sample.n_images) == (run_id, 10)
    by_recipe, found = runs.target(None, "digits-w1a4", None, ["method.tau=9e-3", "sample.steps=5"], 2)
    assert (found, by_recipe.sample.steps) == (run_id, 5)
    assert by_recipe.id == "digits-w1a4+method.tau=0.009+sample.steps=5"


def test_runs_that_are_not_there():
    finished(recipe.load("digits-w1a4"))
    with pytest.raises(BdmError, match=r"unknown finished run 'digits-w1a4-s1'\. Did you mean 'digits-w1a4-s0'\?"):
        runs.existing("digits-w1a4-s1")
    runs.run_dir("digits-w1a4-s1").mkdir()
    with pytest.raises(BdmError, match=r"was started and has not finished: bdm train \.\.\. --resume"):
        runs.existing("digits-w1a4-s1")
    for run_id, name in ((None, None), ("digits-w1a4-s0", "digits-w1a4")):
        with pytest.raises(BdmError, match="give either --run ID or --recipe NAME"):
            runs.target(run_id, name, None, [], 0)


def test_a_way_of_sampling_that_nothing_was_trained_for():
    """EfficientDM trains along the sampler's trajectories; --run draws in another way all the same."""
    name = "digits-ldm-w4a4-efficientdm"
    run_id = finished(recipe.load(name))
    with pytest.raises(BdmError) as caught:
        runs.target(None, name, None, ["sample.steps=10", "sample.n_images=5"], 0)
    assert str(caught.value).endswith(
        "'efficientdm' is trained for one way of sampling: train it with sample.steps=10, too;\n"
        f"  or draw in this way from what was trained for another: --run {run_id} --set sample.steps=10"
    )
    spec, found = runs.target(run_id, None, None, ["sample.steps=10", "sample.n_images=5"], 0)
    assert (found, spec.id) == (run_id, f"{name}+drawn.steps=10+sample.n_images=5")
    spec, found = runs.target(None, name, None, ["sample.n_images=5"], 0)
    assert (found, spec.id) == (run_id, f"{name}+sample.n_images=5")


def test_a_recipe_copy_is_the_recipe():
    spec = recipe.load("digits-w1a4", ["method.tau=0.009", "sample.eta=0.5"])
    assert recipe.from_json(json.dumps(json.loads(spec.model_dump_json()))) == spec
