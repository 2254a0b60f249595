"""BBCU (arXiv:2210.00405, Zj-BinXia/BBCU): ReActNet's pieces with the shortcut after the activation, and everywhere."""

from typing import Literal

from torch import Size, Tensor, nn

from bdm_cli.methods.base import Layer, MeanSignMethod, closed
from bdm_cli.quant.frames import Carrying, Frame, RPReLU, Threshold, channels_shape
from bdm_cli.quant.swap import Site


class BbcuUnit(Carrying, Threshold):
    """The basic binary convolution unit: y = RPReLU(conv(sgn(x + b), q_w(w)) + bias) + s(x) (released code).

    In contrast to ReActNet's unit the activation does not touch the shortcut, so that the input passes unchanged.
    s(x) is the input, average-pooled at stride 2. With more output channels it is repeated, as the code does before its
    up-sampling; with fewer, channels are averaged, or there is none: see `Bbcu.narrowing`.
    The released convolutions have no bias; the pretrained one's is kept.

    State: threshold [C, 1, 1]; rprelu's move_1, move_2, slope [K, 1, 1] (parameters).
    """

    inside = False

    def __init__(self, layer: nn.Conv2d, narrowing: str) -> None:
        super().__init__(layer)
        outputs, inputs = layer.weight.shape[:2]
        self.carries = outputs >= inputs or narrowing == "mean"
        self.rprelu = RPReLU(channels_shape(layer, outputs))

    def activation(self, y: Tensor) -> Tensor:
        return self.rprelu(y)

    def activation_operations(self, written: Size) -> int:
        return self.rprelu.operations(written)


@closed
class Bbcu(MeanSignMethod):
    """1-bit weights of analytic scale and thresholded signs; RPReLU and then the shortcut around every convolution.

    q_w(w) = mean|w| sgn(w) per output channel (MeanSignWeight); sgn(x + b) with Bi-Real's polynomial estimator.
    Linears (attention projections, time embedding) have only the threshold: the original has none of them, and the
    attention has a shortcut of its own. The products of attentions stay real.

    narrowing: the shortcut of convolutions with fewer output than input channels. The released super-resolution
        networks have none; the U-Net's up path has one in every block, whose input is a feature and a skip connection
        side by side. 'mean': output channel c takes the mean of input channels c, c + K, ...: the repetition's
        transpose, which keeps the magnitude, since the unit's point is a path in full precision beside every binary
        convolution. 'none': no shortcut there.

    Left out: the range alignment, which multiplies the network's input by k = 130 n / 64 (n features) and divides its
    output by it. It is there for super-resolution networks without normalization and with a global shortcut, fed with
    images in 0..1. Here every block normalizes its input, so that k would cancel or, in pretrained biases, time
    embeddings and the output layer, spoil what was learned; the network is fed with noise, of both signs.
    Unverified: how BiDM treated channel-changing layers and k in its W1A1 row.
    """

    activation_bits: Literal[1] = 1
    attention_matmul: Literal[False] = False
    narrowing: Literal["mean", "none"] = "mean"

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        if site.edge:
            return None
        return BbcuUnit(layer, self.narrowing) if isinstance(layer, nn.Conv2d) else Threshold(layer)
