"""Quantizers: values and gradients against float64 NumPy, written from the papers' formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bdm_cli.quant.quantizers import EbbWeight, Lsq, Quantizer, SignWeight, lsq_weight

SIGMA = np.array([0.3, 0.7, 1.2])[:, None]
SIGMA_2 = np.array([0.2, 0.05, 0.4])[:, None]
WEIGHT = np.array(
    [
        # 0 and -0; r = 0 (w = sigma); |w| = 1 and |r| = 1 exactly; |w| > 1 with |r| <= 1; |r| > 1
        [0.0, -0.0, 0.3, -0.3, 0.1, -0.1, 1.0, -1.0, 1.2, -1.2, 1.7, -1.7],
        [0.0, -0.0, 0.7, -0.7, 0.2, -0.9, 1.0, -1.0, 1.5, -1.5, 2.5, -2.5],
        [0.0, -0.0, 1.2, -1.2, 0.15, -0.2, 1.0, -1.0, 1.1, -1.4, 2.9, -3.0],
    ]
)
WEIGHTS = hnp.arrays(np.float64, (3, 4, 2), elements=st.floats(-4, 4, width=32))


def sgn(v: np.ndarray) -> np.ndarray:
    return np.where(v >= 0, 1.0, -1.0)


def inside(v: np.ndarray) -> np.ndarray:
    return (np.abs(v) <= 1).astype(float)


def upstream(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape)


def differentiate(quantizer: Quantizer, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and dL/dx in float64, for L = sum(g * q(x)); the parameters' gradients stay in the quantizer."""
    tensor = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = quantizer.double()(tensor)
    y.backward(torch.tensor(g))
    return y.detach().numpy(), tensor.grad.numpy()


def with_scales(quantizer: Quantizer, **scales: np.ndarray) -> Quantizer:
    quantizer.double()
    for name, value in scales.items():
        getattr(quantizer, name).data = torch.tensor(value, dtype=torch.float64)
    return quantizer


# SignWeight: q = sigma sgn(w); dL/dsigma = sum g sgn(w); dL/dw = sigma g 1[|w| <= 1]


def test_sign_weight_values_and_gradients():
    quantizer = with_scales(SignWeight(torch.tensor(WEIGHT)), sigma=SIGMA)
    g = upstream(WEIGHT.shape)
    value, dw = differentiate(quantizer, WEIGHT, g)
    np.testing.assert_allclose(value, SIGMA * sgn(WEIGHT), rtol=1e-12)
    np.testing.assert_allclose(dw, SIGMA * g * inside(WEIGHT), rtol=1e-12)
    np.testing.assert_allclose(quantizer.sigma.grad.numpy(), (g * sgn(WEIGHT)).sum(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 3, 3), (5, 4, 1, 1), (5, 6, 3)])
@pytest.mark.parametrize("kind", [SignWeight, EbbWeight])
def test_scales_start_at_the_channel_means(kind: type, shape: tuple[int, ...]):
    weight = np.random.default_rng(1).standard_normal(shape)
    axes = tuple(range(1, len(shape)))
    quantizer = kind(torch.tensor(weight))
    sigma = np.abs(weight).mean(axes, keepdims=True)
    assert quantizer.sigma.shape == (5, *[1] * (len(shape) - 1))
    np.testing.assert_allclose(quantizer.sigma.detach().numpy(), sigma, rtol=1e-12)
    if kind is EbbWeight:
        residual = np.abs(weight - sigma * sgn(weight)).mean(axes, keepdims=True)
        assert quantizer.sigma_2.shape == quantizer.sigma.shape
        np.testing.assert_allclose(quantizer.sigma_2.detach().numpy(), residual, rtol=1e-12)


def test_an_all_zero_channel_is_still_plus_sigma():
    quantizer = with_scales(SignWeight(torch.zeros(2, 3)), sigma=np.array([[0.5], [0.25]]))
    assert quantizer(torch.zeros(2, 3, dtype=torch.float64)).tolist() == [[0.5] * 3, [0.25] * 3]


# EbbWeight (methods.md 2.2): r = w - s1 sgn(w); q = s1 sgn(w) + s2 sgn(r)
#   dq/ds1 = sgn(w) (1 - s2 1[|r| <= 1]);  dq/ds2 = sgn(r)
#   dq/dw = s1 1[|w| <= 1] + s2 1[|r| <= 1] (1 - s1 1[|w| <= 1])


def ebb(w: np.ndarray, s1: np.ndarray, s2: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, ...]:
    r = w - s1 * sgn(w)
    value = s1 * sgn(w) + s2 * sgn(r)
    ds1 = (g * sgn(w) * (1 - s2 * inside(r))).sum(1, keepdims=True)
    ds2 = (g * sgn(r)).sum(1, keepdims=True)
    dw = g * (s1 * inside(w) + s2 * inside(r) * (1 - s1 * inside(w)))
    return value, ds1, ds2, dw


