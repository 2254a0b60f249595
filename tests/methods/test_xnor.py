"""XNOR-Net: the scaled product and its gradients against NumPy, the official weights, sites, packing."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
from torch import Tensor, nn

from bdm_cli import methods, student
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.methods.xnor import InputScale, Xnor, XnorWeight
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, SignActivation
from bdm_cli.quant.swap import quantized_layers, sites
from bdm_cli.recipe import Recipe

TinyRecipe = Callable[..., Recipe]
EDGES = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
UP = np.nextafter(1.0, 2.0)
SPECIAL = [0.0, 1.0, -1.0, UP, -UP, 2.5, -2.5]


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal numbers, the first of them at 0 and around the clip's edges."""
    x = np.random.default_rng(seed).standard_normal(shape)
    x.reshape(-1)[: len(SPECIAL)] = SPECIAL[: x.size]
    return x


def sign(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def passes(x: np.ndarray) -> np.ndarray:
    return (np.abs(x) <= 1).astype(float)


def patches(x: np.ndarray, k: int, stride: int, padding: int) -> np.ndarray:
    """[N, C, H, W] -> [N, C, k, k, H', W'], zeros around."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    h, w = ((side - k) // stride + 1 for side in x.shape[2:])
    found = np.zeros((*x.shape[:2], k, k, h, w))
    for i in range(k):
        for j in range(k):
            found[:, :, i, j] = x[:, :, i : i + stride * h : stride, j : j + stride * w : stride]
    return found


def unpatched(p: np.ndarray, shape: tuple[int, ...], stride: int, padding: int) -> np.ndarray:
    """The adjoint of `patches`."""
    n, c, height, width = shape
    k, (h, w) = p.shape[2], p.shape[4:]
    x = np.zeros((n, c, height + 2 * padding, width + 2 * padding))
    for i in range(k):
        for j in range(k):
            x[:, :, i : i + stride * h : stride, j : j + stride * w : stride] += p[:, :, i, j]
    return x[:, :, padding : padding + height, padding : padding + width]


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


def run(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer's training forward in float64."""
    layer.train().double()
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return layer(x)


@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0)])
@pytest.mark.parametrize("form", ["through", "detached", "sample", "none"])
def test_a_convolution_and_its_gradients(form: str, k: int, stride: int, padding: int):
    x, w, b = values((2, 3, 5, 7), 0), values((4, 3, k, k), 1), values((4,), 2)
    per = "sample" if form == "sample" else "map"
    conv = nn.Conv2d(3, 4, k, stride, padding)
    frame = None if form == "none" else InputScale(conv, per, form == "detached")
    layer = QuantConv2d(conv, Parts(MeanSignWeight(), SignActivation(), frame))
    inputs = tensors(x, w, b)
    y = run(layer, *inputs)

    m = np.abs(w).mean((1, 2, 3))
    wq = m[:, None, None, None] * sign(w)
    columns = patches(sign(x), k, stride, padding)
    product = np.einsum("nchwab,ochw->noab", columns, wq)
    scale = {
        "none": np.ones((2, 1, 1, 1)),
        "sample": np.abs(x).mean((1, 2, 3), keepdims=True),
    }.get(form, patches(np.abs(x).mean(1, keepdims=True), k, stride, padding).mean((2, 3)))
    expected = product * scale + b[:, None, None]
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-12)

    g = np.random.default_rng(3).standard_normal(expected.shape)
    y.backward(torch.tensor(g))
    by_weight = np.einsum("nchwab,noab->ochw", columns, g * scale)
    np.testing.assert_allclose(layer.weight.grad.numpy(), by_weight * passes(w), atol=1e-12)
    np.testing.assert_allclose(layer.bias.grad.numpy(), g.sum((0, 2, 3)), atol=1e-12)
    through_signs = g if form == "sample" else g * scale
    by_x = unpatched(np.einsum("noab,ochw->nchwab", through_signs, wq), x.shape, stride, padding) * passes(x)
    if form == "through":
        by_scale = (g * product).sum(1, keepdims=True) / k**2
        spread = np.broadcast_to(by_scale[:, :, None, None], (2, 1, k, k, *g.shape[2:]))
        by_mean = unpatched(spread, (2, 1, 5, 7), stride, padding)
        by_x = by_x + by_mean * np.sign(x) / 3
    np.testing.assert_allclose(inputs[0].grad.numpy(), by_x, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6)])
