"""Q-DM (NeurIPS 2023, OpenReview sFGkL5BsPi): timestep-aware quantization and noise-estimating mimicking."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdm_cli.diffusion.losses import noise_loss
from bdm_cli.methods.base import Forward, Method, closed
from bdm_cli.quant.quantizers import Grid, Lsq, Quantizer
from bdm_cli.quant.swap import Site


class TaqLsq(Lsq):
    """LSQ of an attention's queries or keys after a normalisation that is undone behind it (TaQ).

    q(x) = d LSQ((x - m) / d) + m,  d = sqrt(v + epsilon), m and v the mean and the (biased) variance over the tokens of
    one image and one channel;  the gradient is autograd's through all of it.
    So the range that is quantized does not move with the timestep, whose images differ in m and v.

    Unverified: the paper's formula could not be read, only that features of attentions are normalised and smoothed
    before they are quantized. Per image and channel is the reading in which an image depends on no other one and which
    needs no running averages; it makes t known to the quantizer without a table. Of a single token (a class as
    context) m is the token itself, which is not quantized then: nor can it matter, a softmax over one key is 1.

    Shapes: x and q(x) [N, heads, tokens, channels]; m, v [N, heads, 1, channels]. State: as Lsq.
    """

    def __init__(self, bits: int, epsilon: float) -> None:
        super().__init__(bits)
        self.epsilon = epsilon

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """m and d."""
        variance, mean = torch.var_mean(x, dim=-2, correction=0, keepdim=True)
        return mean, (variance + self.epsilon).sqrt()

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        mean, deviation = self.moments(x)
        super().calibrate_((x - mean) / deviation)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.moments(x)
        return deviation * super().forward((x - mean) / deviation) + mean

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        """As a Frame's, per number: one for the mean, three for the variance, two to normalise and two to undo it."""
        return 8 * read.numel()

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        raise NotImplementedError("its queries and keys are normalised per channel and image, and lie on no one grid")


@closed
class QDm(Method):
    """The baseline with TaQ on the queries and keys of attentions, trained to the teacher's estimate (NeM).

    Weights and inputs of layers stay the baseline's, as BinaryDM's W1A4 row must have them; Q-DM's own are said to be
    of LSQ's kind, symmetric weights and asymmetric activations (unverified). The probabilities and v, which the
    products QK^T and AV need beside q and k, get plain LSQ.

    attention_matmul: TaQ is on what this quantizes, so it must be true; with taq = false it is the baseline's choice.
    taq: False: plain LSQ on q and k too, or nothing, for the ablation of NeM alone.
    taq_epsilon: epsilon of the normalisation (unverified).
    nem: the teacher's estimate is the target in place of the noise ('replace': L = |e_fp - e_bi|^2), or beside it
        ('add': L_simple + nem_weight |e_fp - e_bi|^2); which of the two Q-DM has is unverified. The distance is
        train.loss.
    """

    attention_matmul: bool = True
    taq: bool = True
    taq_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    nem: Literal["replace", "add"] = "replace"
    nem_weight: Annotated[float, Field(ge=0)] = 1.0

    def check(self, steps: int) -> list[str]:
        faults = super().check(steps)
        if self.taq and self.activation_bits < 32 and not self.attention_matmul:
            faults.append(
                "attention_matmul: TaQ stands before the quantizers of the attentions' operands; it must be true, "
                "or taq false (given false, taq = true)"
            )
        return faults

    def attention_quantizer(self, operand: str, site: Site) -> Quantizer:
        if self.taq and operand in ("q", "k"):
            return TaqLsq(self.activation_bits, self.taq_epsilon)
        return super().attention_quantizer(operand, site)

    @property
    def wants_teacher(self) -> bool:
        return True

    def target(self, forward: Forward) -> Tensor:
        return forward.estimate_fp if self.nem == "replace" else super().target(forward)

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        if self.nem == "replace":
            return {}
        distance = noise_loss(forward.estimate_bi, forward.estimate_fp, self.host.train.loss)
        return {"nem": self.nem_weight * distance}
