"""`bdm evaluate`: score images against a reference by a named protocol, alone or several sets with their spread."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState

from bdm_cli import output, records, runs, student
from bdm_cli.diffusion.data import Images, reference_images
from bdm_cli.errors import BdmError
from bdm_cli.images import files, readers, sets
from bdm_cli.images.sets import ImageSet
from bdm_cli.inputs import Evaluation, Source
from bdm_cli.metrics import FEATURES, METRICS, PROTOCOLS, bootstrap, kernel, protocols
from bdm_cli.metrics.comparison import Comparison, Reference
from bdm_cli.metrics.extraction import BATCH, extract, summary_of
from bdm_cli.metrics.features import Network
from bdm_cli.metrics.inception_score import BLOCK
from bdm_cli.metrics.precision_recall import NEIGHBOUR
from bdm_cli.metrics.protocols import Protocol
from bdm_cli.metrics.summary import Summary
from bdm_cli.recipe import Evaluate

TOO_FEW, SORTED = "TOO FEW IMAGES", "SORTED BY CLASS"
LOUD = (TOO_FEW, SORTED)
PUBLISHED = 50_000
PART = {"fid": "pool", "sfid": "spatial"}
"""The features whose statistics a metric compares."""


def run(asked: Evaluation, weights: Path | None = None, batch: int = BATCH, resamples: int = 0) -> pd.DataFrame:
    """One row for each set of samples and metric; what was seen before is not computed again.

    A run that is scored by its own recipe leaves records. weights: a file in place of Inception's own place. batch:
    images at a time. resamples: also 95 % bootstrap intervals (columns Low, High) from so many.
    In a distributed launch the first process scores, after all have shared the pass over the images; the others return
    an empty table.
    Raises: BdmError for images or references that cannot be compared, or without the feature network's weights.
    """
    start, settings = time.monotonic(), asked.settings
    protocol = protocols.protocol(settings.protocol, settings.metrics, settings.features)
    processes = student.processes()
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers allow TF32, which the bounds do not
    with processes.main_process_first():  # who may download
        network = protocols.network(protocol, settings.features, settings.metrics, weights)
    loaded = [_named(source, _without_stored(_images(source), protocol)) for source in asked.samples]
    reference = None
    if asked.reference is not None and settings.compares:
        reference = _without_stored(_reference(asked.reference, settings, loaded[0]), protocol)
    _check(network, protocol, settings, loaded, reference)
    network.to(processes.device)
    if processes.is_main_process:
        _say_notes(network, loaded, reference)

    def summary(images: ImageSet, keep: int = 0) -> Summary:
        what = f"{settings.features} features of {images.source}"
        return summary_of(network, images, processes, keep, batch, what).with_stored(images.stored)

    theirs = None if reference is None else summary(reference, settings.n_reference).choice(settings.n_reference)
    ours = [summary(images) for images in loaded]
    if not processes.is_main_process:
        return pd.DataFrame()
    # without a reference samples stand beside themselves, which the Inception Score does not look at
    against = Reference(ours[0] if theirs is None else theirs, settings.distances, processes.device)
    rows = []
    for source, images, each in zip(asked.samples, loaded, ours, strict=True):
        comparison = Comparison(each, against)
        rows += _scores(source, images, comparison, protocol, settings, resamples)
    _warn(rows)
    if asked.recorded:
        _record(asked, rows, processes, time.monotonic() - start)
    return _table(rows, settings, len(asked.samples) > 1 or bool(resamples), bool(resamples))


def _images(source: Source) -> ImageSet:
    if source.path is not None:
        return sets.load(source.path)
    return ImageSet(f"the training images of {source.text}", reference_images(source.recipe))


def _named(source: Source, images: ImageSet) -> ImageSet:
    if source.path is not None:
        return images
    told = f"{source.text} is a recipe: its training images are scored; a run of it is {source.recipe.run_id(0)}"
    return replace(images, notes=(*images.notes, told))


def _without_stored(images: ImageSet, protocol: Protocol) -> ImageSet:
    """A file's statistics are of ADM's resize and network: under another protocol its images count."""
    if not images.stored or protocol.name == "adm":
        return images
    told = f"{images.source}: its mu and sigma are ADM's; '{protocol.name}' takes its {len(images.pixels)} images"
    return replace(images, stored={}, notes=(*images.notes, told))


def _reference(source: Source, settings: Evaluate, samples: ImageSet) -> ImageSet:
    """The reference; raw images of any size are prepared as the samples are, if evaluate.prepare says how."""
    if source.path is None or settings.prepare == "none" or source.recipe is not None or source.path.suffix == ".npz":
        return _images(source)
    height, width, _ = samples.pixels.shape[1:]
    if height != width:
        raise BdmError(
            f"{samples.source} has images of {width}x{height} (width x height); a reference is prepared to squares.\n"
            '  prepare it yourself, and set evaluate.prepare = "none"'
        )
    reader = files.find(source.path)
    seen = readers.survey(reader)
    sets.require_whole(reader, seen)
    images = Images(reader, settings.prepare, height, sets.channels(seen), recipe=source.text)
    return ImageSet(f"{source.path} ({settings.prepare})", images, notes=sets.notes(reader, seen))


def _say_notes(network: Network, loaded: list[ImageSet], reference: ImageSet | None) -> None:
    """What was done to the images, and what makes them doubtful."""
    told = []
    for each in [*loaded, *([reference] if reference else [])]:
        told += each.notes
        if each.pixels.shape[3] < network.channels:
            told.append(f"{each.source}: grey images are repeated to {network.channels} channels")
    if reference is not None and any(reference.pixels.content() == images.pixels.content() for images in loaded):
        told.append("samples and reference are the same images")
    for note in told:
        output.say(f"note: {note}")


def _check(
    network: Network, protocol: Protocol, settings: Evaluate, loaded: list[ImageSet], reference: ImageSet | None
) -> None:
    """Everything about the images that would make a score wrong or impossible, before the first feature."""
    for each in [*loaded, *([reference] if reference else [])]:
        shape = each.pixels.shape
        if len(each.pixels) <= NEIGHBOUR:
            raise BdmError(
                f"{each.source} has {len(each.pixels)} images, at least {NEIGHBOUR + 1} are needed.\n  give more images"
            )
        network.require(shape[1:], each.source)
        if each.stored:
            _check_stored(network, each)
        other = loaded[0] if each is reference or reference is None else reference
        if shape[1:3] != other.pixels.shape[1:3]:
            given, wanted = (list(images.pixels.shape[1:]) for images in (each, other))
            raise BdmError(
                f"{each.source} has images {given} (height, width, channels), {other.source} has {wanted}.\n"
                "  prepare both alike (a reference of raw images: --prepare), or choose another reference"
            )
    if reference is None and settings.compares:
        raise BdmError(
            f"there is no reference to compare with, for {', '.join(n for n in settings.metrics if n != 'is')}.\n"
            "  give --reference: a run, an npz, a folder or tar of images, a recipe; or --metrics is"
        )
    if reference is not None and settings.n_reference > len(reference.pixels):
        raise BdmError(
            f"{settings.n_reference} reference images are asked for, and there are {len(reference.pixels)}.\n"
            "  --set evaluate.n_reference=0 takes all"
        )
    for each in loaded if "is" in settings.metrics else []:
        if not all(map(len, protocol.blocks(len(each.pixels)))):
            raise BdmError(
                f"{each.source} has {len(each.pixels)} images, fewer than the parts of the Inception Score of the "
                f"protocol '{protocol.name}'.\n  give more images, or leave is out of --metrics"
            )


def _check_stored(network: Network, images: ImageSet) -> None:
    """Raises: BdmError if a file's statistics are of other features than the network's, told by its first image."""
    (features,) = extract(network, images.pixels, range(1), 1, next(network.parameters()).device)
    for name, mean in (("pool", "mu"), ("spatial", "mu_s")):
        given = len(images.stored[mean])
        if name in features and (wanted := features[name].shape[1]) != given:
            raise BdmError(
                f"{images.source}: the statistic {mean} has {given} dimensions, the {name} features have {wanted}.\n"
                '  published files need evaluate.features = "inception"; or give a file without mu'
            )


def _scores(
    source: Source,
    images: ImageSet,
    comparison: Comparison,
    protocol: Protocol,
    settings: Evaluate,
    resamples: int,
) -> list[dict[str, object]]:
    values = {name: protocol.functions[name](comparison) for name in settings.metrics}
    if broken := [name for name, value in values.items() if not math.isfinite(value)]:
        raise BdmError(
            f"{source.text}: {', '.join(broken)} is not a finite number.\n"
            "  its features are too far from anything the feature network knows; look at the images"
        )
    rows: list[dict[str, object]] = [
        {
            "samples": source.text,
            "metric": name,
            "value": value,
            "n_images": comparison.samples.n,
            "n_reference": _n_reference(name, comparison),
            "note": _note(name, images, comparison, protocol, settings),
        }
        for name, value in values.items()
    ]
    if resamples:
        total = resamples * len(PART.keys() & values)
        with output.progress(f"resampling {source.text}", total, "resamples") as advance:
            found = bootstrap.intervals(comparison, protocol, values, resamples, advance=advance)
        for row in rows:
            row["low"], row["high"] = found[row["metric"]] or (None, None)
    return rows


def _n_reference(metric: str, comparison: Comparison) -> int | None:
    """How many reference images a metric rests on; None if unknown (stored statistics) or none."""
    if metric == "is":
        return None
    reference = comparison.reference.summary
    return reference.statistics[PART[metric]].n if metric in PART else len(reference.rows["pool"])


def _note(metric: str, images: ImageSet, comparison: Comparison, protocol: Protocol, settings: Evaluate) -> str:
    """What makes the number one to be careful with, if anything."""
    if metric in PART:
        return _few(PART[metric], comparison, settings)
    if metric == "kid" and protocol.name == "adm":
        size = kernel.subset(comparison.samples.rows["pool"], comparison.reference.summary.rows["pool"])
        return f"torch-fidelity's definition, ADM has none; subsets of {size} images"
    if metric != "is":
        return ""
    told, sizes = [], [len(block) for block in protocol.blocks(comparison.samples.n)]
    if images.class_run and protocol.name == "adm":
        told.append(f"{SORTED}: {images.class_run:.0f} of one class follow each other; too low, shuffle them")
    if sizes[-1] < BLOCK:
        which = "rests on" if len(sizes) == 1 else "its last block has"
        told.append(f"{which} {sizes[-1]} images, fewer than a block of {BLOCK}")
    return "; ".join(told)


def _few(part: str, comparison: Comparison, settings: Evaluate) -> str:
    """Whether there are too few images, or too few different ones, for a covariance; or fewer than papers have."""
    few = []
    for side, summary in (("sample", comparison.samples), ("reference", comparison.reference.summary)):
        statistics = summary.statistics[part]
        if statistics.n is None:
            continue
        different = min(statistics.n, summary.different) if len(summary.rows["pool"]) == statistics.n else statistics.n
        if different <= len(statistics.mu):
            kind = side if different == statistics.n else f"different {side}"
            few.append(f"{different} {kind} images for {len(statistics.mu)} feature dimensions")
    if few:
        return f"{TOO_FEW}: {', '.join(few)}; comes out too high"
    if settings.features == "inception" and comparison.samples.n < PUBLISHED:
        return f"published values rest on {PUBLISHED:,} samples; fewer come out higher"
    return ""


def _warn(rows: list[dict[str, object]]) -> None:
    for row in rows:
        if str(row["note"]).startswith(LOUD):
            output.say(f"warning: {row['samples']}, {METRICS[row['metric']]}: {row['note']}")


def _record(asked: Evaluation, rows: list[dict[str, object]], processes: PartialState, wall_s: float) -> None:
    (source,) = asked.samples
    spec, settings = source.recipe, asked.settings
    for row in rows:
        measured = {key: row[key] for key in ("metric", "value", "n_images", "n_reference")}
        record = records.make(
            run=source.run_id,
            recipe=spec.id,
            seed=runs.seed(source.run_id),
            steps=spec.train.steps,
            digest=spec.digest,
            features=settings.features,
            protocol=settings.protocol,
            sampling_steps=spec.sample.steps,
            wall_s=wall_s,
            device=torch.cuda.get_device_name() if processes.device.type == "cuda" else "cpu",
            **measured,
        )
        records.append(record)


def _table(rows: list[dict[str, object]], settings: Evaluate, named: bool, spread: bool) -> pd.DataFrame:
    columns = {
        **({"Samples": "samples"} if named else {}),
        "Metric": "metric",
        "Value": "value",
        **({"Low": "low", "High": "high"} if spread else {}),
        "Images": "n_images",
        "Reference images": "n_reference",
    }
    table = pd.DataFrame([[row[key] for key in columns.values()] for row in rows], columns=list(columns), dtype=object)
    table["Metric"] = table["Metric"].map(METRICS)
    table["Features"] = FEATURES[settings.features].label
    rounded = "" if settings.distances == "exact" else f", {settings.distances} distances"
    table["Protocol"] = PROTOCOLS[settings.protocol].label + rounded
    table["Note"] = [row["note"] for row in rows]
    return table


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each set of samples, a column for each metric: value [low, high]."""
    if table.empty:
        return table
    metrics = list(dict.fromkeys(table["Metric"]))
    wide = []
    for first in range(0, len(table), len(metrics)):
        part = table.iloc[first : first + len(metrics)]
        row, by_metric = part.iloc[0], part.set_index("Metric")
        cells = {metric: _cell(by_metric.loc[metric]) for metric in metrics}
        notes = "; ".join(f"{metric}: {note}" for metric, note in by_metric["Note"].items() if note)
        by = f"{row['Features']}, {row['Protocol']}"
        wide.append({"Samples": row["Samples"], **cells, "Images": row["Images"], "By": by, "Note": notes})
    return pd.DataFrame(wide, dtype=object)


def _cell(row: pd.Series) -> str:
    value = f"{row['Value']:.4g}"
    return (
        value
        + (f" [{row['Low']:.4g}, {row['High']:.4g}]" if row["Low"] is not None else "")
        + (" (!)" if row["Note"].startswith(LOUD) else "")
    )
