"""Affine grids, learned rounding and learned steps against float64 NumPy, written from methods.md, Sec. 5.13."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Quantizer
from bdm_cli.quant.reconstruction import (
    AffineActivation,
    AffineWeight,
    Examples,
    SoftRounding,
    affine_range,
    affine_search,
    distance,
    examples,
    in_forward_order,
    learn_rounding_,
    learn_steps_,
    real_activations,
    sharpness,
)

RANDOM = np.random.default_rng(0)
ROWS = np.stack(
    [
        RANDOM.standard_normal(200),
        RANDOM.standard_normal(200) ** 3,  # heavy tails: a narrower range is better
        RANDOM.random(200) + 2,  # of one sign
        -RANDOM.random(200) - 0.1,
        np.r_[RANDOM.standard_normal(199), 40.0],  # an outlier
    ]
)


def on_grid(x: np.ndarray, s: float, z: float, bits: int) -> np.ndarray:
    return s * (np.clip(np.round(x / s + z), 0, 2**bits - 1) - z)


def searched(row: np.ndarray, bits: int) -> tuple[float, float]:
    """The first of 80 shrink factors with the least L2.4 error, in a range that holds 0."""
    found = []
    for i in range(80):
        low, high = (1 - 0.01 * i) * min(row.min(), 0), (1 - 0.01 * i) * max(row.max(), 0)
        s = (high - low) / (2**bits - 1)
        z = np.round(-low / s)
        found.append((np.mean(np.abs(on_grid(row, s, z, bits) - row) ** 2.4), i, s, z))
    return min(found)[2:]


# grids


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_takes_the_best_of_80_ranges(bits: int):
    s, z = affine_search(torch.tensor(ROWS), bits)
    for row, step, zero in zip(ROWS, s, z, strict=True):
        wanted = searched(row, bits)
        assert (step.item(), zero.item()) == pytest.approx(wanted, rel=1e-12)
        assert 0 <= zero <= 2**bits - 1
        assert zero == zero.round()
    whole, _ = affine_range(torch.tensor(ROWS), bits)
    assert (s <= whole).all()
    assert (s[4] < whole[4]) == (bits < 8)


def test_the_range_of_min_and_max_holds_zero():
    s, z = affine_range(torch.tensor([[-1.0, 2.0], [1.0, 3.0], [-3.0, -1.0], [0.0, 0.0]]), 2)
    assert s.tolist() == pytest.approx([1.0, 1.0, 1.0, 1e-8])
    assert z.tolist() == [1, 0, 3, 0]


def test_silent_rows_get_a_small_step_and_stay_zero():
    quantizer = AffineWeight(4, (2, 3))
    quantizer.calibrate_(torch.zeros(2, 3))
    assert quantizer.scale.flatten().tolist() == pytest.approx([1e-8, 1e-8])
    assert quantizer(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("shape", [(5, 40), (5, 10, 2, 2)])
def test_affine_weights_are_quantized_per_output_channel(shape: tuple[int, ...]):
    weight = torch.tensor(ROWS[:, :40].reshape(shape))
    quantizer = AffineWeight(4, shape).double()
    assert quantizer.waiting
    assert quantizer(weight).isnan().all()
    quantizer.calibrate_(weight)
    assert not quantizer.waiting
    assert quantizer.scale.shape == quantizer.zero_point.shape == (5, *[1] * (len(shape) - 1))
    wanted = np.stack([on_grid(row, *searched(row, 4), 4) for row in ROWS[:, :40]])
    np.testing.assert_allclose(quantizer(weight).numpy().reshape(5, 40), wanted, rtol=1e-12)
    (term,) = quantizer.terms(weight)
    assert (term.bits, term.low, term.most) == (4, 0, 15)
    assert torch.equal(term.levels, term.levels.round())
    assert ((term.levels.flatten(1) + term.zero[:, None]).aminmax(dim=1)[0] >= 0).all()
    assert ((term.levels.flatten(1) + term.zero[:, None]).amax(1) <= 15).all()
    assert torch.equal(term.levels * quantizer.scale, quantizer(weight))
    assert list(quantizer.state_dict()) == ["scale", "zero_point"]
    assert list(quantizer.parameters()) == []


def test_affine_weights_at_the_clip_edges():
    quantizer = AffineWeight(2, (1, 8))
    quantizer.scale.fill_(0.5)
    quantizer.zero_point.fill_(1)  # levels -0.5, 0, 0.5, 1
    weight = torch.tensor([[-9.0, -0.76, -0.5, -0.0, 0.24, 0.26, 1.0, 1.1]], requires_grad=True)
    value = quantizer(weight)
    assert value.tolist() == [[-0.5, -0.5, -0.5, 0, 0, 0.5, 1, 1]]
    value.sum().backward()
    assert weight.grad.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("shape", [(4, 7, 1, 1), (4, 7, 3, 3), (4, 7)])
def test_split_weights_are_two_weights_side_by_side(shape: tuple[int, ...]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:, 3:] *= 10
    split, parts = AffineWeight(4, shape, 3), [weight[:, :3], weight[:, 3:]]
    split.calibrate_(weight)
    assert split.scale.shape == (4, 2, *[1] * (len(shape) - 2))
    alone = []
    for part in parts:
        quantizer = AffineWeight(4, part.shape)
        quantizer.calibrate_(part)
        alone.append(quantizer(part))
    assert torch.equal(split(weight), torch.cat(alone, 1))
    assert (split.stored(), quantizer.stored()) == (8, 4)
    joint = AffineWeight(4, shape)
    joint.calibrate_(weight)
    near = [(q(weight) - weight)[:, :3].square().mean() for q in (split, joint)]
    assert near[0] < 0.1 * near[1]
    with pytest.raises(NotImplementedError, match="two ranges"):
        split.terms(weight)


def test_grids_live_on_the_meta_device_and_in_copies():
    with torch.device("meta"):
        assert AffineWeight(4, (4, 7, 1, 1), 3).scale.is_meta
        assert AffineActivation(4).zero_point.is_meta
    quantizer = AffineWeight(4, (4, 7))
    quantizer.calibrate_(torch.randn(4, 7))
    twin = copy.deepcopy(quantizer)
    twin.scale.mul_(2)
    assert not torch.equal(twin.scale, quantizer.scale)


@pytest.mark.parametrize("start", ["search", "min-max"])
@pytest.mark.parametrize("bits", [4, 8])
def test_affine_activations(start: str, bits: int):
    x = np.random.default_rng(1).standard_normal((3, 4, 5)) ** 3 + 0.2
    quantizer = AffineActivation(bits, start).double()
    assert quantizer.waiting
    quantizer.calibrate_(torch.tensor(x))
    s, z = searched(x.reshape(-1), bits)
    if start == "min-max":
        s = (x.max() - x.min()) / (2**bits - 1)
        z = np.round(-x.min() / s)
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == pytest.approx((s, z), rel=1e-12)

    s *= 0.7  # so that some are clipped
    quantizer.scale.data.fill_(s)
    tensor = torch.tensor(x, requires_grad=True)
    g = np.random.default_rng(2).standard_normal(x.shape)
    value = quantizer(tensor)
    value.backward(torch.tensor(g))
    v, high = x / s + z, 2**bits - 1
    inside = (v >= 0) & (v <= high)
    assert not inside.all()
    np.testing.assert_allclose(value.detach().numpy(), on_grid(x, s, z, bits), rtol=1e-12)
    np.testing.assert_allclose(tensor.grad.numpy(), g * inside)
    by_step = np.where(inside, np.round(v) - v, np.clip(v, 0, high) - z)
    assert quantizer.scale.grad.item() == pytest.approx((g * by_step).sum(), rel=1e-10)
    grid = quantizer.grid()
    assert (grid.bits, grid.low, grid.zero) == (bits, 0, z)
    assert torch.equal(grid.step, quantizer.scale.detach().reshape(1))


# rounding


def rounding(bits: int = 3) -> tuple[np.ndarray, AffineWeight, SoftRounding]:
    weight = np.random.default_rng(3).standard_normal((4, 30))
    weight[0, 0] = 0.0
    quantizer = AffineWeight(bits, weight.shape).double()
    quantizer.calibrate_(torch.tensor(weight))
    return weight, quantizer, SoftRounding(quantizer, torch.tensor(weight))


def test_rounding_starts_at_the_weights_and_rounds_them_to_the_nearest():
    weight, quantizer, soft = rounding()
    s, z = quantizer.scale.numpy(), quantizer.zero_point.numpy()
    share = weight / s - np.floor(weight / s)
    np.testing.assert_allclose(soft.share().detach().numpy(), share, atol=1e-12)
    np.testing.assert_allclose(
        soft.logit.detach().numpy(), -np.log(1.2 / (share + 0.1) - 1), rtol=1e-9, atol=1e-12
    )  # the released code's form
    wanted = s * (np.clip(weight / s + z, 0, 7) - z)  # nothing rounded, only clipped
    np.testing.assert_allclose(soft(None).detach().numpy(), wanted, atol=1e-12)
    assert not np.allclose(wanted, weight)
    assert torch.equal(soft.rounded(), quantizer(torch.tensor(weight)))


def test_soft_and_hard_rounding_and_their_gradients():
    weight, quantizer, soft = rounding()
    s, z = quantizer.scale.numpy(), quantizer.zero_point.numpy()
    v = np.random.default_rng(4).standard_normal(weight.shape) * 3
    v[0, :4] = [0.0, math.log(11), -math.log(11), 9.0]  # h = 0.5, 1 and 0 at the edge, 1 beyond it
    soft.logit.data = torch.tensor(v)
    g = np.random.default_rng(5).standard_normal(weight.shape)
    value = soft(None)
    value.backward(torch.tensor(g))
    sigmoid = 1 / (1 + np.exp(-v))
    stretched = 1.2 * sigmoid - 0.1
    h = np.clip(stretched, 0, 1)
    level = np.floor(weight / s) + h + z
    np.testing.assert_allclose(value.detach().numpy(), s * (np.clip(level, 0, 7) - z), atol=1e-12)
    free = (stretched > 0) & (stretched < 1) & (level > 0) & (level < 7)
    sure = np.abs(stretched * (1 - stretched)) > 1e-9  # at the edge itself either is right
    expected = g * s * 1.2 * sigmoid * (1 - sigmoid) * free
    np.testing.assert_allclose((soft.logit.grad.numpy() - expected)[sure], 0, atol=1e-12)
    hard = s * (np.clip(np.floor(weight / s) + (v >= 0) + z, 0, 7) - z)
    np.testing.assert_allclose(soft.rounded().numpy(), hard, atol=1e-12)

    soft.logit.grad = None
    penalty = soft.penalty(3.5)
    penalty.backward()
    u = 2 * h - 1
    assert penalty.item() == pytest.approx((1 - np.abs(u) ** 3.5).sum(), rel=1e-10)
    slope = -3.5 * np.abs(u) ** 2.5 * np.sign(u) * 2 * 1.2 * sigmoid * (1 - sigmoid)
    slope *= (stretched > 0) & (stretched < 1)
    np.testing.assert_allclose((soft.logit.grad.numpy() - slope)[sure], 0, atol=1e-12)


def test_the_penalty_alone_lets_every_weight_choose_the_nearer_neighbour():
    _, _, soft = rounding()
    start = soft.share().detach()
    optimizer = torch.optim.Adam([soft.logit], 2e-2)
    for i in range(1, 301):
        optimizer.zero_grad()
        soft.penalty(sharpness(i, 300, 0.0)).backward()
        optimizer.step()
    clear = (start - 0.5).abs() > 0.02
    assert clear.double().mean() > 0.9
    torch.testing.assert_close(soft.share()[clear], (start >= 0.5)[clear].double(), atol=1e-3, rtol=0)


def test_rounded_weights_stay_where_they_are():
    """What a layer keeps after its rounding is on the grid of its quantizer, bit for bit, in fp32."""
    for bits in (2, 4, 8):
        weight = torch.randn(16, 200, generator=torch.Generator().manual_seed(bits))
        quantizer = AffineWeight(bits, weight.shape)
        quantizer.calibrate_(weight)
        soft = SoftRounding(quantizer, weight)
        soft.logit.data.normal_(generator=torch.Generator().manual_seed(9))
        rounded = soft.rounded()
        assert torch.equal(quantizer(rounded), rounded)
        assert not torch.equal(rounded, quantizer(weight))


def test_the_exponent_falls_after_a_free_start():
    assert [sharpness(i, 100, 0.2) for i in (1, 19, 20, 60, 100)] == [None, None, 20, 11, 2]
    assert sharpness(1, 4, 0.0) == 2 + 18 * 0.75
    assert sharpness(1, 100, 1.0) is None


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_distances_are_summed_over_channels(power: float):
    for shape, axis in (((2, 3, 4, 5), 1), ((2, 6, 3), 2), ((2, 3), 1)):
        a, b = np.random.default_rng(6).standard_normal((2, *shape))
        wanted = (np.abs(a - b) ** power).sum(axis).mean()
        assert distance(torch.tensor(a), torch.tensor(b), power).item() == pytest.approx(wanted, rel=1e-12)


# units


class Block(nn.Module):
    """Two layers around a shortcut, called with a name, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor, gain: Tensor, factor: float = 1.0) -> Tensor:
        return x + factor * self.second(torch.relu(self.first(x)) * gain[:, None, None, None])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(6, 3)
        self.stem = nn.Conv2d(2, 6, 3, padding=1)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        y = self.block(self.stem(x), gain=gain, factor=0.5)
        return self.head(y.mean((2, 3)))


