"""XNOR-Net (arXiv:1603.05279): signs with analytic scales of weights and inputs."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdm_cli.methods.base import Bits, Layer, Method, closed
from bdm_cli.quant.frames import Frame, with_bias
from bdm_cli.quant.quantizers import MeanSignWeight, Quantizer, SignActivation
from bdm_cli.quant.ste import passing, sign_ste
from bdm_cli.quant.swap import Site, quantized_layers


class XnorWeight(MeanSignWeight):
    """1-bit weights whose gradient is the official code's (allenai/XNOR-Net, `updateBinaryGradWeight`).

    q(w) = m sgn(w), m = mean|w| of the output channel's n weights, without a gradient of its own;
    dq/dw = (m 1[|w| < 1] + 1/n) (1 - 1/C_in).

    Shapes: w [C_out, C_in, ...]. State: none.
    """

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.scale(weight)
        slope = (scale * (weight.detach().abs() < 1) + 1 / weight[0].numel()) * (1 - 1 / weight.shape[1])
        return passing(scale * sign_ste(weight.detach()), weight * slope)

    @torch.no_grad()
    def centre_(self, weight: Tensor) -> None:
        """Subtract each filter's mean over its input channels, per tap, then clamp to [-1, 1]."""
        weight.sub_(weight.mean(1, keepdim=True)).clamp_(-1, 1)


class InputScale(Frame):
    """y = K product + b, K the analytic scale of the binarized input.

    per 'map': of convolutions, A = mean |x| over channels, K = A * k with k the box filter 1 / (kh kw) at the layer's
        stride and padding (zeros count); of linears, K = mean |x| of each row. dK/dx is autograd's unless `detached`.
    per 'sample': K = mean |x| of each image over all else, detached. The gradient that x gets through the signs lacks
        the factor K, as in BiBench, which wraps the estimator around K sgn(x).

    Shapes: x [N, C, H, W] or [N, ..., C]; K [N, 1, H', W'] or [N, ..., 1], per sample [N, 1, ...].
    State: none; the filter is constant.
    """

    def __init__(self, layer: Layer, per: Literal["map", "sample"], detached: bool) -> None:
        super().__init__()
        self.per, self.detached = per, detached
        conv = isinstance(layer, nn.Conv2d)
        self.window = (layer.kernel_size, layer.stride, layer.padding) if conv else None

    def scale(self, x: Tensor) -> Tensor:
        """K. Contiguous and axis after axis: neither batch, threads nor memory format change the order of its sums."""
        size = (x.detach() if self.detached or self.per == "sample" else x).abs().contiguous()
        if self.per == "sample":
            while size.dim() > 1:
                size = size.mean(1)
            return size.view(-1, *[1] * (x.dim() - 1))
        if self.window is None:
            return size.mean(-1, keepdim=True)
        return F.avg_pool2d(size.mean(1, keepdim=True), *self.window)

    def before(self, x: Tensor) -> Tensor:
        if self.per == "map" or not torch.is_grad_enabled():
            return x
        return passing(x, x / self.scale(x).clamp(min=1e-8))

    def after(self, x: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
        return with_bias(product * self.scale(x), bias)

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        """The mean of |x|, the filter at every place of the output, and one product per number."""
        filtered = 0
        if self.per == "map" and self.window is not None:
            (kh, kw), places = self.window[0], written.numel() // written[1]
            filtered = kh * kw * places
        return read.numel() + filtered + written.numel()


@closed
class Xnor(Method):
    """I * W = (sgn(I) (*) sgn(W)) K alpha (BiDM, arXiv:2412.05926, Eq. 9): K of the input, alpha = mean|w| per filter.

    Activations have the clipped straight-through estimator. All layers but the edges are binarized, with attention
    projections and time embeddings' linears. XNOR-Net's own order, normalisation -> sign -> convolution, is the
    networks' already, with a SiLU between the first two.

    edge_bits: 32, as in BiDM's released code (the base's default is 8).
    scale: K, see InputScale.
        'map': the paper's, A = mean |I| over channels, K = A * k with a fixed box filter k, as in Eq. 9.
        'sample': BiBench's (arXiv:2301.11233, its released code): mean |x| of each image.
        'none': K = 1, XNOR-Net's official code.
    linear_scale: K of linears (attention projections, time embedding), where convolutions have one: mean |x| per 'row',
        as BiBench's, or 'none', as the linears and the 1-d convolutions of BiDM's released code.
    gradient: whether it flows into the input through the K of 'map'. 'through' is Eq. 9 as it stands, and what BiDM's
        learned filter does; 'detached' as in BiBench. Unverified: what XNOR-Net's paper did.
    weights: their gradient and what is done to them.
        'analytic': alpha detached, dq/dw = 1[|w| <= 1] (quant.quantizers.MeanSignWeight), as in BiBench and BiDM.
        'official': XNOR-Net's training: after every step and before the first, each filter's mean over its input
            channels is subtracted and the latent weights are clamped to [-1, 1]; the gradient is XnorWeight's. Further
            factors, n under SGD and 1e9 under Adam, are left out: AdamW does not see them, but clipping would.
    bias: whether layers keep their biases. BiDM's binary layers and BiBench's convolutions have none, so they are
        dropped, at the cost of what a pre-trained network has in them. The official code's convolutions have them.

    Deviations: at 0 the sign is +1, in all three codes 0. The official code lets no gradient pass at |x| = 1. BiBench's
    linear layers subtract the row's mean from the weights at every forward, keep the factor K in the gradient of
    'sample', and have biases; BiDM's, which descend from them, do neither, and 'sample' treats all layers alike.
    Unverified: that BiDM's row is Eq. 9 with nothing else; whether it had BiDM's shortcut around every convolution is
    not stated.
    """

    activation_bits: Literal[1] = 1
    edge_bits: Bits = 32
    attention_matmul: Literal[False] = False
    scale: Literal["map", "sample", "none"] = "map"
    linear_scale: Literal["row", "none"] = "row"
    gradient: Literal["through", "detached"] = "through"
    weights: Literal["analytic", "official"] = "analytic"
    bias: bool = False

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer | None:
        if site.edge:
            return super().weight_quantizer(layer, site)
        return MeanSignWeight() if self.weights == "analytic" else XnorWeight()

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        return super().activation_quantizer(layer, site) if site.edge else SignActivation()

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        plain = self.scale == "none" or (isinstance(layer, nn.Linear) and self.linear_scale == "none")
        if site.edge or plain:
            return None
        return InputScale(layer, self.scale, self.gradient == "detached")

    def keep_bias(self, site: Site) -> bool:
        return self.bias or site.edge

    def on_step_(self, student: nn.Module, step: int, steps: int) -> None:
        """Repeated, it changes weights by rounding alone, unless the clamp acts."""
        for _, layer in quantized_layers(student):
            if isinstance(layer.weight_quantizer, XnorWeight):
                layer.weight_quantizer.centre_(layer.weight)
