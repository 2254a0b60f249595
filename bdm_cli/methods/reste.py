"""ReSTE (ICCV 2023, "Estimator Meets Equilibrium Perspective", DravenALG/ReSTE): signs with a power estimator."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bdm_cli.methods.base import Bits, Layer, Method, closed
from bdm_cli.quant.quantizers import Quantizer, SignActivation, Term, per_channel
from bdm_cli.quant.ste import sign_power_ste, sign_ste
from bdm_cli.quant.swap import Site


class PowerSign(nn.Module):
    """sgn(x) with the gradient of quant.ste.sign_power_ste, whose power grows during training.

    State: power (buffer), 1 at the start; the method's on_step_ sets it.
    """

    def __init__(self, bound: float, inner: float) -> None:
        super().__init__()
        self.bound, self.inner = bound, inner
        self.register_buffer("power", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return sign_power_ste(x, self.power, self.bound, self.inner)


class ReSteWeight(Quantizer):
    """1-bit weights with one scale per layer, through which the gradient flows.

    q(w) = m sgn(w), m = mean|w| over the whole layer of n weights. With R the estimator's slope and g = dL/dq:
    dL/dw_i = m R(w_i) g_i + sgn(w_i)/n sum_j g_j sgn(w_j); of the second term, 0 where w_i = 0.

    Shapes: w [C_out, ...]. State: estimator.power (buffer).
    """

    bits = 1

    def __init__(self, estimator: PowerSign) -> None:
        super().__init__()
        self.estimator = estimator

    def scale(self, weight: Tensor) -> Tensor:
        """m, [1, 1, ...]. A mean of the channels' means: summed in this order, threads make no difference."""
        return per_channel(weight.abs()).mean(0, keepdim=True)

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale(weight) * self.estimator(weight)

    def terms(self, weight: Tensor) -> list[Term]:
        return [Term(1, -1, sign_ste(weight), self.scale(weight).flatten())]


@closed
class ReSte(Method):
    """Signs of weights and activations; only the estimator of their gradient differs from a plain binarization.

    q(w) = mean|w| sgn(w), q(x) = sgn(x). The estimator (quant.ste.sign_power_ste) has the power
        o = 1 + (1 - cos(pi/2 step / steps)) (power_end - 1),
    the same for weights and activations: from the straight-through estimator (o = 1) towards the sign.
    Biases stay, and activations have no scale, as in the released code. All layers but the edges are binarized, with
    attention projections and time embeddings' linears; the released code has convolutions alone to binarize.

    Deviations: the power grows with every step, in the released code with every epoch. The released code trains with
    SGD and a cosine schedule, here the recipe says. At 0 the sign is +1, there 0.
    Where |w| <= inner, the weights' estimator is a constant gain that grows from 1 to 4.64 (unverified: that most of a
    pre-trained network's weights are so small). Unverified: how BiDM ran it.

    edge_bits: 32, as in BiDM's released code (the base's default is 8).
    power_end: o at the end of the training.
    bound: t, beyond which no gradient passes.
    inner: where the power function's slope is replaced by a constant, since it has none at 0.
    """

    activation_bits: Literal[1] = 1
    edge_bits: Bits = 32
    attention_matmul: Literal[False] = False
    power_end: Annotated[float, Field(ge=1)] = 3.0
    bound: Annotated[float, Field(gt=0)] = 1.5
    inner: Annotated[float, Field(gt=0)] = 0.1

    def check(self, steps: int) -> list[str]:
        if self.inner > self.bound:
            return [f"inner: is at most bound = {self.bound} (given {self.inner})"]
        return []

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer | None:
        if site.edge:
            return super().weight_quantizer(layer, site)
        return ReSteWeight(PowerSign(self.bound, self.inner))

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if site.edge:
            return super().activation_quantizer(layer, site)
        return SignActivation(PowerSign(self.bound, self.inner))

    def power(self, step: int, steps: int) -> float:
        """o after `step` of `steps` training steps; 1 where there are none."""
        progress = step / max(steps, 1)
        return 1 + (1 - math.cos(math.pi / 2 * progress)) * (self.power_end - 1)

    def on_step_(self, student: nn.Module, step: int, steps: int) -> None:
        power = self.power(step, steps)
        for module in student.modules():
            if isinstance(module, PowerSign):
                module.power.fill_(power)