def quantized(net: nn.Module, bits: int = 2, activation_bits: int = 4) -> nn.Module:
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d | nn.Linear):
                kind = QuantConv2d if isinstance(child, nn.Conv2d) else QuantLinear
                parts = Parts(AffineWeight(bits, child.weight.shape), AffineActivation(activation_bits))
                parts.weight_quantizer.calibrate_(child.weight)
                setattr(parent, name, kind(child, parts))
    return net.eval()


@pytest.fixture
def nets() -> tuple[Net, nn.Module, list[Tensor]]:
    """A teacher, its student whose activations are not started, and calls of 40 images."""
    torch.manual_seed(0)
    teacher = Net().eval()
    mix = torch.randn(2, 2)
    x = torch.einsum("nchw,cd->ndhw", torch.randn(40, 2, 5, 5), mix) + 0.5
    return teacher, quantized(teacher), [x, torch.rand(40) + 0.5]


def reached(net: nn.Module, module: nn.Module, calls: list[Tensor]) -> tuple[Tensor, Tensor]:
    """First input and output of a module in a whole forward."""
    seen = []
    hook = module.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        net(*calls)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("batch", [40, 7])
def test_examples_are_the_students_inputs_and_the_teachers_outputs(nets: tuple, batch: int):
    teacher, student, calls = nets
    chosen = torch.randperm(40)[:30]
    with real_activations(student):
        found = examples("block", teacher, student, calls, chosen, batch)
        x, _ = reached(student, student.block, calls)
    x_fp, y_fp = reached(teacher, teacher.block, calls)
    assert set(found.stacked) == {0, "gain"}
    assert found.fixed == {"factor": 0.5}
    torch.testing.assert_close(found.stacked[0], x[chosen])
    assert not torch.allclose(x, x_fp)
    assert torch.equal(found.stacked["gain"], calls[1][chosen])
    torch.testing.assert_close(found.targets, y_fp[chosen])
    own = examples("block", teacher, None, calls, chosen, batch)
    torch.testing.assert_close(own.stacked[0], x_fp[chosen])
    assert not any(module._forward_hooks or module._forward_pre_hooks for net in nets[:2] for module in net.modules())


