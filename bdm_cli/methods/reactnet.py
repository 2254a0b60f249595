"""ReActNet (arXiv:2003.03488, liuzechun/ReActNet): learned thresholds, shortcuts around every conv, RPReLU."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Size, Tensor, nn

from bdm_cli.methods.base import Layer, MeanSignMethod, closed
from bdm_cli.quant.frames import Carrying, Frame, RPReLU, Threshold, channels_shape
from bdm_cli.quant.quantizers import MeanSignWeight
from bdm_cli.quant.swap import Site, quantized_layers


class ReActUnit(Carrying, Threshold):
    """ReActNet's unit around a convolution: y = RPReLU(conv(q_a(x + b), q_w(w)) + bias + s(x)) (released code).

    s(x) is the input where the channels match, average-pooled at stride 2; where the channels double, the input twice:
    the MobileNet form's two parallel convolutions, each with a shortcut of its own, are one convolution of twice the
    channels. We do so for every multiple; elsewhere there is no shortcut (the ResNet form has a real 1x1 conv there).
    The original's BN has no place: the U-Net's group norms stay where they are, and its biases do BN's shift.

    State: threshold [C, 1, 1]; rprelu's move_1, move_2, slope [K, 1, 1] (parameters).
    """

    inside = True

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        outputs, inputs = layer.weight.shape[:2]
        self.carries = outputs % inputs == 0
        self.rprelu = RPReLU(channels_shape(layer, outputs))

    def activation(self, y: Tensor) -> Tensor:
        return self.rprelu(y)

    def activation_operations(self, written: Size) -> int:
        return self.rprelu.operations(written)


@closed
class ReActNet(MeanSignMethod):
    """1-bit weights of analytic scale; thresholds before the quantizer; shortcut and RPReLU around every convolution.

    q_w(w) = mean|w| sgn(w) per output channel (MeanSignWeight). Of 1 bit, q_a(x + b) = sgn(x + b) with Bi-Real's
    polynomial estimator; of more, LSQ as in the baseline.

    Convolutions have the whole unit, linears (attention projections, time embedding) only the threshold: the original
    binarizes nothing but convolutions, and the attention has a shortcut of its own. BiDM's released code does likewise
    with its unit. A pretrained network computes something else from the first step on, since shortcuts and slopes of
    0.25 are new to it; no gentler start is published.

    form: 'original', or 'bibench' (arXiv:2301.11233), from which BiDM's baselines probably descend: thresholds,
        estimator and scale alone, without shortcuts, RPReLU and biases. Its linears take the sign of x, not of x + b,
        and use b in the backward alone; that is taken for an oversight and not followed.
    first_step: the part of the training in which the weights stay real: the first of the original's two trainings. Its
        second starts with a new optimizer and schedule, here both go on. 0: BinaryDM and BiDM do not say that a row is
        trained twice, and all rows here have the same budget.

    Unverified: how BinaryDM made it a W1A4 row and BiDM a W1A1 row. The original's loss, cross-entropy against a
    teacher's softmax, is for classifiers and has no counterpart here. Its weight decay, 1e-5 in the first step and none
    in the second, is train.weight_decay here, one number.
    """

    form: Literal["original", "bibench"] = "original"
    first_step: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        if site.edge:
            return None
        return ReActUnit(layer) if self.form == "original" and isinstance(layer, nn.Conv2d) else Threshold(layer)

    def keep_bias(self, site: Site) -> bool:
        return site.edge or self.form == "original"

    def on_step_(self, student: nn.Module, step: int, steps: int) -> None:
        for _, layer in quantized_layers(student):
            if isinstance(layer.weight_quantizer, MeanSignWeight):
                layer.weight_is_real = step < round(self.first_step * steps)
