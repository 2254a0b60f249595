"""The noise loss, the taps on a U-Net's timestep blocks, and the distillation losses that methods share."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from bdm_cli.errors import BdmError
from bdm_cli.quant.swap import Block


def noise_loss(estimate: Tensor, noise: Tensor, kind: str) -> Tensor:
    """L_simple (BinaryDM, Eq. 4): 'mse' is the mean over all axes (CompVis), 'mse-sum' the sum over [C, H, W] and the
    mean over the batch (ermongroup), 'l1' the mean absolute error (LDM-8 Churches)."""
    if kind == "mse-sum":
        return (estimate - noise).square().sum(dim=(1, 2, 3)).mean()
    return F.l1_loss(estimate, noise) if kind == "l1" else F.mse_loss(estimate, noise)


class FeatureTaps:
    """Collects the outputs of timestep blocks during a forward: `taps.take()` returns them in block order.

    Make it after every deepcopy of the U-Net: a copy's hooks would feed the original's taps.
    """

    def __init__(self, unet: nn.Module, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.found: dict[int, Tensor] = {}
        self.hooks = [unet.get_submodule(b.output).register_forward_hook(self._keep(b.index)) for b in blocks]

    def _keep(self, index: int):
        def hook(module: nn.Module, inputs: tuple, result: object) -> None:
            self.found[index] = result[0] if isinstance(result, tuple) else getattr(result, "sample", result)

        return hook

    def take(self) -> list[Tensor]:
        """Features [N, C, H, W] of every tapped block since the last take."""
        features = [self.found[block.index] for block in self.blocks]
        self.found = {}
        return features

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def features_of(unet: nn.Module, blocks: Sequence[Block], batch: tuple) -> list[Tensor]:
    """The outputs of these blocks in one forward."""
    taps = FeatureTaps(unet, blocks)
    try:
        unet(*batch)
        return taps.take()
    finally:
        taps.remove()


Axis = Literal["channels", "width"]
"""What a feature's principal components are taken over: the paper's channels, or the released code's image columns."""


def components(size: int, k: float, axis: Axis = "channels") -> int:
    """round(c / K) of BinaryDM's Sec. 3.3, halves away from zero; of a width max(2, floor(W / K)) (released code)."""
    return int(size / k + 0.5) if axis == "channels" else min(size, max(2, int(size / k)))


def _rows(feature: Tensor, axis: Axis) -> Tensor:
    """A feature [N, C, H, W] with the axis in question last; the others are its rows."""
    return feature.permute(0, 2, 3, 1) if axis == "channels" else feature


def principal_basis(feature: Tensor, rank: int, axis: Axis = "channels") -> Tensor:
    """The first `rank` eigenvectors of the channels' second-moment matrix (BinaryDM, Eqs. 11-12), [C, rank].

    C = E^T E / (N h w) with the feature's positions as rows and channels as columns. Eq. 11 prints the other order,
    which would not be c x c as its text says, and no centring. Computed in float64. The sign of each vector is fixed
    (its largest entry is positive); the loss does not depend on it.

    axis 'width': as in the released code, rows of W numbers, one for each image, channel and line, and their
    covariance, [W, rank]. (There by a randomised method in two iterations, here exactly.)
    The processes of a distributed launch find one basis, from the features of all.

    Shapes: feature [N, C, H, W].
    """
    rows = _rows(feature.detach(), axis).flatten(0, 2).double()
    products, total, n = rows.T @ rows, rows.sum(0), rows.new_tensor(float(len(rows)))
    if distributed.is_available() and distributed.is_initialized():
        for part in (products, total, n):
            distributed.all_reduce(part)
    moments = products / n
    if axis == "width":
        moments -= torch.outer(total, total) / n**2
    _, vectors = torch.linalg.eigh(moments)  # ascending
    basis = vectors.flip(-1)[:, :rank]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return (basis * largest.sign()).float()


