"""No quantization: the papers' FP rows (with steps = 0, the teacher itself), and what pretraining trains."""

from typing import Literal

from torch import nn

from bdm_cli.methods.base import Method, closed


@closed
class FullPrecision(Method):
    """The student is the unchanged full-precision network. Both bit fields must say so."""

    activation_bits: Literal[32] = 32
    edge_bits: Literal[32] = 32

    def quantize_(self, unet: nn.Module) -> None:
        pass
