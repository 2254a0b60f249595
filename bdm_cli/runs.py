"""Every path below runs/ and results/, the claim on a run directory, and files that appear only when whole."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from bdm_cli import output, recipe
from bdm_cli.errors import BdmError, unknown
from bdm_cli.places import home
from bdm_cli.recipe import Recipe


def runs_dir() -> Path:
    return home() / "runs"


def records_dir() -> Path:
    return home() / "results" / "records"


def tables_dir() -> Path:
    return home() / "results" / "tables"


def bench_dir() -> Path:
    return home() / "results" / "bench"


def run_dir(run_id: str) -> Path:
    return runs_dir() / run_id


def weights(run_id: str) -> Path:
    """The finished model of a run: EMA weights with the resolved recipe in the header."""
    return run_dir(run_id) / "weights.safetensors"


def checkpoint(run_id: str) -> Path:
    """The state of a training that is under way."""
    return run_dir(run_id) / "checkpoint.safetensors"


def calibration(run_id: str) -> Path:
    """What a post-training calibration has done so far."""
    return run_dir(run_id) / "calibration.safetensors"


def metrics_log(run_id: str) -> Path:
    """One JSON line per logged training step."""
    return run_dir(run_id) / "metrics.jsonl"


def recipe_copy(run_id: str) -> Path:
    """The resolved recipe a run was started with, as JSON."""
    return run_dir(run_id) / "recipe.json"


def samples_npz(spec: Recipe, run_id: str) -> Path:
    """The images that spec.sample makes of a run; grid.png and the shards under way lie beside it."""
    trained = spec
    if spec.first_stage is not None and recipe_copy(run_id).exists():
        trained = stored_recipe(run_id)
    return run_dir(run_id) / "samples" / samples_name(spec, trained)


def samples_name(spec: Recipe, trained: Recipe) -> Path:
    """Folder and file of images: what spec.sample decides, and if the first stage is not that of `trained`."""
    s = spec.sample
    parts = [f"{s.sampler}{s.steps}-eta{s.eta:g}-{s.to_bytes}"]
    if s.spacing != "uniform":
        parts.append(s.spacing)
    if s.guidance != 1:
        parts.append(f"guidance{s.guidance:g}")
    if s.classes or s.prompts:
        told = json.dumps([s.classes, s.prompts])
        parts.append(f"of-{hashlib.sha256(told.encode()).hexdigest()[:8]}")
    stages = [recipe.first_stage for recipe in (spec, trained)]
    if None not in stages and stages[0].path != stages[1].path:
        parts.append(f"by-{hashlib.sha256(stages[0].path.encode()).hexdigest()[:8]}")
    return Path("-".join(parts)) / f"samples-{s.n_images}.npz"


def seed(run_id: str) -> int:
    """The seed in a run's id."""
    return int(run_id.rpartition("-s")[2])


def cache_dir() -> Path:
    return runs_dir() / "cache"


def stored_recipe(run_id: str) -> Recipe:
    """The recipe a run was started with. Raises: BdmError if its file is missing or damaged."""
    path = recipe_copy(run_id)
    if not path.exists():
        raise BdmError(f"run '{run_id}' has no recipe.json ({path}).\n  remove the run and train it again")
    return recipe.from_json(path.read_text(), str(path))


TRAIN_FIRST = "train it first: bdm train --recipe ..."


def existing(run_id: str, hint: str = TRAIN_FIRST) -> Path:
    """The directory of a run that has finished weights. Raises: BdmError naming the finished runs, with the hint."""
    if not weights(run_id).exists():
        known = [p.parent.name for p in runs_dir().glob("*/weights.safetensors")]
        if run_dir(run_id).is_dir():
            hint = f"run '{run_id}' was started and has not finished: bdm train ... --resume"
        raise unknown("finished run", run_id, known, hint)
    return run_dir(run_id)


def target(
    run_id: str | None, name: str | None, method: str | None, overrides: Sequence[str], seed: int
) -> tuple[Recipe, str]:
    """The recipe and the id of the finished run that --run, or --recipe with --seed, names.

    Raises: BdmError if neither or both are given, or there is no such finished run.
    """
    if (run_id is None) == (name is None):
        raise BdmError("give either --run ID or --recipe NAME (with --seed).\n  e.g. --recipe digits-w1a4 --seed 0")
    if run_id is not None:
        existing(run_id)
        return recipe.of_run(stored_recipe(run_id), overrides), run_id
    like = recipe.load(name, overrides, method)
    keys = {text: text.partition("=")[0].strip() for text in overrides}
    trained = [text for text, key in keys.items() if recipe.of_training(key, like.method["name"])]
    plain, run_id = recipe.load(name, trained, method), like.run_id(seed)
    drawn, hint = [text for text in trained if keys[text] in recipe.TRAJECTORY], TRAIN_FIRST
    if drawn:
        other = recipe.load(name, [text for text in trained if text not in drawn], method).run_id(seed)
        hint = (
            f"'{like.method['name']}' is trained for one way of sampling: train it with {' '.join(drawn)}, too;\n"
            f"  or draw in this way from what was trained for another: --run {other} --set {' --set '.join(drawn)}"
        )
    existing(run_id, hint)
    return recipe.of_run(stored_recipe(run_id), (), like, plain), run_id


def claim(run_id: str) -> contextlib.AbstractContextManager[Path]:
    """Hold a run directory; see claim_folder."""
    return claim_folder(run_dir(run_id), f"run '{run_id}'")


@contextlib.contextmanager
def claim_folder(folder: Path, what: str) -> Iterator[Path]:
    """Hold a directory for this process alone; the claim ends with the process, however it ends.

    The first process of a distributed launch claims it for all.
    Raises: BdmError if the directory cannot be written or another process holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield folder
        return
    with _lock(folder) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BdmError(
                f"{what} is being worked on by another process ({folder}).\n"
                "  wait for it, stop it, or use another --seed"
            ) from None
        yield folder


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other process works below `folder`, and keep others waiting; the turn ends with the process."""
    with _lock(folder) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            output.say(f"another process works on {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock(folder: Path) -> TextIO:
    """The file that who works in `folder` locks. Raises: BdmError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / "lock", "a")
    except OSError as error:
        raise BdmError(
            f"cannot write the directory {folder} ({error.strerror}).\n"
            "  use a directory you may write: run bdm elsewhere, or set BDM_HOME"
        ) from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then flush it to disk and give it its final name (atomic on POSIX).

    The temporary name keeps the final suffix, since some writers choose the format by it.
    Raises: BdmError if the file cannot be written; nothing is left under the final name then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BdmError(
            f"cannot write {path} ({error.strerror or error}).\n  free or choose another place (BDM_HOME)"
        ) from None


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text))


def append_line(path: Path, line: dict) -> None:
    """Append one JSON line, one process at a time, and flush it to disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END) and not _ends_a_line(file):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill cut off
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BdmError(f"cannot write {path} ({error.strerror or error}).\n  free or choose another place") from None


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_lines(path: Path) -> list[dict]:
    """The lines append_line wrote; a last line cut off by a kill is left out. [] if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    complete = lines[:-1]  # what stands after the last newline was not written whole
    try:
        return [json.loads(line) for line in complete if line.strip()]
    except json.JSONDecodeError as error:
        raise BdmError(f"{path} holds a line that is not JSON ({error}).\n  mend or remove that line") from None
