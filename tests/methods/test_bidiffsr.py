"""BI-DiffSR: groups of timesteps, its unit per image against one network per group, and what is stored."""

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
from bdm_cli.methods.bidiffsr import BiDiffSr, TimeThreshold, TimeUnit
from bdm_cli.quant.layers import Parts, QuantConv2d
from bdm_cli.quant.quantizers import Lsq, MeanSignWeight, SignActivation
from bdm_cli.quant.ste import sign_poly_ste
from bdm_cli.quant.swap import EDGES, quantized_layers
from bdm_cli.recipe import Recipe

ONE_BIT = ("method.activation_bits=1", "method.edge_bits=32")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("groups", "n_timesteps", "t", "expected"),
    [
        (5, 1000, [0, 199, 200, 399, 400, 599, 600, 799, 800, 999], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (5, 1000, [1000, 5000], [4, 4]),  # beyond the schedule
        (5, 1000, [199.9, 200.0, 998.5], [0, 1, 4]),  # DPM-Solver's times are fractions
        (5, 2000, [399, 400, 1999], [0, 1, 4]),
        (3, 1000, [333, 334, 666, 667], [0, 1, 1, 2]),
        (7, 1000, list(range(1000)), [t * 7 // 1000 for t in range(1000)]),
        (1, 1000, [0, 999], [0, 0]),
    ],
)
def test_groups_of_timesteps(groups: int, n_timesteps: int, t: list[float], expected: list[int]):
    frame = TimeThreshold(nn.Linear(1, 1), groups, n_timesteps)
    frame.threshold.data = torch.arange(groups).float()[:, None]
    frame.timestep = torch.tensor(t)
    assert frame.before(torch.zeros(len(t), 1)).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("layer", "shape", "place"),
    [
        (nn.Conv2d(3, 5, 1), (4, 3, 6, 6), (3, 1, 1)),
        (nn.Linear(3, 5), (4, 7, 3), (1, 3)),
        (nn.Linear(3, 5), (4, 3), (3,)),
    ],
    ids=["conv", "tokens", "linear"],
)
def test_thresholds_are_each_images_own(layer: nn.Module, shape: tuple[int, ...], place: tuple[int, ...]):
    frame = TimeThreshold(layer, 5, 1000).double()
    assert torch.equal(frame.threshold, torch.zeros_like(frame.threshold))
    frame.threshold.data = normal(*frame.threshold.shape)
    x, g = normal(*shape, seed=1), normal(*shape, seed=2)
    frame.timestep = torch.tensor([5, 999, 250, 10])
    groups = [0, 4, 1, 0]
    moved = frame.before(x)
    thresholds = frame.threshold.detach().numpy().reshape(5, 3)
    for image, group in enumerate(groups):
        np.testing.assert_array_equal(
            moved[image].detach().numpy(), x[image].numpy() + thresholds[group].reshape(place)
        )
    moved.backward(g)
    expected = np.zeros((5, 3))
    for image, group in enumerate(groups):
        axis = place.index(3)
        others = tuple(i for i in range(len(shape) - 1) if i != len(shape) - 1 - len(place) + axis)
        expected[group] += g[image].numpy().sum(others)
    np.testing.assert_allclose(frame.threshold.grad.numpy().reshape(5, 3), expected, rtol=1e-12)
    frame.timestep = torch.tensor([250])  # one for all images
    assert torch.equal(frame.before(x), x + frame.threshold[1].view(*[1] * (len(shape) - len(place)), *place))


def of_group(unit: TimeUnit, x: Tensor, product: Tensor, bias: Tensor, group: int) -> Tensor:
    y = product + bias.view(-1, 1, 1) + unit.move_1[group]
    y = y.clamp_min(0) + unit.slope[group] * y.clamp_max(0) + unit.move_2[group]
    return y if x.shape[1] != y.shape[1] else y + (x if x.shape == y.shape else F.avg_pool2d(x, 2))


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 4, 2), (4, 8, 1), (8, 4, 1)])
def test_the_unit_and_its_gradients(inputs: int, outputs: int, stride: int):
    """Images of three groups at once are as each group's alone; gradients gather by group."""
    unit = TimeUnit(nn.Conv2d(inputs, outputs, 3, stride, 1), 5, 1000).double()
    starts = [parameter.unique().tolist() for parameter in unit.parameters()]
    assert starts == [[0], [0], [0], [0.25]]
    for seed, parameter in enumerate(unit.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    twin = copy.deepcopy(unit)
    x, product, bias = (
        normal(4, inputs, 6, 6, seed=5),
        normal(4, outputs, 6 // stride, 6 // stride, seed=6),
        normal(outputs),
    )
    unit.timestep, groups = torch.tensor([700, 50, 720, 300]), [3, 0, 3, 1]
    y = unit.after(x, product, bias)
    g = normal(*y.shape, seed=7)
    y.backward(g)
    alone = torch.cat([of_group(twin, x[i : i + 1], product[i : i + 1], bias, group) for i, group in enumerate(groups)])
    torch.testing.assert_close(y, alone, rtol=1e-12, atol=1e-12)
    alone.backward(g)
    for name in ("move_1", "move_2", "slope"):
        found = getattr(unit, name).grad
        torch.testing.assert_close(found, getattr(twin, name).grad, rtol=1e-10, atol=1e-10)
        assert found.abs().sum((1, 2, 3)).gt(0).tolist() == [True, True, False, True, False]


def test_a_layers_values_and_gradients_at_one_bit():
    """y = RPReLU_g(conv(sgn(x + b_g), mean|w| sgn(w)) + bias) + x, for a convolution of one weight."""
    unit = TimeUnit(nn.Conv2d(1, 1, 1), 2, 1000)
    layer = QuantConv2d(nn.Conv2d(1, 1, 1), Parts(MeanSignWeight(), SignActivation(sign_poly_ste), unit)).double()
    layer.weight.data.fill_(-0.5)
    layer.bias.data.fill_(0.1)
    unit.threshold.data = torch.tensor([0.25, -0.25], dtype=torch.float64).view(2, 1, 1, 1)
    unit.timestep = torch.tensor([0, 999, 999])
    x = torch.tensor([-0.25, 0.5, -0.5], dtype=torch.float64).view(3, 1, 1, 1).requires_grad_()  # sums 0, 0.25, -0.75
    y = layer(x)
    y.sum().backward()
    np.testing.assert_allclose(y.flatten().tolist(), [0.25 * -0.4 - 0.25, 0.25 * -0.4 + 0.5, 0.6 - 0.5], rtol=1e-12)
    by_sum = np.array([0.25 * -0.5 * 2, 0.25 * -0.5 * 1.5, 1 * -0.5 * 0.5])
    np.testing.assert_allclose(x.grad.flatten().numpy(), by_sum + 1, rtol=1e-12)
    np.testing.assert_allclose(unit.threshold.grad.flatten().numpy(), [by_sum[0], by_sum[1] + by_sum[2]], rtol=1e-12)
    assert layer.weight.grad.item() == 0.25 * 1 + 0.25 * 1 + 1 * -1
    assert unit.slope.grad.flatten().tolist() == [pytest.approx(-0.4), pytest.approx(-0.4)]


def test_all_groups_are_stored_and_one_acts():
    unit = TimeUnit(nn.Conv2d(4, 6, 1), 5, 1000)
    assert unit.stored() == 5 * (4 + 3 * 6)
    assert unit.operations(torch.Size((1, 4, 5, 5)), torch.Size((1, 6, 5, 5))) == 100 + 3 * 150
    assert TimeUnit(nn.Conv2d(4, 4, 1), 5, 1000).operations(*[torch.Size((1, 4, 5, 5))] * 2) == 100 + 300 + 100
    assert TimeThreshold(nn.Linear(4, 6), 5, 1000).stored() == 20


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("form", ["original", "threshold"])
def test_which_layer_gets_what(tiny_recipe: Callable[..., Recipe], bits: int, form: str):
    spec = tiny_recipe(f"method.activation_bits={bits}", "method.groups=3", f"method.form={form}", method="bidiffsr")
    unet = build_unet(spec.unet)
    had_bias = {name: module.bias is not None for name, module in unet.named_modules() if hasattr(module, "weight")}
    methods.build(spec).quantize_(unet)
    for name, layer in quantized_layers(unet):
        assert (layer.bias is not None) == had_bias[name]
        if name in EDGES:
            assert (type(layer.weight_quantizer), layer.frame) == (Lsq, None)
            continue
        conv = isinstance(layer, nn.Conv2d)
        outputs, inputs = layer.weight.shape[:2]
        assert type(layer.frame) is (TimeUnit if conv and form == "original" else TimeThreshold)
        assert layer.frame.threshold.shape == ((3, inputs, 1, 1) if conv else (3, inputs))
        assert (layer.frame.groups, layer.frame.n_timesteps) == (3, 1000)
        assert type(layer.weight_quantizer) is MeanSignWeight
        assert type(layer.activation_quantizer) is (SignActivation if bits == 1 else Lsq)
        if conv and form == "original":
            assert layer.frame.carries == (inputs == outputs)
    assert (BiDiffSr().activation_bits, BiDiffSr().groups) == (4, 5)


def test_a_batch_of_many_times_is_each_image_by_itself(tiny_recipe: Callable[..., Recipe]):
    """And a copy reads its own times."""
    unet = students.finished(tiny_recipe(*ONE_BIT, method="bidiffsr"))
    twin = copy.deepcopy(unet)
    x, t = torch.randn(5, 1, 8, 8), torch.tensor([0, 999, 200, 450, 201])
    with torch.no_grad():
        together = estimate_noise(unet, x, t)
        twin(x, torch.zeros(5))
        assert all(m.timestep.tolist() == t.tolist() for m in unet.modules() if isinstance(m, TimeThreshold))
        for image in range(5):
            alike = estimate_noise(unet, x, t[image].expand(5))
            assert torch.equal(together[image], alike[image])
        assert not torch.allclose(together, estimate_noise(unet, x, torch.full((5,), 450)))


def test_groups_are_at_least_one(tiny_recipe: Callable[..., Recipe]):
    with pytest.raises(BdmError, match=r"method\.groups: .*\(given 0\)"):
        methods.build(tiny_recipe("method.groups=0", method="bidiffsr"))


@pytest.mark.parametrize("overrides", [(), ONE_BIT, ("method.form=threshold",)])
def test_packed_students_draw_bit_for_bit_at_any_time(tiny_recipe: Callable[..., Recipe], overrides: tuple[str, ...]):
    spec = tiny_recipe(*overrides, method="bidiffsr")
    unet = students.finished(spec)
    unpacked = student.unpacked(students.packed(spec, unet), Path("model"))
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for t in (0, 250, 999):
            found = estimate_noise(unpacked, x, torch.full((3,), t))
            assert torch.equal(found, estimate_noise(unet, x, torch.full((3,), t)))