def test_ebb_values_and_gradients():
    r = WEIGHT - SIGMA * sgn(WEIGHT)
    assert (np.abs(WEIGHT) > 1).any()
    assert (np.abs(r) > 1).any()
    assert ((np.abs(WEIGHT) > 1) & (np.abs(r) <= 1)).any()
    quantizer = with_scales(EbbWeight(torch.tensor(WEIGHT)), sigma=SIGMA, sigma_2=SIGMA_2)
    g = upstream(WEIGHT.shape)
    value, dw = differentiate(quantizer, WEIGHT, g)
    expected, ds1, ds2, expected_dw = ebb(WEIGHT, SIGMA, SIGMA_2, g)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-12)
    np.testing.assert_allclose(quantizer.sigma.grad.numpy(), ds1, rtol=1e-12)
    np.testing.assert_allclose(quantizer.sigma_2.grad.numpy(), ds2, rtol=1e-12)


def test_ebb_where_both_or_one_or_none_of_the_clips_act():
    """By hand: sigma = 0.5, sigma_2 = 0.25; w in 0.25 | 1.25 (only w clipped) | 2 (both clipped)."""
    quantizer = with_scales(EbbWeight(torch.zeros(1, 3)), sigma=np.array([[0.5]]), sigma_2=np.array([[0.25]]))
    value, dw = differentiate(quantizer, np.array([[0.25, 1.25, 2.0]]), np.array([[1.0, 10.0, 100.0]]))
    assert value.tolist() == [[0.25, 0.75, 0.75]]
    assert dw.tolist() == [[0.5 + 0.25 * 0.5, 2.5, 0.0]]
    assert quantizer.sigma.grad.item() == 0.75 + 7.5 + 100
    assert quantizer.sigma_2.grad.item() == -1 + 10 + 100


@settings(deadline=None, max_examples=60)
@given(WEIGHTS)
def test_ebb_agrees_with_the_formulas_for_any_weights(weight: np.ndarray):
    quantizer = EbbWeight(torch.tensor(weight))
    flat = weight.reshape(3, -1)
    g = upstream(flat.shape)
    value, dw = differentiate(quantizer, weight, g.reshape(weight.shape))
    s1, s2 = (p.detach().numpy().reshape(3, 1) for p in (quantizer.sigma, quantizer.sigma_2))
    expected, ds1, ds2, expected_dw = ebb(flat, s1, s2, g)
    np.testing.assert_allclose(value.reshape(3, -1), expected, atol=1e-12)
    np.testing.assert_allclose(dw.reshape(3, -1), expected_dw, atol=1e-12)
    np.testing.assert_allclose(quantizer.sigma.grad.numpy().reshape(3, 1), ds1, atol=1e-10)
    np.testing.assert_allclose(quantizer.sigma_2.grad.numpy().reshape(3, 1), ds2, atol=1e-10)


