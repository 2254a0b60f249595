"""XNOR-Net++: the four shapes of Gamma and their gradients against NumPy, map sizes, sites, packing."""

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
from bdm_cli.methods.xnorpp import OutputScale, PlainSignWeight, XnorPlusPlus, output_sizes
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, SignActivation
from bdm_cli.quant.swap import quantized_layers, sites
from bdm_cli.recipe import Recipe

TinyRecipe = Callable[..., Recipe]
EDGES = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
UP = np.nextafter(1.0, 2.0)


def one_bit(tiny_recipe: TinyRecipe, *overrides: str, name: str = "tiny-w1a4") -> Recipe:
    return tiny_recipe("method.activation_bits=1", "method.edge_bits=32", *overrides, name=name, method="xnorpp")


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape)
    special = [0, 1, -1, UP, -UP]
    x.reshape(-1)[: len(special)] = special[: x.size]
    return x


def sign(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_a_convolution_and_its_gradients(case: int):
    """A 1x1 convolution of 3 to 4 channels on maps of 5 x 7."""
    x, w, b = values((2, 3, 5, 7), 0), values((4, 3), 1), values((4,), 2)
    frame = OutputScale(case, torch.ones(4, 1, 1), (5, 7))
    random = np.random.default_rng(3)
    state = {name: random.standard_normal(p.shape) for name, p in frame.named_parameters()}
    assert {name: array.shape for name, array in state.items()} == {
        1: {"alpha": (4, 1, 1)},
        2: {"alpha": (4, 5, 7)},
        3: {"alpha": (4, 1, 1), "beta": (5, 7)},
        4: {"alpha": (4, 1, 1), "beta": (5, 1), "gamma": (1, 7)},
    }[case]
    assert all((p == 1).all() for p in frame.parameters())
    assert frame.stored() == sum(array.size for array in state.values())
    conv = nn.Conv2d(3, 4, 1).double()
    conv.weight.data, conv.bias.data = torch.tensor(w)[..., None, None], torch.tensor(b)
    layer = QuantConv2d(conv, Parts(PlainSignWeight(), SignActivation(), frame.double()))
    frame.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    inputs = torch.tensor(x, requires_grad=True)
    y = layer(inputs)

    alpha, beta, gamma = (state.get(name, np.ones((1, 1))) for name in ("alpha", "beta", "gamma"))
    scale = np.broadcast_to(alpha, (4, 5, 7)) * beta * gamma
    product = np.einsum("nchw,oc->nohw", sign(x), sign(w))
    np.testing.assert_allclose(y.detach().numpy(), product * scale + b[:, None, None], atol=1e-13)
    g = random.standard_normal(product.shape)
    y.backward(torch.tensor(g))
    by_x = np.einsum("nohw,oc->nchw", g * scale, sign(w)) * (np.abs(x) <= 1)
    np.testing.assert_allclose(inputs.grad.numpy(), by_x, atol=1e-12)
    by_w = np.einsum("nohw,nchw->oc", g * scale, sign(x)) * (np.abs(w) <= 1)
    np.testing.assert_allclose(layer.weight.grad.numpy()[..., 0, 0], by_w, atol=1e-12)
    by_scale = (g * product).sum(0)
    expected = {
        "alpha": by_scale * beta * gamma,
        "beta": (by_scale * alpha * gamma).sum(0),
        "gamma": (by_scale * alpha * beta).sum((0, 1))[None],
    }
    for name, parameter in frame.named_parameters():
        wanted = expected[name]
        for axis, length in enumerate(parameter.shape):
            wanted = wanted.sum(axis, keepdims=True) if length < wanted.shape[axis] else wanted
        np.testing.assert_allclose(parameter.grad.numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_a_linear_layer_has_alpha_alone(case: int, shape: tuple[int, ...]):
    x, w, b, alpha = values(shape, 0), values((4, 5), 1), values((4,), 2), values((4,), 3)
    linear = nn.Linear(5, 4).double()
    linear.weight.data, linear.bias.data = torch.tensor(w), torch.tensor(b)
    frame = OutputScale(case, torch.tensor(alpha), None)
    assert [name for name, _ in frame.named_parameters()] == ["alpha"]
    y = QuantLinear(linear, Parts(PlainSignWeight(), SignActivation(), frame))(torch.tensor(x))
    product = sign(x) @ sign(w).T
    np.testing.assert_allclose(y.detach().numpy(), product * alpha + b, atol=1e-13)
    g = np.random.default_rng(4).standard_normal(product.shape)
    y.backward(torch.tensor(g))
    expected = (g * product).sum(tuple(range(product.ndim - 1)))
    np.testing.assert_allclose(frame.alpha.grad.numpy(), expected, atol=1e-12)


def test_weights_are_signs_without_a_scale():
    w = values((3, 2, 3, 3), 0)
    weight = torch.tensor(w, requires_grad=True)
    y = PlainSignWeight()(weight)
    g = torch.tensor(values(w.shape, 1))
    y.backward(g)
    np.testing.assert_array_equal(y.detach().numpy(), sign(w))
    np.testing.assert_array_equal(weight.grad.numpy(), g.numpy() * (np.abs(w) <= 1))
    (term,) = PlainSignWeight().terms(weight)
    assert torch.equal(term.levels * term.sigma, y)
    assert PlainSignWeight().stored() == 0


# map sizes


@pytest.mark.parametrize("name", ["tiny-w1a4", "tiny-ldm", "tiny-cond"])
def test_map_sizes_are_those_of_a_real_forward(tiny_recipe: TinyRecipe, name: str):
    spec = one_bit(tiny_recipe, "unet.arguments.dropout=0.1", name=name)
    unet = build_unet(spec.unet)
    seen: dict[str, tuple[int, int]] = {}
    for site, layer in sites(unet):
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda m, a, y, name=site.name: seen.__setitem__(name, tuple(y.shape[2:])))
    with torch.no_grad():
        unet(*student.random_inputs(spec, 1, torch.Generator()))
    before, random = copy.deepcopy(unet.state_dict()), torch.get_rng_state()
    assert output_sizes(unet.train()) == seen
    assert len(set(seen.values())) > 2
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items())
    with torch.device("meta"):
        assert output_sizes(build_unet(spec.unet)) == seen


