"""Quantizers: modules from a tensor to a tensor of few values, with a gradient."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bdm_cli.quant.ste import lsq_ste, passing, scale_gradient, sign_ste


def per_channel(x: Tensor) -> Tensor:
    """Mean over all axes but the first, kept for broadcasting: [C_out, ...] -> [C_out, 1, ...]."""
    return x.mean(dim=tuple(range(1, x.dim())), keepdim=True)


class Term(NamedTuple):
    """sigma_c * levels: a quantized weight in whole numbers, or one of several such terms that it is the sum of.

    Shapes: levels [C_out, ...], low..low + 2^bits - 1, or +-1 (bits 1); sigma fp32 [C_out], or [1] for all.
    zero: whole numbers [C_out], of more than 1 bit: the levels of channel c lie zero_c lower than said above.
    """

    bits: int
    low: int
    levels: Tensor
    sigma: Tensor
    zero: Tensor | None = None

    @property
    def most(self) -> int:
        """Bound of |levels|."""
        return _most(self.bits, self.low, 0 if self.zero is None else self.zero)


class Grid(NamedTuple):
    """Quantized activations: step * (clip(round(x / step + zero), low, low + 2^bits - 1) - zero); of 1 bit,
    step * sgn(x - zero) (low -1).

    step: fp32 [1], or [S] with one per time at which the sampler calls the network.
    zero: an integer (of 1 bit: 0); or fp32 [S], one per time, [1] at one call: whole numbers (of 1 bit: any).
    """

    bits: int
    low: int
    zero: int | Tensor
    step: Tensor

    @property
    def most(self) -> int:
        """Bound of |activations| / step."""
        return _most(self.bits, self.low, self.zero)


def _most(bits: int, low: int, zero: int | Tensor) -> int:
    """Bound of |level - zero|, of all the zeros given; 1 of 1 bit."""
    if bits == 1:
        return 1
    zeros = torch.stack(zero.aminmax()).tolist() if isinstance(zero, Tensor) else [zero]
    return int(max(abs(end - one) for end in (low, low + 2**bits - 1) for one in zeros))


class Quantizer(nn.Module):
    """A tensor to a tensor of the same shape that takes at most 2^bits values (per channel).

    The same function in train and eval (TDQ: but for the dropout of its step sizes). If it needs data before its first
    use, it gets them through calibrate_(x).
    `terms` (of weights) and `grid` (of activations) say the same function in whole numbers, for exact sums and packing.
    """

    bits: int

    @property
    def waiting(self) -> bool:
        """Whether it must see data (calibrate_) before its first use."""
        return False

    def calibrate_(self, x: Tensor) -> None:
        """Set what depends on data from one batch. The default needs none."""

    def terms(self, weight: Tensor) -> list[Term]:
        """What the quantized weight is the sum of. Raises: NotImplementedError with the reason if it is no such sum."""
        raise NotImplementedError(f"{type(self).__name__} does not say its weights in whole numbers")

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        """Where activations go, when the sampler calls the network at `times`; None: at this very call (one step).

        Raises: NotImplementedError with the reason if they go to no even grid.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say its activations in whole numbers")


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

    def terms(self, weight: Tensor) -> list[Term]:
        return [Term(1, -1, sign_ste(weight), self.sigma.flatten())]


class MeanSignWeight(Quantizer):
    """1-bit weights whose scale is computed anew at every forward (ReActNet, BiDM, BiBench).

    q(w) = m sgn(w), m = mean|w| of the output channel or of the whole layer, without a gradient of its own;
    dq/dw is the estimator's alone, 1[|w| <= 1] by default, **without** the factor m: the released codes wrap the
    estimator around the scaled value.

    Shapes: w [C_out, ...]. State: none.
    """

    bits = 1

    def __init__(
        self, per: Literal["channel", "layer"] = "channel", estimator: Callable[[Tensor], Tensor] = sign_ste
    ) -> None:
        super().__init__()
        self.per, self.estimator = per, estimator

    def scale(self, weight: Tensor) -> Tensor:
        """m, [C_out, 1, ...] or [1, 1, ...]."""
        mean = per_channel(weight.detach().abs())
        return mean if self.per == "channel" else mean.mean(0, keepdim=True)

    def forward(self, weight: Tensor) -> Tensor:
        sign = self.estimator(weight)
        return passing(self.scale(weight) * sign.detach(), sign)

    def terms(self, weight: Tensor) -> list[Term]:
        return [Term(1, -1, sign_ste(weight), self.scale(weight).flatten())]

    def extra_repr(self) -> str:
        return f"per {self.per}"


