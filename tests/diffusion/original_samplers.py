"""The original samplers, written out slowly in float64: what bdm_cli.diffusion.sampling must reproduce.

Written from the published code, with nothing from bdm_cli or diffusers:
    CompVis/latent-diffusion ldm/models/diffusion/{ddim,plms,ddpm}.py, ldm/modules/diffusionmodules/util.py;
    CompVis/stable-diffusion ldm/models/diffusion/dpm_solver/{sampler,dpm_solver}.py (21f890f);
    ermongroup/ddim runners/diffusion.py, functions/denoising.py.
Tables that an original holds in float32 are rounded to float32 here; what follows from them is float64.

Every sampler takes a noise predictor, `eps(x, t)` on numpy arrays [N, C, H, W] with a scalar t, and for eta > 0 a
callback `noise()` that is asked once per step, after the network.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

T = 1000
Predictor = Callable[[np.ndarray, float], np.ndarray]
Noise = Callable[[], np.ndarray]


# Noise schedules: the cumulative products of 1 - beta, [1000]


def compvis_alphas(start: float, end: float) -> np.ndarray:
    """CompVis' schedule "linear", which is linear in sqrt(beta): product in float64, kept as float32."""
    betas = np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2
    return np.cumprod(1 - betas).astype(np.float32).astype(np.float64)


