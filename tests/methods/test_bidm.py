"""BiDM: its layers against NumPy, its connections against a recursion written out, packed and simulated sampling."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
from torch import Tensor, nn

from bdm_cli import methods, recipe, student
from bdm_cli.diffusion import sampling
from bdm_cli.diffusion.conditions import of_recipe as conditions_of
from bdm_cli.diffusion.losses import FeatureTaps, mimicking_mse, patch_relations
from bdm_cli.diffusion.models import build_unet, estimate_noise, noise_scheduler
from bdm_cli.diffusion.sampling import guided, times
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Batch, Forward
from bdm_cli.methods.bidm import BiDm, BinaryConvolution, Connection, SurrogateThreshold
from bdm_cli.quant.frames import Threshold
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, SignActivation, SignWeight
from bdm_cli.quant.ste import sign_poly_ste, sign_ste
from bdm_cli.quant.swap import begin_trajectory_, quantized_layers, timestep_blocks
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built

TinyRecipe = Callable[..., Recipe]
UP = ("up_blocks.0.resnets.0", "up_blocks.0.upsamplers.0", "up_blocks.1.attentions.0", "up_blocks.1.upsamplers.0")
UP = (*UP, "up_blocks.2.resnets.0", "up_blocks.2.resnets.1")
"""Outputs of the six blocks of the tiny network's up path."""


@pytest.fixture
def build(tiny_recipe: TinyRecipe, request: pytest.FixtureRequest) -> Callable[..., Built]:
    """build(*overrides): a recipe's student before training."""

    def build(*overrides: str, seed: int = 0, name: str = "tiny-w1a4") -> Built:
        request.getfixturevalue("tiny_teacher" if name == "tiny-w1a4" else "tiny_cond_teacher")
        return student.build(spec_of(tiny_recipe, *overrides, name=name), seed)

    return build


def spec_of(tiny_recipe: TinyRecipe, *overrides: str, name: str = "tiny-w1a4") -> Recipe:
    """Of the tiny recipe, whose own edge_bits (a key that every method has) are 8."""
    return tiny_recipe("method.activation_bits=1", "method.edge_bits=32", *overrides, name=name, method="bidm")


def noisy_batch(spec: Recipe, t: Tensor, context: tuple[Tensor, ...] = ()) -> Batch:
    random, arguments = torch.Generator().manual_seed(4), spec.unet.arguments
    shape = (len(t), arguments["in_channels"], *[arguments["sample_size"]] * 2)
    clean, noise = (torch.randn(shape, generator=random) for _ in range(2))
    return Batch((noise_scheduler(spec.scheduler).add_noise(clean, noise, t), t, *context), noise, clean)


# ---- one layer -------------------------------------------------------------------------------------------------------


