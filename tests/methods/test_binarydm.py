"""BinaryDM's parts: the transition of EBB, L_EBB, the scope, and low-rank mimicking against NumPy."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdm_cli import methods, recipe, student
from bdm_cli.diffusion.losses import (
    FeatureTaps,
    LowRankMimicking,
    components,
    features_of,
    mimicking_mse,
    noise_loss,
    principal_basis,
)
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Forward
from bdm_cli.methods.binarydm import BinaryDM, Ebb
from bdm_cli.quant.quantizers import EbbWeight, Lsq, SignWeight
from bdm_cli.quant.swap import quantized_layers, timestep_blocks
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(n, 1, 8, 8, generator=random), torch.randint(1000, (n,), generator=random)


@pytest.fixture
def build(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Callable[..., Built]:
    """build(*overrides): the tiny recipe's student with 20 steps, calibrated."""

    def build(*overrides: str, method: str | None = None) -> Built:
        built = student.build(tiny_recipe("train.steps=20", *overrides, method=method), seed=0)
        built.method.calibrate_(built.student, built.teacher, iter([batch()]))
        return built

    return build


def second_bases(unet: nn.Module) -> list[EbbWeight]:
    found = (layer.weight_quantizer for _, layer in quantized_layers(unet))
    return [quantizer for quantizer in found if isinstance(quantizer, EbbWeight)]


# transition


def test_the_transition_leaves_a_sign_weight_with_the_same_sigma(build: Callable[..., Built]):
    _, unet, method = build()
    x, t = batch()
    unet(x, t)[0].square().mean().backward()
    torch.optim.SGD(unet.parameters(), lr=0.1).step()  # so that sigma is not at its start
    before = {name: layer.weight_quantizer for name, layer in quantized_layers(unet)}
    sigmas = {name: q.sigma.detach().clone() for name, q in before.items() if isinstance(q, EbbWeight)}
    assert len(sigmas) > 20
    method.on_step_(unet, 10, 20)
    assert second_bases(unet) == []
    for name, layer in quantized_layers(unet):
        if name not in sigmas:
            assert layer.weight_quantizer is before[name]
            continue
        evolved = layer.weight_quantizer
        assert type(evolved) is SignWeight
        assert evolved.sigma is before[name].sigma
        assert torch.equal(evolved.sigma, sigmas[name])
        plain = SignWeight(layer.weight)
        plain.sigma.data = sigmas[name]
        twin = copy.copy(layer)
        twin._modules = dict(layer._modules)
        twin.weight_quantizer = plain
        assert torch.equal(evolved(layer.weight), plain(layer.weight))
        random = torch.randn(2, *({4: (layer.weight.shape[1], 8, 8), 2: layer.weight.shape[1:]}[layer.weight.dim()]))
        assert torch.equal(layer(random), twin(random))


def test_the_transition_is_idempotent(build: Callable[..., Built]):
    _, unet, method = build()
    method.on_step_(unet, 10, 20)
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    modules = [id(layer.weight_quantizer) for _, layer in quantized_layers(unet)]
    for step in (10, 11, 20):
        method.on_step_(unet, step, 20)
    assert [id(layer.weight_quantizer) for _, layer in quantized_layers(unet)] == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


def test_an_optimizer_goes_on_with_sigma_after_the_transition(build: Callable[..., Built]):
    _, unet, method = build()
    optimizer = torch.optim.AdamW([p for _, p in method.trainable(unet)], lr=1e-2, weight_decay=0)
    name, layer = next((n, q) for n, q in quantized_layers(unet) if isinstance(q.weight_quantizer, EbbWeight))
    sigma, dropped = layer.weight_quantizer.sigma, layer.weight_quantizer.sigma_2
    for step in (1, 2):
        optimizer.zero_grad()
        unet(*batch())[0].square().mean().backward()
        optimizer.step()
        assert optimizer.state[sigma]["step"] == step
        if step == 1:
            method.on_step_(unet, 10, 20)
            frozen = dropped.detach().clone()
    assert unet.get_submodule(name).weight_quantizer.sigma is sigma
    assert torch.equal(dropped, frozen)
    assert f"{name}.weight_quantizer.sigma_2" not in unet.state_dict()