def test_draws_are_of_different_images_and_say_how_to_call(nets: tuple):
    x, gain, targets = torch.arange(10.0)[:, None], torch.arange(10.0) + 100, torch.arange(10.0) + 200
    data = Examples({1: gain, 0: x, "named": gain}, {"factor": 2, 2: None}, targets)
    random = torch.Generator().manual_seed(0)
    arguments, options, target = data.draw(6, random, torch.device("cpu"))
    assert [type(part) for part in arguments] == [Tensor, Tensor, type(None)]
    assert set(options) == {"named", "factor"}
    assert len(target.unique()) == 6
    assert torch.equal(arguments[0][:, 0] + 200, target)
    assert torch.equal(arguments[1] + 100, target)
    assert sorted(data.draw(99, random, torch.device("cpu"))[2].tolist()) == targets.tolist()


def test_units_come_in_the_order_of_the_forward(nets: tuple):
    teacher, _, calls = nets
    assert in_forward_order(teacher, ["block", "head", "stem"], calls) == ["stem", "block", "head"]
    teacher.spare = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="spare"):
        in_forward_order(teacher, ["spare", "stem"], calls)
    with pytest.raises(ValueError, match="does not reach spare"):
        examples("spare", teacher, None, calls, torch.arange(4), 4)


def test_activations_are_real_for_a_while(nets: tuple):
    _, student, calls = nets
    before = dict(student.named_modules())
    with real_activations(student):
        inside = [module for module in student.modules() if isinstance(module, Quantizer)]
        assert {type(module) for module in inside} == {AffineWeight}
        assert student(*calls).isfinite().all()
    assert dict(student.named_modules()) == before
    assert student(*calls).isnan().all()