def sgn(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def slope(x: np.ndarray) -> np.ndarray:
    """Bi-Real's estimator."""
    return np.maximum(2 - 2 * np.abs(x), 0)


def windows(x: np.ndarray, k: int, stride: int, padding: int) -> np.ndarray:
    """[N, C, H, W] -> what each of the k x k taps sees, [k, k, N, C, H', W']."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    side = (x.shape[2] - k) // stride + 1
    end = stride * (side - 1) + 1
    return np.stack([[x[:, :, i : i + end : stride, j : j + end : stride] for j in range(k)] for i in range(k)])


def scattered(found: np.ndarray, shape: tuple[int, ...], stride: int, padding: int) -> np.ndarray:
    """The transpose of windows: gradients at the taps, added up where they come from."""
    n, c, h, w = shape
    total = np.zeros((n, c, h + 2 * padding, w + 2 * padding))
    end = stride * (found.shape[-1] - 1) + 1
    for i, j in np.ndindex(found.shape[:2]):
        total[:, :, i : i + end : stride, j : j + end : stride] += found[i, j]
    return total[:, :, padding : padding + h, padding : padding + w]


LAYERS = {
    "as wide": (4, 4, 3, 1, 1),
    "wider": (3, 5, 3, 1, 1),
    "narrower": (6, 2, 3, 1, 1),
    "strided": (4, 4, 3, 2, 1),
    "1x1": (4, 4, 1, 1, 0),
    "wider 1x1": (2, 5, 1, 1, 0),
}
"""Input and output channels, kernel, stride, padding."""


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Some beyond 1, some 0."""
    found = 0.8 * np.random.default_rng(seed).standard_normal(shape)
    found.flat[::7] = 0.0
    return found


def made(name: str, absolute: bool) -> tuple[QuantConv2d, np.ndarray]:
    """A layer in float64 with everything away from its start, and an input."""
    inputs, outputs, k, stride, padding = LAYERS[name]
    conv = nn.Conv2d(inputs, outputs, k, stride, padding).double()
    conv.weight.data = torch.tensor(numbers(conv.weight.shape, 1))
    frame = BinaryConvolution(conv, True, True, absolute, -0.375).double()
    with torch.no_grad():
        frame.threshold.copy_(torch.tensor(numbers(frame.threshold.shape, 2)))
        frame.filter.copy_(torch.tensor(numbers(frame.filter.shape, 3)) + 0.1)
        frame.filter_bias.fill_(-0.23)
    layer = QuantConv2d(conv, Parts(MeanSignWeight(), SignActivation(sign_poly_ste), frame, bias=False))
    return layer, numbers((2, inputs, 8, 8), 5)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_binary_convolution_in_numpy(name: str, absolute: bool):
    """methods.md 4.1, forward and backward: y = conv(sgn(x + b), m sgn(w)) K + |gamma| u."""
    layer, value = made(name, absolute)
    frame, (inputs, _, k, stride, padding) = layer.frame, LAYERS[name]
    x = torch.tensor(value, requires_grad=True)
    y = layer(x)
    g = np.random.default_rng(6).standard_normal(y.shape)
    y.backward(torch.tensor(g))

    w, b, kappa = (p.detach().numpy() for p in (layer.weight, frame.threshold, frame.filter))
    signs, binary = windows(sgn(value + b), k, stride, padding), np.abs(w).mean((1, 2, 3), keepdims=True) * sgn(w)
    if padding:  # zeros around, not signs
        signs *= windows(np.ones_like(value), k, stride, padding)
    z = np.einsum("ijnchw,ocij->nohw", signs, binary)
    magnitude = windows(np.abs(value).mean(1, keepdims=True), k, stride, padding)
    scale = np.einsum("ijnchw,ij->nchw", magnitude, kappa[0, 0]) - 0.23
    gamma, moved = (0.375, -1.0) if absolute else (-0.375, 1.0)
    if frame.projection is None:
        u = value if stride == 1 else value.reshape(2, inputs, 4, 2, 4, 2).mean((3, 5))
    else:
        v = frame.projection.detach().numpy()[:, :, 0, 0]
        u = np.einsum("nchw,oc->nohw", value[:, :, ::stride, ::stride], v)
    np.testing.assert_allclose(y.detach().numpy(), z * scale + gamma * u, rtol=0, atol=1e-12)

    np.testing.assert_allclose(frame.gamma.grad.item(), moved * (g * u).sum(), rtol=1e-10)
    by_scale = (g * z).sum(1, keepdims=True)
    np.testing.assert_allclose(frame.filter_bias.grad.item(), by_scale.sum(), rtol=1e-10)
    by_filter = np.einsum("ijnchw,nchw->ij", magnitude, by_scale)
    np.testing.assert_allclose(frame.filter.grad.numpy()[0, 0], by_filter, rtol=1e-10)
    by_z = g * scale
    by_signs = scattered(np.einsum("nohw,ocij->ijnchw", by_z, binary), value.shape, stride, padding)
    by_binary = np.einsum("nohw,ijnchw->ocij", by_z, signs)
    np.testing.assert_allclose(layer.weight.grad.numpy(), by_binary * (np.abs(w) <= 1), rtol=0, atol=1e-10)
    assert (np.abs(w) > 1).any()
    by_shifted = by_signs * slope(value + b)
    np.testing.assert_allclose(frame.threshold.grad.numpy().ravel(), by_shifted.sum((0, 2, 3)), rtol=0, atol=1e-10)
    taps = np.einsum("nchw,ij->ijnchw", by_scale, kappa[0, 0])
    by_x = by_shifted + scattered(taps, (2, 1, 8, 8), stride, padding) * np.sign(value) / inputs
    if frame.projection is not None:
        by_u = gamma * g
        by_v = np.einsum("nohw,nchw->oc", by_u, value)
        np.testing.assert_allclose(frame.projection.grad.numpy()[:, :, 0, 0], by_v, rtol=0, atol=1e-10)
        by_x += np.einsum("nohw,oc->nchw", by_u, v)
    else:
        by_x += gamma * (g if stride == 1 else g.repeat(2, 2).repeat(2, 3) / 4)
    np.testing.assert_allclose(x.grad.numpy(), by_x, rtol=0, atol=1e-10)


def test_the_zeros_that_diffusers_appends_are_not_pooled():
    """CIFAR's downsampling: 8 -> 9 with zeros at the right and below, then stride 2 without padding."""
    conv = nn.Conv2d(3, 3, 3, 2, 0)
    frame, x = BinaryConvolution(conv, True, False, True, 0.3), torch.randn(1, 3, 8, 8)
    padded = nn.functional.pad(x, (0, 1, 0, 1))
    assert torch.equal(frame.shortcut(padded, torch.zeros(1, 3, 4, 4)), nn.functional.avg_pool2d(x, 2))
    assert frame.scales(padded).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("outputs", [4, 6])
def test_a_projection_in_two_dimensions_is_a_1x1_convolution(outputs: int):
    conv, linear = nn.Conv2d(4, outputs, 1, bias=False), nn.Linear(4, outputs, bias=False)
    linear.weight.data = conv.weight.data.flatten(1)
    layers = []
    for kind, plain in ((QuantConv2d, conv), (QuantLinear, linear)):
        frame = BinaryConvolution(plain, True, True, True, 0.3)
        layers.append(kind(plain, Parts(MeanSignWeight(), SignActivation(sign_poly_ste), frame, bias=False)))
    state = {"frame.threshold": torch.randn(4), "frame.filter": torch.tensor(0.7), "frame.filter_bias": torch.randn(1)}
    state |= {"frame.gamma": torch.tensor([-0.2])} | (
        {"frame.projection": torch.randn(outputs, 4)} if outputs != 4 else {}
    )
    own = dict(layers[0].named_parameters()), dict(layers[1].named_parameters())
    assert {name for name in own[0] if name != "weight"} == set(state)
    with torch.no_grad():
        for parameters in own:
            for name, tensor in state.items():
                parameters[name].copy_(tensor.reshape(parameters[name].shape))
    x = torch.randn(3, 4, 5, 1)
    y = layers[0](x)
    torch.testing.assert_close(layers[1](x[..., 0].transpose(1, 2)).transpose(1, 2), y[..., 0])
    assert layers[1](torch.randn(3, 4)).shape == (3, outputs)


def test_the_threshold_of_the_surrogate():
    """sgn(x), with the gradient of sgn(x + b) for both."""
    value, g = numbers((5, 6), 0), np.random.default_rng(1).standard_normal((5, 6))
    value[0, :3] = [0.0, 1.0, -1.0]
    quantizer = SurrogateThreshold(6).double()
    assert quantizer.threshold.eq(0).all()
    b = numbers((6,), 3)
    quantizer.threshold.data = torch.tensor(b)
    x = torch.tensor(value, requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    np.testing.assert_array_equal(y.detach().numpy(), sgn(value))
    np.testing.assert_allclose(x.grad.numpy(), g * slope(value + b), rtol=1e-12)
    np.testing.assert_allclose(quantizer.threshold.grad.numpy(), (g * slope(value + b)).sum(0), rtol=1e-12)
    assert (sgn(value) != sgn(value + b)).any()


def test_what_a_layer_starts_at():
    torch.manual_seed(0)
    for name, (inputs, outputs, k, *_) in LAYERS.items():
        frame = BinaryConvolution(nn.Conv2d(inputs, outputs, k), True, False, True, 0.3)
        expected = {"threshold": (inputs, 1, 1), "gamma": (1,), "filter": (1, 1, k, k)}
        expected |= {"projection": (outputs, inputs, 1, 1)} if inputs != outputs else {}
        assert {n: tuple(p.shape) for n, p in frame.named_parameters()} == expected, name
        assert frame.threshold.eq(0).all()
        torch.testing.assert_close(frame.filter.data, torch.full((1, 1, k, k), 1 / k**2), rtol=1e-7, atol=0)
        assert frame.gamma.item() == pytest.approx(0.3)
    drawn = [BinaryConvolution(nn.Conv2d(64, 8, 3), True, True, True, 0.3) for _ in range(200)]
    biases = torch.stack([frame.filter_bias.data for frame in drawn])
    assert biases.abs().max() <= 1 / 3
    assert biases.std().item() == pytest.approx(1 / 3 / 3**0.5, rel=0.2)
    projections = torch.stack([frame.projection.data for frame in drawn])
    assert projections.abs().max() <= 1 / 8
    assert projections.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_a_fixed_box_is_no_parameter_and_is_saved():
    frame = BinaryConvolution(nn.Conv2d(4, 4, 3), False, False, True, 0.3)
    assert [name for name, _ in frame.named_parameters()] == ["threshold", "gamma"]
    assert set(frame.state_dict()) == {"threshold", "gamma", "filter"}
    x = torch.randn(2, 4, 6, 6)
    expected = nn.functional.avg_pool2d(x.abs().mean(1, keepdim=True), 3, 1)
    torch.testing.assert_close(frame.scales(x), expected)


@pytest.mark.parametrize(
    ("name", "operations", "stored"),
    [
        # threshold 256, mean 256, K 9 * 64, its product and the shortcut's 2 * 256
        ("as wide", 256 + 256 + 9 * 64 + 2 * 256, 4 + 9 + 1),
        ("wider", 192 + 192 + 9 * 64 + 2 * 320 + 3 * 320, 3 + 9 + 1 + 15),
        ("strided", 256 + 256 + 9 * 16 + 2 * 64 + 256, 4 + 9 + 1),
        ("1x1", 256 + 256 + 64 + 2 * 256, 4 + 1 + 1),
    ],
)
def test_what_a_layer_costs(name: str, operations: int, stored: int):
    inputs, outputs, k, stride, padding = LAYERS[name]
    conv = nn.Conv2d(inputs, outputs, k, stride, padding)
    frame, x = BinaryConvolution(conv, True, False, True, 0.3), torch.randn(1, inputs, 8, 8)
    assert frame.operations(x.shape, conv(x).shape) == operations
    assert frame.stored() == stored
    linear = BinaryConvolution(nn.Linear(4, 6), True, False, True, 0.3)
    assert linear.operations(torch.Size([1, 5, 4]), torch.Size([1, 5, 6])) == 20 + 20 + 5 + 2 * 30 + 4 * 30
    connection = Connection(100, 0.3, 1000)
    assert connection.operations(x.shape, x.shape) == 2 * x.numel()
    assert connection.stored() == 100


# ---- which layer is what ---------------------------------------------------------------------------------------------


def roles(unet: nn.Module) -> dict[str, dict[str, nn.Module]]:
    found: dict[str, dict[str, nn.Module]] = {"skip": {}, "projection": {}, "linear": {}, "conv": {}, "edge": {}}
    for name, layer in quantized_layers(unet):
        role = "projection" if ".to_" in name else "linear" if name.endswith("time_emb_proj") else "conv"
        role = "skip" if name.endswith("conv_shortcut") else role
        found["edge" if name.startswith(("conv_", "time_embedding")) else role][name] = layer
    return found


def test_layers_by_site(build: Callable[..., Built]):
    unet = build().student
    found = roles(unet)
    assert {role: len(layers) for role, layers in found.items()} == {
        "skip": 0, "projection": 16, "linear": 11, "conv": 26, "edge": 0
    }  # fmt: skip
    for role, layers in found.items():
        for name, layer in layers.items():
            assert type(layer.weight_quantizer) is MeanSignWeight
            assert layer.weight_quantizer.per == "channel"
            assert type(layer.activation_quantizer) is SignActivation
            assert layer.activation_quantizer.estimator is sign_poly_ste
            assert type(layer.frame) is (BinaryConvolution if role == "conv" else Threshold), name
            assert layer.bias is None
            if role == "conv":
                assert layer.frame.absolute
                assert layer.frame.filter_bias is None
                assert (layer.frame.projection is None) == (layer.in_channels == layer.out_channels)
    skips = [m for name, m in unet.named_modules() if name.endswith("conv_shortcut") and m is not None]
    assert skips
    assert {type(m) for m in skips} == {nn.Conv2d}
    assert type(unet.conv_in) is nn.Conv2d


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("attention=conv2d", lambda r: {type(m.frame) for m in r["projection"].values()} == {BinaryConvolution}),
        (
            "linear_threshold=surrogate",
            lambda r: {(type(m.activation_quantizer), m.frame) for m in r["linear"].values()}
            == {(SurrogateThreshold, None)}
            and {type(m.frame) for m in r["projection"].values()} == {Threshold},
        ),
        ("real_skips=false", lambda r: len(r["skip"]) == 7),
        ("bias=true", lambda r: all(m.bias is not None for m in r["conv"].values())),
        ("edge_bits=8", lambda r: [type(m.weight_quantizer) for m in r["edge"].values()] == [Lsq] * 4),
        ("filter=box", lambda r: all("filter" in dict(m.frame.named_buffers()) for m in r["conv"].values())),
        ("filter_bias=uniform", lambda r: all(m.frame.filter_bias is not None for m in r["conv"].values())),
        ("gamma_start=0.5", lambda r: {m.frame.gamma.item() for m in r["conv"].values()} == {0.5}),
        (
            "threshold=false",
            lambda r: {m.frame.threshold for m in r["conv"].values()} == {None}
            and {m.frame for role in ("linear", "projection") for m in r[role].values()} == {None},
        ),
        (
            "shortcut=false",
            lambda r: {(m.frame.gamma, m.frame.projection) for m in r["conv"].values()} == {(None, None)},
        ),
        (
            "estimator=clipped",
            lambda r: all(
                m.activation_quantizer.estimator is sign_ste
                for role in ("conv", "linear", "projection") for m in r[role].values()
            ),
        ),
        (
            "weight_scale=learned",
            lambda r: all(
                type(m.weight_quantizer) is SignWeight
                and torch.allclose(m.weight_quantizer.sigma.flatten(), m.weight.abs().flatten(1).mean(1))
                for role in ("conv", "linear", "projection") for m in r[role].values()
            ),
        ),
    ],
)  # fmt: skip
def test_fields_that_change_layers(build: Callable[..., Built], override: str, check: Callable[[dict], bool]):
    built = build(f"method.{override}")
    assert check(roles(built.student))
    assert not check(roles(build().student))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    built.method.calibrate_(built.student, built.teacher, iter([(x, t)]))
    assert estimate_noise(built.student, x, t).isfinite().all()