@pytest.mark.parametrize("form", ["through", "detached", "sample", "none"])
def test_a_linear_layer_and_its_gradients(form: str, shape: tuple[int, ...]):
    x, w, b = values(shape, 0), values((4, 6), 1), values((4,), 2)
    linear = nn.Linear(6, 4)
    frame = None if form == "none" else InputScale(linear, "sample" if form == "sample" else "map", form == "detached")
    layer = QuantLinear(linear, Parts(MeanSignWeight(), SignActivation(), frame))
    inputs = tensors(x, w, b)
    y = run(layer, *inputs)

    wq = np.abs(w).mean(1, keepdims=True) * sign(w)
    product = sign(x) @ wq.T
    rows = tuple(range(1, x.ndim)) if form == "sample" else -1
    scale = np.ones(1) if form == "none" else np.abs(x).mean(rows, keepdims=True)
    np.testing.assert_allclose(y.detach().numpy(), product * scale + b, atol=1e-12)

    g = np.random.default_rng(3).standard_normal(product.shape)
    y.backward(torch.tensor(g))
    by_weight = (g * scale).reshape(-1, 4).T @ sign(x).reshape(-1, 6)
    np.testing.assert_allclose(layer.weight.grad.numpy(), by_weight * passes(w), atol=1e-12)
    by_x = (g if form == "sample" else g * scale) @ wq * passes(x)
    if form == "through":
        by_x = by_x + (g * product).sum(-1, keepdims=True) * np.sign(x) / 6
    np.testing.assert_allclose(inputs[0].grad.numpy(), by_x, atol=1e-12)


def test_an_input_of_zeros_gives_finite_gradients():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    for per in ("map", "sample"):
        layer = QuantConv2d(conv, Parts(MeanSignWeight(), SignActivation(), InputScale(conv, per, False)))
        x = torch.zeros(1, 2, 4, 4, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()


# the official weights


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 5)])
def test_the_official_gradient(shape: tuple[int, ...]):
    w = values(shape, 0)
    (weight,) = tensors(w)
    y = XnorWeight()(weight)
    m = np.abs(w).reshape(4, -1).mean(1).reshape(4, *[1] * (w.ndim - 1))
    np.testing.assert_allclose(y.detach().numpy(), m * sign(w), rtol=1e-14)
    g = np.random.default_rng(1).standard_normal(shape)
    y.backward(torch.tensor(g))
    slope = (m * (np.abs(w) < 1) + 1 / w[0].size) * (1 - 1 / shape[1])
    np.testing.assert_allclose(weight.grad.numpy(), g * slope, rtol=1e-13)
    with torch.no_grad():
        (term,) = XnorWeight().terms(weight)
        assert torch.equal(term.levels * term.sigma.view(m.shape), XnorWeight()(weight))


def test_filters_are_centred_over_input_channels_and_clamped():
    w = values((4, 3, 3, 3), 0)
    weight = torch.tensor(w)
    XnorWeight().centre_(weight)
    np.testing.assert_allclose(weight.numpy(), (w - w.mean(1, keepdims=True)).clip(-1, 1), rtol=1e-14)
    small = torch.tensor(0.1 * w).clamp_(-0.4, 0.4)
    XnorWeight().centre_(small)
    again = small.clone()
    XnorWeight().centre_(again)
    torch.testing.assert_close(again, small, rtol=0, atol=1e-15)


# the method


def one_bit(tiny_recipe: TinyRecipe, *overrides: str) -> Recipe:
    return tiny_recipe("method.activation_bits=1", "method.edge_bits=32", *overrides, method="xnor")


def batch(spec: Recipe, n: int = 2) -> tuple[Tensor, ...]:
    return student.random_inputs(spec, n, torch.Generator().manual_seed(5))


