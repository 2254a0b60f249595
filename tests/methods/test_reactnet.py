"""ReActNet: its unit against an independent derivation, where its parts stand, and its two steps."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import students
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdm_cli import methods, student
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.methods.reactnet import ReActNet, ReActUnit
from bdm_cli.quant.frames import Threshold
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, SignActivation
from bdm_cli.quant.ste import sign_poly_ste
from bdm_cli.quant.swap import EDGES, Site, quantized_layers
from bdm_cli.recipe import Recipe

WITHIN = Site("down_blocks.0.resnets.0.conv1", 1, 13)
ONE_BIT = ("method.activation_bits=1", "method.edge_bits=32")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def valued(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` with the gradient of `surrogate`."""
    return value.detach() + surrogate - surrogate.detach()


def sign_of_activations(v: Tensor) -> Tensor:
    """sgn with the gradient of Bi-Real's F: v^2 + 2v below 0, -v^2 + 2v from 0 on, constant beyond -1 and 1."""
    inner = v.clamp(-1, 1)
    return valued(
        torch.where(v >= 0, 1.0, -1.0).double(), torch.where(inner >= 0, 2 * inner - inner**2, 2 * inner + inner**2)
    )


def binary(weight: Tensor) -> Tensor:
    """mean|w| sgn(w) per output channel, whose gradient is 1 where |w| <= 1, without the mean."""
    mean = weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))
    return valued(mean * torch.where(weight >= 0, 1.0, -1.0), weight.clamp(-1, 1))


