"""Method: what a paper changes in the baseline. The defaults of its hooks are the baseline row of the tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from bdm_cli.quant.quantizers import Lsq, Quantizer, SignWeight, lsq_weight
from bdm_cli.quant.swap import Block, Site, swap_attention_, swap_layers_

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 32]
Layer = nn.Conv2d | nn.Linear


@dataclass
class Forward:
    """What one training step computed, for the losses of a method.

    features_fp, features_bi: outputs [N, C, H, W] of the blocks that `Method.taps` names, of teacher and student.
    step: training steps done before this one.
    """

    student: nn.Module
    step: int
    features_fp: Sequence[Tensor] = field(default_factory=list)
    features_bi: Sequence[Tensor] = field(default_factory=list)


@pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Method:
    """The baseline (BinaryDM, arXiv:2404.05662, Sec. 3.1): 1-bit weights with learned scales, LSQ activations.

    activation_bits: of every quantized layer's input, signed, one step size per layer; 32 = not quantized.
    edge_bits: weights and inputs of the layers next to input and output (quant.swap.EDGES); 32 leaves them fp32, as the
        released code does. Their inputs stay real where activation_bits is 32.
    attention_matmul: quantize the operands of QK^T and AV too, to activation_bits (released code; the paper is silent).
    """

    activation_bits: Bits = 4
    edge_bits: Bits = 8
    attention_matmul: bool = False

    def __post_init__(self) -> None:
        self.state = nn.Module()  # what training must save beside the student: buffers, set in calibrate_

    def check(self, steps: int) -> list[str]:
        """Faults that concern several fields or the number of training steps, as 'key: message' lines."""
        return []

    def keep_fp(self, site: Site) -> bool:
        """Whether the layer is left as it is."""
        return site.edge and self.edge_bits == 32

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer | None:
        return lsq_weight(self.edge_bits, layer.weight) if site.edge else SignWeight(layer.weight)

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if self.activation_bits == 32:
            return None
        return Lsq(self.edge_bits if site.edge else self.activation_bits)

    def quantize_(self, unet: nn.Module) -> None:
        """Swap the layers of the full-precision U-Net in place."""

        def quantizers(layer: Layer, site: Site) -> tuple[nn.Module | None, nn.Module | None] | None:
            if self.keep_fp(site):
                return None
            return self.weight_quantizer(layer, site), self.activation_quantizer(layer, site)

        swap_layers_(unet, quantizers)
        if self.attention_matmul and self.activation_bits < 32:
            swap_attention_(unet, lambda operand, site: Lsq(self.activation_bits))

    @torch.no_grad()
    def calibrate_(self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple]) -> None:
        """Start every activation quantizer from the first batch: in one forward, each from what reaches it.

        batches: the positional arguments of the U-Net's forward, of successive training batches.
        """
        quantizers = [m for m in student.modules() if isinstance(m, Lsq) and m.scale.isnan().any()]
        hooks = [m.register_forward_pre_hook(lambda module, inputs: module.calibrate_(inputs[0])) for m in quantizers]
        try:
            if quantizers:
                student(*next(iter(batches)))
        finally:
            for hook in hooks:
                hook.remove()

    def trainable(self, student: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Latent weights and quantizer parameters are trained together (App. B.1)."""
        return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]

    def taps(self, unet: nn.Module) -> list[Block]:
        """The timestep blocks whose features `losses` wants from teacher and student."""
        return []

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """What is added to the noise loss, weighted, by name."""
        return {}

    def on_step_(self, student: nn.Module, step: int, steps: int) -> None:
        """Called after `step` of `steps` training steps, and once on load with the steps done. Must be idempotent."""