class LowRankMimicking(nn.Module):
    """L_LRM (BinaryDM, Eqs. 13-15): mean over blocks of the MSE between teacher and student in the teacher's subspace.

    L_i = mean((F_fp E_i - F_bi E_i)^2), with E_i the block's principal basis. Eq. 14 prints an unsquared norm and calls
    it a mean squared error, which is taken here. Of the 'width', the features are projected uncentred, too.

    sizes: of each block's axis. State: basis_<i> (buffers) [C_i, components], zeros until fit_.
    Raises: ValueError if no component is left for a block.
    """

    def __init__(self, sizes: Sequence[int], k: float, axis: Axis = "channels") -> None:
        super().__init__()
        self.axis: Axis = axis
        for index, size in enumerate(sizes):
            if components(size, k, axis) < 1:
                raise ValueError(f"K = {k} leaves no component of the {size} channels of block {index}")
            self.register_buffer(f"basis_{index}", torch.zeros(size, components(size, k, axis)))

    @classmethod
    @torch.no_grad()
    def of(
        cls, teacher: nn.Module, blocks: Sequence[Block], batch: tuple, k: float, axis: Axis = "channels"
    ) -> "LowRankMimicking":
        """Fitted to the teacher's features of one batch. Raises: BdmError if K (`method.lrm_k`) is too large."""
        features = features_of(teacher, blocks, batch)
        sizes = [_rows(feature, axis).shape[-1] for feature in features]
        try:
            found = cls(sizes, k, axis)
        except ValueError as error:
            most = 2 * min(sizes)
            raise BdmError(f"method.lrm_k: {error}.\n  at most {most} here, twice the narrowest block") from None
        found.to(features[0].device).fit_(features)
        return found

    @torch.no_grad()
    def fit_(self, features_fp: Sequence[Tensor]) -> None:
        """Set the bases from the teacher's features of one batch."""
        for index, feature in enumerate(features_fp):
            basis = getattr(self, f"basis_{index}")
            basis.copy_(principal_basis(feature, basis.shape[1], self.axis))

    def forward(self, features_fp: Sequence[Tensor], features_bi: Sequence[Tensor]) -> Tensor:
        losses = []
        for index, (fp, bi) in enumerate(zip(features_fp, features_bi, strict=True)):
            difference = _rows(fp - bi, self.axis)  # the projection is linear: project the difference
            losses.append((difference @ getattr(self, f"basis_{index}")).square().mean())
        return torch.stack(losses).mean()


def mimicking_mse(features_fp: Sequence[Tensor], features_bi: Sequence[Tensor]) -> Tensor:
    """L_MSE of Tables 13-14: as L_LRM without projection."""
    return torch.stack([F.mse_loss(bi, fp) for fp, bi in zip(features_fp, features_bi, strict=True)]).mean()


def patch_relations(features_fp: Sequence[Tensor], features_bi: Sequence[Tensor], patches: int) -> Tensor:
    """L_SPD (BiDM, arXiv:2412.05926, Sec. 3.3): how the rows of each patch relate, in teacher and student.

    A map is cut into p x p patches P of floor(H / p) x floor(W / p), side by side from the upper left corner on; each
    has A = P P^T over its last two axes, [N, C, floor(H / p), floor(H / p)].
    L = mean over blocks and patches of || A_fp / ||A_fp|| - A_bi / ||A_bi|| ||, with Frobenius norms over the whole of
    A, batch and channels included, not squared. Its gradient is 0 where the two agree; none reaches the teacher.

    The text's (1 / p^2) sum over patches and 1 / (2 d + 1) sum over blocks are these means. It prints patches that
    begin one pixel apart; the released code has them side by side. What a norm is taken over is the code's reading.
    A map narrower than p has no patch: its L is 0 and counts in the mean over blocks, as in the released code.

    Shapes: features [N, C, H, W], as many of the teacher as of the student.
    """
    losses = []
    for fp, bi in zip(features_fp, features_bi, strict=True):
        if min(fp.shape[2:]) < patches:
            losses.append(bi.new_zeros(()))
            continue
        a_fp, a_bi = _relations(fp.detach(), patches), _relations(bi, patches)
        losses.append(torch.linalg.vector_norm(a_fp - a_bi, dim=(1, 2, 3, 4)).mean())
    return torch.stack(losses).mean()


def _relations(feature: Tensor, patches: int) -> Tensor:
    """A / ||A|| of every patch, [p * p, N, C, h, h]."""
    h, w = (side // patches for side in feature.shape[2:])
    cut = feature[:, :, : patches * h, : patches * w].unflatten(3, (patches, w)).unflatten(2, (patches, h))
    rows = cut.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    relations = rows @ rows.transpose(-1, -2)
    norms = torch.linalg.vector_norm(relations, dim=(1, 2, 3, 4), keepdim=True)
    return relations / norms.clamp_min(1e-12)