@pytest.mark.parametrize(
    ("transition", "steps", "step"),
    [
        (0.5, 200_000, 100_000),
        (100_000, 200_000, 100_000),
        (10_000, 200_000, 10_000),
        (0.05, 200_000, 10_000),
        (1, 400, 1),
        (0, 400, 0),
        (400, 400, 400),
        (0.29, 100, 29),
        (0.57, 100, 57),
    ],
)
def test_transition_is_a_fraction_below_one_and_an_iteration_from_one(transition: float, steps: int, step: int):
    method = Ebb(transition=transition)
    assert method.check(steps) == []
    assert method.transition_step(steps) == step
    unet = nn.Sequential()
    method.on_step_(unet, step, steps)


@pytest.mark.parametrize(("overrides", "last"), [(("method.transition=0.5",), 9), (("method.transition=3",), 2)])
def test_the_second_basis_lives_up_to_the_transition(build: Callable[..., Built], overrides: tuple, last: int):
    _, unet, method = build(*overrides)
    for step in range(1, last + 1):
        method.on_step_(unet, step, 20)
        assert second_bases(unet)
    method.on_step_(unet, last + 1, 20)
    assert not second_bases(unet)


def test_transition_zero_is_a_single_basis_from_the_start(build: Callable[..., Built]):
    _, unet, method = build("method.transition=0")
    assert second_bases(unet) == []
    assert "ebb" not in method.losses(Forward(unet, 0, *[features_of(unet, timestep_blocks(unet), batch())] * 2))


def test_a_transition_after_the_last_step_never_drops_the_basis_and_is_a_fault(tiny_recipe: Callable[..., Recipe]):
    with pytest.raises(BdmError) as caught:
        methods.build(tiny_recipe("method.transition=10_000"))
    assert str(caught.value) == (
        "recipe 'tiny-w1a4' has a fault:\n"
        "  method.transition: comes after the last training step (given 10000, train.steps = 6).\n"
        "    give an iteration up to 6 or a fraction below 1, e.g. 0.5"
    )


def test_transitions_that_are_neither_iteration_nor_fraction():
    assert Ebb(transition=1.5).check(400) == ["transition: is an iteration or a fraction below 1 (given 1.5)"]
    assert Ebb(transition=401).check(400)
    assert Ebb(transition=400).check(400) == []
    assert Ebb(transition=0.5).check(0) == []  # nothing is trained


# L_EBB = tau / N * sum_i mean_c sigma_2


@pytest.mark.parametrize("tau", [0.0, 9e-2, 9e-4])
def test_l_ebb_and_its_gradient(build: Callable[..., Built], tau: float):
    _, unet, method = build(f"method.tau={tau}", "method.ebb_scope=4", method="ebb")
    bases = second_bases(unet)
    for i, basis in enumerate(bases):  # negative ones too: there is no absolute value
        basis.sigma_2.data = torch.linspace(-0.5, 1, basis.sigma_2.numel()).reshape(basis.sigma_2.shape) + i
    losses = method.losses(Forward(unet, 0))
    assert list(losses) == ["ebb"]
    means = [basis.sigma_2.detach().double().numpy().mean() for basis in bases]
    assert losses["ebb"].item() == pytest.approx(tau * sum(means) / len(bases), rel=1e-5)
    losses["ebb"].backward()
    for basis in bases:
        expected = tau / len(bases) / basis.sigma_2.numel()
        np.testing.assert_allclose(basis.sigma_2.grad.numpy(), np.full(basis.sigma_2.shape, expected), rtol=1e-5)
    others = [name for name, p in unet.named_parameters() if p.grad is not None and not name.endswith("sigma_2")]
    assert others == []


