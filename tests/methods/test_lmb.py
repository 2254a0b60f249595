"""High-Order and BinaryDM's first version: two bases for ever, low-rank mimicking, progressive binarization."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
from torch import Tensor, nn

from bdm_cli import methods, recipe, student
from bdm_cli.diffusion.losses import principal_basis
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Forward
from bdm_cli.methods.lmb import HighOrder, Lmb
from bdm_cli.quant.quantizers import EbbWeight, Lsq, SignWeight
from bdm_cli.quant.swap import quantized_layers, sites, timestep_blocks
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built

EDGES = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(n, 1, 8, 8, generator=random), torch.randint(1000, (n,), generator=random)


@pytest.fixture
def build(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Callable[..., Built]:
    """build(*overrides): the tiny recipe's student with 20 steps, calibrated."""

    def build(*overrides: str, method: str = "lmb") -> Built:
        built = student.build(tiny_recipe("train.steps=20", *overrides, method=method), seed=0)
        built.method.calibrate_(built.student, built.teacher, iter([batch()]))
        return built

    return build


def kinds(unet: nn.Module) -> dict[str, type]:
    return {name: type(layer.weight_quantizer) for name, layer in quantized_layers(unet)}


def real_blocks(unet: nn.Module) -> set[int]:
    """The timestep blocks that are in full precision, whole blocks and weights together with inputs."""
    blocks = timestep_blocks(unet)
    real, quantized = set(), set()
    for name, layer in quantized_layers(unet):
        assert layer.weight_is_real == layer.input_is_real
        index = next((b.index for b in blocks if any(f"{name}.".startswith(f"{m}.") for m in b.modules)), None)
        if name in EDGES:
            assert not layer.weight_is_real
        else:
            (real if layer.weight_is_real else quantized).add(index)
    assert not real & quantized
    return real


# two bases


def test_high_order_has_two_bases_everywhere_but_at_the_edges(build: Callable[..., Built]):
    _, unet, method = build(method="highorder")
    assert kinds(unet) == {name: Lsq if name in EDGES else EbbWeight for name in kinds(unet)}
    for step in (1, 10, 20):
        method.on_step_(unet, step, 20)
    assert set(kinds(unet).values()) == {Lsq, EbbWeight}
    assert method.losses(Forward(unet, 0)) == {}
    assert method.taps(unet) == []


@pytest.mark.parametrize("method", ["highorder", "lmb"])
def test_a_layer_is_the_sum_of_two_binary_products(build: Callable[..., Built], method: str):
    """Eq. 18 in float64, on the 4-bit input of the layer: y = s1 (a * b1) + s2 (a * b2) + bias."""
    unet = build("method.progressive=none" if method == "lmb" else "method.edge_bits=8", method=method).student.eval()
    layer = unet.down_blocks[0].resnets[0].conv1
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = layer(x).double().numpy()
    step = layer.activation_quantizer.scale.item()
    a = np.clip(np.round(x.numpy() / np.float32(step)), -8, 7).astype(np.float64) * step
    w = layer.weight.detach().double().numpy()
    s1, s2 = (p.detach().double().numpy() for p in (layer.weight_quantizer.sigma, layer.weight_quantizer.sigma_2))
    np.testing.assert_allclose(s1, np.abs(w).mean((1, 2, 3), keepdims=True), rtol=1e-6)
    b1 = np.where(w >= 0, 1, -1)
    b2 = np.where(w - s1 * b1 >= 0, 1, -1)
    np.testing.assert_allclose(s2, np.abs(w - s1 * b1).mean((1, 2, 3), keepdims=True), rtol=1e-5)
    padded = np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = np.zeros_like(y) + layer.bias.detach().double().numpy()[:, None, None]
    for i, j in np.ndindex(3, 3):
        cut = padded[:, :, i : i + 6, j : j + 6]
        for s, b in ((s1, b1), (s2, b2)):
            expected += np.einsum("nchw,oc->nohw", cut, (s * b)[:, :, i, j])
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scope", "blocks"), [(0, set()), (2, {1, 11, 12}), (4, {1, 2, 3, 9, 10, 11, 12})])
def test_the_scope_of_two_bases(build: Callable[..., Built], scope: int, blocks: set[int]):
    _, unet, _ = build(f"method.ebb_scope={scope}")
    of = timestep_blocks(unet)
    for name, kind in kinds(unet).items():
        if name not in EDGES:
            index = next(b.index for b in of if any(f"{name}.".startswith(f"{m}.") for m in b.modules))
            assert kind is (EbbWeight if index in blocks else SignWeight)


