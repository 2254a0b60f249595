"""Method: what a paper changes in the baseline. The defaults of its hooks are the baseline row of the tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

import pydantic
import torch
from torch import Tensor, nn

from bdm_cli.quant.frames import Frame
from bdm_cli.quant.layers import Parts
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, Quantizer, SignActivation, SignWeight, lsq_weight
from bdm_cli.quant.ste import sign_poly_ste
from bdm_cli.quant.swap import Block, Site, Timed, begin_trajectory_, swap_attention_, swap_layers_, tell_time_
from bdm_cli.recipe import Recipe

closed = pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
"""A method's fields are a closed table: unknown keys, other types and infinities are faults."""

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 32]
Layer = nn.Conv2d | nn.Linear


class Batch(NamedTuple):
    """One training batch.

    inputs: x_t [N, C, H, W], t int64 [N] and the condition, if any: the positional arguments of the U-Net's forward.
    noise: what L_simple compares the student's estimate with, [N, C, H, W]: the noise in x_t; along trajectories
        (`Method.data_free`) the teacher's estimate.
    clean: x_0 that x_t was made from; None along trajectories.
    """

    inputs: tuple[Tensor, ...]
    noise: Tensor
    clean: Tensor | None = None


class Keeper(Protocol):
    """Where a long calibration keeps what it has done, so that a killed one goes on (one file of the run)."""

    def read(self) -> dict[str, Tensor]:
        """What was kept last; {} if nothing was."""

    def write(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass
class Forward:
    """What one training step computed, for the losses of a method.

    estimate_bi, estimate_fp: noise estimates [N, C, H, W] of student and teacher; the teacher's only if the method
        wants_teacher.
    features_fp, features_bi: outputs [N, C, H, W] of the blocks that `Method.taps` names, of teacher and student.
    step: training steps done before this one.
    """

    student: nn.Module
    step: int
    features_fp: Sequence[Tensor] = field(default_factory=list)
    features_bi: Sequence[Tensor] = field(default_factory=list)
    batch: Batch | None = None
    estimate_bi: Tensor | None = None
    estimate_fp: Tensor | None = None


@closed
class Method:
    """The baseline (BinaryDM, arXiv:2404.05662, Sec. 3.1): 1-bit weights with learned scales, LSQ activations.

    activation_bits: of every quantized layer's input, signed, one step size per layer; 32 = not quantized.
    edge_bits: weights and inputs of the layers next to input and output (quant.swap.EDGES); 32 leaves them fp32, as the
        released code does. Their inputs stay real where activation_bits is 32.
    attention_matmul: quantize the operands of QK^T and AV too, to activation_bits (released code; the paper is silent).
    real_skips: leave the 1x1 convs on the ResBlocks' shortcuts in fp32 (BiDM's released code, at 1-bit activations).
    """

    activation_bits: Bits = 4
    edge_bits: Bits = 8
    attention_matmul: bool = False
    real_skips: bool = False

    data_free: ClassVar[bool] = False
    """Whether batches lie along the teacher's own sampling trajectories (diffusion/trajectories.py) and not on data."""
    post_training: ClassVar[bool] = False
    """Whether all happens in calibrate_: the recipe's train.steps is 0, and rehearse_ is there."""

    def __post_init__(self) -> None:
        self.state = nn.Module()  # what training must save beside the student: buffers, set in calibrate_
        self.host: Recipe | None = None  # the recipe it belongs to, set by methods.build: its schedule, sampler, budget

    def check(self, steps: int) -> list[str]:
        """Faults that concern several fields or the number of training steps, as 'key: message' lines."""
        if self.attention_matmul and self.activation_bits == 1:
            return ["attention_matmul: no method here says what 1-bit operands are (given true); it must be false"]
        return []

    def keep_fp(self, site: Site) -> bool:
        """Whether the layer is left as it is."""
        return (site.edge and self.edge_bits == 32) or (site.skip and self.real_skips)

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer | None:
        return lsq_weight(self.edge_bits, layer.weight) if site.edge else SignWeight(layer.weight)

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if self.activation_bits == 32:
            return None
        return Lsq(self.edge_bits if site.edge else self.activation_bits)

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        """What stands around the layer's product."""
        return None

    def keep_bias(self, site: Site) -> bool:
        return True

    def parts(self, layer: Layer, site: Site) -> Parts | None:
        """All that a layer gets; None: it is left as it is."""
        if self.keep_fp(site):
            return None
        weight, activation = self.weight_quantizer(layer, site), self.activation_quantizer(layer, site)
        return Parts(weight, activation, self.frame(layer, site), self.keep_bias(site))

    def quantize_(self, unet: nn.Module) -> None:
        """Swap the layers of the full-precision U-Net in place. It may lie on the meta device."""
        swap_layers_(unet, self.parts)
        if self.attention_matmul and self.activation_bits < 32:
            swap_attention_(unet, self.attention_quantizer)
        if any(isinstance(module, Timed) for module in unet.modules()):
            tell_time_(unet)

    def attention_quantizer(self, operand: str, site: Site) -> Quantizer:
        """Of an operand ('q', 'k', 'probabilities', 'v') of an attention's products, where these are quantized."""
        return Lsq(self.activation_bits)

    @torch.no_grad()
    def calibrate_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], keeper: Keeper | None = None
    ) -> None:
        """Start every activation quantizer from the first batch: in one forward, each from what reaches it.

        batches: the positional arguments of the U-Net's forward, of successive training batches (`data_free`: of
            successive calls along one trajectory after the other).
        keeper: for calibrations that take long (post-training methods); None: nothing is kept.
        """
        quantizers = [m for m in student.modules() if isinstance(m, Quantizer) and m.waiting]
        hooks = [m.register_forward_pre_hook(lambda module, inputs: module.calibrate_(inputs[0])) for m in quantizers]
        try:
            if quantizers:
                student(*next(iter(batches)))
        finally:
            for hook in hooks:
                hook.remove()
        begin_trajectory_(student)

    def rehearse_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], iterations: int
    ) -> dict[str, float]:
        """A short calibrate_ that is told from its whole length: of post-training methods, for `bdm train --rehearse`.

        Returns what is to be printed, by column: the batch, iterations, seconds and the hours of the recipe's own.
        """
        raise NotImplementedError("what is trained is rehearsed by training steps")

    def trainable(self, student: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Latent weights and quantizer parameters are trained together (App. B.1)."""
        return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]

    def lr_factors(self, student: nn.Module) -> dict[str, float]:
        """By what a parameter's learning rate differs from train.lr: name -> factor; 1 where a name is missing."""
        return {}

    @property
    def wants_teacher(self) -> bool:
        """Whether `target` or `losses` read the teacher's estimate. Features of `taps` come without this."""
        return False

    def taps(self, unet: nn.Module) -> list[Block]:
        """The timestep blocks whose features `losses` wants from teacher and student."""
        return []

    def before_step_(self, student: nn.Module, batch: Batch) -> None:
        """Called before the student's forward of every training step."""

    def target(self, forward: Forward) -> Tensor:
        """What L_simple compares the student's estimate with."""
        return forward.batch.noise

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        """What is added to the noise loss, weighted, by name."""
        return {}

    def on_step_(self, student: nn.Module, step: int, steps: int) -> None:
        """Called after `step` of `steps` training steps, and once on load with the steps done. Must be idempotent."""


@closed
class MeanSignMethod(Method):
    """What ReActNet and its descendants share beside the edges, which are the baseline's; no row of a table by itself.

    q_w(w) = mean|w| sgn(w) per output channel (MeanSignWeight). Of 1 bit, q_a is the sign with Bi-Real's polynomial
    estimator; of more, LSQ as in the baseline.
    """

    activation_bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] = 4

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer | None:
        return super().weight_quantizer(layer, site) if site.edge else MeanSignWeight()

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if site.edge or self.activation_bits > 1:
            return super().activation_quantizer(layer, site)
        return SignActivation(sign_poly_ste)