def test_l_ebb_is_gone_after_the_transition(build: Callable[..., Built]):
    _, unet, method = build(method="ebb")
    assert method.losses(Forward(unet, 9))["ebb"] > 0
    method.on_step_(unet, 10, 20)
    assert method.losses(Forward(unet, 10)) == {}


# scope


@pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
        (("method.ebb_scope=0",), set()),
        (("method.ebb_scope=1",), {12}),
        (("method.ebb_scope=2",), {1, 11, 12}),
        (("method.ebb_scope=4",), {1, 2, 3, 9, 10, 11, 12}),
        (("method.ebb_scope=6",), set(range(1, 13)) - {6}),
        (("method.ebb_scope=50",), set(range(1, 13)) - {6}),
        (("method.ebb_scope=0", "method.ebb_center=true"), {6}),
        (("method.ebb_scope=6", "method.ebb_center=true"), set(range(1, 13))),
    ],
)
def test_scope_and_center_choose_whole_blocks(build: Callable[..., Built], overrides: tuple, blocks: set):
    _, unet, _ = build(*overrides)
    of = timestep_blocks(unet)
    assert len(of) == 13
    for block in of[1:]:
        kinds = {
            type(layer.weight_quantizer)
            for name, layer in quantized_layers(unet)
            if any(name.startswith(f"{module}.") for module in block.modules)
        }
        assert kinds == {EbbWeight if block.index in blocks else SignWeight}
    assert type(unet.conv_in.weight_quantizer) is Lsq


def test_the_rule_of_half_the_side_on_the_cifar_network():
    """methods.md 2.2: at scope 6 these are the blocks of levels 0 and 1 of both paths."""
    from bdm_cli.diffusion.models import build_unet
    from bdm_cli.quant.swap import sites

    with torch.device("meta"):
        unet = build_unet(recipe.load("cifar10").unet)
    chosen = {site.name.rsplit(".", 1)[0] for site, _ in sites(unet) if site.region(6) in ("head", "tail")}
    levels = {re.match(r"(down|up)_blocks\.(\d)", name).group() for name in chosen}
    assert levels == {"down_blocks.0", "down_blocks.1", "up_blocks.2", "up_blocks.3"}


# low-rank mimicking


def test_components_round_to_the_nearest():
    assert [components(c, 4) for c in (224, 448, 672, 896)] == [56, 112, 168, 224]
    assert [components(c, 4) for c in (1, 2, 5, 6, 7, 8, 10)] == [0, 1, 1, 2, 2, 2, 3]
    assert [components(10, k) for k in (1, 1.5, 2, 3, 8, 20, 21)] == [10, 7, 5, 3, 1, 1, 0]


def correlated(n: int, c: int, side: int, seed: int = 0, offset: float = 3.0) -> Tensor:
    """Features [N, C, H, W] with a well separated spectrum and a mean far from 0."""
    random = np.random.default_rng(seed)
    mix = np.linalg.qr(random.standard_normal((c, c)))[0] * 2.0 ** -np.arange(c)
    rows = random.standard_normal((n, side, side, c)) @ mix.T + offset * mix[:, 0]
    return torch.tensor(rows.transpose(0, 3, 1, 2), dtype=torch.float32)


def numpy_basis(feature: Tensor, rank: int) -> np.ndarray:
    """Right singular vectors of the uncentred rows (positions x channels): the eigenvectors of E^T E."""
    c = feature.shape[1]
    rows = feature.double().numpy().transpose(0, 2, 3, 1).reshape(-1, c)
    return np.linalg.svd(rows)[2][:rank].T


@pytest.mark.parametrize(("n", "c", "side", "rank"), [(2, 8, 4, 2), (3, 12, 5, 3), (2, 6, 2, 6), (2, 16, 8, 4)])
def test_the_basis_spans_the_leading_eigenvectors(n: int, c: int, side: int, rank: int):
    feature = correlated(n, c, side)
    basis = principal_basis(feature, rank).double().numpy()
    assert basis.shape == (c, rank)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)
    expected = numpy_basis(feature, rank)
    np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-4)
    for ours, theirs in zip(basis.T, expected.T, strict=True):  # in order, largest first
        assert abs(ours @ theirs) > 0.999
    assert (basis[np.abs(basis).argmax(0), np.arange(rank)] > 0).all()


