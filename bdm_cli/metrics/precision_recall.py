"""Improved precision and recall (arXiv:1904.06991, Sec. 2) on pooled features, as ADM has them.

The manifold of a set is the union of one ball per image, which reaches to its 3rd nearest neighbour in the set (the
4th smallest of the squared distances to the set with itself). Precision: share of samples in some ball of the
reference; recall: share of reference images in some ball of the samples. What lies on a ball's surface is inside (<=).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from bdm_cli.errors import BdmError

NEIGHBOUR = 3
KEPT = NEIGHBOUR + 5
"""Nearest images kept per image while the blocks pass by; more than NEIGHBOUR + 1, to see what is nearly as near."""
BLOCK = 4096
"""Images on each side of a block of distances: 64 MiB in float32."""
FEW = 256
"""Images at a time whose near ones are all taken directly."""
PAIRS = 2**22
"""Numbers held at once for distances taken directly."""


@dataclass(frozen=True, eq=False)
class Coverage:
    """inside [M]: which samples lie in the reference's manifold. reached [N]: which of the reference in theirs."""

    inside: np.ndarray
    reached: np.ndarray

    @property
    def precision(self) -> float:
        """In percent."""
        return 100 * float(self.inside.mean())

    @property
    def recall(self) -> float:
        """In percent."""
        return 100 * float(self.reached.mean())


def exact(
    samples: np.ndarray, reference: np.ndarray, device: torch.device, of_reference: np.ndarray | None = None
) -> Coverage:
    """Coverage of float32 features [M, D] and [N, D], as if all distances were taken directly in float64.

    Blocks of distances come from matrix products in float32, |u|^2 - 2 u.v + |v|^2, whose error is bounded; only what
    lies within that bound of a decision is taken again, directly and in float64. So the result depends on neither
    blocks nor device, copies of an image are at distance 0 and ties are ties.

    of_reference: the reference's radii, if they are known.
    Memory: blocks, beside the features. Raises: BdmError for fewer than four images on a side; ValueError for features
    whose squares are beyond float32.
    """
    of_reference = radii(reference, device) if of_reference is None else of_reference
    return _covered(samples, reference, radii(samples, device), of_reference, device)


def require_enough(*sides: np.ndarray) -> None:
    """Raises: BdmError if a set has no 3rd nearest neighbours."""
    for side in sides:
        if len(side) <= NEIGHBOUR:
            raise BdmError(
                f"precision and recall need at least {NEIGHBOUR + 1} images on each side, given {len(side)}.\n"
                "  sample more images, or leave them out of evaluate.metrics"
            )


