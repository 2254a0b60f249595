"""XNOR-Net++ (BMVC 2019, arXiv:1909.13863): signs, and a learned scale on every layer's output."""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from bdm_cli.methods.base import Bits, Layer, Method, closed
from bdm_cli.quant.frames import Frame, channels_shape, with_bias
from bdm_cli.quant.quantizers import Quantizer, SignActivation, Term, per_channel
from bdm_cli.quant.ste import sign_ste
from bdm_cli.quant.swap import Site, meta_inputs, sites

Case = Literal[1, 2, 3, 4]


class PlainSignWeight(Quantizer):
    """1-bit weights without a scale: q(w) = sgn(w), dq/dw = 1[|w| <= 1]."""

    bits = 1

    def forward(self, weight: Tensor) -> Tensor:
        return sign_ste(weight)

    def terms(self, weight: Tensor) -> list[Term]:
        return [Term(1, -1, sign_ste(weight), weight.new_ones(1))]

    def stored(self) -> int:
        """Scales that inference needs."""
        return 0


class OutputScale(Frame):
    """y = Gamma * product + b, Gamma learned (arXiv:1909.13863). Of linears, Gamma = alpha.

    Gamma of a convolution with K output channels and maps [h, w], by case:
        1: alpha [K, 1, 1];  2: alpha [K, h, w];  3: alpha [K, 1, 1] * beta [h, w];
        4: alpha [K, 1, 1] * beta [h, 1] * gamma [1, w].
    beta and gamma start at 1, alpha at `start`.

    Shapes: product [N, K, h, w] or [N, ..., K]; start [K, 1, 1] or [K]; size (h, w), of linears None.
    State: alpha, beta, gamma (parameters), those that the case has.
    """

    def __init__(self, case: Case, start: Tensor, size: tuple[int, int] | None) -> None:
        super().__init__()
        h, w = size or (1, 1)
        whole = case == 2 and size is not None
        self.alpha = nn.Parameter(start.expand(-1, h, w).clone() if whole else start.clone())
        beta, gamma = {3: ((h, w), None), 4: ((h, 1), (1, w))}.get(0 if size is None else case, (None, None))
        self.beta = None if beta is None else nn.Parameter(torch.ones(beta))
        self.gamma = None if gamma is None else nn.Parameter(torch.ones(gamma))

    def after(self, x: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
        scale = self.alpha
        for factor in (self.beta, self.gamma):
            scale = scale if factor is None else scale * factor
        return with_bias(product * scale, bias)

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        """One product per number: Gamma is constant at inference."""
        return written.numel()


@closed
class XnorPlusPlus(Method):
    """I * W = (sgn(I) (*) sgn(W)) Gamma: no analytic scale, Gamma learned by back-propagation through OutputScale.

    Both signs have the clipped straight-through estimator. All layers but the edges are binarized; attention
    projections and time embeddings' linears have one alpha per channel. Gamma belongs to maps of one size, which are
    those of the network's `sample_size`: at another size the layers fail.

    There is no official code. The four shapes are a third party's; unverified: those of cases 2 and 3. BiBench's layer
    (arXiv:2301.11233, its released code) is case 4 from ones, with beta and gamma of 2000 numbers cut to the map's
    size, of which most are never used; here they have the map's size, found by one forward without numbers. Of its
    attention projections, which are 1-d convolutions, each position has a factor of its own as well; here as for
    linears.

    edge_bits: 32, as in BiDM's released code (the base's default is 8).
    case: the shape of Gamma; 4, the rank-1 form, is the usual one.
    start: of alpha. 'ones' is the published form. On a pre-trained network it multiplies every layer's output by about
        1 / mean|w|, a likely reason for the FID of this row in BiDM's tables. 'mean' starts at mean|w| of the channel,
        so that the first product is XNOR-Net's without K.
    bias: whether layers keep their biases. BiBench's convolutions have none, so they are dropped, at the cost of what
        a pre-trained network has in them. BiBench's linear layers keep theirs, which BiDM's do not.

    Deviation: at 0 the sign is +1, in BiBench 0. BiBench's linear layers let no gradient pass at |v| = 1.
    Unverified: that BiDM's row is BiBench's layer.
    """

    activation_bits: Literal[1] = 1
    edge_bits: Bits = 32
    attention_matmul: Literal[False] = False
    case: Case = 4
    start: Literal["ones", "mean"] = "ones"
    bias: bool = False

    def quantize_(self, unet: nn.Module) -> None:
        self.sizes = output_sizes(unet)
        super().quantize_(unet)

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer | None:
        return super().weight_quantizer(layer, site) if site.edge else PlainSignWeight()

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        return super().activation_quantizer(layer, site) if site.edge else SignActivation()

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        if site.edge:
            return None
        mean = per_channel(layer.weight.detach().abs()).view(channels_shape(layer, len(layer.weight)))
        start = mean if self.start == "mean" else torch.ones_like(mean)
        return OutputScale(self.case, start, self.sizes.get(site.name))

    def keep_bias(self, site: Site) -> bool:
        return self.bias or site.edge


@torch.no_grad()
def output_sizes(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """Height and width of every convolution's output, by name, for the network's own input size.

    One forward on the meta device: the network is neither copied nor moved, wherever it lies.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def keep(name: str):
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            sizes[name] = tuple(output.shape[2:])

        return hook

    tensors = itertools.chain(unet.named_parameters(), unet.named_buffers())
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    convs = [(site.name, layer) for site, layer in sites(unet) if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in convs]
    try:
        torch.func.functional_call(unet, empty, kwargs=meta_inputs(unet))
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
