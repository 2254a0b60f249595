"""Pseudo-gradients against their formulas."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm_cli.quant.ste import lsq_ste, scale_gradient, sign_ste

UP = np.nextafter(1.0, 2.0)
POINTS = [-3.0, -UP, -1.0, -0.5, -1e-300, -0.0, 0.0, 1e-300, 0.5, 1.0, UP, 3.0]


def test_sign_is_plus_one_at_zero_and_its_gradient_passes_up_to_one():
    x = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(-2, 2, len(POINTS), dtype=torch.float64)
    y = sign_ste(x)
    y.backward(upstream)
    assert y.tolist() == [-1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1]
    passes = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    assert x.grad.tolist() == (upstream.numpy() * passes).tolist()


def test_sign_leaves_the_incoming_gradient_alone():
    x = torch.tensor([2.0, 0.5], requires_grad=True)
    upstream = torch.tensor([3.0, 4.0])
    sign_ste(x).backward(upstream)
    assert upstream.tolist() == [3, 4]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.integers(0, 2**32 - 1))
def test_sign_keeps_shape_and_dtype(dtype: torch.dtype, seed: int):
    x = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = sign_ste(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.equal(y.abs(), torch.ones_like(y))


def test_lsq_rounds_halves_to_even_and_passes_the_gradient_inside():
    x = torch.tensor([-9.0, -2.5, -1.5, -0.49, 0.5, 1.5, 2.51, 7.9999], requires_grad=True)
    y = lsq_ste(x, torch.tensor(1.0), torch.tensor(0.0), -8, 7)
    y.backward(torch.arange(1.0, 9.0))
    assert y.tolist() == [-8, -2, -2, 0, 0, 2, 3, 7]
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]


def test_scale_gradient_is_the_identity_with_a_scaled_gradient():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.backward(torch.tensor([4.0, 8.0, -4.0]))
    assert torch.equal(y, x)
    assert x.grad.tolist() == [1, 2, -1]