@pytest.mark.parametrize(("name", "case"), [("tiny-w1a4", 4), ("tiny-ldm", 2), ("tiny-cond", 3)])
def test_on_the_meta_device_the_network_gets_the_same_parameters(tiny_recipe: TinyRecipe, name: str, case: int):
    spec = one_bit(tiny_recipe, f"method.case={case}", name=name)
    unet = build_unet(spec.unet)
    methods.build(spec).quantize_(unet)
    with torch.device("meta"):
        empty = build_unet(spec.unet)
        methods.build(spec).quantize_(empty)
    shapes = {key: tensor.shape for key, tensor in unet.state_dict().items()}
    assert {key: tensor.shape for key, tensor in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    hooks = [m for m in unet.modules() if m._forward_hooks]
    assert hooks == []
    with torch.no_grad():
        assert estimate_noise(unet, *student.random_inputs(spec, 2, torch.Generator())).isfinite().all()


def test_maps_of_another_size_are_an_error(tiny_recipe: TinyRecipe):
    spec = one_bit(tiny_recipe)
    unet = students.finished(spec)
    with pytest.raises(RuntimeError, match=r"must match the size"):
        unet(torch.zeros(1, 1, 8, 8), 0)


# the method


def test_the_defaults_are_bibenchs():
    method = XnorPlusPlus()
    assert (method.case, method.start, method.bias) == (4, "ones", False)
    assert (method.activation_bits, method.edge_bits, method.real_skips) == (1, 32, False)


@pytest.mark.parametrize("start", ["ones", "mean"])
@pytest.mark.parametrize("bias", [False, True])
def test_all_layers_but_the_edges_are_binarized(tiny_recipe: TinyRecipe, start: str, bias: bool):
    spec = one_bit(tiny_recipe, "method.edge_bits=8", f"method.start={start}", f"method.bias={str(bias).lower()}")
    unet = build_unet(spec.unet)
    had = {site.name: layer.bias is not None for site, layer in sites(unet)}
    methods.build(spec).quantize_(unet)
    found = dict(quantized_layers(unet))
    assert found.keys() == had.keys()
    for name, layer in found.items():
        assert (layer.bias is not None) == (had[name] and (bias or name in EDGES))
        kinds = (type(layer.weight_quantizer), type(layer.activation_quantizer))
        if name in EDGES:
            assert (kinds, layer.frame) == ((Lsq, Lsq), None)
            continue
        assert kinds == (PlainSignWeight, SignActivation)
        mean = layer.weight.detach().abs().flatten(1).mean(1)
        wanted = mean if start == "mean" else torch.ones_like(mean)
        torch.testing.assert_close(layer.frame.alpha.detach().flatten(), wanted)
        names = [key for key, _ in layer.frame.named_parameters()]
        assert names == (["alpha", "beta", "gamma"] if isinstance(layer, nn.Conv2d) else ["alpha"])


def test_the_full_gamma_trains(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    spec = one_bit(tiny_recipe, "method.case=2")
    unet = student.build(spec, seed=0).student
    x, t = student.random_inputs(spec, 2, torch.Generator().manual_seed(5))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = (estimate_noise(unet, x, t) - noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in unet.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("overrides", [f"method.case={case}" for case in (1, 2, 3, 4)] + ["method.edge_bits=8"])
def test_packed_copied_and_loaded_students_give_bit_equal_output(
    tiny_recipe: TinyRecipe, tmp_path: Path, overrides: str
):
    spec = one_bit(tiny_recipe, overrides)
    students.assert_copies_agree(spec, students.finished(spec), tmp_path)


def test_packed_students_are_told_a_class(tiny_recipe: TinyRecipe, tmp_path: Path):
    spec = one_bit(tiny_recipe, name="tiny-cond")
    unet = students.finished(spec)
    x, _, *known = student.random_inputs(spec, 2, torch.Generator().manual_seed(5))
    inputs: list[Tensor] = [x, torch.full((2,), 500), *known]
    packed = student.unpacked(students.packed(spec, unet), tmp_path)
    with torch.no_grad():
        assert torch.equal(estimate_noise(packed, *inputs), estimate_noise(unet, *inputs))


def test_what_the_frame_costs():
    frame = OutputScale(4, torch.ones(5, 1, 1), (4, 4))
    assert frame.operations(torch.Size((2, 3, 8, 8)), torch.Size((2, 5, 4, 4))) == 2 * 5 * 16


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("case=5", r"method.case: .*1, 2, 3 or 4.*\(given 5\)"),
        ("start=zeros", r"method.start: .*'ones' or 'mean'.*\(given 'zeros'\)"),
        ("attention_matmul=true", r"method.attention_matmul: .*\(given True\)"),
    ],
)
def test_faulty_fields(tiny_recipe: TinyRecipe, field: str, text: str):
    with pytest.raises(BdmError, match=text):
        methods.build(one_bit(tiny_recipe, f"method.{field}"))
