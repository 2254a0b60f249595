"""Convolutions with 1-bit weights: every path against sums in float64 that are written here from ops' docstring."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdm_cli.errors import BdmError
from bdm_cli.packed import build, ops
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, SignWeight

USABLE = [name for name in ops.PATHS if name == "torch" or name in ops.library().paths]
BITS = (1, 2, 3, 4, 5, 8, 32)
CASES = list(itertools.product(USABLE, BITS))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Within it, `path` computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDM_KERNEL", path)
        ops.path.cache_clear()
        yield
    ops.path.cache_clear()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _choose_again() -> Iterator[None]:
    yield
    ops.path.cache_clear()


def random_signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape) * 2.0 - 1


def expected_levels(
    x: Tensor, bits: int, step: float, zero: int, low: int, threshold: Tensor | None = None
) -> np.ndarray:
    """a of the module's docstring, in float64; channels on axis 1."""
    values = x.detach().numpy()
    if bits == 32:
        return values.astype(np.float64)
    if bits == 1:
        least = np.zeros(1, np.float32) if threshold is None else threshold.numpy()
        return np.where(values >= least.reshape(-1, *[1] * (values.ndim - 2)), 1.0, -1.0)
    with np.errstate(all="ignore"):
        v = np.rint(values / np.float32(step) + np.float32(zero))
    v = np.where(np.isnan(v), low, np.clip(v, low, low + 2**bits - 1))
    return v.astype(np.float64) - zero


def expected_sums(x: Tensor, w: Tensor, bits: int, step: float, zero: int, low: int, threshold: Tensor | None = None,
                  **how) -> Tensor:  # fmt: skip
    """sum w a in float64, by the definition; a real 0 outside the image counts as 0."""
    return F.conv2d(torch.from_numpy(expected_levels(x, bits, step, zero, low, threshold)), w.double(), **how)


def convolve(
    x: Tensor, w: Tensor, bits: int, step: float = 1.0, zero: int = 0, low: int = 0, stride=(1, 1), padding=(0, 0),
    sigma: Tensor | None = None, bias: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    shape = ops.Shape(w.shape[1], w.shape[0], tuple(w.shape[2:]), stride, padding, bits, zero - low)
    arranged = ops.arrange(ops.pack_signs(w), shape)
    sigma = torch.ones(len(w)) if sigma is None else sigma
    return torch.ops.bdm.conv2d(
        x, arranged, sigma, bias, w.shape[2:], stride, padding, bits, step, float(zero), float(low), **options
    )


def halves(bits: int, step: float, zero: int, low: int) -> Tensor:
    """Numbers on the halves between levels, the nearest floats beside them, and all that is no ordinary number."""
    special = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -1e-40, 1e-45, 0.0, -0.0, 2**24 * step, -(2**31) * step]
    with np.errstate(over="ignore"):
        middle = (np.arange(low - 1, low + 2**bits + 1) + 0.5 - zero).astype(np.float32) * np.float32(step)
        beside = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
        return torch.from_numpy(np.concatenate([middle, *beside, np.array(special)]).astype(np.float32))


def check(sums: Tensor, x: Tensor, w: Tensor, bits: int, step: float, zero: int, low: int, threshold=None, **how):
    """The sums times the step: bit for bit what the exact sums give; real ones within rounding."""
    exact = expected_sums(x, w, bits, step, zero, low, threshold, **how)
    assert sums.shape == exact.shape
    if bits == 32:
        bound = F.conv2d(x.double().abs(), torch.ones_like(w).double(), **how)
        assert bool(((sums - exact).abs() <= 1e-5 * bound + 1e-30).all())
    else:
        assert torch.equal(sums, exact.float() * torch.tensor(step))