def torch_fidelity(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Precision and recall in percent by torch-fidelity's own code: the same definition, distances in float32."""
    sides = (torch.from_numpy(np.array(side)) for side in (samples, reference))
    found = prc_features_to_metric(*sides, save_cpu_ram=True, verbose=False)
    return 100 * found[KEY_METRIC_PRECISION], 100 * found[KEY_METRIC_RECALL]


def radii(features: np.ndarray, device: torch.device) -> np.ndarray:
    """Squared distance of each image to its 3rd nearest neighbour in the set [N], float64, direct.

    Raises: BdmError for fewer than four images; ValueError for features whose squares are beyond float32.
    """
    require_enough(features)
    n, result = len(features), np.empty(len(features))
    todo = np.arange(n)
    for dtype in (torch.float32, torch.float64):  # in float64, what is too close together for float32
        blocks = _Blocks(features, device, dtype)
        near, which = _nearest(blocks, None if len(todo) == n else todo)
        found, certain = _refined(features, todo, near, which, blocks.tolerance(todo))
        result[todo[certain]] = found[certain]
        left = np.flatnonzero(~certain)
        edges, todo = near[left, NEIGHBOUR] + 2 * blocks.tolerance(todo)[left], todo[left]
        if not len(todo):
            return result
    for first in range(0, len(todo), FEW):  # more ties than are kept
        rows = todo[first : first + FEW]
        row, column = _within(blocks, rows, edges[first : first + FEW])
        direct = _pairs(features, features, rows[row], column)
        order = np.lexsort((direct, row))
        starts = np.searchsorted(row[order], np.arange(len(rows)))
        result[rows] = direct[order][starts + NEIGHBOUR]
    return result


class _Blocks:
    """Features around their mean (distances do not change, rounding does), a block at a time on a device."""

    def __init__(
        self, features: np.ndarray, device: torch.device, dtype: torch.dtype, centre: np.ndarray | None = None
    ):
        self.features, self.device, self.dtype = features, device, dtype
        self.starts = range(0, len(features), BLOCK)
        if centre is None:
            centre = sum(features[at : at + BLOCK].sum(0, dtype=np.float64) for at in self.starts) / len(features)
        self.centre = centre
        self._shift = torch.from_numpy(self.centre.astype(np.float32)).to(device, dtype)
        self.norms = torch.cat([self[at].square().sum(1) for at in self.starts])
        if not self.norms.isfinite().all():
            raise ValueError(f"squares of these features are beyond {dtype}")

    def __getitem__(self, start: int) -> Tensor:
        return self.of(slice(start, start + BLOCK))

    def of(self, which: slice | np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(self.features[which])).to(self.device, self.dtype) - self._shift

    @property
    def unit(self) -> float:
        """Error of a squared distance, relative to |u|^2 + |v|^2: of sums of D products in any order, and of norms."""
        return (2 * self.features.shape[1] + 64) * torch.finfo(self.dtype).eps / 2

    def tolerance(self, which: np.ndarray) -> np.ndarray:
        """Bound of the error of the distances of some images to any other of the set."""
        norms = self.norms.double().cpu().numpy()
        return self.unit * (norms[which] + norms.max())


def _nearest(blocks: _Blocks, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Approximate squared distances to the KEPT nearest images of the set, ascending, and which these are [n, KEPT].

    rows: of these images only; None = of all, where each block of distances serves both its sides.
    """
    n, kept = len(blocks.features), min(KEPT, len(blocks.features))
    count = n if rows is None else len(rows)
    near = torch.full((count, kept), torch.inf, dtype=blocks.dtype, device=blocks.device)
    which = torch.zeros((count, kept), dtype=torch.int64, device=blocks.device)

    def update(at: slice, distances: Tensor, first: int) -> None:
        few = min(kept, distances.shape[1])
        found, place = distances.topk(few, dim=1, largest=False)
        both, places = torch.cat([near[at], found], 1), torch.cat([which[at], place + first], 1)
        near[at], order = both.topk(kept, dim=1, largest=False)
        which[at] = places.gather(1, order)

    for i in range(0, count, BLOCK):
        mine = slice(i, min(i + BLOCK, count))
        u = blocks[i] if rows is None else blocks.of(rows[mine])
        norms = blocks.norms[mine] if rows is None else u.square().sum(1)
        for j in blocks.starts if rows is not None else range(i, n, BLOCK):
            theirs = slice(j, min(j + BLOCK, n))
            distances = torch.addmm(norms[:, None] + blocks.norms[None, theirs], u, blocks[j].T, alpha=-2)
            update(mine, distances, j)
            if rows is None and j > i:
                update(theirs, distances.T.contiguous(), i)
    near, order = near.sort(dim=1)
    return near.double().cpu().numpy(), which.gather(1, order).cpu().numpy()


def _within(blocks: _Blocks, rows: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which images may lie within `edges` (squared distances) of each row: places in `rows`, ascending, and images."""
    u = blocks.of(rows)
    norms, limit = u.square().sum(1), torch.from_numpy(edges).to(blocks.device)
    found = []
    for j in blocks.starts:
        distances = torch.addmm(norms[:, None] + blocks.norms[None, j : j + BLOCK], u, blocks[j].T, alpha=-2)
        row, column = (distances <= limit[:, None]).nonzero(as_tuple=True)
        found.append((row.cpu().numpy(), column.cpu().numpy() + j))
    row, column = (np.concatenate(side) for side in zip(*found, strict=True))
    order = np.argsort(row, kind="stable")
    return row[order], column[order]


def _refined(
    features: np.ndarray, rows: np.ndarray, near: np.ndarray, which: np.ndarray, tolerance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The 3rd neighbour's distance of each row, direct; and whether it is certain to be that one.

    Of the kept images those are taken again that may be the 3rd neighbour; it is uncertain if the farthest kept is one.
    """
    edge, far = near[:, NEIGHBOUR], 2 * tolerance
    nearer = (near < (edge - far)[:, None]).sum(1)
    open_ = (near >= (edge - far)[:, None]) & (near <= (edge + far)[:, None])
    row, column = np.nonzero(open_)
    direct = np.full(near.shape, np.inf)
    direct[row, column] = _pairs(features, features, rows[row], which[row, column])
    found = np.sort(direct, axis=1)[np.arange(len(rows)), NEIGHBOUR - nearer]
    whole = near.shape[1] == len(features)
    return found, whole | (near[:, -1] > edge + far) | (found == 0)


def _covered(
    samples: np.ndarray, reference: np.ndarray, of_samples: np.ndarray, of_reference: np.ndarray, device: torch.device
) -> Coverage:
    """Which points of each side lie in a ball of the other, from one pass over the blocks of distances."""
    theirs = _Blocks(reference, device, torch.float32)
    mine = _Blocks(samples, device, torch.float32, theirs.centre)
    inside, reached = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    reach = [torch.from_numpy(r).to(device, torch.float32) for r in (of_samples, of_reference)]
    for i in mine.starts:
        u, at = mine[i], slice(i, min(i + BLOCK, len(samples)))
        for j in theirs.starts:
            to = slice(j, min(j + BLOCK, len(reference)))
            products = torch.mm(u, theirs[j].T).mul_(-2)

            def in_a_ball(point: np.ndarray, ball: np.ndarray, i: int = i, j: int = j) -> np.ndarray:
                return _pairs(samples, reference, point + i, ball + j) <= of_reference[ball + j]

            def reached_from(point: np.ndarray, ball: np.ndarray, i: int = i, j: int = j) -> np.ndarray:
                return _pairs(samples, reference, ball + i, point + j) <= of_samples[ball + i]

            norms_u, norms_v = mine.norms[at], theirs.norms[to]
            _mark(inside[at], products, norms_u, norms_v, reach[1][to], mine.unit, in_a_ball)
            _mark(reached[to], products.T, norms_v, norms_u, reach[0][at], mine.unit, reached_from)
    return Coverage(inside, reached)


def _mark(
    covered: np.ndarray,
    products: Tensor,
    norms: Tensor,
    norms_of_balls: Tensor,
    reach: Tensor,
    unit: float,
    check: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """Set covered [P] where a point lies in one of the balls of a block. products: -2 u.v [P, B].

    check(points, balls): of such pairs, by direct distances.
    """
    beyond = products + (norms_of_balls - reach)  # squared distance minus reach, but for the point's own norm
    least = beyond.amin(1) + norms
    tolerance = unit * (norms + (norms_of_balls + reach).max())
    covered |= (least <= -tolerance).cpu().numpy()
    rows = np.flatnonzero((least <= tolerance).cpu().numpy() & ~covered)
    covered[rows] = check(rows, beyond[torch.from_numpy(rows).to(products.device)].argmin(1).cpu().numpy())
    rows = rows[~covered[rows]]
    step = max(1, PAIRS // max(1, products.shape[1]))
    for first in range(0, len(rows), step):
        some = torch.from_numpy(rows[first : first + step]).to(products.device)
        close = beyond[some] + norms[some, None] <= tolerance[some, None]
        point, ball = (side.cpu().numpy() for side in close.nonzero(as_tuple=True))
        points = rows[first : first + step][point]
        covered[points[check(points, ball)]] = True


def _pairs(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Squared distances of a[i] to b[j], direct, some at a time."""
    step = max(1, PAIRS // a.shape[1])
    parts = [_direct(a[i[k : k + step]], b[j[k : k + step]]) for k in range(0, len(i), step)]
    return np.concatenate(parts) if parts else np.empty(0)


def _direct(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of rows, float64. A row's sum is the same whatever rows stand beside it."""
    return np.square(a.astype(np.float64) - b).sum(1)
