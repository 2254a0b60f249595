"""EfficientDM: weights, tables and their gradients in float64, what trains at which rate, and the tiny network."""

import copy
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import students
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdm_cli import methods, recipe, student
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.diffusion.sampling import times
from bdm_cli.diffusion.trajectories import Calls
from bdm_cli.errors import BdmError
from bdm_cli.methods.efficientdm import EfficientDm, LearnedGrid, LoraWeight, Talsq
from bdm_cli.packed import pack
from bdm_cli.quant.layers import QuantAttnProcessor
from bdm_cli.quant.quantizers import Lsq, SignWeight
from bdm_cli.quant.swap import EDGES, quantized_layers
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built

TinyRecipe = Callable[..., Recipe]
ONE_BIT = ("method.weight_bits=1", "method.activation_bits=1", "method.edge_bits=32", "method.real_skips=true")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# weights


def few_bits(w: np.ndarray, d: np.ndarray, z: np.ndarray, high: int) -> tuple[np.ndarray, ...]:
    """The quantized weight; whether its level before clipping is within the range; its level less the zero point."""
    u = np.round(w / d + z)
    levels = np.clip(u, 0, high) - z
    return d * levels, (u >= 0) & (u <= high), levels


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 12)])
def test_weights_start_on_a_grid_from_least_to_greatest(bits: int, shape: tuple[int, ...]):
    w = normal(*shape)
    w[1].abs_()  # 0 is on every grid
    w[2] = -w[2].abs()
    w[3] = 0.0
    q = LearnedGrid(bits, w)
    rows = w.double().numpy().reshape(5, -1)
    least, greatest = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    d = np.maximum((greatest - least) / (2**bits - 1), 1e-8)
    np.testing.assert_allclose(q.sigma.detach().numpy().ravel(), d, rtol=1e-6)
    np.testing.assert_array_equal(q.zero.numpy().ravel(), np.round(-least / d))
    assert q.sigma.shape == q.zero.shape == (5, *[1] * (len(shape) - 1))
    found = q(w).detach()
    assert (found - w).abs().flatten(1).amax(1).numpy() == pytest.approx(0, abs=0.51 * float(q.sigma.detach().max()))
    assert found[3].abs().max() == 0
    assert all(len(channel.unique()) <= 2**bits for channel in found)
    assert [name for name, _ in q.named_parameters()] == ["sigma"]


