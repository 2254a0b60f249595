"""Score images against a recipe's reference: FID, sFID, IS, precision and recall, as ADM's suite defines them."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from bdm_cli import inputs, output, records, runs
from bdm_cli.diffusion.data import reference_images
from bdm_cli.errors import BdmError
from bdm_cli.metrics import METRICS, images, summary
from bdm_cli.metrics.features import FeatureNet, Features, InceptionFeatures, extract, fingerprint, load_features
from bdm_cli.metrics.images import ImageSet
from bdm_cli.metrics.precision_recall import NEIGHBOUR
from bdm_cli.metrics.summary import Summary, summarize
from bdm_cli.recipe import Recipe
from bdm_cli.registry import resolve

Network = FeatureNet | InceptionFeatures


def run(recipe: Recipe, path: Path, run_id: str | None = None) -> pd.DataFrame:
    """The recipe's metrics of the images at `path` (npz with arr_0, or a folder), one row each.

    The reference is recipe.evaluate.reference, else the recipe's training images; its features are cached.
    run_id: the run of ours that made the images; then each metric becomes a record. None for images from elsewhere,
        which are only scored.
    Raises: BdmError for images or references that cannot be compared, or without the feature network's weights.
    """
    start = time.monotonic()
    functions: dict[str, Callable[[Summary, Summary], float]] = {
        name: resolve("metric", name, METRICS) for name in recipe.evaluate.metrics
    }
    network = load_features(recipe.evaluate.features)
    samples, reference = images.load(path), _reference(recipe)
    _check(recipe, network, samples, reference)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    ours = summarize(_features(network, samples, "features of the samples"), samples.stored)
    theirs = _reference_summary(recipe, network, reference)
    _warn(ours, theirs)

    rows = []
    for name, function in functions.items():
        value = function(ours, theirs)
        rows.append({"metric": name, "value": value, "n_images": len(samples.pixels), "n_reference": _n(name, theirs)})
    if run_id is not None:
        measured = {
            "run": run_id,
            "recipe": recipe.id,
            "seed": runs.seed(run_id),
            "steps": recipe.train.steps,
            "digest": recipe.digest,
            "features": recipe.evaluate.features,
            "sampling_steps": recipe.sample.steps,
            "wall_s": time.monotonic() - start,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        for row in rows:
            records.append(records.make(**measured, **row))
    labelled = [(METRICS[row["metric"]].label, *list(row.values())[1:], recipe.evaluate.features) for row in rows]
    return pd.DataFrame(labelled, columns=["Metric", "Value", "Images", "Reference images", "Features"], dtype=object)


def _reference(recipe: Recipe) -> ImageSet:
    if recipe.evaluate.reference:
        return images.load(inputs.reference(recipe))
    return ImageSet("the training images", reference_images(recipe))


def _check(recipe: Recipe, network: Network, samples: ImageSet, reference: ImageSet) -> None:
    """Everything about the images that would make a score wrong or impossible, before the first feature."""
    for each in (samples, reference):
        if len(each.pixels) <= NEIGHBOUR:
            raise BdmError(
                f"{each.source} has {len(each.pixels)} images, at least {NEIGHBOUR + 1} are needed.\n  give more images"
            )
    if samples.pixels.shape[1:] != reference.pixels.shape[1:]:
        given, wanted = (list(each.pixels.shape[1:]) for each in (samples, reference))
        raise BdmError(
            f"{samples.source} has images {given} (height, width, channels), {reference.source} of recipe "
            f"'{recipe.name}' has {wanted}.\n"
            "  prepare both alike, or choose another recipe or evaluate.reference"
        )
    if isinstance(network, FeatureNet):
        shape = network.shape
        if samples.pixels.shape[1:] != (shape.size, shape.size, shape.channels):
            raise BdmError(
                f"the features '{shape.dataset}' are for images [{shape.size}, {shape.size}, {shape.channels}], "
                f'{samples.source} has {list(samples.pixels.shape[1:])}.\n  set evaluate.features = "inception"'
            )


def _features(network: Network, chosen: ImageSet, what: str) -> Features:
    with output.progress(what, len(chosen.pixels), "images") as advance:
        return extract(network, chosen.pixels, advance=advance)


def _reference_summary(recipe: Recipe, network: Network, reference: ImageSet) -> Summary:
    """Cached by everything that it depends on: the network's weights, the images, and how many are kept."""
    n_pool = recipe.evaluate.n_reference
    key = hashlib.sha256(f"{fingerprint(network)} {reference.digest()} {n_pool}".encode()).hexdigest()[:16]
    path = runs.cache_dir() / f"reference-{key}.safetensors"
    if path.exists():
        return summary.load(path)
    found = summarize(_features(network, reference, "features of the reference"), reference.stored, n_pool)
    summary.save(found, path)
    return found


def _warn(samples: Summary, reference: Summary) -> None:
    for name, each in (("sample", samples), ("reference", reference)):
        for label, part in (("FID", each.pool_statistics), ("sFID", each.spatial_statistics)):
            if part.degenerate:
                output.say(
                    f"warning: {part.n} {name} images for {len(part.mu)} feature dimensions: {label} comes out too "
                    "high, compare it only with values from as many images"
                )


def _n(metric: str, reference: Summary) -> int | None:
    """How many reference images a metric rests on; None if unknown (stored statistics) or none."""
    of = {"fid": reference.pool_statistics.n, "sfid": reference.spatial_statistics.n}
    return None if metric == "is" else of.get(metric, len(reference.pool))