def expected(x: Tensor, part: dict[str, Tensor], stride: int, repeated: int) -> Tensor:
    """RPReLU(conv(sgn(x + b), w) + bias + shortcut), with `repeated` times the channels; 0 = without shortcut."""
    y = F.conv2d(sign_of_activations(x + part["frame.threshold"]), binary(part["weight"]), None, stride, 1)
    y = y + part["bias"].view(-1, 1, 1)
    pooled = x if stride == 1 else (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    if repeated:
        y = y + torch.cat([pooled] * repeated, 1)
    moved = y + part["frame.rprelu.move_1"]
    return moved.clamp_min(0) + part["frame.rprelu.slope"] * moved.clamp_max(0) + part["frame.rprelu.move_2"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "repeated"), [(4, 4, 1, 1), (4, 4, 2, 1), (4, 8, 1, 2), (4, 6, 1, 0), (8, 4, 1, 0)]
)
def test_the_unit_and_its_gradients(inputs: int, outputs: int, stride: int, repeated: int):
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
    layer = QuantConv2d(conv, ReActNet(activation_bits=1).parts(conv, WITHIN)).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    x = normal(2, inputs, 6, 6, seed=9)
    x[0, :, 0] = -layer.frame.threshold.detach()[:, 0]  # sums of exactly 0, and of the estimator's edge
    x[0, :, 1] = 1 - layer.frame.threshold.detach()[:, 0]
    x.requires_grad_()
    own = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    twin = x.detach().clone().requires_grad_()
    y, wanted = layer(x), expected(twin, own, stride, repeated)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    g = normal(*y.shape, seed=8)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-11, atol=1e-11)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-11, atol=1e-11)
    assert layer.frame.carries == (repeated > 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_more_bits_quantize_the_sum_on_lsqs_grid(bits: int):
    linear = nn.Linear(5, 3)
    layer = QuantLinear(linear, ReActNet(activation_bits=bits).parts(linear, WITHIN)).double()
    layer.activation_quantizer.scale.data.fill_(0.3)
    layer.frame.threshold.data = normal(5)
    x = 3 * normal(7, 5, seed=1)
    levels = ((x + normal(5)) / 0.3).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight = linear.weight.detach().double()
    signs = torch.where(weight >= 0, 1.0, -1.0).double() * weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(layer(x).detach(), 0.3 * levels @ signs.T + layer.bias.detach(), rtol=1e-6, atol=1e-6)


def test_the_start_is_a_shortcut_and_a_slope_of_a_quarter():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    unit = ReActUnit(conv)
    x, product = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    assert torch.equal(unit.before(x), x)
    assert torch.equal(unit.after(x, product, None), F.leaky_relu(product + x, 0.25))
    assert unit.stored() == 4 + 3 * 4
    read = written = torch.Size((1, 4, 5, 5))
    assert unit.operations(read, written) == 100 + 100 + 300
    assert ReActUnit(nn.Conv2d(4, 6, 1)).operations(read, torch.Size((1, 6, 5, 5))) == 100 + 3 * 150


@pytest.mark.parametrize("form", ["original", "bibench"])
@pytest.mark.parametrize("bits", [1, 4])
def test_which_layer_gets_what(tiny_recipe: Callable[..., Recipe], form: str, bits: int):
    spec = tiny_recipe(f"method.form={form}", f"method.activation_bits={bits}", method="reactnet")
    unet = build_unet(spec.unet)
    had_bias = {name: module.bias is not None for name, module in unet.named_modules() if hasattr(module, "weight")}
    methods.build(spec).quantize_(unet)
    found = dict(quantized_layers(unet))
    assert len(found) > 40
    for name, layer in found.items():
        if name in EDGES:
            assert (type(layer.weight_quantizer), type(layer.activation_quantizer)) == (Lsq, Lsq)
            assert layer.frame is None
            assert (layer.bias is not None) == had_bias[name]
            continue
        conv = isinstance(layer, nn.Conv2d)
        assert type(layer.frame) is (ReActUnit if conv and form == "original" else Threshold)
        assert layer.frame.threshold.shape == ((layer.weight.shape[1], 1, 1) if conv else (layer.weight.shape[1],))
        assert type(layer.weight_quantizer) is MeanSignWeight
        assert layer.weight_quantizer.per == "channel"
        assert (layer.bias is not None) == (had_bias[name] and form == "original")
        quantizer = layer.activation_quantizer
        if bits == 1:
            assert type(quantizer) is SignActivation
            assert quantizer.estimator is sign_poly_ste
        else:
            assert (type(quantizer), quantizer.bits, quantizer.low) == (Lsq, 4, -8)
    carried = {name for name, layer in found.items() if isinstance(layer.frame, ReActUnit) and layer.frame.carries}
    if form == "original":  # not where the up path narrows; doubled where the down path widens
        assert "down_blocks.1.resnets.0.conv1" in carried
        assert "down_blocks.0.downsamplers.0.conv" in carried
        assert "up_blocks.0.resnets.0.conv1" not in carried
        assert "up_blocks.0.resnets.0.conv2" in carried


def test_weights_are_real_in_the_first_step_alone(
    tiny_recipe: Callable[..., Recipe], tiny_teacher: Path, tmp_path: Path
):
    spec = tiny_recipe("train.steps=10", "method.first_step=0.3", method="reactnet")
    _, unet, method = student.build(spec, seed=0)
    layers = {name: layer for name, layer in quantized_layers(unet) if name not in EDGES}
    for step in (0, 1, 2, 2, 0):
        method.on_step_(unet, step, 10)
        assert all(layer.weight_is_real for layer in layers.values())
        assert not any(layer.weight_is_real for name, layer in quantized_layers(unet) if name in EDGES)
    x = torch.randn(2, 1, 8, 8)
    method.calibrate_(unet, unet, [(x, torch.tensor([5, 700]))])
    layer = layers["mid_block.resnets.0.conv1"]
    twin = QuantConv2d(copy.deepcopy(layer), Parts(None, layer.activation_quantizer, layer.frame))
    h = torch.randn(2, 16, 2, 2)
    assert torch.equal(layer(h), twin(h))
    for step in (2, 3, 10):
        path = tmp_path / f"{step}.safetensors"
        method.on_step_(unet, step, 10)
        student.save(path, unet, spec, seed=0, step=step)
        loaded = dict(quantized_layers(student.load(path).student))
        assert {loaded[name].weight_is_real for name in layers} == {step < 3}
        assert {layer.weight_is_real for layer in layers.values()} == {step < 3}
    assert not torch.equal(layer(h), twin(h))


def test_one_step_is_the_default(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path):
    _, unet, _ = student.build(tiny_recipe(method="reactnet"), seed=0)
    assert not any(layer.weight_is_real for _, layer in quantized_layers(unet))
    assert (ReActNet().activation_bits, ReActNet().form, ReActNet().first_step) == (4, "original", 0)


@pytest.mark.parametrize("field", ["first_step=1.0", "first_step=-0.1", "form=other", "activation_bits=32"])
def test_faulty_fields(tiny_recipe: Callable[..., Recipe], field: str):
    with pytest.raises(BdmError, match=rf"method\.{field.split('=')[0]}: "):
        methods.build(tiny_recipe(f"method.{field}", method="reactnet"))


@pytest.mark.parametrize("overrides", [(), ONE_BIT, (*ONE_BIT, "method.form=bibench", "method.real_skips=true")])
def test_packed_students_draw_bit_for_bit(tiny_recipe: Callable[..., Recipe], overrides: tuple[str, ...]):
    spec = tiny_recipe(*overrides, method="reactnet")
    unet = students.finished(spec)
    unpacked = student.unpacked(students.packed(spec, unet), Path("model"))
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 500)
    with torch.no_grad():
        assert torch.equal(estimate_noise(unpacked, x, t), estimate_noise(unet, x, t))
        assert torch.equal(estimate_noise(copy.deepcopy(unet), x, t), estimate_noise(unet, x, t))
