"""Layers that draw, not train: sums of whole numbers, exact and therefore the same however they are ordered."""

import pytest
import torch
from torch import Tensor, nn

from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import EbbWeight, Lsq, Quantizer, SignWeight, lsq_weight

WEIGHTS = {"signs": SignWeight, "two bases": EbbWeight, "2 bits": lambda weight: lsq_weight(2, weight)}


def layer(kind: str, weights: str, bits: int = 4, zero: int = 0) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Conv2d(24, 32, 3, padding=1) if kind == "conv" else nn.Linear(24, 32)
    activation = Lsq(bits, signed=not zero, zero_point=zero)
    activation.calibrate_(torch.randn(1000))
    kind = QuantConv2d if kind == "conv" else QuantLinear
    quantized = kind(plain, Parts(WEIGHTS[weights](plain.weight), activation))
    return quantized.eval()


def images(kind: str) -> Tensor:
    return torch.randn(16, 24, 8, 8) if kind == "conv" else torch.randn(16, 64, 24)


@pytest.mark.parametrize("zero", [0, 5])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_same_function_with_and_without_gradients(kind: str, weights: str, zero: int):
    quantized, x = layer(kind, weights, zero=zero), images(kind)
    trained = quantized(x)
    assert trained.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), trained.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(quantized.train()(x), trained)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_neither_the_batch_nor_the_threads_change_a_bit(kind: str, weights: str):
    quantized, x = layer(kind, weights), images(kind)
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            whole = quantized(x)
            assert torch.equal(torch.cat([quantized(part) for part in x.split(3)]), whole)
            torch.set_num_threads(2)
            assert torch.equal(quantized(x), whole)
    finally:
        torch.set_num_threads(before)


def test_one_rounding_per_scale_and_bias():
    """Against float64: the sum of whole numbers times fp32's sigma * s, plus the bias."""
    quantized, x = layer("conv", "signs"), images("conv")
    scale, sigma = quantized.activation_quantizer.scale.detach(), quantized.weight_quantizer.sigma.detach()
    levels = (x / scale).round().clamp(-8, 7).double()
    signs = torch.where(quantized.weight >= 0, 1.0, -1.0).double()
    sums = nn.functional.conv2d(levels, signs, padding=1).float()
    expected = sums * (sigma * scale).view(-1, 1, 1) + quantized.bias.detach().view(-1, 1, 1)
    with torch.no_grad():
        assert torch.equal(quantized(x), expected)


class Rounding(Quantizer):
    """One that does not say its values in whole numbers."""

    bits = 8

    def forward(self, x: Tensor) -> Tensor:
        return (16 * x).round() / 16


@pytest.mark.parametrize("what", ["other weights", "other activations", "steps per channel", "sums beyond 2^24"])
def test_what_is_not_whole_is_computed_as_in_training(what: str):
    quantized, x = layer("conv", "signs"), images("conv")
    if what == "other weights":
        quantized.weight_quantizer = Rounding()
    elif what == "other activations":
        quantized.activation_quantizer = Rounding()
    elif what == "steps per channel":
        quantized.activation_quantizer = Lsq(4, scale_shape=(24, 1, 1))
        quantized.activation_quantizer.scale.data.fill_(0.1)
    else:
        wide = nn.Conv2d(240, 4, 3)
        quantized, x = QuantConv2d(wide, Parts(lsq_weight(8, wide.weight), Lsq(8))).eval(), torch.randn(2, 240, 5, 5)
        quantized.activation_quantizer.calibrate_(x)
    with torch.no_grad():
        drawn = quantized(x)
    assert torch.equal(drawn, quantized(x).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_are_multiplied_as_in_training(dtype: torch.dtype):
    """Sums of 8-bit whole numbers go beyond 65504."""
    plain = nn.Linear(224, 32)
    quantized = QuantLinear(plain, Parts(lsq_weight(8, plain.weight), Lsq(8))).eval()
    x = torch.ones(4, 224) + torch.rand(4, 224)
    plain.weight.data.abs_()
    quantized.activation_quantizer.scale.data.fill_(2 / 127)
    quantized.weight_quantizer.scale.data.fill_(plain.weight.max().item() / 127)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = quantized(x)
        assert y.isfinite().all()
        assert torch.equal(y, quantized.train()(x))


def test_no_fractions_of_a_fast_convolution_remain():
    """NNPACK takes over where oneDNN is off or absent."""
    quantized, x = layer("conv", "signs"), torch.randn(16, 24, 16, 16)
    with torch.no_grad():
        expected = quantized(x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(quantized(x), expected)


def test_hooks_of_the_activation_quantizer_still_see_their_input():
    """Calibration hangs on them."""
    quantized, x, seen = layer("linear", "signs"), images("linear"), []
    quantized.activation_quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        quantized(x)
    assert seen[0] is x
