"""Whose suite a number follows: what each metric is there, on which network's features."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdm_cli.errors import BdmError, unknown
from bdm_cli.metrics import FEATURES, METRICS, PROTOCOLS, inception_score, kernel
from bdm_cli.metrics.comparison import Comparison
from bdm_cli.metrics.features import Network
from bdm_cli.metrics.inception import CLEAN as CLEAN_WEIGHTS
from bdm_cli.metrics.inception import INCEPTION, VGG, CleanFeatures, InceptionFeatures, TorchFidelityFeatures
from bdm_cli.registry import resolve

Metric = Callable[[Comparison], float]


@dataclass(frozen=True)
class Protocol:
    """functions: its metrics. blocks: the images (their numbers, of n) whose scores its IS is the mean of.

    inception_only: whether it is defined on Inception alone, so that bdm's own feature networks cannot serve it.
    """

    name: str
    functions: Mapping[str, Metric]
    blocks: Callable[[int], list[np.ndarray]]
    inception_only: bool = True


def fid(c: Comparison) -> float:
    """Frechet distance of the pooled features."""
    return c.reference.to_pool(c.samples.statistics["pool"])


def sfid(c: Comparison) -> float:
    """Frechet distance of the spatial features (arXiv:2103.03841): sensitive to where things are."""
    return c.reference.to_spatial(c.samples.statistics["spatial"])


def kid(c: Comparison) -> float:
    """Kernel distance with torch-fidelity's defaults (ADM has none)."""
    return kernel.torch_fidelity(c.samples.rows["pool"], c.reference.summary.rows["pool"])


def inception(blocks: Callable[[int], list[np.ndarray]]) -> Metric:
    """The Inception Score over these blocks of images."""
    return lambda c: inception_score.score(c.samples.rows["logits"], blocks(c.samples.n))


ADM = Protocol(
    "adm",
    {
        "fid": fid,
        "sfid": sfid,
        "is": inception(inception_score.in_file_order),
        "precision": lambda c: c.coverage.precision,
        "recall": lambda c: c.coverage.recall,
        "kid": kid,
    },
    inception_score.in_file_order,
    inception_only=False,
)
CLEAN = Protocol(
    "clean",
    {"fid": fid, "kid": lambda c: kernel.clean_fid(c.samples.rows["pool"], c.reference.summary.rows["pool"])},
    inception_score.in_file_order,
)
TORCH_FIDELITY = Protocol(
    "torch-fidelity",
    {
        "fid": fid,
        "is": inception(inception_score.in_shuffled_parts),
        "precision": lambda c: c.vgg_coverage[0],
        "recall": lambda c: c.vgg_coverage[1],
        "kid": kid,
    },
    inception_score.in_shuffled_parts,
)


def protocol(name: str, metrics: tuple[str, ...], features: str) -> Protocol:
    """The protocol called `name`. Raises: BdmError if it has not these metrics, or not on these features."""
    found: Protocol = resolve("protocol", name, PROTOCOLS)
    for metric in metrics:
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
    lacking = [metric for metric in metrics if metric not in found.functions]
    if lacking:
        raise BdmError(
            f"the protocol '{name}' has no {', '.join(lacking)}.\n"
            f"  allowed: {', '.join(found.functions)} (--metrics, or evaluate.metrics); 'adm' has them all"
        )
    if found.inception_only and features != "inception":
        raise BdmError(
            f"the protocol '{name}' is defined on Inception's features, not on '{features}'.\n"
            "  give --features inception, or --protocol adm, which takes any (evaluate.features, evaluate.protocol)"
        )
    return found


def network(which: Protocol, features: str, metrics: tuple[str, ...], weights: Path | None = None) -> Network:
    """The feature network of a protocol, on the CPU. weights: Inception's file, where that is the network.

    Raises: BdmError if it cannot be had, or is named for features that have none.
    """
    if features != "inception":
        if weights is not None:
            raise BdmError(f"--inception-weights says nothing about the features '{features}'.\n  leave it out")
        return resolve("feature network", features, FEATURES)()
    if which is CLEAN:
        return CleanFeatures(CLEAN_WEIGHTS.get(weights))
    if which is TORCH_FIDELITY:
        vgg = VGG.get() if {"precision", "recall"} & set(metrics) else None
        return TorchFidelityFeatures(INCEPTION.get(weights), vgg)
    return InceptionFeatures(INCEPTION.get(weights))