def test_two_bases_cost_what_the_later_abstract_says():
    """methods.md 3: with scope 6 on LDM-4, 4.75 MiB and 66 % of the binary layers' operations more."""
    with torch.device("meta"):
        unet = build_unet(recipe.load("bedrooms").unet)
    chosen = {site.name for site, _ in sites(unet) if site.region(6) in ("head", "tail")}
    weights = sum(layer.weight.numel() for site, layer in sites(unet) if site.name in chosen)
    assert len(chosen) > 49  # diffusers has three layers where CompVis has one for q, k and v
    assert weights / 8 / 2**20 == pytest.approx(4.75, abs=0.01)


@pytest.mark.parametrize("method", ["highorder", "lmb"])
def test_packed_students_have_two_bases_and_draw_the_same(tiny_recipe: Callable[..., Recipe], method: str):
    spec = tiny_recipe(*(("method.ebb_scope=4",) if method == "lmb" else ()), method=method)
    unet = students.finished(spec)
    packed = students.packed(spec, unet)
    bases = {name: layer.bases for name, layer in packed.header.layers.items()}
    assert bases == {name: 2 if kind is EbbWeight else 1 for name, kind in kinds(unet).items()}
    assert set(bases.values()) == {1, 2}
    found = student.unpacked(packed, Path("m"))
    with torch.no_grad():
        assert torch.equal(estimate_noise(found, *batch()), estimate_noise(unet, *batch()))


# progressive binarization


@pytest.mark.parametrize(
    ("overrides", "reached"),
    [
        ((), [0, 1, 2, 3, 4, 5, 6, 6]),
        (("method.interval=3",), [0, 0, 0, 1, 1, 1, 2, 2]),
        (("method.progressive=released",), [0, 1, 3, 4, 6, 6, 6, 6]),
        (("method.progressive=released", "method.interval=2"), [0, 0, 1, 1, 3, 3, 4, 4]),
        (("method.progressive=none",), [6] * 8),
    ],
)
def test_blocks_are_quantized_from_the_mid_block_outwards(
    build: Callable[..., Built], overrides: tuple, reached: list[int]
):
    """The tiny network has 13 blocks; block 0 is conv_in, an edge."""
    _, unet, method = build(*overrides)
    for step, distance in enumerate(reached):
        for _ in range(2):
            method.on_step_(unet, step, 100)
            assert real_blocks(unet) == {block for block in range(1, 13) if abs(block - 6) > distance}


def test_the_released_groups_on_ldm_4():
    """methods.md 2.5: the middle, blocks 9-11 / 0-2, 6-8 / 3-5, 3-5 / 6-8, 0-2 / 9-11 of both paths."""
    method = Lmb(progressive="released")
    groups: list[set[int]] = []
    for batch in range(5):
        quantized = {block for block in range(25) if abs(block - 12) <= method.reached(batch, 12)}
        groups.append(quantized.difference(*groups))
    ranges = [(9, 0), (6, 3), (3, 6), (0, 9)]
    expected = [set(range(i, i + 3)) | {13 + block for block in range(o, o + 3)} for i, o in ranges]
    assert groups == [{12}, *expected]


def test_the_papers_order_on_ldm_4():
    method = Lmb()
    for iteration in range(13):
        quantized = [block for block in range(25) if abs(block - 12) <= method.reached(iteration, 12)]
        assert quantized == list(range(12 - iteration, 12 + iteration + 1))


def test_all_is_quantized_after_the_last_step_whatever_its_turn(build: Callable[..., Built]):
    _, unet, method = build("method.interval=50")
    method.on_step_(unet, 19, 20)
    assert real_blocks(unet) == set(range(1, 13)) - {6}
    method.on_step_(unet, 20, 20)
    assert real_blocks(unet) == set()
    method.on_step_(unet, 3, 20)  # a function of the step alone
    assert real_blocks(unet) == set(range(1, 13)) - {6}


def test_real_blocks_compute_as_the_teacher(build: Callable[..., Built]):
    """At the first step only the mid block and the edges differ from full precision."""
    teacher, unet, _ = build("method.edge_bits=32")
    unet.eval()
    x, t = batch()
    with torch.no_grad():
        emb = teacher.time_embedding(teacher.time_proj(t))
        h = teacher.conv_in(x)
        block, twin = teacher.down_blocks[1], unet.down_blocks[1]
        h = teacher.down_blocks[0](h, emb)[0]
        assert torch.equal(block(h, emb)[0], twin(h, emb)[0])
        deep = torch.randn(3, 16, 2, 2)
        assert not torch.allclose(teacher.mid_block(deep, emb), unet.mid_block(deep, emb), atol=1e-3)


