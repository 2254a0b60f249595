"""INSTA-BNN: moments, thresholds and PReLU against NumPy and an independent autograd derivation; where they stand."""

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
from bdm_cli.methods.instabnn import InstaBnn, InstaPReLU, InstaThreshold, InstaUnit, third_moment
from bdm_cli.quant.frames import RPReLU, Threshold
from bdm_cli.quant.layers import QuantConv2d
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, SignActivation
from bdm_cli.quant.ste import sign_poly_ste
from bdm_cli.quant.swap import EDGES, Site, quantized_layers
from bdm_cli.recipe import Recipe

WITHIN = Site("down_blocks.0.resnets.0.conv1", 1, 13)
ONE_BIT = ("method.activation_bits=1", "method.edge_bits=32")
NORMALIZED = ["image", "channel"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(x: Tensor, normalized: str) -> Tensor:
    """The third moment by its words, one image [C, L] and channel at a time. [N, C, L] -> [N, C, 1]."""
    found = []
    for image in x:
        for channel in image:
            of = image if normalized == "image" else channel
            deviation = ((of - of.mean()) ** 2).mean() + 1e-5
            found.append((((channel - of.mean()) / deviation.sqrt()) ** 3).mean())
    return torch.stack(found).view(*x.shape[:2], 1)


@pytest.mark.parametrize("normalized", NORMALIZED)
def test_the_third_moment_and_its_gradient(normalized: str):
    x = (normal(2, 3, 4, 5).exp() - 1).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    found, expected = third_moment(x, normalized), moment(twin.flatten(2), normalized).unsqueeze(-1)
    assert found.shape == (2, 3, 1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    g = normal(2, 3, 1, 1, seed=1)
    found.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("normalized", NORMALIZED)
def test_tokens_are_positions_too(normalized: str):
    maps = normal(2, 3, 4, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    found = third_moment(tokens, normalized)
    assert found.shape == (2, 1, 3)
    torch.testing.assert_close(found[:, 0], third_moment(maps, normalized)[..., 0, 0])


def test_known_moments():
    """An image of channels -1, 1 (each in half of the positions) and 0, 0, and one of a single outlier."""
    even = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).view(1, 2, 2, 2)
    for normalized in ("image", "channel"):
        assert third_moment(even, normalized).flatten().tolist() == pytest.approx([0, 0], abs=1e-12)
    # 4, 0, 0, 0: mean 1, variance 3, third central moment (27 - 3) / 4 = 6
    outlier = torch.tensor([4.0, 0, 0, 0], dtype=torch.float64).view(1, 1, 2, 2)
    for normalized in ("image", "channel"):
        assert third_moment(outlier, normalized).item() == pytest.approx(6 / 3**1.5, rel=1e-4)
    # channels of constants 1 and -1: each is one deviation from the image's mean, and has no deviation of its own
    flat = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert third_moment(flat, "image").flatten().tolist() == pytest.approx([1, -1], rel=1e-4)
    assert third_moment(flat, "channel").flatten().tolist() == [0, 0]


@pytest.mark.parametrize("normalized", NORMALIZED)
def test_moments_do_not_depend_on_the_rest_of_the_batch_or_on_scale(normalized: str):
    x = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    together = third_moment(x, normalized)
    for image in range(4):
        assert torch.equal(third_moment(x[image : image + 1], normalized)[0], together[image])
    torch.testing.assert_close(third_moment(100 * x + 7, normalized), together, rtol=1e-3, atol=1e-3)
    half = third_moment((100 * x).half(), normalized)  # whose cubes are beyond a half float
    assert half.isfinite().all()
    silent = third_moment(torch.zeros(1, 3, 2, 2, requires_grad=True), normalized)
    assert silent.flatten().tolist() == [0, 0, 0]


def valued(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` with the gradient of `surrogate`."""
    return value.detach() + surrogate - surrogate.detach()


def expected(x: Tensor, part: dict[str, Tensor], normalized: str, instance: bool, repeated: int) -> Tensor:
    """PReLU(conv(sgn(x - alpha E[v^3] - beta), w) + bias + shortcut) of a 1x1 convolution, its shifts with moments."""

    def of(y: Tensor) -> Tensor:
        return moment(y.flatten(2), normalized).unsqueeze(-1)

    v = x - part["frame.alpha"] * of(x) - part["frame.beta"]
    near = v.clamp(-1, 1)
    a = valued(torch.where(v >= 0, 1.0, -1.0).double(), torch.where(near >= 0, 2 * near - near**2, 2 * near + near**2))
    w = part["weight"]
    binary = valued(w.abs().mean((1, 2, 3), keepdim=True) * torch.where(w >= 0, 1.0, -1.0), w.clamp(-1, 1))
    y = torch.einsum("kc,nchw->nkhw", binary[..., 0, 0], a) + part["bias"].view(-1, 1, 1)
    if repeated:
        y = y + torch.cat([x] * repeated, 1)
    prelu = {name.removeprefix("frame.prelu."): p for name, p in part.items() if name.startswith("frame.prelu.")}
    gain_1, gain_2 = (prelu["gain_1"] * of(y), prelu["gain_2"] * of(y)) if instance else (0, 0)
    moved = y + prelu["move_1"] + gain_1
    return moved.clamp_min(0) + prelu["slope"] * moved.clamp_max(0) + prelu["move_2"] + gain_2


@pytest.mark.parametrize(("inputs", "outputs", "repeated"), [(4, 4, 1), (3, 6, 2), (4, 6, 0), (6, 3, 0)])
@pytest.mark.parametrize("prelu", ["instance", "plain"])
@pytest.mark.parametrize("normalized", NORMALIZED)
def test_the_unit_and_its_gradients(inputs: int, outputs: int, repeated: int, prelu: str, normalized: str):
    conv = nn.Conv2d(inputs, outputs, 1)
    method = InstaBnn(activation_bits=1, prelu=prelu, normalized=normalized)
    layer = QuantConv2d(conv, method.parts(conv, WITHIN)).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed) / 2
    x = normal(2, inputs, 4, 3, seed=19).requires_grad_()
    own = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    twin = x.detach().clone().requires_grad_()
    y, wanted = layer(x), expected(twin, own, normalized, prelu == "instance", repeated)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    g = normal(*y.shape, seed=8)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-8, atol=1e-8)
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-8, atol=1e-8)


def test_the_start_is_reactnets():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    unit = InstaUnit(conv, "image", "instance")
    x, product = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    assert torch.equal(unit.before(x), x)
    assert torch.equal(unit.after(x, product, None), F.leaky_relu(product + x, 0.25))


def test_what_is_stored_and_what_it_costs():
    conv, read, written = nn.Conv2d(4, 8, 1), torch.Size((1, 4, 5, 5)), torch.Size((1, 8, 5, 5))
    instance, plain = (InstaUnit(conv, "image", prelu) for prelu in ("instance", "plain"))
    assert (instance.stored(), plain.stored()) == (2 * 4 + 5 * 8, 2 * 4 + 3 * 8)
    assert instance.operations(read, written) == 7 * 100 + 200 + 9 * 200
    assert plain.operations(read, written) == 7 * 100 + 200 + 3 * 200
    assert InstaThreshold(nn.Linear(4, 8), "image").operations(torch.Size((1, 9, 4)), torch.Size((1, 9, 8))) == 7 * 36


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("prelu", ["instance", "plain"])
def test_which_layer_gets_what(tiny_recipe: Callable[..., Recipe], bits: int, prelu: str):
    spec = tiny_recipe(f"method.activation_bits={bits}", f"method.prelu={prelu}", method="instabnn")
    unet = build_unet(spec.unet)
    had_bias = {name: module.bias is not None for name, module in unet.named_modules() if hasattr(module, "weight")}
    methods.build(spec).quantize_(unet)
    kinds = set()
    for name, layer in quantized_layers(unet):
        assert (layer.bias is not None) == had_bias[name]
        if name in EDGES:
            assert (type(layer.weight_quantizer), layer.frame) == (Lsq, None)
            continue
        outputs, inputs = layer.weight.shape[:2]
        assert type(layer.weight_quantizer) is MeanSignWeight
        assert type(layer.activation_quantizer) is (SignActivation if bits == 1 else Lsq)
        if bits == 1:
            assert layer.activation_quantizer.estimator is sign_poly_ste
        if isinstance(layer, nn.Conv2d):
            assert type(layer.frame) is InstaUnit
            assert type(layer.frame.prelu) is (InstaPReLU if prelu == "instance" else RPReLU)
            assert layer.frame.carries == (outputs % inputs == 0)
        else:
            assert type(layer.frame) is (Threshold if name.endswith("time_emb_proj") else InstaThreshold)
        kinds.add(type(layer.frame))
    assert kinds == {InstaUnit, InstaThreshold, Threshold}


def test_thresholds_alone(tiny_recipe: Callable[..., Recipe]):
    unet = build_unet(tiny_recipe().unet)
    methods.build(tiny_recipe("method.form=threshold", method="instabnn")).quantize_(unet)
    for name, layer in quantized_layers(unet):
        if name not in EDGES:
            assert type(layer.frame) is (Threshold if name.endswith("time_emb_proj") else InstaThreshold)


def test_thresholds_differ_from_image_to_image(tiny_recipe: Callable[..., Recipe]):
    frame = InstaThreshold(nn.Conv2d(3, 3, 1), "image")
    frame.alpha.data.fill_(0.5)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    thresholds = x - frame.before(x).detach()
    assert np.ptp(thresholds.flatten(2).numpy(), 2).max() < 1e-6
    assert (thresholds[0] - thresholds[1]).abs().min() > 1e-3


def test_the_defaults_and_faulty_fields(tiny_recipe: Callable[..., Recipe]):
    method = InstaBnn()
    assert (method.activation_bits, method.normalized, method.prelu) == (4, "image", "instance")
    assert method.form == "original"
    for field in ("normalized=batch", "form=bibench", "prelu=none", "activation_bits=32"):
        with pytest.raises(BdmError, match=rf"method\.{field.split('=')[0]}: "):
            methods.build(tiny_recipe(f"method.{field}", method="instabnn"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method.form=threshold",),
        ONE_BIT,
        (*ONE_BIT, "method.normalized=channel", "method.prelu=plain", "method.real_skips=true"),
    ],
)
def test_packed_students_draw_bit_for_bit(tiny_recipe: Callable[..., Recipe], overrides: tuple[str, ...]):
    spec = tiny_recipe(*overrides, method="instabnn")
    unet = students.finished(spec)
    unpacked = student.unpacked(students.packed(spec, unet), Path("model"))
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 500)
    with torch.no_grad():
        assert torch.equal(estimate_noise(unpacked, x, t), estimate_noise(unet, x, t))
        assert torch.equal(estimate_noise(copy.deepcopy(unet), x, t), estimate_noise(unet, x, t))
