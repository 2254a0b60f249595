"""A record: one measurement with its provenance, one line of results/records/<run>.jsonl."""

import datetime
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pydantic

from bdm_cli import __version__, runs
from bdm_cli.errors import BdmError

LIBRARIES = ("torch", "diffusers", "torch-fidelity")


class Record(pydantic.BaseModel):
    """One measured number. Append-only: a correction is a new record, and the newest counts.

    recipe: the recipe's id (name and the overrides that change results), which paper/cells.csv refers to.
    digest: Recipe.digest, so that a number of an older version of a recipe is not taken for one of today's.
    value: percent for precision and recall, otherwise the metric's own unit.
    features, protocol: whose features, by whose suite (recipe.Evaluate); numbers without a protocol are ADM's.
    n_images, sampling_steps: None for numbers that rest on no samples. steps: training steps behind the weights.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    run: str
    recipe: str
    digest: str
    seed: int
    metric: str
    value: float
    features: str | None = None
    protocol: str | None = None
    n_images: int | None = None
    n_reference: int | None = None
    sampling_steps: int | None = None
    steps: int
    wall_s: float
    device: str
    commit: str
    versions: dict[str, str]
    machine: str
    time: str

    @property
    def ruler(self) -> str:
        """What must stand beside a score that is not ADM's on Inception's features; '' for one that is, or no score."""
        parts = [f"{self.features} features"] if self.features not in (None, "inception") else []
        return ", ".join(parts + [self.protocol] * (self.protocol not in (None, "adm")))


@functools.cache
def provenance() -> dict:
    """What every record of this process shares: commit, versions, machine."""
    return {
        "commit": _commit(),
        "versions": {"bdm": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {processor()}",
    }


def processor() -> str:
    """The processor's name. How sums are rounded depends on it: of one seed, another processor makes another run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout this code runs from, '+changed' if tracked files outside results/ differ from it."""
    here = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(here)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if top.returncode or head.returncode or Path(top.stdout.strip()) != here:
            return f"release {__version__}"
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)results"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except FileNotFoundError:  # no git on this machine
        return f"release {__version__}"
    return head.stdout.strip() + ("+changed" if changed.stdout.strip() else "")


def make(**measured: object) -> Record:
    """A record of what was measured, with this process's provenance and the time."""
    return Record(**measured, **provenance(), time=now())


def now() -> str:
    """The time as records write it: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append(record: Record) -> None:
    runs.append_line(runs.records_dir() / f"{record.run}.jsonl", record.model_dump())


def read() -> list[Record]:
    """All records below results/records/, by file and then in the order they were measured."""
    records = []
    for path in sorted(runs.records_dir().glob("*.jsonl")):
        try:
            records += [Record.model_validate(line) for line in runs.read_lines(path)]
        except pydantic.ValidationError as error:
            raise BdmError(f"{path} holds a line that is not a record:\n{error}\n  mend or remove that line") from None
    return records


def newest(records: list[Record]) -> dict[tuple[str, int, str], Record]:
    """The record that counts for each (recipe, seed, metric)."""
    return {(r.recipe, r.seed, r.metric): r for r in records}