BARE = ("threshold=false", "shortcut=false", "estimator=clipped", "filter=box", "connections=0", "distillation=none")
"""What leaves nothing of BiDM."""


def test_with_everything_off_it_is_xnor(build: Callable[..., Built], tiny_recipe: TinyRecipe):
    """The paper's "vanilla" is its XNOR row: one estimate and its gradients, in float64 (a box is a sum there, or a
    mean)."""
    x, t = torch.randn(2, 1, 8, 8).double(), torch.tensor([3, 700])
    shared = ("method.activation_bits=1", "method.edge_bits=32", "method.real_skips=true")
    spec = tiny_recipe(*shared, "method.linear_scale=none", method="xnor")
    found = []
    for built in (build(*(f"method.{each}" for each in BARE)), student.build(spec, 0)):
        estimate = estimate_noise(built.student.double(), x, t)
        estimate.square().mean().backward()
        found.append((estimate, {name: p.grad for name, p in built.student.named_parameters()}))
    (ours, gradients), (xnors, expected) = found
    torch.testing.assert_close(ours, xnors)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)
    assert not estimate_noise(build().student.double(), x, t).allclose(ours, rtol=0.1)


def test_what_is_off_costs_nothing():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.Size((1, 4, 8, 8))
    bare = BinaryConvolution(conv, False, False, True, None, thresholds=False)
    assert set(bare.state_dict()) == {"filter"}
    assert bare.operations(x, torch.Size((1, 6, 8, 8))) == 256 + 9 * 64 + 384
    assert bare.stored() == 9