def test_the_basis_agrees_with_eigh_of_the_second_moment():
    feature = correlated(3, 10, 6, seed=4)
    rows = feature.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 10)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    leading = vectors[:, np.argsort(values)[::-1][:4]]
    basis = principal_basis(feature, 4).double().numpy()
    np.testing.assert_allclose(basis @ basis.T, leading @ leading.T, atol=1e-5)


def test_the_basis_is_not_centred():
    """Features that vary along one axis around a mean along another, longer one: the mean's axis comes first."""
    feature = torch.zeros(1, 3, 10, 10)
    feature[:, 0] = 5.0
    feature[:, 1] = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(principal_basis(feature, 1).numpy()[:, 0], [1, 0, 0], atol=0.1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_low_rank_mimicking_is_the_mse_after_projection(k: int):
    fp = [correlated(2, 8, 4, seed=1), correlated(2, 12, 2, seed=2)]
    bi = [f + 0.3 * torch.randn(f.shape, generator=torch.Generator().manual_seed(5)) for f in fp]
    bi = [feature.requires_grad_() for feature in bi]
    mimicking = LowRankMimicking([8, 12], k)
    mimicking.fit_(fp)
    value = mimicking(fp, bi)
    losses, gradients = [], []
    for a, b in zip(fp, bi, strict=True):
        c = a.shape[1]
        e = numpy_basis(a, round(c / k))
        ours = getattr(mimicking, f"basis_{len(losses)}").double().numpy()
        np.testing.assert_allclose(ours @ ours.T, e @ e.T, atol=1e-4)
        difference = (b.detach() - a).double().numpy().transpose(0, 2, 3, 1).reshape(-1, c)
        losses.append(((difference @ e) ** 2).mean())
        gradient = 2 * difference @ e @ e.T / (len(difference) * e.shape[1]) / 2
        gradients.append(gradient.reshape(len(a), *a.shape[2:], c).transpose(0, 3, 1, 2))
    assert value.item() == pytest.approx(np.mean(losses), rel=1e-4)
    value.backward()
    for feature, gradient in zip(bi, gradients, strict=True):
        np.testing.assert_allclose(feature.grad.numpy(), gradient, atol=1e-5)


@pytest.mark.parametrize(("width", "rank"), [(16, 4), (8, 2), (4, 2), (1, 1)])
def test_over_the_width_as_in_the_released_code(width: int, rank: int):
    """Centred: the axis of the mean is no component if nothing varies along it. Projected as they are."""
    fp = correlated(2, width, 6, seed=width).transpose(1, 3)
    bi = torch.randn(fp.shape, generator=torch.Generator().manual_seed(5))
    mimicking = LowRankMimicking([width], 4, "width")
    mimicking.fit_([fp])
    assert mimicking.basis_0.shape == (width, rank)
    rows = fp.double().numpy().reshape(-1, width)
    e = np.linalg.svd(rows - rows.mean(0))[2][:rank].T
    ours = mimicking.basis_0.double().numpy()
    np.testing.assert_allclose(ours @ ours.T, e @ e.T, atol=1e-4)
    expected = (((fp - bi).double().numpy().reshape(-1, width) @ e) ** 2).mean()
    assert mimicking([fp], [bi]).item() == pytest.approx(expected, rel=1e-4)
    if width == 16:
        shifted = fp.clone()
        shifted[..., 3] += 100.0
        np.testing.assert_allclose(principal_basis(shifted, rank, "width"), mimicking.basis_0, atol=1e-3)


def test_the_width_is_a_value_of_the_recipe(build: Callable[..., Built]):
    teacher, _, method = build("method.lrm_axis=width")
    widths = [feature.shape[3] for feature in features_of(teacher, timestep_blocks(teacher), batch())]
    shapes = [tuple(basis.shape) for basis in method.state.projection.buffers()]
    assert shapes == [(width, max(2, width // 4)) for width in widths]


TWO_PROCESSES = """
import sys, torch, torch.distributed as distributed
from bdm_cli.diffusion.losses import principal_basis
distributed.init_process_group("gloo")
rank = distributed.get_rank()
feature = torch.load(sys.argv[1], weights_only=True)
own = feature[:1] if rank == 0 else feature[1:]
bases = {axis: principal_basis(own, 2, axis) for axis in ("channels", "width")}
torch.save(bases, f"{sys.argv[1]}.{rank}")
distributed.barrier()  # neither may end while the other still listens to it
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for two processes on CPU")
def test_processes_find_one_basis_from_the_features_of_all(tmp_path: Path):
    feature = correlated(4, 6, 8)
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    torch.save(feature, tmp_path / "feature")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, str(tmp_path / "two.py"), str(tmp_path / "feature")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    for rank in range(2):
        found = torch.load(tmp_path / f"feature.{rank}", weights_only=True)
        for axis in ("channels", "width"):
            torch.testing.assert_close(found[axis], principal_basis(feature, 2, axis))


def test_mse_and_full_rank_mimicking_are_equal():
    fp = [torch.randn(2, c, 5, 5, generator=torch.Generator().manual_seed(c)) for c in (6, 10)]
    bi = [torch.randn(f.shape, generator=torch.Generator().manual_seed(9)) for f in fp]
    mimicking = LowRankMimicking([6, 10], 1)
    mimicking.fit_(fp)
    mse = np.mean([((a - b).double().numpy() ** 2).mean() for a, b in zip(fp, bi, strict=True)])
    assert mimicking_mse(fp, bi).item() == pytest.approx(mse, rel=1e-5)
    assert mimicking(fp, bi).item() == pytest.approx(mse, rel=1e-4)


def test_features_of_differing_count_are_refused():
    mimicking = LowRankMimicking([4, 4], 2)
    with pytest.raises(ValueError, match="zip"):
        mimicking([torch.zeros(1, 4, 2, 2)] * 2, [torch.zeros(1, 4, 2, 2)])


def test_a_reduction_that_leaves_no_component_is_an_error(build: Callable[..., Built]):
    with pytest.raises(ValueError, match="K = 17 leaves no component of the 8 channels of block 0"):
        LowRankMimicking([8, 16], 17)
    with pytest.raises(BdmError, match=r"^method.lrm_k: K = 40(\.0)? leaves no component"):
        build("method.lrm_k=40")


def test_the_k_that_the_error_allows_is_allowed(tiny_recipe: Callable[..., Recipe]):
    """The narrowest block limits K, not the widest."""

    def calibrate(k: float) -> None:
        spec = tiny_recipe("unet.arguments.block_out_channels=[8, 16, 64]", f"method.lrm_k={k}")
        built = student.build(spec, seed=0, random_teacher=True)
        built.method.calibrate_(built.student, built.teacher, iter([batch()]))

    with pytest.raises(BdmError) as caught:
        calibrate(200)
    calibrate(float(re.search(r"at most (\d+)", str(caught.value)).group(1)))


def test_projections_come_from_the_teachers_features_of_the_first_batch(build: Callable[..., Built]):
    teacher, unet, method = build()
    projection = method.state.projection
    features = features_of(teacher, timestep_blocks(teacher), batch())
    assert len(features) == 13
    for index, feature in enumerate(features):
        basis = getattr(projection, f"basis_{index}")
        assert basis.shape == (feature.shape[1], round(feature.shape[1] / 4))
        assert torch.equal(basis, principal_basis(feature, basis.shape[1]))
    assert set(method.state.state_dict()) == {f"projection.basis_{i}" for i in range(13)}
    assert not set(unet.state_dict()) & set(method.state.state_dict())
    assert list(projection.parameters()) == []


def test_the_projection_is_refitted_only_every_lrm_update_steps(build: Callable[..., Built]):
    for every, refits in ((0, []), (3, [3, 6])):
        _, unet, method = build(f"method.lrm_update={every}", "method.lrm_lambda=0.5", "method.tau=0")
        shapes = [(2, len(getattr(method.state.projection, f"basis_{i}")), 4, 4) for i in range(13)]
        changed = []
        for step in range(8):
            random = torch.Generator().manual_seed(step)
            fp = [torch.randn(shape, generator=random) for shape in shapes]
            before = method.state.projection.basis_0.clone()
            loss = method.losses(Forward(unet, step, fp, [torch.zeros_like(f) for f in fp]))["lrm"]
            assert loss.item() == pytest.approx(0.5 * method.state.projection(fp, [f * 0 for f in fp]).item())
            if not torch.equal(method.state.projection.basis_0, before):
                changed.append(step)
                assert torch.equal(method.state.projection.basis_0, principal_basis(fp[0], 2))
        assert changed == refits


def test_losses_are_weighted_and_named(build: Callable[..., Built]):
    _, unet, method = build("method.lrm_lambda=0.25", "method.distillation=mse")
    fp = [torch.zeros(1, 2, 2, 2)]
    bi = [torch.full((1, 2, 2, 2), 2.0, requires_grad=True)]
    losses = method.losses(Forward(unet, 0, fp, bi))
    assert set(losses) == {"ebb", "mse"}
    assert losses["mse"].item() == 0.25 * 4
    losses["mse"].backward()
    assert torch.equal(bi[0].grad, torch.full((1, 2, 2, 2), 0.25 * 2 * 2 / 8))
    assert not hasattr(method.state, "projection")


def test_the_defaults_are_the_papers():
    method = BinaryDM()
    assert (method.ebb_scope, method.tau, method.transition, method.lrm_k, method.lrm_lambda) == (6, 9e-2, 0.5, 4, 1e-4)
    assert (method.activation_bits, method.edge_bits, method.attention_matmul) == (4, 8, False)
    assert (method.ebb_center, method.lrm_update, method.distillation) == (False, 0, "lrm")


# the shared losses


@pytest.mark.parametrize("kind", ["mse", "mse-sum", "l1"])
def test_noise_loss(kind: str):
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 4, 3, 5, 5))
    estimate = torch.tensor(a, requires_grad=True)
    loss = noise_loss(estimate, torch.tensor(b), kind)
    loss.backward()
    n = a.size
    expected, gradient = {
        "mse": (((a - b) ** 2).mean(), 2 * (a - b) / n),
        "mse-sum": (((a - b) ** 2).sum() / 4, 2 * (a - b) / 4),
        "l1": (np.abs(a - b).mean(), np.sign(a - b) / n),
    }[kind]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(estimate.grad.numpy(), gradient, rtol=1e-12)


def test_taps_give_the_blocks_outputs_in_order(build: Callable[..., Built]):
    teacher, _, _ = build()
    blocks = timestep_blocks(teacher)
    taps = FeatureTaps(teacher, blocks)
    x, t = batch()
    with torch.no_grad():
        teacher(x, t)
        features = taps.take()
        assert torch.equal(features[0], teacher.conv_in(x))
        head = teacher.conv_out(teacher.conv_act(teacher.conv_norm_out(features[-1])))
        assert torch.equal(head, teacher(x, t)[0])
    assert [tuple(f.shape[1:]) for f in features] == [
        (8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4), (16, 2, 2), (16, 2, 2),
        (16, 2, 2),
        (16, 2, 2), (16, 4, 4), (16, 4, 4), (16, 8, 8), (8, 8, 8), (8, 8, 8),
    ]  # fmt: skip
    taps.remove()
    assert not any(module._forward_hooks for module in teacher.modules())