@pytest.mark.parametrize(("kind", "levels"), [(SignWeight, 2), (EbbWeight, 4)])
def test_binary_weights_have_exactly_so_many_levels_per_channel(kind: type, levels: int):
    weight = torch.randn(6, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    quantized = kind(weight)(weight).detach()
    assert [len(channel.unique()) for channel in quantized] == [levels] * 6


@settings(deadline=None, max_examples=40)
@given(WEIGHTS)
def test_binary_weights_are_finite_shaped_and_within_their_bits(weight: np.ndarray):
    for kind in (SignWeight, EbbWeight):
        quantizer = kind(torch.tensor(weight))
        quantized = quantizer(torch.tensor(weight))
        assert quantized.shape == weight.shape
        assert quantized.isfinite().all()
        assert all(len(channel.unique()) <= 2**quantizer.bits for channel in quantized)


# Lsq (methods.md 1.4): x^ = s round(clip(x/s, -Qn, Qp)); dx^/dx = 1[-Qn <= x/s <= Qp]
#   dx^/ds = round(x/s) - x/s inside, -Qn below, Qp above, times 1/sqrt(N Qp)


def limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def lsq(
    x: np.ndarray, s: np.ndarray | float, bits: int, signed: bool, zero_point: int, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, dL/dx, and dL/ds per element; with a zero point z both limits move by -z (and halves round about it)."""
    low, high = limits(bits, signed)
    v, bottom, top = x / s, low - zero_point, high - zero_point
    rounded = np.round(np.clip(v, bottom, top) + zero_point) - zero_point
    value = s * rounded
    dx = g * ((v >= bottom) & (v <= top))
    ds = g * np.where(v < bottom, bottom, np.where(v > top, top, rounded - v)) / math.sqrt(x.size * high)
    return value, dx, ds


def around_the_edges(bits: int, signed: bool, zero_point: int, s: float) -> np.ndarray:
    """0, both clip edges and one float to each side of them, halves, far outside, and points between."""
    low, high = limits(bits, signed)
    edges = np.array([low - zero_point, high - zero_point], dtype=float)
    near = np.concatenate([edges, np.nextafter(edges, -1e9), np.nextafter(edges, 1e9)])
    rest = np.array(
        [0.0, -0.0, 0.25, -0.25, 0.75, 0.5, -0.5, 1.5, low - zero_point - 0.7, high - zero_point + 0.7, -1e4, 1e4]
    )
    return np.concatenate([near, rest, np.linspace(low - 2, high + 2, 14)]).reshape(4, -1) * s


@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_lsq_per_tensor(bits: int, signed: bool, zero_point: int):
    s = 0.25  # a power of two, so that x / s hits the clip edges exactly
    x = around_the_edges(bits, signed, zero_point, s)
    g = upstream(x.shape)
    quantizer = with_scales(Lsq(bits, signed, zero_point), scale=np.array(s))
    value, dx = differentiate(quantizer, x, g)
    expected, expected_dx, ds = lsq(x, s, bits, signed, zero_point, g)
    np.testing.assert_allclose(value, expected, atol=1e-12)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-12)
    np.testing.assert_allclose(quantizer.scale.grad.item(), ds.sum(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_per_channel(bits: int, signed: bool):
    s = np.array([0.25, 0.5, 1.0])[:, None, None]
    x = np.random.default_rng(bits).standard_normal((3, 5, 4)) * 2.0**bits / 4
    g = upstream(x.shape)
    quantizer = with_scales(Lsq(bits, signed, scale_shape=(3, 1, 1)), scale=s)
    value, dx = differentiate(quantizer, x, g)
    expected, expected_dx, ds = lsq(x, s, bits, signed, 0, g)
    np.testing.assert_allclose(value, expected, atol=1e-12)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-12)
    assert quantizer.scale.grad.shape == (3, 1, 1)
    np.testing.assert_allclose(quantizer.scale.grad.numpy(), ds.sum((1, 2), keepdims=True), rtol=1e-8)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_lsq_has_exactly_two_to_the_bits_levels(bits: int, signed: bool):
    low, high = limits(bits, signed)
    quantizer = with_scales(Lsq(bits, signed), scale=np.array(0.5))
    levels = quantizer(torch.linspace(-200, 200, 4001, dtype=torch.float64)).unique() / 0.5
    assert levels.tolist() == list(range(low, high + 1))
    assert len(levels) == 2**bits


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_lsq_starts_at_twice_the_mean_magnitude_over_the_root_of_qp(bits: int, signed: bool):
    x = np.random.default_rng(0).standard_normal((4, 6))
    _, high = limits(bits, signed)
    tensor = Lsq(bits, signed).double()
    tensor.calibrate_(torch.tensor(x))
    np.testing.assert_allclose(tensor.scale.item(), 2 * np.abs(x).mean() / math.sqrt(high), rtol=1e-12)
    channels = lsq_weight(bits, torch.tensor(x))
    signed_high = limits(bits, True)[1]
    np.testing.assert_allclose(
        channels.scale.detach().numpy(), 2 * np.abs(x).mean(1, keepdims=True) / math.sqrt(signed_high), rtol=1e-6
    )


def test_lsq_before_calibration_is_loud():
    assert Lsq(4)(torch.randn(3)).isnan().all()


def test_lsq_of_a_silent_layer_stays_finite():
    quantizer = Lsq(4)
    quantizer.calibrate_(torch.zeros(2, 3))
    assert quantizer.scale > 0
    assert quantizer(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_lsq_refuses_other_bits(bits: int):
    with pytest.raises(ValueError, match=rf"2\.\.8 bits, not {bits}$"):
        Lsq(bits)


FLOATS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=5), elements=st.floats(-1e4, 1e4, width=32))


@settings(deadline=None, max_examples=120)
@given(
    x=FLOATS,
    bits=st.integers(2, 8),
    signed=st.booleans(),
    zero_point=st.integers(-3, 3),
    scale=st.floats(2**-10, 2**10, width=32),
)
def test_lsq_is_finite_shaped_near_and_idempotent(
    x: np.ndarray, bits: int, signed: bool, zero_point: int, scale: float
):
    quantizer = Lsq(bits, signed, zero_point)
    quantizer.scale.data.fill_(scale)
    once = quantizer(torch.tensor(x)).detach()
    assert once.shape == x.shape
    assert once.isfinite().all()
    assert torch.equal(quantizer(once), once)
    low, high = (limit - zero_point for limit in limits(bits, signed))
    clipped = np.clip(x.astype(np.float64), low * scale, high * scale)
    assert np.abs(once.numpy() - clipped).max() <= scale * (0.5 + 1e-3)


@pytest.mark.parametrize("mode", [True, False])
def test_quantizers_are_the_same_function_in_train_and_eval(mode: bool):
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for quantizer in (SignWeight(weight), EbbWeight(weight), lsq_weight(2, weight)):
        reference = copy.deepcopy(quantizer)
        assert torch.equal(quantizer.train(mode)(weight), reference(weight))


def test_scales_and_zero_point_are_in_the_state_dict():
    weight = torch.randn(2, 3)
    assert list(SignWeight(weight).state_dict()) == ["sigma"]
    assert list(EbbWeight(weight).state_dict()) == ["sigma", "sigma_2"]
    assert list(Lsq(4).state_dict()) == ["scale", "zero_point"]
