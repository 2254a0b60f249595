"""INSTA-BNN (arXiv:2204.07439): thresholds and activations that follow each image's own statistics."""

from typing import Literal

import torch
from torch import Size, Tensor, nn

from bdm_cli.methods.base import Layer, MeanSignMethod, closed
from bdm_cli.quant.frames import Carrying, Frame, RPReLU, Threshold, channels_shape
from bdm_cli.quant.swap import Site

EPS = 1e-5
"""Added to variances."""

Normalized = Literal["image", "channel"]


def third_moment(x: Tensor, normalized: Normalized) -> Tensor:
    """E[v^3] over an image's positions, per channel, v = (x - E[x]) / sqrt(Var[x] + EPS).

    normalized: what E[x] and Var[x] are taken over: the whole 'image' or each 'channel' of it.
    Shapes: [N, C, H, W] -> [N, C, 1, 1]; [N, L, C] -> [N, 1, C].
    """
    x = x.float() if x.dtype.itemsize < 4 else x  # half floats do not hold cubes
    positions, channels = ((2, 3), 1) if x.dim() == 4 else ((1,), 2)

    def average(values: Tensor) -> Tensor:
        """First over positions: one sum per image alone would be split among threads, and round by their number."""
        values = values.mean(positions, keepdim=True)
        return values.mean(channels, keepdim=True) if normalized == "image" else values

    centred = x - average(x)
    squares = centred * centred
    return (squares * centred).mean(positions, keepdim=True) * (average(squares) + EPS) ** -1.5


class InstaThreshold(Frame):
    """INSTA-Th: what is quantized is x - TH, TH = alpha_c E[v_c^3] + beta_c, of each image and channel.

    E[v^3] is `third_moment`; alpha and beta are learned and start at 0. The gradient reaches x through TH, too. TH
    depends on the input and cannot be folded into anything.

    State: alpha, beta (parameters) of channels_shape.
    """

    def __init__(self, layer: nn.Module, normalized: Normalized) -> None:
        super().__init__()
        self.normalized = normalized
        shape = channels_shape(layer, layer.weight.shape[1])
        self.alpha, self.beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def before(self, x: Tensor) -> Tensor:
        return x - (self.alpha * third_moment(x, self.normalized) + self.beta)

    def operations(self, read: Size, written: Size) -> int:
        """Per number: six of the moment (mean, difference, square, mean, cube, mean), and the subtraction."""
        return 7 * read.numel()


class InstaPReLU(nn.Module):
    """INSTA-PReLU: RPReLU whose shifts follow the image, f(y) = PReLU(y + c(y)) + d(y), slope below 0 per channel.

    Our form of what is only described in words (unverified): c = move_1 + gain_1 E[v^3], d = move_2 + gain_2 E[v^3]
    with the third moment of y. Both gains start at 0, the rest as in RPReLU.

    State: move_1, move_2, gain_1, gain_2, slope (parameters), shaped as given.
    """

    def __init__(self, shape: tuple[int, ...], normalized: Normalized) -> None:
        super().__init__()
        self.normalized = normalized
        for name in ("move_1", "move_2", "gain_1", "gain_2"):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.slope = nn.Parameter(torch.full(shape, 0.25))

    def forward(self, y: Tensor) -> Tensor:
        moment = third_moment(y, self.normalized)
        y = y + (self.move_1 + self.gain_1 * moment)
        return torch.where(y >= 0, y, self.slope * y) + (self.move_2 + self.gain_2 * moment)

    def operations(self, written: Size) -> int:
        """Six of the moment per number, and RPReLU's three."""
        return 9 * written.numel()


class InstaUnit(Carrying, InstaThreshold):
    """The unit around a convolution: y = INSTA-PReLU(conv(q_a(x - TH), q_w(w)) + bias + s(x)), as ReActNet's.

    s(x) is the input where the channels match, average-pooled at stride 2; the input repeated where there is a multiple
    of them; elsewhere there is none.
    State: alpha, beta [C, 1, 1]; those of the activation [K, 1, 1] (parameters).
    """

    inside = True

    def __init__(self, layer: nn.Conv2d, normalized: Normalized, prelu: str) -> None:
        super().__init__(layer, normalized)
        outputs, inputs = layer.weight.shape[:2]
        self.carries = outputs % inputs == 0
        shape = channels_shape(layer, outputs)
        self.prelu = InstaPReLU(shape, normalized) if prelu == "instance" else RPReLU(shape)

    def activation(self, y: Tensor) -> Tensor:
        return self.prelu(y)

    def activation_operations(self, written: Size) -> int:
        return self.prelu.operations(written)


@closed
class InstaBnn(MeanSignMethod):
    """1-bit weights of analytic scale; thresholds, and the PReLU of convolutions, that follow each image; shortcuts.

    q_w(w) = mean|w| sgn(w) per output channel (MeanSignWeight). Of 1 bit, q_a is the sign with Bi-Real's polynomial
    estimator; of more, LSQ as in the baseline, of x - TH.

    Linears have the threshold alone, as the original has convolutions only and the attention a shortcut of its own.
    The layers that bring the time embedding into a block see one position, which has no moments: a plain threshold.

    normalized: over what the third moment's input is normalized. The original's activations are batch-normalized, and
        its E[X^3] is described as a combination of an image's mean, variance and skewness. The U-Net has no batch norm.
        'image' (over channels and positions) keeps all three of a channel, relative to the image's other channels;
        'channel' leaves the skewness alone, and 0 where there is one position (class conditions).
    form: 'original', or 'threshold': thresholds alone, without shortcuts and PReLUs, around convolutions as well.
        BinaryDM prints the baseline's size for this row, and its network comes pretrained: it may have taken no more.
    prelu: of convolutions, 'instance' or 'plain' (RPReLU).

    Left out: the "+" variant's squeeze-and-excitation block, and the reuse of statistics and the skipped layers that
    limit the cost. Unverified, for no code was found and the paper's formulas could not be read: threshold and PReLU,
    the place of the shortcut (ReActNet's is taken), the weights, and how BinaryDM made it a W1A4 row.
    """

    normalized: Normalized = "image"
    form: Literal["original", "threshold"] = "original"
    prelu: Literal["instance", "plain"] = "instance"

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        if site.edge:
            return None
        if site.embedding:
            return Threshold(layer)
        if isinstance(layer, nn.Conv2d) and self.form == "original":
            return InstaUnit(layer, self.normalized, self.prelu)
        return InstaThreshold(layer, self.normalized)