@pytest.mark.parametrize("bits", [2, 4])
def test_weight_values_and_gradients(bits: int):
    w = normal(4, 3, 2, 2)
    q = LearnedGrid(bits, w)
    with torch.no_grad():
        q.sigma.mul_(0.7)  # some saturate
    w.requires_grad_()
    upstream = normal(4, 3, 2, 2, seed=1)
    y = q(w)
    y.backward(upstream)
    a, g, d, z = (t.detach().double().numpy() for t in (w, upstream, q.sigma, q.zero))
    expected, inside, levels = few_bits(a, d, z, 2**bits - 1)
    assert 0 < (~inside).sum() < inside.sum()
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(w.grad.numpy(), g * inside, rtol=1e-6)
    by_scale = (g * (levels - np.where(inside, a / d, 0))).sum((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(q.sigma.grad.numpy(), by_scale, rtol=1e-4, atol=1e-5)


def test_the_ends_of_a_weights_range():
    """Inside is decided on the rounded level, as in the released code."""
    w = torch.tensor([[0.0, 3.0, 3.4, 3.6, -0.4, -0.6, 0.5, 1.5]])
    q = LearnedGrid(2, torch.tensor([[0.0, 3.0]]))
    assert (q.sigma.item(), q.zero.item()) == (1.0, 0.0)
    w.requires_grad_()
    y = q(w)
    y.sum().backward()
    assert y.tolist() == [[0.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 2.0]]
    assert w.grad.tolist() == [[1, 1, 1, 0, 1, 0, 1, 1]]


def test_the_low_rank_part_is_a_convolution_behind_another():
    """Of stride 2, too; of a linear layer, a product behind another. Merging is what inference needs of it."""
    torch.manual_seed(0)
    for layer, x in ((nn.Conv2d(6, 10, 3, 2, 1, bias=False), normal(2, 6, 9, 9)), (nn.Linear(6, 10), normal(3, 7, 6))):
        q = LoraWeight(layer.weight, LearnedGrid(4, layer.weight), 4, rounded=False)
        assert (q.b == 0).all()
        assert torch.equal(q.merged(layer.weight), layer.weight)
        with torch.no_grad():
            q.b.normal_()
        added = q.merged(layer.weight) - layer.weight
        if isinstance(layer, nn.Conv2d):
            found, composed = (
                F.conv2d(x, added, None, 2, 1),
                F.conv2d(F.conv2d(x, q.a, None, 2, 1), q.b[..., None, None]),
            )
        else:
            found, composed = F.linear(x, added), F.linear(F.linear(x, q.a), q.b)
        torch.testing.assert_close(found, composed, rtol=1e-4, atol=1e-4)
        bound = layer.weight[0].numel() ** -0.5  # Kaiming with slope sqrt(5)
        assert 0.9 * bound < q.a.abs().max() <= bound


@pytest.mark.parametrize("rounded", [True, False])
def test_gradients_of_the_low_rank_part(rounded: bool):
    """q(d w + B A), w whole numbers, or q(w + B A): dB = G A^T, dA = B^T G with G = g 1; d is in both places."""
    torch.manual_seed(0)
    real = normal(5, 3, 2, 2)
    inner = LearnedGrid(3, real)
    q = LoraWeight(real, inner, 2, rounded)
    w = inner.terms(real)[0].levels if rounded else real
    assert torch.equal(q(w), inner(real))
    w, upstream = w.detach(), normal(5, 3, 2, 2, seed=1)
    q(w).backward(upstream)
    assert (q.a.grad == 0).all()  # before B's first step
    with torch.no_grad():
        q.b.normal_(std=0.5)
        inner.sigma.mul_(0.8)
    q.zero_grad()
    q(w).backward(upstream)
    a, b = (t.detach().double().numpy() for t in (q.a.flatten(1), q.b))
    base, g, d, z = (t.detach().double().flatten(1).numpy() for t in (w, upstream, inner.sigma, inner.zero))
    merged = (d * base if rounded else base) + b @ a
    expected, inside, levels = few_bits(merged, d, z, 7)
    np.testing.assert_allclose(q(w).detach().flatten(1).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(q.b.grad.numpy(), (g * inside) @ a.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(q.a.grad.flatten(1).numpy(), b.T @ (g * inside), rtol=1e-4, atol=1e-5)
    by_scale = g * (levels - np.where(inside, merged / d, 0)) + g * inside * base * rounded
    np.testing.assert_allclose(
        inner.sigma.grad.flatten(1).numpy(), by_scale.sum(1, keepdims=True), rtol=1e-4, atol=1e-5
    )


def test_weights_of_one_bit_are_the_signs_of_the_sum():
    torch.manual_seed(0)
    w = normal(5, 3, 2, 2)
    q = LoraWeight(w, SignWeight(w), 2, rounded=False)
    assert q.bits == 1
    with torch.no_grad():
        q.b.normal_()
    merged = w.numpy() + np.einsum("or,rikl->oikl", q.b.detach().numpy(), q.a.detach().numpy())
    sigma = np.abs(w.numpy()).mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(q(w).detach().numpy(), sigma * np.where(merged >= 0, 1, -1), rtol=1e-6)
    (term,) = q.terms(w)
    assert torch.equal(term.levels, torch.from_numpy(np.where(merged >= 0, 1.0, -1.0)).float())


# tables


def table(bits: int) -> Talsq:
    q = Talsq(bits, [900.0, 500.0, 1.0])
    with torch.no_grad():
        q.scale.copy_(torch.tensor([0.5, 0.3, 0.8]))
        q.zero.copy_(torch.tensor([0.2, -0.1, 0.05]) if bits == 1 else torch.tensor([3.2, 1.6, -0.4]))
    return q


def test_the_nearest_entry_serves():
    q = table(4)
    asked = [999.0, 900.0, 701.0, 699.0, 500.0, 251.0, 250.0, 0.0, 333.25]
    assert q.entries(torch.tensor(asked)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 1]
    assert q.entries(torch.tensor([900, 1])).tolist() == [0, 2]
    grid = q.grid([1, 900, 880])
    assert grid[:2] == (4, 0)
    torch.testing.assert_close(grid.step, torch.tensor([0.8, 0.5, 0.5]))
    assert grid.zero.tolist() == [0.0, 3.0, 3.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 7, 3), (4, 30)])
def test_activation_values_and_gradients(bits: int, shape: tuple[int, ...]):
    q = table(bits)
    q.timestep = torch.tensor([900, 2, 870, 480])
    entry, high = [0, 2, 0, 1], 2**bits - 1
    x = high / 4 * normal(*shape) + high / 8
    x.view(-1)[0] = 0.0
    x.requires_grad_()
    upstream = normal(*shape, seed=1)
    y = q(x)
    y.backward(upstream)
    a, g, d, z = (t.detach().double().numpy() for t in (x, upstream, q.scale, q.zero))
    wide = (-1, *[1] * (len(shape) - 1))
    d, z = d[entry].reshape(wide), np.round(z[entry]).reshape(wide)
    expected, inside, levels = few_bits(a, d, z, high)
    assert (~inside).sum() > 0
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), g * inside, rtol=1e-6)
    by_scale = (g * (levels - np.where(inside, a / d, 0))).reshape(4, -1).sum(1)
    by_zero = (-d * g * ~inside).reshape(4, -1).sum(1)
    for found, each in ((q.scale.grad, by_scale), (q.zero.grad, by_zero)):
        np.testing.assert_allclose(found.numpy(), [each[0] + each[2], each[3], each[1]], rtol=1e-3, atol=1e-4)


