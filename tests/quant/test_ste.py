"""Pseudo-gradients against their formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm_cli.quant.ste import lsq_ste, scale_gradient, sign_power_ste, sign_ste

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


@pytest.mark.parametrize("power", [1.0, 1.7, 3.0])
def test_the_power_estimators_slope(power: float):
    bound, inner = 1.5, 0.1
    edges = [inner, np.nextafter(inner, 1), bound, np.nextafter(bound, 2)]
    points = np.array(
        [0.0, -0.0, 1e-300, -1e-300, 0.05, -0.05, 0.5, -0.7, 1.0, 3.0, -3.0, *edges, *(-e for e in edges)]
    )
    x = torch.tensor(points, requires_grad=True)
    upstream = np.linspace(-2, 2, len(points))
    y = sign_power_ste(x, torch.tensor(power, dtype=torch.float64), bound, inner)
    y.backward(torch.tensor(upstream))
    assert y.tolist() == np.where(points >= 0, 1.0, -1.0).tolist()
    slopes = []
    for v in np.abs(points):
        if v > bound:
            slopes.append(0.0)
        elif v > inner:
            slopes.append(v ** ((1 - power) / power) / power)
        else:
            slopes.append(inner ** (1 / power) / inner)
    np.testing.assert_allclose(x.grad.numpy(), upstream * slopes, rtol=1e-13)
    assert max(slopes) == pytest.approx({1.0: 1.0, 3.0: 4.6416}.get(power, 0.1 ** (1 / 1.7 - 1)), abs=1e-4)


def test_the_power_estimator_keeps_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.linspace(-2, 2, 9).to(dtype).requires_grad_()
        y = sign_power_ste(x, torch.tensor(3.0), 1.5, 0.1)
        y.sum().backward()
        assert (y.dtype, x.grad.dtype) == (dtype, dtype)
        assert x.grad.isfinite().all()