@st.composite
def layers(draw: st.DrawFn) -> dict:
    """A random layer and its input."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (1, 3), (2, 1), (4, 2), (5, 5)]))
    return {
        "n": draw(st.sampled_from([1, 3])),
        "channels": draw(st.one_of(st.integers(1, 70), st.sampled_from([128, 224, 673]))),
        "outputs": draw(st.integers(1, 140)),
        "kernel": kernel,
        "stride": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3), (3, 1)])),
        "padding": (draw(st.integers(0, kernel[0])), draw(st.integers(0, kernel[1]))),
        "size": (kernel[0] + draw(st.integers(0, 8)), kernel[1] + draw(st.integers(0, 20))),
        "step": draw(st.sampled_from([1.0, 0.1, 0.37, 1 / 3, 3e-5, 77.7, 1e-30, 1e30])),
        "zero": draw(st.integers(-5, 5) | st.sampled_from([-200, 8, 128, 300])),
        "signed": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "threads": draw(st.sampled_from([1, 2])),
        "threshold": draw(st.booleans()),
        "all_plus": draw(st.integers(0, 9)) == 0,
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.parametrize(("path", "bits"), CASES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layer=layers())
def test_sums_are_exact(path: str, bits: int, layer: dict):
    torch.manual_seed(layer["seed"])
    step = 1.0 if bits == 32 else layer["step"]
    low = -(2 ** (bits - 1)) if layer["signed"] and 1 < bits < 32 else 0
    zero = layer["zero"] if 1 < bits < 32 else 0
    w = random_signs(layer["outputs"], layer["channels"], *layer["kernel"])
    if layer["all_plus"]:
        w.fill_(1)
    x = (torch.randn(layer["n"], layer["channels"], *layer["size"]) * 2 ** (min(bits, 8) - 1) - zero) * step
    threshold = torch.randn(layer["channels"]) if bits == 1 and layer["threshold"] else None
    if bits < 32:
        planted = halves(bits, step, zero, low)
        where = torch.randint(0, x.numel(), (max(1, x.numel() // 4),))
        x.view(-1)[where] = planted[torch.randint(0, len(planted), where.shape)]
    x = x.to(memory_format=layer["layout"])
    how = {"stride": layer["stride"], "padding": layer["padding"]}
    with forced(path), threads(layer["threads"]):
        y = convolve(x, w, bits, step, zero, low, threshold=threshold, **how)
    check(y, x, w, bits, step, zero, low, threshold, **how)


@pytest.mark.parametrize(("path", "bits"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(224, 96, 20, 3), (897, 70, 9, 3), (672, 97, 16, 1)])
def test_large_layers_are_exact_on_two_threads(path: str, bits: int, layout, size: tuple[int, int, int, int]):
    """Enough work that it is shared, and sums beyond what 16 bits hold."""
    torch.manual_seed(0)
    channels, outputs, edge, kernel = size
    w, step = random_signs(outputs, channels, kernel, kernel), 1.0 if bits == 32 else 0.3
    w[:3] = 1
    x = (torch.randn(2, channels, edge, edge) * 2 ** (min(bits, 8) - 1) * step).to(memory_format=layout)
    x[0].abs_()
    zero, low, how = (0, 0, {}) if bits in (1, 32) else (0, -(2 ** (bits - 1)), {})
    how["padding"] = (kernel // 2, kernel // 2)
    with forced(path), threads(2):
        y = convolve(x, w, bits, step, zero, low, **how)
    assert y.is_contiguous(memory_format=layout)
    check(y, x, w, bits, step, zero, low, **how)


@pytest.mark.parametrize(("path", "bits"), [case for case in CASES if 1 < case[1] < 32])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("step", [0.1, 1 / 3, 0.7, 1.0, 12.3, 1e-38, 1e38])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_on_the_halves_and_beyond_all_bounds(path: str, bits: int, signed: bool, step: float, layout):
    """Two equal channels: the sum is twice the level. NaN is the lowest."""
    low = -(2 ** (bits - 1)) if signed else 0
    for zero in (0, 3, -7, 2 ** (bits - 1)):
        x = halves(bits, step, zero, low).view(1, 1, 1, -1).expand(1, 2, 1, -1).contiguous(memory_format=layout)
        w = torch.ones(1, 2, 1, 1)
        with forced(path):
            check(convolve(x, w, bits, step, zero, low), x, w, bits, step, zero, low)
            lowest = convolve(torch.full((1, 2, 1, 1), torch.nan), w, bits, step, zero, low)
        assert lowest.item() == (torch.tensor(2.0 * (low - zero)) * torch.tensor(step)).item()


@pytest.mark.parametrize("path", USABLE)
def test_one_bit_compares_with_its_threshold(path: str):
    """x >= threshold is +1, equality and -0 included; NaN is -1."""
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.nan, torch.inf, -torch.inf, 3.0]).view(1, 8, 1, 1)
    w = torch.eye(8).mul(2).sub(1).view(8, 8, 1, 1)
    a = torch.tensor([1.0, 1, 1, -1, -1, 1, -1, 1]).view(1, 8, 1, 1)
    with forced(path):
        assert torch.equal(convolve(x, w, 1), F.conv2d(a, w))
        a[0, 0] = -1  # 0 is below 0.5
        threshold = torch.tensor([0.5, 0, 0, 0, 0, torch.inf, -torch.inf, 3.0])
        a[0, 6] = 1
        assert torch.equal(convolve(x, w, 1, threshold=threshold), F.conv2d(a, w))


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("zero", [-40, 0, 5, 40])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_zero_outside_the_image_counts_nothing(path: str, zero: int, bits: int):
    """Nothing but padding beside one pixel: the sum at a corner is that of one tap alone."""
    w, x = random_signs(5, 3, 3, 3), torch.randn(1, 3, 1, 1)
    zero = 0 if bits == 1 else zero
    a = torch.from_numpy(expected_levels(x, bits, 1.0, zero, 0)).float().flatten()
    with forced(path):
        y = convolve(x, w, bits, 1.0, zero, 0, padding=(2, 2))
    assert y.shape[2:] == (3, 3)
    for i, j in itertools.product(range(3), range(3)):
        assert torch.equal(y[0, :, i, j], w[:, :, 2 - i, 2 - j] @ a)


def test_four_bits_are_the_four_planes_of_equation_19():
    """a = 4 b1 + 2 b2 + b3 + b4 / 2 - 1 / 2 with b = +-1 gives -8..7, each once: four 1-bit sums make a 4-bit one."""
    planes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    a = planes @ torch.tensor([4.0, 2.0, 1.0, 0.5]) - 0.5
    assert a.tolist() == list(range(-8, 8))
    x = torch.randint(-8, 8, (2, 33, 6, 5)).float()
    w = random_signs(19, 33, 3, 3)
    b = planes[(x + 8).long()].unbind(-1)
    for path in USABLE:
        with forced(path):
            y = convolve(x, w, 4, 1.0, 0, -8)
            one = [convolve(plane.contiguous(), w, 1) for plane in b]
        assert torch.equal(y, 4 * one[0] + 2 * one[1] + one[2] + one[3] / 2 - w.sum((1, 2, 3)).view(1, -1, 1, 1) / 2)


@pytest.mark.parametrize(("path", "bits"), [case for case in CASES if case[1] < 32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("per_image", [False, True])
def test_scale_bias_and_residual_are_rounded_one_after_another(
    path: str, bits: int, layout, kernel: int, padding: int, per_image: bool
):
    """fl(fl(fl(sum * fl(sigma step)) + bias) + residual) on every path, so that all give the same images."""
    torch.manual_seed(bits)
    x = torch.randn(3, 33, 7, 9).to(memory_format=layout)
    w, sigma, step = random_signs(101, 33, kernel, kernel), torch.rand(101), 0.137
    zero, low = (0, 0) if bits == 1 else (5, -(2 ** (bits - 1)))
    bias, residual = torch.randn((3, 101) if per_image else 101), torch.randn(3, 101, 7, 9)
    how = {"padding": (padding, padding)}
    y = expected_sums(x, w, bits, step, zero, low, **how).float() * (sigma * torch.tensor(step)).view(1, -1, 1, 1)
    with forced(path):
        given = (x, w, bits, step, zero, low)
        assert torch.equal(convolve(*given, sigma=sigma, **how), y)
        y = y + bias[..., None, None]
        assert torch.equal(convolve(*given, sigma=sigma, bias=bias, **how), y)
        y = y + residual
        assert torch.equal(convolve(*given, sigma=sigma, bias=bias, residual=residual, **how), y)


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_as_the_simulated_layer(path: str, bits: int, signed: bool, layout):
    torch.manual_seed(bits)
    conv = nn.Conv2d(37, 51, 3, stride=2, padding=1)
    quantizer = Lsq(bits, signed, zero_point=3)
    x = torch.randn(2, 37, 11, 9).to(memory_format=layout)
    quantizer.calibrate_(x)
    layer = QuantConv2d(conv, Parts(SignWeight(conv.weight), quantizer)).eval()
    grid = quantizer.grid([0])
    with forced(path), torch.no_grad():
        y = convolve(x, conv.weight, bits, grid.step.item(), grid.zero, grid.low, (2, 2), (1, 1),
                     layer.weight_quantizer.sigma.flatten(), conv.bias)  # fmt: skip
        expected = layer(x)
    assert y.stride() == expected.stride()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("shape", [(7, 45), (2, 5, 45), (45,), (1, 130, 45)])
def test_a_linear_layer(path: str, shape: tuple[int, ...]):
    torch.manual_seed(0)
    linear, x, quantizer = nn.Linear(45, 67), torch.randn(shape), Lsq(4)
    quantizer.calibrate_(x)
    layer = QuantLinear(linear, Parts(SignWeight(linear.weight), quantizer)).eval()
    with forced(path), torch.no_grad():
        weight = ops.arrange(ops.pack_signs(linear.weight), ops.Shape(45, 67))
        sigma = layer.weight_quantizer.sigma.flatten()
        y = torch.ops.bdm.linear(x, weight, sigma, linear.bias, 4, quantizer.scale.item(), 0.0, -8.0)
        assert torch.equal(y, layer(x))
        without = torch.ops.bdm.linear(x, weight, sigma, None, 4, quantizer.scale.item(), 0.0, -8.0)
        torch.testing.assert_close(without, layer(x) - linear.bias, rtol=1e-5, atol=1e-5)
        assert torch.ops.bdm.linear(torch.empty(0, 3, 45), weight, sigma, None, 4, 1.0, 0.0, -8.0).shape == (0, 3, 67)


@pytest.mark.parametrize(("path", "bits"), [case for case in CASES if case[1] in (1, 4, 8, 32)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gain_shift_and_silu_come_first(path: str, bits: int, silu: bool, layout):
    """f(g x + s) is rounded differently by each path: a value may fall to the other side between two levels."""
    torch.manual_seed(1)
    x = (4 * torch.randn(3, 21, 7, 18)).to(memory_format=layout)
    if bits > 1:  # torch's SiLU of -200 is -0, which 1 bit would count as positive
        x[0, :, 0, 0], x[0, 0, 1, :2] = 80.0, torch.tensor([-90.0, -200.0])
    gain, shift, w = torch.randn(3, 21), torch.randn(3, 21), random_signs(40, 21, 3, 3)
    before = x * gain[:, :, None, None] + shift[:, :, None, None]
    before = F.silu(before) if silu else before
    step = 0.25 if bits < 32 else 1.0
    zero, low = (0, 0) if bits in (1, 32) else (2, 0)
    with forced(path):
        y = convolve(x, w, bits, step, zero, low, padding=(1, 1), gain=gain, shift=shift, silu=silu)
    exact = expected_sums(before, w, bits, step, zero, low, padding=(1, 1)) * step
    if bits == 32:
        torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-3)
    else:
        different = (y != exact.float()).double().mean()
        assert different < 0.01, different  # a level that differs shows in up to 9 x 40 sums of 15120
        assert (y - exact).abs().max() <= 4 * step


@pytest.mark.parametrize("path", USABLE)
def test_a_linear_layer_after_gain_and_shift_of_each_image(path: str):
    """Gains and shifts of powers of two, so that what is quantized is exact."""
    x, w = torch.randn(3, 10, 45), random_signs(67, 45)
    gain, shift = torch.tensor([0.5, 1.0, -2.0])[torch.randint(0, 3, (3, 45))], torch.zeros(3, 45)
    shift[1] = 0.25
    residual, bias = torch.randn(3, 10, 67), torch.randn(67)
    a = torch.from_numpy(expected_levels((x * gain[:, None] + shift[:, None]).flatten(0, 1), 4, 0.1, 0, -8))
    expected = (a @ w.double().t()).float().view(3, 10, 67) * torch.tensor(0.1) + bias + residual
    with forced(path):
        weight = ops.arrange(ops.pack_signs(w), ops.Shape(45, 67))
        given = (x, weight, torch.ones(67), bias, 4, 0.1, 0.0, -8.0)
        y = torch.ops.bdm.linear(*given, gain=gain, shift=shift, residual=residual)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_normalisation_as_gain_and_shift(path: str, layout):
    x = (100 + torch.randn(2, 24, 9, 11)).to(memory_format=layout)
    norm = nn.GroupNorm(6, 24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with forced(path), torch.no_grad():
        gain, shift = ops.group_affine(x, 6, norm.weight, norm.bias, norm.eps)
        bare, moved = ops.group_affine(x, 6, None, None, norm.eps)
        exact = F.group_norm(x.double(), 6, norm.weight.double(), norm.bias.double(), norm.eps)
    y = x.double() * gain.double()[:, :, None, None] + shift.double()[:, :, None, None]
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-4)
    y = x.double() * bare.double()[:, :, None, None] + moved.double()[:, :, None, None]
    torch.testing.assert_close(y, F.group_norm(x.double(), 6, eps=norm.eps), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize(("tokens", "others", "heads", "width"), [(16, 16, 2, 32), (33, 7, 3, 24), (1, 1, 1, 5)])
def test_attention(path: str, tokens: int, others: int, heads: int, width: int):
    q, k, v = (torch.randn(2, length, heads * width) for length in (tokens, others, others))
    parts = (part.double().unflatten(-1, (heads, width)).transpose(1, 2) for part in (q, k, v))
    exact = F.scaled_dot_product_attention(*parts, scale=0.3).transpose(1, 2).flatten(2)
    with forced(path):
        y = ops.attention(q, k, v, heads, 0.3)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_keeps_nan(path: str, which: int):
    parts = [torch.randn(1, 20, 8) for _ in range(3)]
    parts[which][0, 1] = torch.nan
    with forced(path):
        y = ops.attention(*parts, 2, 0.3)
    assert y[0, 1].isnan().all()
    assert y.isnan().all() or which == 0


def test_weights_of_another_size_are_refused():
    shape = ops.Shape(10, 4, (3, 3))
    right = ops.pack_signs(torch.randn(4, 10, 3, 3))
    assert right.shape == (4, shape.row_bytes) == (4, 12)
    for wrong in (right[:3], right[:, :11], right.float(), right.flatten()):
        with pytest.raises(ValueError, match=r"weight .* is not \(4, 12\) bytes"):
            ops.arrange(wrong, shape)


@pytest.mark.parametrize("path", [name for name in USABLE if name != "torch"])
def test_other_types_and_strides_are_refused(path: str):
    x, w = torch.randn(1, 3, 4, 4), random_signs(5, 3, 1, 1)
    with forced(path):
        with pytest.raises(ValueError, match=r"x must be fp32, not torch\.float64"):
            convolve(x.double(), w, 4)
        with pytest.raises(ValueError, match=r"sigma, bias, .* must be contiguous fp32"):
            convolve(x, w, 4, sigma=torch.ones(10)[::2])
        with pytest.raises(ValueError, match=r"sigma, bias, .* must be contiguous fp32"):
            convolve(x, w, 4, bias=torch.ones(5).double())


@pytest.mark.parametrize("path", [name for name in USABLE if name != "torch"])
def test_weights_that_are_not_the_inputs_are_refused(path: str):
    """Rather than read beyond their end."""
    x, sigma = torch.randn(1, 200, 4, 4), torch.ones(5)
    how = (None, [3, 3], [1, 1], [0, 0], 4, 1.0, 0.0, 0.0)
    with forced(path):
        weight = ops.arrange(ops.pack_signs(random_signs(5, 3, 3, 3)), ops.Shape(3, 5, (3, 3), zero=0))
        with pytest.raises(ValueError, match="200 channels to 5 take"):
            torch.ops.bdm.conv2d(x, weight, sigma, *how)
        with pytest.raises(ValueError, match="is not for 1 images, 3 channels and 5 outputs"):
            torch.ops.bdm.conv2d(x[:, :3], weight, sigma, torch.ones(4), *how[1:])
        with pytest.raises(ValueError, match=r"1\.\.8 bits, or 32, not 16"):
            torch.ops.bdm.conv2d(x[:, :3], weight, sigma, *how[:4], 16, 1.0, 0.0, 0.0)
        with pytest.raises(ValueError, match="zero point 67108864 go beyond 32 bits"):
            ops.arrange(ops.pack_signs(random_signs(5, 64, 3, 3)), ops.Shape(64, 5, (3, 3), zero=2**26))
        with pytest.raises(ValueError, match="contiguous fp32"):
            ops.group_affine(x.double(), 4, None, None, 1e-5)


@pytest.mark.parametrize("path", USABLE)
def test_no_image_gives_no_output(path: str):
    with forced(path):
        assert convolve(torch.randn(0, 3, 4, 4), random_signs(5, 3, 3, 3), 4).shape == (0, 5, 2, 2)
        assert ops.attention(*[torch.randn(0, 4, 6)] * 3, 2, 1.0).shape == (0, 4, 6)
        assert ops.group_affine(torch.randn(0, 6, 4, 4), 2, None, None, 1e-5)[0].shape == (0, 6)


def test_an_unknown_kernel_is_an_error():
    with forced("avx513"), pytest.raises(BdmError) as error:
        ops.path()
    assert "unknown BDM_KERNEL 'avx513'. Did you mean 'avx512'?" in str(error.value)
    assert "known: avx2, avx512, neon, planes, torch" in str(error.value)


@pytest.mark.skipif(set(ops.PATHS) <= set(USABLE), reason="every path can run")
def test_a_kernel_of_another_processor_is_an_error():
    absent = next(name for name in ops.PATHS if name not in USABLE)
    with forced(absent), pytest.raises(BdmError) as error:
        ops.path()
    assert str(error.value).startswith(f"BDM_KERNEL={absent} cannot run here (")
    assert str(error.value).endswith(f"allowed: {', '.join(USABLE)}; unset it to let bdm choose")


def test_the_best_path_is_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BDM_KERNEL", raising=False)
    ops.path.cache_clear()
    assert ops.path() == USABLE[0]
    assert ("planes" in USABLE) == build.LIBRARY.is_file()


def test_plain_torch_gives_the_same_in_a_process_of_its_own(tmp_path: Path):
    code = """if True:
        import sys, torch
        from bdm_cli.packed import ops
        torch.manual_seed(0)
        w, x = torch.randn(20, 13, 3, 3), torch.randn(2, 13, 8, 8)
        weight = ops.arrange(ops.pack_signs(w), ops.Shape(13, 20, (3, 3), (1, 1), (1, 1)))
        y = ops.conv2d(x, weight, torch.ones(20), None, [3, 3], [1, 1], [1, 1], 4, 0.25, 0.0, -8.0)
        torch.save(y, sys.argv[1])
        print(ops.path())
    """
    found = []
    for path in ("torch", ""):
        file = tmp_path / f"y{path}.pt"
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=120,
                              env={**os.environ, "BDM_KERNEL": path})  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == (path or USABLE[0])
        found.append(torch.load(file))
    assert torch.equal(*found)


@pytest.mark.parametrize("path", USABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_keep_torchs_rules(path: str, layout):
    tests = ("test_schema", "test_faketensor")
    with forced(path):
        w, sigma, bias = random_signs(6, 5, 3, 3), torch.rand(6), torch.rand(6)
        weight = ops.arrange(ops.pack_signs(w), ops.Shape(5, 6, (3, 3), (2, 2), (1, 1)))
        x = torch.randn(2, 5, 8, 7).to(memory_format=layout)
        given = (x, weight, sigma, bias, [3, 3], [2, 2], [1, 1], 4, 0.3, 0.0, -8.0)
        torch.library.opcheck(torch.ops.bdm.conv2d.default, given, test_utils=tests)
        given = (*given, None, torch.rand(2, 5), torch.rand(2, 5), True)
        torch.library.opcheck(torch.ops.bdm.conv2d.default, given, test_utils=tests)
        weight = ops.arrange(ops.pack_signs(w[:, :, 0, 0]), ops.Shape(5, 6))
        given = (torch.randn(2, 3, 5), weight, sigma, None, 4, 0.3, 0.0, -8.0)
        torch.library.opcheck(torch.ops.bdm.linear.default, given, test_utils=tests)
        given = (torch.randn(2, 8, 3, 5).to(memory_format=layout), 4, torch.rand(8), torch.rand(8), 1e-5)
        torch.library.opcheck(torch.ops.bdm.group_affine.default, given, test_utils=tests)
        q, k, v = (torch.randn(2, length, 8) for length in (5, 3, 3))
        torch.library.opcheck(torch.ops.bdm.attention.default, (q, k, v, 2, 0.5), test_utils=tests)


class Packed(nn.Module):
    def __init__(self, w: Tensor):
        super().__init__()
        self.register_buffer("weight", ops.arrange(ops.pack_signs(w), ops.Shape(5, 6, (3, 3))))
        self.register_buffer("sigma", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        kernel, ones, none = [3, 3], [1, 1], [0, 0]
        y = torch.ops.bdm.conv2d(x, self.weight, self.sigma, None, kernel, ones, none, 4, 0.3, 0.0, -8.0)
        return y.relu()


def test_exported_and_traced_layers_compute_the_same():
    model, x = Packed(random_signs(6, 5, 3, 3)), torch.randn(2, 5, 8, 7)
    expected = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([(1, 1), (3, 3), (2, 5)]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_signs_survive_packing(outputs: int, channels: int, kernel: tuple[int, int], seed: int):
    w = torch.randn(outputs, channels, *kernel, generator=torch.Generator().manual_seed(seed))
    w.view(-1)[:: 1 + seed % 5] = 0.0 if seed % 2 else -0.0
    packed = ops.pack_signs(w)
    assert packed.shape == (outputs, ops.Shape(channels, outputs, kernel).row_bytes)
    assert torch.equal(ops.signs(packed, channels, kernel), torch.where(w >= 0, 1.0, -1.0))
    bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : w[0].numel()]
    assert np.array_equal(bits, (w >= 0).flatten(1).numpy())
