"""Precision and recall with ADM's rounding: distances in float16 wherever a whole block of them is finite.

evaluations/evaluator.py of openai/guided-diffusion, DistanceBlock and ManifoldEstimator, as TensorFlow 2.21 computes it
on a CPU. Other versions round elsewhere (2.12 sums the matrix product in float16 too) and move the result by up to 0.5
points, so this serves to see where a published number may come from; precision_recall.exact is the definition.
"""

import numpy as np
import torch
from torch import Tensor

from bdm_cli.metrics.precision_recall import NEIGHBOUR, Coverage, require_enough

BLOCK = 10_000
"""ADM's batch: of a block with one distance beyond float16, all are taken in float32."""
LANES, ACCUMULATORS, LONGEST = 8, 4, 1600
"""How TensorFlow's CPU code (Eigen) sums a row of float16: lanes, accumulators per lane, numbers summed in one go."""
ROWS = 2000


def coverage(samples: np.ndarray, reference: np.ndarray, device: torch.device) -> Coverage:
    """As precision_recall.exact, rounded as ADM rounds. Slower by far: every distance passes through float16.

    Raises: BdmError for fewer than four images on a side; ValueError unless D is a multiple of 8.
    """
    require_enough(samples, reference)
    of_samples, of_reference = _radii(samples, device), _radii(reference, device)
    inside, reached = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for i in range(0, len(reference), BLOCK):
        for j in range(0, len(samples), BLOCK):
            to, at = slice(i, i + BLOCK), slice(j, j + BLOCK)
            distances = _distances(reference[to], samples[at], device)
            reached[to] |= (distances <= of_samples[at]).any(1).cpu().numpy()
            inside[at] |= (distances <= of_reference[to, None]).any(0).cpu().numpy()
    return Coverage(inside, reached)


def _radii(features: np.ndarray, device: torch.device) -> Tensor:
    n, found = len(features), []
    for i in range(0, n, BLOCK):
        near = torch.empty((len(features[i : i + BLOCK]), 0), device=device)
        for j in range(0, n, BLOCK):
            distances = _distances(features[i : i + BLOCK], features[j : j + BLOCK], device)
            few = min(NEIGHBOUR + 1, distances.shape[1])
            near = torch.cat([near, distances.topk(few, 1, largest=False).values], 1)
        found.append(near.kthvalue(NEIGHBOUR + 1, 1).values)
    return torch.cat(found)


def _distances(a: np.ndarray, b: np.ndarray, device: torch.device) -> Tensor:
    """Squared distances of a block, float32 [n, m], rounded to float16 if all of them then are finite."""
    u, v = (torch.from_numpy(np.array(side)).to(device) for side in (a, b))
    half_u, half_v = u.half(), v.half()
    norms_u, norms_v, wide = _half_norms(half_u), _half_norms(half_v), half_v.float()
    distances = torch.empty((len(u), len(v)), device=device)
    for at in range(0, len(u), ROWS):
        products = (half_u[at : at + ROWS].float() @ wide.T).half()
        distances[at : at + ROWS] = ((norms_u[at : at + ROWS, None] - 2 * products) + norms_v).clamp(min=0)
    if distances.isfinite().all():
        return distances
    norms_u, norms_v = u.square().sum(1), v.square().sum(1)
    return torch.addmm(norms_u[:, None] + norms_v, u, v.T, alpha=-2).clamp_(min=0)


def _half_norms(x: Tensor) -> Tensor:
    """Sums of the squares of rows [n, D] in float16, in Eigen's order, every addition rounded."""
    if x.shape[1] % LANES:
        raise ValueError(f"rows of {x.shape[1]} numbers are no whole packets of {LANES}")
    return _half_sums(x * x)


def _half_sums(x: Tensor) -> Tensor:
    if x.shape[1] > LONGEST:
        middle = -(-x.shape[1] // (2 * LANES)) * LANES
        return _half_sums(x[:, :middle]) + _half_sums(x[:, middle:])
    packets = x.reshape(len(x), -1, LANES)
    whole = packets.shape[1] // ACCUMULATORS * ACCUMULATORS
    sums = x.new_zeros(len(x), ACCUMULATORS, LANES)
    for first in range(0, whole, ACCUMULATORS):
        sums = sums + packets[:, first : first + ACCUMULATORS]
    lanes = sums[:, 0]
    for rest in (*sums.unbind(1)[1:], *packets[:, whole:].unbind(1)):
        lanes = lanes + rest
    lanes = lanes.float()
    lanes = lanes[:, :4] + lanes[:, 4:]
    lanes = lanes[:, :2] + lanes[:, 2:]
    return (lanes[:, 0] + lanes[:, 1]).half()
