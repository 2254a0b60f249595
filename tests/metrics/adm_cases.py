"""Features on which OpenAI's own evaluator was run (adm_values.json), from numpy alone.

CASES[name]() -> arrays by name, float32: "a" and "b" (Frechet distance of a to b), "logits" (Inception Score),
"sample" and "ref" (precision and recall). Each is default_rng(seed).standard_normal as float32, then elementwise
float32 operations in a fixed order, so that it is the same bits everywhere; digest() is compared.
"""

import hashlib
from collections.abc import Callable

import numpy as np

f = np.float32
Arrays = dict[str, np.ndarray]


def digest(arrays: Arrays) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays.values())).hexdigest()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(f)


def mixed(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated columns of unequal spread."""
    z = normal(seed, n, d)
    x = z + f(0.5) * np.roll(z, 1, axis=1) - f(0.25) * np.roll(z, -2, axis=1)
    return x * (f(0.5) + (np.arange(d) % 7).astype(f) / f(4))


def latent(seed: int, n: int, d: int, k: int, amp: float, noise: float) -> np.ndarray:
    """Near a plane of k dimensions, which all sets share."""
    z, w = normal(seed, n, k), normal(999, k, d)
    x = f(noise) * normal(seed + 100_000, n, d)
    for i in range(k):
        x = x + f(amp) * (z[:, i : i + 1] * w[i])
    return x


def gaussians(
    d: int, n_a: int, n_b: int, seed: int, shift: float = 0, scale: float = 1, damped: bool = False
) -> Arrays:
    b = mixed(seed + 1, n_b, d)
    if damped:
        b = b[:, ::-1].copy()
        b[:, ::2] = b[:, ::2] * f(0.5)
    return {"a": mixed(seed, n_a, d), "b": b * f(scale) + f(shift)}


def manifolds(ref: np.ndarray, sample: np.ndarray) -> Arrays:
    return {"ref": ref, "sample": sample}


def rectified(d: int, n_ref: int, n: int, seed: int, k: int, amp: float, noises: tuple, shift: float) -> Arrays:
    """As after a ReLU."""
    sides = [latent(seed + i, m, d, k, amp, noises[i]) + f(shift) for i, m in enumerate((n_ref, n))]
    return manifolds(*(np.maximum(x, f(0)) for x in sides))


def ties() -> Arrays:
    """Small integers, which float16 holds: duplicates within a set and across the sets, equal distances."""
    ref = np.round(f(2) * normal(31, 900, 6))
    sample = np.round(f(1.6) * normal(32, 1100, 6) + f(0.4))
    ref[100:200] = ref[0:100]
    ref[300:340] = ref[300]
    sample[0:50] = ref[0:50]
    sample[500:505] = sample[500]
    sample[600:700] = sample[700:800]
    sample[505] = ref[300]
    return manifolds(ref + f(0), sample + f(0))  # no negative zeros


def overflow() -> Arrays:
    """Two blocks of samples; the second one has distances beyond float16."""
    sample = latent(42, 10_600, 32, 4, 0.5, 0.25) + f(2)
    sample[10_100::50] = sample[10_100::50] * f(150)
    return manifolds(latent(41, 700, 32, 4, 0.5, 0.2) + f(2), sample)


def narrow() -> Arrays:
    return manifolds(latent(51, 800, 64, 3, 0.4, 0.15), latent(52, 1000, 64, 3, 0.12, 0.13) + f(0.02))


def wide() -> Arrays:
    return manifolds(*reversed(narrow().values()))


CASES: dict[str, Callable[[], Arrays]] = {
    "fid_d5_equal": lambda: gaussians(5, 300, 400, 1001),
    "fid_d5_shift": lambda: gaussians(5, 300, 500, 1011, 0.75, 1.25, True),
    "fid_d64_equal": lambda: gaussians(64, 1500, 2000, 1021),
    "fid_d64_shift": lambda: gaussians(64, 1000, 800, 1031, 0.3, 0.8, True),
    "fid_d256_equal": lambda: gaussians(256, 2000, 2000, 1041),
    "fid_d256_shift": lambda: gaussians(256, 1500, 1200, 1051, -0.2, 1.1, True),
    "fid_d256_rank": lambda: gaussians(256, 100, 120, 1061, 0.1, 1, True),
    "fid_d256_rank_one": lambda: gaussians(256, 2000, 100, 1071, 0.1, 1, True),
    "fid_d64_rank": lambda: gaussians(64, 40, 30, 1081, 0.1, 1, True),
    "is_12000x20": lambda: {"logits": normal(2001, 12_000, 20) * f(2)},
    "is_300x10": lambda: {"logits": normal(2002, 300, 10) * f(3)},
    "is_5001x10": lambda: {"logits": normal(2003, 5001, 10) * f(2.5)},
    "pr_a": lambda: rectified(64, 1000, 1500, 11, 6, 0.2, (0.1, 0.12), 0.3),
    "pr_b": lambda: rectified(2048, 1000, 1200, 21, 12, 0.12, (0.12, 0.13), 0.35),
    "pr_c": ties,
    "pr_d": overflow,
    "pr_e": narrow,
    "pr_f": wide,
}
