"""Two binary bases that are kept for ever: BinaryDM's first version (arXiv:2404.05662v1), and the High-Order rows."""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bdm_cli.diffusion.losses import Axis, LowRankMimicking
from bdm_cli.methods.base import Forward, Keeper, Layer, Method, closed
from bdm_cli.quant.layers import QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import EbbWeight, Quantizer
from bdm_cli.quant.swap import Block, Site, quantized_layers, sites, timestep_blocks


@closed
class HighOrder(Method):
    """The baseline with two binary bases in every layer but the edges (BinaryDM, arXiv:2404.05662, App. B.1, Eq. 18).

    w_bi = s1 sgn(w) + s2 sgn(w - s1 sgn(w)). The paper gives its size, operations and run time (Table 16), but no
    images: how it is trained is unstated, and taken to be as the baseline. Starts and gradients are EbbWeight's.
    """

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        return super().weight_quantizer(layer, site) if site.edge else EbbWeight(layer.weight)


@closed
class Lmb(Method):
    """BinaryDM's first version (arXiv:2404.05662v1): Learnable Multi-basis Binarizer, LRM, progressive binarization.

    L = L_simple + lambda * mean_i L_LRM,i; no regulariser of the second basis, which stays (what later tables call
    W1.1). v1 writes the projection on the left of the features; it is LowRankMimicking's, as in the final paper.

    Progressive binarization: a timestep block is in full precision, weights and inputs, until its turn comes, from the
    mid block outwards; after the last training step all are quantized, whatever their turn. Edges are quantized from
    the start. Activation quantizers start from the first batch with everything quantized, before the first step. The
    operands of attention products (`attention_matmul`) do not wait; in the released code they come one batch after the
    last group.
    Unverified: v1's own text; rules and equations are those of a third party's review and of the released code.

    ebb_scope: LMB is on the first and the last `ebb_scope` timestep blocks (where the feature map's side is at least
        half the input's: six on LDM-4).
    lrm_k, lrm_lambda, lrm_axis: as BinaryDM's; fitted once, on the first batch. The released code has lrm_axis 'width'.
    progressive: 'paper': the mid block at iteration 0, the two blocks i away from it at iteration i * interval.
        'released': five groups, the mid block at iteration 0, then a quarter of the way to both ends each `interval`
        (LDM-4: blocks 9-11 and 13-15 first). 'none': everything from the start.
    interval: training iterations between two turns (one in v1 and in the released code).
    """

    ebb_scope: Annotated[int, Field(ge=0)] = 6
    lrm_k: Annotated[float, Field(ge=1)] = 4
    lrm_lambda: Annotated[float, Field(ge=0)] = 1e-4
    lrm_axis: Axis = "channels"
    progressive: Literal["paper", "released", "none"] = "paper"
    interval: Annotated[int, Field(ge=1)] = 1

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        two = site.region(self.ebb_scope) in ("head", "tail")
        return EbbWeight(layer.weight) if two else super().weight_quantizer(layer, site)

    def reached(self, step: int, half: int) -> int:
        """How far from the mid block, with `half` blocks on either side, blocks are quantized at iteration `step`."""
        turns = step // self.interval
        return {"paper": turns, "released": half * turns // 4, "none": half}[self.progressive]

    def on_step_(self, student: nn.Module, step: int, steps: int) -> None:
        half = len(timestep_blocks(student)) // 2
        reached = self.reached(step, half)
        if step >= steps or reached >= half:
            for _, layer in quantized_layers(student):
                layer.weight_is_real = layer.input_is_real = False
            return
        for site, layer in sites(student):
            if isinstance(layer, QuantConv2d | QuantLinear):
                real = site.block is not None and not site.edge and abs(site.block - half) > reached
                layer.weight_is_real = layer.input_is_real = real

    def taps(self, unet: nn.Module) -> list[Block]:
        return timestep_blocks(unet)

    @torch.no_grad()
    def calibrate_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], keeper: Keeper | None = None
    ) -> None:
        batch = next(iter(batches))
        waiting = [layer for _, layer in quantized_layers(student) if layer.weight_is_real]
        for layer in waiting:
            layer.weight_is_real = layer.input_is_real = False
        super().calibrate_(student, teacher, [batch])
        for layer in waiting:
            layer.weight_is_real = layer.input_is_real = True
        self.state.projection = LowRankMimicking.of(teacher, self.taps(teacher), batch, self.lrm_k, self.lrm_axis)

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        return {"lrm": self.lrm_lambda * self.state.projection(forward.features_fp, forward.features_bi)}