class SignActivation(Quantizer):
    """1-bit activations: q(x) = sgn(x), with the estimator's gradient. Scale and threshold are the layer's Frame's."""

    bits = 1

    def __init__(self, estimator: Callable[[Tensor], Tensor] = sign_ste) -> None:
        super().__init__()
        self.estimator = estimator
        self.register_buffer("step", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.estimator(x)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        return Grid(1, -1, 0, self.step)


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

    @property
    def waiting(self) -> bool:
        return bool(self.scale.isnan().any())

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """s = 2 * mean|x| / sqrt(high), per channel if the scale is. Never 0, so that a silent layer stays finite."""
        mean = per_channel(x.abs()) if self.scale.dim() else x.abs().mean()
        self.scale.copy_((2 * mean / self.high**0.5).clamp_min(1e-8))

    def forward(self, x: Tensor) -> Tensor:
        s = scale_gradient(self.scale, (x.numel() * self.high) ** -0.5)
        return lsq_ste(x, s, self.zero_point, self.low, self.high)

    def terms(self, weight: Tensor) -> list[Term]:
        zero = self._zero()
        levels = (weight / self.scale + zero).round().clamp(self.low, self.high) - zero
        return [Term(self.bits, self.low - zero, levels, self.scale.flatten())]

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        if self.scale.numel() > 1:
            raise NotImplementedError("its activations have one step size per channel")
        return Grid(self.bits, self.low, self._zero(), self.scale.detach().reshape(1))

    def _zero(self) -> int:
        if not float(self.zero_point).is_integer():
            raise NotImplementedError(f"its zero point is {float(self.zero_point)}, which is no integer")
        return int(self.zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range={self.low}..{self.high}"


def lsq_weight(bits: int, weight: Tensor) -> Lsq:
    """Signed LSQ with one step size per output channel, started from the weights."""
    quantizer = Lsq(bits, scale_shape=(weight.shape[0], *[1] * (weight.dim() - 1)))
    quantizer.calibrate_(weight.detach())
    return quantizer


class EbbWeight(Quantizer):
    """Two binary bases with learned scales: stage 1 of the Evolvable-Basis Binarizer (arXiv:2404.05662, Eq. 5).

    q(w) = sI * sgn(w) + sII * sgn(r),  r = w - sI * sgn(w).
    Gradients are autograd's through the clipped STE, which is not Eq. 7 (that misprints the second case, Sec. 2.6 of
    our fidelity notes), with 1w = 1[|w| <= 1], 1r = 1[|r| <= 1]:
        dq/dsI = sgn(w) (1 - sII 1r);  dq/dsII = sgn(r);  dq/dw = sI 1w + sII 1r (1 - sI 1w).
    sI starts at mean|w|, sII at mean|r|, per output channel (l1, as in SignWeight).
    Stage 2 (Eq. 10) is a SignWeight with this sigma: see `evolved`. Kept for ever, it is the Learnable Multi-basis
    Binarizer of the paper's first version, and the high-order form of Eq. 18.

    Shapes: w [C_out, ...]; sigma, sigma_2 [C_out, 1, ...].
    State: sigma, sigma_2 (parameters).
    """

    bits = 2

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.detach()
        self.sigma = nn.Parameter(per_channel(weight.abs()))
        residual = weight - self.sigma.detach() * torch.where(weight >= 0, 1.0, -1.0)
        self.sigma_2 = nn.Parameter(per_channel(residual.abs()))

    def forward(self, weight: Tensor) -> Tensor:
        first = self.sigma * sign_ste(weight)
        return first + self.sigma_2 * sign_ste(weight - first)

    def terms(self, weight: Tensor) -> list[Term]:
        b_1 = sign_ste(weight)
        b_2 = sign_ste(weight - self.sigma * b_1)
        return [Term(1, -1, b_1, self.sigma.flatten()), Term(1, -1, b_2, self.sigma_2.flatten())]

    def evolved(self) -> SignWeight:
        """Stage 2: the same sigma (the same parameter, so its optimizer state goes on) without the second basis."""
        single = SignWeight(self.sigma)
        single.sigma = self.sigma
        return single
