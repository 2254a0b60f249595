"""DoReFa-Net at one bit: both forms against NumPy, sites, packing and its refusal."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
from torch import nn

from bdm_cli import methods, student
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Site
from bdm_cli.methods.dorefa import DoReFa, ZeroOneActivation
from bdm_cli.quant.layers import Parts, QuantLinear
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, SignActivation
from bdm_cli.quant.swap import quantized_layers, sites
from bdm_cli.recipe import Recipe

TinyRecipe = Callable[..., Recipe]
EDGES = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
INSIDE = Site("mid_block.resnets.0.conv1", 6, 13)
UP, DOWN = np.nextafter(1.0, 2.0), -np.nextafter(0.0, 1.0)


def one_bit(tiny_recipe: TinyRecipe, *overrides: str) -> Recipe:
    return tiny_recipe("method.activation_bits=1", "method.edge_bits=32", *overrides, method="dorefa")


def test_activations_of_the_original_form_are_zero_and_one():
    points = [-3, DOWN, -0.0, 0, 0.25, 0.5, np.nextafter(0.5, 1), 0.75, 1, UP, 3]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    y = ZeroOneActivation()(x)
    upstream = torch.linspace(-2, 2, len(points), dtype=torch.float64) + 0.01
    y.backward(upstream)
    assert y.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert x.grad.tolist() == (upstream.numpy() * [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]).tolist()


@pytest.mark.parametrize("form", ["bibench", "original"])
def test_a_layer_and_its_gradients(form: str):
    random = np.random.default_rng(0)
    x, w, b = random.standard_normal((6, 5)), random.standard_normal((4, 5)), random.standard_normal(4)
    x.reshape(-1)[:6] = [0, 1, -1, UP, 0.5, DOWN]
    w.reshape(-1)[:5] = [0, 1, -1, UP, -UP]
    linear = nn.Linear(5, 4).double()
    method = DoReFa(form=form)
    quantizers = method.weight_quantizer(linear, INSIDE), method.activation_quantizer(linear, INSIDE)
    linear.weight.data, linear.bias.data = torch.tensor(w), torch.tensor(b)
    layer = QuantLinear(linear, Parts(*quantizers))
    inputs = torch.tensor(x, requires_grad=True)
    y = layer(inputs)

    signs = np.where(w >= 0, 1.0, -1.0)
    if form == "bibench":
        xq, wq = np.where(x >= 0, 1.0, -1.0), np.abs(w).mean(1, keepdims=True) * signs
        passes_x, passes_w = np.abs(x) <= 1, np.abs(w) <= 1
    else:
        xq, wq = (x > 0.5).astype(float), np.abs(w).mean() * signs
        passes_x, passes_w = (x >= 0) & (x <= 1), np.ones_like(w)
    np.testing.assert_allclose(y.detach().numpy(), xq @ wq.T + b, atol=1e-13)
    g = random.standard_normal((6, 4))
    y.backward(torch.tensor(g))
    np.testing.assert_allclose(inputs.grad.numpy(), g @ wq * passes_x, atol=1e-13)
    np.testing.assert_allclose(layer.weight.grad.numpy(), g.T @ xq * passes_w, atol=1e-13)


# the method


def test_the_defaults_are_bibenchs():
    method = DoReFa()
    assert (method.form, method.bias) == ("bibench", False)
    assert (method.activation_bits, method.edge_bits, method.real_skips) == (1, 32, False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["bibench", "original"])
def test_all_layers_but_the_edges_are_binarized(tiny_recipe: TinyRecipe, form: str, bias: bool):
    spec = one_bit(tiny_recipe, "method.edge_bits=8", f"method.form={form}", f"method.bias={str(bias).lower()}")
    unet = build_unet(spec.unet)
    had = {site.name: layer.bias is not None for site, layer in sites(unet)}
    methods.build(spec).quantize_(unet)
    found = dict(quantized_layers(unet))
    assert found.keys() == had.keys()
    inner = (MeanSignWeight, SignActivation if form == "bibench" else ZeroOneActivation)
    for name, layer in found.items():
        kinds = (type(layer.weight_quantizer), type(layer.activation_quantizer))
        assert kinds == ((Lsq, Lsq) if name in EDGES else inner)
        if name not in EDGES:
            assert layer.weight_quantizer.per == ("channel" if form == "bibench" else "layer")
        assert layer.frame is None
        assert (layer.bias is not None) == (had[name] and (bias or name in EDGES))


@pytest.mark.parametrize("overrides", [(), ("method.edge_bits=8", "method.bias=true")], ids=" ".join)
def test_packed_copied_and_loaded_students_give_bit_equal_output(
    tiny_recipe: TinyRecipe, tmp_path: Path, overrides: tuple[str, ...]
):
    spec = one_bit(tiny_recipe, *overrides)
    students.assert_copies_agree(spec, students.finished(spec), tmp_path)


def test_the_original_form_trains_and_has_no_packed_form(tiny_recipe: TinyRecipe, tiny_teacher: Path, tmp_path: Path):
    spec = one_bit(tiny_recipe, "method.form=original")
    unet = student.build(spec, seed=0).student
    x, t = student.random_inputs(spec, 2, torch.Generator().manual_seed(5))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(20):
        loss = (estimate_noise(unet, x, t) - noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in unet.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]

    unet.eval()
    with pytest.raises(BdmError, match=r"layer \S+ has no packed form: its activations are 0 and 1, where .* \+1\."):
        students.packed(spec, unet)
    student.save(tmp_path / "s", unet, spec, seed=0, step=6)
    with torch.no_grad():
        assert torch.equal(*(estimate_noise(net, x, t) for net in (unet, student.load(tmp_path / "s").student)))


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("form=paper", r"method.form: .*'bibench' or 'original'.*\(given 'paper'\)"),
        ("activation_bits=2", r"method.activation_bits: .*\(given 2\)"),
        ("attention_matmul=true", r"method.attention_matmul: .*\(given True\)"),
    ],
)
def test_faulty_fields(tiny_recipe: TinyRecipe, field: str, text: str):
    with pytest.raises(BdmError, match=text):
        methods.build(one_bit(tiny_recipe, f"method.{field}"))