def test_the_code_for_cifar(build: Callable[..., Built]):
    """gamma without | | from 0, two-dimensional projections: every gamma gets a gradient at its start."""
    unet = build("method.gamma=signed", "method.gamma_start=0", "method.attention=conv2d").student
    estimate_noise(unet, torch.randn(2, 1, 8, 8), torch.tensor([3, 700])).square().mean().backward()
    gammas = [layer.frame.gamma for _, layer in quantized_layers(unet) if isinstance(layer.frame, BinaryConvolution)]
    assert len(gammas) == 26 + 16
    assert all(gamma.item() == 0 and gamma.grad.item() != 0 for gamma in gammas)


def test_draws_are_a_function_of_the_seed(build: Callable[..., Built]):
    override = "method.filter_bias=uniform"
    first, again, other = (build(override, seed=seed).student.state_dict() for seed in (1, 1, 2))
    drawn = [name for name in first if name.endswith(("filter_bias", "projection"))]
    assert len(drawn) == 26 + 7
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert all(torch.equal(first[name], other[name]) for name in first if name not in drawn)


def test_it_is_built_without_memory(tiny_recipe: TinyRecipe):
    spec = spec_of(tiny_recipe, "method.filter_bias=uniform")
    state = torch.get_rng_state()
    with torch.device("meta"):
        unet = build_unet(spec.unet)
        methods.build(spec).quantize_(unet)
    assert all(tensor.is_meta for tensor in unet.state_dict().values())
    assert torch.equal(torch.get_rng_state(), state)


