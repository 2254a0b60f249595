"""Quantizers with zero points as methods may have them: of weights by channel, of activations by sampling time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bdm_cli.quant.quantizers import Grid, Quantizer, Term


class ZeroWeight(Quantizer):
    """w = s_c (q - z_c), q in 0..2^b - 1."""

    def __init__(self, weight: Tensor, bits: int = 4) -> None:
        super().__init__()
        self.bits = bits
        rows = weight.detach().flatten(1)
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        shape = (-1, *[1] * (weight.dim() - 1))
        self.sigma = nn.Parameter(((high - low) / (2**bits - 1)).view(shape))
        self.register_buffer("zero", (-low.view(shape) / self.sigma.detach()).round())

    def levels(self, weight: Tensor) -> Tensor:
        return (weight / self.sigma + self.zero).round().clamp(0, 2**self.bits - 1) - self.zero

    def forward(self, weight: Tensor) -> Tensor:
        return self.levels(weight) * self.sigma

    def terms(self, weight: Tensor) -> list[Term]:
        return [Term(self.bits, 0, self.levels(weight), self.sigma.flatten(), self.zero.flatten())]


class TimedZero(Quantizer):
    """Activations whose step and zero point (1 bit: threshold) are those of the index-th sampling time."""

    def __init__(self, bits: int, steps: Sequence[float], zeros: Sequence[float]) -> None:
        super().__init__()
        self.bits, self.index = bits, 0
        self.low = -1 if bits == 1 else 0
        self.register_buffer("steps", torch.tensor(steps))
        self.register_buffer("zeros", torch.tensor(zeros))

    def forward(self, x: Tensor) -> Tensor:
        step, zero = self.steps[self.index], self.zeros[self.index]
        if self.bits == 1:
            return step * torch.where(x >= zero, 1.0, -1.0)
        return step * ((x / step + zero).round().clamp(0, 2**self.bits - 1) - zero)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        chosen = slice(self.index, self.index + 1) if times is None else slice(len(times))
        return Grid(self.bits, self.low, self.zeros[chosen], self.steps[chosen])