def test_the_defaults_are_equation_9():
    method = Xnor()
    assert (method.activation_bits, method.edge_bits, method.real_skips) == (1, 32, False)
    assert (method.scale, method.gradient, method.weights, method.bias) == ("map", "through", "analytic", False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", ["map", "none"])
def test_all_layers_but_the_edges_are_binarized(tiny_recipe: TinyRecipe, scale: str, bias: bool):
    spec = one_bit(tiny_recipe, "method.edge_bits=8", f"method.scale={scale}", f"method.bias={str(bias).lower()}")
    plain = build_unet(spec.unet)
    had = {site.name: layer.bias is not None for site, layer in sites(plain)}
    methods.build(spec).quantize_(plain)
    found = dict(quantized_layers(plain))
    assert found.keys() == had.keys()
    for name, layer in found.items():
        kinds = (type(layer.weight_quantizer), type(layer.activation_quantizer))
        assert kinds == ((Lsq, Lsq) if name in EDGES else (MeanSignWeight, SignActivation))
        assert type(layer.frame) is (type(None) if name in EDGES or scale == "none" else InputScale)
        assert (layer.bias is not None) == (had[name] and (bias or name in EDGES))


def test_edges_and_skips_stay_real_where_told(tiny_recipe: TinyRecipe):
    spec = one_bit(tiny_recipe, "method.real_skips=true")
    unet = build_unet(spec.unet)
    methods.build(spec).quantize_(unet)
    left = {s.name for s, layer in sites(unet)} - dict(quantized_layers(unet)).keys()
    assert left == EDGES | {name for name, _ in unet.named_modules() if name.endswith("conv_shortcut")}
    assert all(unet.get_submodule(name).bias is not None for name in left)


@pytest.mark.parametrize("weights", ["analytic", "official"])
def test_only_official_weights_are_centred_and_only_those_of_binarized_layers(tiny_recipe: TinyRecipe, weights: str):
    spec = one_bit(tiny_recipe, f"method.weights={weights}")
    unet, method = build_unet(spec.unet), methods.build(spec)
    method.quantize_(unet)
    before = copy.deepcopy(unet.state_dict())
    method.on_step_(unet, 0, 10)
    binarized = {f"{name}.weight" for name, _ in quantized_layers(unet)}
    for name, tensor in unet.state_dict().items():
        if weights == "official" and name in binarized:
            assert not torch.equal(tensor, before[name])
            assert tensor.mean(1).abs().max() < 1e-6
        else:
            assert torch.equal(tensor, before[name])
    once = copy.deepcopy(unet.state_dict())
    method.on_step_(unet, 0, 10)
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "overrides", [("method.gradient=detached",), ("method.scale=sample", "method.weights=official")]
)
def test_variants_train(tiny_recipe: TinyRecipe, tiny_teacher: Path, overrides: tuple[str, ...]):
    spec = one_bit(tiny_recipe, "train.steps=30", *overrides)
    _, unet, method = student.build(spec, seed=0)
    (x, t), noise = batch(spec), torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for step in range(30):
        loss = (estimate_noise(unet, x, t) - noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in unet.parameters())
        optimizer.step()
        method.on_step_(unet, step + 1, 30)
    assert losses[-1] < 0.8 * losses[0]


FORMS = [(), ("method.scale=sample", "method.edge_bits=8"), ("method.scale=none", "method.weights=official")]


@pytest.mark.parametrize("overrides", FORMS, ids=" ".join)
def test_packed_copied_and_loaded_students_give_bit_equal_output(
    tiny_recipe: TinyRecipe, tmp_path: Path, overrides: tuple[str, ...]
):
    spec = one_bit(tiny_recipe, *overrides)
    unet = students.finished(spec)
    students.assert_copies_agree(spec, unet, tmp_path)
    x, t = batch(spec)
    t = torch.full_like(t, 500)
    with torch.no_grad():
        expected = estimate_noise(unet, x, t)
        alone = torch.cat([estimate_noise(unet, x[i : i + 1], t[:1]) for i in range(2)])
        fused = student.unpacked(students.packed(spec, unet), tmp_path, fused=True)
        assert estimate_noise(fused, x, t).isfinite().all()
    torch.testing.assert_close(alone, expected)


def test_the_map_is_the_same_for_any_batch_and_memory_format():
    x = torch.randn(5, 17, 6, 6, generator=torch.Generator().manual_seed(0))
    layers = {per: InputScale(nn.Conv2d(17, 4, 3, padding=1), per, False) for per in ("map", "sample")}
    for frame in layers.values():
        whole = frame.scale(x)
        assert torch.equal(frame.scale(x.contiguous(memory_format=torch.channels_last)), whole)
        assert torch.equal(torch.cat([frame.scale(part) for part in x.split(1)]), whole)


def test_what_the_frame_costs():
    read, written = torch.Size((2, 3, 8, 8)), torch.Size((2, 5, 4, 4))
    conv = nn.Conv2d(3, 5, 3, 2, 1)
    mean, product = 2 * 3 * 64, 2 * 5 * 16
    assert InputScale(conv, "map", False).operations(read, written) == mean + 9 * 2 * 16 + product
    assert InputScale(conv, "sample", False).operations(read, written) == mean + product
    rows = InputScale(nn.Linear(3, 5), "map", False).operations(torch.Size((2, 7, 3)), torch.Size((2, 7, 5)))
    assert rows == 2 * 7 * 3 + 2 * 7 * 5
    assert InputScale(conv, "map", False).stored() == 0


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("activation_bits=4", r"method.activation_bits: .*1.*\(given 4\)"),
        ("attention_matmul=true", r"method.attention_matmul: .*\(given True\)"),
        ("scale=image", r"method.scale: .*'map', 'sample' or 'none'.*\(given 'image'\)"),
    ],
)
def test_faulty_fields(tiny_recipe: TinyRecipe, field: str, text: str):
    with pytest.raises(BdmError, match=text):
        methods.build(one_bit(tiny_recipe, f"method.{field}"))