def error(unit: nn.Module, data: Examples) -> float:
    with torch.no_grad():
        arguments, options, target = data.draw(10**6, torch.Generator(), torch.device("cpu"))
        return distance(unit(*arguments, **options), target, 2.0).item()


def nothing(iterations: int, loss: float) -> None:
    pass


@pytest.mark.parametrize("name", ["stem", "block"])
def test_learned_rounding_beats_the_nearest(nets: tuple, name: str):
    teacher, student, calls = nets
    unit, told = student.get_submodule(name), []
    latent = [layer.weight.detach().clone() for layer in unit.modules() if isinstance(layer, QuantConv2d)]
    outside = {k: v.clone() for k, v in student.state_dict().items() if not k.startswith(f"{name}.")}
    with real_activations(student):
        data = examples(name, teacher, student, calls, torch.arange(40), 16)
        nearest = error(unit, data)
        learn_rounding_(
            unit, data, 250, 16, 1e-2, 0.01, 0.2, torch.Generator().manual_seed(0), lambda *a: told.append(a)
        )
        assert error(unit, data) < 0.9 * nearest
    assert [n for n, _ in told] == [100, 100, 50]
    for layer, before in zip((m for m in unit.modules() if isinstance(m, QuantConv2d)), latent, strict=True):
        q = layer.weight_quantizer
        assert isinstance(q, AffineWeight)
        assert torch.equal(q(layer.weight), layer.weight)
        levels = (layer.weight / q.scale + q.zero_point).round()
        below = ((before / q.scale).floor() + q.zero_point).clamp(0, 3)
        above = ((before / q.scale).floor() + 1 + q.zero_point).clamp(0, 3)
        assert ((levels == below) | (levels == above)).all()
        assert not torch.equal(layer.weight, q(before))
        assert layer.weight.grad is None
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in outside.items() if not v.isnan().any())


