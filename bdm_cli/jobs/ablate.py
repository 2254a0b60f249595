"""`bdm ablate`: train, sample and evaluate what a table of the paper still lacks, and print it beside the paper's."""

import concurrent.futures
import datetime
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool

import pandas as pd

from bdm_cli import inputs, methods, output, recipe, records, runs
from bdm_cli.errors import BdmError, unknown
from bdm_cli.jobs import evaluate, sample, train
from bdm_cli.metrics import protocols
from bdm_cli.paper.ablations import ABLATIONS, Variant
from bdm_cli.paper.tables import Row, beside
from bdm_cli.recipe import Recipe

POLL_S = 0.5
PAPERS_DATASET = "bedrooms"
"""The data set of all the paper's ablations."""


def run(
    name: str,
    values: str | None = None,
    base: str = "digits-w1a32",
    seeds: int = 1,
    overrides: Sequence[str] = (),
    jobs: int = 0,
    anew: bool = False,
) -> pd.DataFrame:
    """Fill the cells of an ablation and return its table, the paper's columns beside ours.

    values: comma-separated; None = the defaults of the ablation. seeds: 0..seeds-1. jobs: processes at a time, 0 = as
    many as the cores allow. anew: cells count as done only if this home holds their run, not by their records alone.
    Raises: BdmError before anything starts, if a value, recipe or input is at fault.
    """
    if name not in ABLATIONS:
        raise unknown("ablation", name, ABLATIONS)
    ablation = ABLATIONS[name]
    given = [value.strip() for value in values.split(",")] if values else list(ablation.values)
    rows = [_row(base, variant, overrides) for variant in map(ablation.variant, given)]
    for row in rows:
        methods.build(row.spec)
        inputs.require(row.spec)
    wanted = {(row.spec.id, seed): row.spec for row in rows for seed in range(seeds)}
    done = records.newest(records.read())
    missing = {cell: spec for cell, spec in wanted.items() if not _complete(spec, cell[1], done, anew)}
    output.say(f"ablate {name}: {len(wanted)} cells, {len(wanted) - len(missing)} done, {len(missing)} to run")
    if missing:
        _check_scoring(missing.values())
        _fill(missing, jobs)
    return beside(records.read(), ablation.tables, rows)


def _check_scoring(specs: Iterable[Recipe]) -> None:
    """What the evaluation needs, before the training. Raises: BdmError if it is not there."""
    for settings in {spec.evaluate for spec in specs}:
        protocol = protocols.protocol(settings.protocol, settings.metrics, settings.features)
        protocols.network(protocol, settings.features, settings.metrics)
    for spec in specs:
        if spec.evaluate.reference:
            inputs.reference_path(spec)


def _row(base: str, variant: Variant, overrides: Sequence[str]) -> Row:
    """The row of a variant. Its number in the paper is the one without the overrides that all rows share."""
    spec, plain = _recipe(base, variant, overrides), _recipe(base, variant, ())
    cell = plain.id if plain.data.dataset == "digits" else plain.id.replace(plain.data.dataset, PAPERS_DATASET, 1)
    return Row(variant.label, spec, cell)


def _recipe(base: str, variant: Variant, overrides: Sequence[str]) -> Recipe:
    """The recipe of a row. Full precision is `<dataset>-fp`, untrained, whatever the base's bits and budget."""
    if variant.method == "fp":
        return recipe.load(
            recipe.sibling(base, "fp"), [text for text in overrides if not text.startswith(("train.", "method."))]
        )
    return recipe.load(base, [*overrides, *variant.overrides], variant.method)


def _complete(spec: Recipe, seed: int, done: dict[tuple[str, int, str], records.Record], anew: bool) -> bool:
    """Whether every metric of a cell has a record of today's recipe; with `anew`, of the images that lie here."""
    found = [done.get((spec.id, seed, metric)) for metric in spec.evaluate.metrics]
    if not all(record is not None and record.digest == spec.digest for record in found):
        return False
    if not anew:
        return True
    images = runs.samples_npz(spec, spec.run_id(seed))
    if not images.exists():
        return False
    made = int(images.stat().st_mtime)  # records have whole seconds
    return all(datetime.datetime.fromisoformat(record.time).timestamp() >= made for record in found)


def complete(spec: Recipe, seed: int) -> None:
    """Train, sample and evaluate one cell, each stage going on where it was left."""
    run_id = spec.run_id(seed)
    train.run(spec, seed, resume=runs.recipe_copy(run_id).exists())
    sample.run(spec, run_id)
    evaluate.run(inputs.of_run(spec, run_id))


def _end_with(parent: int) -> None:
    """A worker ends within a second of its parent, however that ended; its run goes on from its checkpoint."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _worker(spec_json: str, seed: int) -> None:
    os.environ["BDM_QUIET"] = "1"
    complete(recipe.from_json(spec_json, "the worker's order"), seed)


def _fill(missing: dict[tuple[str, int], Recipe], jobs: int) -> None:
    """Run the cells, several at a time in processes of their own; each stage is on disk when it ends."""
    # with a fixed number of threads per run, as many runs at a time as the cores hold
    threads = max(spec.train.threads for spec in missing.values())
    at_once = jobs or (max(1, (os.cpu_count() or 1) // threads) if threads else 1)
    if min(at_once, len(missing)) == 1:
        for (_, seed), spec in missing.items():
            complete(spec, seed)
        return
    total = sum(max(spec.train.steps, 1) for spec in missing.values())
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        min(at_once, len(missing)), mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    )
    try:
        with output.progress(f"{len(missing)} cells, {at_once} at a time", total, "steps") as advance:
            # the longest first, so that no core waits at the end; the later rows of a table are the more elaborate ones
            work = {cell: (spec.train.steps, row) for row, (cell, spec) in enumerate(missing.items())}
            waiting = {
                pool.submit(_worker, missing[cell].model_dump_json(), cell[1]): cell
                for cell in sorted(missing, key=work.get, reverse=True)
            }
            shown = 0
            while waiting:
                ended, _ = concurrent.futures.wait(waiting, POLL_S, concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    name, seed = waiting.pop(future)
                    future.result()
                    output.say(f"done: {name} seed {seed}")
                steps = sum(_steps(spec, seed) for (_, seed), spec in missing.items())
                advance(steps - shown, f"{len(waiting)} cells left")
                shown = steps
    except BrokenProcessPool:
        raise BdmError(
            "a worker process was killed (out of memory?).\n  run the command again, it goes on; with --jobs 1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _steps(spec: Recipe, seed: int) -> int:
    run_id = spec.run_id(seed)
    if runs.weights(run_id).exists():
        return max(spec.train.steps, 1)
    lines = runs.read_lines(runs.metrics_log(run_id))
    return lines[-1]["step"] if lines else 0
