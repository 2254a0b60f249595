"""BinaryDM (arXiv:2404.05662): the Evolvable-Basis Binarizer and Low-rank Representation Mimicking."""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bdm_cli.diffusion.losses import Axis, LowRankMimicking, mimicking_mse
from bdm_cli.methods.base import Forward, Keeper, Layer, Method, closed
from bdm_cli.quant.quantizers import EbbWeight, Quantizer
from bdm_cli.quant.swap import Block, Site, quantized_layers, timestep_blocks


@closed
class Ebb(Method):
    """The baseline with EBB on the head and tail blocks (row '+EBB').

    ebb_scope: EBB is on the first and the last `ebb_scope` timestep blocks (Sec. 3.2: six, where the feature map's side
        is at least half the input's).
    ebb_center: also on the mid block (Table 9, last row).
    tau: weight of L_EBB (Eq. 9).
    penalty: what L_EBB sums: sII as printed ('signed'), which has no lower bound and pushes sII on below zero, or its
        absolute value ('absolute'), which lets the second basis fade as the text says.
    transition: when the second basis is dropped: a training iteration, or below 1 a fraction of the training
        (paper: iteration 100,000 of about 200,000). 0 = single basis from the start.
    """

    ebb_scope: Annotated[int, Field(ge=0)] = 6
    ebb_center: bool = False
    tau: Annotated[float, Field(ge=0)] = 9e-2
    penalty: Literal["signed", "absolute"] = "signed"
    transition: Annotated[float, Field(ge=0)] = 0.5

    def check(self, steps: int) -> list[str]:
        if self.transition >= 1 and not self.transition.is_integer():
            return [f"transition: is an iteration or a fraction below 1 (given {self.transition})"]
        if self.transition > max(steps, 1):
            return [
                "transition: comes after the last training step "
                f"(given {self.transition:.0f}, train.steps = {steps}).\n"
                f"    give an iteration up to {steps} or a fraction below 1, e.g. 0.5"
            ]
        return []

    def transition_step(self, steps: int) -> int:
        return round(self.transition * steps if self.transition < 1 else self.transition)

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        chosen = site.region(self.ebb_scope) in ("head", "tail") or (self.ebb_center and site.middle)
        return EbbWeight(layer.weight) if chosen else super().weight_quantizer(layer, site)

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """L_EBB = tau / N * sum_i mean_c(sII_i) over the N layers that have a second basis (Eq. 9), or of |sII_i|.

        The text leaves open how a per-channel sII is reduced and whether N counts all layers: the channel mean and the
        EBB layers are taken.
        """
        bases = [layer.weight_quantizer for _, layer in quantized_layers(forward.student)]
        second = [basis.sigma_2 for basis in bases if isinstance(basis, EbbWeight)]
        if self.penalty == "absolute":
            second = [sigma.abs() for sigma in second]
        return {"ebb": self.tau * torch.stack([sigma.mean() for sigma in second]).mean()} if second else {}

    def on_step_(self, student: nn.Module, step: int, steps: int) -> None:
        if step < self.transition_step(steps):
            return
        for _, layer in quantized_layers(student):
            if isinstance(layer.weight_quantizer, EbbWeight):
                layer.weight_quantizer = layer.weight_quantizer.evolved()


@closed
class BinaryDM(Ebb):
    """EBB and LRM: L = L_simple + L_EBB + lambda * mean_i L_LRM,i (Sec. 3.3, Eq. 15).

    lrm_k: K, the reduction of a block's channels c to round(c / K) components.
    lrm_lambda: lambda. It is relative to the scale of the teacher's features: it does not carry over between networks.
    lrm_update: recompute the projection from the current batch every so many steps; 0 = never, as in the paper.
    lrm_axis: over which the components are taken: 'channels', or 'width' (released code; see principal_basis).
    distillation: 'lrm', or 'mse' for the ablation without projection (Tables 13-14).
    """

    lrm_k: Annotated[float, Field(ge=1)] = 4
    lrm_lambda: Annotated[float, Field(ge=0)] = 1e-4
    lrm_update: Annotated[int, Field(ge=0)] = 0
    lrm_axis: Axis = "channels"
    distillation: Literal["lrm", "mse"] = "lrm"

    def taps(self, unet: nn.Module) -> list[Block]:
        return timestep_blocks(unet)

    @torch.no_grad()
    def calibrate_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], keeper: Keeper | None = None
    ) -> None:
        batch = next(iter(batches))
        super().calibrate_(student, teacher, [batch])
        if self.distillation == "lrm":
            self.state.projection = LowRankMimicking.of(teacher, self.taps(teacher), batch, self.lrm_k, self.lrm_axis)

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        if self.distillation == "mse":
            mimicking = mimicking_mse(forward.features_fp, forward.features_bi)
        else:
            if self.lrm_update and forward.step and forward.step % self.lrm_update == 0:
                self.state.projection.fit_(forward.features_fp)
            mimicking = self.state.projection(forward.features_fp, forward.features_bi)
        return {**super().losses(forward), self.distillation: self.lrm_lambda * mimicking}