# ---- connections across timesteps ------------------------------------------------------------------------------------


def connections(unet: nn.Module) -> dict[str, Connection]:
    return {name: m for name, m in unet.named_modules() if isinstance(m, Connection)}


def unlike_(unet: nn.Module) -> nn.Module:
    """With a table of its own for each connection, some entries beyond 0 and 1."""
    with torch.no_grad():
        for index, connection in enumerate(connections(unet).values()):
            connection.alpha.copy_(torch.linspace(-0.2, 1.1, 100).roll(17 * index))
    return unet


class Recursion:
    """The same weights without connections, and these written out in the test: `calls` lists the rows of each call."""

    def __init__(self, unet: nn.Module, plain: nn.Module, tables: dict[str, Tensor] | None = None) -> None:
        own = {k: v for k, v in unet.state_dict().items() if ".connection." not in k}
        plain.load_state_dict(own, strict=True)
        self.unet, self.kept, self.rows = plain, {}, None
        for name, connection in connections(unet).items():
            block = name.removesuffix(".connection")
            alpha = connection.alpha.detach() if tables is None else tables[block]
            plain.get_submodule(block).register_forward_hook(self.mixing(block, alpha))
        plain.register_forward_pre_hook(self.read)

    def read(self, unet: nn.Module, arguments: tuple) -> None:
        self.rows = [int(np.floor(float(t) * 100 / 1000)) for t in arguments[1]]

    def mixing(self, block: str, alpha: Tensor) -> Callable:
        def hook(module: nn.Module, inputs: tuple, result: Tensor) -> Tensor:
            whole, result = result, result[0] if isinstance(result, tuple) else result
            if block in self.kept:
                a = torch.stack([alpha[row] for row in self.rows]).reshape(-1, 1, 1, 1)
                result = (1 - a) * result + a * self.kept[block]
            self.kept[block] = result.detach()
            return (result, *whole[1:]) if isinstance(whole, tuple) else result

        return hook


@pytest.mark.parametrize("n", [0, 1, 2, 6, 8])
def test_the_last_blocks_of_the_up_path_are_connected(build: Callable[..., Built], n: int):
    unet = build(f"method.connections={n}").student
    found = connections(unet)
    assert list(found) == [f"{block}.connection" for block in UP[max(6 - n, 0) :]]
    assert [b.output for b in timestep_blocks(unet)[7:]] == list(UP)
    for connection in found.values():
        assert connection.alpha.shape == (100,)
        torch.testing.assert_close(connection.alpha.detach(), torch.full((100,), 0.3))


