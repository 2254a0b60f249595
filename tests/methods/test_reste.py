"""ReSTE: its weights and gradients against NumPy, the power's schedule, sites, packing."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
from torch import nn

from bdm_cli import methods
from bdm_cli.diffusion.models import build_unet
from bdm_cli.errors import BdmError
from bdm_cli.methods.reste import PowerSign, ReSte, ReSteWeight
from bdm_cli.quant.layers import Parts, QuantConv2d
from bdm_cli.quant.quantizers import SignActivation
from bdm_cli.quant.swap import quantized_layers, sites
from bdm_cli.recipe import Recipe

TinyRecipe = Callable[..., Recipe]
EDGES = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def one_bit(tiny_recipe: TinyRecipe, *overrides: str) -> Recipe:
    return tiny_recipe("method.activation_bits=1", "method.edge_bits=32", *overrides, method="reste")


def slope(v: np.ndarray, power: float) -> np.ndarray:
    """Sec. 5.6 of our fidelity notes, at t = 1.5."""
    v = np.abs(v)
    outer = np.maximum(v, 0.1) ** ((1 - power) / power) / power
    return np.where(v > 1.5, 0, np.where(v > 0.1, outer, 0.1 ** (1 / power) / 0.1))


def sign(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def at(power: float) -> PowerSign:
    estimator = PowerSign(1.5, 0.1).double()
    estimator.power.fill_(power)
    return estimator


@pytest.mark.parametrize("power", [1.0, 2.2, 3.0])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 6)])
def test_weights_and_their_gradient_through_sign_and_scale(power: float, shape: tuple[int, ...]):
    random = np.random.default_rng(0)
    w = random.standard_normal(shape)
    w.reshape(-1)[:7] = [0, 0.1, -0.1, 0.05, 1.5, -1.5, 2]
    weight = torch.tensor(w, requires_grad=True)
    quantizer = ReSteWeight(at(power))
    y = quantizer(weight)
    m = np.abs(w).mean()
    np.testing.assert_allclose(y.detach().numpy(), m * sign(w), rtol=1e-14)
    g = random.standard_normal(shape)
    y.backward(torch.tensor(g))
    expected = m * slope(w, power) * g + np.sign(w) / w.size * (g * sign(w)).sum()
    np.testing.assert_allclose(weight.grad.numpy(), expected, atol=1e-13)
    with torch.no_grad():
        (term,) = quantizer.terms(weight)
        assert torch.equal(term.levels * term.sigma, quantizer(weight))
        assert term.sigma.shape == (1,)


def test_a_layer_adds_its_bias_and_no_other_scale():
    random = np.random.default_rng(1)
    x, w, b = random.standard_normal((2, 3)), random.standard_normal((4, 3)), random.standard_normal(4)
    conv = nn.Conv2d(3, 4, 1).double()
    conv.weight.data, conv.bias.data = torch.tensor(w)[..., None, None], torch.tensor(b)
    layer = QuantConv2d(conv, Parts(ReSteWeight(at(3)), SignActivation(at(3))))
    inputs = torch.tensor(x)[..., None, None].requires_grad_()
    y = layer(inputs)
    np.testing.assert_allclose(y.detach().numpy()[..., 0, 0], sign(x) @ (np.abs(w).mean() * sign(w)).T + b, atol=1e-13)
    g = random.standard_normal((2, 4))
    y.backward(torch.tensor(g)[..., None, None])
    by_x = g @ (np.abs(w).mean() * sign(w)) * slope(x, 3)
    np.testing.assert_allclose(inputs.grad.numpy()[..., 0, 0], by_x, atol=1e-13)


# the method


def test_the_defaults_are_the_released_codes():
    method = ReSte()
    assert (method.power_end, method.bound, method.inner) == (3, 1.5, 0.1)
    assert (method.activation_bits, method.edge_bits, method.real_skips) == (1, 32, False)


def test_the_power_grows_as_a_cosine_and_is_a_function_of_the_step(tiny_recipe: TinyRecipe):
    spec = one_bit(tiny_recipe, "method.power_end=2.5")
    unet, method = build_unet(spec.unet), methods.build(spec)
    method.quantize_(unet)

    def powers(network: nn.Module) -> list[float]:
        found = [float(m.power) for m in network.modules() if isinstance(m, PowerSign)]
        assert len(found) == 2 * len(list(quantized_layers(unet)))
        return sorted(set(found))

    for step in (0, 10, 3, 5, 5):
        method.on_step_(unet, step, 10)
        expected = 1 + (1 - math.cos(math.pi / 2 * step / 10)) * 1.5
        assert powers(unet) == [pytest.approx(expected, rel=1e-6)]
    assert [method.power(step, 10) for step in (0, 10)] == [1, pytest.approx(2.5)]
    assert method.power(0, 0) == 1
    twin = copy.deepcopy(unet)
    method.on_step_(twin, 10, 10)
    assert (powers(twin), powers(unet)) == ([2.5], [pytest.approx(expected, rel=1e-6)])


def test_all_layers_but_the_edges_are_binarized_and_keep_their_biases(tiny_recipe: TinyRecipe):
    spec = one_bit(tiny_recipe)
    unet = build_unet(spec.unet)
    had = {site.name: layer.bias is not None for site, layer in sites(unet)}
    methods.build(spec).quantize_(unet)
    found = dict(quantized_layers(unet))
    assert found.keys() == had.keys() - EDGES
    for name, layer in found.items():
        assert (type(layer.weight_quantizer), type(layer.activation_quantizer)) == (ReSteWeight, SignActivation)
        assert layer.frame is None
        assert (layer.bias is not None) == had[name]


@pytest.mark.parametrize("overrides", [(), ("method.edge_bits=8", "method.real_skips=true")], ids=" ".join)
def test_packed_copied_and_loaded_students_give_bit_equal_output(
    tiny_recipe: TinyRecipe, tmp_path: Path, overrides: tuple[str, ...]
):
    spec = one_bit(tiny_recipe, *overrides)
    unet = students.finished(spec)
    loaded = students.assert_copies_agree(spec, unet, tmp_path, step=3)
    assert torch.equal(unet.state_dict()[POWER], loaded.state_dict()[POWER])


POWER = "down_blocks.0.resnets.0.conv1.activation_quantizer.estimator.power"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("power_end=0.5", r"method.power_end: .*greater than or equal to 1.*\(given 0.5\)"),
        ("inner=2", r"method.inner: is at most bound = 1.5 \(given 2"),
        ("attention_matmul=true", r"method.attention_matmul: .*\(given True\)"),
    ],
)
def test_faulty_fields(tiny_recipe: TinyRecipe, field: str, text: str):
    with pytest.raises(BdmError, match=text):
        methods.build(one_bit(tiny_recipe, f"method.{field}"))
