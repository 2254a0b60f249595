"""Q-DM: TaQ's values and gradients in float64, NeM's target and loss, and the method on the tiny network."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
from torch import Tensor

from bdm_cli import methods, student
from bdm_cli.diffusion.models import estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Batch, Forward
from bdm_cli.methods.qdm import QDm, TaqLsq
from bdm_cli.quant.layers import QuantAttnProcessor
from bdm_cli.quant.quantizers import Lsq, SignWeight
from bdm_cli.quant.swap import EDGES, quantized_layers
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built

TinyRecipe = Callable[..., Recipe]
TAQ = "method.attention_matmul=true"
EPSILON = 1e-5


def operand(seed: int = 1) -> Tensor:
    """[N, heads, tokens, channels], every channel with a mean and a deviation of its own, of which some are 0."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 9, 4, generator=random)
    x = x * torch.rand(2, 3, 1, 4, generator=random) * 5 + 10 * torch.randn(2, 3, 1, 4, generator=random)
    x[0, 0, :, 0] = 0.0
    return x


def normalised(x: np.ndarray, epsilon: float = EPSILON) -> tuple[np.ndarray, ...]:
    mean = x.mean(2, keepdims=True)
    deviation = np.sqrt(((x - mean) ** 2).mean(2, keepdims=True) + epsilon)
    return (x - mean) / deviation, mean, deviation


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_lsqs_of_the_normalised_operand_moved_back(bits: int):
    q, x = TaqLsq(bits, EPSILON), operand()
    q.calibrate_(x)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    u, mean, deviation = normalised(x.double().numpy())
    s = 2 * np.abs(u).mean() / high**0.5
    assert q.scale.item() == pytest.approx(s, rel=1e-4)
    expected = deviation * s * np.clip(np.round(u / s), low, high) + mean
    found = q(x).detach().numpy()
    near_a_boundary = np.abs(np.abs(u / s % 1 - 0.5)) < 1e-3
    np.testing.assert_allclose(found[~near_a_boundary], expected[~near_a_boundary], rtol=1e-4, atol=1e-4)
    assert near_a_boundary.mean() < 0.02
    for index in np.ndindex(2, 3, 4):  # few values per image and channel
        assert len(np.unique(found[index[0], index[1], :, index[2]])) <= 2**bits


def test_gradients_pass_through_the_normalisation():
    """d q/d x of q = d s l + m with l = round(clip(u / s)), whose slope by u / s is taken as 1 inside; from their
    derivatives written out: dm/dx_j = 1/n, dd/dx_j = (x_j - m) / (n d)."""
    q, x = TaqLsq(3, EPSILON), operand().requires_grad_()
    q.calibrate_(x.detach())
    with torch.no_grad():
        q.scale.mul_(0.6)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    q(x).backward(upstream)
    a, g, s = x.detach().double().numpy(), upstream.double().numpy(), q.scale.item()
    u, mean, d = normalised(a)
    v, n = u / s, a.shape[2]
    levels, inside = np.clip(np.round(v), -4, 3), (v >= -4) & (v <= 3)
    assert 0 < (~inside).sum() < inside.sum()
    # q_i = d h(u_i) + m with h' = inside: dq_i/dx_j = dd_j h_i + d inside_i du_i/dx_j + dm_j
    own = g * inside
    by_d = (g * s * levels - own * u).sum(2, keepdims=True)
    by_m = (g - own).sum(2, keepdims=True)
    expected = own + by_d * (a - mean) / (n * d) + by_m / n
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-4)
    by_scale = (g * d * (levels - np.where(inside, v, 0))).sum() / np.sqrt(a.size * 3)
    assert q.scale.grad.item() == pytest.approx(by_scale, rel=1e-3)


def test_the_ends_and_halves_of_the_range():
    """Tokens whose normalised values are whole steps and halves."""
    q = TaqLsq(2, 1e-12)
    with torch.no_grad():
        q.scale.fill_(0.5)
    x = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(1, 1, 4, 1)  # m = 0, d = 1, x / s = -2, 2
    assert q(x).flatten().tolist() == [-1.0, 0.5, -1.0, 0.5]
    with torch.no_grad():
        q.scale.fill_(2.0)  # x / s = -0.5, 0.5: to even
    assert q(x).flatten().tolist() == [0.0, 0.0, 0.0, 0.0]
    assert torch.equal(q(x + 3), torch.full_like(x, 3.0))


def test_what_is_quantized_depends_on_neither_offset_nor_gain_nor_neighbours():
    q, x = TaqLsq(4, 1e-9), operand(4)[1:]
    q.calibrate_(x)
    y = q(x)
    torch.testing.assert_close(q(3 * x + 7), 3 * y + 7, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q(torch.cat([100 * x, x]))[1:], y)


def test_a_silent_or_single_token_stays_as_it_is():
    q = TaqLsq(4, EPSILON)
    q.calibrate_(torch.zeros(1, 1, 3, 2))
    assert torch.equal(q(torch.zeros(1, 1, 3, 2)), torch.zeros(1, 1, 3, 2))
    one = torch.randn(2, 3, 1, 4)
    torch.testing.assert_close(q(one), one)