def ermongroup_alphas(start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Linear in beta: float64 betas cast to float32, product of float32 numbers by torch."""
    betas = torch.tensor(np.linspace(start, end, T)).float()
    return (1 - betas).cumprod(0).double().numpy()


# Lists of network times, in the order of the calls


def compvis_times(S: int) -> list[int]:
    """0, c, 2c, ... below 1000 with c = 1000 // S, each plus 1; often longer than S."""
    return [t + 1 for t in reversed(range(0, T, T // S))]


def compvis_plms_times(S: int) -> list[int]:
    """The first step asks the network a second time, at the second time of the list (the only one, if it has one)."""
    times = compvis_times(S)
    return [times[0], times[min(1, len(times) - 1)], *times[1:]]


def dpm_solver_times(S: int) -> list[float]:
    """The continuous times are evenly spaced from 1 to 1/1000; time s is the network's 1000 (s - 1/1000)."""
    return [1000 * (s - 1 / T) for s in _continuous_times(S)[:-1]]


def ermongroup_times(S: int, spacing: str) -> list[int]:
    if spacing == "uniform":
        return list(reversed(range(0, T, T // S)))
    return [int(root**2) for root in reversed(np.linspace(0, np.sqrt(T * 0.8), S))]


def _continuous_times(S: int) -> list[float]:
    return [1 + (1 / T - 1) * i / S for i in range(S + 1)]


# Samplers


def _ddim_step(x: np.ndarray, e: np.ndarray, a: float, a_prev: float, sigma: float, noise: np.ndarray) -> np.ndarray:
    x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
    return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - sigma**2) * e + sigma * noise


def _sigma(a: float, a_prev: float, eta: float) -> float:
    return eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))


def compvis_ddim(
    eps: Predictor, alphas: np.ndarray, x: np.ndarray, S: int, eta: float = 0.0, noise: Noise | None = None
) -> np.ndarray:
    """The last step, from t = 1, ends at alphas[0]; with eta > 0 it still adds noise.

    Raises: IndexError, as the original, if the list of times reaches 1000.
    """
    x, times = x.astype(np.float64), compvis_times(S)
    for i, t in enumerate(times):
        a = alphas[t]
        a_prev = alphas[times[i + 1]] if i + 1 < len(times) else alphas[0]
        e = eps(x, t)
        x = _ddim_step(x, e, a, a_prev, _sigma(a, a_prev, eta), noise() if eta else np.zeros_like(x))
    return x


def compvis_plms(eps: Predictor, alphas: np.ndarray, x: np.ndarray, S: int) -> np.ndarray:
    """Adams-Bashforth of up to order 4 on the noise; the first step is a Heun step. eta must be 0."""
    x, times, old = x.astype(np.float64), compvis_times(S), []

    def towards_previous(e: np.ndarray, i: int) -> np.ndarray:
        a_prev = alphas[times[i + 1]] if i + 1 < len(times) else alphas[0]
        return _ddim_step(x, e, alphas[times[i]], a_prev, 0.0, np.zeros_like(x))

    for i, t in enumerate(times):
        e = eps(x, t)
        if len(old) == 0:
            trial = towards_previous(e, i)
            combined = (e + eps(trial, times[min(i + 1, len(times) - 1)])) / 2
        elif len(old) == 1:
            combined = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            combined = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            combined = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = towards_previous(combined, i)
        old = [*old, e][-3:]
    return x


def dpm_solver(eps: Predictor, alphas: np.ndarray, x: np.ndarray, S: int, lower_order_below: int = 15) -> np.ndarray:
    """CompVis' wrapper: DPM-Solver++ (2M) on x_0, "midpoint" form, uniform continuous times, ending at alphas[0].

    The first step has order 1, and so has the last one if S < 15.
    """
    assert S >= 2  # as the original
    x, s = x.astype(np.float64), _continuous_times(S)

    def log_alpha(time: float) -> float:
        """log of the factor of x_0, not of its square: linear between the training steps at 1/1000, ..., 1000/1000."""
        place = time * T - 1
        left = min(max(int(place), 0), T - 2)
        low, high = 0.5 * math.log(alphas[left]), 0.5 * math.log(alphas[left + 1])
        return low + (place - left) * (high - low)

    def alpha(time: float) -> float:
        return math.exp(log_alpha(time))

    def sigma(time: float) -> float:
        return math.sqrt(1 - math.exp(2 * log_alpha(time)))

    def half_log_snr(time: float) -> float:
        return log_alpha(time) - math.log(sigma(time))

    def data(x: np.ndarray, time: float) -> np.ndarray:
        return (x - sigma(time) * eps(x, 1000 * (time - 1 / T))) / alpha(time)

    x0, older = data(x, s[0]), None
    for step in range(1, S + 1):
        start, end = s[step - 1], s[step]
        h = half_log_snr(end) - half_log_snr(start)
        first_order = older is None or (step == S and lower_order_below > S)
        correction = 0.0
        if not first_order:
            r = (half_log_snr(start) - half_log_snr(s[step - 2])) / h
            correction = (x0 - older) / r
        shrink = alpha(end) * (math.exp(-h) - 1)
        x = sigma(end) / sigma(start) * x - shrink * x0 - 0.5 * shrink * correction
        if step < S:
            older, x0 = x0, data(x, end)
    return x


def ermongroup_ddim(
    eps: Predictor,
    alphas: np.ndarray,
    x: np.ndarray,
    S: int,
    spacing: str = "uniform",
    eta: float = 0.0,
    noise: Noise | None = None,
) -> np.ndarray:
    """The step after t = 0 ends at alpha = 1. A time that follows itself is an identity step, which draws noise too."""
    x, times = x.astype(np.float64), ermongroup_times(S, spacing)
    for t, following in zip(times, [*times[1:], -1], strict=True):
        a, a_next = alphas[t], 1.0 if following == -1 else alphas[following]
        e = eps(x, t)
        x = _ddim_step(x, e, a, a_next, _sigma(a, a_next, eta), noise() if eta else np.zeros_like(x))
    return x


def guided(eps: Callable, labels: np.ndarray, unconditional: int, scale: float) -> Predictor:
    """Classifier-free guidance around eps(x, t, labels): one doubled batch, its unconditional half first."""

    def estimate(x: np.ndarray, t: float) -> np.ndarray:
        if scale == 1:
            return eps(x, t, labels)
        both = eps(np.concatenate([x, x]), t, np.concatenate([np.full_like(labels, unconditional), labels]))
        e_u, e_c = np.split(both, 2)
        return e_u + scale * (e_c - e_u)

    return estimate


# A network that is exact: images from w N(m_0, s_0^2 I) + (1 - w) N(m_1, s_1^2 I)


class Mixture(NamedTuple):
    """Two Gaussians in the space of images: weights [2], centres [2, C, H, W], standard deviations [2].

    Its noise predictor is E[eps | x_t] = sqrt(1 - a) sum_k r_k (x - sqrt(a) m_k) / v_k with v_k = a s_k^2 + 1 - a and
    r_k = softmax of log w_k - |x - sqrt(a) m_k|^2 / 2 v_k - (D / 2) log v_k. A class, 0 or 1, is one of the
    Gaussians; every other label is the mixture of both. Between integers, log a is linear in t.
    """

    weights: np.ndarray
    centres: np.ndarray
    stds: np.ndarray
    alphas: np.ndarray

    @classmethod
    def make(cls, alphas: np.ndarray, shape: tuple[int, ...] = (3, 8, 8), distance: float = 2.0) -> "Mixture":
        random = np.random.default_rng(20)
        middle = 0.5 * random.uniform(-1, 1, shape)
        apart = random.standard_normal(shape)
        apart *= distance / np.linalg.norm(apart)
        return cls(np.array([0.4, 0.6]), np.stack([middle - apart, middle + apart]), np.array([0.25, 0.3]), alphas)

    def eps(self, x: np.ndarray, t: float, labels: np.ndarray | None = None) -> np.ndarray:
        a = math.exp(np.interp(t, np.arange(T), np.log(self.alphas)))
        result = np.empty(x.shape)
        for n in range(len(x)):
            label = -1 if labels is None else int(labels[n])
            logs, directions = [], []
            for k in range(2):
                v = a * self.stds[k] ** 2 + 1 - a
                away = x[n] - math.sqrt(a) * self.centres[k]
                weight = self.weights[k] if label not in (0, 1) else float(label == k)
                log_weight = math.log(weight) if weight else -math.inf
                logs.append(log_weight - np.sum(away**2) / (2 * v) - x[n].size / 2 * math.log(v))
                directions.append(away / v)
            shares = np.exp(np.array(logs) - max(logs))
            shares /= shares.sum()
            result[n] = math.sqrt(1 - a) * (shares[0] * directions[0] + shares[1] * directions[1])
        return result


class MixtureNet(nn.Module):
    """A Mixture's predictor as a U-Net: unet(x, t [N], *context, return_dict=False) -> (eps,), float64 inside.

    context: labels, [N] or [N, 1, 1]; none = the mixture. `calls` keeps (batch, first time, labels) of every call.
    """

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.weights, self.centres, self.stds = (
            nn.Parameter(torch.tensor(values), requires_grad=False) for values in mixture[:3]
        )
        self.register_buffer("log_alphas", torch.tensor(np.log(mixture.alphas)))
        self.calls: list[tuple[int, float, list[int] | None]] = []

    def forward(self, x: Tensor, t: Tensor, *context: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert not return_dict
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        labels = context[0].reshape(len(x)).long() if context else None
        self.calls.append((len(x), float(t[0]), None if labels is None else labels.tolist()))
        left = t.long().clamp(max=T - 2)
        log_a = torch.lerp(self.log_alphas[left], self.log_alphas[left + 1], t - left)
        a = log_a.exp()[:, None]
        v = a * self.stds**2 + 1 - a  # [N, 2]
        away = x.double()[:, None] - a.sqrt()[..., None, None, None] * self.centres  # [N, 2, C, H, W]
        logits = self.weights.log() - away.square().sum((2, 3, 4)) / (2 * v) - x[0].numel() / 2 * v.log()
        if labels is not None:
            one_class = (labels == 0) | (labels == 1)
            other = one_class[:, None] & (labels[:, None] != torch.arange(2, device=x.device))
            logits = logits.masked_fill(other, -torch.inf)
        e = (1 - a).sqrt()[..., None, None] * torch.einsum("nk,nkchw->nchw", logits.softmax(1) / v, away)
        return (e.to(x.dtype),)