def test_activations_of_one_bit():
    """d sgn(x - z): a threshold and a scale per step; on the threshold, and at the ends of the gradient's range."""
    q = table(1)
    q.timestep = torch.tensor([900, 1])
    rows = [[0.2, 0.19, 0.7, 0.75, -0.3, -0.35], [0.05, 0.0, 0.85, 0.9, -0.75, -0.8]]
    x = torch.tensor(rows, requires_grad=True)
    y = q(x)
    y.backward(torch.tensor([[1.0, 2, 3, 4, 5, 6]] * 2))
    d, z = np.array([[0.5], [0.8]]), np.array([[0.2], [0.05]])
    u, g = (np.array(rows) - z) / d, np.array([[1.0, 2, 3, 4, 5, 6]] * 2)
    signs = np.where(u >= -1e-9, 1, -1)
    inside = np.abs(u) <= 1 + 1e-6
    assert signs.tolist() == [[1, -1, 1, 1, -1, -1]] * 2
    np.testing.assert_allclose(y.detach().numpy(), d * signs, rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy()[:, [0, 1, 3, 5]], (g * inside)[:, [0, 1, 3, 5]])  # the ends may round
    clear = ~np.isclose(np.abs(u), 1)
    q.zero_grad()
    q(x)[torch.from_numpy(clear)].sum().backward()
    by_scale, by_zero = ((signs - u * inside) * clear).sum(1), -(inside * clear).sum(1)
    np.testing.assert_allclose(q.scale.grad.numpy(), [by_scale[0], 0, by_scale[1]], rtol=1e-5)
    np.testing.assert_allclose(q.zero.grad.numpy(), [by_zero[0], 0, by_zero[1]], rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_start_is_the_best_of_eighty_ranges_for_every_entry(bits: int):
    x = normal(3, 4, 50) ** 3
    a, high = x.double().numpy(), 2**bits - 1
    best = (np.inf, 0.0, 0.0)
    for i in range(80):
        least, greatest = (1 - 0.01 * i) * a.min(), (1 - 0.01 * i) * a.max()
        d = (greatest - least) / high
        z = np.round(-least / d)
        error = (np.abs(a - few_bits(a, d, z, high)[0]) ** 2.4).mean()
        best = min(best, (error, d, z))
    q = Talsq(bits, [3.0, 2.0, 1.0])
    q.timestep = torch.tensor([1])
    assert q.waiting
    assert q(x).isnan().all()
    q.calibrate_(x)
    assert not q.waiting
    assert q.scale.tolist() == pytest.approx([best[1]] * 3, rel=1e-4)
    assert q.zero.tolist() == [best[2]] * 3


def test_a_large_tensor_is_searched_in_part_but_over_its_whole_range():
    x = torch.zeros(3, 2**18 + 1)
    x[0, 1], x[2, 3] = -1.0, 14.0  # in no place that is looked at
    q = Talsq(4, [1.0])
    q.calibrate_(x)
    assert (q.scale.item(), q.zero.item()) == (1.0, 1.0)


@pytest.mark.parametrize("bits", [1, 4])
def test_starts_of_one_bit_and_of_silence(bits: int):
    q, x = Talsq(bits, [3.0, 2.0]), normal(2, 3, 5, 5) + 1
    q.timestep = torch.tensor([1])
    if bits == 1:
        assert q(x).isnan().all()
        q.calibrate_(x)
        assert q.scale.tolist() == pytest.approx([float(x.double().abs().mean())] * 2, rel=1e-6)
        assert q.zero.tolist() == [0.0, 0.0]
    q.calibrate_(torch.zeros(2, 3))
    assert (q.scale > 0).all()
    assert q(torch.zeros(2, 3)).isfinite().all()


# the method


def build(spec: Recipe) -> tuple[Built, tuple[Tensor, Tensor]]:
    built = student.build(spec, seed=0)
    inputs = normal(4, 1, 8, 8, seed=3), torch.tensor([5, 300, 600, 990])
    built.method.calibrate_(built.student, built.teacher, (inputs for _ in count()))
    return built, inputs


@pytest.mark.parametrize("operands", [False, True])
def test_what_stands_where_and_trains(operands: bool, tiny_recipe: TinyRecipe, tiny_teacher: Path):
    fields = (f"method.attention_matmul={str(operands).lower()}", "method.rank=3", "sample.steps=5")
    (teacher, unet, method), inputs = build(tiny_recipe(*fields, method="efficientdm"))
    before = dict(teacher.named_parameters())
    frozen, own = {}, set()
    for name, layer in quantized_layers(unet):
        weight, activation = layer.weight_quantizer, layer.activation_quantizer
        if name in EDGES:
            assert (type(weight), type(activation), weight.bits, activation.bits) == (Lsq, Lsq, 8, 8)
            assert torch.equal(layer.weight, before[f"{name}.weight"])
            continue
        assert (type(weight), type(weight.quantizer), type(activation)) == (LoraWeight, LearnedGrid, Talsq)
        assert (weight.bits, activation.bits, len(weight.a), len(activation.times)) == (4, 4, 3, 5)
        assert torch.equal(layer.weight, layer.weight.round())  # whole numbers
        real = before[f"{name}.weight"]
        torch.testing.assert_close(weight(layer.weight), LearnedGrid(4, real)(real))
        own |= {f"{name}.weight_quantizer.{part}" for part in ("a", "b", "quantizer.sigma")}
        own |= {f"{name}.activation_quantizer.{part}" for part in ("scale", "zero")}
    for name, module in unet.named_modules():
        if isinstance(module, QuantAttnProcessor):
            assert operands
            own |= {f"{name}.{part}_quantizer.{p}" for part in pack.OPERANDS for p in ("scale", "zero")}
    assert {name for name, _ in method.trainable(unet)} == own
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == own
    frozen = {name: p.clone() for name, p in unet.named_parameters() if name not in own}
    optimizer = torch.optim.AdamW([p for _, p in method.trainable(unet)], lr=1e-3)
    for _ in range(2):  # A has a gradient once B has moved
        optimizer.zero_grad()
        estimate_noise(unet, *inputs).square().mean().backward()
        optimizer.step()
    without = {name for name, p in method.trainable(unet) if p.grad is None or p.grad.abs().sum() == 0}
    assert {name for name in without if ".to_k." not in name} <= {f"{n.rpartition('.')[0]}.zero" for n in own}
    assert all(torch.equal(p, frozen[name]) for name, p in unet.named_parameters() if name in frozen)


def test_real_weights_below_the_additions(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    (teacher, unet, _), _ = build(tiny_recipe("method.base=real", method="efficientdm"))
    real = dict(teacher.named_parameters())
    for name, layer in quantized_layers(unet):
        assert torch.equal(layer.weight, real[f"{name}.weight"])


def test_rates_are_absolute_and_of_the_start(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    """Whatever train.lr is, and whatever has become of the scales: a resumed training has the same."""
    fields = ("train.lr=3e-3", "method.lr_lora_divisor=100", "method.lr_weight_scale=2e-5", "method.lr_activation=7e-4")
    (_, unet, method), _ = build(tiny_recipe(*fields, method="efficientdm"))
    found = {name: 3e-3 * factor for name, factor in method.lr_factors(unet).items()}
    assert set(found) == {name for name, _ in method.trainable(unet)}
    for name, layer in quantized_layers(unet):
        if name not in EDGES:
            mean = layer.weight_quantizer.quantizer.sigma.detach().double().mean().item()
            assert found[f"{name}.weight_quantizer.a"] == pytest.approx(mean / 100, rel=1e-5)
            assert found[f"{name}.weight_quantizer.b"] == pytest.approx(mean / 100, rel=1e-5)
            assert found[f"{name}.weight_quantizer.quantizer.sigma"] == pytest.approx(2e-5)
            assert found[f"{name}.activation_quantizer.scale"] == pytest.approx(7e-4)
            assert found[f"{name}.activation_quantizer.zero"] == pytest.approx(7e-4)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(2)
    assert {name: 3e-3 * factor for name, factor in method.lr_factors(unet).items()} == found


def test_quantizers_start_from_images_of_the_whole_first_trajectory(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    fields = ("train.batch=2", "sample.steps=5", "method.start_images=4")
    spec = tiny_recipe(*fields, method="efficientdm")
    built = student.build(spec, seed=0)
    calls, taken, seen = Calls(spec, built.teacher, seed=0), [], []

    def batches():
        for n in count():
            taken.append(n)
            yield calls(n).inputs

    hook = built.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    built.method.calibrate_(built.student, built.teacher, batches())
    hook.remove()
    assert taken == list(range(5))
    (x, t), *more = seen
    assert more == []
    flat = [(calls(i // 2).inputs[0][i % 2], calls(i // 2).inputs[1][i % 2]) for i in (0, 3, 6, 9)]
    assert torch.equal(x, torch.stack([image for image, _ in flat]))
    assert torch.equal(t, torch.stack([time for _, time in flat]))
    assert not any(module.waiting for module in built.student.modules() if isinstance(module, Talsq | Lsq))
    before = copy.deepcopy(built.student.state_dict())
    built.method.calibrate_(built.student, built.teacher, iter([(3 * x, t)]))  # what is set stays
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.student.state_dict().items())


@pytest.mark.parametrize(("name", "layers", "left"), [("bedrooms", 155, 73), ("churches", 210, 109)])
def test_the_layers_that_the_released_code_quantizes(name: str, layers: int, left: int):
    """methods.md 5.12. diffusers has q, k and v apart: 32 and 42 layers more than the original's 123 and 168."""
    for coverage, expected in (("all", layers), ("released", left)):
        spec = recipe.load(f"{name}-w1a4", [f"method.coverage={coverage}"], "efficientdm")
        with torch.device("meta"):
            unet = build_unet(spec.unet)
            methods.build(spec).quantize_(unet)
        assert len(list(quantized_layers(unet))) == expected


def test_released_coverage_by_name(tiny_recipe: TinyRecipe):
    def real(name: str) -> set[str]:
        spec = tiny_recipe("method.coverage=released", name=name, method="efficientdm")
        with torch.device("meta"):
            unet = build_unet(spec.unet)
            methods.build(spec).quantize_(unet)
        quantized = {name for name, _ in quantized_layers(unet)}
        return {n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)} - quantized

    flat, conditional = real("tiny-w1a4"), real("tiny-cond")
    assert {name.split(".")[-1] for name in flat} == {"conv_shortcut", "conv", "to_q", "to_k", "to_v", "0"}
    assert all(".downsamplers." in name for name in flat if name.endswith(".conv"))
    assert {name.split(".")[-1] for name in conditional} == {"conv_shortcut", "conv"}


def test_the_defaults():
    method = EfficientDm()
    assert method.data_free
    assert (method.weight_bits, method.activation_bits, method.edge_bits, method.attention_matmul) == (4, 4, 8, False)
    assert (method.rank, method.base, method.coverage, method.start_images) == (32, "rounded", "all", 32)
    assert (method.lr_lora_divisor, method.lr_weight_scale, method.lr_activation) == (2500, 1e-6, 5e-4)


@pytest.mark.parametrize("field", ["weight_bits=9", "weight_bits=32", "activation_bits=9", "base=int", "rank=0"])
def test_fields_are_closed(field: str, tiny_recipe: TinyRecipe):
    with pytest.raises(BdmError, match=rf"method.{field.split('=')[0]}: "):
        methods.build(tiny_recipe(f"method.{field}", method="efficientdm"))


NETWORKS = {
    "W4A4": ("tiny-ldm", ("method.attention_matmul=true",)),
    "W1A1": ("tiny-ldm", ONE_BIT),
    "W8A4, real base, PLMS": ("tiny-ldm", ("method.weight_bits=8", "method.base=real", "sample.sampler=plms")),
    "W4A1, classes": ("tiny-cond", ("method.activation_bits=1", "method.coverage=released")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_files_and_packed_forms_draw_the_same(name: str, tiny_recipe: TinyRecipe, tmp_path: Path):
    """At every sampling time. The file has no trace of the low-rank part."""
    base, fields = NETWORKS[name]
    spec = tiny_recipe("sample.steps=4", "sample.eta=0", *fields, name=base, method="efficientdm")
    unet = students.finished(spec)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, Talsq):  # as after training: every entry its own
                module.scale.mul_(1 + torch.rand_like(module.scale))
                module.zero.add_(torch.randn_like(module.zero) * (0.1 if module.bits == 1 else 2))
    student.save(tmp_path / "s.safetensors", unet, spec, seed=0, step=6)
    packed = students.packed(spec, unet)
    pack.write(tmp_path / "p.safetensors", packed)
    assert not any(name[-2:] == ".a" or "lora" in name or "quantizer.b" in name for name in packed.tensors)
    others = [copy.deepcopy(unet), student.load(tmp_path / "s.safetensors").student]
    others.append(student.unpacked(pack.read(tmp_path / "p.safetensors"), Path("m")))
    x, _, *context = student.random_inputs(spec, 2, torch.Generator().manual_seed(2))
    listed = list(dict.fromkeys(times(spec.sample.sampler, spec.scheduler, 4)))
    images = []
    with torch.inference_mode():
        for t in listed:
            images.append(estimate_noise(unet, x, torch.full((2,), t), *context))
            for net in others:
                assert torch.equal(estimate_noise(net, x, torch.full((2,), t), *context), images[-1])
    assert len({image.sum().item() for image in images}) == 4


def test_zero_points_by_time_under_one_bit_weights_are_not_packed(tiny_recipe: TinyRecipe):
    spec = tiny_recipe("method.weight_bits=1", method="efficientdm")
    with pytest.raises(BdmError, match="has no packed form: its input has zero points by sampling time"):
        students.packed(spec, students.finished(spec))


def test_a_student_draws_at_times_that_are_not_its_own(tiny_recipe: TinyRecipe):
    """With the nearest entries; with fewer steps that are among its own, with these."""
    spec = tiny_recipe("sample.steps=10", method="efficientdm")
    unet = students.finished(spec)
    own = times("ddim", spec.scheduler, 10)
    fewer = times("ddim", spec.scheduler, 5)
    assert set(fewer) < set(own)
    tables = [module for module in unet.modules() if isinstance(module, Talsq)]
    assert tables[0].entries(torch.tensor(fewer)).tolist() == [own.index(t) for t in fewer]
    with torch.inference_mode():
        assert estimate_noise(unet, normal(2, 1, 8, 8), torch.full((2,), own[0] - 3)).isfinite().all()


def test_a_step_of_training_moves_the_entry_of_its_call(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    """And no other, of all the tables' entries."""
    spec = tiny_recipe("train.batch=2", "sample.steps=4", "method.lr_lora_divisor=20", method="efficientdm")
    teacher, unet, method = student.build(spec, seed=0)
    calls = Calls(spec, teacher, seed=0)
    method.calibrate_(unet, teacher, (calls(n).inputs for n in count()))
    factors, parameters = method.lr_factors(unet), dict(method.trainable(unet))
    for n in (2, 5):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        groups = [{"params": [p], "lr": spec.train.lr * factors[name]} for name, p in parameters.items()]
        optimizer, (inputs, estimate) = torch.optim.AdamW(groups, weight_decay=0), calls(n)
        optimizer.zero_grad()
        F.mse_loss(estimate_noise(unet, *inputs), estimate).backward()
        optimizer.step()
        for name, parameter in parameters.items():
            if name.endswith("activation_quantizer.scale"):
                moved = parameter.detach() != before[name]
                assert moved.nonzero().flatten().tolist() == [n % 4]
