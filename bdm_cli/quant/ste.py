"""Pseudo-gradients: functions whose forward is a step and whose backward is a chosen estimate."""

import torch
from torch import Tensor


class _SignClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


def sign_ste(x: Tensor) -> Tensor:
    """Sign with the clipped straight-through estimator (BinaryDM, arXiv:2404.05662, Sec. 3.2).

    sgn(x) = +1 if x >= 0 else -1;  d sgn/dx = 1 if |x| <= 1 else 0.
    The released code takes 0 at 0, which kills zero-initialised layers; every text has +1.
    """
    return _SignClip.apply(x)


class _SignPoly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (2 - 2 * x.abs()).clamp_(min=0)


def sign_poly_ste(x: Tensor) -> Tensor:
    """Sign with Bi-Real's piecewise polynomial estimator (arXiv:1808.00278, Eq. 7).

    sgn(x) = +1 if x >= 0 else -1;  d sgn/dx = 2 - 2 |x| if |x| <= 1 else 0.
    """
    return _SignPoly.apply(x)


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, source: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def passing(value: Tensor, source: Tensor) -> Tensor:
    """`value`, whose gradient goes to `source` as it is: d value/d source = 1. Shapes: equal."""
    return _Passing.apply(value.detach(), source)


def sign_identity_ste(x: Tensor) -> Tensor:
    """Sign with the plain straight-through estimator (DoReFa-Net, arXiv:1606.06160, Eq. 7): d sgn/dx = 1."""
    return passing(torch.where(x >= 0, 1.0, -1.0).to(x.dtype), x)


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, z: Tensor, low: int, high: int) -> Tensor:
        v = x / s + z
        levels = v.round().clamp_(low, high)  # as round(clip(v)), since both limits are integers
        ctx.save_for_backward(v, levels, s, z)
        ctx.low, ctx.high = low, high
        return (levels - z) * s

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        v, levels, s, z = ctx.saved_tensors
        inside = (v >= ctx.low) & (v <= ctx.high)
        by_scale = gradient * (levels - torch.where(inside, v, z))
        return gradient * inside, by_scale.sum_to_size(s.shape), None, None, None


def lsq_ste(x: Tensor, s: Tensor, z: Tensor, low: int, high: int) -> Tensor:
    """Uniform quantization with LSQ's gradients (arXiv:1902.08153, Eqs. 1-3), before the scaling of Sec. 2.2.

    q = s (round(clip(v, low, high)) - z), v = x / s + z;  dq/dx = 1[low <= v <= high];
    dq/ds = round(v) - v inside, low - z below, high - z above, summed to the shape of s. Halves are rounded to even.
    """
    return _Lsq.apply(x, s, z, low, high)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by `factor` (LSQ, arXiv:1902.08153, Sec. 2.2)."""
    return _ScaleGradient.apply(x, factor)


class _SignPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, power: Tensor, bound: float, inner: float) -> Tensor:
        ctx.save_for_backward(x, power)
        ctx.bound, ctx.inner = bound, inner
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, power = ctx.saved_tensors
        size, exponent = x.abs(), (1 - power) / power
        outer = size.clamp(min=ctx.inner) ** exponent / power
        slope = torch.where(size > ctx.inner, outer, ctx.inner**exponent)
        return gradient * slope * (size <= ctx.bound), None, None, None


def sign_power_ste(x: Tensor, power: Tensor, bound: float, inner: float) -> Tensor:
    """Sign with ReSTE's estimator, the slope of the power function sgn(x) |x|^(1/o) (ICCV 2023, DravenALG/ReSTE).

    sgn(x) = +1 if x >= 0 else -1;  with o = power >= 1, t = bound, i = inner:
    d sgn/dx = 0 if |x| > t, (1/o) |x|^((1-o)/o) if i < |x| <= t, the constant i^(1/o) / i if |x| <= i.
    At o = 1 that is 1[|x| <= t]. The constant is the power function's mean slope up to i, so that the estimate jumps
    there: from 4.64 to 1.55 at o = 3, i = 0.1. Shapes: x any; power a scalar.
    """
    return _SignPower.apply(x, power, bound, inner)
