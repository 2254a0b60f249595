"""Frames: what methods put around a layer's product, and the parts that two or more of them use."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Frame(nn.Module):
    """What stands around a quantized layer: y = after(x, product(q_a(before(x)), q_w(w)), b). It stays in fp32.

    The default adds the bias, as a plain layer does. State: parameters and persistent buffers only.
    Shapes: x [N, C, H, W] or [N, ..., C]; product [N, K, H', W'] or [N, ..., K]; bias [K] or None.
    """

    def before(self, x: Tensor) -> Tensor:
        """What is quantized in place of the input x."""
        return x

    def after(self, x: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output. x: its input as it came."""
        return with_bias(product, bias)

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        """Additions and multiplications in full precision at inference, of inputs `read` to outputs `written`."""
        return 0

    def stored(self) -> int:
        """Numbers in fp32 that inference needs: all of its state, where it says nothing else."""
        return sum(tensor.numel() for tensor in self.state_dict().values())


def with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes: product [N, K, H, W] with bias [K], or [..., K] with [K]."""
    if bias is None:
        return product
    return product + (bias.view(-1, 1, 1) if product.dim() == 4 else bias)


def channels_shape(layer: nn.Module, channels: int) -> tuple[int, ...]:
    """Shape of one number per channel, to broadcast against a layer's inputs or outputs: [C, 1, 1], of linears [C]."""
    return (channels, 1, 1) if isinstance(layer, nn.Conv2d) else (channels,)


class Threshold(Frame):
    """A learned threshold per input channel (ReActNet's RSign, arXiv:2003.03488): what is quantized is x + b.

    The paper subtracts its threshold, the released code adds b; b starts at 0. The quantizer's estimator sees x + b.
    State: threshold (parameter) of channels_shape.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(channels_shape(layer, layer.weight.shape[1])))

    def before(self, x: Tensor) -> Tensor:
        return x + self.threshold

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        return read.numel()


class RPReLU(nn.Module):
    """ReActNet's activation (arXiv:2003.03488, Eq. 5): f(y) = PReLU(y + move_1) + move_2, slope below 0, per channel.

    The paper subtracts a first and adds a second shift; the released code adds both. slope starts at 0.25, shifts at 0.
    Shapes: as the layer's output. State: move_1, move_2, slope (parameters) of channels_shape.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.move_1 = nn.Parameter(torch.zeros(*shape))
        self.move_2 = nn.Parameter(torch.zeros(*shape))
        self.slope = nn.Parameter(torch.full(tuple(shape), 0.25))

    def forward(self, y: Tensor) -> Tensor:
        y = y + self.move_1
        return torch.where(y >= 0, y, self.slope * y) + self.move_2

    def operations(self, written: torch.Size) -> int:
        """Of one forward: two additions and one multiplication per number."""
        return 3 * written.numel()


def shortcut(x: Tensor, like: Tensor) -> Tensor:
    """A convolution's input in the shape of its output, to be added to it.

    Sides as in `resized`. More channels are x's own, repeated: channel c is x's channel c mod C. Fewer are means:
    channel c is the mean of x's channels c, c + K, c + 2K, ...
    Shapes: x [N, C, H, W] -> [N, K, H', W'], the shape of `like`.
    """
    x, given, wanted = resized(x, like), x.shape[1], like.shape[1]
    if given <= wanted:
        return x if given == wanted else x.repeat(1, -(-wanted // given), 1, 1)[:, :wanted]
    times, rest = divmod(given, wanted)
    sums = x[:, : times * wanted].unflatten(1, (times, wanted)).sum(1)
    longer = (sums[:, :rest] + x[:, times * wanted :]) / (times + 1)
    return torch.cat([longer, sums[:, rest:] / times], 1)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A feature map at the side lengths of another: average-pooled if it is larger, repeated if smaller.

    Pooled are squares side by side, as large as the sides' ratio. What is left over at the right and below is dropped,
    as with the zeros that diffusers appends there before a convolution of stride 2 (`downsample_padding` 0).

    Shapes: x [N, C, H, W] -> [N, C, H', W'] with like [N, K, H', W']; linears' [N, ..., C] as they are.
    """
    if x.dim() < 4 or x.shape[2:] == like.shape[2:]:
        return x
    if x.shape[2] < like.shape[2]:
        return F.interpolate(x, like.shape[2:], mode="nearest")
    ratio = x.shape[2] // like.shape[2]
    if [side // ratio for side in x.shape[2:]] == list(like.shape[2:]):
        return F.avg_pool2d(x, ratio)
    return F.adaptive_avg_pool2d(x, like.shape[2:])


class Carrying(Frame):
    """Mixin of frames around a convolution whose input is carried past it, with an activation f on the way.

    y = f(product + b + s(x)) if `inside`, else f(product + b) + s(x), s = `shortcut`.
    carries: whether there is s(x), which a unit's own widths decide; else y = f(product + b).
    """

    inside: ClassVar[bool]
    carries: bool

    def activation(self, y: Tensor) -> Tensor:
        """f. Shapes: as the layer's output."""
        raise NotImplementedError

    def activation_operations(self, written: torch.Size) -> int:
        """Of f, as Frame.operations."""
        raise NotImplementedError

    def after(self, x: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
        y = with_bias(product, bias)
        if not self.carries:
            return self.activation(y)
        return self.activation(y + shortcut(x, y)) if self.inside else self.activation(y) + shortcut(x, y)

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        """What stands before the product, f, and forming the shortcut and adding it; a mean of n numbers takes n."""
        found = super().operations(read, written) + self.activation_operations(written)
        if not self.carries:
            return found
        if read[2:].numel() > written[2:].numel():
            found += read.numel()
        if read[1] > written[1]:
            found += read[:2].numel() * written[2:].numel()
        return found + written.numel()
