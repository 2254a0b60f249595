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


class _RoundIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer (halves to even), with gradient 1 everywhere. Exactly integers, unlike
    x + (round(x) - x).detach(), which is off by an ulp."""
    return _RoundIdentity.apply(x)


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