def test_learned_steps_lower_the_error_and_nothing_else_changes(nets: tuple):
    teacher, student, calls = nets
    for module in student.modules():
        if isinstance(module, AffineActivation):
            module.start = "min-max"
            module.register_forward_pre_hook(lambda q, inputs: q.calibrate_(inputs[0]) if q.waiting else None)
    student(*calls)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    data = examples("block", teacher, None, calls, torch.arange(40), 16)
    start = error(student.block, data)
    learn_steps_(student.block, data, 150, 16, 4e-3, torch.Generator().manual_seed(0), nothing)
    assert error(student.block, data) < start
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"block.{name}.activation_quantizer.scale" for name in ("first", "second")}
    assert all(parameter.grad is None for parameter in student.parameters())


def test_steps_stay_positive(nets: tuple):
    teacher, student, calls = nets
    for module in student.modules():
        if isinstance(module, AffineActivation):
            module.calibrate_(calls[0])
    data = examples("stem", teacher, None, calls, torch.arange(40), 16)
    learn_steps_(student.stem, data, 30, 16, 10.0, torch.Generator().manual_seed(0), nothing)
    assert student.stem.activation_quantizer.scale >= 1e-8


def test_a_loss_that_is_lost_is_an_error(nets: tuple):
    teacher, student, calls = nets
    with real_activations(student):
        data = examples("stem", teacher, student, calls, torch.arange(40), 16)
        data.targets.fill_(math.inf)
        weight = student.stem.weight.detach().clone()
        quantizer = student.stem.weight_quantizer
        with pytest.raises(FloatingPointError, match="its loss is nan at iteration 3"):
            learn_rounding_(student.stem, data, 3, 16, 1e-3, 0.01, 0.2, torch.Generator(), nothing)
    assert student.stem.weight_quantizer is quantizer
    assert torch.equal(student.stem.weight, weight)