def test_one_connection_by_hand():
    connection = Connection(100, 0.3, 1000)
    with torch.no_grad():
        connection.alpha.copy_(torch.arange(100) / 100)
    random = torch.Generator().manual_seed(0)
    u = [torch.randn(4, 2, 3, 3, generator=random) for _ in range(3)]
    with torch.no_grad():
        connection.timestep = torch.tensor([500])
        assert torch.equal(connection(u[0]), u[0])
        connection.timestep = torch.tensor([999, 490, 9, 10])
        alpha = torch.tensor([0.99, 0.49, 0.0, 0.01]).view(4, 1, 1, 1)
        second = connection(u[1])
        torch.testing.assert_close(second, (1 - alpha) * u[1] + alpha * u[0])
        connection.timestep = torch.tensor([999.0, 489.9, 0.5, 29.99])  # DPM-Solver's
        alpha = torch.tensor([0.99, 0.48, 0.0, 0.02]).view(4, 1, 1, 1)
        torch.testing.assert_close(connection(u[2]), (1 - alpha) * u[2] + alpha * second)
        connection.forget()
        assert torch.equal(connection(u[1]), u[1])
    now = u[2].clone().requires_grad_()
    connection.timestep = torch.tensor([300, 301, 999, 0])
    y = connection(now)
    g = torch.randn(y.shape, generator=random)
    y.backward(g)
    alpha = torch.tensor([0.3, 0.3, 0.99, 0.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(now.grad, (1 - alpha) * g)
    found = (g * (u[1] - u[2])).sum((1, 2, 3))
    expected = torch.zeros(100)
    expected[30], expected[99], expected[0] = found[0] + found[1], found[2], found[3]
    torch.testing.assert_close(connection.alpha.grad, expected)
    assert connection.kept is None  # a training step leaves nothing behind


def test_tuples_pass_through(build: Callable[..., Built], tiny_recipe: TinyRecipe):
    """UNet2DConditionModel's attentions put out tuples; what is tapped is what is mixed."""
    unet = build(name="tiny-cond").student
    block = next(b for b in reversed(timestep_blocks(unet)) if "attentions" in b.output)
    batch = noisy_batch(spec_of(tiny_recipe, name="tiny-cond"), torch.tensor([5, 6]), (torch.tensor([0, 1]),))
    module = unet.get_submodule(block.output)
    kept = []
    module.register_forward_hook(lambda m, inputs, y: kept.append(type(y)))
    module.connection.register_forward_hook(lambda m, inputs, y: kept.append((inputs[0].clone(), y)))
    taps = FeatureTaps(unet, [block])
    with torch.no_grad():
        estimate_noise(unet, *batch.inputs)
        module.connection.kept = module.connection.kept + 1
        estimate_noise(unet, *batch.inputs)
    assert kept[1] is kept[3] is tuple
    now, mixed = kept[2]
    torch.testing.assert_close(mixed, 0.7 * now + 0.3 * (kept[0][1] + 1))
    assert torch.equal(taps.take()[0], mixed)


SAMPLERS = {
    "ddim": ("sample.steps=4",),
    "eta": ("sample.steps=3", "sample.eta=1"),
    "quad": ("sample.steps=3", "sample.eta=0", "sample.spacing=quad"),
    "plms": ("sample.steps=3", "sample.eta=0", "sample.sampler=plms"),
    "dpm-solver": ("sample.steps=3", "sample.eta=0", "sample.sampler=dpm-solver"),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_mixes_recursively(build: Callable[..., Built], tiny_recipe: TinyRecipe, sampler: str):
    spec = spec_of(tiny_recipe, *SAMPLERS[sampler])
    unet = unlike_(build().student).eval()
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, connection in connections(unet).items():
        connection.register_forward_hook(
            lambda module, inputs, y, name=name: calls.setdefault(name, []).append((inputs[0].clone(), y.clone()))
        )

    def drawn(network: nn.Module) -> Tensor:
        streams = sampling.noise_streams(0, range(2))
        noise = sampling.draw(streams, (1, 8, 8))
        return sampling.sample(guided(network, (), (), 1.0), spec.scheduler, spec.sample, noise, streams)

    begin_trajectory_(unet)
    x = drawn(unet)
    reference = Recursion(unet, build("method.connections=0").student.eval())
    assert torch.equal(drawn(reference.unet), x)
    listed = times(spec.sample.sampler, spec.scheduler, spec.sample.steps, spec.sample.spacing)
    assert list(calls) == list(connections(unet))
    for name, made in calls.items():
        assert len(made) == len(listed)
        alpha = unet.get_submodule(name).alpha.detach()
        assert torch.equal(*made[0])  # the first call is not mixed
        for (_, before), (now, mixed), t in zip(made, made[1:], listed[1:], strict=False):
            a = alpha[int(t // 10)]
            torch.testing.assert_close(mixed, (1 - a) * now + a * before)
            assert not torch.equal(now, mixed)
    assert not torch.allclose(drawn(unet), x)  # nobody has forgotten the trajectory before
    begin_trajectory_(unet)
    assert torch.equal(drawn(unet), x)


def test_of_recipe_begins_every_trajectory_anew_at_any_batch(build: Callable[..., Built], tiny_recipe: TinyRecipe):
    spec = spec_of(tiny_recipe, "sample.steps=3", "sample.eta=1")
    unet = unlike_(build().student).eval()
    condition = conditions_of(spec)
    draw = sampling.of_recipe(spec, unet, condition, None, 4, 0)
    first = draw(range(4))
    assert np.array_equal(draw(range(4)), first)
    other = sampling.of_recipe(spec, unet, condition, None, 3, 0)(range(3))  # another batch size
    assert other.shape == (3, 16, 16, 1)
    assert np.array_equal(draw(range(4)), first)
    with torch.no_grad(), pytest.raises(ValueError, match=r"puts out \(3, .*put out \(4, "):
        estimate_noise(unet, torch.randn(3, 1, 8, 8), torch.full((3,), 5))


def test_guidance_mixes_each_half_with_itself(build: Callable[..., Built], tiny_recipe: TinyRecipe):
    """The doubled batch is one batch: the same as two networks, one for each half, that remember apart."""
    spec = spec_of(tiny_recipe, "sample.steps=4", "sample.guidance=3", name="tiny-cond")
    built = build(name="tiny-cond")
    unet = unlike_(built.student).eval()
    told, untold = torch.tensor([1, 3]), torch.full((2,), spec.unet.n_classes - 1)

    def drawn(estimate: Callable) -> Tensor:
        streams = sampling.noise_streams(0, range(2))
        arguments = spec.unet.arguments
        noise = sampling.draw(streams, (arguments["in_channels"], *[arguments["sample_size"]] * 2))
        return sampling.sample(estimate, spec.scheduler, spec.sample, noise, streams)

    x = drawn(guided(unet, [told], [untold], spec.sample.guidance))
    halves = [Recursion(unet, build("method.connections=0", name="tiny-cond").student.eval()).unet for _ in range(2)]

    def apart(x: Tensor, t: Tensor) -> Tensor:
        e_untold, e_told = (estimate_noise(net, x, t, c) for net, c in zip(halves, (untold, told), strict=True))
        return e_untold + spec.sample.guidance * (e_told - e_untold)

    torch.testing.assert_close(drawn(apart), x, rtol=1e-4, atol=1e-4)
    begin_trajectory_(unet)
    unmixed = drawn(guided(build("method.connections=0", name="tiny-cond").student.eval(), [told], [untold], 3.0))
    assert not torch.allclose(unmixed, x, rtol=1e-3, atol=1e-3)


def test_a_copy_feeds_itself(build: Callable[..., Built]):
    unet = unlike_(build().student).eval()
    x, t = torch.randn(2, 1, 8, 8), [torch.full((2,), time) for time in (900, 500)]
    with torch.no_grad():
        expected = [estimate_noise(unet, x, time) for time in t]
        begin_trajectory_(unet)
        twin = copy.deepcopy(unet)
        assert torch.equal(estimate_noise(unet, x, t[0]), expected[0])
        estimate_noise(twin, 5 * x, t[0])  # another trajectory
        assert torch.equal(estimate_noise(unet, x, t[1]), expected[1])
        begin_trajectory_(unet)  # the copy goes on
        assert connections(twin)["up_blocks.2.resnets.1.connection"].kept is not None
        begin_trajectory_(twin)
        assert torch.equal(estimate_noise(twin, x, t[0]), expected[0])
        assert torch.equal(estimate_noise(twin, x, t[1]), expected[1])


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "gap"), [("tiny-w1a4", 1), ("tiny-cond", 1), ("tiny-w1a4", 50)])
def test_a_training_step_written_out(build: Callable[..., Built], tiny_recipe: TinyRecipe, name: str, gap: int):
    """Values and all gradients: the student at t + 1 (999 at most), same x_0 and noise, feeds the step's own call."""
    spec = spec_of(tiny_recipe, name=name)
    _, unet, method = build(name=name) if gap == 1 else build(f"method.connection_gap={gap}", name=name)
    unlike_(unet)
    t = torch.tensor([999, 0, 419, 998])
    batch = noisy_batch(spec, t, (torch.tensor([0, 1, 2, 10]),) if spec.unet.n_classes else ())
    for _ in range(2):  # once more, after a step
        unet.zero_grad()
        method.before_step_(unet, batch)
        estimate = estimate_noise(unet, *batch.inputs)
        (estimate - batch.noise).square().mean().backward()
        assert all(connection.kept is None for connection in connections(unet).values())

    plain = build("method.connections=0", name=name).student
    tables = {
        block.removesuffix(".connection"): connection.alpha.detach().clone().requires_grad_()
        for block, connection in connections(unet).items()
    }
    reference = Recursion(unet, plain, tables)
    betas = np.linspace(spec.scheduler.beta_start, spec.scheduler.beta_end, 1000)
    if spec.scheduler.beta_schedule == "scaled_linear":
        betas = np.linspace(spec.scheduler.beta_start**0.5, spec.scheduler.beta_end**0.5, 1000) ** 2
    later = torch.tensor([999, gap, 419 + gap, 999])
    kept = torch.tensor(np.cumprod(1 - betas)[later]).float().view(4, 1, 1, 1)
    with torch.no_grad():
        x = kept.sqrt() * batch.clean + (1 - kept).sqrt() * batch.noise
        estimate_noise(reference.unet, x, later, *batch.inputs[2:])
    expected = estimate_noise(reference.unet, *batch.inputs)
    torch.testing.assert_close(estimate, expected, rtol=1e-4, atol=1e-5)
    (expected - batch.noise).square().mean().backward()
    found = {n: p.grad for n, p in unet.named_parameters()}
    for block, table in tables.items():
        torch.testing.assert_close(found.pop(f"{block}.connection.alpha"), table.grad, rtol=1e-3, atol=1e-6)
        assert set(table.grad.nonzero().flatten().tolist()) == {0, 41, 99}
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    assert found.keys() == wanted.keys()
    for n, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[n], rtol=1e-2, atol=1e-4, msg=n)


def test_the_call_before_a_step_leaves_no_gradients_and_forgets_images_drawn_meanwhile(
    build: Callable[..., Built], tiny_recipe: TinyRecipe
):
    spec = spec_of(tiny_recipe, "sample.steps=2")
    _, unet, method = build()
    batch = noisy_batch(spec, torch.tensor([5, 300, 600, 990]))
    method.before_step_(unet, batch)
    expected = estimate_noise(unet, *batch.inputs)
    unet.eval()
    sampling.of_recipe(spec, unet, conditions_of(spec), None, 3, 0)(range(3))  # inference tensors of another batch
    unet.train()
    method.before_step_(unet, batch)
    assert all(parameter.grad is None for parameter in unet.parameters())
    again = estimate_noise(unet, *batch.inputs)
    assert torch.equal(again, expected)
    again.square().mean().backward()


def test_gradients_under_half_precision(build: Callable[..., Built], tiny_recipe: TinyRecipe):
    """The call without gradients comes first: what autocast keeps of it must not serve the step."""
    _, unet, method = build()
    batch = noisy_batch(spec_of(tiny_recipe), torch.tensor([5, 300, 600, 990]))
    with torch.autocast("cpu", torch.bfloat16):
        method.before_step_(unet, batch)
        estimate = estimate_noise(unet, *batch.inputs).float()
    (estimate - batch.noise).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_without_connections_there_is_no_second_call(build: Callable[..., Built], tiny_recipe: TinyRecipe):
    _, unet, method = build("method.connections=0")
    calls = []
    unet.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    method.before_step_(unet, noisy_batch(spec_of(tiny_recipe), torch.tensor([5])))
    assert calls == []


def test_the_distillations(build: Callable[..., Built]):
    random = torch.Generator().manual_seed(0)
    fp, bi = ([torch.randn(2, 3, side, side, generator=random) for side in (8, 4, 2)] for _ in range(2))
    found = {}
    for kind in ("spd", "l2", "none"):
        built = build(f"method.distillation={kind}", "method.spd_lambda=0.5", "method.spd_patches=2")
        assert len(built.method.taps(built.student)) == (0 if kind == "none" else 13)
        found |= built.method.losses(Forward(built.student, 0, fp, bi))
    assert set(found) == {"spd", "l2"}
    assert found["spd"].item() == pytest.approx(0.5 * patch_relations(fp, bi, 2).item())
    assert found["l2"].item() == pytest.approx(0.5 * mimicking_mse(fp, bi).item())


# ---- saved, packed ---------------------------------------------------------------------------------------------------


PACKED = {
    "default": (),
    "cifar": ("method.attention=conv2d", "method.gamma=signed", "method.connections=2"),
    "released": ("method.linear_threshold=surrogate", "method.filter_bias=uniform"),
    "bare": tuple(f"method.{each}" for each in BARE),
    "learned": ("method.weight_scale=learned", "method.estimator=clipped"),
    "others": ("method.filter=box", "method.bias=true", "method.edge_bits=8", "method.real_skips=false"),
}


@pytest.mark.parametrize("overrides", PACKED.values(), ids=PACKED)
def test_packed_and_loaded_students_draw_the_same_images(tiny_recipe: TinyRecipe, overrides: tuple, tmp_path: Path):
    """Three steps, bit for bit, and twice, since the first drawing leaves something behind."""
    spec = spec_of(tiny_recipe, "sample.steps=3", "sample.eta=1", *overrides)
    unet = unlike_(students.finished(spec))
    packed = students.packed(spec, unet)
    assert all(layer.bits == 1 for name, layer in packed.header.layers.items() if "blocks" in name)
    student.save(tmp_path / "m.safetensors", unet, spec, seed=0, step=6)
    networks = [unet, student.unpacked(packed, Path("m")), student.load(tmp_path / "m.safetensors").student]
    images = []
    for network in networks:
        streams = sampling.noise_streams(0, range(3))
        noise = sampling.draw(streams, (1, 8, 8))
        begin_trajectory_(network)
        estimate = guided(network, (), (), 1.0)
        images.append(sampling.sample(estimate, spec.scheduler, spec.sample, noise, streams))
        draw = sampling.of_recipe(spec, network, conditions_of(spec), None, 3, 0)
        images.append(torch.from_numpy(draw(range(3))))
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[0], images[4])
    assert torch.equal(images[1], images[3])
    assert torch.equal(images[1], images[5])


def test_a_fused_network_keeps_its_connections(tiny_recipe: TinyRecipe):
    """Its layers have frames, and its connected blocks hooks: nothing of them is fused away."""
    spec = spec_of(tiny_recipe, "sample.steps=3")
    unet = unlike_(students.finished(spec))
    fused = student.unpacked(students.packed(spec, unet), Path("m"), fused=True)
    assert list(connections(fused)) == list(connections(unet))
    kept = {name: [] for name in connections(fused)}
    for name, connection in connections(fused).items():
        connection.register_forward_hook(lambda m, inputs, y, name=name: kept[name].append(torch.equal(inputs[0], y)))
    sampling.of_recipe(spec, fused, conditions_of(spec), None, 2, 0)(range(2))
    assert all(same == [True, *[False] * (len(same) - 1)] for same in kept.values())


# ---- fields ----------------------------------------------------------------------------------------------------------


def test_the_defaults():
    method = BiDm()
    assert (method.activation_bits, method.edge_bits, method.real_skips, method.bias) == (1, 32, True, False)
    assert (method.filter, method.filter_bias, method.gamma, method.gamma_start) == ("learned", "none", "absolute", 0.3)
    assert (method.attention, method.linear_threshold) == ("conv1d", "applied")
    assert (method.weight_scale, method.threshold, method.estimator, method.shortcut) == (
        "analytic", True, "polynomial", True
    )  # fmt: skip
    assert (method.connections, method.connection_gap, method.alpha_start, method.alpha_rows) == (8, 1, 0.3, 100)
    assert (method.distillation, method.spd_patches, method.spd_lambda) == ("spd", 4, 1e-2)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("activation_bits=4", r"method.activation_bits: .*1.*\(given 4\)"),
        ("attention_matmul=true", r"method.attention_matmul"),
        ("filter=mean", r"method.filter: .*'learned' or 'box'"),
        ("connections=-1", r"method.connections: .*greater than or equal to 0"),
        ("connection_gap=0", r"method.connection_gap: .*greater than or equal to 1"),
        ("spd_patches=0", r"method.spd_patches"),
        ("gamma_start=0", r"method.gamma_start: \|gamma\| never leaves 0 \(given 0\)"),
        ("weight_scale=fixed", r"method.weight_scale: .*'analytic' or 'learned'"),
    ],
)
def test_faulty_fields(tiny_recipe: TinyRecipe, field: str, text: str):
    with pytest.raises(BdmError, match=text):
        methods.build(spec_of(tiny_recipe, f"method.{field}"))


