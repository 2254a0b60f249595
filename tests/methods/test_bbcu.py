"""BBCU: its unit against an independent derivation, and shortcuts around convolutions of any width."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdm_cli import methods, student
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.methods.bbcu import Bbcu, BbcuUnit
from bdm_cli.quant.frames import Threshold
from bdm_cli.quant.layers import QuantConv2d
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, SignActivation
from bdm_cli.quant.ste import sign_poly_ste
from bdm_cli.quant.swap import EDGES, Site, quantized_layers
from bdm_cli.recipe import Recipe

WITHIN = Site("down_blocks.0.resnets.0.conv1", 1, 13)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def passed(given: int, wanted: int) -> np.ndarray:
    """[wanted, given]: the shortcut's output channels in terms of its input's."""
    found = np.zeros((wanted, given))
    for j in range(max(given, wanted)):
        found[j % wanted, j % given] = 1
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (4, 8), (4, 6), (8, 4), (7, 4)])
@pytest.mark.parametrize("narrowing", ["mean", "none"])
def test_the_unit_and_its_gradients(inputs: int, outputs: int, narrowing: str):
    """The gradients in closed form: of RPReLU, of the 1x1 convolution by matrices, of the estimators."""
    conv = nn.Conv2d(inputs, outputs, 1)
    layer = QuantConv2d(conv, Bbcu(narrowing=narrowing).parts(conv, WITHIN)).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    x = normal(2, inputs, 5, 5, seed=9)
    x[0, :, 0] = -layer.frame.threshold.detach()[:, 0]
    x.requires_grad_()
    y = layer(x)
    g = normal(*y.shape, seed=8)
    y.backward(g)

    part = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    v = x.detach().numpy() + part["frame.threshold"]
    w = part["weight"][..., 0, 0]
    binary = np.abs(w).mean(1, keepdims=True) * np.where(w >= 0, 1, -1)
    a = np.where(v >= 0, 1.0, -1.0)
    moved = np.einsum("kc,nchw->nkhw", binary, a) + part["bias"][:, None, None] + part["frame.rprelu.move_1"]
    slope = np.where(moved >= 0, 1, part["frame.rprelu.slope"])
    way = passed(inputs, outputs) * (outputs >= inputs or narrowing == "mean")
    wanted = slope * moved + part["frame.rprelu.move_2"] + np.einsum("kc,nchw->nkhw", way, x.detach().numpy())
    np.testing.assert_allclose(y.detach().numpy(), wanted, rtol=1e-10, atol=1e-10)

    g = g.numpy()
    through = g * slope
    by_v = np.einsum("kc,nkhw->nchw", binary, through) * (2 - 2 * np.abs(v)).clip(0)
    every = (0, 2, 3)
    gradients = {
        "weight": (np.einsum("nkhw,nchw->kc", through, a) * (np.abs(w) <= 1))[..., None, None],
        "bias": through.sum(every),
        "frame.threshold": by_v.sum(every)[:, None, None],
        "frame.rprelu.move_1": through.sum(every)[:, None, None],
        "frame.rprelu.move_2": g.sum(every)[:, None, None],
        "frame.rprelu.slope": (g * moved.clip(max=0)).sum(every)[:, None, None],
    }
    for name, parameter in layer.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), gradients[name], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), by_v + np.einsum("kc,nkhw->nchw", way, g), rtol=1e-9, atol=1e-9)


def test_the_activation_does_not_touch_the_shortcut():
    unit = BbcuUnit(nn.Conv2d(4, 4, 3, padding=1), "mean")
    x, product = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    assert torch.equal(unit.after(x, product, None), F.leaky_relu(product, 0.25) + x)
    assert torch.equal(unit.after(x, torch.zeros_like(product), None), x)


def test_sides_are_pooled_at_stride_2():
    unit = BbcuUnit(nn.Conv2d(4, 4, 3, 2, 1), "mean")
    x = torch.randn(2, 4, 6, 6)
    zero = torch.zeros(2, 4, 3, 3)
    torch.testing.assert_close(unit.after(x, zero, None), x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))


def test_what_a_unit_costs():
    read, wide, narrow = (torch.Size((1, c, 5, 5)) for c in (4, 8, 2))
    assert BbcuUnit(nn.Conv2d(4, 8, 1), "mean").operations(read, wide) == 100 + 200 + 600
    assert BbcuUnit(nn.Conv2d(4, 2, 1), "mean").operations(read, narrow) == 100 + (50 + 100) + 150
    assert BbcuUnit(nn.Conv2d(4, 2, 1), "none").operations(read, narrow) == 100 + 150
    assert BbcuUnit(nn.Conv2d(4, 8, 1), "mean").stored() == 4 + 3 * 8


@pytest.mark.parametrize("narrowing", ["mean", "none"])
def test_which_layer_gets_what(tiny_recipe: Callable[..., Recipe], narrowing: str):
    spec = tiny_recipe("method.activation_bits=1", f"method.narrowing={narrowing}", method="bbcu")
    unet = build_unet(spec.unet)
    had_bias = {name: module.bias is not None for name, module in unet.named_modules() if hasattr(module, "weight")}
    methods.build(spec).quantize_(unet)
    found = dict(quantized_layers(unet))
    narrower = 0
    for name, layer in found.items():
        assert (layer.bias is not None) == had_bias[name]
        if name in EDGES:
            assert (type(layer.weight_quantizer), type(layer.activation_quantizer)) == (Lsq, Lsq)
            assert layer.frame is None
            continue
        outputs, inputs = layer.weight.shape[:2]
        assert type(layer.weight_quantizer) is MeanSignWeight
        assert type(layer.activation_quantizer) is SignActivation
        assert layer.activation_quantizer.estimator is sign_poly_ste
        if isinstance(layer, nn.Conv2d):
            assert type(layer.frame) is BbcuUnit
            assert layer.frame.carries == (outputs >= inputs or narrowing == "mean")
            narrower += outputs < inputs
        else:
            assert type(layer.frame) is Threshold
    assert narrower > 4


def test_it_is_for_one_bit_alone(tiny_recipe: Callable[..., Recipe]):
    with pytest.raises(BdmError, match=r"method\.activation_bits: .*1.*\(given 4\)"):
        methods.build(tiny_recipe(method="bbcu"))
    with pytest.raises(BdmError, match=r"method\.narrowing: "):
        methods.build(tiny_recipe("method.activation_bits=1", "method.narrowing=first", method="bbcu"))
    assert (Bbcu().activation_bits, Bbcu().narrowing) == (1, "mean")


@pytest.mark.parametrize("overrides", [("method.edge_bits=32",), ("method.narrowing=none", "method.real_skips=true")])
def test_packed_students_draw_bit_for_bit(tiny_recipe: Callable[..., Recipe], overrides: tuple[str, ...]):
    spec = tiny_recipe("method.activation_bits=1", *overrides, method="bbcu")
    unet = students.finished(spec)
    unpacked = student.unpacked(students.packed(spec, unet), Path("model"))
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 500)
    with torch.no_grad():
        assert torch.equal(estimate_noise(unpacked, x, t), estimate_noise(unet, x, t))
        assert torch.equal(estimate_noise(copy.deepcopy(unet), x, t), estimate_noise(unet, x, t))