def test_quantizers_start_in_one_forward_with_everything_quantized(build: Callable[..., Built]):
    _, unet, method = build()
    assert real_blocks(unet) == set(range(1, 13)) - {6}  # as before the calibration
    seen: dict[nn.Module, Tensor] = {}
    for _, layer in quantized_layers(unet):
        layer.activation_quantizer.register_forward_pre_hook(lambda m, inputs: seen.__setitem__(m, inputs[0]))
    method.on_step_(unet, 20, 20)
    with torch.no_grad():
        unet(*batch())
    assert len(seen) == len(kinds(unet))
    for quantizer, x in seen.items():
        torch.testing.assert_close(quantizer.scale.detach(), 2 * x.abs().mean() / quantizer.high**0.5)


def test_gradients_follow_what_is_quantized(build: Callable[..., Built]):
    _, unet, method = build()
    for step in (0, 3, 6):
        method.on_step_(unet, step, 20)
        unet.zero_grad()
        unet(*batch())[0].square().mean().backward()
        for _, layer in quantized_layers(unet):
            scales = list(layer.weight_quantizer.parameters())
            assert {p.grad is None for p in scales} == {layer.weight_is_real}
            assert (layer.activation_quantizer.scale.grad is None) == layer.input_is_real
            assert layer.weight.grad is not None


@pytest.mark.parametrize("step", [2, 20])
def test_saved_and_copied_students_are_at_the_same_step(
    build: Callable[..., Built], tiny_recipe: Callable[..., Recipe], tmp_path: Path, step: int
):
    _, unet, method = build()
    method.on_step_(unet, step, 20)
    spec = tiny_recipe("train.steps=20", method="lmb")
    student.save(tmp_path / "m.safetensors", unet, spec, seed=0, step=step)
    loaded = student.load(tmp_path / "m.safetensors").student
    twin = copy.deepcopy(unet).eval()
    assert real_blocks(loaded) == real_blocks(twin) == real_blocks(unet)
    with torch.no_grad():
        expected = estimate_noise(unet.eval(), *batch())
        assert torch.equal(estimate_noise(loaded, *batch()), expected)
        assert torch.equal(estimate_noise(twin, *batch()), expected)


# low-rank mimicking


def test_the_loss_is_the_mse_in_the_teachers_subspace(build: Callable[..., Built]):
    teacher, unet, method = build("method.lrm_lambda=0.5", "method.lrm_k=2")
    blocks = method.taps(unet)
    assert [block.index for block in blocks] == list(range(13))
    random = torch.Generator().manual_seed(0)
    widths = [len(getattr(method.state.projection, f"basis_{i}")) for i in range(13)]
    fp, bi = ([torch.randn(2, c, 4, 4, generator=random) for c in widths] for _ in range(2))
    losses = method.losses(Forward(unet, 0, fp, bi))
    assert list(losses) == ["lrm"]
    found = []
    for index, (f, b) in enumerate(zip(fp, bi, strict=True)):
        basis = getattr(method.state.projection, f"basis_{index}").double().numpy()
        assert basis.shape == (widths[index], widths[index] // 2)
        found.append(((np.einsum("nchw,cr->nhwr", (f - b).double().numpy(), basis)) ** 2).mean())
    assert losses["lrm"].item() == pytest.approx(0.5 * np.mean(found), rel=1e-5)
    with torch.no_grad():
        first = teacher.conv_in(batch()[0])
    assert torch.equal(method.state.projection.basis_0, principal_basis(first, 4))


def test_the_defaults_are_the_papers():
    method = Lmb()
    assert (method.ebb_scope, method.lrm_k, method.lrm_lambda) == (6, 4, 1e-4)
    assert (method.progressive, method.interval) == ("paper", 1)
    assert (HighOrder().activation_bits, HighOrder().edge_bits) == (4, 8)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("progressive=inwards", r"method.progressive: .*'paper', 'released' or 'none'"),
        ("interval=0", r"method.interval: .*greater than or equal to 1"),
        ("tau=0.1", r"method.tau: unknown key"),
        ("lrm_k=0.5", r"method.lrm_k"),
    ],
)
def test_faulty_fields(tiny_recipe: Callable[..., Recipe], field: str, text: str):
    with pytest.raises(BdmError, match=text):
        methods.build(tiny_recipe(f"method.{field}", method="lmb"))


def test_a_reduction_that_leaves_no_component_is_an_error(build: Callable[..., Built]):
    with pytest.raises(BdmError, match=r"^method.lrm_k: K = 40(\.0)? leaves no component"):
        build("method.lrm_k=40")
