"""LSQ (arXiv:1902.08153) with few-bit weights: the W2Ax rows of BinaryDM's tables."""

from typing import Literal

from bdm_cli.methods.base import Layer, Method, closed
from bdm_cli.quant.quantizers import Quantizer, lsq_weight
from bdm_cli.quant.swap import Site


@closed
class LsqMethod(Method):
    """Weights by signed LSQ, one learned step size per output channel; at 2 bits the levels are -2..1 steps."""

    weight_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 2

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        return lsq_weight(self.edge_bits if site.edge else self.weight_bits, layer.weight)
