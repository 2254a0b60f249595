"""DoReFa-Net (arXiv:1606.06160) at one bit."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from bdm_cli.methods.base import Bits, Layer, Method, closed
from bdm_cli.quant.quantizers import Grid, MeanSignWeight, Quantizer, SignActivation
from bdm_cli.quant.ste import passing, sign_identity_ste
from bdm_cli.quant.swap import Site


class ZeroOneActivation(Quantizer):
    """DoReFa's own 1-bit activations (arXiv:1606.06160, Eq. 5 at k = 1): q(x) = round(clip(x, 0, 1)), 0 or 1.

    dq/dx = 1 if 0 <= x <= 1 else 0. Halves are rounded to even: q(0.5) = 0.
    """

    bits = 1

    def forward(self, x: Tensor) -> Tensor:
        inside = (x >= 0) & (x <= 1)
        return passing(x.clamp(0, 1).round(), x * inside)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        raise NotImplementedError("its activations are 0 and 1, where 1-bit inputs of packed layers are -1 and +1")


@closed
class DoReFa(Method):
    """1-bit weights with an analytic scale, 1-bit activations without one.

    All layers but the edges are binarized, with attention projections and time embeddings' linears.

    edge_bits: 32, as in BiDM's released code (the base's default is 8).
    form: which of two quantizers of that name.
        'bibench' (arXiv:2301.11233, its released code): q(x) = sgn(x), dq/dx = 1[|x| <= 1]; q(w) = m sgn(w), m =
        mean|w| per output channel, dq/dw = 1[|w| <= 1] (quant.quantizers.MeanSignWeight). The default, since BiDM's
        layers descend from BiBench's; unverified: that BiDM's row is this form.
        'original' (arXiv:1606.06160; tensorpack's example): q(x) = round(clip(x, 0, 1)); q(w) = E sgn(w), E = mean|w|
        over the whole layer, dq/dw = 1. It has no packed form. The clip is the example's AlexNet's; its first SVHN
        network had min(1, |x|). Its quantization of gradients is an option there and left out here.
    bias: whether layers keep their biases. Neither form's convolutions have any, so they are dropped, at the cost of
        what a pre-trained network has in them. BiBench's linear layers keep theirs, which BiDM's do not.

    Deviation: at 0 the sign is +1, in both codes 0. BiBench's linear layers let no gradient pass at |v| = 1.
    """

    activation_bits: Literal[1] = 1
    edge_bits: Bits = 32
    attention_matmul: Literal[False] = False
    form: Literal["bibench", "original"] = "bibench"
    bias: bool = False

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer | None:
        if site.edge:
            return super().weight_quantizer(layer, site)
        return MeanSignWeight() if self.form == "bibench" else MeanSignWeight("layer", sign_identity_ste)

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if site.edge:
            return super().activation_quantizer(layer, site)
        return SignActivation() if self.form == "bibench" else ZeroOneActivation()

    def keep_bias(self, site: Site) -> bool:
        return self.bias or site.edge