# the method


def build(spec: Recipe) -> tuple[Built, Batch]:
    built = student.build(spec, seed=0)
    random = torch.Generator().manual_seed(3)
    x, noise = torch.randn(4, 1, 8, 8, generator=random), torch.randn(4, 1, 8, 8, generator=random)
    batch = Batch((x, torch.tensor([5, 300, 600, 990])), noise)
    built.method.calibrate_(built.student, built.teacher, iter([batch.inputs]))
    return built, batch


def test_queries_and_keys_are_normalised_and_all_else_is_the_baselines(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    (_, unet, _), _ = build(tiny_recipe(TAQ, method="qdm"))
    for name, layer in quantized_layers(unet):
        assert type(layer.weight_quantizer) is (Lsq if name in EDGES else SignWeight)
        assert type(layer.activation_quantizer) is Lsq
        assert layer.activation_quantizer.bits == (8 if name in EDGES else 4)
    processors = [m for m in unet.modules() if isinstance(m, QuantAttnProcessor)]
    assert len(processors) == 4
    for processor in processors:
        kinds = [processor.q_quantizer, processor.k_quantizer, processor.probability_quantizer, processor.v_quantizer]
        assert [type(kind) for kind in kinds] == [TaqLsq, TaqLsq, Lsq, Lsq]
        assert {kind.bits for kind in kinds} == {4}
        assert kinds[0].epsilon == 1e-5


@pytest.mark.parametrize("operands", ["true", "false"])
def test_without_taq(operands: str, tiny_recipe: TinyRecipe, tiny_teacher: Path):
    (_, unet, _), _ = build(tiny_recipe("method.taq=false", f"method.attention_matmul={operands}", method="qdm"))
    assert not any(isinstance(module, TaqLsq) for module in unet.modules())
    assert sum(isinstance(module, QuantAttnProcessor) for module in unet.modules()) == 4 * (operands == "true")


def test_taq_without_quantized_operands_is_a_fault(tiny_recipe: TinyRecipe):
    """A parent recipe may say attention_matmul = false; that must not drop TaQ unseen."""
    with pytest.raises(BdmError, match=r"method.attention_matmul: TaQ .* must be true"):
        methods.build(tiny_recipe("method.attention_matmul=false", method="qdm"))
    methods.build(tiny_recipe("method.attention_matmul=false", "method.activation_bits=32", method="qdm"))


def forward(batch: Batch, unet: torch.nn.Module) -> Forward:
    random = torch.Generator().manual_seed(5)
    estimates = [torch.randn(batch.noise.shape, generator=random) for _ in range(2)]
    return Forward(unet, 0, batch=batch, estimate_bi=estimates[0].requires_grad_(), estimate_fp=estimates[1])


def test_the_target_is_the_teachers_estimate(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    (_, unet, method), batch = build(tiny_recipe(TAQ, method="qdm"))
    given = forward(batch, unet)
    assert method.wants_teacher
    assert method.target(given) is given.estimate_fp
    assert method.losses(given) == {}


@pytest.mark.parametrize("kind", ["mse", "mse-sum", "l1"])
def test_or_a_second_target_beside_the_noise(kind: str, tiny_recipe: TinyRecipe, tiny_teacher: Path):
    fields = ("method.nem=add", "method.nem_weight=0.25", f"train.loss={kind}")
    (_, unet, method), batch = build(tiny_recipe(TAQ, *fields, method="qdm"))
    given = forward(batch, unet)
    assert method.wants_teacher
    assert method.target(given) is batch.noise
    (name, loss), *more = method.losses(given).items()
    assert (name, more) == ("nem", [])
    a, b = given.estimate_bi.detach().double().numpy(), given.estimate_fp.double().numpy()
    expected, gradient = {
        "mse": (((a - b) ** 2).mean(), 2 * (a - b) / a.size),
        "mse-sum": (((a - b) ** 2).sum() / len(a), 2 * (a - b) / len(a)),
        "l1": (np.abs(a - b).mean(), np.sign(a - b) / a.size),
    }[kind]
    assert loss.item() == pytest.approx(0.25 * expected, rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(given.estimate_bi.grad.numpy(), 0.25 * gradient, rtol=1e-4)


def test_the_defaults():
    method = QDm()
    assert (method.activation_bits, method.edge_bits, method.attention_matmul) == (4, 8, True)
    assert (method.taq, method.taq_epsilon, method.nem, method.nem_weight) == (True, 1e-5, "replace", 1.0)


def test_copies_and_files_draw_the_same_and_there_is_no_packed_form(tiny_recipe: TinyRecipe, tmp_path: Path):
    spec = tiny_recipe(TAQ, method="qdm")
    unet = students.finished(spec)
    student.save(tmp_path / "s.safetensors", unet, spec, seed=0, step=6)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([7, 700])
    with torch.no_grad():
        expected = estimate_noise(unet, x, t)
        for net in (copy.deepcopy(unet), student.load(tmp_path / "s.safetensors").student):
            assert torch.equal(estimate_noise(net, x, t), expected)
    with pytest.raises(BdmError, match="has no packed form: its queries and keys are normalised per channel"):
        students.packed(spec, unet)