@pytest.mark.parametrize("other", ["threshold=false", "estimator=clipped"])
def test_a_surrogate_needs_what_it_stands_for(tiny_recipe: TinyRecipe, other: str):
    with pytest.raises(BdmError, match=r"method.linear_threshold: 'surrogate' .* needs threshold = true and"):
        methods.build(spec_of(tiny_recipe, "method.linear_threshold=surrogate", f"method.{other}"))


def test_the_networks_of_the_papers(tiny_recipe: TinyRecipe):
    """LDM-4: 50 binary 2-d convolutions, 15 skip convs in fp32, the last 8 blocks (methods.md 1.5, 4.1, 4.2)."""
    spec = recipe.load("bedrooms", (), "bidm")
    with torch.device("meta"):
        unet = build_unet(spec.unet)
        methods.build(spec).quantize_(unet)
    convs = [layer for _, layer in quantized_layers(unet) if isinstance(layer, QuantConv2d)]
    assert len(convs) == 50
    assert all(type(layer.frame) is BinaryConvolution for layer in convs)
    projections = sum(layer.frame.projection.numel() for layer in convs if layer.frame.projection is not None)
    assert projections / 1e6 == pytest.approx(9.88, abs=0.005)
    blocks = timestep_blocks(unet)
    assert list(connections(unet)) == [f"{block.output}.connection" for block in blocks[17:]]
    assert len(blocks) == 25
