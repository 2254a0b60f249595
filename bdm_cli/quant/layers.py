"""Layers with quantized weights and inputs; the same parameters under the same names as what they replace.

In eval mode and without gradients, quantized weights and inputs are multiplied as whole numbers where fp32 holds all
sums exactly, which is always so at 1 bit. Their order then makes no difference, and it should make none: a last bit can
move a 4-bit activation by a level, and that an image. So these layers do the same at any batch size and number of
threads, and so do packed bits. Half floats, which hold no such sums, are multiplied as in training.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdm_cli.quant.frames import Frame
from bdm_cli.quant.quantizers import Quantizer, Term

EXACT = 2**24
"""fp32 holds every integer up to here."""


class Parts(NamedTuple):
    """What a layer gets: quantizers (None: that tensor stays as it is), a frame, and whether it keeps its bias."""

    weight_quantizer: nn.Module | None = None
    activation_quantizer: nn.Module | None = None
    frame: Frame | None = None
    bias: bool = True


class QuantConv2d(nn.Conv2d):
    """nn.Conv2d on quantized input and weight; the bias stays real.

    y = conv2d(q_a(x), q_w(w)) + b; with a frame, y = after(x, conv2d(q_a(before(x)), q_w(w)), b)

    weight_is_real, input_is_real: not quantized for the time being. A method's on_step_ sets them, from the step alone.
    """

    weight_is_real = input_is_real = False

    def __init__(self, conv: nn.Conv2d, parts: Parts):
        with torch.device("meta"):  # the weights come from `conv`
            super().__init__(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                conv.bias is not None and parts.bias,
                conv.padding_mode,
            )
        self.weight, self.bias = conv.weight, conv.bias if parts.bias else None
        self.weight_quantizer, self.activation_quantizer, self.frame, _ = parts

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, self._conv_forward, (-1, 1, 1))


class QuantLinear(nn.Linear):
    """nn.Linear on quantized input and weight; otherwise as QuantConv2d. y = q_a(x) q_w(W)^T + b"""

    weight_is_real = input_is_real = False

    def __init__(self, linear: nn.Linear, parts: Parts):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None and parts.bias)
        self.weight, self.bias = linear.weight, linear.bias if parts.bias else None
        self.weight_quantizer, self.activation_quantizer, self.frame, _ = parts

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x, F.linear, (-1,))


def _forward(
    layer: QuantConv2d | QuantLinear, x: Tensor, multiply: Callable[..., Tensor], per_output: tuple[int, ...]
) -> Tensor:
    """multiply(q_a(x), q_w(w), b), in its frame. per_output: shape of what is one number per output channel."""
    frame = layer.frame
    if frame is None:
        return _product(layer, x, layer.bias, multiply, per_output)
    return frame.after(x, _product(layer, frame.before(x), None, multiply, per_output), layer.bias)


def _product(
    layer: QuantConv2d | QuantLinear,
    x: Tensor,
    bias: Tensor | None,
    multiply: Callable[..., Tensor],
    per_output: tuple[int, ...],
) -> Tensor:
    weight = None if layer.weight_is_real else layer.weight_quantizer
    activation = None if layer.input_is_real else layer.activation_quantizer
    a = x if activation is None else activation(x)
    half = a.dtype.itemsize < 4 or torch.is_autocast_enabled(a.device.type)
    whole = None if torch.is_grad_enabled() or layer.training or half else _whole(layer)
    if whole is None:
        return multiply(a, layer.weight if weight is None else weight(layer.weight), bias)
    step, terms = whole
    a = (a / step).round_()
    # round: NNPACK and others convolve by Winograd's transforms, which leave fractions
    parts = [multiply(a, term.levels, None).round_() * (term.sigma * step).view(per_output) for term in terms]
    if bias is not None:
        parts[0] += bias.view(per_output)
    return sum(parts[1:], start=parts[0])


def _whole(layer: QuantConv2d | QuantLinear) -> tuple[Tensor, list[Term]] | None:
    """The input's step and the weight in whole numbers, if every sum of their products is exact."""
    weight, activation = layer.weight_quantizer, layer.activation_quantizer
    if layer.weight_is_real or layer.input_is_real:
        return None
    if not (isinstance(weight, Quantizer) and isinstance(activation, Quantizer)):
        return None
    try:
        terms, grid = weight.terms(layer.weight), activation.grid()
    except NotImplementedError:
        return None
    most = layer.weight[0].numel() * terms[0].most * grid.most
    return (grid.step, terms) if most <= EXACT else None


class QuantAttnProcessor(nn.Module):
    """Attention whose two products run on quantized operands (BinaryDM's released code; the paper is silent).

    y = q_p(softmax(q_q(Q) q_k(K)^T)) q_v(V), with Q and K each multiplied by d^(-1/4) before their quantizer, d = width
    of a head; the softmax is in fp32. Takes the place of diffusers' attention processor (`attn.set_processor`).

    Shapes: hidden_states [N, C, H, W] or [N, L, C]; returns the same.
    """

    def __init__(self, q: nn.Module, k: nn.Module, probabilities: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.q_quantizer, self.k_quantizer = q, k
        self.probability_quantizer, self.v_quantizer = probabilities, v

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        # spelled out since diffusers reads the names of the parameters here, and warns about others
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None or attn.spatial_norm is not None or attn.norm_q is not None:
            raise ValueError("QuantAttnProcessor takes no mask, no spatial norm and no query norm")
        residual, shape = hidden_states, hidden_states.shape
        x = hidden_states.flatten(2).transpose(1, 2) if len(shape) == 4 else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (q, k, v))  # [N, heads, L, d]
        root = attn.scale**0.5
        scores = self.q_quantizer(q * root) @ self.k_quantizer(k * root).transpose(-1, -2)
        probabilities = scores.float().softmax(-1).to(v.dtype)
        y = self.probability_quantizer(probabilities) @ self.v_quantizer(v)
        y = attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))
        y = y.transpose(1, 2).reshape(shape) if len(shape) == 4 else y
        return (y + residual if attn.residual_connection else y) / attn.rescale_output_factor
