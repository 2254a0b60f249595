"""Quantizers: modules from a tensor to a tensor of few values, with a gradient."""

import torch
from torch import Tensor, nn

from bdm_cli.quant.ste import lsq_ste, scale_gradient, sign_ste


def per_channel(x: Tensor) -> Tensor:
    """Mean over all axes but the first, kept for broadcasting: [C_out, ...] -> [C_out, 1, ...]."""
    return x.mean(dim=tuple(range(1, x.dim())), keepdim=True)


class Quantizer(nn.Module):
    """A tensor to a tensor of the same shape that takes at most 2^bits values (per channel).

    The same function in train and eval. If it needs data before its first use, it gets them through calibrate_(x).
    """

    bits: int

    def calibrate_(self, x: Tensor) -> None:
        """Set what depends on data from one batch. The default needs none."""


class SignWeight(Quantizer):
    """1-bit weights with a learned scale per output channel (BinaryDM, arXiv:2404.05662, Sec. 3.1 and Eq. 10).

    q(w) = sigma_c * sgn(w);  dq/dsigma_c = sgn(w);  dq/dw = sigma_c * 1[|w| <= 1].
    sigma starts at mean |w| of its channel: the paper writes ||w||/n and calls it an l2 norm, but only the l1 norm
    fits (reference: the released code, and Sec. 2.6 of our fidelity notes).

    Shapes: w [C_out, ...]; sigma [C_out, 1, ...].
    State: sigma (parameter).
    """

    bits = 1

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.sigma = nn.Parameter(per_channel(weight.detach().abs()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.sigma * sign_ste(weight)


class Lsq(Quantizer):
    """Uniform quantizer with a learned step size (LSQ, arXiv:1902.08153, Eqs. 1-3), for weights and activations.

    q(x) = s * (round(clip(v, low, high)) - z), v = x / s + z;  z is an integer, 0 in the symmetric form.
    dq/dx = 1 inside the clip range (its ends included), 0 outside. dq/ds = round(v) - v inside, low - z below and
    high - z above, times 1 / sqrt(n * high), n = number of elements of x (Sec. 2.2; the batch counts, as in both
    public implementations).
    Signed b bits: low = -2^(b-1), high = 2^(b-1) - 1 (BinaryDM: for every layer). Unsigned: 0 and 2^b - 1.

    Shapes: x any; s is a scalar in the unit of x, or [C, 1, ...] with one step per index of the first axis.
    State: scale (parameter), NaN until calibrate_ has seen data, so that use before is loud; zero_point (buffer).
    Raises: ValueError if bits is not in 2..8.
    """

    def __init__(self, bits: int, signed: bool = True, zero_point: int = 0, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"LSQ takes 2..8 bits, not {bits}")
        self.bits = bits
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = self.low + 2**bits - 1
        self.scale = nn.Parameter(torch.full(scale_shape, torch.nan))
        self.register_buffer("zero_point", torch.tensor(float(zero_point)))

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """s = 2 * mean|x| / sqrt(high), per channel if the scale is. Never 0, so that a silent layer stays finite."""
        mean = per_channel(x.abs()) if self.scale.dim() else x.abs().mean()
        self.scale.copy_((2 * mean / self.high**0.5).clamp_min(1e-8))

    def forward(self, x: Tensor) -> Tensor:
        s = scale_gradient(self.scale, (x.numel() * self.high) ** -0.5)
        return lsq_ste(x, s, self.zero_point, self.low, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range={self.low}..{self.high}"


def lsq_weight(bits: int, weight: Tensor) -> Lsq:
    """Signed LSQ with one step size per output channel, started from the weights."""
    quantizer = Lsq(bits, scale_shape=(weight.shape[0], *[1] * (weight.dim() - 1)))
    quantizer.calibrate_(weight.detach())
    return quantizer
